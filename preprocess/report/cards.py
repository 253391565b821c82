"""Cards of stored samples: pictures with crops and marks, each variant of the texts, tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from preprocess.page import (
    PICTURE_PX,
    Child,
    Markup,
    Piece,
    Shape,
    card,
    drawing,
    element,
    join,
    loss_text,
    picture_uri,
)
from preprocess.report.actions import action_table
from preprocess.report.marks import Mark, marks, words
from preprocess.report.stored import Sample, SampleReader
from preprocess.report.styles import style_names
from preprocess.text import Tokenizer
from shardspec.families import PicturePlan, StoredModel, plan_pictures, plan_videos
from shardspec.features import FEATURES
from shardspec.manifest import Manifest
from shardspec.media import decode_stored
from shardspec.messages import counted
from shardspec.sample import (
    WEIGHT_ONE,
    Geometry,
    clip_rows,
    image_rows,
    lead_rows,
    text_rows,
    video_rows,
)
from shardspec.tiling import (
    ImageView,
    canvas_size,
    crop_boxes,
    frame_size,
    num_crops,
    num_image_tokens,
)

_SMALL_PX = 220
"""Longest side of pictures of which a sample has many, such as frames."""

_MOST_IMAGES = 12
_MOST_BRANCHES = 8
_MOST_VARIANTS = 12
_MOST_TOKENS = 240
_MOST_CHARS = 2_000


def sample_card(sample: Sample, reader: SampleReader, tokenizer: Tokenizer, *, why: str) -> Markup:
    """Shows a sample: its pictures, each variant of its texts, and their tokens.

    Args:
      sample: With its images.
      reader: That it is from.
      tokenizer: Of the dataset.
      why: It was chosen; "" for no reason.
    """
    row = sample.row
    styles = style_names(sample.record.get("message_list"))
    facts = [
        why,
        f"{sample.split} {sample.number:,}",
        styles,
        f"{counted(int(row['num_tokens']), 'text token')}, "
        f"{int(row['num_loss_tokens']):,} of them learned",
        counted(int(row["num_bytes"]), "byte"),
    ]
    metadata = sample.record.get("metadata")
    return card(
        sample.key,
        *_pictures(sample, reader),
        *action_table(sample.record, _robot(sample, reader.manifest).get("action_names") or ()),
        *_texts(sample, tokenizer),
        element(
            "details",
            element("summary", f"Metadata of {sample.key}"),
            element(
                "div",
                _shortened(json.dumps(metadata, sort_keys=True, ensure_ascii=False)),
                class_="text",
            ),
        )
        if metadata
        else None,
        meta="; ".join(filter(None, facts)),
    )


def _robot(sample: Sample, manifest: Manifest) -> Mapping[str, Any]:
    """What the source says of its robot; {} where it has none."""
    return manifest.splits[sample.split].source.get("robot") or {}


def _pictures(sample: Sample, reader: SampleReader) -> list[Child]:
    sizes = [image.source_size for image in sample.images]
    if reader.codec == FEATURES:
        told = ", ".join(f"{width}×{height}" for width, height in sizes)
        return [element("p", f"Features of pictures of {told}.", class_="note")] if told else []
    found = marks(sample.record, sizes)
    printed = words(sample.record, num_images=len(sizes))
    views = (sample.record.get("metadata") or {}).get("views") or ()
    seen = _seen(sample, reader.manifest)
    shown: list[Child] = []
    for i, image in enumerate(sample.images[:_MOST_IMAGES]):
        where = f"{sample.shard} sample {sample.key}"
        pixels = decode_stored(image.payload, codec=reader.codec, where=where)
        longest_px = PICTURE_PX if len(sample.images) <= 2 else _SMALL_PX
        uri, width, height = picture_uri(pixels, longest_px=longest_px)
        own = [mark for mark in found if mark.image == i]
        told, cut = seen[i]
        crops = [] if cut is None else crop_shapes(image.source_size, cut, (width, height))
        page = [mark for mark in printed if mark.image == i]
        shapes = [_mark_shape(word, (width, height), kind="word") for word in page]
        shapes += [*crops, *(_mark_shape(mark, (width, height)) for mark in own)]
        size = f"{image.source_size[0]}×{image.source_size[1]}"
        stored = f"{image.stored_size[0]}×{image.stored_size[1]}"
        geometry = Geometry(int(sample.row["geometry"])).name or "none"
        number = f" {i + 1} of {len(sample.images)}" if len(sample.images) > 1 else ""
        view = f"view {views[i]}; " if i < len(views) else ""
        named = sorted({mark.label for mark in own if mark.label})
        marked = f"; {counted(len(page), 'word')}" if page else ""
        if own:
            marked += f"; {len(own)} marked" + (f": {', '.join(named)}" if named else "")
        shown.append(
            drawing(
                uri,
                width,
                height,
                shapes,
                alt=f"Picture{number} of sample {sample.key}, {view}{size} pixels, {told}{marked}",
                caption=f"{view}{size}, stored as {stored}, {counted(len(image.payload), 'byte')}; "
                f"{told}; augmentation: {geometry.lower().replace('|', ', ')}{marked}",
            )
        )
    if len(shown) > 2:
        shown = [element("div", *shown, class_="tiles")]
    for _, video, _, count, _, num_bytes, *_ in clip_rows(sample.spans).tolist():
        size = f"{counted(count, 'frame')}, {counted(num_bytes, 'byte')}"
        told = f"Video {video + 1} is a clip of {size}."
        shown.append(element("p", told, class_="note"))
    rest = len(sample.images) - _MOST_IMAGES
    more = f"{counted(rest, 'more picture')}."
    shown.append(element("p", more, class_="note") if rest > 0 else None)
    return shown


def _plan_text(plan: PicturePlan) -> str:
    return (
        f"{counted(plan.num_tokens, 'image token')} at {plan.resized[1]}×{plan.resized[0]}, "
        f"{plan.grid[0]}×{plan.grid[1]} parts"
    )


def _seen(sample: Sample, manifest: Manifest) -> list[tuple[str, ImageView | None]]:
    """Says of each picture what a model sees of it, and which view's crops are drawn."""
    sizes = [image.source_size for image in sample.images]
    if "model" in manifest.recipe:
        family = StoredModel.from_dict(manifest.recipe["model"]).family
        # Those of the frames of clips too.
        shapes = [(int(row[3]), int(row[2])) for row in image_rows(sample.spans)]
        videos = [(int(row[2]), int(row[3])) for row in video_rows(sample.spans)]
        pictures = shapes[: videos[0][0]] if videos else shapes
        told = [_plan_text(plan) for plan in plan_pictures(family, pictures)]
        for plan in plan_videos(family, shapes, videos):
            told += [
                f"frame {i + 1} of {plan.num_frames}, which are {_plan_text(plan)}"
                for i in range(plan.num_frames)
            ]
        return [(each, None) for each in told]
    views = [ImageView.from_dict(v) for v in manifest.recipe["image"]["views"]]
    found: list[tuple[str, ImageView | None]] = []
    for size in sizes:
        told = []
        for view in views:
            crops, tokens = num_crops(*size, view), num_image_tokens(*size, view)
            shown = f"{counted(crops, 'crop')} and {counted(tokens, 'image token')}"
            told.append(f"{shown} at {view.size_px} px")
        found.append(("; ".join(told), views[-1]))
    times = {int(row[1]): int(row[6]) / 1000 for row in lead_rows(sample.spans)}
    for _, video, first, count, *_ in video_rows(sample.spans).tolist():
        for i in range(first, min(first + count, len(found))):  # those of a clip are in its file
            told_time = (
                f"frame {i - first + 1} of {count} of video {video + 1}, at {times[i]:.2f} s"
            )
            found[i] = (told_time, None)
    return found


def crop_shapes(source: tuple[int, int], view: ImageView, shown: tuple[int, int]) -> list[Shape]:
    """Places the crops of a view on a picture as it is shown.

    Args:
      source: Width and height of the original.
      view: That cuts the crops.
      shown: Width and height of the picture on the page.
    """
    boxes = crop_boxes(*source, view).astype(float)
    canvas, frame = canvas_size(*source, view), frame_size(*source, view)
    if view.fit == "center-crop":
        boxes = np.array([[0, 0, *frame]], float)
    shapes = []
    for i, box in enumerate(boxes.tolist()):
        at = []
        for k, value in enumerate(box):
            axis = k % 2
            # Where the frame begins on the canvas; below 0 where the canvas is centred on it.
            border = (canvas[axis] - frame[axis]) / 2
            share = (value + border) / canvas[axis]
            at.append(min(max(share, 0.0), 1.0) * shown[axis])
        label = str(i + 1) if len(boxes) > 1 else ""
        shapes.append(Shape("crop", tuple(at), label))
    return shapes


def _mark_shape(mark: Mark, shown: tuple[int, int], *, kind: str = "box") -> Shape:
    at = tuple(min(max(v, 0.0), 1.0) * shown[k % 2] for k, v in enumerate(mark.at))
    if kind == "word":
        return Shape(kind, at)
    return Shape("point" if len(at) == 2 else "box", at, mark.label if len(at) == 4 else "")


def _texts(sample: Sample, tokenizer: Tokenizer) -> list[Child]:
    turns: dict[tuple[int, int], list[list[int]]] = {}
    for row in text_rows(sample.spans).tolist():
        turns.setdefault((row[1], row[2]), []).append(row)
    shown: list[Child] = []
    for (branch, turn), rows in turns.items():
        if branch >= _MOST_BRANCHES:
            rest = 1 + max(b for b, _ in turns) - _MOST_BRANCHES
            shown.append(element("p", f"{counted(rest, 'more conversation')}.", class_="note"))
            break
        title = f"Conversation {branch + 1}, exchange {turn + 1}"
        weight = rows[0][7] / WEIGHT_ONE
        weighed = "" if weight == 1 else f", loss weight {weight:g}"
        ids = [tuple(sample.tokens[row[3] : row[4]].tolist()) for row in rows]
        responses = [tuple(sample.tokens[row[5] : row[6]].tolist()) for row in rows]
        several = counted(len(rows), "variant")
        prompts, answers = list(dict.fromkeys(ids)), list(dict.fromkeys(responses))
        if not any(answers) and not any(tokenizer.decode(list(run)).strip() for run in prompts):
            continue  # a line break of a chat template after the last answer
        shown += [
            element("h4", f"{title}: {several}{weighed}"),
            _variants("Prompt", prompts, tokenizer),
            _variants("Answer", answers, tokenizer) if any(answers) else None,
            element(
                "details",
                element("summary", f"Tokens of the first variant, {title.lower()}"),
                loss_text(
                    token_pieces(
                        [*ids[0], *responses[0]],
                        [False] * len(ids[0]) + [weight > 0] * len(responses[0]),
                        tokenizer.decode,
                    ),
                    label=f"Tokens of {title.lower()}; marked ones are learned",
                ),
            ),
        ]
    return shown


def _variants(name: str, runs: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Markup:
    texts = [_shortened(tokenizer.decode(list(run))) for run in runs]
    first = element("div", element("b", f"{name}: "), texts[0], class_="text")
    if len(texts) == 1:
        return first
    others = [element("li", text, class_="text") for text in texts[1:_MOST_VARIANTS]]
    count = f"{len(texts) - 1} more {name.lower()}{'s' if len(texts) > 2 else ''}"
    return join([first, element("details", element("summary", count), element("ul", *others))])


def token_pieces(
    ids: Sequence[int], learned: Sequence[bool], decode: Callable[[list[int]], str]
) -> list[Piece]:
    """Decodes tokens one by one; those that only together make a character are one piece."""
    pieces: list[Piece] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        if len(pieces) >= _MOST_TOKENS:
            pieces.append(Piece(f"… {counted(len(ids) - start, 'more token')}", False, symbol=True))
            break
        text = decode(list(ids[start:stop]))
        incomplete = "\N{REPLACEMENT CHARACTER}" in text and stop - start < 4
        if incomplete and stop < len(ids) and learned[stop] == learned[start]:
            continue
        pieces.append(Piece(text, learned[start]))
        start = stop
    return pieces


def _shortened(text: str) -> str:
    if len(text) <= _MOST_CHARS:
        return text
    return f"{text[:_MOST_CHARS]} … ({counted(len(text) - _MOST_CHARS, 'more character')})"
