"""Language models in JAX, from raw text to an aligned assistant."""

import sys

from lm import interrupts

if sys.argv[:1] == ['-m']:  # `python -m lm.COMMAND`, whose module Python is about to look for: seconds of imports
    interrupts.install()
