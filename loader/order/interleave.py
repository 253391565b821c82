"""The interleaving pattern of a mixture: the dataset of each of M slots, evenly, without a rhythm.

Dataset d occurs m_d times; its *share* is m_d / M. The run repeats the pattern.

**Bound.** Of the first x slots of the run, each dataset has its share times x to within 2 samples,
for ever. Whole patterns are exact, and inside a pattern:

1. A *fluid* serves all datasets at once: F_d(x) samples of d in the first x slots, x in all. At
   knots it is ahead of the share by a drawn amount of at most 1 (the amounts of a knot sum to 0,
   and are 0 at both ends of the pattern); between knots it is a straight line. So F_d(x) is within
   1 of the share times x everywhere.
2. Sample i of d is *due* in the slots in which the fluid serves it, from F_d = i to F_d = i + 1,
   with slots that it shares counted to it. The fluid itself is a way to serve all samples in their
   slots, by fractions; and a matching of M samples to M slots that exists in fractions exists in
   whole numbers (Birkhoff).
3. *Earliest deadline first* finds one: each slot takes, of the samples that are due and not yet
   served, the one whose slots end first. (Where a matching takes another one, exchanging the two
   keeps both in their slots.) Samples served while they are due are less than one sample ahead of
   the fluid or behind it.

**No rhythm.** Without the drawn amounts two equal datasets would alternate strictly, and 3 : 2 in
batches of 10 would give each position the same dataset in every batch, and so each rank. An amount
moves a dataset's beat against the slots, by a whole beat from one extreme to the other, and it
takes all values in between equally often. It moves slowly, over 16 batches, so that neighbouring
batches differ no more than beats do anyway; and no faster than the dataset's own beat: fluids only
move forward.

Integer arithmetic only, like the order's.
"""

from __future__ import annotations

import heapq

import numpy as np

from loader.order.permutation import keyed_array

_KEY_AHEAD, _KEY_TIES = 17, 18

_TIE_BITS = 32

MOST_SLOTS = 2**23
"""Longest pattern: places on a fluid then fit 63 bits."""

MOST_DATASETS = 4096
"""Most datasets of a pattern."""

_KNOT_SLOTS = 64
"""Slots between knots; more for more datasets, so that a table of both stays near M rows."""

_SWEEP_SLOTS, _SWEEP_BATCHES = 1024, 16
"""An amount goes from one extreme to the other in so many slots, and in so many batches."""

_UNIT = 2**16
"""One sample, in amounts."""


def spread(quotas: np.ndarray, *, batch: int, key: int) -> np.ndarray:
    """Lays out a pattern.

    Args:
      quotas: int64 [datasets], how often each occurs, >= 0; the sum M is at most `MOST_SLOTS`.
      batch: Slots of a global batch.
      key: Decides which of the even patterns it is.

    Returns:
      int32 [M], the dataset of each slot.
    """
    # Most frequent first, and none that does not occur.
    used = np.argsort(-quotas, kind="stable")[: np.count_nonzero(quotas)]
    counts = quotas[used]
    release, deadline = _times(counts, batch=batch, key=key)
    sample = np.arange(len(release))
    ties = keyed_array(key, _KEY_TIES, sample) >> np.uint64(64 - _TIE_BITS)
    # Each dataset's deadlines ascend: a sort by merging runs takes little time.
    by_deadline = np.argsort((deadline << _TIE_BITS) + ties.astype(np.int64), kind="stable")
    urgency = np.empty_like(sample)
    urgency[by_deadline] = sample
    dataset = np.repeat(used, counts).astype(np.int32)
    pattern: np.ndarray = dataset[by_deadline[_earliest_first(release, urgency)]]
    return pattern


def _earliest_first(release: np.ndarray, urgency: np.ndarray) -> list[int]:
    """Gives the urgency of the sample in each slot: of those that are due, the least."""
    coming = urgency[np.argsort(release, kind="stable")].tolist()
    # How many samples are due from each slot on.
    number_due = np.bincount(release, minlength=len(release)).tolist()
    push, pop, push_pop = heapq.heappush, heapq.heappop, heapq.heappushpop  # looked up once
    due: list[int] = []
    taken: list[int] = []
    seen = 0
    for number in number_due:
        if number == 1:  # most often: one step of the heap for two
            taken.append(push_pop(due, coming[seen]))
            seen += 1
            continue
        for _ in range(number):
            push(due, coming[seen])
            seen += 1
        taken.append(pop(due))
    return taken


def _times(counts: np.ndarray, *, batch: int, key: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the first and the last slot in which each sample is due: int64 [M], by dataset."""
    num_slots = int(counts.sum())
    knots = _knots(num_slots, len(counts))
    ahead = _ahead(counts, knots, batch=batch, key=key)
    # Places on the fluids, in units of 1 / (_UNIT * M) of a sample; each dataset's begins where
    # the one before ends, so that one sorted table holds all.
    one = _UNIT * num_slots
    before = (np.cumsum(counts) - counts)[:, None]
    fluid = before * one + counts[:, None] * _UNIT * knots + ahead * num_slots
    width = len(knots)
    table = fluid.ravel()
    sample = np.arange(num_slots) * one
    place = np.searchsorted(table, sample, side="right") - 1
    below, above = knots[place % width], knots[(place + 1) % width]
    served = (sample - table[place]) * (above - below)
    speed = table[place + 1] - table[place]
    release = below + served // speed
    # A sample's time ends where the next one's begins; the last one's with the pattern.
    deadline = np.empty_like(release)
    deadline[:-1] = (below - -served // speed)[1:] - 1
    deadline[np.cumsum(counts) - 1] = num_slots - 1
    return release, deadline


def _knots(num_slots: int, num_datasets: int) -> np.ndarray:
    apart = min(max(_KNOT_SLOTS, num_datasets), 1024)
    knots = np.arange(max(1, num_slots // apart) + 1, dtype=np.int64) * apart
    knots[-1] = num_slots
    return knots


def _ahead(counts: np.ndarray, knots: np.ndarray, *, batch: int, key: int) -> np.ndarray:
    """Draws how far each fluid is ahead of its share: int64 [datasets, knots], in `_UNIT`.

    Each dataset lends to the next rarer one, or borrows, up to half a sample, so that columns sum
    to 0 and no entry exceeds 1. What is lent is a random walk that turns back at half a sample,
    and so takes all values equally often. Between two knots it changes by no more than a third of
    what the rarer of the two is served, of which each has two, so that fluids only move forward.
    """
    at = np.arange(len(knots))
    shortest = int(np.diff(knots).min())
    fastest = _UNIT * shortest // max(_SWEEP_SLOTS, _SWEEP_BATCHES * batch)
    rarer = _UNIT * counts[1:] * shortest // int(counts.sum())
    step = np.minimum(fastest, rarer // 3)[:, None]
    # The walk draws a direction and a speed anew after so many knots.
    every = -(-_UNIT // np.maximum(step, 1))
    draw = keyed_array(key, _KEY_AHEAD, np.arange(len(step))[:, None], at)
    change = (draw >> np.uint64(47)).astype(np.int64) - _UNIT
    reached = np.cumsum(change, axis=1) - change[:, :1]
    turn, since = np.divmod(at, every)
    rest = np.take_along_axis(change, np.minimum(turn + 1, len(at) - 1), axis=1)
    walk = np.take_along_axis(reached, turn, axis=1) + rest * since // every + change[:, :1]
    lent = np.abs(walk % (2 * _UNIT) - _UNIT) - _UNIT // 2
    most = step * np.minimum(at, at[::-1])
    lent = np.clip(lent, -most, most)
    none = np.zeros((1, len(at)), np.int64)
    ahead: np.ndarray = np.concatenate([none, lent]) - np.concatenate([lent, none])
    return ahead
