"""Packed streams: the packs of canonical ranks without end, for mixtures and very large datasets.

Canonical rank u reads the slots of its share as one endless stream, cut into packs by packing.py;
its packs fill its share of the global batch, step after step. No epoch is planned ahead, so a pass
is a number of steps: the one that holds a pass of the order if all samples pack as the first run of
stream 0 does. Samples continue from pass to pass without a gap, but streams whose packs hold more
samples run ahead of the others.

Packs need to know how many packs came before, so a state carries two integers per stream; without
them the lengths are packed again from the start of the run, which changes nothing but the time it
takes.

Where the datasets of a mixture change, streams begin anew at a step of the order that none of them
has reached. What they have not delivered of the slots before is their backlog, which comes in turn
with the new slots (backlog.py). So every sample of the datasets that stay comes exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loader.order.backlog import ReadUp, StreamSlots
from loader.order.batch_sizes import BatchSizes
from loader.order.mixture import MixtureOrder
from loader.order.order import Order
from loader.order.packing import PackConfig, PackStream, plan_run
from loader.order.rows import Lengths, Row, sample_refs
from loader.order.slots import Slots
from shardspec.errors import ConfigError


class PackedStreams:
    """The packs of an order, canonical rank by canonical rank."""

    pass_is_exact = False

    def __init__(
        self,
        order: Order | MixtureOrder,
        lengths: Lengths,
        config: PackConfig,
        *,
        patches_per_crop: int,
    ) -> None:
        """Joins an endless order, lengths and limits."""
        self._order, self._lengths, self._config = order, lengths, config
        self._patches = patches_per_crop
        self.num_streams = order.config.canonical_ranks
        self._sizes = BatchSizes([(0, order.config.global_batch_size)])
        self._pass_steps: int | None = None
        self._streams: dict[int, _Stream] = {}
        self._saved: dict[int, tuple[int, int]] = {}
        # The first step of packs, the step of the order that its streams begin with, and what they
        # have left of the slots before: none, or one entry per stream.
        self._begins = (0, 0)
        self.backlog: Sequence[np.ndarray] = ()
        self.left_out = 0
        """Samples that were left out where streams began anew: of datasets that were removed."""

    @property
    def begins(self) -> tuple[int, int]:
        """The first step of packs, and the step of the order that its streams begin with."""
        return self._begins

    def begin(
        self, order: Order | MixtureOrder, *, at: tuple[int, int], backlog: Sequence[np.ndarray]
    ) -> None:
        """Begins the streams anew over an order; `at` is as `begins`."""
        self._order, self._begins, self.backlog = order, at, backlog
        self._pass_steps, self._streams, self._saved = None, {}, {}

    def read_up(self, places: Sequence[Sequence[int]], step: int) -> list[ReadUp] | None:
        """Tells how far all streams are.

        Args:
          places: As `places` gave them for a step.
          step: That step.

        Returns:
          One entry per stream, or none before the first pack; None where places of streams are
          missing, or are older than the step.
        """
        known = {int(number): (int(run), int(first)) for number, run, first in places}
        if step == self._begins[0]:
            return []
        if set(known) != set(range(self.num_streams)):
            return None
        if len(self._streams) not in (0, self.num_streams):
            return None  # planned for some ranks alone: the places of the others are old
        packs, found = self._packs_before(step), []
        for number, (run, first) in sorted(known.items()):
            planned = self._run_at(number, (run, first))
            if not 0 <= packs - first <= len(planned):
                return None
            delivered = np.zeros(self._config.run, np.bool_)
            if packs > first:
                delivered[np.concatenate(planned[: packs - first]) - run * len(delivered)] = True
            found.append(ReadUp(run=run, delivered=delivered))
        return found

    def set_sizes(self, sizes: BatchSizes) -> None:
        """Takes over the packs per step."""
        self._sizes = sizes

    def packs(self, step: int, positions: np.ndarray) -> list[tuple[Row, int]]:
        """Gives the packs at positions of a step, each with its cost."""
        if step < self._begins[0]:
            raise ConfigError("order_slot.over", where="step", since=self._begins[0])
        share = self._sizes.pairs[self._sizes.segment_at(step)][1] // self.num_streams
        before = self._packs_before(step)
        streams, places = np.divmod(positions, share)
        pairs = zip(streams.tolist(), places.tolist(), strict=True)
        return [
            self._stream(number).row(before + place, patches=self._patches)
            for number, place in pairs
        ]

    def epoch_start(self, epoch: int) -> int:
        """Returns the step at which a pass begins; all passes have equally many."""
        if self._pass_steps is None:
            samples = pass_samples(self._order) // self.num_streams or 1
            run = min(self._config.run, samples)
            tokens, crops = self._samples(0).lengths(0, run)
            packs = len(plan_run(tokens, crops, config=self._config))
            whole = samples * self.num_streams * packs
            self._pass_steps = max(1, -(-whole // (run * self._order.config.global_batch_size)))
        return epoch * self._pass_steps

    def epoch_at(self, step: int) -> int:
        """Returns the pass that a step belongs to."""
        return step // self.epoch_start(1)

    def places(self, step: int) -> list[list[int]]:  # noqa: ARG002 - packed epochs need it
        """Gives the known places of the streams, for the state: (stream, run, its first pack)."""
        planned = {number: stream.packs.place for number, stream in self._streams.items()}
        known = {**self._saved, **planned}
        return [[number, *known[number]] for number in sorted(known)]

    def go_to(self, places: Sequence[Sequence[int]]) -> None:
        """Begins at saved places; streams without one are planned from the start of the run."""
        self._streams = {}
        self._saved = {number: (run, first) for number, run, first in places}

    def _packs_before(self, step: int) -> int:
        """Counts the packs of each stream before a step."""
        begin = self._sizes.slots_before(self._begins[0])
        return (self._sizes.slots_before(step) - begin) // self.num_streams

    def _run_at(self, number: int, place: tuple[int, int]) -> list[np.ndarray]:
        """Gives the packs of a stream's run: those at hand, or planned once more."""
        stream = self._streams.get(number)
        if stream is None or stream.packs.place != place:
            # Not the stream itself: what it has at hand belongs to later packs.
            stream = _Stream(self._samples(number), self._config, place=place)
        return stream.packs.planned()

    def _stream(self, number: int) -> _Stream:
        if number not in self._streams:
            place = self._saved.get(number, (0, 0))
            self._streams[number] = _Stream(self._samples(number), self._config, place=place)
        return self._streams[number]

    def _samples(self, number: int) -> _Samples:
        share = self._order.config.global_batch_size // self.num_streams
        backlog = self.backlog[number] if self.backlog else np.zeros(0, np.int64)
        begin, run = self._begins[1] * share, self._config.run
        slots = StreamSlots(backlog=backlog, begin=begin, run=run)
        return _Samples(self._order, self._lengths, slots, number=number, share=share)


class _Samples:
    """The samples of one canonical rank, one after the other; keeps those asked for last."""

    def __init__(
        self,
        order: Order | MixtureOrder,
        lengths: Lengths,
        slots: StreamSlots,
        *,
        number: int,
        share: int,
    ) -> None:
        self._order, self._lengths, self._sequence = order, lengths, slots
        self.number, self._share = number, share
        self._start = 0
        self._slots: Slots
        self._tokens: np.ndarray
        self._crops: np.ndarray

    def lengths(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Looks up the lengths of the stream's samples, and keeps what they are."""
        steps, inside = np.divmod(self._sequence.find(np.arange(start, stop)), self._share)
        slots = self._order.slots(steps, self.number * self._share + inside)
        self._start, self._slots = start, slots
        self._tokens, self._crops = self._lengths(slots.dataset, slots.sample)
        return self._tokens, self._crops

    def row(self, samples: np.ndarray, *, limit: int, patches: int) -> tuple[Row, int]:
        """Gives the places of some of the samples kept, and their cost as a pack."""
        members = samples - self._start
        tokens = np.minimum(self._tokens[members], limit)
        cost = int(tokens.sum() + patches * self._crops[members].sum())
        slots = self._slots
        row = sample_refs(
            Slots(
                dataset=slots.dataset[members],
                epoch=slots.epoch[members],
                sample=slots.sample[members],
                real=slots.real[members],
            )
        )
        return tuple(row), cost


class _Stream:
    """The samples of one canonical rank as packs."""

    # Two objects, as packs ask for lengths and rows for packs: one that asks itself would stay,
    # with all files of its dataset, until Python looks for such circles.

    def __init__(self, samples: _Samples, config: PackConfig, *, place: tuple[int, int]) -> None:
        self._samples, self._limit = samples, config.sequence_length
        self.packs = PackStream(samples.lengths, config, stream=samples.number, place=place)

    def row(self, n: int, *, patches: int) -> tuple[Row, int]:
        """Gives the places of pack n and its cost."""
        # Planning the pack's run leaves its samples in mind.
        samples = self.packs.pack(n)
        return self._samples.row(samples, limit=self._limit, patches=patches)


def pass_samples(order: Order | MixtureOrder) -> int:
    """Counts the samples of a pass over an order."""
    if isinstance(order, Order):
        return order.config.num_samples
    return order.epoch_start(1) * order.config.global_batch_size
