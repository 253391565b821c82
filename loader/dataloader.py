"""`make_dataloader`: batches of a StreamingDataset, made ahead by threads or by worker processes.

Batches come in the order of the run whatever makes them, and the state counts the batches that were
*delivered*, never those made ahead. A state is a few hundred bytes and valid for any number of
ranks, threads and workers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.utils.data import DataLoader

from loader.assemble import View
from loader.collate import MMCollator
from loader.order import Order, OrderConfig
from loader.stream import StreamingDataset
from shardspec.errors import ConfigError, ShardsError, StateError
from shardspec.manifest import differences

STATE_VERSION = 1
"""Version of the state; any other is refused."""

_AHEAD = 2
"""Batches that each thread may be ahead of the consumer."""


def make_dataloader(
    dataset: StreamingDataset,
    *,
    global_batch_size: int,
    sequence_length: int,
    pad_mode: str = "to_128",
    decode_threads: int = 2,
    workers: int = 0,
    extra_keys: tuple[str, ...] = (),
    with_metadata: bool = False,
) -> StreamLoader:
    """Makes the loader of this rank.

    Args:
      dataset: What to stream.
      global_batch_size: Samples per step over all ranks; the number of ranks must divide it.
      sequence_length: Longest sequence; text is cut there.
      pad_mode: "max_len", "batch_max" or "to_N"; see `MMCollator`.
      decode_threads: Threads that make batches, where workers is 0.
      workers: Worker processes instead of threads.
      extra_keys: Further keys of the batch; see `MMCollator`.
      with_metadata: Add `metadata`, a list with each sample's key.

    Raises:
      ConfigError: `batch_not_divisible`, and as `MMCollator`.
    """
    world_size = dataset.topology.world_size
    if global_batch_size % world_size:
        below = global_batch_size // world_size * world_size
        near = [str(batch) for batch in (below, below + world_size) if batch > 0]
        raise ConfigError(
            "the global batch cannot be dealt evenly to the ranks",
            reason="batch_not_divisible",
            facts={"global_batch_size": global_batch_size, "world_size": world_size},
            fix=f"use {' or '.join(near)}",
        )
    collator = view_collator(
        dataset.view,
        sequence_length=sequence_length,
        pad_mode=pad_mode,
        pad_token_id=dataset.ids.pad,
        extra_keys=extra_keys,
        with_metadata=with_metadata,
    )
    dataset = dataset.with_batch_size(
        global_batch_size // world_size, sequence_length=sequence_length
    )
    return StreamLoader(dataset, collator, decode_threads=decode_threads, workers=workers)


def view_collator(
    view: View,
    *,
    sequence_length: int,
    pad_mode: str = "to_128",
    pad_token_id: int = 0,
    extra_keys: tuple[str, ...] = (),
    with_metadata: bool = False,
) -> MMCollator:
    """Makes the collator that fits a view's examples; the arguments are `MMCollator`'s."""
    image = view.image
    side, patch, rows_cols = image.size_px, image.patch_px, image.crop_tokens
    patches = view.pixels == "patches"
    return MMCollator(
        sequence_length=sequence_length,
        pad_mode=pad_mode,
        pad_token_id=pad_token_id,
        image_shape=(image.num_patches, patch * patch * 3) if patches else (3, side, side),
        num_patches=image.num_patches,
        tokens_per_crop=math.prod(rows_cols) if view.image_map == "per_token" else None,
        pool=math.prod(image.pool) if view.image_map == "pooling" else None,
        extra_keys=extra_keys,
        with_metadata=with_metadata,
    )


class StreamLoader:
    """Gives batches: each `for` over it is one epoch, and the next one goes on from there."""

    def __init__(
        self,
        dataset: StreamingDataset,
        collator: MMCollator,
        *,
        decode_threads: int,
        workers: int,
    ) -> None:
        """Joins dataset and collator; see `make_dataloader`."""
        self.dataset = dataset
        self.collator = collator
        self.decode_threads = max(1, decode_threads)
        self.workers = workers
        self.order: Order = dataset.order
        self.step = 0
        """The next step to be delivered, counted through all epochs."""

    @property
    def epoch(self) -> int:
        """The epoch that the next step belongs to."""
        return self._epoch_of(self.step)

    def __len__(self) -> int:
        """Counts the steps of the current epoch."""
        return self.order.num_steps(self.epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives the rest of the current epoch; equally many batches on every rank."""
        stop = self.order.epoch_start(self.epoch + 1)
        batches = self._by_workers(stop) if self.workers else self._by_threads(stop)
        for batch in batches:
            self.step += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Describes the place in the run; the same on every rank, so saving one is enough."""
        split = self.dataset.manifest.splits[self.dataset.split]
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "order": self.order.config.to_dict(),
            "seed": self.dataset.seed,
            "dataset": self.dataset.manifest.dataset,
            "split": self.dataset.split,
            "build_key": split.build_key,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved place, whatever the number of ranks, threads and workers now.

        Raises:
          StateError: `state_version`, `state_mismatch` (names every differing field).
        """
        if state.get("version") != STATE_VERSION:
            raise StateError(
                "the loader's state has a version that this release does not read",
                reason="state_version",
                facts={"got": state.get("version"), "want": STATE_VERSION},
                fix="resume with the release that wrote it",
            )
        own = self.state_dict()
        names = ("seed", "dataset", "split", "build_key", "order")
        found = differences(
            {name: state.get(name) for name in names}, {name: own[name] for name in names}, "state"
        )
        if found:
            raise StateError(
                "the loader's state belongs to another run",
                reason="state_mismatch",
                facts={"differences": "; ".join(found)},
                fix="resume with the data, the seed and the global batch size that it was saved "
                "with",
            )
        self.order = Order(OrderConfig.from_dict(state["order"]))
        self.step = int(state["step"])

    def _epoch_of(self, step: int) -> int:
        epoch = step * self.order.config.global_batch_size // self.dataset.num_samples
        while self.order.epoch_start(epoch) > step:
            epoch -= 1
        while self.order.epoch_start(epoch + 1) <= step:
            epoch += 1
        return epoch

    def _make(self, step: int) -> dict[str, Any]:
        return self.collator(self.dataset.batch(self.order, step))

    def _by_threads(self, stop: int) -> Iterator[dict[str, Any]]:
        ahead: deque[Future[dict[str, Any]]] = deque()
        pool = ThreadPoolExecutor(self.decode_threads, thread_name_prefix="decode")
        try:
            for step in range(self.step, stop):
                ahead.append(pool.submit(self._make, step))
                if len(ahead) > _AHEAD * self.decode_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _by_workers(self, stop: int) -> Iterator[dict[str, Any]]:
        steps = _Steps(self, range(self.step, stop))
        for batch in DataLoader(
            steps,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.workers,
            # spawn: a forked child would inherit locks that the parent's threads hold.
            multiprocessing_context="spawn",
        ):
            if isinstance(batch, ShardsError):
                raise batch
            yield batch


class _Steps:
    """The batches of some steps as a map-style dataset, for worker processes."""

    def __init__(self, loader: StreamLoader, steps: range) -> None:
        self._dataset, self._collator = loader.dataset, loader.collator
        self._order, self._steps = loader.order, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, i: int) -> dict[str, Any] | ShardsError:
        try:
            return self._collator(self._dataset.batch(self._order, self._steps[i]))
        except ShardsError as error:
            # Sent as a value: what a worker raises reaches the caller as a RuntimeError.
            return error
