"""config.json of a Hugging Face folder <-> `model.*`, by the tables of families.py.

Both its forms are read: that of transformers 4 (rope_theta, rope_scaling) and that of 5 (rope_parameters, perhaps one
for each type of layer). The first is written: both versions read it. Which architecture a graph is is asked of the
reader: its settings are written for one, read back, and compared.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import UsageError
from lm.interop.graph import PLAIN, differences, first_exact, kinds, scales
from lm.interop.huggingface.families import ACTIVATIONS, COMMON, FAMILIES, NEUTRAL, VISION, Family, Key
from lm.model.layers import RopeScaling
from lm.settings import INT32_MAX

MOST_LAYERS = 4096  # a hostile file's number is a loop of ours
BIASED = 'attention_bias'
QUANTIZED = ('quantization_config', 'quantization')  # of transformers, of MLX
FULL, SLIDING = 'full_attention', 'sliding_attention'
_SCALINGS = {  # by rope_type: its own names, and ours
    'linear': {'factor': 'factor'},
    'llama3': {
        'factor': 'factor', 'low_freq_factor': 'low', 'high_freq_factor': 'high',
        'original_max_position_embeddings': 'original',
    },
}  # fmt: skip
# Which values a key of each kind may have, and what others are told to be.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'size': (lambda x: type(x) is int and 1 <= x <= INT32_MAX, f'not a whole number from 1 to {INT32_MAX}'),
    'count': (lambda x: type(x) is int and x >= 0, 'not a whole number from 0'),
    'real': (lambda x: type(x) in (int, float) and 0 < x < 1e38, 'not a positive number'),
    'flag': (lambda x: isinstance(x, bool), 'neither true nor false'),
}


class Described(NamedTuple):
    """A model as its config.json says it.

    Attributes:
      family: the architecture.
      scored: whether it is a reward model.
      model: the settings `model.*`.
      vision: whether the folder holds a model of images beside it.
    """

    family: Family
    scored: bool
    model: dict[str, Any]
    vision: bool


# ---- reading ----


def describe(config: Mapping[str, Any], where: str) -> Described:
    """A model by its config.json. Raises UsageError for an architecture that we do not know, or a key that it has and
    our decoder cannot express, by its name."""
    family, scored, vision = _family_of(config, where)
    inner = config.get('text_config') if vision else config
    if not isinstance(inner, Mapping):
        raise UsageError(f'{where}: text_config is no object: get the folder again')
    for key in QUANTIZED:
        if told := inner.get(key) or config.get(key):
            kind = told.get('quant_method', told) if isinstance(told, Mapping) else told
            raise UsageError(f'{where}: {key}={_short(kind)}: its weights are quantized, get those that are not')
    for key, value in NEUTRAL.items():
        neutral = all(x.get(key) in (None, value) for x in (inner, config))
        if not neutral and not (family.biased and key == BIASED):
            raise UsageError(f'{where}: {key}={_short(inner.get(key, config.get(key)))} is not in our graph')
    names = config.get('id2label')
    labels = config.get('num_labels', len(names) if isinstance(names, Mapping) else 2)  # two, where nothing is said
    if scored and labels != 1:
        raise UsageError(f'{where}: num_labels={labels}: a reward model has one')
    return Described(family, scored, graph(_Keys(inner, where), family, scored=scored), vision)


def _family_of(config: Mapping[str, Any], where: str) -> tuple[Family, bool, bool]:
    """(the family, whether its class gives scores, whether it stands under text_config)."""
    names = config.get('architectures')
    name = names[0] if isinstance(names, list) and names else None
    found = [family for family in FAMILIES if name is not None and name in (family.causal, family.scored)]
    if found:
        family = next((family for family in found if family.biased == (config.get(BIASED) is True)), found[0])
        return family, name == family.scored, False
    if name == VISION:
        return FAMILIES[-1], False, True
    known = ', '.join(family.causal.removesuffix('ForCausalLM') for family in FAMILIES)
    raise UsageError(
        f'{where}: the architecture {_short(name)} is not one that we have: {known}, each '
        'ForCausalLM or ForSequenceClassification'
    )


def graph(get: '_Keys', family: Family, *, scored: bool) -> dict[str, Any]:
    """`model.*` of a config."""
    model: dict[str, Any] = dict(PLAIN)
    for ours, key in (COMMON | family.keys).items():
        if ours not in ('kv_heads', 'head_dim'):
            model[ours] = get.value(key._replace(default=family.defaults.get(ours, key.default)))
    if model['layers'] > MOST_LAYERS:
        raise UsageError(f'{get.where}: num_hidden_layers={model["layers"]} is more than {MOST_LAYERS}')
    heads, width = model['heads'], family.defaults.get('head_dim', model['dim'] // model['heads'])
    options = {'default': family.defaults.get('kv_heads', heads), 'null': get.config.get('num_attention_heads')}
    model['kv_heads'] = get.value(COMMON['kv_heads']._replace(**options))
    model['head_dim'] = get.value(COMMON['head_dim']._replace(default=width, null=width))
    model |= family.graph | {'activation': _activation(get, family)}
    model['embed_scale'] = family.scaled(model['dim']) if family.scaled else model['embed_scale']
    model['tied'] = model['tied'] or scored  # without a head of its own
    return model | _positions(get, family, model)


def _activation(get: '_Keys', family: Family) -> str:
    name = get.config.get(family.activation) or family.defaults.get('activation', 'silu')
    if name == 'gelu' and family.model_type == 'gemma':  # of the first releases, which mean the approximation
        name = 'gelu_pytorch_tanh'
    if not isinstance(name, str) or name not in ACTIVATIONS:
        known = ', '.join(ACTIVATIONS)
        raise UsageError(f'{get.where}: {family.activation}={_short(name)} is not in our graph: {known}')
    return ACTIVATIONS[name]


def _positions(get: '_Keys', family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    """The kinds of layer, their windows and their rotary positions."""
    words, window = _words(get, family, model['layers'])
    theta, scaling = rotary(get, family, FULL)
    own = family.local_theta is not None
    local = rotary(get, family, SLIDING) if own else (theta, scaling)
    if own and local[1]:
        raise UsageError(f'{get.where}: rope_parameters of {SLIDING} with a scaling are not in our graph')
    if set(words) == {'local'} and not own:
        return {'window': window, 'rope_theta': theta, 'rope_scaling': scaling}
    if scaling and 'local' in words and not own:
        raise UsageError(f'{get.where}: rope_scaling of layers with a sliding window beside others is not in our graph')
    out = {'rope_theta': theta, 'rope_scaling': scaling, 'pattern': repeated(words)}
    if 'local' not in words:
        return out
    return out | {'window': window, 'rope_theta_local': None if local[0] == theta else local[0]}


def _words(get: '_Keys', family: Family, layers: int) -> tuple[list[str], int | None]:
    """(the kind of each layer, the window of local ones)."""
    window, used = None, family.window != 'never'
    if family.window == 'switched':
        used = get.value(Key('use_sliding_window', False, kind='flag', null=False))
    if used:
        window = get.value(Key('sliding_window', family.defaults.get('window'), kind='size', optional=True))
    rope = _rope_layers(get, family, layers)
    types = get.config.get('layer_types')
    if types is None:
        types = [SLIDING if slides else FULL for slides in _sliding(get, family, window, rope)]
    if not isinstance(types, list) or len(types) != layers or any(t not in (FULL, SLIDING) for t in types):
        raise UsageError(f'{get.where}: layer_types={_short(types)} is not {layers} of {FULL} and {SLIDING}')
    if SLIDING in types and window is None:
        raise UsageError(f'{get.where}: layer_types has {SLIDING}, but there is no sliding_window in use')
    if family.window == 'always' and window is not None and FULL in types:
        raise UsageError(f'{get.where}: layer_types of more than one kind are not of {family.causal}')
    still = [i for i, turns in enumerate(rope) if not turns]
    if clash := [i for i in still if types[i] == SLIDING]:
        raise UsageError(f'{get.where}: no_rope_layers with a sliding window (layer {clash[0]}) are not in our graph')
    return ['nope' if i in still else 'local' if t == SLIDING else 'global' for i, t in enumerate(types)], window


def _sliding(get: '_Keys', family: Family, window: int | None, rope: Sequence[bool]) -> list[bool]:
    """Tells which layers have the sliding window where the file does not say."""
    if window is None:
        return [False] * len(rope)
    if family.period:
        period = get.value(Key('sliding_window_pattern', family.period, kind='size'))
        return [(i + 1) % period != 0 for i in range(len(rope))]
    if family.nope:
        return [not turns for turns in rope]
    first = get.value(Key('max_window_layers', 28, kind='count')) if family.window == 'switched' else 0
    return [i >= first for i in range(len(rope))]


def _rope_layers(get: '_Keys', family: Family, layers: int) -> list[bool]:
    """Tells which layers have rotary positions."""
    if not family.nope:
        return [True] * layers
    told = get.config.get('no_rope_layers')
    if told is None:
        interval = get.value(Key('no_rope_layer_interval', 4, kind='size'))
        return [(i + 1) % interval != 0 for i in range(layers)]
    if not isinstance(told, list) or len(told) < layers or any(x not in (0, 1) for x in told):
        raise UsageError(f'{get.where}: no_rope_layers={_short(told)} is not a 0 or 1 for each of {layers} layers')
    return [bool(x) for x in told[:layers]]


def repeated(words: Sequence[str]) -> str | None:
    """A pattern's shortest text; None where all layers are global."""
    period = next(n for n in range(1, len(words) + 1) if all(w == words[i % n] for i, w in enumerate(words)))
    pattern = ','.join(words[:period])
    return None if pattern == 'global' else pattern


def rotary(get: '_Keys', family: Family, layer_type: str) -> tuple[float, str | None]:
    """(theta, scaling) of the layers of a type."""
    told = get.config.get('rope_scaling') or get.config.get('rope_parameters') or {}
    nested = isinstance(told, Mapping) and bool({FULL, SLIDING} & set(told))
    params = told.get(layer_type) or {} if nested else told
    if not isinstance(params, Mapping) or (nested and not isinstance(told.get(FULL, {}), Mapping | None)):
        raise UsageError(f'{get.where}: its rope_parameters are no object: get the folder again')
    if nested and not family.local_theta and told.get(SLIDING) not in (None, told.get(FULL)):
        raise UsageError(f'{get.where}: rope_parameters that differ by the type of layer are not in our graph')
    default, name = family.defaults.get('rope_theta', 1e4), 'rope_theta'
    if layer_type == SLIDING:
        default, name = family.local_theta, 'rope_local_base_freq'
        params = params if nested else {}  # a scaling that stands alone is the global layers'
    top = get.value(Key(name, default))
    rope = _Keys(params, f'{get.where}: rope_parameters')
    theta = rope.value(Key('rope_theta', top))
    if (part := params.get('partial_rotary_factor')) not in (None, 1, 1.0):
        raise UsageError(f'{rope.where}.partial_rotary_factor={_short(part)} is not in our graph')
    return theta, _scaling(rope)


def _scaling(rope: '_Keys') -> str | None:
    """model.rope_scaling."""
    kind = rope.config.get('rope_type', rope.config.get('type', 'default'))
    if kind in (None, 'default'):
        return None
    if kind not in tuple(_SCALINGS):
        raise UsageError(f'{rope.where}.rope_type={_short(kind)} is not in our graph: default, linear and llama3 are')
    values = [f'{ours}={_number(rope.value(Key(theirs)))}' for theirs, ours in _SCALINGS[kind].items()]
    return ','.join([kind, *values])


def _number(x: float) -> str:
    """'8', '0.5', '1048576': to the last digit."""
    return str(int(x)) if x == int(x) else repr(x)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}…'


class _Keys:
    """The keys of a config, of the types that we want. Raises UsageError for others."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def value(self, key: Key) -> Any:
        """A setting, None where it is optional and not there."""
        value = self.config.get(key.name, key.default)
        value = key.null if value is None else value
        if value is None and key.optional:
            return None
        if value is None:
            raise UsageError(f'{self.where} has no {key.name}')
        fits, wanted = _KINDS[key.kind]
        if not fits(value):
            raise UsageError(f'{self.where}: {key.name}={_short(value)} is {wanted}')
        return key.read(float(value) if key.kind == 'real' else value)


# ---- writing ----


def choose(model: Mapping[str, Any], *, scored: bool, without: str | None = None) -> tuple[Family, dict[str, Any]]:
    """(the first family that is this graph exactly, its config.json without ids and dtype).

    Args:
      without: the model_type of families that are not to be chosen.

    Raises UsageError with the settings that the nearest lacks.
    """
    given = _all_local(PLAIN | dict(model))
    able = [family for family in FAMILIES if (family.scored or not scored) and family.model_type != without]
    configs = ((family, compose(given, family, scored=scored)) for family in able)
    tried = ((f.causal, (f, config), _differences(given, config, f, scored=scored)) for f, config in configs)
    return first_exact('Hugging Face', tried)


def _all_local(model: dict[str, Any]) -> dict[str, Any]:
    """The same graph without a pattern, if that says that all layers are local: these then have their own positions."""
    if model['pattern'] is None or set(kinds(model)) != {'local'}:
        return model
    theta = model['rope_theta_local'] or model['rope_theta']
    return model | {'pattern': None, 'rope_theta': theta, 'rope_theta_local': None, 'rope_scaling': None}


def compose(model: Mapping[str, Any], family: Family, *, scored: bool) -> dict[str, Any]:
    """A graph as a family's config.json; what the family has no key for is not there."""
    config: dict[str, Any] = {
        'architectures': [family.scored if scored else family.causal], 'model_type': family.model_type,
    }  # fmt: skip
    numbers = scales(model)
    for ours, key in (COMMON | family.keys).items():
        value = numbers.get(ours, model[ours])
        config[key.name] = None if value is None else key.write(value)
    config |= {BIASED: True} if family.biased else {}
    if model['context'] is None:
        del config[COMMON['context'].name]  # which has no null
    activation = model['activation']
    config[family.activation] = next((theirs for theirs, ours in ACTIVATIONS.items() if ours == activation), activation)
    return config | _windows(model, family) | _rope(model, family)


def _windows(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    words, window = kinds(model), model['window']
    types = [SLIDING if word == 'local' else FULL for word in words]
    config: dict[str, Any] = {}
    if family.window != 'never':
        config['sliding_window'] = window if 'local' in words else None
    if family.window == 'switched':
        config |= {'use_sliding_window': 'local' in words, 'layer_types': types}
        config['max_window_layers'] = types.index(SLIDING) if SLIDING in types else len(types)
    if family.window == 'given':
        config['layer_types'] = types
    if family.nope:
        config['no_rope_layers'] = [int(word != 'nope') for word in words]
        config.pop('max_window_layers')
    return config


def _rope(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    config: dict[str, Any] = {'rope_theta': float(model['rope_theta']), 'rope_scaling': None}
    if family.local_theta:
        config['rope_local_base_freq'] = float(model['rope_theta_local'] or model['rope_theta'])
    scaling = RopeScaling.parse(model['rope_scaling'])
    if scaling:
        values = {theirs: getattr(scaling, ours) for theirs, ours in _SCALINGS[scaling.kind].items()}
        config['rope_scaling'] = {'rope_type': scaling.kind} | values
    if scaling and scaling.kind == 'llama3':
        config['rope_scaling']['original_max_position_embeddings'] = int(scaling.original)
    return config


def _differences(model: Mapping[str, Any], config: Mapping[str, Any], family: Family, *, scored: bool) -> list[str]:
    """'model.KEY=THIS (ARCHITECTURE: THAT)' of the settings that this config.json would not keep."""
    try:
        seen = describe({**config, 'num_labels': 1}, family.causal).model
    except UsageError as error:
        return [str(error)]
    unread = {'tied': True, 'logit_scale': None, 'logit_softcap': None} if scored else {}
    misses = differences({**model, **unread}, seen | unread, family.model_type)
    if family.square and model['dim'] % model['heads']:
        misses.append(f'model.dim={model["dim"]} ({family.model_type}: a multiple of model.heads={model["heads"]})')
    return misses
