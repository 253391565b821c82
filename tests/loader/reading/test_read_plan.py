"""The read plan by itself: pure, so that any interleaving of its owner's threads can be played."""

from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.reading import request_queue
from loader.reading.block_state import BlockState, Request
from loader.reading.blocks import Block, missing
from loader.reading.network import Network
from loader.reading.read_plan import ReadPlan
from loader.reading.request_queue import RequestQueue
from tests.examples import examples

SAMPLE = 10
BLOCK = 100
NUM_BLOCKS = 6
OBJECT = bytes(range(256))[: NUM_BLOCKS * BLOCK] * 3

samples = st.integers(0, NUM_BLOCKS * BLOCK // SAMPLE - 1)


def place(sample):
    first = sample * SAMPLE // BLOCK * BLOCK
    block = Block(url="u", start=first, stop=first + BLOCK, total=10**4, sha256="ab" * 32)
    return block, (sample * SAMPLE, (sample + 1) * SAMPLE)


class FakeWriter:
    """The right to write a block; one at a time has it."""

    def __init__(self, claimed, name):
        self.claimed, self.name = claimed, name
        assert name not in claimed
        claimed.add(name)

    def commit(self, payload, *, step):
        self.claimed.remove(self.name)

    def abandon(self):
        self.claimed.remove(self.name)


class Owner:
    """Does what the prefetcher does, one critical section at a time, in an order that a test says.

    Invariants of the plan are checked after each of them.
    """

    def __init__(self, *, cached=False, **network):
        self.network = Network(**network)
        self.plan = ReadPlan(self.network)
        self.plan.uses_cache = cached
        self.flights, self.fetched = [], []
        self.on_disk, self.claimed = set(), set()

    def add(self, step, numbers):
        presence = self._presence if self.plan.uses_cache else None
        self.plan.add_step(step, [place(n) for n in numbers], presence=presence)
        self.check()

    def _presence(self, block, step):
        return "cached" if block.name in self.on_disk else "absent"

    def start(self):
        """Begins all requests that may begin."""
        begun = []
        while True:
            request = self.plan.next_request(is_locating=False)
            self.check()
            if request is None:
                break
            begun.append(request)
            self.flights.append(request)
        return begun

    def land(self, i=0, *, fails=False):
        """Ends a request that is under way: claims, fetches and finishes."""
        request = self.flights.pop(i % len(self.flights))
        state, plan = request.state, self.plan
        error = OSError("away") if fails else None
        goes = True
        if request.claims or (request.kind == "block" and state.writer is None):
            name = state.block.name
            found = "busy" if name in self.claimed else None
            if name in self.on_disk:
                found = "ready"
            goes = plan.claimed(state, found or FakeWriter(self.claimed, name))
        if goes and not fails and request.kind == "piece":
            for part, spans in plan.parts(request):
                self.fetched.append(part)
                plan.arrive(request, part, spans, memoryview(OBJECT)[part[0] : part[1]])
                self.check()
        elif goes and not fails:
            for part in missing(state.block.start, state.block.stop, state.pieces):
                self.fetched.append(part)
            plan.take_writer(state).commit(b"", step=request.step)
            self.on_disk.add(state.block.name)
            plan.cached(state)
        writer = plan.finish(request, error)
        if writer is not None:
            writer.abandon()
        self.check()

    def read(self, number):
        """Reads a sample as a reader does, with requests in whatever order ends its wait."""
        block, span = place(number)
        state = self.plan.state(block)
        for _ in range(100):
            if span in state.pieces:
                assert state.pieces[span] == OBJECT[slice(*span)]
                break
            if block.name in self.on_disk and not (state.is_filling or state.writer):
                if not state.is_open:
                    self.plan.opened(state)
                break
            with self.plan.waiting(state, span):
                if not self.plan.is_block_near(state):
                    self.plan.want(state, span, -1)
                self.start()
                self.land()
        else:
            raise AssertionError("the sample does not come")
        self.plan.end_read(state, span)
        self.check()

    def check(self):
        """Compares all counts with what they count."""
        held = 0
        for state in self.plan._states.values():
            assert not state.is_idle
            parts = [*state.wanted, *state.coming, *state.pieces]
            if state.writer is None:  # with a writer, what is between two samples is a piece too
                assert len(set(parts)) == len(parts)
            held += sum(stop - start for start, stop in [*state.coming, *state.pieces])
            own = [request for request in self.flights if request.state is state]
            assert not state.is_filling or state.num_requests == 1
            assert state.num_requests - len(own) in (0, 1)  # one is beginning, or ending
        assert held == self.plan.held_bytes
        assert self.plan._queue._running["piece"] <= self.network.requests
        running, most = self.plan._queue._running["block"], self.network.streams
        if most is not None or running <= 8:
            assert running <= (most or 8)
        else:  # as many small ones as there are requests
            assert running <= self.network.requests
            assert self.plan._queue._block_bytes <= 32 * 2**20

    def drain(self):
        while self.start() or self.flights:
            self.land()


def distinct_steps(draw, *, most_steps=12):
    order = draw(st.permutations(range(NUM_BLOCKS * BLOCK // SAMPLE)))
    size = draw(st.integers(1, 7))
    return [order[i : i + size] for i in range(0, len(order), size)][:most_steps]


all_steps = st.composite(distinct_steps)()


@pytest.fixture(autouse=True)
def small_pieces():
    with (
        mock.patch.object(request_queue, "_GAP_BYTES", 0),
        mock.patch.object(request_queue, "_PIECE_BYTES", 4 * SAMPLE),
    ):
        yield


@given(all_steps, st.integers(1, 4), st.data())
def test_exactly_what_is_planned_is_fetched_and_each_range_once(steps, requests, data):
    owner = Owner(requests=requests, cold_steps=2)
    for step, numbers in enumerate(steps):
        owner.add(step, numbers)
        owner.start()
        while owner.flights and data.draw(st.booleans()):
            owner.land(data.draw(st.integers(0, 9)))
            owner.start()
    for step, numbers in enumerate(steps):
        for number in numbers:
            owner.read(number)
        owner.plan.release(step)
    owner.drain()
    asked = sorted(place(number)[1] for numbers in steps for number in numbers)
    fetched = sorted(n for start, stop in owner.fetched for n in range(start, stop))
    assert fetched == [n for start, stop in asked for n in range(start, stop)]
    assert owner.plan._states == {}
    assert owner.plan.held_bytes == 0


@given(all_steps, st.integers(1, 8), st.integers(1, 3), st.data())
def test_no_range_is_fetched_before_one_that_is_needed_earlier(steps, requests, cold, data):
    owner = Owner(requests=requests, cold_steps=cold)
    for step, numbers in enumerate(steps):
        owner.add(step, numbers)
    need = {place(number)[1]: step for step, numbers in enumerate(steps) for number in numbers}
    while need:
        for request in owner.start():
            soonest = min(need.values())
            needed = [need.pop(span) for span in request.spans]
            assert min(needed) == soonest == request.step
            # What comes along is needed at the same time, or soon after.
            assert max(needed) <= (soonest if request.is_urgent else soonest + cold)
        owner.land(data.draw(st.integers(0, 9)))


@given(all_steps, st.integers(1, 20), st.integers(1, 8))
def test_memory_is_bounded_but_for_what_is_needed_soon(steps, ahead_samples, requests):
    owner = Owner(ahead_bytes=ahead_samples * SAMPLE, requests=requests, cold_steps=2)
    for step, numbers in enumerate(steps):
        owner.add(step, numbers)
    for step, numbers in enumerate(steps):
        while owner.start() or owner.flights:
            # Samples of the next two steps, and neighbours needed up to two steps after those.
            soon = sum(map(len, steps[step : step + 4])) * SAMPLE
            assert owner.plan.held_bytes <= ahead_samples * SAMPLE + soon
            if not owner.flights:
                break
            owner.land()
        for number in numbers:
            owner.read(number)
        owner.plan.release(step)


def test_what_is_needed_later_waits_for_memory():
    owner = Owner(ahead_bytes=4 * SAMPLE, cold_steps=1)
    owner.add(0, [0])
    owner.drain()
    owner.plan.release(0)
    for step in range(1, 9):
        owner.add(step, [10 * (step % 6) + step])
    owner.drain()
    assert owner.plan.held_bytes == 4 * SAMPLE
    owner.read(11)
    owner.plan.release(1)
    owner.drain()
    assert owner.plan.held_bytes == 4 * SAMPLE


operations = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(samples, min_size=1, max_size=6)),
        st.tuples(st.just("start"), st.none()),
        st.tuples(st.just("land"), st.integers(0, 9)),
        st.tuples(st.just("fail"), st.integers(0, 9)),
        st.tuples(st.just("read"), samples),
        st.tuples(st.just("release"), st.none()),
        st.tuples(st.just("cancel"), st.none()),
        st.tuples(st.just("reject"), samples),
    ),
    max_size=40,
)


def play(owner, script):
    """Plays operations in an arbitrary order, as several threads might."""
    step = released = 0
    for name, value in script:
        if name == "add":
            owner.add(step, value)
            step += 1
        elif name == "start":
            owner.start()
        elif name in ("land", "fail") and owner.flights:
            owner.land(value, fails=name == "fail")
        elif name == "read":
            owner.read(value)
        elif name == "release" and released < step:
            owner.plan.release(released)
            released += 1
        elif name == "cancel":
            owner.plan.cancel()
        elif name == "reject":
            block, _ = place(value)
            owner.on_disk.discard(block.name)
            owner.plan.reject(owner.plan.state(block))
        owner.check()


@settings(max_examples=examples(200))
@given(operations, st.booleans(), st.integers(1, 3))
def test_after_cancelling_nothing_is_left_once_what_is_under_way_has_ended(script, cached, most):
    owner = Owner(cached=cached, requests=most, streams=most, cold_steps=2)
    play(owner, script)
    owner.plan.cancel()
    owner.drain()
    left = owner.plan._states.values()
    assert all(state.is_open for state in left)
    assert owner.plan.held_bytes == 0
    assert owner.claimed == set()
    assert not any(owner.plan._queue._queues.values())


@given(all_steps, st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_block_for_the_cache_is_fetched_once_in_pieces_and_rest(steps, most, cold, data):
    owner = Owner(cached=True, requests=most, streams=most, cold_steps=cold)
    planned = 0
    for step, numbers in enumerate(steps):
        while planned < min(len(steps), step + 5):
            owner.add(planned, steps[planned])
            planned += 1
        owner.start()
        while owner.flights and data.draw(st.booleans()):
            owner.land(data.draw(st.integers(0, 9)))
            owner.start()
        for number in numbers:
            owner.read(number)
        owner.plan.release(step)
        owner.check()
    owner.drain()
    names = {place(number)[0].start for numbers in steps for number in numbers}
    fetched = sorted(n for start, stop in owner.fetched for n in range(start, stop))
    assert fetched == sorted(n for first in names for n in range(first, first + BLOCK))
    assert owner.plan.held_bytes == 0


@given(operations, st.booleans())
def test_every_sample_can_be_read_after_anything(script, cached):
    owner = Owner(cached=cached, requests=2, streams=2, cold_steps=2)
    play(owner, script)
    for number in range(0, NUM_BLOCKS * BLOCK // SAMPLE, 7):
        owner.read(number)


def test_what_a_reader_waits_for_outlives_a_cancel():
    owner = Owner()
    owner.add(0, [3, 14])
    owner.start()
    block, span = place(3)
    state = owner.plan.state(block)
    with owner.plan.waiting(state, span):
        owner.plan.cancel()
        while owner.flights:
            owner.land()
        assert state.pieces[span] == OBJECT[slice(*span)]
    assert [*owner.plan._states] == [block.name]  # and what nobody waits for is dropped
    owner.plan.end_read(state, span)
    assert owner.plan._states == {}


def test_what_is_asked_for_again_after_a_cancel_is_not_fetched_again():
    owner = Owner()
    owner.add(0, [3])
    owner.start()
    owner.plan.cancel()
    block, span = place(3)
    assert owner.plan.is_expected(owner.plan.state(block), span, 0)
    owner.drain()
    owner.read(3)
    assert owner.fetched == [span]


def test_a_request_that_ends_does_not_end_the_next_one_of_the_same_part():
    owner = Owner()
    block, span = place(3)
    state = owner.plan.state(block)
    owner.plan.want(state, span, -1)
    first = owner.plan.next_request(is_locating=False)
    for part, spans in owner.plan.parts(first):
        owner.plan.arrive(first, part, spans, memoryview(OBJECT)[part[0] : part[1]])
    owner.plan.end_read(state, span)  # it was read, and another reader wants it
    owner.plan.want(state, span, -1)
    second = owner.plan.next_request(is_locating=False)
    owner.plan.finish(first)
    assert state.coming == {span: second}
    assert owner.plan.held_bytes == SAMPLE


def test_a_block_evicted_before_it_was_used_up_comes_as_samples():
    owner = Owner(cached=True, cold_steps=1)
    owner.add(0, [0])
    owner.drain()
    found = owner.plan.add_step(1, [place(5)], presence=lambda block, step: "absent")
    assert found == 0
    assert owner.plan.add_step(2, [place(15)], presence=lambda block, step: "evicted") == 1
    assert owner.plan.state(place(15)[0]).wanted == {place(15)[1]: 2}
    assert owner.plan.state(place(15)[0]).direct


def test_later_steps_have_one_request_until_the_first_batch_is_there():
    owner = Owner()
    for step in range(5):
        owner.add(step, [10 * step])
    assert [request.step for request in owner.start()] == [0, 1]
    owner.land(1)
    assert [request.step for request in owner.start()] == [2]
    assert not owner.plan.may_locate(3)
    owner.land(0)
    assert owner.plan.may_locate(3)
    assert [request.step for request in owner.start()] == [3, 4]


@pytest.mark.parametrize(
    "network, block_bytes, running",
    [
        ({}, 4 * 2**20, 8),
        ({}, 16 * 2**20, 8),
        ({}, 2 * 2**20, 16),
        ({}, 2**18, 32),
        ({"requests": 4}, 2**18, 8),
        ({"streams": 3}, 2**18, 3),
        ({"streams": 12}, 16 * 2**20, 12),
    ],
)
def test_as_many_blocks_travel_as_fill_a_link(network, block_bytes, running):
    queue, wanted = RequestQueue(Network(**network)), range(40)
    for number in wanted:
        start = number * block_bytes
        block = Block(url="u", start=start, stop=start + block_bytes, total=2**40, sha256="ab" * 32)
        queue.add_block(BlockState(block), number)
    begun = []
    while found := queue.pop(now=0, is_first=False, is_locating=False, held_bytes=0):
        kind, state = found
        begun.append(Request(state=state, kind=kind, step=0, is_urgent=False))
        queue.begin(begun[-1])
    assert len(begun) == running
    queue.end(begun[0])  # one ends, one begins
    assert queue.pop(now=0, is_first=False, is_locating=False, held_bytes=0) is not None
