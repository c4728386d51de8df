"""Parquet files: which column holds the documents, and the rows, row group by row group."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from lm.data.conversations import choose_column
from lm.errors import UsageError

_ROWS_AT_ONCE = 1024


def text_column(path: str, wanted: str | None) -> str:
    """The column of a file that holds its documents. Reads only its footer.

    Raises UsageError if there is none, or the file is no whole parquet file.
    """
    with _opened(path) as file:
        schema = file.schema_arrow
    return choose_column(path, wanted, [field.name for field in schema if _is_text(field.type)], schema.names)


def columns_of(path: str) -> list[str]:
    """The names of a file's columns. Raises UsageError if it is no whole parquet file."""
    with _opened(path) as file:
        return file.schema_arrow.names


def read_rows(path: str, columns: Sequence[str] | None) -> Iterator[dict[str, Any] | None]:
    """The rows of a file in order, with these columns (None: all), None for one with a text that is not UTF-8. At most
    a row group is in memory.

    Raises UsageError where the file is damaged.
    """
    with _opened(path) as file:
        for group in range(file.num_row_groups):
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
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
    """Tells whether a column of this type can hold text: a string, plain or as a dictionary, or bytes that may be
    UTF-8."""
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.string, pa.large_string, pa.string_view, pa.binary, pa.large_binary, pa.binary_view)
    return kind in [make() for make in texts]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """An open file; what pyarrow says of a damaged one becomes one line that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as e:
        reason = str(e).strip().partition('\n')[0][:200]
        raise UsageError(f'{path} is damaged or no parquet file ({reason}): restore it or leave it out') from e
