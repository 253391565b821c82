"""The errors of the project, one tree, each with a stable reason, facts and a remedy.

    ShardsError
    ├── ConfigError       an argument, a setting or a name that cannot be honoured
    ├── SourceError       a dataset source that is missing, empty or in another schema
    ├── SampleError       one row or image that cannot become a sample (goes to quarantine)
    ├── FetchError        one URL that gave no usable image (goes to quarantine)
    ├── StorageError      a file system or object store that refused or failed
    ├── ShardError        a shard, index or sample that is missing, short, changed or corrupt
    ├── ManifestError     a manifest that is missing, malformed or of an unknown version
    ├── ConflictError     the output holds the result of another configuration
    ├── BudgetError       more failures than the job's budget allows
    └── StateError        a loader state that does not fit this dataset or these settings

`str(error)` is the whole story on a few lines: what is wrong, where, the facts, the fix.
`error.reason` is a stable code for programs and tests. All of them survive pickling, since they
cross process borders. Passwords and signatures that stand in URLs are left out of what is shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping


class ShardsError(Exception):
    """The root: every error that a user of the project is meant to see."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        reason: str,
        where: str = "",
        facts: Mapping[str, object] | None = None,
        fix: str = "",
    ) -> None:
        """Builds the error.

        Args:
          what: What is wrong, in one sentence without blame: lower case, no full stop.
          reason: Stable code in snake_case.
          where: URL, path, shard, key or field.
          facts: What was found and what was wanted.
          fix: The next command or setting to try.
        """
        super().__init__(what)
        self.what = what
        self.reason = reason
        self.where = redacted(where)
        self.facts = dict(facts or {})
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.facts:
            facts = ", ".join(f"{name}={value}" for name, value in self.facts.items())
            lines.append(f"  facts: {redacted(facts)}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.reason, self.where, self.facts, self.fix))


def _rebuild(
    kind: type[ShardsError], what: str, reason: str, where: str, facts: dict[str, object], fix: str
) -> ShardsError:
    return kind(what, reason=reason, where=where, facts=facts, fix=fix)


class ConfigError(ShardsError, ValueError):
    """An argument, a setting or a name that cannot be honoured."""


class SourceError(ShardsError):
    """A dataset source that is missing, empty or in another schema."""


class SampleError(ShardsError):
    """One row or image that cannot become a sample; the job quarantines it and goes on."""


class FetchError(ShardsError):
    """One URL that gave no usable image; the job quarantines it and goes on."""


class StorageError(ShardsError):
    """A file system or object store that refused or failed."""


class ShardError(ShardsError):
    """A shard, index or sample that is missing, short, changed or corrupt."""

    exit_code = 4


class ManifestError(ShardsError):
    """A manifest that is missing, malformed or of an unknown version."""


class ConflictError(ShardsError):
    """The output holds the result of another configuration."""

    exit_code = 3


class BudgetError(ShardsError):
    """More failures than the job's budget allows; nothing was committed."""

    exit_code = 2


class StateError(ShardsError):
    """A loader state that does not fit this dataset or these settings."""


_PASSWORD = re.compile(r"(?<=://)[^/@\s]*(?=@)")
_SIGNATURE = re.compile(
    r"(?<=[?&])((?:x-amz-|x-goog-)[\w-]+|awsaccesskeyid|googleaccessid|signature|sig|token|"
    r"access_token|key|secret|password)=[^&\s#'\"]*",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """Leaves the passwords and signatures of URLs out of a text.

    >>> redacted("s3://me:hunter2@bucket/a")
    's3://***@bucket/a'
    >>> redacted("https://h/a.jpg?w=9&X-Amz-Signature=1f&token=xyz")
    'https://h/a.jpg?w=9&X-Amz-Signature=***&token=***'
    """
    return _SIGNATURE.sub(r"\1=***", _PASSWORD.sub("***", text))


def nearest(name: str, known: Iterable[str]) -> str:
    """Names the known names most like a misspelt one, as the tail of a sentence.

    >>> nearest("pixmo_cpa", ["pixmo_cap", "vqa2"])
    "did you mean 'pixmo_cap'?"
    >>> nearest("x", ["pixmo_cap", "vqa2"])
    'known: pixmo_cap, vqa2'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
