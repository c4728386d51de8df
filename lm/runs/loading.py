"""A run's model: its shape, and its weights to use or to go on from."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from lm import sharding
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.model import parameters
from lm.model.adapters import ADAPTERS
from lm.model.config import ModelConfig
from lm.model.roles import SCORED, assemble
from lm.runs import checkpoint, execution, rundir, saved_config
from lm.runs.saved_config import About, Parent


class Model(NamedTuple):
    """A trained model, ready to be used."""

    params: Any
    cfg: ModelConfig
    tokenizer: Tokenizer
    saved: Mapping[str, Any]  # config.json
    step: int

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's settings."""
        return self.saved['config']

    @property
    def about(self) -> About:
        return saved_config.about(self.saved)


def load(run: str, *, warn: Callable[[str], None]) -> Model:
    """Loads 'DIR' (its newest checkpoint that holds) or 'DIR@STEP' onto the current mesh, parameters alone.

    Raises UsageError if there is no such run or checkpoint, RunError if nothing in it can be read.
    """
    saved = rundir.read_config(run)
    cfg = execution.model_config(saved['config'], training=False)
    with ThreadPoolExecutor(1) as beside:  # half a second, where a vocabulary is large
        reading = beside.submit(Tokenizer.load, rundir.tokenizer_folder(run))
        params, parent = weights(run, abstract_params(cfg, saved_config.about(saved).role), warn=warn)
    try:
        tokenizer = reading.result()
    except OSError as error:
        raise RunError(f'the tokenizer of {run} cannot be read: {error}') from error
    if saved.get('tokenizer') not in (None, tokenizer.fingerprint):
        warn(
            f'{rundir.tokenizer_folder(run)} is not the tokenizer that the run was trained with: it was changed, or is '
            'damaged'
        )
    return Model(params, cfg, tokenizer, saved, parent.step)


def weights(run: str, abstract: Any, *, warn: Callable[[str], None]) -> tuple[Any, Parent]:
    """(what a run's checkpoint has for use, whence): the average of its weights if it kept one, else the weights.

    Args:
      abstract: the parameters, or some of them, as shapes and shardings.
    """
    saved = rundir.read_config(run)
    item, own, frozen = saved_config.weights_item(saved['config']), saved_config.about(saved), {}
    if own.adapter is not None:
        base = saved_config.parents(saved)['base']
        frozen['base'] = read_unchanged(base.path, abstract, base, warn=warn)[0]
        abstract = abstract_adapter(own.adapter, abstract)
    step, tree, meta = checkpoint.find(run, {item: {own.trains: abstract}}, warn=warn)
    models = assemble(tree[item], frozen)
    return models[own.role], Parent(run, step, checkpoint.saved_digest(meta, item, own.trains))


def branch(
    run: str, abstract: Mapping[str, Any], *, warn: Callable[[str], None]
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """(step, a checkpoint's tree to go on from, its meta). An average that the run did not keep begins with its
    weights; what the task keeps begins anew."""
    begin = {item for item in ('ema', 'task') if item in abstract and not checkpoint.holds(run, item)}
    step, tree, meta = checkpoint.find(run, {k: v for k, v in abstract.items() if k not in begin}, warn=warn)
    tree |= {'ema': jax.tree.map(jax.numpy.copy, tree['trainable'])} if 'ema' in begin else {}
    return step, tree, meta


def read_unchanged(
    run: str, abstract: Any, before: Parent | None, *, warn: Callable[[str], None]
) -> tuple[Any, Parent]:
    """`weights` of a run. Raises UsageError if they are not those that another run began with (None: it begins now)."""
    params, now = weights(run, abstract, warn=warn)
    check_unchanged(before, params, now)
    return params, now


def check_unchanged(before: Parent | None, params: Any, now: Parent) -> None:
    """Raises UsageError if weights that were read now are not those that a run began with. Older versions took the
    digest of converted models after the cast."""
    if before is not None and before.digest not in ('', now.digest) and checkpoint.digest(params) != before.digest:
        raise UsageError(
            f'{now.path} has other weights than when this run began: bring them back, or begin another run'
        )


def abstract_params(cfg: ModelConfig, role: str = 'policy') -> Any:
    """The parameters of a role as shapes, dtypes and shardings on the current mesh."""
    return with_shardings(shapes(cfg, role))


def abstract_adapter(name: str, base: Any) -> Any:
    """An adapter over parameters, both as shapes, dtypes and shardings on the current mesh."""
    return with_shardings(jax.eval_shape(lambda key: ADAPTERS[name](key, base), jax.random.key(0)))


def abstract_model(saved: Mapping[str, Any], cfg: ModelConfig) -> Any:
    """Returns what `load` gives of a run with this config.json, as shapes, dtypes and shardings on the current mesh."""
    own = saved_config.about(saved)
    params = abstract_params(cfg, own.role)
    if own.adapter is None:
        return params
    return assemble({'adapter': abstract_adapter(own.adapter, params)}, {'base': params})['policy']


def shapes(cfg: ModelConfig, role: str = 'policy') -> Any:
    """The parameters of a role as shapes and dtypes."""
    return parameters.shapes(cfg, scored=role in SCORED)


def with_shardings(tree: Any) -> Any:
    """A parameter-like tree of shapes with the shardings that its names say."""
    mesh = jax.sharding.get_mesh()
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, tree, sharding.shardings(mesh, sharding.param_specs(tree)))
