"""CachedBlocks: the node's cache (cache.py) as one process uses it.

Opens it when it is first needed, keeps its blocks open, tells it when a block is needed next or
used up, and stops using it when its disk fails: reading then continues without a cache, after one
warning.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import Literal

from loader.reading.blocks import Block
from loader.reading.cache import BlockCache, CacheWriter, OpenFile
from loader.reading.read_plan import BlockUse, Presence

logger = logging.getLogger(__name__)

_MAX_OPEN = 256
"""Blocks open at a time; each holds a descriptor."""


class CachedBlocks:
    """A cache, or none. Not locked: called under the prefetcher's lock, except `claim`."""

    def __init__(self, path: str | None, *, max_bytes: int, count: Callable[[str], None]) -> None:
        """Opens nothing yet.

        Args:
          path: Folder of the cache; None: there is none.
          max_bytes: Its bound.
          count: Adds one to a counter of this name.
        """
        self._path, self._max_bytes, self._count = path, max_bytes, count
        self._cache: BlockCache | None = None
        self._is_opened = path is None
        # Open blocks by name, the one that was used last at the end. A reader may still use one
        # that is no longer here.
        self._open: OrderedDict[str, OpenFile] = OrderedDict()
        # Bytes of each block that were used since it was last used up, and how often it was used
        # up. Neither depends on whether the block is still there: that is how an early eviction
        # is noticed.
        self._used_bytes: defaultdict[str, int] = defaultdict(int)
        self._passes: Counter[str] = Counter()

    def open(self) -> bool:
        """Opens the cache if it is not open; returns True if it can be used.

        Raises:
          ConfigError: `cache_foreign`, each time.
        """
        if not self._is_opened:
            assert self._path is not None
            try:
                self._cache = BlockCache(self._path, max_bytes=self._max_bytes)
            except OSError as error:
                self.disk_failed(error)
            self._is_opened = True
        return self._cache is not None

    def disk_failed(self, error: OSError) -> None:
        """Stops using the cache. What is open stays open."""
        if self._cache is not None or not self._is_opened:
            self._cache = None
            self._count("cache_failed")
            logger.warning(
                "%s: nothing more is cached, samples are read from the store (%s)",
                self._path,
                error,
            )

    def presence(self, block: Block, step: int) -> Presence:
        """Plans the next use of a block, and finds out where it is."""
        if self._cache is not None and self._cache.plan(block.name, step=step):
            return "cached"
        return "evicted" if block.name in self._used_bytes else "absent"

    def find(self, block: Block) -> tuple[OpenFile | None, list[str]]:
        """Opens a block.

        Returns:
          (the block, or None where it is not in the cache; names of blocks closed for it).
        """
        found = self._open.get(block.name)
        if found is not None:
            self._open.move_to_end(block.name)
            return found, []
        if self._cache is not None:
            found = self._cache.find(block.name, block.num_bytes)
        if found is None:
            return None, []
        self._open[block.name] = found
        return found, [self._open.popitem(last=False)[0]] if len(self._open) > _MAX_OPEN else []

    def note_uses(self, uses: Iterable[BlockUse]) -> None:
        """Tells the cache what was used, and when it is used next: what it evicts depends on it."""
        if self._cache is None:
            return
        for use in uses:
            name = use.block.name
            if not use.is_there and name not in self._used_bytes:
                continue
            self._used_bytes[name] += use.num_bytes
            if self._used_bytes[name] >= use.block.num_bytes:
                del self._used_bytes[name]
                self._passes[name] += 1
                if use.next_step is None:
                    self._cache.used_up(name, passes=self._passes[name])
            if use.next_step is not None:
                self._cache.plan(name, step=use.next_step)

    def claim(
        self, block: Block, *, step: int, now: int
    ) -> CacheWriter | Literal["ready", "busy", "full"] | None:
        """Asks for the right to write a block, as `BlockCache.begin`; None if there is no cache.

        Called without the lock, since it may have to list the folder.

        Raises:
          OSError: The disk is full or fails.
        """
        cache = self._cache  # another thread may stop using it meanwhile
        if cache is None:
            return None
        return cache.begin(block.name, block.num_bytes, step=step, now=now)

    def reject(self, block: Block, *, is_there: bool) -> None:
        """Removes a block whose bytes are wrong.

        Args:
          block: The block.
          is_there: It is in the cache, as far as is known.
        """
        if self._cache is not None and is_there:
            self._count("cache_corrupt")
            self._cache.discard(block.name)
        self._open.pop(block.name, None)
        self._used_bytes.pop(block.name, None)
