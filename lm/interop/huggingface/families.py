"""Tables: which graph each architecture of Hugging Face's is, how it calls our parameters, and where it keeps settings.

What an architecture does is in `transformers`, models/TYPE/modeling_TYPE.py; what a config.json that lacks a key means,
in configuration_TYPE.py. family_config.py reads and writes by these tables; nothing there knows a family.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from lm.interop.graph import of_layers

_LAYER = 'model.layers.{layer}.'
TOP = {'embed_VD': 'model.embed_tokens.weight', 'final_norm_D': 'model.norm.weight'}
HEAD = {'head_DV': 'lm_head.weight'}
SCORE = {'score_D': 'score.weight'}
_MATRICES = of_layers(_LAYER, {
    'wq_DNH': 'self_attn.q_proj.weight', 'wk_DKH': 'self_attn.k_proj.weight', 'wv_DKH': 'self_attn.v_proj.weight',
    'wo_NHD': 'self_attn.o_proj.weight', 'w_gate_DF': 'mlp.gate_proj.weight', 'w_up_DF': 'mlp.up_proj.weight',
    'w_down_FD': 'mlp.down_proj.weight',
})  # fmt: skip
_PRE = of_layers(_LAYER, {'attn_norm_D': 'input_layernorm.weight', 'mlp_norm_D': 'post_attention_layernorm.weight'})
_POST = of_layers(_LAYER, {
    'attn_post_norm_D': 'post_attention_layernorm.weight', 'mlp_post_norm_D': 'post_feedforward_layernorm.weight',
})  # fmt: skip
_BOTH = _POST | of_layers(_LAYER, {
    'attn_norm_D': 'input_layernorm.weight', 'mlp_norm_D': 'pre_feedforward_layernorm.weight',
})  # fmt: skip
_BIASES = of_layers(_LAYER, {
    'bias_q_NH': 'self_attn.q_proj.bias', 'bias_k_KH': 'self_attn.k_proj.bias', 'bias_v_KH': 'self_attn.v_proj.bias',
})  # fmt: skip
_QK_NORMS = of_layers(_LAYER, {'q_norm_H': 'self_attn.q_norm.weight', 'k_norm_H': 'self_attn.k_norm.weight'})
_JOINT_NORMS = of_layers(_LAYER, {'q_norm_NH': 'self_attn.q_norm.weight', 'k_norm_KH': 'self_attn.k_norm.weight'})
LAYER = _MATRICES | _PRE
ZERO = _LAYER + 'self_attn.o_proj.bias'  # of each layer of a family that is `biased`, [dim]

# Activations by the names that `transformers` has for them; the first of ours is what is written.
ACTIVATIONS = {
    'silu': 'silu', 'swish': 'silu', 'gelu_pytorch_tanh': 'gelu', 'gelu_new': 'gelu', 'gelu_fast': 'gelu',
}  # fmt: skip
# Keys that make the graph another one: whatever is neither absent, null nor this value is refused.
NEUTRAL = {
    'mlp_bias': False, 'attention_bias': False, 'partial_rotary_factor': 1.0, 'use_bidirectional_attention': False,
    'is_causal': True, 'num_experts': 0, 'num_local_experts': 0, 'n_routed_experts': 0,
    'add_cross_attention': False, 'is_encoder_decoder': False, 'clip_qkv': None,
}  # fmt: skip


class Key(NamedTuple):
    """The key of config.json at which a setting `model.*` stands.

    Attributes:
      name: the key itself.
      default: what `transformers` takes where it is absent.
      kind: 'size' from 1, 'count' from 0, 'real' above 0, or 'flag'.
      null: what is taken where it is null, or absent without a default; None: it may not be so.
      optional: then it may, and is None.
      read, write: the value as we have it, and as they do. The two are each other's inverse.
    """

    name: str
    default: Any = None
    kind: str = 'real'
    null: Any = None
    optional: bool = False
    read: Callable[[Any], Any] = lambda x: x
    write: Callable[[Any], Any] = lambda x: x


def _whole(x: float) -> float | int:
    """The int that some keys are declared to be, where it is one but for rounding."""
    return round(x) if abs(x - round(x)) < 1e-6 * abs(x) else x


_QUERY = Key('query_pre_attn_scalar', 256, read=lambda x: x**-0.5, write=lambda x: _whole(x**-2.0))
_FINAL = Key('final_logit_softcapping', optional=True)


class Family(NamedTuple):
    """An architecture.

    Attributes:
      model_type: its name in config.json.
      graph: model.*, where it is not `graph.PLAIN`.
      layer: the names of each layer's tensors, with {layer} in them.
      causal, scored: the names of its classes; None: `transformers` has no such class.
      keys: settings that it has beside those of all.
      defaults: what `transformers` takes for keys of all families that are absent (where not `COMMON`'s).
      activation: the key of the activation.
      window: when sliding_window is used: 'never', 'always' (by all layers, if it is a number), 'switched' (by
        use_sliding_window), 'given' (by layers of that type).
      period: of its layers the last of so many is global, the others are local, if the file does not say.
      nope: it may have layers without positions.
      square: hidden_size must be a multiple of the heads.
      scaled: what embeddings are multiplied by, of hidden_size; None: nothing.
      local_theta: theta of local layers where the file does not say; None: they share the others'.
      biased: attention_bias is true: the output of attention has a bias as well (`ZERO`), which is zero in our graph.
    """

    model_type: str
    graph: dict[str, Any]
    layer: dict[str, str]
    causal: str
    scored: str | None
    keys: dict[str, Key] = {}
    defaults: dict[str, Any] = {}
    activation: str = 'hidden_act'
    window: str = 'never'
    period: int | None = None
    nope: bool = False
    square: bool = False
    scaled: Callable[[int], float] | None = None
    local_theta: float | None = None
    biased: bool = False


# Settings that all have: model.* -> key, and what is taken where it is absent (None: it must be there, or follows).
_SIZES = {
    'vocab_size': 'vocab_size', 'dim': 'hidden_size', 'layers': 'num_hidden_layers', 'heads': 'num_attention_heads',
    'kv_heads': 'num_key_value_heads', 'head_dim': 'head_dim', 'ffn_dim': 'intermediate_size',
}  # fmt: skip
COMMON = {ours: Key(theirs, kind='size') for ours, theirs in _SIZES.items()} | {
    'norm_eps': Key('rms_norm_eps', 1e-6), 'context': Key('max_position_embeddings', kind='size', optional=True),
    'tied': Key('tie_word_embeddings', False, kind='flag'),
}  # fmt: skip
_GEMMA = {'norm_plus_one': True, 'activation': 'gelu'}
_GEMMA_DEFAULTS = {'tied': True, 'head_dim': 256, 'activation': 'gelu_pytorch_tanh'}


def _family(model_type: str, name: str, graph: dict[str, Any], layer: dict[str, str], **more: Any) -> Family:
    options: dict[str, Any] = {'causal': f'{name}ForCausalLM', 'scored': f'{name}ForSequenceClassification'} | more
    return Family(model_type, graph, layer, **options)


# In the order in which one is chosen for a graph: the plainest that has it.
FAMILIES = (
    _family('llama', 'Llama', {}, LAYER, square=True),
    _family('mistral', 'Mistral', {}, LAYER, window='always', defaults={'window': 4096, 'kv_heads': 8}),
    _family('qwen2', 'Qwen2', {'qkv_bias': True}, LAYER | _BIASES, window='switched', defaults={'window': 4096}),
    # The same graph again. transformers has a way of its own to split texts for qwen2, and none for llama.
    _family('llama', 'Llama', {'qkv_bias': True}, LAYER | _BIASES, square=True, biased=True),
    _family('qwen3', 'Qwen3', {'qk_norm': True}, LAYER | _QK_NORMS, window='switched', defaults={
        'window': 4096, 'head_dim': 128,
    }),
    _family('olmo2', 'Olmo2', {'norms': 'post', 'qk_norm': True, 'qk_norm_joint': True},
            _MATRICES | _POST | _JOINT_NORMS, defaults={'norm_eps': 1e-5}),
    _family('smollm3', 'SmolLM3', {}, LAYER, window='switched', nope=True, defaults={
        'tied': True, 'kv_heads': 4, 'rope_theta': 2e6,
    }),
    _family('granite', 'Granite', {}, LAYER, scored=None, keys={
        'query_scale': Key('attention_multiplier', 1.0), 'embed_scale': Key('embedding_multiplier', 1.0),
        'residual_scale': Key('residual_multiplier', 1.0),
        'logit_scale': Key('logits_scaling', 1.0, read=lambda x: 1 / x, write=lambda x: 1 / x),
    }),
    _family('gemma', 'Gemma', _GEMMA, LAYER, scaled=lambda dim: dim**0.5, defaults=_GEMMA_DEFAULTS),
    _family('gemma2', 'Gemma2', _GEMMA | {'norms': 'both'}, _MATRICES | _BOTH, window='given', period=2,
            square=True, activation='hidden_activation', scaled=lambda dim: dim**0.5,
            keys={'query_scale': _QUERY, 'logit_softcap': _FINAL._replace(default=30.0),
                  'attn_softcap': Key('attn_logit_softcapping', 50.0, optional=True)},
            defaults=_GEMMA_DEFAULTS | {'window': 4096, 'kv_heads': 4}),
    _family('gemma3_text', 'Gemma3', _GEMMA | {'norms': 'both', 'qk_norm': True}, _MATRICES | _BOTH | _QK_NORMS,
            scored='Gemma3TextForSequenceClassification', window='given', period=6, square=True,
            activation='hidden_activation', scaled=lambda dim: dim**0.5, local_theta=1e4,
            keys={'query_scale': _QUERY, 'logit_softcap': _FINAL},
            defaults=_GEMMA_DEFAULTS | {
                'window': 4096, 'kv_heads': 4, 'rope_theta': 1e6, 'vocab_size': 262_208, 'heads': 8,
                'context': 131_072,
            }),
)  # fmt: skip
VISION = 'Gemma3ForConditionalGeneration'  # holds a Gemma 3, whose settings stand under text_config
# Where such a folder keeps its text model's tensors, in either version of transformers, and what they are called here.
VISION_PREFIXES = {
    'language_model.model.': 'model.', 'language_model.lm_head.': 'lm_head.', 'model.language_model.': 'model.',
    'lm_head.': 'lm_head.',
}  # fmt: skip
