"""Hosts: which URLs are whose, and when a host may be asked next.

Pure: times are those that the caller gives. Two requests to a host begin at least its interval
apart, and none begins before the time that the host has asked for.
"""

from __future__ import annotations

import asyncio
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload
from urllib.parse import urlsplit

import numpy as np
from yarl import URL

from preprocess.fetch.urls import UrlSpool
from shardspec.keyed import hash_text

_PLAIN = re.compile(r"(?!.*xn--)[a-z0-9_.-]+")
"""A name that every library reads alike; other spellings of a host are many."""


class HostUrls(Sequence[str]):
    """URLs of a host, each a place in a list that all hosts share; taken from the end."""

    def __init__(self, spool: UrlSpool | None = None, places: Iterable[int] = ()) -> None:
        """Names them.

        Args:
          spool: The list; None where there are none.
          places: Of the URLs in it.
        """
        self._spool, self._places = spool, array("Q", places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        assert self._spool is not None
        places = self._places[i]
        return self._spool.at(places) if isinstance(places, int) else [*map(self._spool.at, places)]

    def pop(self) -> str:
        """Takes the last one."""
        url = self[-1]
        self._places.pop()
        return url


class Slots:
    """How many requests to a host may run at a time: fewer where it says that it is overrun."""

    def __init__(self, most: int) -> None:
        """Starts with the most that there may be."""
        self.number = self._most = most
        self._owed = 0
        """Slots to keep from those that end: as many as run beyond the number."""
        self._free = asyncio.Semaphore(most)
        self._halved_at_s = float("-inf")

    async def __aenter__(self) -> None:
        await self._free.acquire()

    async def __aexit__(self, *_: object) -> None:
        if self._owed:
            self._owed -= 1
        else:
            self._free.release()

    def halve(self, *, began_s: float, now_s: float) -> None:
        """Halves the number, once for requests that have run at the same time."""
        if began_s <= self._halved_at_s:
            return
        self._halved_at_s = now_s
        fewer = self.number // 2
        self.number, self._owed = self.number - fewer, self._owed + fewer

    def add_one(self) -> None:
        """Lets one more run, up to the most."""
        if self.number == self._most:
            return
        self.number += 1
        if self._owed:
            self._owed -= 1
        else:
            self._free.release()


@dataclass(slots=True)
class Host:
    """The URLs of one host that wait, and how the host behaves."""

    name: str
    urls: HostUrls = field(default_factory=HostUrls)
    resume_at_s: float = 0.0
    """Time before which the host accepts no request (Retry-After)."""
    free_at_s: float = 0.0
    """Time from which the next request may begin, by the rate."""
    crawl_delay_s: float = 0.0
    """Seconds between two requests that its robots.txt asks for."""
    failures_in_a_row: int = 0
    """URLs that ended in a transient failure since the last one that did not."""
    answers_in_a_row: int = 0
    """URLs that ended otherwise since the last one that did."""
    num_trials: int = 0
    """URLs that were requested although it has failed too often; anew after many answers."""
    trial_at_s: float = 0.0
    """When the next of them may be requested; 0.0 where the host has not failed so often."""
    slots: Slots | None = field(default=None, compare=False)
    """Requests that may run at a time."""

    def pause(self, pause_s: float, *, now_s: float) -> None:
        """Asks for no request in this time; a longer pause that is held already stays."""
        self.resume_at_s = max(self.resume_at_s, now_s + pause_s)

    def note(self, *, failed: bool) -> None:
        """Notes how a URL has ended."""
        self.failures_in_a_row = self.failures_in_a_row + 1 if failed else 0
        self.answers_in_a_row = 0 if failed else self.answers_in_a_row + 1

    def wait_s(self, *, now_s: float) -> float:
        """Gives the seconds until a request may begin; 0.0: at once."""
        return max(0.0, self.resume_at_s - now_s, self.free_at_s - now_s)

    def begin(self, *, now_s: float, interval_s: float) -> None:
        """Notes that a request begins.

        >>> host = Host("a")
        >>> host.begin(now_s=10.0, interval_s=0.5)
        >>> host.wait_s(now_s=10.2), host.wait_s(now_s=10.5)
        (0.3000000000000007, 0.0)
        """
        self.free_at_s = now_s + max(interval_s, self.crawl_delay_s)


def group_by_host(urls: Iterable[str], *, folder: str | None = None) -> list[Host]:
    """Groups URLs by host; the order of hosts, and of the URLs in them, is keyed by their text.

    >>> [(host.name, len(host.urls)) for host in group_by_host(["http://a/1", "http://b/", "http://a/2"])]
    [('b', 1), ('a', 2)]
    """
    names: dict[str, int] = {}
    numbers, keys, places = array("I"), array("Q"), array("Q")
    spool = UrlSpool(folder)
    for url in urls:
        numbers.append(names.setdefault(host_of(url), len(names)))
        keys.append(text_key(url))
        places.append(spool.add(url))
    order = np.lexsort((np.array(keys), np.array(numbers)))
    placed = np.array(places)[order]
    stops = np.bincount(np.array(numbers, np.int64), minlength=len(names)).cumsum().tolist()
    hosts = [
        Host(name, HostUrls(spool, placed[start:stop]))
        for name, start, stop in zip(names, [0, *stops], stops, strict=False)
    ]
    return sorted(hosts, key=lambda host: text_key(host.name))


def host_key(url: str) -> int:
    """Hashes the host of a URL: by it, hosts are dealt to the parts of a job.

    >>> host_key("http://a.com/1") == host_key("https://user@A.com:8080/2?x=3")
    True
    """
    return text_key(host_of(url))


def host_of(url: str) -> str:
    """Names the host of a URL as the client does; "" where there is none.

    >>> host_of("http://xn--bcher-kva.example/1"), host_of("http://[0:0::1]/")
    ('bücher.example', '::1')
    """
    try:
        name = bare(urlsplit(url).hostname or "")
        return name if _PLAIN.fullmatch(name) else bare(URL(url.strip()).host or "")
    except ValueError:
        return ""


def bare(host: str) -> str:
    """Writes a host's name as it is compared."""
    return host.rstrip(".").lower()


def text_key(text: str) -> int:
    """Hashes a text that may not be encodable: a URL from JSON may hold lone surrogates."""
    return hash_text(ascii(text))
