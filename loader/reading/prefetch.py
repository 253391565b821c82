"""Prefetcher: gets parts of remote objects to where samples are read, in the order of their use.

Who knows the order says what will be read in which step (`prefetch`), reads it (`read`), and says
that a step is done (`release`). Saying costs no time: where the bytes of a step lie is found out
by a thread, since the indexes that tell may have to be fetched first. Between that stand two
queues, each by step, with threads of its own:

* *Pieces*: single samples, neighbours joined. Without a cache everything comes this way, into
  memory. With one, the samples of the first few steps do: the first batch waits for its own bytes
  and not for whole blocks.
* *Blocks*: whole blocks for the cache, the ones that are needed first first. Pieces that have come
  already are not fetched again. No block is begun while a piece waits.

A process that finds a block being written by another one waits for it, so a node fetches every
byte once; after `_PATIENCE_S` it fetches the sample by itself. A block that was evicted before all
of it was used is not fetched again in the epoch: its samples then come as pieces, and a cache that
is too small for the order costs at most one fetch more per block.

What fails while nobody waits for it is not raised: the reader asks again and raises what then
fails. A disk that is full or broken ends the use of the cache, with one warning, and reading goes
on without.

If nothing arrives for `stall_s`, the stacks of all threads go to the log and the reader raises.
"""

from __future__ import annotations

import faulthandler
import heapq
import itertools
import logging
import os
import tempfile
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from loader.reading.blocks import Block, Span, coalesce, missing
from loader.reading.cache import BlockCache, CacheWriter
from shardspec.errors import ConfigError, StorageError
from shardspec.storage import RangeReader, RetryPolicy

logger = logging.getLogger(__name__)

_GAP_BYTES = 64 * 1024
"""Joined over: at 100 MB/s so many bytes take as long as 0.6 ms of another request's 20."""
_PIECE_BYTES = 2**20
"""Neighbours are joined up to there: longer requests would keep the samples of a step waiting for
each other, and eight of these fill a link of 100 MB/s at 80 ms."""
_BESIDE = 1
"""Requests for later steps that begin while the first batch waits for its own: they share a link.
Behind it all requests are used: one link's latency is hidden by the bytes of other steps."""
_PATIENCE_S = 5.0
_POLL_S = 0.01
_IDLE_S = 10.0
"""A thread without work ends after so long."""
_MAX_MAPS = 256
"""Blocks mapped at a time; each holds a descriptor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """How remote shards are read. The defaults suit object stores of 20 to 100 ms."""

    block_bytes: int = 4 * 2**20
    """Size of the blocks that a cache holds."""
    ahead_steps: int = 64
    """Steps that are planned ahead, each of this rank's share."""
    ahead_bytes: int = 256 * 2**20
    """Most memory for samples that are read ahead without a cache."""
    cold_steps: int = 4
    """Samples of so many steps at the start of a run or pass are fetched before their blocks."""
    requests: int = 32
    """Requests for single samples at a time."""
    streams: int = 8
    """Requests for blocks at a time."""
    stall_s: float = 300.0
    """Nothing arriving for so long is a stall, in seconds."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How long to try for one range."""

    def __post_init__(self) -> None:
        names = ("block_bytes", "ahead_steps", "ahead_bytes", "cold_steps", "requests", "streams")
        wrong = {name: getattr(self, name) for name in names if getattr(self, name) < 1}
        if wrong or self.stall_s <= 0:
            raise ConfigError("network", facts=wrong or {"stall_s": self.stall_s})


_Kind = Literal["piece", "block"]

Locate = Callable[[], Iterable[tuple[Block, Span]]]
"""Finds the blocks and the parts of them that a step needs."""


class _Entry:
    """What is known of a block that somebody needs; changes under the prefetcher's lock."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.view: memoryview | None = None
        """The whole block, mapped."""
        self.on_disk = False
        """It was in the cache when it was planned, or written since."""
        self.pieces: dict[Span, memoryview] = {}
        """Parts that have come."""
        self.wanted: dict[Span, int] = {}
        """Parts that wait for a thread, with the steps that need them."""
        self.coming: set[Span] = set()
        """Parts that a thread fetches."""
        self.uses: Counter[Span] = Counter()
        """Planned uses of parts."""
        self.steps: list[int] = []
        """Steps that will use it, increasing."""
        self.fill: CacheWriter | None = None
        self.claiming = False
        """A thread asks for the right to write it."""
        self.queued = False
        self.filling = False
        self.direct = False
        """It is not to be cached."""
        self.elsewhere = False
        """Another process writes it."""
        self.failures = 0
        self.error: Exception | None = None

    @property
    def is_there(self) -> bool:
        return self.view is not None or self.on_disk

    @property
    def is_idle(self) -> bool:
        under_way = self.wanted or self.coming or self.queued or self.filling or self.fill
        return not (under_way or self.steps or self.pieces or self.view is not None)


class Prefetcher:
    """Fetches for one process; a copy in another process begins with nothing."""

    def __init__(self, network: Network, *, cache: str | None = None, cache_bytes: int = 0) -> None:
        """Starts nothing yet.

        Args:
          network: How to read.
          cache: Folder of a cache on the node's disk; None: memory.
          cache_bytes: Its bound.
        """
        self.network = network
        self._cache_path, self._cache_bytes = cache, cache_bytes
        self._begin()

    @property
    def settings(self) -> tuple[Network, str | None, int]:
        """What it was made with: those that are alike can be shared."""
        return self.network, self._cache_path, self._cache_bytes

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("network", "_cache_path", "_cache_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self.ranges = RangeReader(self.network.retry)
        lock = threading.RLock()
        self._arrived = threading.Condition(lock)
        self._work = {"piece": threading.Condition(lock), "block": threading.Condition(lock)}
        self._queues: dict[str, list[tuple[int, int, _Entry]]] = {"piece": [], "block": []}
        self._numbers = itertools.count()
        self._threads: Counter[str] = Counter()
        self._idle: Counter[str] = Counter()
        self._entries: dict[str, _Entry] = {}
        self._maps: OrderedDict[str, _Entry] = OrderedDict()
        # Steps that were said and not located yet, and how often all was forgotten.
        self._said: list[tuple[int, int, Locate]] = []
        self._locating: int | None = None
        self._is_locating = False
        self._passed = 0
        self._plan: dict[int, list[tuple[_Entry, Span]]] = {}
        self._now = 0
        self._cold_until: int | None = None
        self._held_bytes = 0
        # Requests under way, by whether a batch waits for them.
        self._under_way: Counter[bool] = Counter()
        # How much of a block was read since it was last used up, and how often it was.
        self._read_bytes: defaultdict[str, int] = defaultdict(int)
        self._passes: Counter[str] = Counter()
        self._cache: BlockCache | None = None
        self._cache_opened = False

    @property
    def counters(self) -> Counter[str]:
        """What was read and how: those of `RangeReader`, and cache_hits, cache_misses (samples),
        cache_full, cache_evicted_early, cache_corrupt, cache_failed (blocks), where not 0."""
        return self.ranges.counters

    def open(self) -> None:
        """Opens the cache now rather than with the first read.

        Raises:
          ConfigError: `cache_foreign`.
        """
        self._alive()
        with self._arrived:
            self._open_cache()

    def cancel_prefetch(self) -> None:
        """Drops what was planned and not read: the run goes on elsewhere."""
        self._alive()
        with self._arrived:
            self._said.clear()
            self._passed += 1
            self._plan.clear()
            self._cold_until, self._now = None, 0
            for queue in self._queues.values():
                # Rights to write are not left unused: others may wait for these blocks.
                queue[:] = [queued for queued in queue if queued[2].fill]
                heapq.heapify(queue)
            for entry in list(self._entries.values()):
                entry.steps.clear()
                entry.uses.clear()
                entry.wanted.clear()
                entry.queued = entry.queued and entry.fill is not None
                if entry.fill is None:
                    self._drop_pieces(entry, list(entry.pieces))
                elif not (entry.queued or entry.coming or entry.filling):
                    # Nobody else would write it, and others may wait for it.
                    self._queue_block(entry, self._now)
                self._settle(entry)

    def prefetch(self, step: int, locate: Locate) -> None:
        """Says what a step will read; returns at once.

        Args:
          step: Of the run. Steps come in increasing order.
          locate: Finds the places, in another thread; what it raises, the reader will meet too.
        """
        self._alive()
        with self._arrived:
            if not (self._plan or self._is_locating):
                self._now = step
            heapq.heappush(self._said, (step, next(self._numbers), locate))
            if not self._is_locating:
                self._is_locating = True
                threading.Thread(target=self._locate_said, name="locate", daemon=True).start()

    def _locate_said(self) -> None:
        while True:
            with self._arrived:
                if self._is_first and self._locating == self._now:
                    self._wake()
                self._locating = None
                self._arrived.notify_all()
                while self._said and self._is_first and self._said[0][0] > self._now + 1:
                    # To look so far ahead would take the interpreter from the first batch.
                    if not self._under_way[True]:
                        break
                    self._arrived.wait(_POLL_S)
                if not self._said:
                    self._is_locating = False
                    return
                step, _, locate = heapq.heappop(self._said)
                self._locating, passed = step, self._passed
            try:
                spans = list(locate())
            except Exception as error:  # noqa: BLE001 - a thread's border: its reader raises it
                logger.debug("step %d cannot be read ahead: %s", step, error)
                continue
            with self._arrived:
                # It may have been forgotten, or read, in the meantime.
                if passed == self._passed and step >= self._now:
                    self._plan_step(step, spans)

    def _plan_step(self, step: int, spans: Iterable[tuple[Block, Span]]) -> None:
        with self._arrived:
            cache = self._open_cache()
            if self._cold_until is None:
                self._cold_until = step + self.network.cold_steps
            for block, span in spans:
                entry = self._entry(block)
                self._plan.setdefault(step, []).append((entry, span))
                entry.uses[span] += 1
                entry.steps.append(step)
                if cache is not None and not entry.is_there:
                    entry.on_disk = cache.plan(block.name, step=entry.steps[0])
                if entry.is_there:
                    continue
                if cache is not None and not entry.direct and block.name in self._read_bytes:
                    # It was here before and is not used up: it would be evicted again.
                    entry.direct = True
                    self.ranges.count("cache_evicted_early")
                self._fetch_for(entry, span, step)

    def release(self, step: int) -> None:
        """Says that a step is done: what only it needed may go."""
        self._alive()
        with self._arrived:
            cache = self._open_cache()
            self._now = max(self._now, step + 1)
            for entry, span in self._plan.pop(step, []):
                entry.steps.remove(step)
                entry.uses[span] -= 1
                if entry.uses[span] <= 0:
                    del entry.uses[span]
                    if entry.fill is None:
                        self._drop_pieces(entry, [span])
                if cache is not None:
                    self._note_use(cache, entry, span)
                self._settle(entry)
            for near in range(self._now, self._now + self.network.cold_steps):
                for entry, span in self._plan.get(near, []):
                    if not entry.is_there:
                        self._fetch_for(entry, span, near)

    def fetch_soon(self, blocks: Iterable[Block], *, step: int = -1) -> None:
        """Begins to fetch whole blocks, all of them at once.

        Args:
          blocks: What will be read next.
          step: That needs them; what nearer steps need comes first. -1: they are waited for.
        """
        self._alive()
        with self._arrived:
            for block in blocks:
                entry, span = self._entry(block), (block.start, block.stop)
                is_coming = span in entry.coming or entry.wanted.get(span, step + 1) <= step
                if not is_coming and not self._map(entry):
                    self._want(entry, span, step)

    def read(self, block: Block, span: Span) -> memoryview:
        """Gives bytes of a block, and waits for them where it must.

        Args:
          block: The block.
          span: Inside it, counted in the object.

        Raises:
          FileNotFoundError: There is no such object.
          ShardError, StorageError: As `RangeReader.read`; `stalled`.
        """
        self._alive()
        began_s = time.monotonic()
        with self._arrived:
            entry = self._entry(block)
            failures, ask_s = entry.failures, 0.0
            while True:
                found = self._have(entry, span)
                if found is not None:
                    if entry.uses[span] <= 0 and entry.fill is None:
                        del entry.uses[span]
                        self._drop_pieces(entry, [span])
                        self._settle(entry)
                    return found
                if entry.failures != failures and entry.error is not None:
                    raise entry.error
                waited_s = time.monotonic() - began_s
                if block.kind == "block" and self._is_now_being_located():
                    # It will be asked for with its neighbours in a moment.
                    self._watch(entry, span, waited_s)
                    self._arrived.wait(0.5)
                    continue
                if entry.elsewhere and waited_s > _PATIENCE_S:
                    entry.direct = True
                # A block that is among the first of its queue comes as soon as its sample would.
                soon = self._now + self.network.cold_steps
                is_soon = entry.queued and min(entry.steps, default=soon) < soon
                if not is_soon and (waited_s >= ask_s or not entry.elsewhere):
                    ask_s = waited_s + _POLL_S
                    self._want(entry, span, -1)
                self._watch(entry, span, waited_s)
                self._arrived.wait(_POLL_S if entry.elsewhere else 0.5)

    def read_anew(self, block: Block, span: Span) -> memoryview:
        """Reads bytes from the store itself, whatever was fetched before."""
        self._alive()
        return memoryview(self.ranges.read(block.url, *span, total=block.total))

    def reject(self, block: Block) -> None:
        """Forgets a block whose bytes are not the ones that were written."""
        self._alive()
        with self._arrived:
            entry = self._entry(block)
            if self._cache is not None and entry.is_there:
                self.ranges.count("cache_corrupt")
                self._cache.discard(block.name)
            self._maps.pop(block.name, None)
            entry.view, entry.on_disk = None, False
            self._read_bytes.pop(block.name, None)
            if entry.fill is None:
                self._drop_pieces(entry, list(entry.pieces))
            self._settle(entry)

    def _alive(self) -> None:
        if self._pid != os.getpid():
            # A forked child: the threads, locks and connections are the parent's.
            self._begin()

    # All of the following but the threads' work is called with the lock held.

    def _open_cache(self) -> BlockCache | None:
        if not self._cache_opened and self._cache_path is not None:
            try:
                self._cache = BlockCache(self._cache_path, max_bytes=self._cache_bytes)
            except OSError as error:
                self._disk_failed(error)
            self._cache_opened = True
        return self._cache

    def _disk_failed(self, error: OSError) -> None:
        self._cache = None
        if not self.ranges.counters["cache_failed"]:
            self.ranges.count("cache_failed")
            logger.warning(
                "%s: nothing more is cached, samples are read from the store (%s)",
                self._cache_path,
                error,
            )

    @property
    def _is_first(self) -> bool:
        """Tells whether a run or pass still waits for its first step."""
        return self._cold_until in (None, self._now + self.network.cold_steps)

    def _is_now_being_located(self) -> bool:
        soonest = self._said[0][0] if self._said else None
        return self._now in (self._locating, soonest)

    def _entry(self, block: Block) -> _Entry:
        entry = self._entries.get(block.name)
        if entry is None:
            entry = self._entries[block.name] = _Entry(block)
        return entry

    def _settle(self, entry: _Entry) -> None:
        # A thread may let go of an entry whose place another one has taken meanwhile.
        if entry.is_idle and self._entries.get(entry.block.name) is entry:
            del self._entries[entry.block.name]

    def _fetch_for(self, entry: _Entry, span: Span, step: int) -> None:
        """Gets a planned sample under way: by itself, or with its block."""
        cold = self._cold_until is not None and step < self._cold_until
        if cold or entry.direct or self._open_cache() is None:
            self._want(entry, span, step)
        elif not (entry.queued or entry.filling or entry.fill or entry.claiming):
            self._queue_block(entry, step)

    def _want(self, entry: _Entry, span: Span, step: int) -> None:
        if entry.filling or span in entry.coming or span in entry.pieces:
            return
        if step < min(entry.wanted.values(), default=step + 1):
            self._queue("piece", entry, step)
        entry.wanted[span] = min(step, entry.wanted.get(span, step))

    def _queue_block(self, entry: _Entry, step: int) -> None:
        entry.queued = True
        self._queue("block", entry, step)

    def _queue(self, kind: _Kind, entry: _Entry, step: int) -> None:
        heapq.heappush(self._queues[kind], (step, next(self._numbers), entry))
        most = self.network.requests if kind == "piece" else self.network.streams
        if not self._idle[kind] and self._threads[kind] < most:
            self._threads[kind] += 1
            threading.Thread(
                target=self._serve, args=(kind,), name=f"fetch-{kind}", daemon=True
            ).start()
        self._work[kind].notify()

    def _wake(self) -> None:
        """Lets the threads look whether they may begin what they had to leave."""
        for work in self._work.values():
            work.notify_all()

    def _have(self, entry: _Entry, span: Span) -> memoryview | None:
        start = entry.block.start
        if span in entry.pieces:
            self.ranges.count("cache_misses")
            return entry.pieces[span]
        if self._map(entry):
            assert entry.view is not None
            self.ranges.count("cache_hits")
            return entry.view[span[0] - start : span[1] - start]
        return None

    def _map(self, entry: _Entry) -> bool:
        name = entry.block.name
        if entry.view is not None:
            self._maps.move_to_end(name)
            return True
        cache = self._open_cache()
        if cache is None or entry.filling or entry.fill is not None:
            return False
        entry.view, entry.on_disk = cache.find(name, entry.block.num_bytes), False
        if entry.view is None:
            return False
        entry.elsewhere = False
        entry.wanted.clear()
        self._drop_pieces(entry, list(entry.pieces))
        self._maps[name] = entry
        if len(self._maps) > _MAX_MAPS:
            # Views that were given out keep the map alive.
            _, oldest = self._maps.popitem(last=False)
            oldest.view, oldest.on_disk = None, True
            self._settle(oldest)
        return True

    def _drop_pieces(self, entry: _Entry, spans: list[Span]) -> None:
        for start, stop in spans:
            if entry.pieces.pop((start, stop), None) is not None:
                self._held_bytes -= stop - start
        self._work["piece"].notify()
        self._work["block"].notify()

    def _note_use(self, cache: BlockCache, entry: _Entry, span: Span) -> None:
        block = entry.block
        if not entry.is_there and block.name not in self._read_bytes:
            return
        self._read_bytes[block.name] += span[1] - span[0]
        if self._read_bytes[block.name] >= block.num_bytes:
            del self._read_bytes[block.name]
            self._passes[block.name] += 1
            if not entry.steps:
                cache.used_up(block.name, passes=self._passes[block.name])
        if entry.steps:
            cache.plan(block.name, step=entry.steps[0])

    def _watch(self, entry: _Entry, span: Span, waited_s: float) -> None:
        """Raises when nothing has moved for too long, and says where everybody stands."""
        if min(waited_s, self.ranges.quiet_s) < self.network.stall_s:
            return
        flights = self.ranges.in_flight()
        own = [flight for flight in flights if flight.url == entry.block.url]
        with tempfile.TemporaryFile("w+") as stacks:
            faulthandler.dump_traceback(stacks, all_threads=True)
            stacks.seek(0)
            logger.error("reading has stalled; all threads:\n%s", stacks.read())
        raise StorageError(
            "stalled",
            where=entry.block.url,
            range=f"{span[0]}-{span[1]}",
            waited_s=f"{waited_s:.0f}",
            received_bytes=sum(flight.received for flight in own),
            in_flight="; ".join(
                f"{f.url} at {f.start + f.received} of {f.start}-{f.stop}" for f in flights[:4]
            ),
            elsewhere=entry.elsewhere,
        )

    # Threads.

    def _serve(self, kind: _Kind) -> None:
        while True:
            with self._arrived:
                entry = self._next(kind)
                if entry is None:
                    self._threads[kind] -= 1
                    return
                step = min(entry.steps, default=self._now)
                if kind == "piece":
                    spans, step = self._take(entry)
                    self._held_bytes += sum(stop - start for start, stop in spans)
                    entry.claiming = self._open_cache() is not None and not (
                        entry.direct or entry.fill
                    )
                else:
                    entry.queued, entry.filling = False, True
                is_urgent = step <= self._now
                self._under_way[is_urgent] += 1
            try:
                if kind == "piece":
                    self._fetch_pieces(entry, spans, step)
                else:
                    self._fetch_block(entry, step)
            except Exception as error:  # noqa: BLE001 - a task's border: its reader raises it
                with self._arrived:
                    entry.failures, entry.error = entry.failures + 1, error
                    if entry.fill is not None:
                        entry.fill.abandon()
                        entry.fill = None
            with self._arrived:
                entry.claiming = entry.filling = False
                self._under_way[is_urgent] -= 1
                if is_urgent and not self._under_way[True]:
                    self._wake()
                if kind == "piece":
                    # What did not come does not count as held.
                    lost = [span for span in spans if span in entry.coming]
                    self._held_bytes -= sum(stop - start for start, stop in lost)
                    entry.coming.difference_update(spans)
                if entry.wanted:
                    self._queue("piece", entry, min(entry.wanted.values()))
                elif entry.fill is not None and not (entry.coming or entry.queued):
                    self._queue_block(entry, step)
                if entry.failures:
                    self._drop_pieces(entry, [s for s in entry.pieces if not entry.uses[s]])
                self._settle(entry)
                self._arrived.notify_all()

    def _take(self, entry: _Entry) -> tuple[list[Span], int]:
        """Chooses what of a block the next request fetches, and for which step; the rest waits."""
        first = min(entry.wanted, key=lambda span: (entry.wanted[span], span))
        # What is needed at once does not wait for what lies beside it, and no step for what lies
        # beside it and is needed much later.
        step = max(self._now, entry.wanted[first])
        near = step if step == self._now else step + self.network.cold_steps
        beside = [span for span, needed in entry.wanted.items() if needed <= near]
        start, stop = next(
            joined
            for joined in coalesce(beside, gap=_GAP_BYTES, most=_PIECE_BYTES)
            if joined[0] <= first[0] and first[1] <= joined[1]
        )
        spans = [span for span in entry.wanted if start <= span[0] and span[1] <= stop]
        for span in spans:
            del entry.wanted[span]
        entry.coming.update(spans)
        if entry.wanted:
            self._queue("piece", entry, min(entry.wanted.values()))
        return spans, step

    def _next(self, kind: _Kind) -> _Entry | None:
        """Waits for the next block to work on; None when there was nothing to do for long."""
        queue, stop_s = self._queues[kind], time.monotonic() + _IDLE_S
        while True:
            while queue and not self._needs_work(kind, queue[0][2]):
                heapq.heappop(queue)
            if queue and self._may_start(kind, queue[0]):
                entry = heapq.heappop(queue)[2]
                if kind == "piece" and not self._queues["piece"]:
                    self._work["block"].notify_all()
                return entry
            if not queue and kind == "piece":
                self._work["block"].notify_all()
            left_s = stop_s - time.monotonic()
            if left_s <= 0 and not queue:
                return None
            self._idle[kind] += 1
            self._work[kind].wait(max(left_s, 0.1))
            self._idle[kind] -= 1

    def _needs_work(self, kind: _Kind, entry: _Entry) -> bool:
        """Tells whether a queued block is not in other hands by now; those queue it again."""
        if kind == "piece":
            return bool(entry.wanted) and not (entry.claiming or entry.filling)
        taken = entry.claiming or entry.coming or entry.wanted or not entry.queued
        if taken:
            entry.queued = False
        return not taken

    def _may_start(self, kind: _Kind, queued: tuple[int, int, _Entry]) -> bool:
        step, _, entry = queued
        is_awaited = self._under_way[True] > 0 or self._is_now_being_located()
        is_later = step > self._now and self._under_way[False] >= _BESIDE
        if self._is_first and is_awaited and is_later:
            return False
        if kind == "block":
            pieces = self._queues["piece"]
            return not (pieces and self._may_start("piece", pieces[0]))
        lengths = [stop - start for start, stop in entry.wanted]
        more = min(sum(lengths), max(_PIECE_BYTES, *lengths)) if lengths else 0
        urgent = step < self._now + self.network.cold_steps
        return urgent or self._held_bytes + more <= self.network.ahead_bytes

    def _claim(self, entry: _Entry, step: int) -> bool:
        """Asks for the right to write a block; tells whether reading it is still up to us."""
        cache, block = self._cache, entry.block
        if cache is None:
            return True
        try:
            got = cache.begin(block.name, block.num_bytes, step=step, now=self._now)
        except OSError as error:
            with self._arrived:
                self._disk_failed(error)
            return True
        with self._arrived:
            if isinstance(got, CacheWriter):
                entry.fill, entry.elsewhere = got, False
                return True
            if got == "full":
                self.ranges.count("cache_full")
                entry.direct = True
                return True
            entry.elsewhere, entry.on_disk = got == "busy", got == "ready"
            return False

    def _fetch_pieces(self, entry: _Entry, spans: list[Span], step: int) -> None:
        if entry.claiming and not self._claim(entry, step):
            return
        with self._arrived:
            others = [*entry.pieces, *(span for span in entry.coming if span not in spans)]
        joined = min(start for start, _ in spans), max(stop for _, stop in spans)
        # Of a block that will be cached, what lies between two samples is fetched once too.
        for start, stop in missing(*joined, others if entry.fill else ()):
            inside = [s for s in spans if start <= s[0] and s[1] <= stop]
            if inside:
                self._fetch_part(entry, (start, stop), inside)

    def _fetch_part(self, entry: _Entry, part: Span, spans: list[Span]) -> None:
        block, start = entry.block, part[0]
        payload = memoryview(self.ranges.read(block.url, *part, total=block.total))
        with self._arrived:
            if entry.fill is not None and part not in spans:
                entry.pieces[part] = payload
                self._held_bytes += part[1] - start
            for first, last in spans:
                entry.pieces[first, last] = payload[first - start : last - start]
                entry.coming.discard((first, last))
            self._arrived.notify_all()

    def _fetch_block(self, entry: _Entry, step: int) -> None:
        if entry.fill is None:
            if not self._claim(entry, step):
                return
            if entry.fill is None:
                # It cannot be cached: its samples come one by one, when they are near.
                with self._arrived:
                    entry.direct = True
                return
        block, fill = entry.block, entry.fill
        payload = bytearray(block.num_bytes)
        with self._arrived:
            pieces = dict(entry.pieces)
        for (start, stop), piece in pieces.items():
            payload[start - block.start : stop - block.start] = piece
        for start, stop in missing(block.start, block.stop, pieces):
            target = memoryview(payload)[start - block.start : stop - block.start]
            self.ranges.read_into(block.url, start, target, total=block.total)
        entry.fill = None
        try:
            fill.commit(payload, step=step)
        except OSError as error:
            with self._arrived:
                self._disk_failed(error)
                entry.direct = True
                # What has come is of use to those who wait.
                for start, stop in entry.uses:
                    if (start, stop) not in entry.pieces:
                        part = bytes(payload[start - block.start : stop - block.start])
                        entry.pieces[start, stop] = memoryview(part)
                        self._held_bytes += stop - start
            return
        with self._arrived:
            entry.on_disk = True
            entry.wanted.clear()
            self._drop_pieces(entry, list(entry.pieces))
