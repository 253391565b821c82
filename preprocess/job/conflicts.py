"""How the identity of a job differs from that of the result in its output, as a table for people.

The settings that a person chose come first, by the names that they have on make's command line;
then what has no flag; then libraries. What only follows from other fields is left out, unless
nothing else differs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardspec.errors import ConflictError
from shardspec.manifest import Manifest, canonical_json

MAX_ROWS = 12
"""Rows of the table; of the others the number."""

_CELL_CHARS = 40
_NONE = "-"

_VARIABLES = {
    "dataset": "DATASET",
    "name": "NAME",
    "source": "SOURCE",
    "split": "SPLIT",
    "recipe.mode": "MODE",
    "limit": "LIMIT",
    "unmatched": "UNMATCHED_FILES",
    "duplicates": "DUPLICATES",
    "recipe.seed": "SEED",
    "tokenizer.name": "TOKENIZER",
    "tokenizer.special_ids.<im_start>": "PAD_VOCAB",
    "recipe.text.message_format": "MESSAGE_FORMAT",
    "recipe.text.prompt_templates": "PROMPTS",
    "recipe.text.system_prompt": "SYSTEM_PROMPT",
    "recipe.text.num_variants": "VARIANTS",
    "recipe.text.point_format": "POINT_FORMAT",
    "recipe.text.choices": "CHOICES",
    "recipe.text.chat_date": "CHAT_DATE",
    "recipe.text.whitespace": "WHITESPACE",
    "recipe.text.placeholders": "PLACEHOLDERS",
    "recipe.text.styles": "STYLES",
    "recipe.text.reasoning": "REASONING",
    "recipe.text.paraphrase": "PARAPHRASE",
    "recipe.text.actions": "ACTIONS",
    "recipe.text.movable": "MOVABLE",
    "recipe.image.views.0.size_px": "IMAGE_SIZE",
    "recipe.image.views.0.patch_px": "PATCH_SIZE",
    "recipe.image.views.0.max_crops": "CROPS",
    "recipe.image.views.1.max_crops": "HIGH_RES_CROPS",
    "recipe.image.views.0.fit": "IMAGE_FIT",
    "recipe.image.views.0.small_sides": "SMALL_SIDES",
    "recipe.image.headroom": "IMAGE_BOUND",
    "recipe.image.max_side_px": "IMAGE_BOUND",
    "recipe.image.codec": "CODEC",
    "recipe.image.quality": "QUALITY",
    "recipe.image.keep": "KEEP",
    "recipe.image.resample": "RESAMPLE",
    "recipe.image.decode": "DECODE",
    "recipe.image.limits.max_megapixels": "MAX_MEGAPIXELS",
    "recipe.image.limits.max_source_side_px": "MAX_SOURCE_SIDE",
    "recipe.image.limits.max_aspect": "MAX_ASPECT",
    "recipe.image.limits.max_decode_bytes": "DECODE_MEMORY",
    "recipe.video.store": "VIDEO_STORE",
    "recipe.video.mode": "FRAMES",
    "recipe.video.max_frames": "MAX_FRAMES",
    "recipe.video.max_fps": "MAX_FPS",
    "recipe.video.min_spacing_s": "FRAME_SPACING",
    "recipe.video.pool": "FRAME_POOL",
    "recipe.video.damaged": "DAMAGED_VIDEOS",
    "recipe.video.subtitles": "SUBTITLES",
    "recipe.video.subtitle_tokens": "SUBTITLE_TOKENS",
    "recipe.video.subtitle_window_s": "SUBTITLE_WINDOW",
    "recipe.video.time_limit_s": "VIDEO_TIME",
    "recipe.video.memory_bytes": "VIDEO_MEMORY",
    "shard_bytes": "SHARD_SIZE",
    "num_shards": "NUM_SHARDS",
    "downloads.robots_txt": "ROBOTS_TXT",
    "downloads.x_robots_tag": "X_ROBOTS_TAG",
    "downloads.sha256": "SHA256",
    "downloads.placeholder_urls": "PLACEHOLDER_URLS",
}
"""Fields of the identity that follow from one setting, in the order of the table."""

_SHEET = "recipe.text.styles."
"""A style sheet is one setting, and its table says what in it differs."""

_DERIVED = (
    "recipe.frame.",
    "recipe.several_images",
    "recipe.action_vocab_size",
    "recipe.image.views.",
    "recipe.model.",
    "tokenizer.",
)
"""Fields that follow from others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A field that differs."""

    field: str
    """Its path in the identity, dotted."""
    old: object
    new: object

    @property
    def name(self) -> str:
        """What people call it: the variable of make, or the path."""
        if self.field == "libraries.code_sha256":
            return "code"
        if self.field.startswith(_SHEET):
            return f"STYLES {self.field.removeprefix(_SHEET)}"
        return _VARIABLES.get(self.field, self.field)


def require_same_result(
    manifest: Manifest,
    *,
    where: str,
    build_keys: Mapping[str, str],
    sources: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuses an output that holds the result of other settings.

    Args:
      manifest: Of the output.
      where: Its URL.
      build_keys: Those that each split would get.
      sources: What each split would be made from.

    Raises:
      ConflictError: `job_conflict`.
    """
    if {name: entry.build_key for name, entry in manifest.splits.items()} == build_keys:
        return
    theirs = {name: dict(entry.source) for name, entry in manifest.splits.items()}
    found = find_differences({"splits": theirs}, {"splits": sources}) or [
        Difference(field="shards", old="others", new="others")
    ]
    raise ConflictError("job_conflict.result", where=where, table=table(found))


def find_differences(old: object, new: object) -> list[Difference]:
    """Lists where two identities differ, the user's settings first.

    >>> [d.name for d in find_differences({"limit": 1, "libraries": {"numpy": "1"}},
    ...                                   {"limit": 2, "libraries": {"numpy": "2"}})]
    ['LIMIT', 'libraries.numpy']
    """
    found = [*_walk(old, new, "")]
    chosen = [each for each in found if not _is_derived(each.field)]
    if any(each.field == "tokenizer.name" for each in chosen):
        chosen = [each for each in chosen if each.name != "PAD_VOCAB"]
    order = [*_VARIABLES]
    return sorted(
        chosen or found,
        key=lambda each: (
            order.index(_setting(each.field)) if _setting(each.field) in order else len(order),
            each.field.startswith("libraries."),
        ),
    )


def check_same(old: Manifest, new: Manifest, *, where: str, named: bool = False) -> None:
    """Refuses to put splits of different recipes into one dataset.

    Args:
      old: Of the output.
      new: What it would become.
      where: URL of the manifest.
      named: Whether the user has given the result its name.

    Raises:
      ConflictError: `recipe_conflict`.
    """
    name = "name" if named else "dataset"
    found = find_differences(*(_described(each, name) for each in (old, new)))
    if found:
        raise ConflictError("recipe_conflict.job", where=where, table=table(found))


def action_quantiles(source: Mapping[str, Any]) -> dict[str, Any]:
    """Finds what the actions of a split are scaled by; {} where it has none.

    Args:
      source: What the split is made from, as its manifest says it.
    """
    found: object = source
    for name in ("robot", "statistics", "actions"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return {n: found.get(n) for n in ("q01", "q99")} if isinstance(found, Mapping) else {}


def _described(manifest: Manifest, name: str) -> object:
    """Gives what all splits of a dataset share, as an identity has it."""
    kind = "imported tars" if manifest.raw else "shards"
    return json.loads(
        canonical_json(
            {
                name: manifest.dataset,
                "recipe": dict(manifest.recipe),
                "tokenizer": dataclasses.asdict(manifest.tokenizer),
                "libraries": dict(manifest.libraries),
                # What a split that is added to the other kind would lose.
                "kind": kind if manifest.view is None else "a view of other shards",
                "added columns": "none" if manifest.columns is None else "some",
            }
        )
    )


def table(
    differences: Sequence[Difference], *, heads: tuple[str, str] = ("in the output", "now")
) -> str:
    """Lays differences out as lines under a heading.

    Args:
      differences: As `find_differences` gives them.
      heads: What the two values are.
    """
    rows = [("setting", *heads)]
    for each in differences[:MAX_ROWS]:
        rows.append((each.name, *_cells(each.old, each.new)))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [
        f"  {name:<{widths[0]}}  {old:<{widths[1]}}  {new}".rstrip() for name, old, new in rows
    ]
    more = len(differences) - MAX_ROWS
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def _setting(field: str) -> str:
    return _SHEET[:-1] if field.startswith(_SHEET) else field


def _is_derived(field: str) -> bool:
    return field not in _VARIABLES and field.startswith(_DERIVED)


def _walk(old: object, new: object, path: str) -> Iterator[Difference]:
    old, new = _keyed(old), _keyed(new)
    if isinstance(old, Mapping) and new == _NONE:
        new = {}
    if isinstance(new, Mapping) and old == _NONE:
        old = {}
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in [*old, *(name for name in new if name not in old)]:
            where = f"{path}.{name}" if path else str(name)
            yield from _walk(old.get(name, _NONE), new.get(name, _NONE), where)
    elif old != new:
        yield Difference(field=path, old=old, new=new)


def _keyed(value: object) -> object:
    """Gives lists of mappings as mappings by number, so that their fields are compared.

    A view without tiles has no number of them: its field is not used.
    """
    if isinstance(value, Mapping) and value.get("crop_mode") == "resize":
        return {**value, "max_crops": 0}
    if isinstance(value, list | tuple):
        if any(isinstance(each, Mapping) for each in value):
            return {str(i): each for i, each in enumerate(value)}
        return list(value)
    return value


def _cells(old: object, new: object) -> tuple[str, str]:
    """Writes two values so that they differ where they are shortened, too."""
    texts = ["none" if value is None else str(value) for value in (old, new)]
    if max(map(len, texts)) <= _CELL_CHARS:
        return texts[0], texts[1]
    same = 0
    while same < min(map(len, texts)) and texts[0][same] == texts[1][same]:
        same += 1
    start = max(0, same - _CELL_CHARS // 4)
    return tuple(_shortened(text, start) for text in texts)  # type: ignore[return-value]


def _shortened(text: str, start: int) -> str:
    head = "..." if start else ""
    body = text[start:]
    room = _CELL_CHARS - len(head)
    return head + (body if len(body) <= room else body[: room - 3] + "...")
