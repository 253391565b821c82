"""`python -m loader which`: the samples of a step, or the steps of a sample, from the order alone.

Reads the manifest and the indexes, no sample. The settings of the run are the flags, or those that
a saved state holds, with all changes that the run made.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from loader.cli.saved_state import find_state
from loader.cli.verb import Verb, add_dataset, add_flag
from loader.order import Order, OrderConfig, plan_order, rank_positions, require_step
from loader.stream import StreamingDataset
from shardspec.errors import ConfigError, StateError
from shardspec.keyed import dataset_seed
from shardspec.manifest import differences

_KEYS_AT_ONCE = 1_000_000
"""Keys compared at a time: some 100 MB."""

_SLOTS_AT_ONCE = 1_000_000


def _add(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--step", type=int, help="list the samples of this step")
    wanted.add_argument("--key", help="list the steps that see this sample")
    add_flag(parser, "--global-batch", "samples per step over all ranks", 256)
    parser.add_argument("--canonical-ranks", type=int, help="width of the order (default: chosen)")
    parser.add_argument(
        "--state", help="a saved state (JSON or torch) whose settings replace the flags"
    )
    add_flag(parser, "--ranks", "data-parallel ranks of the run", 1)
    parser.add_argument("--rank", type=int, help="list this rank's part only")
    add_flag(parser, "--epochs", "with --key: epochs to look through", 3)
    parser.add_argument("--where", help="the run's subset, as StreamingDataset(where=)")


def _run(options: argparse.Namespace) -> str:
    state = None if options.state is None else find_state(options.state)
    seed = options.seed if state is None else state["seed"]
    stream = StreamingDataset(
        options.shards, split=options.split, seed=seed, rank=0, world_size=1, where=options.where
    )
    if state is not None:
        order = order_of(state, stream)
    else:
        config = plan_order(
            stream.num_samples,
            global_batch_size=options.global_batch,
            seed=dataset_seed(seed, stream.manifest.dataset, options.split),
            canonical_ranks=options.canonical_ranks,
        )
        order = Order(config)
    rank_positions(0, options.ranks, order.config.global_batch_size)
    if options.rank is not None:
        rank_positions(options.rank, options.ranks, order.config.global_batch_size)
    if options.key is not None:
        return _describe_sample(stream, order, options)
    return _describe_step(stream, order, options)


def order_of(state: Mapping[str, Any], stream: StreamingDataset) -> Order:
    """Restores the order of a state's run.

    Raises:
      StateError: `which_state`, rows of its run are not single, whole samples of one
        dataset; `state_mismatch`, it is of other data; as `OrderConfig.from_dict`.
    """
    single = state.get("packing") is None and not state.get("bucket_steps")
    if not single or "num_samples" not in state["order"]:
        raise StateError("which_state")
    found = differences(state["data"], stream.fingerprint(), "state.data")
    if found:
        raise StateError("state_mismatch", differences="; ".join(found))
    # The order of an evaluation numbers questions.
    if state["order"]["num_samples"] != stream.num_samples:
        raise StateError("which_state")
    return Order(OrderConfig.from_dict(state["order"]))


def _describe_step(stream: StreamingDataset, order: Order, options: argparse.Namespace) -> str:
    """Tabulates the rows of a step."""
    require_step(options.step)
    batch, _ = order.batch_at(options.step)
    share = len(rank_positions(0, options.ranks, batch))
    positions = np.arange(batch)
    if options.rank is not None:
        positions = rank_positions(options.rank, options.ranks, batch)
    slots = order.slots(options.step, positions)
    ids = _in_split(stream, slots.sample)
    keys = stream.reader.column("key", ids)
    lines = [f"{'position':>8}  {'rank':>5}  {'epoch':>5}  {'sample':>10}  key"]
    for position, epoch, sample, real, key in zip(
        *(values.tolist() for values in (positions, slots.epoch, ids, slots.real, keys)),
        strict=True,
    ):
        filler = "" if real else "  (fills the last batch)"
        lines.append(
            f"{position:>8}  {position // share:>5}  {epoch:>5}  {sample:>10}  {_text(key)}{filler}"
        )
    return "\n".join(lines)


def _in_split(stream: StreamingDataset, samples: np.ndarray) -> np.ndarray:
    """Maps numbers in the order to those in the split: they differ in a subset."""
    return stream._stream.parts[0].data.sample_ids(samples)


def _text(key: bytes) -> str:
    return key.decode(errors="backslashreplace")


def _describe_sample(stream: StreamingDataset, order: Order, options: argparse.Namespace) -> str:
    """Lists the steps that see a sample."""
    number = number_of_key(stream, options.key, split=options.split)
    sample = int(_in_split(stream, np.array([number]))[0])
    lines = [f"{options.key} is sample {sample} of the split {options.split}"]
    lines.append(f"{'epoch':>5}  {'step':>10}  {'position':>8}  {'rank':>5}")
    for epoch in range(options.epochs):
        for step, position in _seen(order, number, epoch=epoch):
            rank = position // len(rank_positions(0, options.ranks, order.batch_at(step)[0]))
            if options.rank in (None, rank):
                lines.append(f"{epoch:>5}  {step:>10}  {position:>8}  {rank:>5}")
    return "\n".join(lines)


def number_of_key(stream: StreamingDataset, key: str, *, split: str) -> int:
    """Finds the number of a sample in the order.

    Raises:
      ConfigError: `unknown_key`, no sample in use has this key.
    """
    for start in range(0, stream.num_samples, _KEYS_AT_ONCE):
        numbers = np.arange(start, min(start + _KEYS_AT_ONCE, stream.num_samples))
        keys = stream.reader.column("key", _in_split(stream, numbers))
        found = np.flatnonzero(keys == key.encode())
        if len(found):
            return start + int(found[0])
    raise ConfigError("unknown_key", key=key, split=split)


def _seen(order: Order, sample: int, *, epoch: int) -> Iterator[tuple[int, int]]:
    """Looks through the steps of an epoch; gives (step, position) of each visit."""
    # The batch at a border holds the end of the epoch before.
    step = max(order.epoch_start(epoch) - 1, order.config.since, 0)
    stop = order.epoch_start(epoch + 1) + 1
    while step < stop:
        batch, _ = order.batch_at(step)
        last = min(step + max(1, _SLOTS_AT_ONCE // batch), stop)
        steps = np.array(list(takewhile(partial(_has_batch, order, batch), range(step, last))))
        slots = order.slots(steps[:, None], np.arange(batch))
        found = (slots.sample == sample) & (slots.epoch == epoch) & slots.real
        for row, position in np.argwhere(found).tolist():
            yield int(steps[row]), position
        step = int(steps[-1]) + 1


def _has_batch(order: Order, batch: int, step: int) -> bool:
    return order.batch_at(step)[0] == batch


WHICH = Verb(
    name="which",
    help="list the samples of a step, or the steps of a sample",
    add=_add,
    run=_run,
)
