"""What a model family makes of pictures, as plain values: the protocol that all families fulfil.

A *family* is a value: the numbers that a model's configuration files give for its picture side. Its
`plan` says, from the sizes of a sample's pictures alone, to which size each is resized, into how
many patches or tiles it is cut, and which tokens stand for it; no pixel is needed. The kernel
that makes the tensors is in `loader.assembly.families`: it needs torch.

Tokens are named by their *symbols*, the texts of the tokenizer's own tokens. Their ids are the
dataset's: they are looked up once, when it is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Protocol

from shardspec.errors import ConfigError

Size = tuple[int, int]
"""(height, width) in pixels, as image processors have it."""

Filter = Literal["bilinear", "bicubic", "lanczos"]

Positions = Literal["plain", "from_one", "mrope"]
"""How a model counts positions: one number per token, from 0 or from 1, or three (time, height,
width) for pictures as in multimodal rotary embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturePlan:
    """What a family makes of one picture, or of one video."""

    resized: Size
    """To which size the whole picture is resized before it is cut into patches or tiles."""
    grid: tuple[int, int] = (1, 1)
    """(rows, columns) of patches, or of tiles; (0, 0) of LLaVA-OneVision's one tile."""
    num_units: int = 1
    """Rows of `pixel_values` that it takes: patches, or tiles with the thumbnail."""
    layout: tuple[tuple[str, int], ...]
    """Its tokens as runs: (symbol, how many)."""
    num_frames: int = 0
    """Frames of a video; 0 for a picture."""
    num_times: int = 1
    """Patches along time."""
    num_blocks: int = 1
    """How often its layout is repeated, each at a placeholder of its own."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the picture."""
        return self.num_blocks * sum(count for _, count in self.layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSide:
    """What a model makes of videos, where that differs from pictures."""

    token: str
    """The symbol that the features of a video replace; templates write it where a video is."""
    min_pixels: int
    max_pixels: int
    """Smallest and largest area."""
    area: Literal["frame", "video"] = "frame"
    """Of what: a frame, or all frames together."""
    times: Literal["none", "seconds", "text"] = "none"
    """How a model is told when frames are shown: not at all, in seconds of its positions, or as
    text in front of each patch along time."""
    rate: float = 1.0
    """Positions per second, for "seconds"."""
    around: tuple[str, str] = ("", "")
    """Tokens before and after each patch along time, for "text"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureTokens:
    """Which tokens chat templates, processors and plans write for pictures."""

    soft: str
    """The symbol that the features of a picture replace."""
    marks: tuple[str, ...] = ()
    """The other symbols that a layout may have."""
    marker: str = ""
    """The token that a chat template writes where a picture is; "" for `soft`."""
    written: str = ""
    """What the model's processor writes for the marker before it repeats `soft`, which is once in
    it; "" for the marker itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "marker", self.marker or self.soft)
        object.__setattr__(self, "written", self.written or self.marker)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every symbol that a layout may have."""
        return (self.soft, *self.marks)


class Family(Protocol):
    """The picture side of a model; a frozen dataclass of plain values."""

    kind: ClassVar[str]
    """Its name in manifests."""

    @property
    def positions(self) -> Positions: ...

    @property
    def type_ids(self) -> str:
        """Name of the key of batches that is 1 for the tokens of pictures; "" for none."""

    @property
    def packs(self) -> bool:
        """Whether rows of several examples give each the result that it has alone."""

    @property
    def image_token(self) -> str:
        """`tokens.soft`, which is needed for every picture."""

    @property
    def tokens(self) -> PictureTokens:
        """How its pictures are written."""

    @property
    def filter(self) -> Filter:
        """Of the resize."""

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...

    def plan(self, size: Size) -> PicturePlan:
        """Plans the only picture of a sample; `plan_pictures` plans any number.

        Args:
          size: (height, width) of the upright original.

        Raises:
          SampleError: `picture_shape`, the family refuses such a picture.
        """

    def stored_size(self, size: Size) -> Size:
        """Computes the size to store a picture at, such that nothing is resized twice.

        A picture is stored as it is resized where that makes no side longer; otherwise as it is.

        Raises:
          SampleError: As `plan`.
        """

    def unlike(self, stored: Family) -> dict[str, str]:
        """Names what differs from the family of a dataset so that its pictures cannot serve it.

        Returns:
          {field: why}, empty where the view fits.
        """


def keep_smaller(size: Size, resized: Size) -> Size:
    """Gives the size to store: the resized one, unless a side of it is longer than the picture's.

    >>> keep_smaller((900, 1200), (868, 1148)), keep_smaller((20, 900), (28, 896))
    ((868, 1148), (20, 900))
    """
    shrinks = resized[0] <= size[0] and resized[1] <= size[1]
    return resized if shrinks else size


def different(view: Family, stored: Family, *, free: Mapping[str, bool]) -> dict[str, str]:
    """Compares the fields of two families.

    Args:
      view: What is asked for.
      stored: What a dataset was built for.
      free: Fields that may differ: True where no more may be asked for than was stored.
    """
    if view.kind != stored.kind:
        return {"kind": f"{stored.kind} stored, {view.kind} asked for"}
    wrong: dict[str, str] = {}
    for field in fields(view):  # type: ignore[arg-type]
        have, want = getattr(stored, field.name), getattr(view, field.name)
        if have == want or (field.name in free and not (free[field.name] and want > have)):
            continue
        wrong[field.name] = f"{have} stored, {want} asked for"
    return wrong


def same_tokens(view: Family, stored: Family) -> bool:
    """Tells whether pictures have the tokens that they were stored with, as fields show."""
    others = ("mean", "std", "sliding_window")
    return not different(view, stored, free=dict.fromkeys(others, False))


def require_numbers(family: Family, **least: int) -> None:
    """Refuses fields that are no whole numbers of at least so much.

    Raises:
      ConfigError: `family_field`.
    """
    for name, bound in least.items():
        value = getattr(family, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ConfigError(
                "family_field",
                where=f"{type(family).__name__}.{name}",
                name=name,
                got=repr(value),
                want=f"a whole number of at least {bound}",
            )
