"""Stream: what every dataset object is inside, and the one thing that the loader drives.

A stream joins what datasets of prepared samples, datasets of raw samples and mixtures share: the
order, the pass that comes next, states, and reading ahead. It knows two small interfaces:
`ExampleBuilder` says how the sample of a slot becomes an example, `OrderPlan` how the order of one
dataset or of several is planned.

One pass gives this rank's share of one epoch, batch by batch. Which samples are in a batch follows
from (seed, step) alone, so every rank gets the same number of them, and the number of DataLoader
workers changes nothing: worker k of K makes the batches k, k + K, ... of the pass, which is the
sequence in which a DataLoader takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from loader.consumer import find_batch_size, find_divider
from loader.order import (
    Locality,
    MixtureOrder,
    Order,
    PackSchedule,
    Row,
    SampleRef,
    Schedule,
    SlotSchedule,
    SubsetSchedule,
    Tail,
    epoch_of,
    plan_order,
)
from loader.reading import LookaheadWindow, ShardReader
from loader.state import Allowed, Cursor
from loader.stream.pairs import warn_of_packed_pairs, warn_of_pairs, warn_of_unused
from loader.stream.split import OpenSplit
from loader.topology import CurrentTopology, Topology, find_worker
from shardspec.errors import ConfigError

Self = TypeVar("Self", bound="ExampleBuilder")
Builder = TypeVar("Builder", bound="ExampleBuilder")


class ExampleBuilder(Protocol):
    """How the samples of a dataset become examples; safe to share between threads."""

    def example(self, ref: SampleRef) -> Any:
        """Makes the example of a slot: a function of the sample, the epoch and the run's seed."""

    def in_mixture(self: Self, *, seed: int) -> Self:
        """Makes the builder of the same dataset in a mixture, whose seed is that of the run."""

    def with_sequence_length(self: Self, sequence_length: int | None) -> Self:
        """Makes a builder whose examples are no longer than that; None leaves it as it is."""

    def view_fingerprint(self) -> dict[str, Any] | None:
        """Describes for states how examples differ from their samples; None: not at all."""

    def restore_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the bad samples that a state knows; they are substituted unread."""


class OrderPlan(Protocol):
    """How the order of a stream is planned."""

    @property
    def canonical_ranks(self) -> int | None:
        """The width that was asked for; None where it is chosen by the batch."""

    def order(self, *, global_batch_size: int) -> Order | MixtureOrder:
        """Plans the order of a run with a batch size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetPlan:
    """The order of one dataset; see `plan_order`."""

    num_samples: int
    seed: int
    tail: Tail
    shuffle: bool
    canonical_ranks: int | None
    active_blocks: int | None
    block_size: int | None
    locality: Locality

    def order(self, *, global_batch_size: int) -> Order:
        """Plans the order of a run with a batch size."""
        return Order(
            plan_order(
                self.num_samples,
                global_batch_size=global_batch_size,
                seed=self.seed,
                tail=self.tail,
                shuffle=self.shuffle,
                canonical_ranks=self.canonical_ranks,
                active_blocks=self.active_blocks,
                block_size=self.block_size,
                locality=self.locality,
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPart(Generic[Builder]):
    """One dataset of a stream."""

    data: OpenSplit
    builder: Builder
    topology: CurrentTopology
    tail: Tail
    shuffle: bool


class ReadAhead:
    """Tells the readers of a stream which samples come; picklable."""

    def __init__(self, readers: Sequence[ShardReader]) -> None:
        self.readers = tuple(readers)
        """By the number of the dataset in the order."""

    @property
    def ahead_steps(self) -> int:
        """Steps that are best announced before they are made; 0 where all shards are local."""
        return max(reader.ahead_steps for reader in self.readers)

    def prefetch(self, step: int, rows: Sequence[Row]) -> None:
        """Announces the samples of a step; steps come in increasing order."""
        for number, reader in enumerate(self.readers):
            samples = [ref.sample for row in rows for ref in row if ref.dataset == number]
            reader.prefetch(step, samples)

    def release(self, step: int) -> None:
        """Announces that the examples of a step are made."""
        for reader in self.readers:
            reader.release(step)

    def cancel(self) -> None:
        """Drops what was announced: the run continues at another step."""
        for reader in self.readers:
            if reader.prefetcher is not None:
                reader.prefetcher.cancel_prefetch()


class Stream(Generic[Builder]):
    """The samples of one dataset or of several, in the order of a run."""

    def __init__(
        self,
        parts: Sequence[StreamPart[Builder]],
        plan: OrderPlan,
        *,
        seed: int,
        batch_size: int | None,
        named: bool,
    ) -> None:
        """Joins datasets; reads nothing.

        Args:
          parts: The datasets, as the order numbers them: one at least, all of one topology.
          plan: Of their order.
          seed: Of the run.
          batch_size: Samples per batch of this rank; None: the order takes one.
          named: States describe each dataset by its name, as those of mixtures do.
        """
        self.parts = tuple(parts)
        self.plan = plan
        self.seed = seed
        self._batch_size = batch_size
        # Of all ranks: what a loader sets, however many ranks there will be.
        self._global_batch_size: int | None = None
        # The order that was planned last, by its global batch size.
        self._planned: tuple[int, Order | MixtureOrder] | None = None
        self.ahead = ReadAhead([part.data.reader for part in self.parts])
        self.cursor = Cursor()
        self._named = named

    def resized(
        self, parts: Sequence[StreamPart[Builder]], *, global_batch_size: int
    ) -> Stream[Builder]:
        """Makes the stream of the same run at another batch size, over copies of its parts."""
        other = Stream(parts, self.plan, seed=self.seed, batch_size=None, named=self._named)
        other._global_batch_size = global_batch_size
        return other

    @property
    def topology(self) -> Topology:
        """The data-parallel rank of this process and their number, as far as they are known now."""
        return self.parts[0].topology.now()

    def settle(self) -> Topology:
        """Finds out the rank of the pass that begins now, and refuses a second division by rank.

        Raises:
          ConfigError: `rank`; `sharded_twice`.
        """
        topology = self.parts[0].topology.settle()
        self.require_undivided(topology)
        return topology

    def require_undivided(self, topology: Topology) -> None:
        """Refuses what would divide the samples of this rank between the ranks once more.

        Raises:
          ConfigError: `sharded_twice`.
        """
        divider = find_divider() if topology.world_size > 1 else None
        if divider is not None:
            raise ConfigError(
                "sharded_twice",
                by=divider.name,
                num_processes=divider.num_processes,
                world_size=topology.world_size,
            )

    @property
    def batch_size(self) -> int | None:
        """Samples per batch of this rank; None: the order takes one."""
        if self._global_batch_size is None:
            return self._batch_size
        return self._global_batch_size // self.topology.world_size

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return sum(part.data.num_samples for part in self.parts)

    @property
    def order(self) -> Order | MixtureOrder:
        """The order of the run at this batch size and world size."""
        batch = self._global_batch_size
        if batch is None:
            batch = 1 if self._batch_size is None else self._batch_size
            batch *= self.topology.world_size
        if self._planned is None or self._planned[0] != batch:
            self._planned = batch, self.plan.order(global_batch_size=batch)
        return self._planned[1]

    def by_id(self, schedule: Schedule) -> Schedule:
        """Lets the rows of a schedule name samples by their ids, where it is of subsets."""
        sample_ids = [part.data.ids_in_use for part in self.parts]
        if all(ids is None for ids in sample_ids):
            return schedule
        parts = [part.data for part in self.parts]
        questions = [None if data.questions is None else data.asked[1] for data in parts]
        return SubsetSchedule(schedule, sample_ids, questions)

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return self.cursor.remaining(self.order) * (self.batch_size or 1)

    def __iter__(self) -> Iterator[Any]:
        """Gives this worker's share of the next pass.

        Raises:
          ConfigError: `batch_size`, several workers and no batch size, or another one than the
            DataLoader's; `sharded_twice`; `rank`.
        """
        topology = self.settle()
        _, num_workers = find_worker()
        if num_workers > 1 and self.batch_size is None:
            raise ConfigError("batch_size.workers", num_workers=num_workers)
        return self.cursor.examples(
            self.order,
            self._step_examples(topology),
            batch_size=self.batch_size or 1,
            trains=self.parts[0].tail != "pad",
        )

    def example(self, ref: SampleRef) -> Any:
        """Makes the example of a slot."""
        return self.parts[ref.dataset].builder.example(ref)

    def set_epoch(self, epoch: int) -> None:
        """Lets the next pass begin at the start of an epoch.

        Raises:
          ConfigError: `sharded_twice`: Accelerate sets the epoch before each pass. Its workers
            cannot be told from others there.
        """
        self.require_undivided(self.topology)
        self.cursor.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run."""
        self.cursor.set_step(self.order, step)

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data for states.

        Raises:
          ShardError: An index cannot be read.
        """
        if not self._named:
            return self.parts[0].data.fingerprint
        return {part.data.title: part.data.fingerprint for part in self.parts}

    def has_grown_from(self, saved: Mapping[str, Any]) -> bool:
        """Returns True if a fingerprint is that of this data before samples were appended."""
        if not self._named:
            return self.parts[0].data.has_grown_from(saved)
        own = self.fingerprint()
        if set(saved) != set(own) or dict(saved) == own:
            return False
        return all(
            saved[name] == own[name]
            or (isinstance(saved[name], Mapping) and part.data.has_grown_from(saved[name]))
            for name, part in zip(own, self.parts, strict=True)
        )

    def warn_of_pairs(self, order: Order | MixtureOrder, *, step: int) -> None:
        """Warns where ranks' shares of a step hold far more pairs of one shard than by chance.

        On rank 0, for the batch of a step; rows are samples.
        """
        if not self.topology.rank:
            warn_of_pairs(
                order,
                step=step,
                world_size=self.topology.world_size,
                num_shards=self._num_shards(),
            )

    def warn_of_packed_pairs(self, packs: PackSchedule, rows: Sequence[Row], *, step: int) -> None:
        """Does the same for the packs that a rank has of a step."""
        if not self.topology.rank:
            warn_of_packed_pairs(
                self.order,
                packs,
                rows,
                step=step,
                world_size=self.topology.world_size,
                num_shards=self._num_shards(),
            )

    def warn_of_unused(self) -> None:
        """Warns of settings that the order cannot follow, as the dataset is too small for lanes."""
        if not self.topology.rank:
            warn_of_unused(self.order, self.plan)

    def require_batch(self, global_batch_size: int) -> None:
        """Refuses a global batch of another size than the one that was asked for.

        Raises:
          ConfigError: `batch_size`.
        """
        world_size = self.topology.world_size
        if self._batch_size is not None and self._batch_size * world_size != global_batch_size:
            raise ConfigError(
                "batch_size.global",
                dataset=self._batch_size,
                world_size=world_size,
                global_batch_size=global_batch_size,
            )

    def _num_shards(self) -> list[int]:
        manifests = [(part.data.manifest, part.data.name) for part in self.parts]
        return [max(1, len(manifest.select(split))) for manifest, split in manifests]

    def describe_view(self) -> dict[str, Any]:
        """Gives the field `view` of states: of each dataset, or none where samples stay raw."""
        views = {p.data.title: p.builder.view_fingerprint() for p in self.parts}
        if None in views.values():
            return {}
        return {"view": views if self._named else next(iter(views.values()))}

    def restore_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the bad samples that a state knows."""
        for number, part in enumerate(self.parts):
            part.builder.restore_bad([r for r in records if r.get("dataset", 0) == number])

    def state_dict(self) -> dict[str, Any]:
        """Describes how far this process is in its pass, for torchdata's StatefulDataLoader."""
        return self.cursor.state_dict(self._own_state())

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Sequence[Allowed] = ()) -> None:
        """Restores what `state_dict` gave, for the next pass.

        Raises:
          StateError, ConfigError: As `require_state`.
        """
        self.cursor.load_state_dict(state, self._own_state(), allow=allow)

    def _own_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "data": self.fingerprint(),
            "order": self.order.config.to_dict(),
            **self.describe_view(),
        }

    def _step_examples(self, topology: Topology) -> Callable[[int], list[Any]]:
        """Makes the function that gives this rank's examples of a step, for this worker's steps.

        The worker's next steps are announced to the readers before it waits for the present one.
        """
        # What a pass that was left has planned would be kept for the rest of the run.
        self.ahead.cancel()
        order = self.order
        schedule = self.by_id(SlotSchedule(order))
        window = LookaheadWindow(self.ahead.ahead_steps, stride=find_worker()[1])
        batch_size, checked = self.batch_size, False

        def examples(step: int) -> list[Any]:
            nonlocal checked
            if not checked:
                checked = True
                _require_batch_size(batch_size)
            if self.ahead.ahead_steps:
                stop = order.epoch_start(epoch_of(order, step) + 1)
                for later in window.next_steps(step, stop=stop):
                    self.ahead.prefetch(later, schedule.rows(later, topology))
            rows = schedule.rows(step, topology)
            made = [self.example(ref) for row in rows for ref in row]
            self.ahead.release(step)
            return made

        return examples


def _require_batch_size(batch_size: int | None) -> None:
    """Refuses a DataLoader whose batches are not those of the order."""
    taken = find_batch_size()
    if batch_size is not None and taken is not None and taken != batch_size:
        raise ConfigError("batch_size.loader", dataset=batch_size, loader=taken)
