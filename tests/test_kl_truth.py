"""The leash without sampling noise: five words, three places, every response enumerated.

The expected gradient of each estimator and placement, beside the exact gradient of KL(π‖π_ref); docs/kl.md shows them.
"""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.losses import policy

PAGE = Path(__file__).parents[1] / 'docs' / 'kl.md'
V, T = 5, 3
RESPONSES = np.array(list(itertools.product(range(V), repeat=T)))
# A response's prefixes as rows of one table of contexts: none, one word, two words.
CONTEXT = np.stack([0 * RESPONSES[:, 0], 1 + RESPONSES[:, 0], 1 + V + V * RESPONSES[:, 0] + RESPONSES[:, 1]], 1)


@pytest.fixture(scope='module', autouse=True)
def _double():
    with jax.enable_x64():
        yield


def tables():
    """Logits [contexts, V] of the policy and of a reference near it."""
    draw = np.random.default_rng(0)
    reference = draw.normal(size=(1 + V + V * V, V))
    return reference + 0.7 * draw.normal(size=reference.shape), reference


def k2(logp, reference):
    """(log π/π_ref)²/2, which no stage here has."""
    return jnp.square(logp - reference) / 2


def per_token(logits, contexts=CONTEXT, words=RESPONSES):
    """log π of each token of each response, [responses, T]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits)[contexts], words[..., None], -1)[..., 0]


def exact(logits, reference):
    """KL(π‖π_ref) of whole responses."""
    logp = jnp.sum(per_token(logits), 1)
    return jnp.sum(jnp.exp(logp) * (logp - jnp.sum(per_token(reference), 1)))


def of_tokens(logits, reference, weight_N):
    """The same as a sum over places, the distribution of what stands before them held fixed."""
    p, q = jax.nn.log_softmax(logits)[CONTEXT], jax.nn.log_softmax(reference)[CONTEXT]
    return jnp.sum(weight_N[:, None] * jnp.sum(jnp.exp(p) * (p - q), -1))


def expected(logits, reference, loss_NT):
    """E over responses of the gradient of `loss_NT(logp, old, reference)`, old being log π without gradient."""
    old = jax.lax.stop_gradient(per_token(logits))
    weight_N = jnp.exp(jnp.sum(old, 1))
    theirs = per_token(reference)
    return jax.grad(lambda x: jnp.sum(weight_N[:, None] * loss_NT(per_token(x), old, theirs)))(logits)


def in_reward(k):
    """As a cost of each token: log π times what this and later tokens cost, detached."""

    def loss(logp, old, reference):
        cost = k(old, reference)
        to_go = jnp.cumsum(cost[:, ::-1], 1)[:, ::-1]
        return logp * jax.lax.stop_gradient(to_go)

    return loss


ones = jnp.ones(RESPONSES.shape)
FORMS = {
    'k1 in the reward': in_reward(policy.k1),
    'k2 in the reward': in_reward(k2),
    'k3 in the reward': in_reward(policy.k3),
    'k1 as a loss': lambda logp, old, reference: policy.k1(logp, reference),
    'k2 as a loss': lambda logp, old, reference: k2(logp, reference),
    'k3 as a loss': lambda logp, old, reference: policy.k3(logp, reference),
    'k3 as a loss, times the importance ratio': lambda logp, old, ref: policy.k3_loss(logp, ref, old, ones),
}


def off(found, wanted):
    """|found − wanted| / |wanted|."""
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def rows():
    """{form: (its distance from the exact gradient, from that with the states held fixed)}."""
    logits, reference = map(jnp.asarray, tables())
    whole = jax.grad(exact)(logits, reference)
    weight_N = jax.lax.stop_gradient(jnp.exp(jnp.sum(per_token(logits), 1)))
    fixed = jax.grad(of_tokens)(logits, reference, weight_N)
    found = {name: expected(logits, reference, loss) for name, loss in FORMS.items()}
    found['the full KL over the vocabulary, as a loss'] = fixed
    return {name: (off(g, whole), off(g, fixed), float(jnp.linalg.norm(g))) for name, g in found.items()}


def test_k1_in_the_reward_is_the_gradient_of_the_reverse_kl():
    found = rows()
    assert found['k1 in the reward'][0] < 1e-10
    assert min(found[name][0] for name in found if name != 'k1 in the reward') > 0.05


def test_k1_as_a_loss_teaches_nothing():
    assert rows()['k1 as a loss'][2] < 1e-12


def test_k2_and_k3_with_the_ratio_are_right_token_by_token():
    found = rows()
    for name in ('k2 as a loss', 'k3 as a loss, times the importance ratio'):
        assert found[name][1] < 1e-10
    assert found['k3 as a loss'][1] > 0.2


def page_rows():
    told = lambda x: f'{100 * x:.0f} %' if x > 1e-9 else '0'
    return [f'| {name} | {told(whole)} | {told(fixed)} |' for name, (whole, fixed, _) in rows().items()]


def test_the_page_shows_these_numbers():
    text = PAGE.read_text()
    missing = [row for row in page_rows() if row not in text]
    assert not missing, '\n'.join(page_rows())
