"""RawDataset: the samples of imported tars, in the order of the run, through a function of yours.

Order, states and topology are those of StreamingDataset; what differs is what a sample is: the
fields that somebody else stored, as bytes. The function makes anything of them: pictures and texts
for a pipeline of its own, or a training example, by preparing at load time what other datasets
prepare offline (`MolmoPreprocessor`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from loader.order import Order, Row, SampleRef, Tail, plan_order
from loader.reading import Check, Network, open_dataset
from loader.state import Cursor, split_fingerprint
from loader.stream import CACHE_BYTES, batches_ahead, require_batch_size
from loader.topology import find_topology
from shardspec.errors import ConfigError
from shardspec.foreign import sample_fields
from shardspec.keyed import SampleRng, dataset_seed, sample_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """One sample as it stands in a tar."""

    key: str
    fields: Mapping[str, memoryview]
    """Suffix in lower case ("jpg", "json", "cls.txt") to payload; pickles are left out."""
    where: str
    """Tar and key, for errors."""


Decode = Callable[[RawSample, np.random.RandomState], Any]
"""Makes an example of a sample; all draws are to come from the generator, the sample's own."""


class RawDataset(IterableDataset[Any]):
    """Streams a split of a dataset that `python -m preprocess import` made, or of recut ones."""

    def __init__(
        self,
        url: str,
        *,
        decode: Decode,
        split: str = "train",
        seed: int = 0,
        batch_size: int | None = None,
        shuffle: bool = True,
        tail: Tail = "wrap",
        rank: int | None = None,
        world_size: int | None = None,
        check: Check = "size",
        cache: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        network: Network | None = None,
        canonical_ranks: int | None = None,
    ) -> None:
        """Reads the manifest; opens no tar yet.

        Args:
          url: The dataset.
          decode: Makes an example of a sample. In worker processes it must be picklable.
          split, seed, batch_size, shuffle, tail, rank, world_size, check, cache, cache_bytes,
            network, canonical_ranks: As in `StreamingDataset`; with tail "pad", samples that fill
            the last batch are repeats.

        Raises:
          ManifestError: There is no readable manifest.
          ConfigError: `unknown_split`, `topology`, `prepared_dataset`.
        """
        super().__init__()
        self.url = str(url)
        self.manifest, self.reader = open_dataset(
            self.url,
            split=split,
            check=check,
            cache=cache,
            cache_bytes=cache_bytes,
            network=network,
        )
        if not self.manifest.raw:
            raise ConfigError("prepared_dataset", where=self.url)
        self.decode = decode
        self.split = split
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.tail: Tail = tail
        self.topology = find_topology(rank=rank, world_size=world_size)
        self.canonical_ranks = canonical_ranks
        self.num_samples = len(self.reader)
        self._base_seed = dataset_seed(seed, self.manifest.dataset)
        self._rng = SampleRng()
        self._cursor = Cursor()
        self._fingerprint: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the next pass gives."""
        return self._cursor.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass."""
        self._cursor.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run; see `StreamingDataset.set_step`."""
        self._cursor.set_step(self.order, step)

    @property
    def order(self) -> Order:
        """The order of the run at this batch size and world size."""
        return Order(
            plan_order(
                self.num_samples,
                global_batch_size=(self.batch_size or 1) * self.topology.world_size,
                seed=self._base_seed,
                tail=self.tail,
                shuffle=self.shuffle,
                canonical_ranks=self.canonical_ranks,
            )
        )

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return self._cursor.remaining(self.order) * (self.batch_size or 1)

    def __iter__(self) -> Iterator[Any]:
        """Gives this worker's share of the current epoch."""
        require_batch_size(self.batch_size)
        order = self.order
        return self._cursor.examples(
            order, batches_ahead(self, order), batch_size=self.batch_size or 1
        )

    @property
    def ahead_steps(self) -> int:
        """Steps that are best said ahead of their reading; 0 for local tars."""
        return self.reader.ahead_steps

    def prefetch(self, step: int, rows: Sequence[Row]) -> None:
        """Says which samples a step will need; steps come in increasing order."""
        self.reader.prefetch(step, [place.sample for row in rows for place in row])

    def release(self, step: int) -> None:
        """Says that a step's examples are made."""
        self.reader.release(step)

    def cancel_prefetch(self) -> None:
        """Drops what was said to be read: the run goes on at another step."""
        if self.reader.prefetcher is not None:
            self.reader.prefetcher.cancel_prefetch()

    def at(self, place: SampleRef) -> Any:
        """Makes the example of one place of the order."""
        return self.example(place.sample, epoch=place.epoch)

    def sample(self, sample_id: int) -> RawSample:
        """Reads one sample.

        Raises:
          ShardError: `foreign_tar`, or as `ShardReader.members`.
        """
        key, members, where = self.reader.members(sample_id)
        return RawSample(key=key, fields=sample_fields(members, where=where), where=where)

    def example(self, sample_id: int, *, epoch: int = 0) -> Any:
        """Makes the example of one sample in one epoch, whoever asks."""
        seed = sample_seed(self._base_seed, idx=sample_id, length=self.num_samples, epoch=epoch)
        return self.decode(self.sample(sample_id), self._rng(seed))

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data for states: the sequence of samples, whatever the tars' borders.

        Raises:
          ShardError: An index cannot be read.
        """
        if self._fingerprint is None:
            self._fingerprint = split_fingerprint(
                self.manifest, self.reader, split=self.split, num_samples=self.num_samples
            )
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Describes this process's place in its pass, for torchdata's StatefulDataLoader."""
        return self._cursor.state_dict(self._own_state())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a place that `state_dict` gave, for the next pass.

        Raises:
          StateError: `state_version`, `state_mismatch`.
        """
        self._cursor.load_state_dict(state, self._own_state())

    def _own_state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "data": self.fingerprint(),
            "order": self.order.config.to_dict(),
        }
