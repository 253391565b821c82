"""RequestQueue: which block is fetched from next, and what of it travels together. Pure.

Two queues, each ordered by the step that needs a block first: *pieces* (single samples, neighbours
joined) and *blocks* (whole ones, for the cache). No block is begun while a piece may begin.

What bounds the requests:

* their number, by kind (`requests`, `streams`), where blocks are small their bytes;
* memory: what is needed later than in the next `cold_steps` steps begins only if all pieces in
  memory and under way then take at most `ahead_bytes`. So they never take more than that and what
  the next 2 * `cold_steps` steps need;
* the first batch: until a run or pass has had its first step, one request at a time is for later
  ones.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Mapping

from loader.reading.block_state import BlockState, Kind, Request
from loader.reading.blocks import Span, coalesce
from loader.reading.network import Network

_GAP_BYTES = 64 * 1024
"""Joined over: at 100 MB/s these bytes take as long as 0.6 ms of another request's 20."""
_PIECE_BYTES = 2**20
"""Neighbours are joined up to there: longer requests would keep the samples of a step waiting for
each other, and eight of these fill a link of 100 MB/s at 80 ms."""
_STREAMS, _STREAM_BYTES = 8, 2**25
"""Where `streams` is None: blocks under way, and more while they take no more than these bytes.
Eight blocks of 4 MiB fill a link of 100 MB/s at 80 ms; of smaller ones it takes more."""
_BESIDE = 1
"""Requests for later steps that begin while the first batch waits for its own: they share a link.
After it all requests are used: one link's latency is hidden by the bytes of other steps."""


class RequestQueue:
    """The blocks that wait for a request, and counts of those under way. Not locked."""

    def __init__(self, network: Network) -> None:
        """Begins empty.

        Args:
          network: The bounds.
        """
        self._network = network
        # Heaps of (step, number, state). Entries may be stale: `_is_next` is asked when one comes
        # first. Whoever makes a state need a request again queues it again.
        self._queues: dict[Kind, list[tuple[int, int, BlockState]]] = {"piece": [], "block": []}
        self._numbers = itertools.count()
        self._running: Counter[Kind] = Counter()
        self._block_bytes = 0  # under way, of whole blocks
        # The same requests, by whether a batch waits for them.
        self._under_way: Counter[bool] = Counter()

    @property
    def has_urgent(self) -> bool:
        """Returns True if a request is under way that a batch waits for."""
        return self._under_way[True] > 0

    def add_pieces(self, state: BlockState) -> None:
        """Queues what is wanted of a block, by the first step that needs some of it."""
        step = min(state.wanted.values())
        if state.queued_step is None or step < state.queued_step:
            state.queued_step = step
            heapq.heappush(self._queues["piece"], (step, next(self._numbers), state))

    def add_block(self, state: BlockState, step: int) -> None:
        """Queues a whole block for a step."""
        state.is_queued = True
        heapq.heappush(self._queues["block"], (step, next(self._numbers), state))

    def cancel(self) -> None:
        """Drops all but the blocks that this process has the right to write."""
        for _, _, state in self._queues["piece"]:
            state.queued_step = None
        self._queues["piece"].clear()
        for _, _, state in self._queues["block"]:
            state.is_queued = state.is_queued and state.writer is not None
        self._queues["block"] = [q for q in self._queues["block"] if q[2].is_queued]
        heapq.heapify(self._queues["block"])

    def pop(
        self, *, now: int, is_first: bool, is_locating: bool, held_bytes: int
    ) -> tuple[Kind, BlockState] | None:
        """Takes the next block off its queue; None while nothing may begin.

        Args:
          now: The step that the run has reached.
          is_first: The run or pass waits for its first step.
          is_locating: Requests for step `now` are still to come.
          held_bytes: Of all pieces in memory and under way.
        """
        near = now + self._network.cold_steps
        restrains = is_first and (self.has_urgent or is_locating)

        def may_start(kind: Kind) -> bool:
            if not self._queues[kind]:
                return False
            step, _, state = self._queues[kind][0]
            if restrains and step > now and self._under_way[False] >= _BESIDE:
                return False
            # Nothing of a queued block is wanted by itself: it goes to the cache, and is not held.
            more = _most_taken(state.wanted) if kind == "piece" else 0
            return step < near or held_bytes + more <= self._network.ahead_bytes

        for kind, queue in self._queues.items():
            while queue and not self._is_next(kind, *queue[0]):
                heapq.heappop(queue)
        if may_start("piece"):
            if self._running["piece"] < self._network.requests:
                return "piece", heapq.heappop(self._queues["piece"])[2]
            return None  # no block begins before this piece
        if may_start("block") and self._has_stream(self._queues["block"][0][2]):
            return "block", heapq.heappop(self._queues["block"])[2]
        return None

    def begin(self, request: Request) -> None:
        """Counts a request as under way."""
        self._running[request.kind] += 1
        self._block_bytes += _bytes_of_block(request)
        self._under_way[request.is_urgent] += 1

    def end(self, request: Request) -> None:
        """Counts a request as over."""
        self._running[request.kind] -= 1
        self._block_bytes -= _bytes_of_block(request)
        self._under_way[request.is_urgent] -= 1

    def _has_stream(self, state: BlockState) -> bool:
        """Returns True if the bounds let a request for a whole block begin."""
        running, most = self._running["block"], self._network.streams
        if most is not None or running < _STREAMS:
            return running < (_STREAMS if most is None else most)
        more = state.block.num_bytes
        return running < self._network.requests and self._block_bytes + more <= _STREAM_BYTES

    def _is_next(self, kind: Kind, step: int, _: int, state: BlockState) -> bool:
        """Returns False if the first entry of a queue is stale, or taken care of: the end of the
        request that does so queues it again if need be."""
        if kind == "block":
            taken = state.is_claiming or state.coming or state.wanted or not state.is_queued
            if taken:
                state.is_queued = False
            return not taken
        if step != state.queued_step:
            return False
        if state.is_claiming or state.is_filling or not state.wanted:
            state.queued_step = None
            return False
        if step < min(state.wanted.values()):
            # What was needed by then is no longer wanted; the rest waits for its turn.
            state.queued_step = None
            self.add_pieces(state)
            return False
        return True


def _bytes_of_block(request: Request) -> int:
    return request.state.block.num_bytes if request.kind == "block" else 0


def travel_together(
    wanted: Mapping[Span, int], *, now: int, cold_steps: int
) -> tuple[list[Span], int]:
    """Chooses what of a block the next request fetches: the part needed first, and neighbours.

    What is needed at once does not wait for what is beside it, and no step for what is beside it
    and is needed much later.

    Args:
      wanted: Parts of one block, with the step that needs each.
      now: The step that the run has reached.
      cold_steps: What is needed up to this many steps later comes along.

    Returns:
      (the parts, the step that needs them first).

    >>> travel_together({(0, 9): 7, (9, 20): 5, (30, 40): 6, (40, 50): 50}, now=3, cold_steps=4)
    ([(0, 9), (9, 20), (30, 40)], 5)
    """
    first = min(wanted, key=lambda span: (wanted[span], span))
    step = max(now, wanted[first])
    near = step if step == now else step + cold_steps
    start, stop = next(
        joined
        for joined in coalesce(
            [span for span, needed in wanted.items() if needed <= near],
            gap=_GAP_BYTES,
            most=_PIECE_BYTES,
        )
        if joined[0] <= first[0] and first[1] <= joined[1]
    )
    return [span for span in wanted if start <= span[0] and span[1] <= stop], step


def _most_taken(wanted: Mapping[Span, int]) -> int:
    """Bounds the bytes of what `travel_together` chooses."""
    lengths = [stop - start for start, stop in wanted]
    return min(sum(lengths), max(_PIECE_BYTES, *lengths))
