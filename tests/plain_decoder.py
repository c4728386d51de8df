"""The decoder written out from the definitions of its families, in numpy, a head and a query at a time: an oracle that
shares no code with `lm.model`."""

import math

import jax
import numpy as np


def norm(x, weight, cfg):
    scale = weight + 1 if cfg.norm_plus_one else weight
    return x / math.sqrt(np.mean(x**2) + cfg.norm_eps) * scale


def frequencies(cfg, kind):
    """Radians a token of each pair of a head's halves; llama3's by wavelengths, as Llama 3.1's code has it."""
    theta = cfg.rope_theta_local if kind == 'local' and cfg.rope_theta_local else cfg.rope_theta
    found = [theta ** (-2 * i / cfg.head_dim) for i in range(cfg.head_dim // 2)]
    if not cfg.rope_scaling or (kind == 'local' and cfg.pattern):
        return np.array(found)
    name, *pairs = cfg.rope_scaling.split(',')
    s = {key: float(value) for key, value in (pair.split('=') for pair in pairs)}
    if name == 'linear':
        return np.array(found) / s['factor']

    def slowed(f):
        wavelength = 2 * math.pi / f
        if wavelength < s['original'] / s['high']:
            return f
        if wavelength > s['original'] / s['low']:
            return f / s['factor']
        smooth = (s['original'] / wavelength - s['low']) / (s['high'] - s['low'])
        return (1 - smooth) * f / s['factor'] + smooth * f

    return np.array([slowed(f) for f in found])


def turned(x_H, position, frequency):
    half = len(x_H) // 2
    z = (x_H[:half] + 1j * x_H[half:]) * np.exp(1j * position * frequency)
    return np.concatenate([z.real, z.imag])


def heads_of(y_D, w, cfg, kind, position):
    """(queries [N, H], keys [K, H], values [K, H]) of one token."""
    q, k, v = (np.tensordot(y_D, w[name], 1) for name in ('wq_DNH', 'wk_DKH', 'wv_DKH'))
    if cfg.qkv_bias:
        q, k, v = q + w['bias_q_NH'], k + w['bias_k_KH'], v + w['bias_v_KH']
    if cfg.qk_norm and cfg.qk_norm_joint:
        q, k = norm(q, w['q_norm_NH'], cfg), norm(k, w['k_norm_KH'], cfg)
    elif cfg.qk_norm:
        q, k = (np.stack([norm(x, w[name], cfg) for x in xs]) for xs, name in ((q, 'q_norm_H'), (k, 'k_norm_H')))
    if kind != 'nope':
        q, k = (np.stack([turned(x, position, frequencies(cfg, kind)) for x in xs]) for xs in (q, k))
    return q, k, v


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def attention(y_TD, w, cfg, kind):
    q, k, v = (np.stack(x) for x in zip(*(heads_of(y, w, cfg, kind, t) for t, y in enumerate(y_TD)), strict=True))
    scale = cfg.query_scale if cfg.query_scale is not None else 1 / math.sqrt(cfg.head_dim)
    out = np.zeros(y_TD.shape)
    for t in range(len(y_TD)):
        first = max(0, t - cfg.window + 1) if kind == 'local' else 0
        for n in range(cfg.heads):
            own = n // (cfg.heads // cfg.kv_heads)
            p = np.exp(capped(k[first : t + 1, own] @ q[t, n] * scale, cfg.attn_softcap))
            out[t] += (p / p.sum()) @ v[first : t + 1, own] @ w['wo_NHD'][n]
    return out


def feed_forward(y_TD, w, cfg):
    gate = y_TD @ w['w_gate_DF']
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    gate = gate / (1 + np.exp(-gate)) if cfg.activation == 'silu' else gate * (1 + np.tanh(inner)) / 2
    return gate * (y_TD @ w['w_up_DF']) @ w['w_down_FD']


def logits(params, cfg, tokens_T):
    """[T, vocab_size] of one row, in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    words = (cfg.pattern or ('local' if cfg.window else 'global')).split(',')
    rows = lambda x_TD, weight: np.stack([norm(x, weight, cfg) for x in x_TD])
    x_TD = params['embed_VD'][tokens_T] * (cfg.embed_scale or 1)
    for i in range(cfg.layers):
        w, kind = {name: x[i] for name, x in params['layers'].items()}, words[i % len(words)]
        for part in ('attn', 'mlp'):
            y_TD = x_TD if cfg.norms == 'post' else rows(x_TD, w[f'{part}_norm_D'])
            y_TD = attention(y_TD, w, cfg, kind) if part == 'attn' else feed_forward(y_TD, w, cfg)
            y_TD = y_TD if cfg.norms == 'pre' else rows(y_TD, w[f'{part}_post_norm_D'])
            x_TD = x_TD + y_TD * (cfg.residual_scale or 1)
    table_DV = params['embed_VD'].T if cfg.tied else params['head_DV']
    x_TV = rows(x_TD, params['final_norm_D']) @ table_DV[:, : cfg.vocab_size] * (cfg.logit_scale or 1)
    return capped(x_TV, cfg.logit_softcap)
