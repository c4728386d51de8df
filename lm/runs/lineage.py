"""Lineage: the settings that a run takes from the one it starts from."""

from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from lm.config import Config, base, leaves
from lm.data.tokenizer import Tokenizer
from lm.errors import UsageError
from lm.runs import checkpoint, foreign, rundir, saved_config
from lm.runs.saved_config import About


def inherit_model(
    config: Config, own: About, chosen: Collection[str], workdir: epath.Path | None = None, *, weights: bool = True
) -> None:
    """With init_from or branch_from, takes the model and the tokenizer of that run.

    Once `workdir` holds the run, its own config.json says all that the parent did, and the parent may be gone.

    Args:
      own: of the stage that is to run. chosen: the settings that the command line names or moves.
      weights: whether a checkpoint of that run will be needed.

    Raises:
      UsageError: one of them is a model.* that differs, a branch has other data, a stage that speaks is to start from
        a reward model, data.tokenizer gives other ids than that run's, or there is no such run or checkpoint.
    """
    parent = config.init_from or config.branch_from
    if not parent:
        return
    resumed = workdir is not None and (workdir / 'config.json').exists() and checkpoint.listed(workdir / 'checkpoints')
    whole = rundir.read_own(workdir) if workdir is not None and resumed else rundir.read_config(parent)
    saved, theirs = whole['config'], saved_config.about(whole)
    if weights and not resumed:
        checkpoint.locate(parent)
    if theirs.output == 'scores' and own.output != 'scores':
        raise UsageError(
            f'{parent} is a reward model, which gives scores and has not learned to speak: set init_from to the run '
            f'that it started from ({saved["init_from"]})'
        )
    if config.branch_from and not resumed:
        if foreign.find(parent) is not None:
            raise UsageError(f'{parent} is no run and has no position to branch from: start with init_from')
        _check_branch(config, saved)
    model = base().model.to_dict() | saved['model']  # a setting newer than that run has its default
    for key in sorted(chosen):
        name = key.removeprefix('model.')
        if key.startswith('model.') and config.model[name] != model[name]:
            raise UsageError(f'{key}={config.model[name]} differs from {parent}, which has {model[name]}: leave it out')
    config.model.update(model)
    if own.data != 'text' and config.data.pretraining is None:
        config.data.pretraining = saved_config.pretraining_of(whole)
    if config.data.tokenizer is None:
        config.data.tokenizer = saved['data']['tokenizer'] if resumed else rundir.tokenizer_folder(parent)
    elif not resumed and config.data.tokenizer != rundir.tokenizer_folder(parent):
        _check_tokenizer(config.data.tokenizer, parent)


def _check_branch(config: Config, saved: Mapping[str, Any]) -> None:
    """Raises UsageError where a position in the parent's data is not one in the branch's."""
    old, new = dict(leaves(saved)), dict(leaves(config))
    if old['optim.name'] != new['optim.name']:
        raise UsageError(
            f'{config.branch_from} has the state of optim.name={old["optim.name"]}: set it so, or start with init_from'
        )
    position = ['optim.batch_warmup', 'execution.microbatch'] if new['optim.batch_warmup'] else ['optim.batch_warmup']
    keys = ('batch_size', 'seq_len', 'seed', *position, *(k for k in new if k.startswith('data.')))
    same_tokens = new['data.tokenizer'] in (None, old['data.tokenizer'], rundir.tokenizer_folder(config.branch_from))
    other = [k for k in keys if k in old and old[k] != new[k] and not (k == 'data.tokenizer' and same_tokens)]
    if other:
        told = ', '.join(f'{k} ({old[k]} there, {new[k]} now)' for k in other)
        raise UsageError(f'{config.branch_from} has other data: {told}; set them as there, or start with init_from')


def _check_tokenizer(given: str, parent: str) -> None:
    """Raises UsageError unless the ids that a parent has learned stand for the same by another tokenizer, which may
    have more."""
    own = Tokenizer.load(rundir.tokenizer_folder(parent)).pieces
    if Tokenizer.load(given).pieces[: len(own)] != own:
        raise UsageError(f'data.tokenizer={given} gives other ids than those that {parent} has learned: leave it out')
