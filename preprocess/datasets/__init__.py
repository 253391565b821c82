"""The datasets by name, and those that users bring along.

Each module of this package that defines `DATASET` is one. Others are found by

    chats.toml, chats.json, a folder     a spec, or data whose format can be told (`own`)
    file.py:Class, package.module:Class  code of the user's
    an entry point                       of the group `vlm_shards.datasets`
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

from preprocess.datasets.a_okvqa import AOkVqa
from preprocess.datasets.base import (
    Clip,
    Dataset,
    DatasetBase,
    HfDataset,
    ImageSource,
    SceneImage,
    SceneVideo,
    VideoSource,
    example_clips,
    example_images,
    example_subtitles,
    example_videos,
)
from preprocess.datasets.documents import Documents
from preprocess.datasets.episodes import EpisodeDataset, EpisodeFiles
from preprocess.datasets.images import EpisodeFrame, RemoteImage
from preprocess.datasets.kinds import DocumentDataset, RobotDataset
from preprocess.datasets.lerobot import LeRobot
from preprocess.datasets.own import OwnDataset, is_own
from preprocess.datasets.own import check_class as _check_class
from preprocess.datasets.own import own_dataset as _own_dataset
from preprocess.datasets.pixmo_ask_model_anything import PixMoAskModelAnything
from preprocess.datasets.pixmo_cap import PixMoCap
from preprocess.datasets.pixmo_cap_qa import PixMoCapQa
from preprocess.datasets.pixmo_count import PixMoCount
from preprocess.datasets.pixmo_multi_image_qa import PixMoMultiImageQa
from preprocess.datasets.pixmo_point_explanations import PixMoPointExplanations
from preprocess.datasets.pixmo_points import PixMoPoints
from preprocess.datasets.splits import Unmatched as Unmatched
from preprocess.datasets.text_sft import TextSft
from preprocess.datasets.vqa2 import Vqa2 as VQA2
from preprocess.documents import PageImage
from preprocess.formats import DocumentPolicy
from shardspec.errors import ConfigError, nearest

_NOT_DATASETS = ("base", "code", "episodes", "hooks", "images", "kinds", "own", "rows", "splits")

_ENTRY_POINTS = "vlm_shards.datasets"
"""Group of entry points by which packages offer datasets."""

__all__ = [
    "VQA2",
    "AOkVqa",
    "Clip",
    "Dataset",
    "DatasetBase",
    "DocumentDataset",
    "DocumentPolicy",
    "Documents",
    "EpisodeDataset",
    "EpisodeFiles",
    "EpisodeFrame",
    "HfDataset",
    "ImageSource",
    "LeRobot",
    "OwnDataset",
    "PageImage",
    "PixMoAskModelAnything",
    "PixMoCap",
    "PixMoCapQa",
    "PixMoCount",
    "PixMoMultiImageQa",
    "PixMoPointExplanations",
    "PixMoPoints",
    "RemoteImage",
    "RobotDataset",
    "SceneImage",
    "SceneVideo",
    "TextSft",
    "VideoSource",
    "dataset_class",
    "dataset_names",
    "example_clips",
    "example_images",
    "example_subtitles",
    "example_videos",
    "get_dataset",
    "is_own",
]


def dataset_names(*, offered: bool = False) -> list[str]:
    """Lists the datasets, sorted; with `offered` also those of installed packages."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    names += _offered() if offered else []
    return sorted(name for name in names if name not in _NOT_DATASETS)


def _offered() -> dict[str, importlib.metadata.EntryPoint]:
    return {each.name: each for each in importlib.metadata.entry_points(group=_ENTRY_POINTS)}


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
      source: "hub", "sample", or a folder, local or of an object store.
      limit: Examples of the split to use.
      mode: What a row becomes, where the dataset has several modes; None for its default.
      unmatched: What happens to files of a folder that are of no known split.

    Raises:
      ConfigError: `unknown_dataset`, `unknown_mode`.
      SourceError: As the dataset's constructor.
    """
    return dataset_class(name)(split, source=source, limit=limit, mode=mode, unmatched=unmatched)


def dataset_class(name: str) -> type[DatasetBase]:
    """Finds a dataset's class.

    Args:
      name: One of `dataset_names()`, of an entry point, or what `preprocess.datasets.own` takes.

    Raises:
      ConfigError: `unknown_dataset`, `dataset_code`, and those of a spec.
      SourceError: The format of a file cannot be told.
    """
    names = dataset_names()
    if name in names:
        kind: type[DatasetBase] = importlib.import_module(f"{__name__}.{name}").DATASET
        return kind
    if is_own(name):
        return _own_dataset(name)
    offered = _offered()
    if name in offered:
        try:
            found = offered[name].load()
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # whatever the package raises
            told = f"{type(error).__name__}: {error}"
            where = f"{name} = {offered[name].value}"
            raise ConfigError("dataset_code.import", where=where, error=told) from error
        return _check_class(found, where=name)
    raise ConfigError("unknown_dataset", name=name, hint=nearest(name, [*names, *offered]))
