"""StreamingDataset: the samples of a dataset's shards, in the order of the run, as examples.

A torch `IterableDataset`. One pass gives this rank's share of one epoch, batch by batch; which
samples stand in a batch follows from (seed, step) alone (order.py), so every rank has equally
many, and the number of DataLoader workers changes nothing: worker k of K makes the batches k, k +
K, ... of the pass, which is the sequence in which a DataLoader takes them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset

from loader.assemble import View, assemble
from loader.layout import IGNORED, TokenIds
from loader.order import Order, Tail, plan_order, rank_positions
from loader.reader import Check, ShardReader
from loader.topology import Topology, find_topology, find_worker
from shardspec import storage
from shardspec.errors import ConfigError, SampleError, ShardError, ShardsError
from shardspec.keyed import SampleRng, dataset_seed, keyed, sample_seed
from shardspec.manifest import Manifest, require_manifest
from shardspec.probe import TrainingTokenizer, check_tokenizer
from shardspec.tiling import ImageView, canvas_size, stored_size

logger = logging.getLogger(__name__)

OnBad = Literal["raise", "substitute"]

MAX_SUBSTITUTES = 8
"""Substitutes tried for one slot: with one sample in two bad, 1 slot in 500 would still fail."""

_PROBE_SIZES = ((4000, 3000), (3000, 4000), (4000, 4000), (6000, 1000), (1000, 6000))
"""Source sizes (width, height) on which a view is compared with the stored bound."""


class StreamingDataset(IterableDataset[dict[str, Any]]):
    """Streams a split of a dataset built by `make shards`."""

    def __init__(
        self,
        url: str,
        *,
        split: str = "train",
        seed: int = 0,
        batch_size: int | None = None,
        view: View | None = None,
        shuffle: bool = True,
        tail: Tail = "wrap",
        rank: int | None = None,
        world_size: int | None = None,
        check: Check = "size",
        on_bad: OnBad = "raise",
        tokenizer: TrainingTokenizer | None = None,
    ) -> None:
        """Reads the manifest; opens no shard yet.

        Args:
          url: Folder of the dataset.
          split: Split to stream.
          seed: Of the order and of every draw; with the dataset's name it makes the base seed.
          batch_size: Samples per batch of this rank, the same as the DataLoader's. Needed with
            more than one worker; without it batches have one sample as far as the order goes.
          view: What to see of the samples; None takes the view that the shards were made for.
          shuffle: False gives the stored order.
          tail: How an epoch ends: "wrap" (the next one begins inside the batch; nothing is dropped
            or repeated), "drop_last", or "pad" (evaluation: every sample once, and what fills the
            last batch has labels -100 throughout).
          rank, world_size: Data-parallel place; by default torch.distributed or the environment.
          check: "crc" verifies each sample's checksum as it is read.
          on_bad: What a sample that cannot be read or laid out does: it raises, or another sample,
            chosen by hash, takes its slot, which `metadata["substitutes"]` and `bad` record.
          tokenizer: The run's Hugging Face tokenizer, to be compared with the shards'.

        Raises:
          ManifestError: There is no readable manifest.
          ConfigError: `unknown_split`, `view_bound`, `tokenizer_mismatch`, `topology`,
            `remote_url`.
        """
        super().__init__()
        if not storage.is_local(url):
            raise ConfigError(
                "streaming from object stores is not there yet",
                reason="remote_url",
                where=url,
                fix="copy the dataset to a local disk",
            )
        self.url = str(url)
        self.manifest = require_manifest(self.url)
        self.split = split
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.tail: Tail = tail
        self.topology: Topology = find_topology(rank=rank, world_size=world_size)
        self.reader = ShardReader(self.url, self.manifest, split=split, check=check)
        self.ids = TokenIds.from_special_ids(self.manifest.tokenizer.special_ids)
        self.view = view or View(image=stored_view(self.manifest))
        check_view(self.manifest, self.view.image, where=self.url)
        if tokenizer is not None:
            check_tokenizer(self.manifest.tokenizer, tokenizer, where=self.url)
        self.on_bad: OnBad = on_bad
        self.bad: Counter[str] = Counter()
        """Samples substituted in this process, by reason."""
        self._base_seed = dataset_seed(seed, self.manifest.dataset)
        self._rng = SampleRng()
        # Shared memory, so that persistent workers see a new epoch as well.
        self._epoch = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]

    @property
    def epoch(self) -> int:
        """The epoch that the next pass gives."""
        return int(self._epoch.item())

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass, as DistributedSampler's method does."""
        self._epoch.fill_(epoch)

    def with_batch_size(self, batch_size: int, *, sequence_length: int | None) -> StreamingDataset:
        """Makes a dataset that shares the manifest, for another batch size or sequence length."""
        length = sequence_length or self.view.sequence_length
        return StreamingDataset(
            self.url,
            split=self.split,
            seed=self.seed,
            batch_size=batch_size,
            view=replace(self.view, sequence_length=length),
            shuffle=self.shuffle,
            tail=self.tail,
            rank=self.topology.rank,
            world_size=self.topology.world_size,
            check=self.reader.check,
            on_bad=self.on_bad,
        )

    @property
    def num_samples(self) -> int:
        """Samples in the split."""
        return len(self.reader)

    @property
    def order(self) -> Order:
        """The order of the run at this batch size and world size."""
        batch_size = 1 if self.batch_size is None else self.batch_size
        return Order(
            plan_order(
                len(self.reader),
                global_batch_size=batch_size * self.topology.world_size,
                seed=self._base_seed,
                tail=self.tail,
                shuffle=self.shuffle,
            )
        )

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the current epoch; equal on all ranks."""
        return self.order.num_steps(self.epoch) * (self.batch_size or 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives this worker's share of the current epoch."""
        worker, num_workers = find_worker()
        if num_workers > 1 and self.batch_size is None:
            raise ConfigError(
                "with several workers the dataset must know the batch size",
                reason="batch_size",
                facts={"num_workers": num_workers},
                fix="pass the DataLoader's batch_size to StreamingDataset too: the order must not "
                "depend on the number of workers",
            )
        order, epoch = self.order, self.epoch
        start = order.epoch_start(epoch)
        stop = start + order.num_steps(epoch)
        for step in range(start + worker, stop, num_workers):
            yield from self.batch(order, step)

    def batch(self, order: Order, step: int) -> list[dict[str, Any]]:
        """Makes this rank's examples of one step."""
        batch_size = order.config.global_batch_size
        positions = rank_positions(self.topology.rank, self.topology.world_size, batch_size)
        slots = order.slots(step, positions)
        examples = []
        for sample, epoch, real in zip(
            slots.sample.tolist(), slots.epoch.tolist(), slots.real.tolist(), strict=True
        ):
            example = self.example(sample, epoch=epoch)
            if not real:
                example["labels"] = np.full_like(example["labels"], IGNORED)
                example["loss_weights"] = np.zeros_like(example["loss_weights"])
            examples.append(example)
        return examples

    def example(self, sample_id: int, *, epoch: int = 0) -> dict[str, Any]:
        """Makes the example of one sample in one epoch, whoever asks.

        Raises:
          ShardError: The sample cannot be read; see `ShardReader.read`.
          SampleError: It cannot be laid out; see `assemble`.
        """
        first: ShardsError | None = None
        for attempt in range(1 + MAX_SUBSTITUTES):
            number = sample_id
            if attempt:
                number = keyed(self._base_seed, sample_id, epoch, attempt) % len(self.reader)
            try:
                example = self._example(number, epoch)
            except (SampleError, ShardError) as error:
                if self.on_bad == "raise":
                    raise
                self._count(error)
                first = first or error
                continue
            if first is not None:
                example["metadata"]["substitutes"] = {"sample": sample_id, "reason": first.reason}
            return example
        assert first is not None
        raise first

    def _example(self, number: int, epoch: int) -> dict[str, Any]:
        seed = sample_seed(self._base_seed, idx=number, length=len(self.reader), epoch=epoch)
        return assemble(self.reader.read(number), self._rng(seed), view=self.view, ids=self.ids)

    def _count(self, error: ShardsError) -> None:
        if error.reason not in self.bad:
            logger.warning("a sample is substituted (logged once per reason): %s", error)
        self.bad[error.reason] += 1


def stored_view(manifest: Manifest) -> ImageView:
    """Gives the view that a dataset's images were stored for."""
    return ImageView.from_dict(manifest.recipe["image"]["views"][0])


def check_view(manifest: Manifest, view: ImageView, *, where: str) -> None:
    """Refuses a view that asks for more pixels than were stored.

    Raises:
      ConfigError: `view_bound`.
    """
    image = manifest.recipe["image"]
    views = [ImageView.from_dict(stored) for stored in image["views"]]
    if view in views:
        return
    for width, height in _PROBE_SIZES:
        if image["max_side_px"]:
            # It bounds the longer side; the other one is whatever the picture's shape leaves.
            have = (image["max_side_px"], image["max_side_px"])
        else:
            have = stored_size(width, height, views, headroom=image["headroom"])
        want = canvas_size(width, height, view)
        # No side is ever stored larger than the source's: views enlarge such pictures at load.
        if min(want[0], width) > have[0] or min(want[1], height) > have[1]:
            raise ConfigError(
                "the view asks for more pixels than the shards hold",
                reason="view_bound",
                where=where,
                facts={"source": f"{width}x{height}", "stored": have, "wanted": want},
                fix="use the view that the shards were made for, or build them with a larger "
                "IMAGE_SIZE= or IMAGE_BOUND=",
            )
