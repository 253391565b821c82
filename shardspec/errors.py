"""The errors of the project, one tree, each with a stable reason, facts and a remedy.

    ShardsError
    ├── ConfigError       an invalid argument, setting or name
    ├── SourceError       a dataset source that is missing, empty or in another schema
    ├── SampleError       one row or image that cannot become a sample (goes to quarantine)
    ├── FetchError        one URL that gave no usable image (goes to quarantine)
    ├── StorageError      a file system or object store that denied access or failed
    ├── ShardError        a shard, index or sample that is missing, short, changed or corrupt
    ├── ManifestError     a manifest that is missing, malformed or of an unknown version
    ├── ConflictError     the output contains the result of another configuration
    ├── BudgetError       more failures than the job's budget allows
    ├── StateError        a loader state that does not fit this dataset or these settings
    └── WorkerError       a worker process of the loader that failed or died

`str(error)` says on a few lines what is wrong, where, the facts and the fix. `error.reason` is a
stable code for programs and tests. The texts are in `errors.toml`; call sites pass an entry's code
and the facts. All errors can be pickled, since they cross process borders. Passwords, tokens and
signatures are not shown.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping

from shardspec.messages import Message, messages


class ShardsError(Exception):
    """The root: every error that is meant for users."""

    exit_code = 1

    def __init__(
        self,
        code: str,
        *,
        where: str = "",
        what: str | None = None,
        fix: str = "",
        facts: Mapping[str, object] | None = None,
        **more: object,
    ) -> None:
        """Builds the error from its entry in `errors.toml`.

        Args:
          code: Name of the entry, "reason" or "reason.variant"; the reason is stable.
          where: URL, path, shard, key or field.
          what: What is wrong, in one sentence without blame: lower case, no full stop. Only for
            errors without an entry, such as those of a dataset outside the project.
          fix: The next command or setting to try, likewise.
          facts: What was found and what was wanted, where names are known only when it is made.
          more: The same, by name. The texts of the entry may name facts; those that they do not
            name are listed after them.
        """
        facts = {name: _bounded(value) for name, value in {**more, **(facts or {})}.items()}
        entry = messages()[code] if what is None else Message(what=what, fix=fix)
        texts = entry.filled(_Shown(facts)) if what is None else entry
        self.what = _shown(texts.what)
        super().__init__(self.what)
        self.reason = code.partition(".")[0]
        self.fix = _shown(texts.fix)
        self.where = _shown(where)
        self.facts = facts
        self.listed = {name: facts[name] for name in facts if name not in entry.fields}

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.listed:
            shown = {name: _text(value) for name, value in self.listed.items()}
            facts = ", ".join(f"{name}={text}" for name, text in shown.items())
            lines.append(f"  facts: {_shown(facts)}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), vars(self)))


_MOST_CHARACTERS = 2000
"""Most of a text that is shown, and of a fact that is kept: a damaged file may name a field with
millions of characters."""


class _Shown(dict[str, object]):
    """Facts as texts name them; those that are no numbers as bounded texts."""

    def __getitem__(self, name: str) -> object:
        value = super().__getitem__(name)
        return value if isinstance(value, int | float) else _text(value)


def _text(value: object) -> str:
    try:
        text = value if isinstance(value, str) else str(value)
    except Exception as error:  # noqa: BLE001 - an error that is being made must not be replaced
        text = f"{type(value).__name__} that cannot be shown ({type(error).__name__})"
    return _clipped(text)


def _bounded(value: object) -> object:
    return _clipped(value) if isinstance(value, str) else value


def _clipped(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS:
        return text
    # Before anything else is done with it, that takes time by its length. A few more than are
    # shown: redaction may need the beginning of what comes next.
    half = _MOST_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text):,} characters) ... {text[-half // 2 :]}"


def _shown(text: str) -> str:
    """Makes a text fit to be shown: bounded, without secrets, and possible to print anywhere."""
    text = redacted(_clipped(text))
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


def _rebuild(kind: type[ShardsError], state: dict[str, object]) -> ShardsError:
    error = kind.__new__(kind, state["what"])
    vars(error).update(state)
    return error


class ConfigError(ShardsError, ValueError):
    """An invalid argument, setting or name."""


class SourceError(ShardsError):
    """A dataset source that is missing, empty or in another schema."""


class SampleError(ShardsError):
    """One row or image that cannot become a sample; the job quarantines it and continues."""


class FetchError(ShardsError):
    """One URL that gave no usable image; the job quarantines it and continues."""


class StorageError(ShardsError):
    """A file system or object store that denied access or failed."""


class ShardError(ShardsError):
    """A shard, index or sample that is missing, short, changed or corrupt."""

    exit_code = 4


class ManifestError(ShardsError):
    """A manifest that is missing, malformed or of an unknown version."""


class ConflictError(ShardsError):
    """The output contains the result of another configuration."""

    exit_code = 3


class BudgetError(ShardsError):
    """More failures than the job's budget allows; nothing was committed."""

    exit_code = 2


class StateError(ShardsError):
    """A loader state that does not fit this dataset or these settings."""


class WorkerError(ShardsError):
    """A worker process of the loader that failed or died."""


# What comes before the host. A password may hold any character, also "/" and "@" where somebody
# has not encoded them: so with a colon that begins no port, all up to the last "@" is taken, of the
# part before the query if there is one.
_USER = re.compile(
    r"""(?<=//)(?:[^\s/@:?#'"<>]*:(?!\d{1,5}(?:[/?#]|$))(?:[^\s'"<>?#]*@|[^\s'"<>]*@)"""
    r"""|[^\s/@?#'"<>]*@)"""
)

_SECRET_NAMES = (
    r"(?:[\w-]{0,40}(?:secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key|access[_-]?token|"
    r"auth[_-]?token|hf[_-]?token|session[_-]?token|security[_-]?token|refresh[_-]?token|"
    r"id[_-]?token|credential|signature|private[_-]?key|account[_-]?key|subscription[_-]?key)"
    r"[\w-]{0,40}|auth|authorization|pwd|bearer|x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|"
    r"googleaccessid)"
)
"""Names of secrets wherever they are given: in a query, a header, a mapping, a command."""

_QUERY_NAMES = (
    r"(?:token|key|sig|hash|hmac|policy|jwt|sas|se|code|[\w-]{0,40}[_-](?:token|sig|key))"
)
"""Names that are of secrets in the query of a URL, and mean something else in other texts."""

_QUERY_SECRET = re.compile(
    rf"(?<=[?&;])({_QUERY_NAMES}|{_SECRET_NAMES})=([^&\s#'\"<>]*)", re.IGNORECASE
)
_NAMED_SECRET = re.compile(
    rf"""(?<![\w-])({_SECRET_NAMES})(['"]?\s*[=:]\s*['"]?)"""
    r"""((?:(?:bearer|basic|token)\s+)?[^\s&,;'"#<>)}\]]+)""",
    re.IGNORECASE,
)
_BARE_SECRET = re.compile(
    r"(?<![\w-])(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{20,}|"
    r"github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*)|"
    r"(?<=bearer )[\w.~+/=-]{8,}",
    re.IGNORECASE,
)
"""Tokens that are known by their form."""


def redacted(text: str) -> str:
    """Masks the passwords, tokens and signatures in a text.

    >>> redacted("s3://me:hunter2@bucket/a")
    's3://***@bucket/a'
    >>> redacted("https://h/a.jpg?w=9&X-Amz-Signature=1f&token=xyz")
    'https://h/a.jpg?w=9&X-Amz-Signature=***&token=***'
    >>> redacted("cannot log in with {'api_key': '1f'}")
    "cannot log in with {'api_key': '***'}"
    """
    text = _QUERY_SECRET.sub(r"\1=***", _USER.sub("***@", text))
    return _BARE_SECRET.sub("***", _NAMED_SECRET.sub(r"\1\2***", text))


def redacted_url(url: str) -> str:
    """Masks the secrets of one URL so that URLs that differ in the value of a parameter still do.

    A parameter named `key` may be a secret or what tells two images apart. Its value is replaced by
    its hash; repeating changes nothing.

    >>> redacted_url("https://me:secret@example.com/a.jpg?size=@2x&key=1")
    'https://***@example.com/a.jpg?size=@2x&key=***6b86b273ff34fce1'
    """
    return _QUERY_SECRET.sub(_hashed, _USER.sub("***@", url, count=1))


def _hashed(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    if re.fullmatch(r"\*\*\*[0-9a-f]{16}|\*\*\*", value):
        return found[0]
    digest = hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()
    return f"{name}=***{digest[:16]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests the known name most like a misspelt one, or lists them all.

    >>> nearest("pixmo_cpa", ["pixmo_cap", "vqa2"])
    "did you mean 'pixmo_cap'?"
    >>> nearest("x", ["pixmo_cap", "vqa2"])
    'known: pixmo_cap, vqa2'
    >>> nearest("image_size", ["IMAGE_SIZE"])
    "did you mean 'IMAGE_SIZE'?"
    """
    names = sorted(known)
    same = [each for each in names if each.lower() == name.lower()]
    close = same or difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(names)
