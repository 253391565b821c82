"""Groups: one dataset as several, by the values of a column, for the weights of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loader.stream.dataset import StreamingDataset
from loader.stream.stream import DatasetPlan, Stream
from loader.stream.subset import divide


def group_by(
    dataset: StreamingDataset, column: str, values: Sequence[Any] | None = None
) -> dict[Any, StreamingDataset]:
    """Divides the samples of a dataset by the values of a column.

    The groups share what the dataset has open. In a mixture each has epochs of its own and the name
    "DATASET[COLUMN == VALUE]". A sample draws what it draws in the whole dataset.

    Args:
      dataset: It stays as it is.
      column: Of the indexes or added (`make annotate`); of text, integers or truth values.
      values: The values wanted, at most 256; None: all that there are, sorted. Samples of other
        values are in no group.

    Returns:
      Each value to the dataset of its samples.

    Raises:
      ConfigError: `groups_column`; `empty_result`, no sample has one of the values.
      ShardError, StorageError: The column cannot be read.
    """
    stream = dataset._stream
    (part,), plan = stream.parts, stream.plan
    assert isinstance(plan, DatasetPlan)
    data = part.data
    ids = np.arange(data.num_stored) if data.subset is None else data.subset.ids
    where = "" if data.subset is None else data.subset.where
    groups = {}
    subsets = divide(data.reader, column, ids=ids, where=where, values=values)
    for value, subset in subsets.items():
        name = ", ".join(filter(None, (data.group, f"{column} == {value!r}")))
        own = replace(data, subset=subset, group=name)
        one = replace(part, data=own, builder=part.builder.of_group(own))
        groups[value] = dataset._over(
            Stream(
                [one],
                replace(plan, num_samples=own.num_samples),
                seed=stream.seed,
                batch_size=stream.batch_size,
                named=False,
            )
        )
    return groups
