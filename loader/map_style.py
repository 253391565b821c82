"""MapStyle: a map-style dataset as one of a mixture, without shards.

What is numbered and can be asked for an example by its number is ordered, divided between ranks and
resumed as raw samples are. A `DeterministicDataset` gives its examples, preprocessed; any other
dataset gives what its `get` (or `[number]`) returns. The generator of an example is that of its
dataset, number and epoch in the run, as for samples of shards; a seed of the dataset's own has no
effect. Nothing is read ahead.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from loader.assembly import DeterministicDataset
from loader.raw import RawBuilder, RawSample
from loader.stream import DatasetPlan, OpenSplit, Stream, StreamPart
from loader.topology import CurrentTopology
from shardspec.errors import ConfigError

_CONTAINERS = (type, str, bytes, Mapping, list, tuple, range, np.ndarray, np.generic, torch.Tensor)
"""Have a length and numbered parts too, but are no datasets."""


def is_map_style(dataset: object) -> bool:
    """Returns True for what has a length, and examples by their numbers."""
    numbered = any(callable(getattr(dataset, name, None)) for name in ("get", "__getitem__"))
    container = isinstance(dataset, _CONTAINERS)
    return numbered and callable(getattr(dataset, "__len__", None)) and not container


class MapStyle:
    """A map-style dataset, as mixtures drive it."""

    def __init__(self, dataset: Any) -> None:
        """Wraps a dataset; reads nothing.

        Raises:
          ConfigError: `map_style_empty`.
        """
        data = _Numbered(dataset)
        if not data.num_samples:
            raise ConfigError("map_style_empty", where=data.title)
        plan = DatasetPlan(
            num_samples=data.num_samples,
            seed=0,
            tail="wrap",
            shuffle=True,
            canonical_ranks=None,
            active_blocks=None,
            block_size=None,
            locality="any",
        )
        shards = cast(OpenSplit, data)  # it has what the stream asks raw samples for
        part = StreamPart(
            data=shards,
            builder=RawBuilder(shards, decode=_decoder(dataset), seed=0, read=_numbered),
            topology=CurrentTopology(rank=None, world_size=None),
            tail="wrap",
            shuffle=True,
        )
        self._stream: Stream[RawBuilder] = Stream(
            [part], plan, seed=0, batch_size=None, named=False
        )

    def _over(self, stream: Stream[RawBuilder]) -> MapStyle:
        other = copy.copy(self)
        other._stream = stream
        return other

    def _resized(self, global_batch: int, *, sequence_length: int | None) -> MapStyle:  # noqa: ARG002
        return self._over(self._stream.resized(self._stream.parts, global_batch_size=global_batch))


def _numbered(sample_id: int) -> RawSample:
    return RawSample(key=str(sample_id), fields={}, where=f"example {sample_id}")


def _decoder(dataset: Any) -> Callable[[RawSample, np.random.RandomState], Any]:
    if isinstance(dataset, DeterministicDataset):
        return _Seeded(dataset)
    return _Got(dataset) if callable(getattr(dataset, "get", None)) else _Indexed(dataset)


@dataclass(frozen=True, slots=True)
class _Seeded:
    """Preprocesses, from the generator's beginning, as `DeterministicDataset.get` does."""

    dataset: DeterministicDataset

    def __call__(self, sample: RawSample, rng: np.random.RandomState) -> Any:
        return self.dataset.example(int(sample.key), rng)


@dataclass(frozen=True, slots=True)
class _Got:
    dataset: Any

    def __call__(self, sample: RawSample, rng: np.random.RandomState) -> Any:
        return self.dataset.get(int(sample.key), rng)


@dataclass(frozen=True, slots=True)
class _Indexed:
    dataset: Any

    def __call__(self, sample: RawSample, rng: np.random.RandomState) -> Any:  # noqa: ARG002
        return self.dataset[int(sample.key)]


class _Numbered:
    """What a stream asks of the data of raw samples (`OpenSplit`), of a map-style dataset."""

    subset = None
    ids_in_use = None
    questions = None
    group = ""
    mean_tokens = 0.0

    def __init__(self, dataset: Any) -> None:
        inner = dataset
        if isinstance(dataset, DeterministicDataset):
            inner = dataset.dataset
        self.kind = type(inner).__qualname__
        self.title = str(getattr(inner, "name", None) or type(inner).__name__)
        self.name = str(getattr(inner, "split", "train"))
        self.url = ""
        self.num_stored = self.num_samples = len(inner)
        self.manifest = _NoShards(dataset=self.title, splits={self.name: _Size(self.num_samples)})
        self.reader = _NoReader()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What states say: which dataset, and how many examples it has, but not what is in them."""
        names = {"dataset": self.title, "split": self.name, "kind": self.kind}
        return {**names, "num_samples": self.num_samples}

    def has_grown_from(self, saved: Mapping[str, Any]) -> bool:
        """Returns True if a fingerprint is that of this data before examples were appended."""
        then = saved.get("num_samples")
        grown = isinstance(then, int) and 0 < then < self.num_samples
        return grown and dict(saved) == {**self.fingerprint, "num_samples": then}

    def sample_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Gives the numbers themselves."""
        return numbers


@dataclass(frozen=True, slots=True)
class _Size:
    num_samples: int
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _NoShards:
    dataset: str
    splits: Mapping[str, _Size]
    raw: bool = True

    def select(self, split: str) -> tuple[()]:
        """Lists the shards of a split."""
        del split
        return ()


@dataclass(slots=True)
class _NoReader:
    """Reads nothing: examples come from the dataset."""

    settings: object = "map-style"
    prefetcher: None = None
    is_remote: bool = False
    ahead_steps: int = 0
    counters: Counter[str] = field(default_factory=Counter)

    def share(self, other: object) -> None: ...

    def prefetch(self, step: int, sample_ids: Iterable[int]) -> None: ...

    def release(self, step: int) -> None: ...
