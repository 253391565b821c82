"""ReadPlan: which ranges are fetched for which steps, in which order, and what travels together.

Pure: a state machine without threads, clocks or I/O. Its owner reports what steps will read
(`add_step`), what readers wait for (`want`), what has arrived (`arrive`, `finish`) and which steps
are done (`release`); `next_request` returns what to fetch next, or None while nothing may begin.

Without a cache all samples are *pieces*, and come into memory. With one, the samples of the first
few steps do: the first batch waits for its own bytes and not for whole blocks. After that whole
*blocks* come, without the pieces that are there already. Which is next, and what bounds them, is
request_queue.py's.

A block that was evicted before all of it was used is not fetched again in the epoch: its samples
then come as pieces, and a cache that is too small for the order costs at most one fetch more per
block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from loader.reading.block_state import BlockState, Request, Writer
from loader.reading.blocks import Block, Span, missing
from loader.reading.network import Network
from loader.reading.request_queue import RequestQueue, travel_together

Presence = Literal["cached", "evicted", "absent"]
"""Where a block is when its use is planned; "evicted": it was used in part, and then removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockUse:
    """One planned use of a block that is over."""

    block: Block
    num_bytes: int
    """Bytes of it that were used."""
    is_there: bool
    """The block is in the cache, as far as is known."""
    next_step: int | None
    """The step of its next planned use."""


class ReadPlan:
    """What to fetch next. Not locked: its owner calls it under a lock of its own."""

    def __init__(self, network: Network) -> None:
        """Begins with nothing planned.

        Args:
          network: The bounds.
        """
        self._network = network
        self.uses_cache = False
        """There is a cache that works; set by the owner."""
        self.now = 0
        """The step that the run has reached: everything before it is released."""
        self.held_bytes = 0
        """Bytes of all `pieces` and of all parts that are `coming`, whoever needs them."""
        # Blocks that are not idle, by name, and what each planned step uses of them.
        self._states: dict[str, BlockState] = {}
        self._steps: dict[int, list[tuple[BlockState, Span]]] = {}
        self._queue = RequestQueue(network)
        # Steps before this one are fetched as pieces; None until a first step is planned.
        self._cold_until: int | None = None

    # What is to be read.

    def state(self, block: Block) -> BlockState:
        """Gives the state of a block, a new one if nothing is known of it."""
        state = self._states.get(block.name)
        if state is None:
            state = self._states[block.name] = BlockState(block)
        return state

    def begin_at(self, step: int) -> None:
        """Sets the step that the run has reached, if no step is planned."""
        if not self._steps:
            self.now = step

    def may_locate(self, step: int) -> bool:
        """Returns False if finding the bytes of a step would delay the first batch's requests.

        It would take the interpreter from the threads that receive them.
        """
        return not (self._is_first and step > self.now + 1 and self._queue.has_urgent)

    def add_step(
        self,
        step: int,
        spans: Iterable[tuple[Block, Span]],
        *,
        presence: Callable[[Block, int], Presence] | None = None,
    ) -> int:
        """Plans what a step reads.

        Args:
          step: Of the run, `now` or later; steps come in increasing order.
          spans: Blocks, and the part of each.
          presence: Finds out where a block is, given the step of its first use; None: no cache.

        Returns:
          How many blocks were found to have been evicted early.
        """
        num_evicted = 0
        if self._cold_until is None:
            self._cold_until = step + self._network.cold_steps
        for block, span in spans:
            state = self.state(block)
            self._steps.setdefault(step, []).append((state, span))
            state.uses[span] += 1
            state.steps.append(step)
            if presence is not None and not state.is_there:
                found = presence(block, state.steps[0])
                state.on_disk = found == "cached"
                if found == "evicted" and not state.direct:
                    state.direct = True
                    num_evicted += 1
            if not state.is_there:
                self._schedule(state, span, step)
        return num_evicted

    def release(self, step: int) -> list[BlockUse]:
        """Ends a step: drops what only it needed, and schedules what is near and still missing.

        Returns:
          The uses that are over.
        """
        self.now = max(self.now, step + 1)
        uses = []
        for state, span in self._steps.pop(step, []):
            state.steps.remove(step)
            state.uses[span] -= 1
            if state.uses[span] <= 0:
                del state.uses[span]
                if state.writer is None and span not in state.waiting:
                    self._drop(state, [span])
            uses.append(
                BlockUse(
                    block=state.block,
                    num_bytes=span[1] - span[0],
                    is_there=state.is_there,
                    next_step=state.steps[0] if state.steps else None,
                )
            )
            self._settle(state)
        for near in range(self.now, self.now + self._network.cold_steps):
            for state, span in self._steps.get(near, []):
                if not state.is_there:
                    self._schedule(state, span, near)
        return uses

    def cancel(self) -> None:
        """Drops everything that was planned. What is under way is dropped when it arrives, unless
        a reader waits for it or somebody asks for it in the meantime."""
        self._steps.clear()
        self._cold_until, self.now = None, 0
        self._queue.cancel()
        for state in list(self._states.values()):
            state.steps.clear()
            state.uses.clear()
            state.wanted.clear()
            state.abandoned.update(span for span in state.coming if span not in state.waiting)
            if state.writer is None:
                self._drop(state, state.unneeded())
            elif not (state.is_queued or state.coming or state.is_filling):
                self._queue.add_block(state, self.now)
            self._settle(state)

    # What readers wait for.

    def want(self, state: BlockState, span: Span, step: int) -> None:
        """Queues a part of a block, unless it is queued, under way or there.

        Args:
          state: Of the block.
          span: The part.
          step: That needs it; -1: a reader waits for it.
        """
        state.abandoned.discard(span)
        if state.is_filling or span in state.coming or span in state.pieces:
            return
        state.wanted[span] = min(step, state.wanted.get(span, step))
        self._queue.add_pieces(state)

    def is_expected(self, state: BlockState, span: Span, step: int) -> bool:
        """Returns True if a part is under way, or queued for the step or an earlier one."""
        state.abandoned.discard(span)
        return span in state.coming or state.wanted.get(span, step + 1) <= step

    def is_block_near(self, state: BlockState) -> bool:
        """Returns True if the whole block is queued for one of the next steps: it comes as soon as
        a sample of it would."""
        near = self.now + self._network.cold_steps
        return state.is_queued and min(state.steps, default=near) < near

    @contextmanager
    def waiting(self, state: BlockState, span: Span) -> Iterator[None]:
        """Keeps a part for a reader that waits for it, and the state with it."""
        state.abandoned.discard(span)
        state.waiting[span] += 1
        try:
            yield
        finally:
            state.waiting[span] -= 1
            if state.waiting[span] <= 0:
                del state.waiting[span]
            self._settle(state)

    def end_read(self, state: BlockState, span: Span) -> bool:
        """Drops a part that was read and is not planned; returns True if memory became free."""
        held_bytes = self.held_bytes
        if not state.uses.get(span) and state.writer is None and span not in state.waiting:
            self._drop(state, [span])
            self._settle(state)
        return self.held_bytes < held_bytes

    def drop_unread(self, state: BlockState, span: Span) -> None:
        """Drops a part that was wanted for a reader that has failed: now, or when it arrives.

        Another reader that wants it requests it again.
        """
        if not state.uses.get(span) and span not in state.waiting:
            state.wanted.pop(span, None)
            if span in state.coming:
                state.abandoned.add(span)
            elif state.writer is None:
                self._drop(state, [span])
        self._settle(state)

    # Requests.

    def next_request(self, *, is_locating: bool) -> Request | None:
        """Chooses the next request, and counts it as under way until `finish`.

        Args:
          is_locating: The bytes of step `now` are being located: its requests are still to come.

        Returns:
          None while nothing may begin; worth asking again after any change.
        """
        found = self._queue.pop(
            now=self.now,
            is_first=self._is_first,
            is_locating=is_locating,
            held_bytes=self.held_bytes,
        )
        if found is None:
            return None
        kind, state = found
        request = self._pieces(state) if kind == "piece" else self._block(state)
        state.num_requests += 1
        self._queue.begin(request)
        return request

    def claimed(self, state: BlockState, found: Writer | Literal["ready", "busy", "full"]) -> bool:
        """Notes how a claim went; returns True if this process is to fetch the bytes."""
        if found == "full":
            state.direct = True
            return True
        if found == "busy" or found == "ready":
            state.elsewhere, state.on_disk = found == "busy", found == "ready"
            return False
        state.writer, state.elsewhere = found, False
        return True

    def parts(self, request: Request) -> list[tuple[Span, list[Span]]]:
        """Lists the ranges that a request for pieces reads, each with the parts inside it."""
        state = request.state
        have: list[Span] = []
        if state.writer is not None:
            # Of a block that will be cached, what is between two samples is fetched once too.
            have = [*state.pieces, *(s for s, r in state.coming.items() if r is not request)]
        start, stop = min(s[0] for s in request.spans), max(s[1] for s in request.spans)
        found = []
        for part in missing(start, stop, have):
            inside = [s for s in request.spans if part[0] <= s[0] and s[1] <= part[1]]
            if inside:
                found.append((part, inside))
        return found

    def arrive(
        self, request: Request, part: Span, spans: Iterable[Span], payload: memoryview
    ) -> None:
        """Takes the bytes of one range of `parts`."""
        state, spans = request.state, list(spans)
        if state.writer is not None and part not in spans:
            state.pieces[part] = payload
            self.held_bytes += _length(part)
        for start, stop in spans:
            # Its bytes are counted since the request began.
            state.pieces[start, stop] = payload[start - part[0] : stop - part[0]]
            del state.coming[start, stop]

    def finish(self, request: Request, error: BaseException | None = None) -> Writer | None:
        """Ends a request, and queues what is left of its block.

        Args:
          request: That is over.
          error: What it failed of.

        Returns:
          After an error, the right to write the block, which is to be abandoned.
        """
        state, abandoned = request.state, None
        if error is not None:
            state.failures, state.error = state.failures + 1, error
            abandoned = self.take_writer(state)
        state.num_requests -= 1
        self._queue.end(request)
        if request.claims:
            state.is_claiming = False
        if request.kind == "block":
            state.is_filling = False
        for span in request.spans:
            if state.coming.get(span) is request:
                # It did not come, and does not count as held.
                del state.coming[span]
                self.held_bytes -= _length(span)
        if state.wanted:
            self._queue.add_pieces(state)
        elif state.writer is not None and not (state.coming or state.is_queued):
            self._queue.add_block(state, request.step)
        if state.writer is None:
            gone = state.unneeded()
            if not (state.failures or state.is_open):
                gone = [span for span in gone if span in state.abandoned]
            self._drop(state, gone)
        state.abandoned.difference_update(request.spans)
        self._settle(state)
        return abandoned

    # Whole blocks.

    def take_writer(self, state: BlockState) -> Writer | None:
        """Gives the right to write a block to whoever uses it up."""
        writer, state.writer = state.writer, None
        return writer

    def cached(self, state: BlockState) -> None:
        """Notes that a block was written to the cache."""
        state.on_disk = True
        state.wanted.clear()
        self._drop(state, list(state.pieces))

    def not_cached(self, state: BlockState, payload: bytearray | None = None) -> None:
        """Notes that a block cannot be cached; of its bytes, planned parts are kept."""
        state.direct = True
        if payload is not None:
            for start, stop in state.uses:
                if (start, stop) not in state.pieces:
                    first = start - state.block.start
                    part = bytes(memoryview(payload)[first : first + stop - start])
                    state.pieces[start, stop] = memoryview(part)
                    self.held_bytes += stop - start

    def opened(self, state: BlockState) -> None:
        """Notes that the whole block is open: none of its parts is needed."""
        state.is_open, state.on_disk, state.elsewhere = True, False, False
        state.wanted.clear()
        self._drop(state, list(state.pieces))

    def closed(self, name: str) -> None:
        """Notes that an open block was closed, and is in the cache as far as is known."""
        state = self._states[name]
        state.is_open, state.on_disk = False, True
        self._settle(state)

    def absent(self, state: BlockState) -> None:
        """Notes that a block is not in the cache."""
        state.on_disk = False

    def reject(self, state: BlockState) -> None:
        """Drops all bytes of a block, since they are wrong."""
        state.is_open = state.on_disk = False
        if state.writer is None:
            self._drop(state, list(state.pieces))
        self._settle(state)

    # Helpers.

    @property
    def _is_first(self) -> bool:
        """Returns True while a run or pass waits for its first step."""
        return self._cold_until in (None, self.now + self._network.cold_steps)

    def _schedule(self, state: BlockState, span: Span, step: int) -> None:
        """Queues a planned sample: by itself, or with its block."""
        cold = self._cold_until is not None and step < self._cold_until
        if cold or state.direct or not self.uses_cache:
            self.want(state, span, step)
        elif not (state.is_queued or state.is_filling or state.writer or state.is_claiming):
            self._queue.add_block(state, step)

    def _pieces(self, state: BlockState) -> Request:
        """Makes a request for the samples of a block that are needed first."""
        spans, step = travel_together(
            state.wanted, now=self.now, cold_steps=self._network.cold_steps
        )
        request = Request(
            state=state,
            kind="piece",
            step=step,
            is_urgent=step <= self.now,
            spans=tuple(spans),
            claims=self.uses_cache and not (state.direct or state.writer),
        )
        state.is_claiming = state.is_claiming or request.claims
        for span in spans:
            del state.wanted[span]
            state.coming[span] = request
            self.held_bytes += _length(span)
        state.queued_step = None
        if state.wanted:
            self._queue.add_pieces(state)
        return request

    def _block(self, state: BlockState) -> Request:
        """Makes a request for a whole block."""
        state.is_queued, state.is_filling = False, True
        step = min(state.steps, default=self.now)
        return Request(state=state, kind="block", step=step, is_urgent=step <= self.now)

    def _drop(self, state: BlockState, spans: Iterable[Span]) -> None:
        for span in spans:
            if state.pieces.pop(span, None) is not None:
                self.held_bytes -= _length(span)

    def _settle(self, state: BlockState) -> None:
        if state.is_idle:
            self._states.pop(state.block.name, None)


def _length(span: Span) -> int:
    return span[1] - span[0]
