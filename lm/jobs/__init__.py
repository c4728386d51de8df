"""The jobs: what makes data without a training loop, a module each; and the registry, which is the only list of them.

A job has a run's directory, lock, status and log. It is no model: no stage starts from it.
"""

from lm.jobs import generate
from lm.jobs.spec import JobSpec

JOBS: dict[str, JobSpec] = {spec.name: spec for spec in (generate.SPEC,)}
