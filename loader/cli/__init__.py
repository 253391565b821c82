"""The verbs of `python -m loader`, one module for each: its flags, and what it prints.

Decides how batches, plans, samples and scores are shown. Never touches training state.
"""

from loader.cli.bench import BENCH
from loader.cli.get import GET
from loader.cli.peek import PEEK
from loader.cli.plan import PLAN
from loader.cli.preview import PREVIEW
from loader.cli.score import SCORE
from loader.cli.verb import Verb
from loader.cli.which import WHICH

VERBS = (PEEK, PREVIEW, PLAN, WHICH, GET, BENCH, SCORE)

__all__ = ["VERBS", "Verb"]
