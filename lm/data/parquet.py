"""Parquet files: which column holds the documents, its values or whole rows, row group by row group."""

import contextlib
from collections.abc import Iterator
from typing import Any

from lm.data.conversations import choose_column
from lm.errors import UsageError

# pyarrow takes half a second to import, and a start that finds its data prepared needs none of it.
_ROWS_AT_ONCE = 1024


def text_column(path: str, wanted: str | None) -> str:
    """The column of a file that holds its documents. Reads its footer alone.

    Raises UsageError if there is none, or the file is no whole parquet file.
    """
    import pyarrow.parquet as pq

    with _told(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        schema = file.schema_arrow
    return choose_column(path, wanted, [field.name for field in schema if _is_text(field.type)], schema.names)


def read_column(path: str, column: str) -> Iterator[bytes | None]:
    """The values of a column in order, None where a row has none. At most a row group is in memory.

    Raises UsageError where the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _told(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
                # As bytes, because decoding a whole batch would fail for one value that is no UTF-8.
                yield from batch.column(0).cast(pa.large_binary()).to_pylist()


def columns_of(path: str) -> list[str]:
    """The names of a file's columns. Raises UsageError if it is no whole parquet file."""
    import pyarrow.parquet as pq

    with _told(path), pq.ParquetFile(path) as file:
        return file.schema_arrow.names


def read_rows(path: str) -> Iterator[dict[str, Any] | None]:
    """The rows of a file in order, None for one with a text that is not UTF-8. At most a row group is in memory.

    Raises UsageError where the file is damaged.
    """
    import pyarrow.parquet as pq

    with _told(path), pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group]):
                yield from _decoded(batch)


def _decoded(batch: Any) -> Iterator[dict[str, Any] | None]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None


def _is_text(kind: Any) -> bool:
    """Whether a column of this type can hold text: a string, plain or as a dictionary, or bytes that may be UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    t = pa.types
    texts = (t.is_string, t.is_large_string, t.is_string_view, t.is_binary, t.is_large_binary, t.is_binary_view)
    return any(test(kind) for test in texts)


@contextlib.contextmanager
def _told(path: str) -> Iterator[None]:
    """What pyarrow says of a damaged file becomes one line that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as e:
        reason = str(e).strip().partition('\n')[0][:200]
        raise UsageError(f'{path} is damaged or no parquet file ({reason}): restore it or leave it out') from e
