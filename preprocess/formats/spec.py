"""A spec: the TOML file that says what a user's own data is and how it becomes samples.

format = "llava"
source = "chats.json"          # file, folder or pattern; relative to the spec
images = "images"              # folder or URL that image names start from

[columns]                      # field of the format = column of the file
image = "picture"

[splits]                       # split = files; without it, the names of the files decide
train = ["chats.json"]
validation = ["held_out.json"]

[settings]                     # any flag of `make shards`; the command line wins
image_size = 224
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardspec.errors import ConfigError, nearest, redacted_url
from shardspec.toml import load_toml

UNITS: Mapping[str, float | None] = {"pixel": None, "1": 1.0, "100": 100.0, "1000": 1000.0}
"""What coordinates are fractions of; None for pixels of the original image."""

BOXES = ("xyxy", "xywh", "cxcywh")
"""What the four numbers of a box may be: corners, a corner and a size, a centre and a size."""

NOTATIONS = ("json", "ref", "brackets")
"""How boxes may be written (`preprocess.text.styles.boxes`)."""

ASKED = ("vqa", "documents", "messages", "llava", "sharegpt")
"""Formats whose questions may have no answer."""

_ASKED_HINT = f"it is for {', '.join(ASKED)}"

_TYPES: Mapping[str, tuple[str, Any]] = {
    **dict.fromkeys(("columns", "splits", "settings", "documents"), ("a table", Mapping)),
    "validation": ("a number", (int, float)),
    "unanswered": ("a list of splits", list),
    **dict.fromkeys(
        ("max_images", "max_videos", "max_chars", "max_tokens"), ("a whole number", int)
    ),
}

SEVERAL = ("caption", "image")
"""Fields that may be in several columns."""

_PLACES = ("source", "settings", "splits", "styles")
"""Keys that say where something is, or that are in the recipe anyway."""

NAME = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""Names of datasets, by which files are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What the user's own data is."""

    name: str
    """Of the result, and of its files: letters, digits, "_" and "-"."""
    format: str
    """One of `preprocess.formats.FORMATS`."""
    source: str = "."
    """File, folder, pattern or URL of the rows."""
    images: str = ""
    """Folder or URL that relative image names start from; "" for the folder of the rows."""
    columns: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Column of the file for a field of the format, where the names differ; a list of columns for
    those of `SEVERAL`."""
    encoding: str = ""
    """Encoding of texts, as Python calls it, such as "cp1252"; "" for UTF-8, and for UTF-16 and
    UTF-32 that their first bytes tell."""
    style: str = ""
    """Style of the messages; "" for the format's own."""
    styles: str = ""
    """Style sheet, relative to the spec: the user's own styles; "" for none."""
    prompt: str = ""
    """User text for rows without one, such as captions."""
    unit: str = "pixel"
    """What coordinates are fractions of: "pixel", "1", "100" or "1000"."""
    box: str = ""
    """What the four numbers of a box are: "xyxy", "xywh" or "cxcywh". Boxes have no default."""
    notation: str = "json"
    """How boxes are written (`preprocess.text.styles.boxes`): "json", "ref" or "brackets"."""
    missing_placeholder: str = "front"
    """Where images go whose row has no placeholder at all: "front", or "refuse" the row."""
    max_images: int = 8
    """Images of a sample of a document; what is beyond becomes the next sample. 0 for any."""
    max_videos: int = 2
    """Videos of a sample of a document; what is beyond becomes the next sample. 0 for any."""
    max_chars: int = 0
    """Characters of a sample of a document; what is beyond becomes the next sample. 0 for any."""
    max_tokens: int = 0
    """Tokens of a sample of a document, images and frames included, above which it is left out; 0
    for any."""
    documents: Mapping[str, Any] = field(default_factory=dict)
    """How documents become examples (`preprocess.formats.DocumentPolicy`)."""
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Files or patterns of each split; {} leaves it to the names of the files."""
    validation: float = 0.0
    """Share of the images set aside as "validation", by a hash of the image; 0 for none."""
    unanswered: tuple[str, ...] = ()
    """Splits whose questions may have no answer, as in tests whose answers are hidden: they can be
    asked by an evaluation and nothing else. In others, a missing answer refuses the row."""
    licence: str = ""
    """Kept in the manifest for people."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Flags of `make shards`, by name."""

    def to_dict(self) -> dict[str, Any]:
        """Gives what samples follow from, as plain JSON: all but places, settings and secrets."""
        told = dataclasses.asdict(self)
        told["images"] = redacted_url(self.images) if "://" in self.images else self.images
        unused = [name for name in ("documents", "encoding", "unanswered") if not told[name]]
        unused += [] if "video" in self.columns else ["max_videos"]
        left_out = (*_PLACES, *unused)
        return {name: told[name] for name in told if name not in left_out}

    def column(self, name: str) -> str:
        """Names the column of the file that a field of the format is in; of several the first."""
        return self.names(name, (name,))[0]

    def names(self, name: str, usual: Sequence[str]) -> Sequence[str]:
        """Names the columns of a field: those of the spec, or the usual ones."""
        found = self.columns.get(name)
        return usual if found is None else [found] if isinstance(found, str) else found

    def named(self) -> dict[str, str]:
        """Gives the field of each column that the spec names."""
        return {column: name for name in self.columns for column in self.names(name, ())}


def read_spec(path: Path, *, formats: Mapping[str, Any]) -> Spec:
    """Reads a spec.

    Args:
      path: The TOML file.
      formats: The formats by name.

    Raises:
      ConfigError: `spec_file` (not there, no TOML), `spec_key` (unknown, or of another type),
        `spec_value`.
    """
    try:
        document = load_toml(path)
    except (OSError, ValueError) as error:  # TOML and UTF-8 errors are ValueErrors
        raise ConfigError("spec_file", where=str(path), error=error) from error
    known = {each.name: each for each in dataclasses.fields(Spec)}
    for name, value in document.items():
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError("spec_key.unknown", where=str(path), name=name, hint=hint)
        want, kinds = _TYPES.get(name, ("a text", str))
        if not isinstance(value, kinds) or isinstance(value, bool):
            got = type(value).__name__
            raise ConfigError("spec_key.type", where=str(path), name=name, want=want, got=got)
    if "format" not in document:
        raise ConfigError("spec_key.format", where=str(path), formats=", ".join(formats))
    columns = dict(document.get("columns", {}))
    for name, value in columns.items():
        texts = value if isinstance(value, list) and value and name in SEVERAL else [value]
        if not all(isinstance(each, str) for each in texts):
            got, want = type(value).__name__, "a text"
            want += ", or a list of texts" if name in SEVERAL else ""
            name = f"columns.{name}"
            raise ConfigError("spec_key.type", where=str(path), name=name, want=want, got=got)
    spec = Spec(
        **{
            **document,
            "name": document.get("name", path.stem),
            "splits": _splits(document.get("splits", {}), path),
            "columns": columns,
            "unanswered": tuple(document.get("unanswered", ())),
        }
    )
    check_spec(spec, where=str(path), formats=formats)
    return spec


def check_spec(spec: Spec, *, where: str, formats: Mapping[str, Any]) -> None:
    """Refuses values that mean nothing.

    Raises:
      ConfigError: `spec_value`, `spec_key`.
    """
    choices = {
        "format": formats,
        "unit": UNITS,
        "missing_placeholder": ("front", "refuse"),
        "box": ("", *BOXES),
        "notation": NOTATIONS,
    }

    def refuse(name: str, *, want: str, hint: str) -> ConfigError:
        got = getattr(spec, name)
        return ConfigError("spec_value", where=where, name=name, got=got, hint=hint, want=want)

    for name, known in choices.items():
        value = getattr(spec, name)
        if value not in known:
            names = [each for each in known if each]
            raise refuse(name, want=", ".join(names), hint=nearest(value, names))
    try:
        "a".encode(spec.encoding or "utf-8")
    except (LookupError, ValueError):
        hint = "such as cp1252, shift_jis or gb18030"
        raise refuse("encoding", want="an encoding that Python knows", hint=hint) from None
    if not NAME.fullmatch(spec.name):
        raise refuse("name", want='letters, digits, "_" and "-"', hint="give a short name")
    if spec.format == "boxes" and not spec.box:
        hint = "say what the four numbers of a box are"
        raise refuse("box", want=", ".join(BOXES), hint=hint)
    for name in ("max_images", "max_videos", "max_chars", "max_tokens"):
        if getattr(spec, name) < 0:
            raise refuse(name, want="0 or more", hint="0 is no limit")
    if not 0 <= spec.validation < 1:
        hint = "0.01 sets one image of a hundred aside"
        raise refuse("validation", want="0 or more, below 1", hint=hint)
    if spec.validation and spec.splits:
        hint = "[splits] says which files are of which split"
        raise refuse("validation", want="one of both", hint=hint)
    if spec.unanswered and spec.format not in ASKED:
        raise refuse("unanswered", want=f"nothing of the format {spec.format}", hint=_ASKED_HINT)
    if not all(isinstance(split, str) for split in spec.unanswered):
        raise refuse("unanswered", want="names of splits", hint='such as ["test"]')
    fields = formats[spec.format].fields
    for name in spec.columns:
        if name not in fields:
            hint = nearest(name, fields)
            name = f"columns.{name}"
            raise ConfigError("spec_key.unknown", where=where, name=name, hint=hint)


def _splits(table: Mapping[str, Any], path: Path) -> dict[str, tuple[str, ...]]:
    splits = {}
    for name, files in table.items():
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, list) or not files or not all(isinstance(f, str) for f in files):
            got = type(files).__name__
            raise ConfigError(
                "spec_key.type", where=str(path), name=f"splits.{name}", want="files", got=got
            )
        splits[name] = tuple(files)
    return splits
