"""A run's model: its shape, and its weights to use or to go on from."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from lm import sharding
from lm.data.tokenizer import Tokenizer
from lm.errors import RunError, UsageError
from lm.interop import placed
from lm.interop.opened import Opened
from lm.model import adapters, parameters, quantized
from lm.model.adapters import ADAPTERS
from lm.model.config import ModelConfig
from lm.model.roles import SCORED, assemble
from lm.model.seam import Weight
from lm.runs import checkpoint, execution, foreign, rundir, saved_config
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


def load(run: str, *, warn: Callable[[str], None], bare: bool = False) -> Model:
    """Loads 'DIR' (its newest checkpoint that holds) or 'DIR@STEP' onto the current mesh, parameters alone; with `bare`
    those under its adapter.

    Raises UsageError if there is no such run or checkpoint, RunError if nothing in it can be read.
    """
    saved = rundir.read_config(run)
    cfg = execution.model_config(saved['config'], training=False)
    with ThreadPoolExecutor(1) as beside:  # half a second, where a vocabulary is large
        reading = beside.submit(Tokenizer.load, rundir.tokenizer_folder(run))
        if bare:
            base = saved_config.base_of(saved)
            params, parent = read_unchanged(base.path, abstract_in_use(base.path, cfg), base, warn=warn)
        else:
            params, parent = weights(run, abstract_in_use(run, cfg), warn=warn)
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
      abstract: the parameters, or some of them, as shapes and shardings. Where all are arrays, an adapter is merged
        into its base, and what is quantized made dense; else they are the weights that it asks for: `abstract_parent`.
    """
    if (model := foreign.find(run)) is not None:
        return _weights_of_model(model, abstract, warn=warn)
    saved = rundir.read_config(run)
    item, own, frozen, wanted = saved_config.weights_item(saved['config']), saved_config.about(saved), {}, abstract
    cfg = execution.model_config(saved['config'], training=False)
    if own.adapter is not None:
        under, base = saved_config.base_of(saved), _abstract_base(saved, cfg)
        frozen['base'] = read_unchanged(under.path, base, under, warn=warn)[0]
        wanted = abstract_adapter(own.adapter, base, cfg, saved['config'], scored=own.role in SCORED)
    elif own.quantized is not None:
        lying = abstract_params(cfg, own.role, own.quantized)
        wanted = {name: lying[name] for name in abstract}
    step, tree, meta = checkpoint.find(run, {item: {own.trains: wanted}}, warn=warn)
    model = assemble(tree[item], frozen)[own.role]
    if wanted is not abstract:
        model = {name: model[name] for name in abstract}
        if not any(isinstance(w, Weight) for w in jax.tree.leaves(abstract, is_leaf=lambda w: isinstance(w, Weight))):
            model = jax.jit(adapters.merged, out_shardings=shardings_of(abstract))(model)
    return model, Parent(run, step, checkpoint.saved_digest(meta, item, own.trains))


def _weights_of_model(model: Opened, abstract: Any, *, warn: Callable[[str], None]) -> tuple[Any, Parent]:
    """`weights` of another form's model, read as `abstract` lies. Its digest is that of all of its weights, float32."""
    for note in model.notes:
        warn(note)
    own = abstract_params(
        execution.model_config(foreign.config_of(model), training=False), foreign.about_of(model).role
    )
    params = placed.arrays(model, own | abstract)
    return {name: params[name] for name in abstract}, Parent(model.where, 0, checkpoint.digest(params))


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
    if before is not None and before.digest not in ('', now.digest):
        check_digest(before, now._replace(digest=checkpoint.digest(params)))


def check_digest(before: Parent, now: Parent) -> None:
    """Raises UsageError if two digests of a run differ."""
    if before.digest not in ('', now.digest):
        raise UsageError(
            f'{now.path} has other weights than when this run began: bring them back, or begin another run'
        )


def abstract_params(cfg: ModelConfig, role: str = 'policy', kind: str | None = None) -> Any:
    """The parameters of a role as shapes, dtypes and shardings on the current mesh, quantized where a kind is named."""
    plain = shapes(cfg, role)
    return with_shardings(plain if kind is None else jax.eval_shape(lambda p: quantized.quantized(p, kind), plain))


def abstract_in_use(run: str, cfg: ModelConfig) -> Any:
    """Returns what a run is talked to and evaluated as, as shapes, dtypes and shardings on the current mesh: quantized
    weights as they lie, an adapter beside them; over others it is merged."""
    return abstract_parent(run, cfg, saved_config.about(rundir.read_config(run)).role, merge=not _quantized(run))


def _quantized(run: str) -> bool:
    """Tells whether a run's weights lie quantized, or those under its adapters."""
    own = saved_config.about(saved := rundir.read_config(run))
    if own.adapter is None:
        return own.quantized is not None
    return _quantized(saved_config.base_of(saved).path)


def abstract_adapter(name: str, base: Any, cfg: ModelConfig, config: Mapping[str, Any], *, scored: bool) -> Any:
    """An adapter over parameters, both as shapes, dtypes and shardings on the current mesh; with the score of a reward
    model beside it."""
    settings = adapters.settings_of(config, name)
    found = jax.eval_shape(lambda key, base: ADAPTERS[name].init(key, base, settings), jax.random.key(0), base)
    return with_shardings(found | (parameters.shapes_of_scores(cfg) if scored else {}))


def abstract_parent(run: str, cfg: ModelConfig, role: str, *, merge: bool) -> Any:
    """Returns what a run is read as in a role: plain parameters, or unless they are to be merged an adapter over its
    base, as shapes, dtypes and shardings on the current mesh."""
    own = saved_config.about(saved := rundir.read_config(run))
    if own.adapter is None or merge:
        return abstract_params(cfg, role, own.quantized)
    base = _abstract_base(saved, cfg)
    adapter = abstract_adapter(own.adapter, base, cfg, saved['config'], scored=own.role in SCORED)
    return assemble({own.trains: adapter}, {'base': base})[own.role]


def _abstract_base(saved: Mapping[str, Any], cfg: ModelConfig) -> Any:
    """The base of an adapter with this config.json, as shapes, dtypes and shardings on the current mesh."""
    merge = adapters.settings_of(saved['config'], 'lora').get('merge', True)
    return abstract_parent(saved_config.base_of(saved).path, cfg, 'base', merge=merge)


def shapes(cfg: ModelConfig, role: str = 'policy') -> Any:
    """The parameters of a role as shapes and dtypes."""
    return parameters.shapes(cfg, scored=role in SCORED)


def shardings_of(abstract: Any) -> Any:
    """The shardings in a tree of shapes."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def with_shardings(tree: Any) -> Any:
    """A parameter-like tree of shapes with the shardings that its names say."""
    mesh = jax.sharding.get_mesh()
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(put, tree, sharding.shardings(mesh, sharding.param_specs(tree)))
