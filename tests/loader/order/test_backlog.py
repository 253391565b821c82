"""What packed streams have left where the datasets of a mixture change."""

import numpy as np
import pytest

from loader.order import ReadUp, StreamSlots, backlog_after

RUN, SHARE, STREAMS = 32, 3, 2


def deliver(draw, *, packs, size):
    """Which samples of a run are delivered: some packs of its first windows of `size`."""
    delivered = np.zeros(RUN, np.bool_)
    for start in range(0, RUN, size):
        chosen = draw.permutation(size)[: max(0, packs)]
        delivered[start + chosen] = True
        packs -= size
    return delivered


@pytest.mark.parametrize("most_packs", [1, 6, 60])
def test_no_slot_is_lost_or_comes_twice_in_two_hundred_changes(most_packs):
    draw = np.random.default_rng(most_packs)
    begin, backlog = 0, [np.zeros(0, np.int64)] * STREAMS
    shown = [np.zeros(0, np.int64)] * STREAMS
    longest = 0
    for _ in range(200):
        streams = [StreamSlots(backlog=one, begin=begin * SHARE, run=RUN) for one in backlog]
        reads, run = [], int(draw.integers(0, 1 + most_packs // 20))
        packs = int(draw.integers(0, most_packs + 1))  # as many of each stream
        for number, slots in enumerate(streams):
            delivered = deliver(draw, packs=packs, size=8)
            reads.append(ReadUp(run=run, delivered=delivered))
            numbers = np.concatenate([np.arange(run * RUN), run * RUN + np.flatnonzero(delivered)])
            shown[number] = np.concatenate([shown[number], slots.find(numbers)])
        begin, backlog = backlog_after(streams, reads, share=SHARE)
        longest = max(longest, *map(len, backlog))
        for slots, left in zip(shown, backlog, strict=True):
            assert (np.diff(left) > 0).all()
            assert sorted([*slots.tolist(), *left.tolist()]) == list(range(begin * SHARE))
    assert longest <= 8 * RUN  # however often it changes
