"""Gathering: the results of all ranks, by a process group or through files.

`results_of` makes rows of a batch and what a model said to it. `gather_results` brings the rows of
all ranks together over torch.distributed; without a process group each rank saves its rows
(`save_results`), and one process loads them all when the ranks are done (`load_results`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed

from loader.evaluation.references import questions_of
from loader.evaluation.table import (
    decoded_rows,
    encoded_rows,
    read_table,
    result_table,
    write_table,
)
from loader.stream import StreamingDataset
from loader.topology import find_topology
from shardspec import storage
from shardspec.errors import ConfigError

_FILE = re.compile(r"results-(\d{5})-of-(\d{5})\.jsonl")


def results_of(batch: Mapping[str, Any], predictions: Sequence[Any]) -> list[dict[str, Any]]:
    """Makes a row for each question of a batch; rows that only fill the batch are left out.

    Args:
      batch: Of a loader with `with_metadata=True` or `metadata=`.
      predictions: What the model said to each row, in JSON types.

    Raises:
      ConfigError: `results`: the batch has no metadata, or another number of rows.
    """
    if "metadata" not in batch or len(batch["metadata"]) != len(predictions):
        rows = len(batch.get("metadata", ()))
        raise ConfigError("results.batch", rows=rows, predictions=len(predictions))
    wanted = ("sample", "key", "question_idx", "images", "record")
    return [
        {**{name: row[name] for name in wanted if name in row}, "prediction": prediction}
        for row, prediction in zip(batch["metadata"], predictions, strict=True)
        if row.get("real", True)
    ]


def gather_results(
    results: Iterable[Mapping[str, Any]],
    *,
    dataset: StreamingDataset | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> list[dict[str, Any]]:
    """Brings the rows of all ranks into one table, the same on every rank; see `result_table`.

    Call it on every rank, once all batches are done.

    Args:
      results: This rank's rows, such as those of `results_of`.
      dataset: What was evaluated: it says which questions there are, so that missing ones are
        named. None: the rows are taken for all.
      group: Of the ranks; None: all processes, where torch.distributed is initialised.

    Raises:
      ConfigError: `results`, as `result_table`; or there are several ranks and no process group.
      ShardError: The indexes of the dataset cannot be read.
    """
    parts = [encoded_rows(results)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, parts[0], group=group)
        parts = gathered
    elif (ranks := _num_ranks(dataset)) > 1:
        raise ConfigError("results.group", ranks=ranks)
    rows = [row for part in parts for row in decoded_rows(part, where="")]
    return result_table(rows, expected=None if dataset is None else questions_of(dataset))


def save_results(
    folder: str,
    results: Iterable[Mapping[str, Any]],
    *,
    rank: int | None = None,
    world_size: int | None = None,
) -> str:
    """Writes the rows of this rank into a folder that all ranks share, and returns the file's URL.

    Args:
      folder: Local or in a store; best a fresh one for each evaluation.
      results: This rank's rows.
      rank: By default that of torch.distributed or of the environment.
      world_size: As `rank`.

    Raises:
      ConfigError: `results`, `rank`, `topology`.
      StorageError: The store does not answer.
    """
    here = find_topology(rank=rank, world_size=world_size)
    url = storage.join(folder, f"results-{here.rank:05d}-of-{here.world_size:05d}.jsonl")
    write_table(url, results)
    return url


def load_results(folder: str, *, dataset: StreamingDataset | None = None) -> list[dict[str, Any]]:
    """Makes the table of what all ranks have saved in a folder; see `result_table`.

    Args:
      folder: As of `save_results`.
      dataset: As of `gather_results`.

    Raises:
      ConfigError: `results`: a rank's file is missing, there are files of several numbers of ranks,
        or as `result_table`.
      StorageError: The store does not answer.
    """
    names = [name for name in storage.list_names(folder) if _FILE.fullmatch(name)]
    counts = {int(name[-11:-6]) for name in names}
    ranks = max(counts, default=0)
    wanted = [f"results-{rank:05d}-of-{ranks:05d}.jsonl" for rank in range(ranks)]
    if names != wanted or not names:
        missing = sorted(set(wanted) - set(names))
        raise ConfigError("results.files", where=folder, ranks=sorted(counts), missing=missing)
    rows = [row for name in names for row in read_table(storage.join(folder, name))]
    return result_table(rows, expected=None if dataset is None else questions_of(dataset))


def _num_ranks(dataset: StreamingDataset | None) -> int:
    topology = find_topology() if dataset is None else dataset._stream.topology
    return topology.world_size
