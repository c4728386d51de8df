"""A reward model's score of one answer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lm.config import split_run
from lm.errors import UsageError
from lm.evals.tasks import Subject
from lm.model import sequences, transformer
from lm.model.config import ModelConfig
from lm.runs import reward_scale


def score(subject: Subject, prompt: str, answer: str) -> dict[str, Any]:
    """{'score', 'raw', 'mean', 'std', 'tokens', 'cut'}: the normalised score (raw − mean)/std of an answer to a prompt.

    It is read at the last token of the prompt with the answer and the end of its turn; or, as in training, where the
    sequence is cut because it is longer than what the model was trained on.

    Raises:
      UsageError: it is no reward model, something is empty, or nothing of the answer is left.
      RunError: the run has kept no scale for its scores yet.
    """
    if not subject.scored:
        raise UsageError(f'{subject.run} is no reward model (stage={subject.model.config["stage"]}): name one')
    if not prompt.strip() or not answer.strip():
        raise UsageError(f'--score: the {"prompt" if not prompt.strip() else "answer"} is empty')
    model, seq_len = subject.model, subject.seq_len
    messages = [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': answer}]
    ids, trained = subject.template.encode(model.tokenizer, messages)
    if not any(trained[:seq_len]):
        raise UsageError(f'--score: the prompt alone fills the {seq_len} tokens that {subject.run} was trained on')
    scale = reward_scale.read(epath.Path(split_run(subject.run)[0]), model.step)
    row_BT = np.array([ids[:seq_len]], np.int32)
    raw = float(jax.jit(_last_score, static_argnums=1)(model.params, model.cfg, row_BT))
    found = {'score': (raw - scale.mean) / scale.std, 'raw': raw, **scale._asdict(), 'tokens': row_BT.size}
    return found | {'cut': len(ids) > seq_len}


def _last_score(params: Any, cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    """The score at the last place of one row."""
    score_BT = sequences.token_scores(params, transformer.forward(params, cfg, tokens_BT)[0])
    return jnp.sum(score_BT * (jnp.arange(tokens_BT.shape[1]) == tokens_BT.shape[1] - 1))
