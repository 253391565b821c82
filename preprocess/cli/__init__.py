"""The verbs of `python -m preprocess`: their flags, and what they print.

Decides how people call the offline half and what they read. Never prints by itself: `__main__`
joins the verbs and owns the terminal.
"""

from preprocess.cli import annotate, build, care, doctor, exchange, own, reshard
from preprocess.cli.config import with_files
from preprocess.cli.make import make_arguments, make_variables
from preprocess.cli.options import add_settings, read_settings
from preprocess.cli.verbs import Console, Verb, others_text

VERBS = (
    *build.VERBS,
    *own.VERBS,
    *care.VERBS,
    *reshard.VERBS,
    *annotate.VERBS,
    *exchange.VERBS,
    *doctor.VERBS,
)
"""Every verb, in the order in which `--help` lists them."""

__all__ = [
    "VERBS",
    "Console",
    "Verb",
    "add_settings",
    "make_arguments",
    "make_variables",
    "others_text",
    "read_settings",
    "with_files",
]
