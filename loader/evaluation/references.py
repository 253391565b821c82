"""References: the questions of a dataset and what its records say is right.

Records are read from the shards, so that predictions can be scored later and anywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loader.evaluation.table import Question
from loader.stream import StreamingDataset, stored_in_order
from shardspec.errors import ConfigError


def questions_of(dataset: StreamingDataset) -> list[Question]:
    """Lists the questions of an evaluation in stored order.

    Raises:
      ConfigError: `results`: the dataset was opened for something else.
      ShardError: An index cannot be read.
    """
    samples, numbers = _asked(dataset)
    distinct, place = np.unique(samples, return_inverse=True)
    keys = [key.decode() for key in dataset.reader.column("key", distinct).tolist()]
    return [(keys[i], n) for i, n in zip(place.tolist(), numbers.tolist(), strict=True)]


def references(dataset: StreamingDataset) -> list[dict[str, Any]]:
    """Reads what is right: a row per question in stored order, without a prediction.

    Before or after the passes of a loader over the dataset, not during one.

    Args:
      dataset: Opened for evaluation: `View(purpose="evaluation")`, `tail="pad"`.

    Returns:
      Rows with `sample`, `key`, `question_idx`, `images` and `record`.

    Raises:
      ConfigError: `results`: the dataset was opened for something else.
      ShardError: A sample cannot be read.
    """
    samples, numbers = _asked(dataset)
    builder = dataset._stream.parts[0].builder
    if not len(samples):
        return []
    distinct, firsts = np.unique(samples, return_index=True)
    found = []
    for sample, own, stored in zip(
        distinct.tolist(),
        np.split(numbers, firsts[1:]),
        stored_in_order(dataset.reader, distinct),
        strict=True,
    ):
        found += [builder.describe_sample(stored, sample, number) for number in own.tolist()]
    return found


def _asked(dataset: StreamingDataset) -> tuple[np.ndarray, np.ndarray]:
    data = dataset._stream.parts[0].data
    if data.questions is None:
        raise ConfigError("results.purpose", where=data.url)
    return data.asked
