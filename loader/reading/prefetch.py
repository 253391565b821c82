"""Prefetcher: gets parts of remote objects to where samples are read, in the order of their use.

Who knows the order announces what each step will read (`prefetch`), reads it (`read`), and reports
that a step is done (`release`). The Prefetcher joins the parts that do the work, and decides
nothing itself:

    Locator       finds where the bytes of announced steps are              locator.py
    ReadPlan      chooses which ranges are fetched next: pure               read_plan.py,
                                                                            request_queue.py
    Fetcher       fetches them, in threads                                  fetcher.py
    CachedBlocks  keeps whole blocks on the node's disk                     cached.py

One lock, `_changed`, guards the plan, the locator and the cached blocks. It is never held while
bytes travel, nor while a block is claimed or written. After each change that may let a request
begin, whoever made it calls `_start_requests`; after each one that a reader may wait for, it
notifies.

A process that finds a block being written by another one waits for it, so a node fetches every
byte once; after `_PATIENCE_S` it fetches the sample by itself.

What fails while nobody waits for it is not raised: the reader requests it again and raises what
then fails. A disk that is full or broken ends the use of the cache, with one warning, and reading
continues without. If nothing arrives for `stall_s`, the stacks of all threads are logged and the
reader raises.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any

from loader.reading.block_state import BlockState, Request
from loader.reading.blocks import Block, Span, missing
from loader.reading.cache import OpenFile
from loader.reading.cached import CachedBlocks
from loader.reading.fetcher import Fetcher
from loader.reading.locator import Locate, Locator
from loader.reading.network import Network, blocks_of, patience_s
from loader.reading.read_plan import ReadPlan
from shardspec.errors import ConfigError
from shardspec.manifest import FileEntry
from shardspec.storage import RangeReader

_PATIENCE_S = 5.0
_POLL_S = 0.01
_WAKE_S = 0.5
"""Waiting readers look this often for a stall."""


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

    def blocks_of(self, file: FileEntry) -> int:
        """Returns where a shard is cut into blocks, in bytes."""
        return blocks_of(self.network, file, cached=self._cache_path is not None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("network", "_cache_path", "_cache_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._fetcher = Fetcher(self.network.retry)
        # Guards all of the following. The locks of the fetcher, of its ranges and of the cache's
        # files are taken while it is held, never the other way round.
        self._changed = threading.Condition()
        self._plan = ReadPlan(self.network)
        self._cached = CachedBlocks(
            self._cache_path, max_bytes=self._cache_bytes, count=self.ranges.count
        )
        self._locator = Locator(
            self._changed, may_locate=self._plan.may_locate, located=self._add_step
        )

    @property
    def ranges(self) -> RangeReader:
        """Reads ranges of objects, for all who read with this prefetcher."""
        return self._fetcher.ranges

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
        self._renew_in_child()
        with self._changed:
            self._open_cache()

    def prefetch(self, step: int, locate: Locate) -> None:
        """Announces what a step will read; returns at once.

        Args:
          step: Of the run. Steps come in increasing order.
          locate: Finds the places, in another thread; what it raises, the reader will meet too.
        """
        self._renew_in_child()
        with self._changed:
            if not self._locator.is_running:
                self._plan.begin_at(step)
            self._locator.announce(step, locate)

    def release(self, step: int) -> None:
        """Ends a step: what only it needed is dropped."""
        self._renew_in_child()
        with self._changed:
            self._open_cache()
            self._cached.note_uses(self._plan.release(step))
            self._start_requests()

    def cancel_prefetch(self) -> None:
        """Drops what was announced and not read, as the run continues elsewhere."""
        self._renew_in_child()
        with self._changed:
            self._locator.cancel()
            self._plan.cancel()
            self._start_requests()
            # Readers that wait nevertheless request their parts again.
            self._changed.notify_all()

    def fetch_soon(self, blocks: Iterable[Block], *, step: int = -1) -> None:
        """Begins to fetch whole blocks, all of them at once.

        Args:
          blocks: What will be read next.
          step: That needs them; what nearer steps need comes first. -1: they are waited for.
        """
        self._renew_in_child()
        with self._changed:
            self._open_cache()
            for block in blocks:
                state, span = self._plan.state(block), (block.start, block.stop)
                if not (self._plan.is_expected(state, span, step) or self._open_block(state)):
                    self._plan.want(state, span, step)
            self._start_requests()

    def drop_unread(self, blocks: Iterable[Block]) -> None:
        """Drops whole blocks of `fetch_soon` that will not be read, as the reader has failed."""
        self._renew_in_child()
        with self._changed:
            for block in blocks:
                self._plan.drop_unread(self._plan.state(block), (block.start, block.stop))
            self._start_requests()

    def read(self, block: Block, span: Span) -> memoryview:
        """Gives bytes of a block, and waits for them where it must.

        Args:
          block: The block.
          span: Inside it, counted in the object.

        Raises:
          FileNotFoundError: There is no such object.
          ShardError, StorageError: As `RangeReader.read`; `stalled`.
        """
        self._renew_in_child()
        with self._changed:
            self._open_cache()
            state = self._plan.state(block)
            found = self._find(state, span)
            if found is None:
                with self._plan.waiting(state, span):
                    found = self._wait(state, span)
            if self._plan.end_read(state, span):
                self._start_requests()
        if isinstance(found, memoryview):
            return found
        # Without the lock: the disk may take its time.
        payload = found.read(span[0] - block.start, span[1] - block.start)
        if payload is not None:
            return payload
        self.reject(block)  # somebody has cut it, or the disk cannot read it
        return self.read_anew(block, span)

    def read_anew(self, block: Block, span: Span) -> memoryview:
        """Reads bytes from the store itself, whatever was fetched before."""
        self._renew_in_child()
        return memoryview(self.ranges.read(block.url, *span, total=block.total))

    def reject(self, block: Block) -> None:
        """Drops a block whose bytes are not the ones that were written."""
        self._renew_in_child()
        with self._changed:
            state = self._plan.state(block)
            self._cached.reject(block, is_there=state.is_there)
            self._plan.reject(state)
            self._start_requests()

    def _renew_in_child(self) -> None:
        if self._pid != os.getpid():
            # A forked child: the threads, locks and connections are the parent's.
            self._begin()

    # With the lock held.

    def _open_cache(self) -> None:
        self._plan.uses_cache = self._cached.open()

    def _disk_failed(self, error: OSError) -> None:
        self._cached.disk_failed(error)
        self._plan.uses_cache = False

    def _start_requests(self) -> None:
        """Begins what may begin. Called whenever that may have changed: no thread polls for it."""
        is_locating = self._locator.is_locating(self._plan.now)
        while (request := self._plan.next_request(is_locating=is_locating)) is not None:
            self._fetcher.submit(partial(self._fetch, request), done=partial(self._finish, request))

    def _add_step(self, step: int, spans: list[tuple[Block, Span]] | None) -> None:
        # It may have been read in the meantime.
        if spans is not None and step >= self._plan.now:
            try:
                self._open_cache()
            except ConfigError:
                return  # its reader raises it
            presence = self._cached.presence if self._plan.uses_cache else None
            for _ in range(self._plan.add_step(step, spans, presence=presence)):
                self.ranges.count("cache_evicted_early")
        self._start_requests()

    def _find(self, state: BlockState, span: Span) -> memoryview | OpenFile | None:
        piece = state.pieces.get(span)
        if piece is not None:
            self.ranges.count("cache_misses")
            return piece
        block = self._open_block(state)
        if block is not None:
            self.ranges.count("cache_hits")
        return block

    def _open_block(self, state: BlockState) -> OpenFile | None:
        if not state.is_open and (state.is_filling or state.writer is not None):
            return None  # this process writes it
        block, closed = self._cached.find(state.block)
        if block is None:
            self._plan.absent(state)
        elif not state.is_open:
            self._plan.opened(state)
            for name in closed:
                self._plan.closed(name)
            self._start_requests()
        return block

    def _wait(self, state: BlockState, span: Span) -> memoryview | OpenFile:
        began_s, failures, ask_s = time.monotonic(), state.failures, 0.0
        while True:
            waited_s = time.monotonic() - began_s
            # Located samples are requested with their neighbours, in a moment.
            is_block = state.block.kind == "block"
            is_located = not (is_block and self._locator.is_locating(self._plan.now))
            if is_located:
                if state.elsewhere and waited_s > _PATIENCE_S:
                    state.direct = True
                # Another process's block is looked for often, and asked for again only then.
                if not self._plan.is_block_near(state) and (
                    waited_s >= ask_s or not state.elsewhere
                ):
                    ask_s = waited_s + _POLL_S
                    self._plan.want(state, span, -1)
                    self._start_requests()
            self._fetcher.require_progress(
                state.block.url,
                span,
                waited_s=waited_s,
                stall_s=patience_s(self.network),
                elsewhere=state.elsewhere,
            )
            self._changed.wait(_POLL_S if is_located and state.elsewhere else _WAKE_S)
            found = self._find(state, span)
            if found is not None:
                return found
            if state.failures != failures and state.error is not None:
                raise state.error

    # In a thread of the fetcher, without the lock.

    def _fetch(self, request: Request) -> None:
        if request.kind == "piece":
            self._fetch_pieces(request)
        else:
            self._fetch_block(request)

    def _finish(self, request: Request, future: Future[None]) -> None:
        with self._changed:
            writer = self._plan.finish(request, future.exception())
            if writer is not None:
                writer.abandon()
            self._start_requests()
            self._changed.notify_all()

    def _claim(self, request: Request) -> bool:
        """Asks for the right to write a block; returns True if this process fetches its bytes."""
        try:
            # `now` may be stale: it only ranks what may be evicted.
            found = self._cached.claim(request.state.block, step=request.step, now=self._plan.now)
        except OSError as error:
            with self._changed:
                self._disk_failed(error)
            return True
        if found is None:
            return True
        if found == "full":
            self.ranges.count("cache_full")
        with self._changed:
            return self._plan.claimed(request.state, found)

    def _fetch_pieces(self, request: Request) -> None:
        if request.claims and not self._claim(request):
            return
        block = request.state.block
        with self._changed:
            parts = self._plan.parts(request)
        for part, spans in parts:
            payload = memoryview(self.ranges.read(block.url, *part, total=block.total))
            with self._changed:
                self._plan.arrive(request, part, spans, payload)
                self._changed.notify_all()

    def _fetch_block(self, request: Request) -> None:
        state, block = request.state, request.state.block
        # No other request of the block is under way: only this thread uses the writer.
        if state.writer is None and not self._claim(request):
            return
        with self._changed:
            if state.writer is None:
                # Its samples come one by one, when they are near.
                self._plan.not_cached(state)
                return
            pieces = dict(state.pieces)
        payload = bytearray(block.num_bytes)
        for (start, stop), piece in pieces.items():
            payload[start - block.start : stop - block.start] = piece
        for start, stop in missing(block.start, block.stop, pieces):
            target = memoryview(payload)[start - block.start : stop - block.start]
            self.ranges.read_into(block.url, start, target, total=block.total)
        with self._changed:
            writer = self._plan.take_writer(state)
        assert writer is not None
        try:
            writer.commit(payload, step=request.step)
        except OSError as error:
            with self._changed:
                self._disk_failed(error)
                self._plan.not_cached(state, payload)  # what has come is of use to who waits
            return
        with self._changed:
            self._plan.cached(state)
