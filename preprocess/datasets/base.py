"""What a dataset is: a numbered collection of examples in their raw, canonical form.

An *example* is a plain dict, as in the Molmo code bases:

    image         an ImageSource (below); absent for text-only examples
    message_list  messages, each an independent conversation about the image:
                  {"style": ..., "text": ...} or {"style": ..., "alternatives": [...]}
    metadata      JSON types, kept for people and evaluators

What training redraws each epoch is not drawn here: it stays in the example as `alternatives`.

To add a dataset, add one module to this package that defines `DATASET`, a subclass of `HfDataset`
(rows in Parquet or Arrow) or of `DatasetBase` (anything else).
"""

from __future__ import annotations

import abc
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from preprocess.datasets.rows import Rows, hub_rows, local_rows
from preprocess.scenes import plan_scene, render
from shardspec.errors import ConfigError, SourceError
from shardspec.keyed import hash_text, keyed

SAMPLE_ROWS = 256
"""Rows of SOURCE=sample when no limit is given."""

SCENE_QUALITY = 92
"""JPEG quality of generated scenes, about what cameras and the web use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneImage:
    """A generated picture, named by its numbers; it is drawn when it is read."""

    seed: int
    idx: int

    def read(self) -> bytes:
        """Draws the scene and returns it as a JPEG file, as the web would deliver it."""
        stream = io.BytesIO()
        pixels = render(plan_scene(self.seed, self.idx))
        Image.fromarray(pixels).save(stream, "JPEG", quality=SCENE_QUALITY)
        return stream.getvalue()


ImageSource = bytes | str | Path | SceneImage | Image.Image | np.ndarray
"""Encoded bytes, an http(s) URL, a local path, a generated scene, or pixels (uint8 [H, W, 3])."""


class Dataset(abc.ABC):
    """A numbered collection of examples."""

    name: ClassVar[str]

    @abc.abstractmethod
    def __len__(self) -> int:
        """Counts the examples."""

    @abc.abstractmethod
    def get(self, item: int, rng: np.random.RandomState | None = None) -> dict[str, Any]:
        """Makes example `item`, 0 to len - 1; `rng` is there for datasets that must draw."""

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Makes example `item`."""
        return self.get(item)


class DatasetBase(Dataset):
    """A dataset over rows: a subclass says where rows come from and what a row means."""

    modes: ClassVar[tuple[str, ...]] = ()
    """What a row may become, the default first; () where there is only one way."""
    split_salt: ClassVar[str] = "vlm-shards"
    """Shared by datasets so that an image is in the same split in all of them."""
    validation_share: ClassVar[float] = 0.0
    """Share of the rows set aside as "validation", by a hash of the image's identity; with 0 the
    source's own splits are used."""

    def __init__(
        self,
        split: str = "train",
        *,
        source: str = "hub",
        limit: int | None = None,
        mode: str | None = None,
    ) -> None:
        """Opens the rows of a split.

        Args:
          split: "train", "validation" or another split of the source.
          source: "hub", "sample" (generated rows, no network) or a local folder.
          limit: Rows of the split to use, from the first on; None for all.
          mode: One of `modes`; None for the first.

        Raises:
          ConfigError: `unknown_mode`.
          SourceError: `source_missing`, `source_empty`, `source_schema`, `source_split`.
        """
        self.mode = self.resolve_mode(mode)
        self.split = split
        self.source = source
        self.rows = self._sample_rows(limit) if source == "sample" else self.load()
        self._numbers = self._select(limit)
        if not len(self._numbers):
            raise SourceError(
                f"split {split!r} of {self.name} has no rows",
                reason="source_empty",
                where=source,
                facts={"rows_in_source": len(self.rows)},
                fix="check the folder and SPLIT=, or raise LIMIT=",
            )

    @classmethod
    def resolve_mode(cls, mode: str | None) -> str:
        """Gives the mode's name, the default's for None; "" where there is only one way.

        Raises:
          ConfigError: `unknown_mode`.
        """
        if mode is None:
            return cls.modes[0] if cls.modes else ""
        if mode not in cls.modes:
            raise ConfigError(
                f"{cls.name} has no mode {mode!r}",
                reason="unknown_mode",
                facts={"modes": ", ".join(cls.modes) or "none"},
                fix="choose one of them with MODE=, or leave it out",
            )
        return mode

    @abc.abstractmethod
    def load(self) -> Rows:
        """Opens the rows of the source that hold this split."""

    @abc.abstractmethod
    def to_example(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Turns a row into an example; pure."""

    @abc.abstractmethod
    def sample_row(self, seed: int, idx: int) -> dict[str, Any]:
        """Generates a row in the dataset's true schema; its image is a SceneImage."""

    def __len__(self) -> int:
        """Counts the examples of the split."""
        return len(self._numbers)

    def get(self, item: int, rng: np.random.RandomState | None = None) -> dict[str, Any]:  # noqa: ARG002
        """Makes example `item` of the split."""
        return self.to_example(self.rows[int(self._numbers[item])])

    def _sample_rows(self, limit: int | None) -> Rows:
        seed = keyed(hash_text(self.name), hash_text(self.split)) % 2**31
        count = SAMPLE_ROWS if limit is None else limit
        return Rows(
            [lambda: SampleRows(self, seed, count)],
            lengths=[count],
            kind={"kind": "sample", "seed": seed},
        )

    def _select(self, limit: int | None) -> np.ndarray:
        """Numbers the rows that belong to the split: int64 [N]."""
        if self.source == "sample" or not self.validation_share:
            return np.arange(len(self.rows))[:limit]
        wanted = (i for i, row in enumerate(self.rows) if self._split_of(row) == self.split)
        return np.fromiter(itertools.islice(wanted, limit), dtype=np.int64)

    def _split_of(self, row: Mapping[str, Any]) -> str:
        image = self.to_example(row).get("image")
        if isinstance(image, Path) and self.rows.base and image.is_relative_to(self.rows.base):
            image = image.relative_to(self.rows.base)  # the same wherever the folder lies
        identity = image.decode("latin1") if isinstance(image, bytes) else str(image)
        share = hash_text(f"{self.split_salt}\0{identity}") / 2**64
        return "validation" if share < self.validation_share else "train"


class HfDataset(DatasetBase):
    """A dataset of the Hugging Face hub, or a local copy of its Parquet or Arrow files."""

    PATH: ClassVar[str]
    """Repository id on the hub."""
    REVISION: ClassVar[str | None] = None
    COLUMNS: ClassVar[tuple[str, ...]]
    """Columns that a row must have; alternatives are joined by "|", such as "image|image_url"."""

    def load(self) -> Rows:
        """Opens the hub's or the folder's rows, and checks their schema."""
        hub_split = "train" if self.validation_share else self.split
        if self.source == "hub":
            return hub_rows(self.PATH, revision=self.REVISION, split=hub_split, want=self.COLUMNS)
        return local_rows(Path(self.source), split=hub_split, want=self.COLUMNS)


class SampleRows(Sequence[Mapping[str, Any]]):
    """The generated rows of a dataset, made when asked for."""

    def __init__(self, dataset: DatasetBase, seed: int, count: int) -> None:
        self._dataset, self._seed, self._count = dataset, seed, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        return self._dataset.sample_row(self._seed, int(i))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self[i] for i in range(self._count))


def row_image(row: Mapping[str, Any], *, base: Path | None = None) -> ImageSource:
    """Finds the image of a row: embedded bytes, a local path or a URL.

    Args:
      row: Has `image` (bytes, the hub's {"bytes", "path"}, a path or a scene) or `image_url`.
      base: Folder that relative paths start from.

    Raises:
      SourceError: `row_image`.
    """
    image = row.get("image")
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if image is None:
        image = row.get("image_url")
    if isinstance(image, str) and not image.startswith(("http://", "https://")):
        return (base or Path()) / image.removeprefix("file://")
    if isinstance(image, bytes | str | Path | SceneImage | Image.Image | np.ndarray):
        return image
    raise SourceError(
        "row has no image",
        reason="row_image",
        facts={"fields": sorted(row)},
        fix="a row needs `image` (bytes or a path) or `image_url`",
    )


def scene_texts(seed: int, idx: int) -> tuple[str, tuple[str, ...]]:
    """Gives the caption and the transcripts of a generated scene, without drawing it."""
    plan = plan_scene(seed, idx)
    return plan.caption, plan.transcripts
