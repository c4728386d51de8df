"""The decoder written out in numpy, a token and a head at a time: an oracle that shares no code with `lm.model`, with
all switches of `model.*` that GGUF knows."""

import numpy as np

from lm.interop import gguf_arch


def _norm(x, w, m):
    y = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + m['norm_eps'])
    return y * (w + 1 if m['norm_plus_one'] else w)


def _rotated(x_TNH, m, local):
    """Halves pair up; scaling is of global layers."""
    T, _, H = x_TNH.shape
    theta = (m['rope_theta_local'] if local else None) or m['rope_theta']
    frequency = theta ** (-np.arange(0, H, 2) / H)
    if m['rope_scaling'] and not local:
        kind, values = gguf_arch.split_scaling(m['rope_scaling'])
        options = {'theta': theta, 'head_dim': H}
        frequency /= values['factor'] if kind == 'linear' else gguf_arch.llama3_factors(m['rope_scaling'], **options)
    angle = np.arange(T)[:, None, None] * frequency
    a, b = np.split(x_TNH, 2, -1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attention(y_TD, w, m, local):
    q, k, v = (np.einsum('td,dnh->tnh', y_TD, w[name]) for name in ('wq_DNH', 'wk_DKH', 'wv_DKH'))
    if m['qkv_bias']:
        q, k, v = q + w['bias_q_NH'], k + w['bias_k_KH'], v + w['bias_v_KH']
    if m['qk_norm']:
        q, k = _norm(q, w['q_norm_H'], m), _norm(k, w['k_norm_H'], m)
    q, k = _rotated(q, m, local), _rotated(k, m, local)
    T, N, H = q.shape
    out = np.zeros_like(q)
    for t in range(T):
        first = max(0, t + 1 - m['window']) if local else 0
        for n in range(N):
            j = n * m['kv_heads'] // N
            scores = k[first : t + 1, j] @ q[t, n] * (m['query_scale'] or H**-0.5)
            if m['attn_softcap']:
                scores = m['attn_softcap'] * np.tanh(scores / m['attn_softcap'])
            p = np.exp(scores - scores.max())
            out[t, n] = p @ v[first : t + 1, j] / p.sum()
    return np.einsum('tnh,nhd->td', out, w['wo_NHD'])


def _feed_forward(y_TD, w, m):
    gate, up = y_TD @ w['w_gate_DF'], y_TD @ w['w_up_DF']
    tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    gate = gate / (1 + np.exp(-gate)) if m['activation'] == 'silu' else gate * (1 + tanh) / 2
    return (gate * up) @ w['w_down_FD']


def logits(model, leaves, tokens):
    """[T, V] of a row of tokens, in float64."""
    m, w = model, {k: np.asarray(x, np.float64) for k, x in leaves.items()}
    x_TD = w['embed_VD'][tokens] * (m['embed_scale'] or 1)
    for i, kind in enumerate(gguf_arch.kinds(m)):
        layer = {k.removeprefix('layers/'): x[i] for k, x in w.items() if k.startswith('layers/')}
        parts = {
            'attn': lambda y, layer=layer, kind=kind: _attention(y, layer, m, kind == 'local'),
            'mlp': lambda y, layer=layer: _feed_forward(y, layer, m),
        }
        for part, function in parts.items():
            y_TD = function(_norm(x_TD, layer[f'{part}_norm_D'], m))
            x_TD = x_TD + (_norm(y_TD, layer[f'{part}_post_norm_D'], m) if m['norms'] == 'both' else y_TD)
    h_TD = _norm(x_TD, w['final_norm_D'], m)
    out = h_TD @ (w['embed_VD'].T if m['tied'] else w['head_DV'])
    return m['logit_softcap'] * np.tanh(out / m['logit_softcap']) if m['logit_softcap'] else out
