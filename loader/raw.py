"""RawDataset: the samples of imported tars, in the order of the run, through a function of yours.

Order, states and topology are those of every stream; what differs is what a sample is: the fields
that somebody else stored, as bytes. The function makes anything of them: pictures and texts for a
pipeline of its own, or a training example, by preparing at load time what other datasets prepare
offline (`MolmoPreprocessor`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset

from loader.order import Locality, SampleRef, Tail
from loader.reading import Check, Network
from loader.stream import (
    CACHE_BYTES,
    Keys,
    OpenSplit,
    Stream,
    StreamOptions,
    require_argument,
)
from loader.user_code import naming_function
from shardspec.errors import ConfigError
from shardspec.foreign import sample_fields
from shardspec.keyed import SampleRng, dataset_seed, sample_seed
from shardspec.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSample:
    """One sample as it is stored in a tar."""

    key: str
    fields: Mapping[str, memoryview]
    """Suffix in lower case ("jpg", "json", "cls.txt") to payload; pickles are left out."""
    where: str
    """Tar and key, for errors."""
    real: bool = True
    """False for a repeat that fills the last batch of an evaluation (tail "pad")."""


Decode = Callable[[RawSample, np.random.RandomState], Any]
"""Makes an example of a sample; all draws are to come from the generator, the sample's own."""


class RawBuilder:
    """Makes the examples of a dataset of raw samples."""

    def __init__(
        self,
        data: OpenSplit,
        *,
        decode: Decode,
        seed: int,
        read: Callable[[int], RawSample] | None = None,
    ) -> None:
        """Joins a split and the user's function.

        Args:
          data: The split.
          decode: Makes an example of a sample.
          seed: Of the run.
          read: Reads a sample that is in no tar.
        """
        self.data = data
        self._read = read
        self._decode = decode
        self._base_seed = dataset_seed(seed, data.manifest.dataset, data.name)
        self._rng = SampleRng()

    def in_mixture(self, *, seed: int) -> RawBuilder:
        """Makes the builder of the same dataset in a mixture, whose seed is that of the run."""
        other = copy.copy(self)
        other._base_seed = dataset_seed(seed, self.data.manifest.dataset, self.data.name)
        return other

    def with_sequence_length(self, sequence_length: int | None) -> RawBuilder:  # noqa: ARG002
        """Gives this builder: how long an example is, is up to the user's function."""
        return self

    def view_fingerprint(self) -> None:
        """States say nothing of the user's function, which has no fingerprint."""
        return

    def restore_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes over nothing: bad raw samples are never substituted."""

    def example(self, ref: SampleRef) -> Any:
        """Makes the example of a slot."""
        return self.decode(self.read(ref.sample), ref)

    def read(self, sample_id: int) -> RawSample:
        """Reads one sample.

        Raises:
          ShardError: `foreign_tar`, or as `ShardReader.members`.
        """
        if self._read is not None:
            return self._read(sample_id)
        key, members, where = self.data.reader.members(sample_id)
        fields = sample_fields(members, where=where, key=key)
        return RawSample(key=key, fields=fields, where=where)

    def decode(self, sample: RawSample, ref: SampleRef) -> Any:
        """Calls the user's function with the sample's generator in the slot's epoch."""
        seed = sample_seed(
            self._base_seed, idx=ref.sample, length=self.data.num_stored, epoch=ref.epoch
        )
        if not ref.real:
            sample = replace(sample, real=False)
        with naming_function(self._decode, where=sample.where):
            return self._decode(sample, self._rng(seed))


class RawDataset(IterableDataset[Any]):
    """Streams a split of imported tars, what `python -m preprocess import` or a reshard made."""

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
        check: Check = "crc",
        cache: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        network: Network | None = None,
        canonical_ranks: int | None = None,
        active_blocks: int | None = None,
        block_size: int | None = None,
        locality: Locality = "any",
        max_samples: int | None = None,
        where: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        """Reads the manifest; opens no tar yet.

        Args:
          url: The dataset.
          decode: Makes an example of a sample. It may be called from several threads at a time; in
            worker processes it must be picklable.
          split: As in `StreamingDataset`, and so are all arguments that follow.
          tail: With "pad", samples that fill the last batch are repeats, with `RawSample.real`
            False.
          where: A condition on the columns `num_bytes` and `num_members`.

        Raises:
          ManifestError: There is no readable manifest.
          ConfigError: `argument`, `unknown_split`, `topology`, `prepared_dataset`, `max_samples`,
            `filter_expression`, `keys_file`, `keys_type`, `empty_result`.
          ShardError: With `where` or `keys`: an index cannot be read.
        """
        super().__init__()
        options = StreamOptions(
            url=url,
            split=split,
            seed=seed,
            batch_size=batch_size,
            shuffle=shuffle,
            tail=tail,
            rank=rank,
            world_size=world_size,
            check=check,
            cache=cache,
            cache_bytes=cache_bytes,
            network=network,
            canonical_ranks=canonical_ranks,
            active_blocks=active_blocks,
            block_size=block_size,
            locality=locality,
            max_samples=max_samples,
            where=where,
            keys=keys,
        )
        require_argument(callable(decode), "decode", decode, "a function")
        data = options.open()
        if not data.manifest.raw:
            raise ConfigError("prepared_dataset", where=data.url)
        self._use(options.stream(data, RawBuilder(data, decode=decode, seed=options.seed)))

    def _use(self, stream: Stream[RawBuilder]) -> None:
        (part,) = stream.parts
        self._stream = stream
        """What the loader and mixtures drive."""
        self.manifest: Manifest = part.data.manifest
        self.reader = part.data.reader
        """Counts what was fetched over the network."""
        self.num_samples = part.data.num_samples
        """Samples in use."""

    def _resized(self, global_batch: int, *, sequence_length: int | None) -> RawDataset:  # noqa: ARG002
        """Makes a dataset that shares what is open, at another batch size."""
        return self._over(self._stream.resized(self._stream.parts, global_batch_size=global_batch))

    def _over(self, stream: Stream[RawBuilder]) -> RawDataset:
        other = copy.copy(self)
        other._use(stream)
        return other

    @property
    def epoch(self) -> int:
        """The epoch that the next pass gives."""
        return self._stream.cursor.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass."""
        self._stream.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run; see `StreamingDataset.set_step`."""
        self._stream.set_step(step)

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return len(self._stream)

    def __iter__(self) -> Iterator[Any]:
        """Gives this worker's share of the current epoch."""
        return iter(self._stream)

    def sample(self, sample_id: int) -> RawSample:
        """Reads one sample.

        Raises:
          ShardError: `foreign_tar`, or as `ShardReader.members`.
        """
        return self._stream.parts[0].builder.read(sample_id)

    def example(self, sample_id: int, *, epoch: int = 0) -> Any:
        """Makes the example of one sample in one epoch, the same in every process."""
        return self._stream.parts[0].builder.example(SampleRef(0, epoch, sample_id))

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data, as states do: the sequence of samples, whatever the tars' borders.

        Raises:
          ShardError: An index cannot be read.
        """
        return self._stream.fingerprint()

    def state_dict(self) -> dict[str, Any]:
        """Describes how far this process is in its pass, for torchdata's StatefulDataLoader."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, for the next pass.

        Raises:
          StateError: `state_version`, `state_mismatch`.
        """
        self._stream.load_state_dict(state)
