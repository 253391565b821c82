"""FETCH: downloads each image URL once, into blobs by content and a ledger by URL.

The network is the only part of the offline job that differs from run to run, so it is separate:
its results are frozen in the ledger, and everything after is a function of that.

1. URLs are made unique, and those that an earlier run settled are left alone: "ok" with the blob in
   place, or failed for a reason that another request would not change, until it expires.
2. The rest is fetched host by host. A host has up to `per_host` *tickets*; a worker takes one of
   the host that may be asked first, fetches that host's next URL and puts the ticket back. So hosts
   take turns, a slow one delays no other, and there are as many tasks as workers however many URLs
   there are.
3. Each request, redirects and robots.txt included, waits until its host has fewer than `per_host`
   others (half as many after a 429 or 503, one more after `host_failures` answers), until the
   host's rate and Crawl-delay allow it, and until a Retry-After of the host is over. A host that
   asks for more than `max_pause_s` is left for a later run (`host_busy`), which knows until when.
4. The robots.txt of each origin is requested once a day, and kept as a blob with a line of the
   ledger. Where it cannot be had, nothing else of the origin is requested.
5. A URL is tried `attempts` times while its failures are transient, with exponential backoff and
   full jitter. A host of which `host_failures` URLs in a row have failed is left alone for
   `backoff_s * 2 ** (attempts - 1)`; then one URL is requested once. If it fails too, the next
   pause is twice as long; after `attempts` such trials, the rest is left for a later run
   (`host_down`). An answer ends this. A body counts when it is complete, its header is an image's,
   and its sha256 is the expected one.
6. A result goes to the ledger as soon as its blob is in place.

Reasons of failure, stable codes. Transient (`TRANSIENT`), tried again at once and in later runs:
dns, connect, tls, timeout, protocol (no proper HTTP), truncated, http_429, http_5xx, host_down (not
requested: its host failed too often in a row), host_busy (not requested: see 3),
robots_unreachable (not requested: the server gave no robots.txt and did not say that there is
none), offline (see `BudgetError` below). Permanent, until `retry="all"` or they expire: http_404
and every other status, bad_url, bad_scheme, private_addr, too_many_redirects, too_big, empty,
not_image, incomplete (the file ends early or is damaged, as far as its structure shows),
sha_mismatch; robots and x_robots (not requested, or not kept: the site forbids it), until that is
ignored. Not tried again at once, but in later runs, whose limits may differ: bomb (larger than
`ImageLimits`).

A URL list is hostile input: only http and https are spoken, and a connection is made only to the
very address that was checked to be a public one, at every redirect. Pixels are not decoded here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import heapq
import ipaddress
import itertools
import logging
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from preprocess.fetch.blobs import BlobCache
from preprocess.fetch.hosts import Host, Slots, bare, group_by_host, host_of, text_key
from preprocess.fetch.ledger import FetchResult, FetchResults, Ledger
from preprocess.fetch.policy import FetchPolicy, ShaPolicy
from preprocess.fetch.robots import Robots, forbids_use
from preprocess.fetch.urls import UrlSpool, redact, request_of, unique_urls
from preprocess.media import ImageLimits, open_source
from shardspec.errors import BudgetError, ConfigError, SampleError, nearest
from shardspec.image_file import check_image_file
from shardspec.storage import retry_after_s

if TYPE_CHECKING:
    from aiohttp.abc import ResolveResult  # aiohttp 3.10

logger = logging.getLogger(__name__)

T = TypeVar("T")

TRANSIENT = frozenset(
    {
        "connect",
        "dns",
        "host_busy",
        "host_down",
        "http_429",
        "http_5xx",
        "offline",
        "protocol",
        "robots_unreachable",
        "timeout",
        "tls",
        "truncated",
    }
)
"""Reasons that another attempt may change."""

ImageFault = Literal["", "empty", "not_image", "bomb", "incomplete"]

_FAULTS: Mapping[str, ImageFault] = {
    "image_empty": "empty",
    "image_bomb": "bomb",
    "image_truncated": "incomplete",
}
"""Reasons of an image's refusal that the ledger tells apart; the others are "not_image"."""
_NOT_REACHED = frozenset(
    {"bad_scheme", "bad_url", "connect", "dns", "host_busy", "private_addr", "timeout", "tls"}
)
"""Failures of robots.txt that are the host's, whatever is requested of it."""
_DAY_S = 24 * 3600
MAX_IMAGE_BYTES = 64 * 2**20
MAX_VIDEO_BYTES = 512 * 2**20
"""What `max_bytes` is by default. A body is in memory until it is complete."""
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_OVERRUN = frozenset({429, 503})
"""Statuses by which a host asks for less."""
_WORKERS_PER_SLOT = 4
"""Workers that wait out a backoff or a pause hold no slot; this many let others continue
meanwhile."""
_LOOK_AGAIN_S = 1.0
"""How long a worker waits for a host that failed too often before it looks for another one."""
_ROBOTS_IN_MEMORY = 1000
_NUMERIC_LABEL = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
"""A last label that makes a host an IPv4 address (URL standard, "ends in a number checker")."""
_MAYBE_ADDRESS = re.compile(r"\s*https?:[/\\]*(?:[^/?#\\]*@)?[\[0-9]", re.IGNORECASE)
"""How a URL begins whose host is an address: most are not, and parsing takes ten times as long."""
_RAW_BYTE = re.compile("[\udc80-\udcff]")
"""A byte of a header that is not UTF-8, as aiohttp gives it."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""The well-known prefix under which IPv6-only networks reach IPv4 (RFC 6052)."""


def fetch_all(
    urls: Iterable[str],
    *,
    cache: BlobCache,
    ledger: Ledger,
    policy: FetchPolicy,
    expected_sha256: Mapping[str, str] | None = None,
    sha_policy: ShaPolicy = "require",
    limits: ImageLimits | None = None,
    videos: bool = False,
    ocr_files: bool = False,
    again: bool = True,
    on_result: Callable[[FetchResult], None] | None = None,
    clock: Callable[[], float] = time.time,
) -> FetchResults:
    """Downloads what is missing and returns the result of each URL.

    Interrupted by anything, even SIGKILL, it leaves a valid cache and ledger; the same call
    resumes. It runs its own event loop, so call it from synchronous code.

    Args:
      urls: In any order, duplicates allowed.
      cache: Where bodies go.
      ledger: Where results go, and what settles URLs.
      policy: Limits and manners.
      expected_sha256: Hexadecimal sha256 of some URLs' bodies.
      sha_policy: What another content is: a failure, an ok with reason "sha_mismatch", or nothing.
      limits: The largest image that is kept; None for the defaults.
      videos: Whether bodies may be other than images: anything but a page of HTML or XML.
      ocr_files: Whether bodies may be files of OCR: JSON, or markup of hOCR, ALTO or PAGE.
      again: Whether the policy judges what earlier runs have kept, and which of their failures are
        requested again; else every result that is known counts, unless its image is gone.
      on_result: Called once per unique URL, first for the settled ones, in the calling thread. What
        it raises ends the run.
      clock: Gives the time of day in seconds, by which results expire.

    Returns:
      The result of every URL given, by the URL as it was given: what the ledger says of it whenever
      it is read. Of URLs that are one request (`request_of`), the first is requested and listed.

    Raises:
      BudgetError: `looks_offline`: hardly any URL works. The failures of the last window are in the
        ledger as "offline", so the next run requests them again.
      StorageError: The cache or the ledger could not be written.
      ConfigError: `bad_sha_policy`.
    """
    if sha_policy not in get_args(ShaPolicy):
        raise ConfigError(
            "bad_sha_policy", hint=nearest(sha_policy, get_args(ShaPolicy)), got=repr(sha_policy)
        )
    urls = urls if isinstance(urls, UrlSpool) else unique_urls(urls)
    expected = {request_of(url): sha.lower() for url, sha in (expected_sha256 or {}).items()}
    run = _Run(
        cache=cache,
        ledger=ledger,
        policy=policy,
        expected=expected if sha_policy != "ignore" else {},
        sha_policy=sha_policy,
        limits=limits or ImageLimits(),
        videos=videos,
        ocr_files=ocr_files,
        again=again,
        on_result=on_result or _ignore,
        clock=clock,
    )
    with cache.writing():
        num_requested = run.fetch_missing(urls)
    logger.info("%d URLs, %d requested: %s", len(urls), num_requested, dict(run.counts))
    return FetchResults(urls, ledger.results)


def is_public(address: str) -> bool:
    """Returns True if an IP address belongs to the public internet, looking through tunnels.

    >>> is_public("8.8.8.8"), is_public("169.254.169.254"), is_public("::ffff:10.0.0.1")
    (True, False, False)
    """
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _is_private_address(host: str) -> bool:
    """Returns True if a host is an address, not a name, and not a public one."""
    try:
        return not is_public(host)
    except ValueError:
        return False


def _private_hosts(known: FetchResult) -> set[str]:
    """Names the hosts with private addresses that gave a result, as far as it says."""
    hosts = _names(known.private_hosts)
    for url in {known.url, known.final_url}:
        if _MAYBE_ADDRESS.match(url) and _is_private_address(host := host_of(url)):
            hosts.add(host)  # not recorded by older releases
    return hosts


def _names(text: str) -> set[str]:
    return {*text.split(",")} - {""}


def image_fault(body: bytes, *, limits: ImageLimits) -> ImageFault:
    """Judges a body by its image header, as BUILD does, then by its structure; "" is a usable one.

    >>> image_fault(b"<html>", limits=ImageLimits())
    'not_image'
    """
    try:
        with open_source(body, limits=limits) as image:
            check_image_file(body, form=str(image.format))
    except SampleError as error:
        return _FAULTS.get(error.reason, "not_image")
    except Warning:  # of Pillow, where the process turns warnings into errors
        return "not_image"
    except ValueError:
        return "incomplete"
    return ""


_OCR_HEAD = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:[{\[]|(?=<).*(?:ocr_page|ocr-system|<(?:\w+:)?(?:alto|PcGts)\b))",
    re.DOTALL | re.IGNORECASE,
)
"""How files of OCR begin; a page of HTML that a host gives for an error does not."""


class _Failure(Exception):
    """One attempt that gave no body."""

    def __init__(
        self,
        reason: str,
        *,
        http_status: int | None = None,
        pause_s: float = 0.0,
        attempts: int | None = None,
        at: URL | None = None,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.http_status = http_status
        self.pause_s = pause_s
        self.attempts = attempts
        """If another attempt now is pointless: how many have been made."""
        self.at = at
        """What was not requested: its host has asked for a pause, or has a private address."""


class _RefusedError(OSError):
    """A host name that must not be connected to; an OSError because aiohttp passes those on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    body: bytes
    status: int
    content_type: str
    url: URL
    has_length: bool
    """Whether its end can be told from the end of a broken connection."""


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses only.

    aiohttp connects to what its resolver returns and does not resolve again, so an answer that
    changes between check and use (DNS rebinding) gains nothing.
    """

    def __init__(self, allow_hosts: frozenset[str]) -> None:
        self._inner = aiohttp.ThreadedResolver()
        self._allow_hosts = allow_hosts
        self.private_hosts: set[str] = set()
        """Allowed ones that have a private address."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        try:
            found = await self._inner.resolve(host, port, family)
        except UnicodeError as error:
            raise _RefusedError("bad_url") from error
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        public = [address for address in found if is_public(address["host"])]
        if bare(host) in self._allow_hosts:
            if len(public) < len(found):
                self.private_hosts.add(bare(host))
            return found
        if not public:
            raise _RefusedError("private_addr")
        return public

    async def close(self) -> None:
        await self._inner.close()


class _Breaker:
    """Detects that hardly any request succeeds, whatever the host."""

    def __init__(self, policy: FetchPolicy) -> None:
        self._policy = policy
        self._window: deque[tuple[str, FetchResult]] = deque(maxlen=policy.breaker_window)

    def add(self, host: str, result: FetchResult) -> None:
        self._window.append((host, result))

    def tripped(self) -> list[FetchResult]:
        """Returns the failures of a window that is too bad, else []."""
        window = self._window
        failed = [result for _, result in window if result.status == "failed"]
        num_ok = len(window) - len(failed)
        full = len(window) == self._policy.breaker_window
        if not full or num_ok >= self._policy.breaker_success * len(window):
            return []
        return failed if len({host for host, _ in window}) >= self._policy.breaker_hosts else []


class _Tickets:
    """Tickets of hosts, by when their host may be asked; equal ones in the order of putting."""

    def __init__(self, max_pause_s: float) -> None:
        self._max_pause_s = max_pause_s
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Host]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def clear(self) -> None:
        self._heap.clear()

    def put(self, host: Host) -> None:
        now_s = asyncio.get_running_loop().time()
        self._put(host, now_s + self._wait_s(host, now_s))

    def _put(self, host: Host, from_s: float) -> None:
        heapq.heappush(self._heap, (from_s, next(self._numbers), host))

    def take(self) -> Host:
        """Takes the first; a host's other tickets may have made it wait since this one was put."""
        now_s = asyncio.get_running_loop().time()
        while True:
            _, _, host = heapq.heappop(self._heap)
            wait_s = self._wait_s(host, now_s)
            if not wait_s or not self._heap or now_s + wait_s <= self._heap[0][0]:
                return host
            self._put(host, now_s + wait_s)

    def _wait_s(self, host: Host, now_s: float) -> float:
        wait_s = host.wait_s(now_s=now_s)
        if wait_s > self._max_pause_s:
            return 0.0  # its URLs end at once
        return max(wait_s, host.trial_at_s - now_s)


@dataclass(slots=True, kw_only=True)
class _Run:
    """One call of `fetch_all`."""

    cache: BlobCache
    ledger: Ledger
    policy: FetchPolicy
    expected: Mapping[str, str]
    sha_policy: ShaPolicy
    limits: ImageLimits
    videos: bool
    ocr_files: bool
    again: bool
    on_result: Callable[[FetchResult], None]
    clock: Callable[[], float]
    counts: Counter[str] = field(default_factory=Counter)
    """URLs by how they ended."""
    _pauses: dict[str, int] = field(default_factory=dict)
    """By host: until when it has asked earlier runs for a pause."""
    _stopped: bool = False
    _breaker: _Breaker = field(init=False)
    _max_bytes: int = field(init=False)
    _limits: Mapping[str, int] = field(init=False)
    """By the class of failures that end at one."""
    _hosts: dict[str, Host] = field(default_factory=dict)
    """Also those that only redirects lead to."""
    _robots: dict[URL, asyncio.Task[tuple[Robots | _Failure, float]]] = field(default_factory=dict)
    """By origin, the last used last: robots.txt, and the loop time until which it is used. Those
    that were used last: a parsed file takes 100 kB, and the ledger knows the others."""
    _no_robots: dict[URL, _Failure] = field(default_factory=dict)
    """By origin: why robots.txt could not be had in this run."""
    _slots: asyncio.Semaphore = field(init=False)
    _resolver: _PublicResolver = field(init=False)
    _session: aiohttp.ClientSession = field(init=False)

    def __post_init__(self) -> None:
        self._breaker = _Breaker(self.policy)
        usual = MAX_VIDEO_BYTES if self.videos else MAX_IMAGE_BYTES
        self._max_bytes = self.policy.max_bytes or usual
        self._limits = {
            "too_big": self._max_bytes,
            "too_many_redirects": self.policy.max_redirects,
        }

    def is_settled(self, known: FetchResult) -> bool:
        """Returns True if the result of an earlier run is kept."""
        expected = self.expected.get(request_of(known.url))
        differs = self.sha_policy == "require" and expected not in (None, known.sha256)
        if known.status == "ok":
            if self.again and (differs or self._refuses(known)):
                return False
            return self.cache.has(known.sha256 or "", num_bytes=known.num_bytes)
        refused = self._still_refuses(known)
        if not self.again:
            # What the split was made of, a run with other settings may have refused since.
            return known.sha256 is None or refused is not False
        if self.policy.retry != "transient":
            return self.policy.retry == "none"
        if self.clock() - known.finished_unix_s > self.policy.failures_expire_days * _DAY_S:
            return False
        if known.reason == "sha_mismatch":
            return differs
        if refused is not None:
            return refused
        return known.reason not in TRANSIENT and known.reason != "bomb"  # by other limits

    def _still_refuses(self, known: FetchResult) -> bool | None:
        """Returns True if the settings refuse it still; None if it failed for another reason."""
        if known.reason == "robots":
            return self.policy.robots_txt == "obey"
        if known.reason == "x_robots":
            return self.policy.x_robots_tag == "obey"
        if known.reason == "private_addr":
            return host_of(known.final_url or known.url) not in self.policy.allow_hosts
        if known.reason in self._limits:
            return known.limit >= self._limits[known.reason]
        return None

    def _refuses(self, known: FetchResult) -> bool:
        """Returns True if this run would not keep what an earlier one, maybe another's, has kept.

        What older releases did not record counts as allowed: which opt-outs were ignored, where
        some still are; redirects; the names of private hosts, but for addresses in URLs.
        """
        ours = set(self.policy.ignored_opt_outs)
        unasked = not _names(known.ignored_opt_outs) <= ours
        return (
            unasked
            or (known.opt_outs_ignored and not ours)
            or known.num_bytes > self._max_bytes
            or known.num_redirects > self.policy.max_redirects
            or not _private_hosts(known) <= self.policy.allow_hosts
        )

    def fetch_missing(self, urls: UrlSpool) -> int:
        """Fetches what no earlier run has settled; returns the number of these URLs."""
        if urls:
            self.cache.refresh()
        hosts = group_by_host(self._unsettled(urls), folder=urls.folder)
        num_urls = sum(len(host.urls) for host in hosts)
        if hosts:
            try:
                asyncio.run(self.fetch(hosts))
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None  # see _cancel_on_sigint
        return num_urls

    def _unsettled(self, urls: Iterable[str]) -> Iterator[str]:
        for url in urls:
            known = self.ledger.get(url)
            if known is not None and self.is_settled(known):
                self._count(known)
                continue
            if known is not None and known.not_before_unix_s:
                name = host_of(known.final_url or url)
                self._pauses[name] = max(known.not_before_unix_s, self._pauses.get(name, 0))
            yield url

    def _count(self, result: FetchResult) -> None:
        self.counts[result.reason or result.status] += 1
        self.on_result(result)

    async def fetch(self, hosts: list[Host]) -> None:
        """Fetches all URLs of the hosts."""
        _cancel_on_sigint()
        policy = self.policy
        self._hosts = {host.name: host for host in hosts}
        self._remember_pauses()
        tickets = _Tickets(policy.max_pause_s)
        for turn in range(policy.per_host):
            for host in hosts:
                if len(host.urls) > turn:
                    tickets.put(host)
        # Host names are looked up, and blobs stored, in threads; a slot needs at most one.
        threads = ThreadPoolExecutor(policy.concurrency, thread_name_prefix="fetch")
        asyncio.get_running_loop().set_default_executor(threads)
        self._slots = asyncio.Semaphore(policy.concurrency)
        self._resolver = _PublicResolver(policy.allow_hosts)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            limit=policy.concurrency,
            use_dns_cache=policy.dns_cache_s > 0,
            ttl_dns_cache=policy.dns_cache_s,
            keepalive_timeout=policy.keepalive_s,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=policy.connect_timeout_s, sock_read=policy.read_timeout_s
            ),
            # Compression gains nothing on images and would hide their length.
            headers={"User-Agent": policy.sent_user_agent, "Accept-Encoding": "identity"},
        )
        if hasattr(self._session, "_retry_connection"):
            # A connection that breaks is an attempt like others: a request that aiohttp repeats by
            # itself would come at once, whatever the host's rate.
            self._session._retry_connection = False
        num_workers = min(len(tickets), policy.concurrency * _WORKERS_PER_SLOT)
        async with self._session:
            workers = [asyncio.create_task(self._work(tickets)) for _ in range(num_workers)]
            try:
                await asyncio.gather(*workers)
            finally:
                tickets.clear()
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                for task in self._robots.values():
                    task.cancel()
                await asyncio.gather(*self._robots.values(), return_exceptions=True)

    def _remember_pauses(self) -> None:
        """Holds the pauses that hosts have asked an earlier run for."""
        now_s, now_unix_s = asyncio.get_running_loop().time(), self.clock()
        for name, until in self._pauses.items():
            if until > now_unix_s:
                pause_s = min(until - now_unix_s, self.policy.longest_pause_s)
                self._hosts.setdefault(name, Host(name)).pause(pause_s, now_s=now_s)

    async def _work(self, tickets: _Tickets) -> None:
        # A worker that finds no ticket may leave: every other ticket is held by a worker that will
        # put it back.
        while tickets:
            host = tickets.take()
            if not host.urls:
                continue
            now_s = asyncio.get_running_loop().time()
            is_down = self._is_down(host)
            if is_down and host.trial_at_s > now_s:
                # No host may be asked earlier, but that may change.
                await asyncio.sleep(min(host.trial_at_s - now_s, _LOOK_AGAIN_S))
                tickets.put(host)
                continue
            is_trial = is_down and host.num_trials < self.policy.attempts
            if is_trial:
                host.num_trials += 1
                host.trial_at_s = now_s + self.policy.wall_timeout_s  # unless it ends earlier
            url = host.urls.pop()
            result = await self._fetch(url, host, is_trial=is_trial)
            if self._stopped:
                return
            try:
                self._finish(result, host, is_trial=is_trial)
            except BaseException:
                # Cancelling takes effect a turn later; until then others may come this far.
                self._stopped = True
                raise
            if host.urls:
                tickets.put(host)

    def _is_down(self, host: Host) -> bool:
        # Of a host that asks for a long pause, more is known.
        wait_s = host.wait_s(now_s=asyncio.get_running_loop().time())
        failed_often = host.failures_in_a_row >= self.policy.host_failures
        return failed_often and wait_s <= self.policy.max_pause_s

    def _judge(self, host: Host, result: FetchResult, *, is_trial: bool) -> None:
        """Notes how a host has answered, and when it may be tried again if it failed too often."""
        policy, was_down = self.policy, self._is_down(host)
        if result.reason != "host_busy":
            host.note(failed=result.reason in TRANSIENT)
        if host.answers_in_a_row and host.answers_in_a_row % policy.host_failures == 0:
            host.num_trials = 0
            if host.slots is not None:
                host.slots.add_one()
        if not self._is_down(host):
            host.trial_at_s = 0.0
        elif is_trial or not was_down:
            pause_s = policy.backoff_s * 2 ** (policy.attempts - 1 + host.num_trials)
            at_s = asyncio.get_running_loop().time() + min(pause_s, policy.max_pause_s)
            host.trial_at_s = at_s if host.num_trials < policy.attempts else 0.0

    def _finish(self, result: FetchResult, host: Host, *, is_trial: bool) -> None:
        before = self.ledger.get(result.url)
        if before is not None and before.sha256 and self._still_refuses(result):
            result = dataclasses.replace(result, sha256=before.sha256, num_bytes=before.num_bytes)
        self.ledger.append(result)
        self._count(result)
        self._judge(host, result, is_trial=is_trial)
        # URLs that were never requested, and those that failed before, say nothing about today.
        fresh = before is None or before.status == "ok" or before.reason == "offline"
        if not result.attempts or not fresh:
            return
        self._breaker.add(host.name, result)
        failed = self._breaker.tripped() if result.status == "failed" else []
        if failed:
            for failure in failed:
                self.ledger.append(dataclasses.replace(failure, reason="offline"))
            counts = Counter(failure.reason for failure in failed)
            raise BudgetError(
                "looks_offline", window=self.policy.breaker_window, facts=dict(counts.most_common())
            )

    async def _fetch(self, text: str, host: Host, *, is_trial: bool) -> FetchResult:
        name = redact(text)
        if self._is_down(host) and not is_trial:
            await asyncio.sleep(0)  # a host may have a hundred thousand of these
            return self._failed(name, host, _Failure("host_down"), attempts=0)
        try:
            url = _checked_url(text, allow_hosts=self.policy.allow_hosts)
        except _Failure as failure:
            return self._failed(name, host, failure, attempts=0)
        if is_trial:
            self._no_robots.pop(url.origin(), None)
        most_attempts = 1 if is_trial else self.policy.attempts
        attempt = 1
        last: _Failure | None = None
        while True:
            try:
                return await self._attempt(url, name=name, attempt=attempt)
            except _Failure as failure:
                if failure.attempts is not None:
                    # What the host has said before is more than that it is not asked again.
                    final, requests = (last, attempt - 1) if last else (failure, failure.attempts)
                    return self._failed(name, host, final, attempts=requests)
                if failure.reason not in TRANSIENT or attempt >= most_attempts:
                    return self._failed(name, host, failure, attempts=attempt)
                last = failure
                await self._back_off(name, attempt)
                attempt += 1

    async def _back_off(self, name: str, attempt: int) -> None:
        # Full jitter from the URL's own hash: spread over URLs, and no generator to own.
        share = text_key(f"{name} {attempt}") / 2**64
        backoff_s = self.policy.backoff_s * 2 ** (attempt - 1)
        await asyncio.sleep(min(share * backoff_s, self.policy.max_pause_s))

    def _failed(self, name: str, host: Host, failure: _Failure, *, attempts: int) -> FetchResult:
        now_unix_s = self.clock()
        if failure.at is not None:
            host = self._hosts.get(bare(failure.at.host or ""), host)
        pause_s = host.resume_at_s - asyncio.get_running_loop().time()
        return FetchResult(
            url=name,
            status="failed",
            reason=failure.reason,
            http_status=failure.http_status,
            attempts=attempts,
            limit=self._limits.get(failure.reason, 0),
            final_url=redact(str(failure.at)) if failure.at else "",
            finished_unix_s=int(now_unix_s),
            not_before_unix_s=int(now_unix_s + pause_s) + 1 if pause_s > 0 else 0,
        )

    async def _attempt(self, url: URL, *, name: str, attempt: int) -> FetchResult:
        """Requests an image once, and stores it."""
        left_s, now_s = self.policy.wall_timeout_s, asyncio.get_running_loop().time
        asked: list[URL] = []
        for _ in range(self.policy.max_redirects + 1):
            asked.append(url)
            if self.policy.robots_txt == "obey":
                robots = await self._robots_of(url)
                if not robots.allows(str(url)):
                    raise _Failure("robots", attempts=attempt - 1)
            async with self._turn(url) as began_s:
                found = await self._limited(self._get(url), left_s)
                if isinstance(found, _Answer):
                    # Outside the wall limit: the server is not to blame for a slow disk.
                    return await self._stored(found, name=name, attempt=attempt, asked=asked)
            left_s -= now_s() - began_s
            url = found
        raise _Failure("too_many_redirects")

    async def _limited(self, request: Coroutine[Any, Any, T], left_s: float) -> T:
        try:
            return await asyncio.wait_for(request, left_s)
        except asyncio.TimeoutError:
            raise _Failure("timeout") from None

    @asynccontextmanager
    async def _turn(self, url: URL) -> AsyncIterator[float]:
        """Waits until a URL may be requested, and holds a slot of all and one of its host.

        Gives the loop time at which it begins. A pause that the host asks for in the block is held
        by all of its requests.

        Raises:
          _Failure: host_busy.
        """
        name = bare(url.host or "")
        host = self._hosts.setdefault(name, Host(name))
        if host.slots is None:
            host.slots = Slots(self.policy.per_host)
        now_s = asyncio.get_running_loop().time
        interval_s = 1 / self.policy.host_rate if self.policy.host_rate else 0.0
        async with host.slots:
            while True:
                wait_s = host.wait_s(now_s=now_s())
                if wait_s > self.policy.max_pause_s:
                    raise _Failure("host_busy", attempts=0, at=url)
                if wait_s:
                    await asyncio.sleep(wait_s)
                async with self._slots:
                    if host.wait_s(now_s=now_s()):
                        continue  # others were first, or the host has asked for a pause
                    began_s = now_s()
                    host.begin(now_s=began_s, interval_s=interval_s)
                    try:
                        yield began_s
                    except _Failure as failure:
                        if failure.http_status in _OVERRUN:
                            host.slots.halve(began_s=began_s, now_s=now_s())
                        if failure.pause_s:
                            failure.at = url
                            pause_s = min(failure.pause_s, self.policy.longest_pause_s)
                            host.pause(pause_s, now_s=now_s())
                        raise
                    return

    async def _robots_of(self, url: URL) -> Robots:
        """Gives the robots.txt of a URL's origin, which is requested by whoever needs it first.

        Raises:
          _Failure: It cannot be had.
        """
        origin, now_s = url.origin(), asyncio.get_running_loop().time()
        found: Robots | _Failure | None = self._no_robots.get(origin)
        if found is None:
            task = self._robots.pop(origin, None)
            if task is None or (task.done() and task.result()[1] < now_s):
                self._forget_robots()
                task = asyncio.create_task(self._load_robots(origin))
            self._robots[origin] = task
            found = (await asyncio.shield(task))[0]
        if isinstance(found, Robots):
            return found
        self._no_robots[origin] = found
        self._robots.pop(origin, None)
        raise _Failure(found.reason, attempts=found.attempts, at=found.at)

    def _forget_robots(self) -> None:
        """Makes room for a robots.txt."""
        if len(self._robots) >= _ROBOTS_IN_MEMORY:
            origin, task = next(iter(self._robots.items()))
            if task.done():
                del self._robots[origin]

    async def _load_robots(self, origin: URL) -> tuple[Robots | _Failure, float]:
        url = origin / "robots.txt"
        name, host = str(url), bare(url.host or "")
        known = self.ledger.get(name)
        kept_s = self.policy.robots_age_s
        age_s = kept_s if known is None else self.clock() - known.finished_unix_s
        blob = known.sha256 if known is not None else None
        try:
            if age_s >= kept_s or (blob is not None and not self.cache.has(blob)):
                known, age_s = await self._request_robots(url, name=name), 0.0
                self.ledger.append(known)
        except _Failure as failure:
            reached = failure.reason not in _NOT_REACHED
            reason = "robots_unreachable" if reached else failure.reason
            return _Failure(reason, attempts=failure.attempts, at=failure.at), 0.0
        body = b""
        if known is not None and known.sha256:
            loop = asyncio.get_running_loop()
            body = await loop.run_in_executor(None, self.cache.get, known.sha256)
        robots = Robots(body, self.policy.user_agent, self.policy.robots_bytes)
        delayed = self._hosts.setdefault(host, Host(host))
        delayed.crawl_delay_s = max(delayed.crawl_delay_s, robots.delay_s)
        return robots, asyncio.get_running_loop().time() + kept_s - age_s

    async def _request_robots(self, url: URL, *, name: str) -> FetchResult:
        """Requests a robots.txt; a file that does not exist is a result too."""
        for attempt in range(1, self.policy.attempts + 1):
            try:
                status, body = await self._robots_body(url)
            except _Failure as failure:
                last = attempt == self.policy.attempts or failure.attempts is not None
                if last or failure.reason not in TRANSIENT:
                    # No URL of this origin tries it again in this run.
                    failure.attempts = attempt if failure.attempts is None else failure.attempts
                    raise
                await self._back_off(name, attempt)
            else:
                break
        loop = asyncio.get_running_loop()
        sha256 = await loop.run_in_executor(None, self.cache.put, body) if body else None
        return FetchResult(
            url=name,
            status="ok" if status == 200 else "failed",
            reason="" if status == 200 else _status_reason(status),
            http_status=status,
            sha256=sha256,
            num_bytes=len(body),
            attempts=attempt,
            finished_unix_s=int(self.clock()),
        )

    async def _robots_body(self, url: URL) -> tuple[int, bytes]:
        """Requests a robots.txt once; status 404 stands for all ways in which there is none.

        Raises:
          _Failure: Among others http_5xx and http_429: there may be one.
        """
        left_s, now_s = self.policy.wall_timeout_s, asyncio.get_running_loop().time
        first = url
        try:
            for _ in range(self.policy.max_redirects + 1):
                async with self._turn(url) as began_s:
                    found = await self._limited(self._get(url, robots=True), left_s)
                left_s -= now_s() - began_s
                if isinstance(found, _Answer):
                    return 200, found.body
                url = found
        except _Failure as failure:
            if failure.reason in TRANSIENT or (failure.http_status is None and url == first):
                raise
        return 404, b""

    async def _stored(
        self, answer: _Answer, *, name: str, attempt: int, asked: list[URL]
    ) -> FetchResult:
        loop = asyncio.get_running_loop()
        reason, sha256 = await loop.run_in_executor(None, self._keep, name, answer.body)
        if reason == "incomplete" and not answer.has_length:
            raise _Failure("truncated", http_status=answer.status)
        only_warned = reason == "sha_mismatch" and self.sha_policy == "warn"
        return FetchResult(
            url=name,
            status="failed" if reason and not only_warned else "ok",
            reason=reason,
            http_status=answer.status,
            sha256=sha256,
            num_bytes=len(answer.body),
            attempts=attempt,
            content_type=answer.content_type,
            final_url=redact(str(answer.url)),
            finished_unix_s=int(self.clock()),
            opt_outs_ignored=bool(self.policy.ignored_opt_outs),
            ignored_opt_outs=",".join(self.policy.ignored_opt_outs),
            num_redirects=len(asked) - 1,
            private_hosts=",".join(
                sorted({bare(each.raw_host or "") for each in asked if self._is_private(each)})
            ),
        )

    def _is_private(self, url: URL) -> bool:
        host = bare(url.raw_host or "")
        return _is_private_address(host) or host in self._resolver.private_hosts

    def _keep(self, name: str, body: bytes) -> tuple[str, str]:
        """Judges a body and stores a usable one; returns the reason against it and its sha256."""
        sha256 = hashlib.sha256(body).hexdigest()
        request = request_of(name)
        is_document = request.partition("?")[0].lower().endswith(".pdf") and b"%PDF-" in body[:1024]
        # Whether the pages of a PDF can be drawn is seen by who draws them.
        reason: str = "" if is_document else image_fault(body, limits=self.limits)
        if self.videos and reason == "not_image" and not body[:64].lstrip().startswith(b"<"):
            reason = ""  # whether it is a video is seen where it is decoded
        if self.ocr_files and reason == "not_image" and _OCR_HEAD.match(body[:4096]):
            reason = ""  # whether it can be read is seen by who reads it
        if not reason and self.expected.get(request, sha256) != sha256:
            reason = "sha_mismatch"
        if not reason or (reason == "sha_mismatch" and self.sha_policy == "warn"):
            self.cache.put(body)
        return reason, sha256

    async def _get(self, url: URL, *, robots: bool = False) -> _Answer | URL:
        """Requests a URL once; returns the answer, or where it redirects to."""
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                location = response.headers.get("Location")
                if response.status not in _REDIRECTS or location is None:
                    return await self._read(response, robots=robots)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = _reason_of(error)
            raise _Failure(reason, at=url if reason == "private_addr" else None) from error
        text = _RAW_BYTE.sub(lambda found: f"%{ord(found[0]) - 0xDC00:02X}", location)
        return _checked_url(text, base=url, allow_hosts=self.policy.allow_hosts)

    async def _read(self, response: aiohttp.ClientResponse, *, robots: bool) -> _Answer:
        status = response.status
        if status != 200:
            now = datetime.fromtimestamp(self.clock(), timezone.utc)
            pause_s = retry_after_s(response.headers, now=now) if status in _OVERRUN else 0.0
            raise _Failure(_status_reason(status), http_status=status, pause_s=pause_s)
        policy = self.policy
        if not robots and policy.x_robots_tag == "obey":
            names = ("x-robots-tag", "tdm-reservation")
            asked = {name: response.headers.getall(name, []) for name in names}
            if forbids_use(asked, user_agent=policy.user_agent):
                raise _Failure("x_robots", http_status=status)
        if not robots and (response.content_length or 0) > self._max_bytes:
            raise _Failure("too_big", http_status=status)
        body = bytearray()
        try:
            async for chunk in response.content.iter_any():
                body += chunk
                if robots and len(body) > policy.robots_bytes:
                    break
                if len(body) > self._max_bytes and not robots:
                    raise _Failure("too_big", http_status=status)
        except (aiohttp.ClientError, OSError) as error:
            # Any error in the middle of a body leaves a part of it.
            reason = _reason_of(error)
            raise _Failure(
                "timeout" if reason == "timeout" else "truncated", http_status=status
            ) from error
        return _Answer(
            body=bytes(body),
            status=status,
            content_type=response.content_type,
            url=response.url,
            has_length=any(
                name in response.headers for name in ("Content-Length", "Transfer-Encoding")
            ),
        )


def _checked_url(text: str, *, allow_hosts: frozenset[str], base: URL | None = None) -> URL:
    """Parses a URL, against a base if it may be relative, and refuses what must not be requested.

    Raises:
      _Failure: bad_url, bad_scheme or private_addr.
    """
    try:
        text.encode()  # the library leaves out what has no bytes, and would request another URL
        url = URL(text.strip())
        url = base.join(url) if base is not None else url
        scheme, host = url.scheme, bare(url.host or "")
    except ValueError as error:
        raise _Failure("bad_url") from error
    if scheme not in ("http", "https"):
        raise _Failure("bad_scheme" if scheme else "bad_url")
    if not host:
        raise _Failure("bad_url")
    try:
        public = is_public(host)
    except ValueError:
        # A name; the resolver checks its addresses. But 0x7f.1, 127.1 and 2130706433 are addresses
        # to the C library, and whether the resolver gets to see them depends on aiohttp's version.
        if _NUMERIC_LABEL.fullmatch(host.rpartition(".")[2]):
            raise _Failure("bad_url") from None
        return url
    if not public and host not in allow_hosts:
        raise _Failure("private_addr", at=url)
    return url


def _cancel_on_sigint() -> None:
    """Makes Ctrl-C cancel the running task, as asyncio.run does from Python 3.11 on.

    Before, KeyboardInterrupt struck in the middle of any task and left its pieces unclosed. The
    loop takes the handler away when it closes.
    """
    task = asyncio.current_task()
    in_main_thread = threading.current_thread() is threading.main_thread()
    # From 3.11 on the handler is asyncio's by now; an embedding program's is left alone.
    if task and in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)


def _reason_of(error: Exception) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientSSLError):
        return "tls"
    if isinstance(error, aiohttp.ClientConnectorError):
        if isinstance(error.os_error, _RefusedError):
            return error.os_error.reason
        return "dns" if isinstance(error.os_error, socket.gaierror) else "connect"
    if isinstance(error, ValueError):  # aiohttp.InvalidURL, and texts that it cannot encode
        return "bad_url"
    if isinstance(error, (aiohttp.ClientConnectionError, OSError)):
        return "connect"
    return "protocol"


def _status_reason(status: int) -> str:
    if 500 <= status <= 599:
        return "http_5xx"
    return "timeout" if status == 408 else f"http_{status}"


def _ignore(result: FetchResult) -> None:
    del result
