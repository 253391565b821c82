"""How a dataset names its family: the part `model` of a manifest's recipe."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from shardspec.errors import ConfigError, SampleError, nearest
from shardspec.families.anyres import AnyRes
from shardspec.families.fixed import FixedSize
from shardspec.families.gemma3 import Gemma3
from shardspec.families.idefics3 import Idefics3
from shardspec.families.internvl import InternVL
from shardspec.families.paligemma import PaliGemma
from shardspec.families.pixtral import Pixtral
from shardspec.families.plan import Family, PicturePlan, Size, VideoSide
from shardspec.families.processor import Processor
from shardspec.families.qwen2_vl import Qwen2VL

_FAMILIES: tuple[Any, ...] = (
    *(Qwen2VL, FixedSize, AnyRes, InternVL, Idefics3, Gemma3, Pixtral, PaliGemma),
    Processor,
)
KINDS: Mapping[str, Any] = {family.kind: family for family in _FAMILIES}
"""The families by their names in manifests."""


def family_to_dict(family: Family) -> dict[str, Any]:
    """Lists a family's fields in plain JSON types, with its kind."""
    values = {f.name: getattr(family, f.name) for f in fields(family)}  # type: ignore[arg-type]
    # What came later is told where it is used: manifests without it stay as they are.
    later = ("video", "pan_and_scan", "sliding_window")
    values = {name: v for name, v in values.items() if not (name in later and v is None)}
    return {"kind": family.kind, **{name: _plain(v) for name, v in values.items()}}


def family_from_dict(document: Mapping[str, Any], *, where: str = "") -> Family:
    """Reads what `family_to_dict` wrote.

    Raises:
      ConfigError: `family_unknown`, for another kind or field; `family_field`.
    """
    values = {name: _frozen(v) for name, v in document.items()}
    kind = str(values.pop("kind", ""))
    unknown, known = [kind], list(KINDS)
    if kind in KINDS:
        known = [f.name for f in fields(KINDS[kind])]
        unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigError(
            "family_unknown",
            where=where,
            got=unknown[0],
            known=", ".join(known),
            hint=nearest(unknown[0], known),
        )
    if isinstance(values.get("video"), Mapping):
        values["video"] = VideoSide(**{k: _frozen(v) for k, v in values["video"].items()})
    family: Family = KINDS[kind](**values)
    return family


def plan_pictures(family: Family, sizes: Sequence[Size]) -> tuple[PicturePlan, ...]:
    """Plans the pictures of a sample, in order; remembered, as pictures share sizes.

    Args:
      family: Whose model.
      sizes: (height, width) of each upright original.

    Raises:
      SampleError: As `Family.plan`.

    >>> [p.num_tokens for p in plan_pictures(Qwen2VL(), [(427, 640), (56, 56)])]
    [345, 4]
    """
    if isinstance(family, AnyRes) and family.single_tiles and len(sizes) > 1:
        return (family.one_tile(),) * len(sizes)
    known: Any = family  # frozen, so hashable
    return tuple(_plan(known, size) for size in sizes)


def plan_videos(
    family: Family, sizes: Sequence[Size], videos: Sequence[tuple[int, int]]
) -> tuple[PicturePlan, ...]:
    """Plans the videos of a sample.

    Args:
      family: Whose model.
      sizes: (height, width) of each picture of the sample, frames among them.
      videos: (first, number) of the frames of each.

    Raises:
      SampleError: As `Qwen2VL.plan_video`; `model_videos`, the family has none.
    """
    if not videos:
        return ()
    if not isinstance(family, Qwen2VL) or family.video is None:
        raise SampleError("model_videos.family", family=family.kind)
    return tuple(family.plan_video(sizes[at], num_frames=count) for at, count in videos)


@functools.lru_cache(maxsize=1 << 14)
def _plan(family: Any, size: Size) -> PicturePlan:
    plan: PicturePlan = family.plan(size)
    return plan


def _plain(value: Any) -> Any:
    if isinstance(value, VideoSide):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """For what model a dataset was built: the part `model` of its recipe."""

    family: Family
    symbols: Mapping[str, tuple[int, ...]]
    """Ids of each symbol in the vocabulary of the dataset's tokenizer."""
    placeholder: int
    """Id that stands for a picture in stored tokens; no text has it."""

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, where: str = "") -> StoredModel:
        """Reads what `to_dict` wrote.

        Raises:
          ConfigError: As `family_from_dict`.
        """
        symbols = {name: tuple(ids) for name, ids in document["symbols"].items()}
        family = family_from_dict(document["family"], where=where)
        return cls(family=family, symbols=symbols, placeholder=document["placeholder"])

    def to_dict(self) -> dict[str, Any]:
        """Lists it in plain JSON types."""
        return {
            "family": family_to_dict(self.family),
            "symbols": {name: list(ids) for name, ids in sorted(self.symbols.items())},
            "placeholder": self.placeholder,
        }

    @property
    def soft_id(self) -> int:
        """The id that the features of a picture replace."""
        (found,) = self.symbols[self.family.image_token]
        return found

    @property
    def video_id(self) -> int:
        """The id that the features of a video replace; -1 where there are none."""
        video = getattr(self.family, "video", None)
        return -1 if video is None else self.symbols[video.token][0]

    @property
    def inline(self) -> bool:
        """Whether stored tokens have those of the pictures, instead of a placeholder for each."""
        return isinstance(self.family, Processor)

    def block(self, plan: PicturePlan) -> np.ndarray:
        """Makes the tokens of a picture, or of one block of a video: int64 [tokens]."""
        runs = [np.tile(np.array(self.symbols[name]), count) for name, count in plan.layout]
        return np.concatenate(runs).astype(np.int64)

    def block_length(self, plan: PicturePlan) -> int:
        """Counts the tokens of a picture."""
        tokens = sum(len(self.symbols[name]) * count for name, count in plan.layout)
        return tokens * plan.num_blocks
