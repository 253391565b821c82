"""IterableDatasetMixture: several StreamingDatasets as one, in proportions that never drift.

The mixture decides weights; mixture.py turns them into the order; each dataset makes its own
examples, with its own seed (of the run's seed and its name), its own epochs and its own settings.
What must agree is what a batch is made of: the tokenizer and the shapes of the view.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset

from loader.assembly import TokenIds, View
from loader.order import (
    MixtureGroup,
    MixtureOrder,
    MixtureSource,
    Row,
    SampleRef,
    Stop,
    Weighting,
    plan_mixture,
)
from loader.reading import ShardReader
from loader.state import Allowed, Cursor
from loader.stream import (
    PlannedExample,
    StreamingDataset,
    batches_ahead,
    require_batch_size,
    with_pictures,
)
from loader.topology import Topology
from shardspec.errors import ConfigError
from shardspec.manifest import differences

_TOKENIZER = ("sha256", "special_ids")
_RANKS = ("rank", "world_size")
_VIEW = ("image", "pixels", "normalize", "image_map")


class IterableDatasetMixture(IterableDataset[dict[str, Any]]):
    """Streams several datasets, or mixtures of them, in fixed proportions."""

    def __init__(
        self,
        datasets: Sequence[StreamingDataset | IterableDatasetMixture],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        by: Weighting = "rate",
        unit: Literal["samples", "tokens"] = "samples",
        stop: Stop | int = "first_exhausted",
        batch_size: int | None = None,
        canonical_ranks: int | None = None,
    ) -> None:
        """Joins datasets; opens no shard yet.

        Args:
          datasets: Datasets of different names, with tail "wrap" and shuffled. They are copied for
            the run's seed and stay as they are. A mixture among them takes its share as a whole and
            deals it to its own datasets by its own weights.
          weights: A rate >= 0 for each; None: all the same.
          seed: Of the run: of the order and of every draw. Seeds given to the datasets have no
            effect.
          by: What rates multiply: nothing ("rate"), the square root of the number of samples
            ("root_size", as in the Molmo family) or the number itself ("size").
          unit: Whether weights are shares of samples or of tokens; a dataset's tokens per sample
            are its manifest's: text, each turn at its longest variant.
          stop: Where a pass ends: when the first, or the last ("all_exhausted"), dataset has been
            seen once, or after a number of steps. The next pass goes on from there.
          batch_size: Samples per batch of this rank, the same as the DataLoader's.
          canonical_ranks: See `StreamingDataset`.

        Raises:
          ConfigError: `mixture_view`, `mixture_tokenizer` (naming the differences),
            `mixture_topology`, `mixture_tail`; `mixture_dataset`, one of them is something else;
            `mixture_empty`, `mixture_twice`, `mixture_weights`, `mixture_mean_tokens`, as
            `mixture_weights`.
        """
        super().__init__()
        for number, dataset in enumerate(datasets):
            _require_mixable(dataset, number)
        rates = [1.0] * len(datasets) if weights is None else list(weights)
        if len(rates) != len(datasets):
            raise ConfigError("mixture_weights.count", datasets=len(datasets), weights=len(rates))
        self.group = MixtureGroup(
            sources=tuple(_source(d, rate) for d, rate in zip(datasets, rates, strict=True)),
            by=by,
        )
        """The weights as they were given, for `plan_mixture`."""
        flat = [member for dataset in datasets for member in _members(dataset)]
        self.seed = seed
        self.unit: Literal["samples", "tokens"] = unit
        self.stop: Stop | int = stop
        self.batch_size = batch_size
        self.canonical_ranks = canonical_ranks
        self.datasets = tuple(dataset.with_seed(seed) for dataset in flat)
        """The datasets of the flat mixture, as the order numbers them."""
        _share_readers(self.datasets)
        self._cursor = Cursor()
        self._order: MixtureOrder | None = None
        # Refuses what cannot be mixed now, not at the first batch.
        plan_mixture(self.group, global_batch_size=1, seed=seed, unit=unit)
        self._require_alike()

    @property
    def topology(self) -> Topology:
        """The data-parallel place of this process."""
        return self.datasets[0].topology

    @property
    def ids(self) -> TokenIds:
        """The special ids of all datasets."""
        return self.datasets[0].ids

    @property
    def view(self) -> View:
        """The first dataset's view: its shapes are all datasets'."""
        return self.datasets[0].view

    @property
    def readers(self) -> list[ShardReader]:
        """What reads the shards of all datasets."""
        return [reader for dataset in self.datasets for reader in dataset.readers]

    @property
    def num_samples(self) -> int:
        """Samples of all datasets."""
        return sum(dataset.num_samples for dataset in self.datasets)

    @property
    def epoch(self) -> int:
        """The pass that is given next."""
        return self._cursor.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the next pass, as DistributedSampler's method does."""
        self._cursor.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run; see `StreamingDataset.set_step`."""
        self._cursor.set_step(self.order, step)

    def with_batch_size(
        self, batch_size: int, *, sequence_length: int | None
    ) -> IterableDatasetMixture:
        """Makes a mixture of the same datasets, for another batch size or sequence length."""
        other = copy.copy(self)
        other.batch_size = batch_size
        other.datasets = tuple(
            dataset.with_batch_size(batch_size, sequence_length=sequence_length)
            for dataset in self.datasets
        )
        other._cursor, other._order = Cursor(), None
        return other

    @property
    def order(self) -> MixtureOrder:
        """The order of the run at this batch size and world size."""
        if self._order is None:
            batch_size = 1 if self.batch_size is None else self.batch_size
            config = plan_mixture(
                self.group,
                global_batch_size=batch_size * self.topology.world_size,
                seed=self.seed,
                unit=self.unit,
                canonical_ranks=self.canonical_ranks,
            )
            self._order = MixtureOrder(config, stop=self.stop)
        return self._order

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return self._cursor.remaining(self.order) * (self.batch_size or 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives this worker's share of the pass."""
        require_batch_size(self.batch_size)
        order = self.order
        return self._cursor.examples(
            order, batches_ahead(self, order), batch_size=self.batch_size or 1
        )

    @property
    def ahead_steps(self) -> int:
        """Steps that are best said ahead of their reading; 0 where all shards are local."""
        return max(dataset.ahead_steps for dataset in self.datasets)

    def prefetch(self, step: int, rows: Sequence[Row]) -> None:
        """Says which samples a step will need; steps come in increasing order."""
        for number, dataset in enumerate(self.datasets):
            own = [tuple(place for place in row if place.dataset == number) for row in rows]
            dataset.prefetch(step, own)

    def release(self, step: int) -> None:
        """Says that a step's batch is made."""
        for dataset in self.datasets:
            dataset.release(step)

    def restore_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the bad samples that a state knows; they are substituted unread."""
        for number, dataset in enumerate(self.datasets):
            dataset.restore_bad([r for r in records if r.get("dataset") == number])

    def cancel_prefetch(self) -> None:
        """Drops what was said to be read: the run goes on at another step."""
        for dataset in self.datasets:
            dataset.cancel_prefetch()

    def at(self, place: SampleRef) -> dict[str, Any]:
        """Makes the example of one place of the order; its metadata name the dataset."""
        return with_pictures(self, place)

    def plan_example(
        self, place: SampleRef, *, after_failed: PlannedExample | None = None
    ) -> PlannedExample:
        """Plans the same; see `StreamingDataset.pending`."""
        dataset = self.datasets[place.dataset]
        made = dataset.plan_example(place, after_failed=after_failed)
        made.draft.dataset = dataset.manifest.dataset
        return made

    def lengths(self, dataset: np.ndarray, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Looks up how long samples are at most, in the indexes of their datasets.

        Args:
          dataset: int64 [n], numbers of the datasets.
          sample: int64 [n].

        Returns:
          (tokens, crops), int64 [n].
        """
        tokens, crops = np.zeros(len(sample), np.int64), np.zeros(len(sample), np.int64)
        for number in np.unique(dataset).tolist():
            own = np.flatnonzero(dataset == number)
            tokens[own], crops[own] = self.datasets[number].lengths(dataset[own], sample[own])
        return tokens, crops

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data for states: each dataset by its name."""
        return {dataset.manifest.dataset: dataset.fingerprint() for dataset in self.datasets}

    def view_fingerprint(self) -> dict[str, Any]:
        """Describes the views for states: each dataset's by its name."""
        return {dataset.manifest.dataset: dataset.view_fingerprint() for dataset in self.datasets}

    def has_grown_from(self, data: Mapping[str, Any]) -> bool:
        """Tells whether a fingerprint is that of these datasets before samples were appended."""
        own = self.fingerprint()
        if set(data) != set(own) or dict(data) == own:
            return False
        return all(
            data[dataset.manifest.dataset] == own[dataset.manifest.dataset]
            or dataset.has_grown_from(data[dataset.manifest.dataset])
            for dataset in self.datasets
        )

    def state_dict(self) -> dict[str, Any]:
        """Describes this process's place in its pass, for torchdata's StatefulDataLoader."""
        return self._cursor.state_dict(self._own_state())

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Sequence[Allowed] = ()) -> None:
        """Goes to a place that `state_dict` gave, for the next pass.

        Args:
          state: A state of this rank and worker.
          allow: ("view",) takes a state that was saved with other views.

        Raises:
          StateError, ConfigError: As `require_state`.
        """
        self._cursor.load_state_dict(state, self._own_state(), allow=allow)

    def _own_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "data": self.fingerprint(),
            "order": self.order.config.to_dict(),
            "view": self.view_fingerprint(),
        }

    def _require_alike(self) -> None:
        first, *others = self.datasets
        for other in others:
            tokenizers = [d.manifest.tokenizer for d in (first, other)]
            _compare(first, other, "tokenizer", tokenizers, _TOKENIZER)
            views = [d.view for d in (first, other)]
            _compare(first, other, "view", views, _VIEW)
            topologies = [d.topology for d in (first, other)]
            _compare(first, other, "topology", topologies, _RANKS)
        for dataset in self.datasets:
            if dataset.tail != "wrap" or not dataset.shuffle:
                raise ConfigError(
                    "mixture_tail",
                    where=dataset.manifest.dataset,
                    tail=dataset.tail,
                    shuffle=dataset.shuffle,
                )


def _require_mixable(dataset: object, number: int) -> None:
    if not isinstance(dataset, StreamingDataset | IterableDatasetMixture):
        raise ConfigError(
            "mixture_dataset",
            where=dataset if isinstance(dataset, str) else getattr(dataset, "url", ""),
            number=number,
            type=type(dataset).__name__,
        )


def _source(
    dataset: StreamingDataset | IterableDatasetMixture, rate: float
) -> MixtureSource | MixtureGroup:
    if isinstance(dataset, IterableDatasetMixture):
        return MixtureGroup(sources=dataset.group.sources, by=dataset.group.by, rate=rate)
    split = dataset.manifest.splits[dataset.split]
    return MixtureSource(
        name=dataset.manifest.dataset,
        num_samples=dataset.num_samples,
        rate=rate,
        mean_tokens=split.num_tokens / max(1, split.num_samples),
    )


def _share_readers(datasets: Sequence[StreamingDataset]) -> None:
    """Lets datasets that are read alike share descriptors, threads, connections and memory."""
    first: dict[object, ShardReader] = {}
    for dataset in datasets:
        dataset.reader.share(first.setdefault(dataset.reader.settings, dataset.reader))


def _members(dataset: StreamingDataset | IterableDatasetMixture) -> tuple[StreamingDataset, ...]:
    return dataset.datasets if isinstance(dataset, IterableDatasetMixture) else (dataset,)


def _compare(
    first: StreamingDataset,
    other: StreamingDataset,
    what: str,
    values: Sequence[Any],
    fields: tuple[str, ...],
) -> None:
    """Refuses two datasets whose values differ in one of the fields, and names these."""
    ours, theirs = ({name: asdict(value)[name] for name in fields} for value in values)
    found = differences(ours, theirs, what)
    if found:
        raise ConfigError(
            f"mixture_{what}",
            where=f"{first.manifest.dataset} and {other.manifest.dataset}",
            differences="; ".join(found),
        )
