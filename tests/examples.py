"""How many examples a property test tries: half of them every day, all of them in CI.

The profile says it, `suite` or `all` (`pytest --hypothesis-profile=all`).
"""

from hypothesis import settings


def examples(count):
    """The share of `count` that the profile wants, for `@settings(max_examples=...)`."""
    return max(5, count * settings().max_examples // 100)
