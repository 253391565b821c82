"""IterableDatasetMixture: several datasets as one, in proportions that never drift.

The mixture decides weights; `loader.order` turns them into the order; each dataset makes its own
examples, with its own seed (of the run's seed and its name), its own epochs and its own settings.
Prepared samples must agree in what a batch is made of: the tokenizer and the shapes of the view.
What raw samples become is up to the user's functions, so nothing is compared there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from loader.assembly import TokenIds, View
from loader.map_style import MapStyle, is_map_style
from loader.order import (
    Locality,
    MixtureGroup,
    MixtureOrder,
    MixtureSource,
    Stop,
    Unit,
    Weighting,
    plan_mixture,
    require_stop,
)
from loader.raw import RawDataset
from loader.reading import ShardReader
from loader.state import Allowed
from loader.stream import (
    DatasetPlan,
    PreparedBuilder,
    Stream,
    StreamingDataset,
    StreamPart,
    is_listed,
    name_argument,
    require_argument,
    seed_argument,
    whole_argument,
)
from shardspec.errors import ConfigError
from shardspec.keyed import dataset_seed
from shardspec.manifest import differences


class MapStyleDataset(Protocol):
    """A dataset whose examples are asked for by their numbers."""

    def __len__(self) -> int:
        """Counts the examples."""

    def __getitem__(self, item: int, /) -> Any:
        """Makes an example."""


_TOKENIZER = ("sha256", "special_ids")
_RANKS = ("rank", "world_size")
_VIEW = ("image", "pixels", "normalize", "image_map", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePlan:
    """The order of a mixture; see `plan_mixture`."""

    group: MixtureGroup
    """The weights as they were given."""
    seed: int
    unit: Unit
    stop: Stop | int
    canonical_ranks: int | None
    locality: Locality

    def order(self, *, global_batch_size: int) -> MixtureOrder:
        """Plans the order of a run with a batch size."""
        config = plan_mixture(
            self.group,
            global_batch_size=global_batch_size,
            seed=self.seed,
            unit=self.unit,
            canonical_ranks=self.canonical_ranks,
            locality=self.locality,
        )
        return MixtureOrder(config, stop=self.stop)


class IterableDatasetMixture(IterableDataset[Any]):
    """Streams several datasets, or mixtures of them, in fixed proportions."""

    def __init__(
        self,
        datasets: Sequence[
            StreamingDataset | RawDataset | IterableDatasetMixture | MapStyleDataset
        ],
        weights: Sequence[float] | None = None,
        *,
        seed: int,
        by: Weighting = "rate",
        unit: Unit = "samples",
        stop: Stop | int = "first_exhausted",
        batch_size: int | None = None,
        canonical_ranks: int | None = None,
        locality: Locality = "any",
    ) -> None:
        """Joins datasets; opens no shard yet.

        Args:
          datasets: Datasets of different names, all of prepared samples or all of raw ones, with
            tail "wrap" and shuffled. Map-style datasets (with a length and `get` or `[number]`,
            such as a `DeterministicDataset`) count as raw ones; their examples come as they are
            made. They are copied for the run's seed and stay as they are. A
            mixture among them takes its share as a whole and divides it among its own datasets by
            its own weights.
          weights: A rate >= 0 for each; None: all the same.
          seed: Of the run: of the order and of every draw. Seeds of the datasets and mixtures in it
            have no effect; their other settings of an order (batch_size, canonical_ranks, locality,
            stop, active_blocks, block_size) are refused unless they are this mixture's.
          by: What rates multiply: nothing ("rate"), the square root of the number of samples
            ("root_size", as in the Molmo family) or the number itself ("size").
          unit: Whether weights are shares of samples or of tokens; a mixture among the datasets
            divides its share by its own unit. A dataset's tokens per sample are its manifest's, or
            those of its subset (`where`): text, each turn at its longest variant.
          stop: Where a pass ends: when the first, or the last ("all_exhausted"), dataset has been
            seen once, or after a number of steps. The next pass continues from there.
          batch_size: Samples per batch of this rank, the same as the DataLoader's.
          canonical_ranks: See `StreamingDataset`.
          locality: See `StreamingDataset`.

        Raises:
          ConfigError: `argument`; `mixture_view`, `mixture_tokenizer` (naming the differences),
            `mixture_topology`, `mixture_tail`; `mixture_order`, one has settings of an order of its
            own; `mixture_dataset`, one of them is something else;
            `mixture_kinds`, some are raw and some prepared; `mixture_empty`, `mixture_twice`,
            `mixture_weights`, `mixture_mean_tokens`, `mixture_unit`, `mixture_stop`.
        """
        super().__init__()
        require_argument(is_listed(datasets), "datasets", datasets, "a list of datasets")
        given = list(datasets)
        seed = seed_argument(seed)
        for name, value in (("batch_size", batch_size), ("canonical_ranks", canonical_ranks)):
            if value is not None:
                whole_argument(name, value)
        name_argument("locality", locality, Locality)
        members = [_mixable(dataset, number) for number, dataset in enumerate(given)]
        rates = [1.0] * len(members) if weights is None else _rates(weights)
        if len(rates) != len(members):
            raise ConfigError("mixture_weights.count", datasets=len(members), weights=len(rates))
        group = MixtureGroup(
            sources=tuple(_source(d, rate) for d, rate in zip(members, rates, strict=True)),
            by=by,
            unit=unit,
        )
        plan = MixturePlan(
            group=group,
            seed=seed,
            unit=unit,
            stop=stop,
            canonical_ranks=canonical_ranks,
            locality=locality,
        )
        # Refuses what cannot be mixed now, not at the first batch.
        plan_mixture(group, global_batch_size=1, seed=seed, unit=unit)
        require_stop(stop)
        for dataset in members:
            _require_free(dataset, plan, batch_size=batch_size)
        flat = [member for dataset in members for member in _members(dataset)]
        parts = [part for dataset in flat for part in dataset._stream.parts]
        _share_readers([part.data.reader for part in parts])
        _require_alike(parts)
        self.datasets = tuple(_in_mixture(dataset, seed=seed) for dataset in flat)
        """The datasets of the flat mixture, as the order numbers them."""
        self._stream: Stream[Any] = Stream(
            _parts(self.datasets), plan, seed=seed, batch_size=batch_size, named=True
        )
        self.num_samples = self._stream.num_samples
        """Samples of all datasets."""

    @property
    def ids(self) -> TokenIds:
        """The special ids of all datasets; raw ones have none."""
        return self._first_prepared().ids

    @property
    def view(self) -> View:
        """The first dataset's view: its shapes are all datasets'; raw ones have none."""
        return self._first_prepared().view

    @property
    def epoch(self) -> int:
        """The pass that is given next."""
        return self._stream.cursor.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the next pass, as DistributedSampler's method does."""
        self._stream.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run; see `StreamingDataset.set_step`."""
        self._stream.set_step(step)

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return len(self._stream)

    def __iter__(self) -> Iterator[Any]:
        """Gives this worker's share of the next pass; prepared examples name their dataset."""
        return iter(self._stream)

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data of each dataset by its name, as states do.

        Raises:
          ShardError: An index cannot be read.
        """
        return self._stream.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        """Describes how far this process is in its pass, for torchdata's StatefulDataLoader."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Sequence[Allowed] = ()) -> None:
        """Restores what `state_dict` gave, for the next pass.

        Args:
          state: A state of this rank and worker.
          allow: ("view",) takes a state that was saved with other views.

        Raises:
          StateError, ConfigError: As `require_state`.
        """
        self._stream.load_state_dict(state, allow=allow)

    def _resized(self, global_batch: int, *, sequence_length: int | None) -> IterableDatasetMixture:
        """Makes a mixture of the same datasets, at another batch size or sequence length."""
        other = copy.copy(self)
        other.datasets = tuple(
            dataset._resized(global_batch, sequence_length=sequence_length)
            for dataset in self.datasets
        )
        other._stream = self._stream.resized(_parts(other.datasets), global_batch_size=global_batch)
        return other

    def _first_prepared(self) -> PreparedBuilder:
        builder = self._stream.parts[0].builder
        if not isinstance(builder, PreparedBuilder):
            raise ConfigError("raw_dataset", where=self._stream.parts[0].data.url)
        return builder


_Single = StreamingDataset | RawDataset | MapStyle
_Mixable = StreamingDataset | RawDataset | MapStyle | IterableDatasetMixture


def _rates(weights: Any) -> list[Any]:
    """Lists weights: numbers of Python, or those of an array or tensor of one axis."""
    fits = is_listed(weights) and getattr(weights, "ndim", 1) == 1
    require_argument(fits, "weights", weights, "a list of numbers")
    return weights.tolist() if hasattr(weights, "tolist") else list(weights)


def _mixable(dataset: Any, number: int) -> _Mixable:
    if isinstance(dataset, StreamingDataset | RawDataset | IterableDatasetMixture):
        return dataset
    if isinstance(dataset, IterableDataset) or not is_map_style(dataset):
        raise ConfigError(
            "mixture_dataset",
            where=dataset if isinstance(dataset, str) else getattr(dataset, "url", ""),
            number=number,
            type=type(dataset).__name__,
        )
    return MapStyle(dataset)


def _source(dataset: _Mixable, rate: float) -> MixtureSource | MixtureGroup:
    if isinstance(dataset, IterableDatasetMixture):
        plan = dataset._stream.plan
        assert isinstance(plan, MixturePlan)
        return replace(plan.group, rate=rate)
    data = dataset._stream.parts[0].data
    return MixtureSource(
        name=data.title,
        num_samples=data.num_samples,
        rate=rate,
        mean_tokens=data.mean_tokens,
    )


def _members(dataset: _Mixable) -> Sequence[_Single]:
    return dataset.datasets if isinstance(dataset, IterableDatasetMixture) else (dataset,)


def _in_mixture(dataset: _Single, *, seed: int) -> _Single:
    """Copies a dataset for a mixture, whose seed is that of the run."""
    stream: Stream[Any] = dataset._stream
    (part,), plan = stream.parts, stream.plan
    assert isinstance(plan, DatasetPlan)
    plan = replace(plan, seed=dataset_seed(seed, part.data.manifest.dataset, part.data.name))
    part = replace(part, builder=part.builder.in_mixture(seed=seed))
    return dataset._over(Stream([part], plan, seed=seed, batch_size=stream.batch_size, named=False))


def _parts(datasets: Sequence[_Single]) -> list[StreamPart[Any]]:
    return [part for dataset in datasets for part in dataset._stream.parts]


def _share_readers(readers: Sequence[ShardReader]) -> None:
    """Lets readers that are alike share descriptors, threads, connections and memory."""
    first: dict[object, ShardReader] = {}
    for reader in readers:
        reader.share(first.setdefault(reader.settings, reader))


def _require_free(
    dataset: _Mixable,
    outer: MixturePlan,
    *,
    batch_size: int | None,
) -> None:
    """Refuses a dataset or mixture with settings of an order of its own, unless they are the
    mixture's too: it would ignore them."""
    stream: Stream[Any] = dataset._stream
    plan = stream.plan
    assert isinstance(plan, DatasetPlan | MixturePlan)
    # (setting, given, what a mixture does about it); None was not given.
    settings: list[tuple[str, object, object]] = [
        ("batch_size", stream.batch_size, batch_size),
        ("canonical_ranks", plan.canonical_ranks, outer.canonical_ranks),
        ("locality", None if plan.locality == "any" else plan.locality, outer.locality),
    ]
    if isinstance(plan, MixturePlan):
        stop = None if plan.stop == "first_exhausted" else plan.stop
        settings.append(("stop", stop, outer.stop))
    else:
        settings += [
            ("active_blocks", plan.active_blocks, None),
            ("block_size", plan.block_size, None),
        ]
    found = [name for name, own, whole in settings if own is not None and own != whole]
    if found:
        names = [part.data.title for part in stream.parts]
        raise ConfigError("mixture_order", where=", ".join(names), settings=", ".join(found))


def _require_alike(parts: Sequence[StreamPart[Any]]) -> None:
    """Refuses datasets that cannot share a batch, and names what differs."""
    raw = [part.data.title for part in parts if part.data.manifest.raw]
    prepared = [part.data.title for part in parts if not part.data.manifest.raw]
    if raw and prepared:
        raise ConfigError(
            "mixture_kinds", where=", ".join(raw + prepared), raw=raw, prepared=prepared
        )
    first, *others = parts
    for other in others:
        if not raw:
            tokenizers = [part.data.manifest.tokenizer for part in (first, other)]
            _compare(first, other, "tokenizer", tokenizers, _TOKENIZER)
            views = [part.builder.view for part in (first, other)]
            same = views[0].features == views[1].features
            _compare(first, other, "view", views, _VIEW if same else (*_VIEW, "features"))
        topologies = [part.topology.now() for part in (first, other)]
        _compare(first, other, "topology", topologies, _RANKS)
    for part in parts:
        if part.tail != "wrap" or not part.shuffle:
            raise ConfigError(
                "mixture_tail",
                where=part.data.title,
                tail=part.tail,
                shuffle=part.shuffle,
            )


def _compare(
    first: StreamPart[Any],
    other: StreamPart[Any],
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
            where=f"{first.data.title} and {other.data.title}",
            differences="; ".join(found),
        )
