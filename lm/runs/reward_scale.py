"""The scale of a reward model's scores, kept with the run: normalisation.json, {step: {mean, std}}.

Bradley–Terry leaves scores free up to an offset for each prompt and says nothing of their size. So they are shifted and
scaled after training: a reference set, the first pairs that were trained on, has mean 0, and the two responses of a
pair have a standard deviation of 1 around their own mean. (One pooled over prompts would mostly be that between them.)
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from lm import files
from lm.errors import RunError

FILE = 'normalisation.json'


class Scale(NamedTuple):
    """A normalised score is (score − mean)/std."""

    mean: float
    std: float


def of_pairs(scores: np.ndarray) -> Scale:
    """From raw scores [pairs, 2], NaN where a pair was not measured. The std is 1 where no pair's scores differ."""
    scores = scores[~np.isnan(scores[:, 0])].astype(np.float64)
    std = float(np.sqrt(np.mean(np.square((scores[:, 0] - scores[:, 1]) / 2))))
    return Scale(float(scores.mean()), std or 1.0)


def write(workdir: epath.Path, step: int, scale: Scale) -> None:
    """Adds the scale of a step; what was said of later steps is forgotten."""
    known = {k: v for k, v in _read(workdir).items() if int(k) < step}
    files.write_json(workdir / FILE, known | {str(step): scale._asdict()})


def read(workdir: epath.Path, step: int) -> Scale:
    """The scale of a checkpoint: of its step, else of the nearest step at which there is one.

    Raises RunError if the run has none yet.
    """
    known = {int(k): Scale(**v) for k, v in _read(workdir).items()}
    if not known:
        raise RunError(f'{workdir} has no {FILE} yet: its scores have no scale before the first evaluation')
    return known[min(known, key=lambda s: (abs(s - step), s))]


def _read(workdir: epath.Path) -> Mapping[str, Mapping[str, float]]:
    file = workdir / FILE
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise RunError(f'{file} is damaged ({error}): train on, the next evaluation writes it again') from None
