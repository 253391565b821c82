"""The datasets by name. Each module of this package that defines `DATASET` is one."""

from __future__ import annotations

import importlib
import pkgutil

from preprocess.datasets.base import (
    Dataset,
    DatasetBase,
    HfDataset,
    ImageSource,
    SceneImage,
    example_images,
)
from preprocess.datasets.splits import Unmatched as Unmatched
from shardspec.errors import ConfigError, nearest

__all__ = [
    "Dataset",
    "DatasetBase",
    "HfDataset",
    "ImageSource",
    "SceneImage",
    "dataset_class",
    "dataset_names",
    "example_images",
    "get_dataset",
]


def dataset_names() -> list[str]:
    """Lists the datasets, sorted."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name for name in names if name not in ("base", "rows", "splits"))


def get_dataset(
    name: str,
    split: str = "train",
    *,
    source: str = "hub",
    limit: int | None = None,
    mode: str | None = None,
    unmatched: Unmatched = "refuse",
) -> DatasetBase:
    """Opens a dataset by name.

    Args:
      name: One of `dataset_names()`.
      split: Split to open.
      source: "hub", "sample" or a local folder.
      limit: Examples of the split to use.
      mode: What a row becomes, where the dataset has several modes; None for its default.
      unmatched: What happens to files of a folder that are of no known split.

    Raises:
      ConfigError: `unknown_dataset`, `unknown_mode`.
      SourceError: As the dataset's constructor.
    """
    return dataset_class(name)(split, source=source, limit=limit, mode=mode, unmatched=unmatched)


def dataset_class(name: str) -> type[DatasetBase]:
    """Finds a dataset's class by name.

    Raises:
      ConfigError: `unknown_dataset`.
    """
    names = dataset_names()
    if name not in names:
        raise ConfigError("unknown_dataset", name=name, hint=nearest(name, names))
    kind: type[DatasetBase] = importlib.import_module(f"{__name__}.{name}").DATASET
    return kind
