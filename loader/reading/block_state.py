"""BlockState: what one process knows of a block that somebody needs. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, Protocol

from loader.reading.blocks import Block, Span

Kind = Literal["piece", "block"]
"""What a request fetches: samples, neighbours joined, or a whole block for the cache."""


class Writer(Protocol):
    """The right to write a block to the cache; see `cache.CacheWriter`."""

    def commit(self, payload: bytearray, *, step: int) -> None:
        """Writes the block."""

    def abandon(self) -> None:
        """Gives the right up."""


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class Request:
    """What one thread fetches at a time, all of one block."""

    state: BlockState
    kind: Kind
    step: int
    """The first step that needs it."""
    is_urgent: bool
    """A batch waits for it."""
    spans: tuple[Span, ...] = ()
    """The parts that are fetched; empty for a whole block."""
    claims: bool = False
    """The right to write the block to the cache is requested first."""


class BlockState:
    """The state of one block; changed by its `ReadPlan` alone, under the lock of the plan's owner.

    Invariants:

    * A part is in at most one of `wanted`, `coming` and `pieces`, so no range is fetched twice.
    * While `is_claiming` no other request of the block begins; while `is_filling` none is under
      way either. So whoever writes the block knows all that has come of it.
    * While there is a `writer`, pieces are kept though nobody needs them: the block is made of
      them. The writer is always used in the end, since other processes may wait for the block.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        # Where the whole block is. `on_disk` may be stale: another process may have evicted it.
        self.is_open = False
        self.on_disk = False
        self.pieces: dict[Span, memoryview] = {}
        """Parts that are in memory."""
        self.wanted: dict[Span, int] = {}
        """Parts that wait for a request, with the first step that needs them."""
        self.coming: dict[Span, Request] = {}
        """Parts that are under way."""
        self.abandoned: set[Span] = set()
        """Parts under way that nobody has asked for since planning was cancelled."""
        self.uses: Counter[Span] = Counter()
        """Planned uses of each part."""
        self.steps: list[int] = []
        """Steps that will use it, increasing; a step is listed once for each of its parts."""
        self.waiting: Counter[Span] = Counter()
        """Readers that wait for each part."""
        self.num_requests = 0
        """Requests under way."""
        self.writer: Writer | None = None
        self.is_claiming = False
        """A request under way asks for the right to write it."""
        self.queued_step: int | None = None
        """The step by which its wanted parts are queued; other entries of the queue are stale."""
        self.is_queued = False
        """The whole block waits for a request."""
        self.is_filling = False
        """The whole block is under way."""
        self.direct = False
        """It is not to be cached."""
        self.elsewhere = False
        """Another process wrote it when this one last asked; stale as soon as that one is done."""
        self.failures = 0
        """Requests that failed; readers compare it with what it was when they began."""
        self.error: BaseException | None = None
        """What the last of them failed of."""

    @property
    def is_there(self) -> bool:
        """Returns True if the whole block is open, or in the cache as far as is known."""
        return self.is_open or self.on_disk

    @property
    def is_idle(self) -> bool:
        """Returns True if nothing is lost when this state is dropped."""
        under_way = self.wanted or self.num_requests or self.is_queued or self.writer
        return not (under_way or self.steps or self.pieces or self.waiting or self.is_open)

    def unneeded(self) -> list[Span]:
        """Lists the pieces that no planned step uses and no reader waits for."""
        return [s for s in self.pieces if not self.uses.get(s) and s not in self.waiting]
