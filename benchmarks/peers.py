"""The peer of the benchmarks on CPU: a model of ours as Hugging Face's Llama, on PyTorch (`pip install '.[peers]'`)."""

import itertools
import os
from typing import Any

import numpy as np

from lm.model.config import ModelConfig

PLACES = {
    'self_attn.q_proj': 'wq_DNH', 'self_attn.k_proj': 'wk_DKH', 'self_attn.v_proj': 'wv_DKH',
    'self_attn.o_proj': 'wo_NHD', 'mlp.gate_proj': 'w_gate_DF', 'mlp.up_proj': 'w_up_DF',
    'mlp.down_proj': 'w_down_FD', 'input_layernorm': 'attn_norm_D', 'post_attention_layernorm': 'mlp_norm_D',
}  # fmt: skip


def torch_llama(params: Any, cfg: ModelConfig, *, length: int, attention: str) -> Any:
    """The same model in transformers, for texts of up to `length` tokens, on as many threads as there are cores.

    It must be Llama's graph: tied, no qk_norm. `attention` is 'eager' or 'sdpa'.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    assert cfg.tied and not cfg.qk_norm
    torch.set_num_threads(os.cpu_count() or 1)
    config = LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads, head_dim=cfg.head_dim, intermediate_size=cfg.ffn_dim,
        rms_norm_eps=cfg.norm_eps, tie_word_embeddings=True, max_position_embeddings=length,
        attn_implementation=attention, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    state = {'model.embed_tokens.weight': params['embed_VD'], 'model.norm.weight': params['final_norm_D']}
    for i, (theirs, ours) in itertools.product(range(cfg.layers), PLACES.items()):
        w = np.asarray(params['layers'][ours][i])
        if 'norm' not in ours:
            w = (w.reshape(-1, cfg.dim) if ours == 'wo_NHD' else w.reshape(w.shape[0], -1)).T
        state[f'model.layers.{i}.{theirs}.weight'] = w
    state = {name: torch.tensor(np.array(w)) for name, w in state.items()}
    model.load_state_dict(state | {'lm_head.weight': state['model.embed_tokens.weight']})
    return model
