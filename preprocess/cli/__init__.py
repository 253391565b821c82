"""The verbs of `python -m preprocess`: their flags and what they print; `__main__` only joins them.
The verbs of `python -m preprocess`: their flags and what they print; `__main__` only joins them."""

from preprocess.cli.reshard import add_verbs, outcome_text, plan_text, reshard_settings

__all__ = [
    "add_verbs",
    "outcome_text",
    "plan_text",
    "reshard_settings",
]
