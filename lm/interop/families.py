"""The architectures of Hugging Face's that are graphs of ours: tables of names, and config.json to `model.*` and back.

Each family fixes some switches and names others in its config.json. What a config has beside and we cannot express is
refused by its key, so that no model is read as another.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lm.errors import UsageError
from lm.interop.gguf_arch import plain_number

TOP = {'embed_VD': 'model.embed_tokens.weight', 'final_norm_D': 'model.norm.weight'}
HEAD, SCORE = 'lm_head.weight', 'score.weight'
_MATRICES = {
    'wq_DNH': 'self_attn.q_proj.weight', 'wk_DKH': 'self_attn.k_proj.weight', 'wv_DKH': 'self_attn.v_proj.weight',
    'wo_NHD': 'self_attn.o_proj.weight', 'w_gate_DF': 'mlp.gate_proj.weight', 'w_up_DF': 'mlp.up_proj.weight',
    'w_down_FD': 'mlp.down_proj.weight',
}  # fmt: skip
_NORMS = {
    'pre': {'attn_norm_D': 'input_layernorm.weight', 'mlp_norm_D': 'post_attention_layernorm.weight'},
    'post': {
        'attn_post_norm_D': 'post_attention_layernorm.weight',
        'mlp_post_norm_D': 'post_feedforward_layernorm.weight',
    },
    'both': {
        'attn_norm_D': 'input_layernorm.weight', 'attn_post_norm_D': 'post_attention_layernorm.weight',
        'mlp_norm_D': 'pre_feedforward_layernorm.weight', 'mlp_post_norm_D': 'post_feedforward_layernorm.weight',
    },
}  # fmt: skip
_QK_NORMS = {name: f'self_attn.{name[0]}_norm.weight' for name in ('q_norm_H', 'k_norm_H', 'q_norm_NH', 'k_norm_KH')}
_BIASES = {
    'bias_q_NH': 'self_attn.q_proj.bias',
    'bias_k_KH': 'self_attn.k_proj.bias',
    'bias_v_KH': 'self_attn.v_proj.bias',
}

# model.* key -> config.json's, of every family.
KEYS = {
    'dim': 'hidden_size', 'layers': 'num_hidden_layers', 'heads': 'num_attention_heads',
    'kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim', 'ffn_dim': 'intermediate_size',
    'vocab_size': 'vocab_size', 'norm_eps': 'rms_norm_eps', 'tied': 'tie_word_embeddings',
    'context': 'max_position_embeddings',
}  # fmt: skip
# Keys whose other values are graphs that we have not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    'attention_bias': (None, False), 'mlp_bias': (None, False), 'clip_qkv': (None,),
    'partial_rotary_factor': (None, 1, 1.0), 'quantization_config': (None,), 'num_local_experts': (None, 0),
    'use_bidirectional_attention': (None, False),
}  # fmt: skip
WORDS = {'sliding_attention': 'local', 'full_attention': 'global'}
_ACTIVATIONS = {'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu'}


class Family(NamedTuple):
    """One architecture.

    Attributes:
      model_type: as config.json names it.
      graph: the switches that it fixes, where they are not ours by default.
      more: model.* key -> config.json's, of what it has beside KEYS.
      tied: tie_word_embeddings where config.json does not say.
      layers: the kind of layer i where config.json does not say; None: all alike, local if there is a window.
      windowed: whether it can have local layers.
    """

    model_type: str
    graph: Mapping[str, Any] = {}
    more: Mapping[str, str] = {}
    tied: bool = False
    layers: Callable[[int], str] | None = None
    windowed: bool = False


_GEMMA = {'norm_plus_one': True, 'activation': 'gelu'}
_FOUR_NORMS = _GEMMA | {'norms': 'both'}
_CAPS = {'attn_softcap': 'attn_logit_softcapping', 'logit_softcap': 'final_logit_softcapping'}
_SCALES = {
    'embed_scale': 'embedding_multiplier', 'residual_scale': 'residual_multiplier', 'logit_scale': 'logits_scaling',
    'query_scale': 'attention_multiplier',
}  # fmt: skip

# In the order in which a graph is matched with them on its way out.
FAMILIES = {
    'Llama': Family('llama'),
    'Qwen3': Family('qwen3', {'qk_norm': True}, windowed=True),
    'Qwen2': Family('qwen2', {'qkv_bias': True}, windowed=True),
    'Mistral': Family('mistral', windowed=True),
    'SmolLM3': Family('smollm3', tied=True, layers=lambda i: 'global' if (i + 1) % 4 else 'nope'),
    'Olmo2': Family('olmo2', {'norms': 'post', 'qk_norm': True, 'qk_norm_joint': True}),
    'Granite': Family('granite', more=_SCALES),
    'Gemma': Family('gemma', _GEMMA, tied=True),
    'Gemma2': Family(
        'gemma2', _FOUR_NORMS, {'query_scale': 'query_pre_attn_scalar', **_CAPS}, True,
        lambda i: 'global' if i % 2 else 'local', True,
    ),
    'Gemma3': Family(
        'gemma3_text', _FOUR_NORMS | {'qk_norm': True}, {'query_scale': 'query_pre_attn_scalar', **_CAPS}, True,
        lambda i: 'local' if (i + 1) % 6 else 'global', True,
    ),
}  # fmt: skip
LM, SCORED = 'ForCausalLM', 'ForSequenceClassification'
PLAIN = {
    'norms': 'pre', 'norm_plus_one': False, 'qk_norm': False, 'qk_norm_joint': False, 'qkv_bias': False,
    'activation': 'silu', 'query_scale': None, 'embed_scale': None, 'residual_scale': None, 'logit_scale': None,
    'pattern': None, 'window': None, 'rope_theta_local': None, 'rope_scaling': None, 'attn_softcap': None,
    'logit_softcap': None,
}  # fmt: skip


def tensor_name(leaf: str, layer: int, norms: str) -> str:
    """Where a parameter lies: ('layers/wq_DNH', 3, 'pre') -> 'model.layers.3.self_attn.q_proj.weight'."""
    kind, _, name = leaf.rpartition('/')
    if not kind:
        return (TOP | {'head_DV': HEAD, 'score_D': SCORE})[name]
    return f'model.layers.{layer}.{(_MATRICES | _NORMS[norms] | _QK_NORMS | _BIASES)[name]}'


# ---- in ----


def family_of(config: Mapping[str, Any], where: str) -> tuple[Family, bool]:
    """(the family of a config.json, whether it is a reward model). Raises UsageError for one that we have not."""
    named = config.get('architectures')
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    for ending in (LM, SCORED):
        if name and name.endswith(ending) and name.removesuffix(ending) in FAMILIES:
            return FAMILIES[name.removesuffix(ending)], ending == SCORED
    known = ', '.join(FAMILIES)
    raise UsageError(f'{where}: the architecture {name} is not one that we have: {known}, each {LM} or {SCORED}')


def read_model(config: Mapping[str, Any], family: Family, where: str) -> dict[str, Any]:
    """`model.*` of a config.json. Raises UsageError, by the key, for what our decoder cannot express."""

    def refuse(key: str) -> None:
        raise UsageError(f'{where}: {key}={config.get(key)!r} in config.json is not in our graph')

    for key, neutral in NEUTRAL.items():
        if config.get(key) not in neutral:
            refuse(key)
    values: dict[str, Any] = {name: config.get(key) for name, key in (KEYS | dict(family.more)).items()}
    heads = values['heads']
    values['kv_heads'] = values['kv_heads'] or heads
    values['tied'] = family.tied if values['tied'] is None else values['tied']
    _check_types(values, where)
    values['head_dim'] = values['head_dim'] or values['dim'] // heads
    model = PLAIN | values | dict(family.graph)
    if _activation(config) != model['activation']:
        refuse('hidden_activation' if config.get('hidden_activation') else 'hidden_act')
    if 'query_pre_attn_scalar' in family.more.values():
        model['query_scale'] = model['query_scale'] ** -0.5
    if model['logit_scale'] is not None:
        model['logit_scale'] = 1 / model['logit_scale']
    if family.graph.get('norm_plus_one'):
        model['embed_scale'] = model['dim'] ** 0.5
    model['window'] = (
        config.get('sliding_window') if family.windowed and config.get('use_sliding_window', True) else None
    )
    model['pattern'] = _pattern(_kinds(config, family, model))
    if 'local' not in (model['pattern'] or 'local'):
        model['window'] = None
    return _neutral_to_none(model | _rope(config, model, where))


def _check_types(values: dict[str, Any], where: str) -> None:
    whole = ('dim', 'layers', 'heads', 'kv_heads', 'ffn_dim', 'vocab_size')
    for name, value in values.items():
        optional = name in ('head_dim', 'context', *_CAPS)
        kind = int if name in (*whole, 'head_dim', 'context') else bool if name == 'tied' else (int, float)
        fits = isinstance(value, kind) and (name == 'tied' or not isinstance(value, bool) and 0 < value < 2**31)
        if not fits and not (optional and value is None):
            raise UsageError(f'{where}: model.{name} in config.json is {value!r}: that is no size of a model')


def _activation(config: Mapping[str, Any]) -> str | None:
    """The activation; the first Gemma called the tanh form 'gelu'."""
    named = config.get('hidden_activation') or config.get('hidden_act')
    if named == 'gelu' and config.get('model_type') == 'gemma':
        return 'gelu'
    return _ACTIVATIONS.get(named or 'silu')


def _kinds(config: Mapping[str, Any], family: Family, model: Mapping[str, Any]) -> list[str]:
    """The kind of each layer."""
    layers = model['layers']
    if isinstance(named := config.get('layer_types'), list) and len(named) == layers and 'no_rope_layers' not in config:
        return [WORDS.get(str(word), str(word)) for word in named]
    if isinstance(rotary := config.get('no_rope_layers'), list) and len(rotary) == layers:
        return ['global' if has else 'nope' for has in rotary]
    if family.layers is not None:
        return [family.layers(i) for i in range(layers)]
    if model['window'] is not None and (first := config.get('max_window_layers')) is not None:
        return ['local' if i >= first else 'global' for i in range(layers)]
    return ['local' if model['window'] is not None else 'global'] * layers


def _pattern(kinds: Sequence[str]) -> str | None:
    """The shortest pattern that repeats to these layers; None where they are all alike and not 'nope'."""
    period = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return None if period == 1 and kinds[0] != 'nope' else ','.join(kinds[:period])


def _rope(config: Mapping[str, Any], model: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The rotary settings, of the old form of config.json or of that of transformers 5."""
    found = config.get('rope_parameters') or {}
    by_kind = 'full_attention' in found or 'sliding_attention' in found
    whole = found.get('full_attention', {}) if by_kind else found
    local = found.get('sliding_attention', {}) if by_kind else {}
    theta = whole.get('rope_theta', config.get('rope_theta', 10_000.0))
    theta_local = local.get('rope_theta', config.get('rope_local_base_freq'))
    scaling = _scaling(config.get('rope_scaling') or whole, where)
    if by_kind and _scaling(local, where) or (scaling and 'nope' in (model['pattern'] or '')):
        raise UsageError(f'{where}: the scaling of rotary positions in config.json is not in our graph')
    has_local = 'local' in (model['pattern'] or '')
    return {
        'rope_theta': float(theta),
        'rope_theta_local': float(theta_local) if has_local and theta_local and theta_local != theta else None,
        'rope_scaling': scaling,
    }


def _scaling(told: Mapping[str, Any], where: str) -> str | None:
    kind = told.get('rope_type', told.get('type', 'default'))
    if kind == 'default':
        return None
    names = {'factor': 'factor'}
    if kind == 'llama3':
        names |= {
            'low': 'low_freq_factor', 'high': 'high_freq_factor', 'original': 'original_max_position_embeddings'
        }  # fmt: skip
    if kind not in ('linear', 'llama3') or not all(isinstance(told.get(key), int | float) for key in names.values()):
        raise UsageError(
            f'{where}: rope_scaling of type {kind!r} in config.json is not in our graph: linear, llama3 are'
        )
    return ','.join([kind, *(f'{name}={plain_number(told[key])}' for name, key in names.items())])


def _neutral_to_none(model: dict[str, Any]) -> dict[str, Any]:
    """The same graph with its factors of 1 left out."""
    for name in ('embed_scale', 'residual_scale', 'logit_scale'):
        model[name] = None if model[name] == 1 else model[name]
    if model['query_scale'] == model['head_dim'] ** -0.5:
        model['query_scale'] = None
    return model


# ---- out ----


def choose(model: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    """(the name of the first family that is this graph exactly, its config.json).

    What a family's config.json says is read back and compared. Raises UsageError with the settings in which the nearest
    differs.
    """
    given, misses = _neutral_to_none(PLAIN | {k: v for k, v in model.items() if k not in ('scan',)}), {}
    for name, family in FAMILIES.items():
        config = describe(given, family)
        try:
            found = read_model(config, family, where)
        except (UsageError, TypeError, ZeroDivisionError):  # a value that this family has no place for
            continue
        misses[name] = sorted(k for k in given if not _same(given[k], found.get(k)) and k != 'vocab_multiple')
        if not misses[name]:
            return name, config
    near = min(misses, key=lambda name: len(misses[name]))
    told = ', '.join(f'model.{key}={given[key]}' for key in misses[near])
    raise UsageError(f'{where}: no architecture of Hugging Face is this graph; {near} is but for {told}')


def _same(a: Any, b: Any) -> bool:
    real = isinstance(a, float) or isinstance(b, float)
    return a == b or (real and a is not None and b is not None and abs(a - b) <= 1e-12 * abs(a))


def describe(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """config.json of a graph, in the form that transformers 4 and 5 read."""
    config: dict[str, Any] = {'model_type': family.model_type}
    config |= {key: model[name] for name, key in KEYS.items()}
    more = {name: model.get(name) for name in family.more}
    if 'query_scale' in more:
        scale = model['query_scale'] or model['head_dim'] ** -0.5
        more['query_scale'] = scale if family.model_type == 'granite' else _whole(scale**-2)
    if 'logit_scale' in more:
        more['logit_scale'] = 1 / (model['logit_scale'] or 1.0)
        more |= {name: model[name] or 1.0 for name in ('embed_scale', 'residual_scale')}
    config |= {family.more[name]: value for name, value in more.items()}
    act = 'gelu_pytorch_tanh' if model['activation'] == 'gelu' else 'silu'
    config |= {'hidden_act': act, 'attention_bias': False, 'rope_theta': model['rope_theta']}
    config |= {'hidden_activation': act} if family.model_type.startswith('gemma') else {}
    config |= _described_layers(model, family)
    if model['rope_scaling']:
        config['rope_scaling'] = _described_scaling(model['rope_scaling'])
    return config


def _whole(x: float) -> float | int:
    """A number that is whole but for rounding, as it is meant."""
    return round(x) if abs(x - round(x)) < 1e-6 * abs(x) else x


def _described_layers(model: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """What config.json says of the layers' kinds."""
    words = (model['pattern'] or ('global' if model['window'] is None else 'local')).split(',')
    kinds = [words[i % len(words)] for i in range(model['layers'])]
    if family.model_type == 'smollm3':
        return {'no_rope_layers': [int(kind != 'nope') for kind in kinds], 'use_sliding_window': False}
    if not family.windowed or not (family.layers or model['window']):
        return {'use_sliding_window': False} if family.model_type in ('qwen2', 'qwen3') else {}
    names = {ours: theirs for theirs, ours in WORDS.items()}
    told: dict[str, Any] = {'sliding_window': model['window']}
    if family.model_type != 'mistral':
        told['layer_types'] = [names.get(kind, kind) for kind in kinds]
    if family.model_type in ('qwen2', 'qwen3'):
        told |= {'use_sliding_window': True, 'max_window_layers': 0}
    if family.model_type == 'gemma3_text':
        told['rope_local_base_freq'] = model['rope_theta_local'] or model['rope_theta']
    return told


def _described_scaling(text: str) -> dict[str, Any]:
    kind, *pairs = text.split(',')
    found = {name: float(value) for name, _, value in (pair.partition('=') for pair in pairs)}
    told: dict[str, Any] = {'rope_type': kind, 'factor': found['factor']}
    if kind == 'llama3':
        told |= {
            'low_freq_factor': found['low'], 'high_freq_factor': found['high'],
            'original_max_position_embeddings': int(found['original']),
        }  # fmt: skip
    return told
