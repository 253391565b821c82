"""StreamingDataset: the samples of a dataset's shards, in the order of the run, as examples.

A torch `IterableDataset`. One pass gives this rank's share of one epoch, batch by batch; which
samples stand in a batch follows from (seed, step) alone (order.py), so every rank has equally
many, and the number of DataLoader workers changes nothing: worker k of K makes the batches k, k +
K, ... of the pass, which is the sequence in which a DataLoader takes them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal, Protocol

import numpy as np
from torch.utils.data import IterableDataset

from loader.assembly import Draft, Planner, TokenIds, View, finished
from loader.buffers import Scratch
from loader.order import (
    MixtureOrder,
    Order,
    Row,
    SampleRef,
    SlotSchedule,
    Tail,
    epoch_of,
    plan_order,
)
from loader.reading import Check, LookaheadWindow, Network, Quarantine, ShardReader, open_dataset
from loader.state import Allowed, Cursor, keys_fingerprint, split_fingerprint, view_fingerprint
from loader.topology import Topology, find_topology, find_worker
from shardspec.errors import ConfigError, SampleError, ShardError, ShardsError
from shardspec.keyed import SampleRng, dataset_seed, keyed, sample_seed
from shardspec.manifest import Manifest
from shardspec.probe import TrainingTokenizer, check_tokenizer
from shardspec.tiling import ImageView, canvas_size, stored_size

OnBad = Literal["raise", "substitute"]

MAX_SUBSTITUTES = 8
"""Substitutes tried for one slot: with one sample in two bad, 1 slot in 500 would still fail."""

CACHE_BYTES = 64 * 2**30
"""Default bound of a cache."""

_PROBE_SIZES = (
    (4000, 3000),
    (3000, 4000),
    (4000, 4000),
    (6000, 1000),
    (1000, 6000),
    (8000, 200),
    (200, 8000),
)
"""Source sizes (width, height) on which a view is compared with the stored bound."""


@dataclass(slots=True, kw_only=True)
class PlannedExample:
    """An example whose arrays are not made yet, and what it took to get there."""

    draft: Draft
    """It names whom it is a substitute for: `Quarantine.record`."""
    attempt: int = 0
    """0, or the number of the substitute."""
    read_s: float
    """Seconds spent on reading."""
    plan_s: float
    """Seconds spent on draws and layout."""
    num_bytes: int
    """Of the sample as it is stored."""


class ExamplePlanner(Protocol):
    """What makes pending examples: a dataset or a mixture."""

    def plan_example(
        self, place: SampleRef, *, after_failed: PlannedExample | None = None
    ) -> PlannedExample:
        """Makes the example of a place, or the one behind it."""


def with_pictures(source: ExamplePlanner, place: SampleRef) -> dict[str, Any]:
    """Makes the whole example of a place; broken pictures are substituted as the source wants.

    Raises:
      ShardError, SampleError: As `StreamingDataset.pending`.
    """
    made = source.plan_example(place)
    while True:
        try:
            return finished(made.draft)
        except (SampleError, ShardError):
            made = source.plan_example(place, after_failed=made)


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
        max_bad_rate: float | None = None,
        cache: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        network: Network | None = None,
        tokenizer: TrainingTokenizer | None = None,
        canonical_ranks: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        """Reads the manifest; opens no shard yet.

        Args:
          url: Folder of the dataset, or its place in an object store (s3://, gs://, ...).
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
          check: "crc" verifies each sample's checksum as it is read; of remote ones that is always
            done.
          on_bad: What a sample that cannot be read or laid out does: it raises, or another sample,
            chosen by hash, takes its slot, which `metadata["substitutes"]` and `bad` record. A
            store that does not answer is no bad sample: it always raises.
          max_bad_rate: With on_bad "substitute": share of bad samples, counted per process, above
            which to stop after all; None: never.
          cache: Folder on the node's disk, shared by its ranks and workers, that keeps what was
            fetched of a remote dataset; None: only memory. Best a fast disk with room for the
            node's share of the data.
          cache_bytes: Most bytes in the cache.
          network: How remote shards are read.
          tokenizer: The run's Hugging Face tokenizer, to be compared with the shards'.
          canonical_ranks: See `plan_order`; set it where the default does not suit the numbers of
            ranks that the run may have. It cannot change during a run.
          max_samples: Use only the first so many samples: goes on with a run whose dataset has
            grown since.

        Raises:
          ManifestError: There is no readable manifest.
          ConfigError: `unknown_split`, `view_bound`, `tokenizer_mismatch`, `topology`,
            `cache_bytes`, `cache_foreign`, `raw_dataset`, `max_samples`.
          StorageError: The store does not answer.
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
        if self.manifest.raw:
            raise ConfigError("raw_dataset", where=self.url)
        self.split = split
        self.seed = seed
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.tail: Tail = tail
        self.topology: Topology = find_topology(rank=rank, world_size=world_size)
        self.ids = TokenIds.from_special_ids(self.manifest.tokenizer.special_ids)
        self.view = view or View(image=stored_view(self.manifest))
        for image in filter(None, (self.view.image, self.view.high_res)):
            check_view(self.manifest, image, where=self.url)
        if tokenizer is not None:
            check_tokenizer(self.manifest.tokenizer, tokenizer, where=self.url)
        self.on_bad: OnBad = on_bad
        self.quarantine = Quarantine(max_rate=max_bad_rate)
        """Samples substituted in this process; shared with the loader's copy."""
        self.canonical_ranks = canonical_ranks
        if max_samples is not None and not 1 <= max_samples <= len(self.reader):
            raise ConfigError(
                "max_samples",
                where=self.url,
                num_reader=len(self.reader),
                got=max_samples,
                samples=len(self.reader),
            )
        self.num_samples = len(self.reader) if max_samples is None else max_samples
        """Samples in use: those of the split, or the first `max_samples` of them."""
        self._base_seed = dataset_seed(seed, self.manifest.dataset)
        self._planner = Planner(self.view, self.ids)
        self._rng = SampleRng()
        self._scratch = Scratch()
        self._cursor = Cursor()
        self._fingerprint: dict[str, Any] | None = None

    @property
    def bad(self) -> Counter[str]:
        """Samples substituted in this process, by reason."""
        return self.quarantine.counts

    @property
    def readers(self) -> list[ShardReader]:
        """What reads the shards."""
        return [self.reader]

    @property
    def epoch(self) -> int:
        """The epoch that the next pass gives."""
        return self._cursor.epoch

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass, as DistributedSampler's method does."""
        self._cursor.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Lets the next pass begin at a step of the run, for resuming under a plain DataLoader.

        Args:
          step: Batches that the run has taken so far, over all epochs. The pass ends with that
            step's epoch; `set_epoch` chooses the next one.
        """
        self._cursor.set_step(self.order, step)

    def with_batch_size(self, batch_size: int, *, sequence_length: int | None) -> StreamingDataset:
        """Makes a dataset that shares the manifest, for another batch size or sequence length."""
        length = sequence_length or self.view.sequence_length
        return self._copy(
            batch_size=batch_size, view=replace(self.view, sequence_length=length), seed=self.seed
        )

    def with_seed(self, seed: int) -> StreamingDataset:
        """Makes a dataset that shares the manifest, in a run of another seed."""
        return self._copy(batch_size=self.batch_size, view=self.view, seed=seed)

    def _copy(self, *, batch_size: int | None, view: View, seed: int) -> StreamingDataset:
        other = copy.copy(self)
        other.batch_size, other.view, other.seed = batch_size, view, seed
        other._planner = Planner(view, self.ids)
        other._base_seed = dataset_seed(seed, self.manifest.dataset)
        other._cursor = Cursor()
        return other

    @property
    def order(self) -> Order:
        """The order of the run at this batch size and world size."""
        batch_size = 1 if self.batch_size is None else self.batch_size
        return Order(
            plan_order(
                self.num_samples,
                global_batch_size=batch_size * self.topology.world_size,
                seed=self._base_seed,
                tail=self.tail,
                shuffle=self.shuffle,
                canonical_ranks=self.canonical_ranks,
            )
        )

    def __len__(self) -> int:
        """Counts the samples that this rank gets in the next pass; equal on all ranks."""
        return self._cursor.remaining(self.order) * (self.batch_size or 1)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives this worker's share of the current epoch."""
        require_batch_size(self.batch_size)
        order = self.order
        return self._cursor.examples(
            order, batches_ahead(self, order), batch_size=self.batch_size or 1
        )

    @property
    def ahead_steps(self) -> int:
        """Steps that are best said ahead of their reading (`prefetch`); 0 for local shards."""
        return self.reader.ahead_steps

    def prefetch(self, step: int, rows: Sequence[Row]) -> None:
        """Says which samples a step will need; steps come in increasing order."""
        self.reader.prefetch(step, [place.sample for row in rows for place in row])

    def release(self, step: int) -> None:
        """Says that a step's batch is made."""
        self.reader.release(step)

    def restore_bad(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Takes over the bad samples that a state knows; they are substituted unread."""
        self.quarantine.restore(records)

    def cancel_prefetch(self) -> None:
        """Drops what was said to be read: the run goes on at another step."""
        if self.reader.prefetcher is not None:
            self.reader.prefetcher.cancel_prefetch()

    def at(self, place: SampleRef) -> dict[str, Any]:
        """Makes the example of one place of the order; padding has nothing to learn."""
        return with_pictures(self, place)

    def plan_example(
        self, place: SampleRef, *, after_failed: PlannedExample | None = None
    ) -> PlannedExample:
        """Plans the example of one place of the order; the collator makes its arrays.

        Args:
          place: Of the order.
          after_failed: What was made for the place before and turned out to have broken pictures:
            the next substitute is chosen.

        Raises:
          ShardError: The sample cannot be read, and is not to be substituted.
          SampleError: It cannot be laid out, likewise.
        """
        made = self._pending(place.sample, place.epoch, after_failed=after_failed)
        if not place.real:
            made.draft.plan.sequence.learns = False
        return made

    def lengths(
        self,
        dataset: np.ndarray,  # noqa: ARG002 - a mixture has several
        sample: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Looks up how long samples are at most, in the indexes.

        Args:
          dataset: int64 [n], 0: the only one.
          sample: int64 [n].

        Returns:
          (tokens, crops), int64 [n]: what the longest draws in this view have.

        Raises:
          ConfigError: `view_lengths`, the indexes have no lengths for this view.
          ShardError: `index_column`, or as `open_index`.
        """
        if self.view.tree == "molmo1":
            raise ConfigError("view_lengths.tree", where=self.url, tree=self.view.tree)
        stored = [ImageView.from_dict(v) for v in self.manifest.recipe["image"]["views"]]
        views = [self.view.image, *([self.view.high_res] if self.view.high_res else [])]
        missing = [view for view in views if view not in stored]
        if missing:
            raise ConfigError("view_lengths.view", where=self.url, view=missing[0].to_dict())
        columns = [stored.index(view) for view in views]
        tokens = self.reader.column("view_length", sample)[:, columns].max(axis=1)
        crops = self.reader.column("view_crops", sample)[:, columns].max(axis=1)
        return tokens.astype(np.int64), crops.astype(np.int64)

    def fingerprint(self) -> dict[str, Any]:
        """Describes the data for states: the sequence of samples, whatever the shards' borders.

        Raises:
          ShardError: An index cannot be read.
        """
        if self._fingerprint is None:
            self._fingerprint = split_fingerprint(
                self.manifest, self.reader, split=self.split, num_samples=self.num_samples
            )
        return self._fingerprint

    def view_fingerprint(self) -> dict[str, Any]:
        """Describes the view for states."""
        return view_fingerprint(self.view)

    def has_grown_from(self, data: Mapping[str, Any]) -> bool:
        """Tells whether a fingerprint is that of this data before samples were appended."""
        then, own = data.get("num_samples"), self.fingerprint()
        if not isinstance(then, int) or not 0 < then < self.num_samples:
            return False
        return dict(data) == {
            **own,
            "num_samples": then,
            "keys": keys_fingerprint(self.reader, then),
        }

    def state_dict(self) -> dict[str, Any]:
        """Describes this process's place in its pass, for torchdata's StatefulDataLoader."""
        return self._cursor.state_dict(self._own_state())

    def load_state_dict(self, state: Mapping[str, Any], *, allow: Sequence[Allowed] = ()) -> None:
        """Goes to a place that `state_dict` gave, for the next pass.

        Args:
          state: A state of this rank and worker.
          allow: ("view",) takes a state that was saved with another view.

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

    def example(self, sample_id: int, *, epoch: int = 0) -> dict[str, Any]:
        """Makes the example of one sample in one epoch, whoever asks.

        Raises:
          ShardError: The sample cannot be read; see `ShardReader.read`.
          SampleError: It cannot be laid out; see `assemble`.
        """
        return self.at(SampleRef(0, epoch, sample_id))

    def _pending(
        self, sample_id: int, epoch: int, *, after_failed: PlannedExample | None
    ) -> PlannedExample:
        first: dict[str, Any] | None = None
        failure: ShardsError | None = None
        start = 0
        if after_failed is None:
            self.quarantine.asked()
        else:
            failure = after_failed.draft.error
            assert failure is not None
            if self.on_bad == "raise":
                raise failure
            number = self._candidate(sample_id, epoch, after_failed.attempt)
            broken = self._record(number, failure)
            self.quarantine.add(broken, failure)
            first, start = after_failed.draft.substitutes or broken, after_failed.attempt + 1
        for attempt in range(start, 1 + MAX_SUBSTITUTES):
            number = self._candidate(sample_id, epoch, attempt)
            known = self.quarantine.record(number) if self.on_bad == "substitute" else None
            if known is None:
                try:
                    made = self._draft(number, epoch)
                except (SampleError, ShardError) as error:
                    if self.on_bad == "raise":
                        raise
                    failure = failure or error
                    known = self._record(number, error)
                    self.quarantine.add(known, error)
                else:
                    made.attempt, made.draft.substitutes = attempt, first
                    return made
            else:
                self.quarantine.add(known)
            first = first or known
        assert first is not None
        raise failure or ShardError(
            "all_substitutes_bad",
            where=f"{first['shard']} sample {first['key']}",
            first_reason=first["reason"],
        )

    def _candidate(self, sample_id: int, epoch: int, attempt: int) -> int:
        """Gives the sample itself, and then its substitutes."""
        if not attempt:
            return sample_id
        return keyed(self._base_seed, sample_id, epoch, attempt) % self.num_samples

    def _draft(self, number: int, epoch: int) -> PlannedExample:
        start_s = perf_counter()
        stored = self.reader.stored(number)
        read_s = perf_counter()
        seed = sample_seed(self._base_seed, idx=number, length=self.num_samples, epoch=epoch)
        plan = self._planner.plan(stored.tokens, stored.spans, self._rng(seed), key=stored.key)
        draft = Draft(
            plan,
            list(zip(stored.pictures, stored.overviews, strict=True)),
            view=self.view,
            key=stored.key,
            scratch=self._scratch,
        )
        return PlannedExample(
            draft=draft,
            read_s=read_s - start_s,
            plan_s=perf_counter() - read_s,
            num_bytes=stored.num_bytes,
        )

    def _record(self, number: int, error: ShardsError) -> dict[str, Any]:
        shard, key = self.reader.name(number)
        stage = "read" if isinstance(error, ShardError) else "layout"
        names = {"sample": number, "shard": shard, "key": key}
        return {**names, "stage": stage, "reason": error.reason}


class _Ahead(Protocol):
    """A dataset or a mixture, as far as reading ahead goes."""

    @property
    def topology(self) -> Topology: ...
    @property
    def ahead_steps(self) -> int: ...
    def at(self, place: SampleRef) -> Any: ...
    def cancel_prefetch(self) -> None: ...
    def prefetch(self, step: int, rows: Sequence[Row]) -> None: ...
    def release(self, step: int) -> None: ...


def batches_ahead(dataset: _Ahead, order: Order | MixtureOrder) -> Callable[[int], list[Any]]:
    """Makes the function that gives this rank's examples of a step, for this worker's steps.

    The worker's next steps are said to the reader before it waits for the present one.
    """
    # What a pass that was left has planned would be held for the rest of the run.
    dataset.cancel_prefetch()
    schedule = SlotSchedule(order)
    window = LookaheadWindow(dataset.ahead_steps, stride=find_worker()[1])

    def batch(step: int) -> list[Any]:
        if dataset.ahead_steps:
            stop = order.epoch_start(epoch_of(order, step) + 1)
            for soon in window.next_steps(step, stop=stop):
                dataset.prefetch(soon, schedule.rows(soon, dataset.topology))
        rows = schedule.rows(step, dataset.topology)
        examples = [dataset.at(place) for row in rows for place in row]
        dataset.release(step)
        return examples

    return batch


def require_batch_size(batch_size: int | None) -> None:
    """Refuses several workers where the dataset does not know the batch size.

    Raises:
      ConfigError: `batch_size`.
    """
    _, num_workers = find_worker()
    if num_workers > 1 and batch_size is None:
        raise ConfigError("batch_size", num_workers=num_workers)


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
                "view_bound", where=where, source=f"{width}x{height}", stored=have, wanted=want
            )
