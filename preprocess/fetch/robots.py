"""What a site asks of robots: robots.txt (RFC 9309), X-Robots-Tag and TDM-Reservation.

Pure: `preprocess.fetch.download` requests and keeps the files. Groups of robots.txt are chosen by
the product tokens of the User-Agent, ours among them, else those of `*`; of the rules that match a
path the longest counts. A file that does not exist forbids nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from protego import Protego

from preprocess.fetch.policy import PRODUCT

_BOM = "\ufeff"
_TOKEN = re.compile(r"[a-z_-]+", re.IGNORECASE)
_AGENT = re.compile(r"[a-z0-9_*-]+")
_AGENT_LINE = re.compile(r"\s*user[- ]?agent(?:\s*:|\s)\s*([^#]*)", re.IGNORECASE)
_ANOTHER = "another"
_FORBIDS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_WITH_VALUE = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)


def product_tokens(user_agent: str) -> list[str]:
    """Lists the names that a site may have for us: the User-Agent's first word, and the tool's.

    >>> product_tokens("MyBot/2.1 (me@example.com)"), product_tokens("vlm-shards")
    (['mybot', 'vlm-shards'], ['vlm-shards'])
    """
    first = _TOKEN.match(user_agent.strip())
    # The name of a browser is everybody's.
    names = [first[0].lower()] if first and first[0].lower() != "mozilla" else []
    return list(dict.fromkeys([*names, PRODUCT]))


@dataclass(frozen=True)
class Robots:
    """A robots.txt, as it concerns one User-Agent."""

    body: bytes
    """Of the file; empty where there is none."""
    user_agent: str
    max_bytes: int
    """As much of the file is read."""

    def allows(self, url: str) -> bool:
        """Returns True if a URL of the site may be requested."""
        return self._rules.can_fetch(url, PRODUCT)

    @property
    def delay_s(self) -> float:
        """Seconds between two requests that the site asks for; 0.0 for none."""
        return max(0.0, self._rules.crawl_delay(PRODUCT) or 0.0)

    @cached_property
    def _rules(self) -> Protego:
        text = _whole_lines(self.body, self.max_bytes).decode("utf-8", "replace")
        names = product_tokens(self.user_agent)
        # Protego takes a mark in front of the first line for a part of it.
        lines = [_renamed(line, names) for line in text.lstrip(_BOM).splitlines()]
        return Protego.parse("\n".join(lines))


def _renamed(line: str, names: Iterable[str]) -> str:
    """Gives all groups that are for us one name, and those for others another.

    Protego compares names with their versions, and finds them in parts of ours.

    >>> _renamed("User-agent: MyBot/2 # me", ["mybot"]), _renamed("user-agent: Bot", ["mybot"])
    ('User-agent: vlm-shards', 'User-agent: another')
    """
    found = _AGENT_LINE.match(line)
    if found is None:
        return line
    value = found[1].strip()
    if value.split()[:1] == ["*"]:
        return "User-agent: *"
    token = _TOKEN.match(value)
    return f"User-agent: {PRODUCT if token and token[0].lower() in names else _ANOTHER}"


def _whole_lines(body: bytes, max_bytes: int) -> bytes:
    if len(body) <= max_bytes:
        return body
    cut = body[:max_bytes]
    return cut[: max(cut.rfind(b"\n"), cut.rfind(b"\r")) + 1]


def forbids_use(headers: Mapping[str, Iterable[str]], *, user_agent: str) -> bool:
    """Returns True if the headers of an image ask not to be trained on, or not to be kept.

    Args:
      headers: All values of X-Robots-Tag and of TDM-Reservation, by name in lower case.
      user_agent: As sent.

    >>> forbids_use({"x-robots-tag": ["noai, noimageai"]}, user_agent="me")
    True
    >>> forbids_use({"x-robots-tag": ["otherbot: noindex"]}, user_agent="me")
    False
    """
    if any(value.strip() == "1" for value in headers.get("tdm-reservation", ())):
        return True
    ours = {"", "*", *product_tokens(user_agent)}
    for value in headers.get("x-robots-tag", ()):
        agent = ""
        for part in value.lower().split(","):
            head, colon, rest = (text.strip() for text in part.partition(":"))
            if colon and head not in _WITH_VALUE and _AGENT.fullmatch(head):
                agent, head = head, rest
            if head in _FORBIDS and agent in ours:
                return True
    return False
