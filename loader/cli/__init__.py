"""The verbs of `python -m loader`, one module for each: its flags, and what it prints.

Decides how batches and plans are shown. Never touches training state.
"""

from loader.cli.peek import PEEK
from loader.cli.plan import PLAN
from loader.cli.score import SCORE
from loader.cli.verb import Verb

VERBS = (PEEK, PLAN, SCORE)

__all__ = ["VERBS", "Verb"]
