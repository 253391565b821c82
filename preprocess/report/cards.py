"""Cards: one sample each, its pictures with what is drawn on them, its texts and its tokens.

The parts are shared by all pages: `drawing` puts shapes on a picture, `loss_text` marks the tokens
that are learned, `card` is the frame.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from preprocess.report.html import Child, Markup, element, join
from preprocess.report.marks import Mark, marks
from preprocess.report.stored import Sample, SampleReader
from preprocess.report.styles import style_names
from preprocess.text import Tokenizer
from shardspec.media import decode_stored
from shardspec.sample import WEIGHT_ONE, Geometry, text_rows
from shardspec.tiling import (
    ImageView,
    canvas_size,
    crop_boxes,
    frame_size,
    num_crops,
    num_image_tokens,
)

PICTURE_PX = 480
"""Longest side of a picture on a page."""

_QUALITY = 80
_MOST_IMAGES = 8
_MOST_BRANCHES = 8
_MOST_VARIANTS = 12
_MOST_TOKENS = 240
_MOST_CHARS = 2_000


class Piece(NamedTuple):
    """Tokens that are decoded together."""

    text: str
    learned: bool
    symbol: bool = False
    """Whether it describes tokens, and is not their text."""


class Shape(NamedTuple):
    """Something drawn on a picture, in pixels of the picture as it is shown."""

    kind: str
    """"crop", "box" or "point"."""
    at: tuple[float, ...]
    label: str = ""


def picture_uri(pixels: np.ndarray, *, longest_px: int = PICTURE_PX) -> tuple[str, int, int]:
    """Encodes a picture for a page.

    Args:
      pixels: uint8 [H, W, 3].
      longest_px: Larger ones are reduced to this side.

    Returns:
      (data: URI, width, height).
    """
    image = Image.fromarray(pixels)
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    text = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/jpeg;base64,{text}", image.width, image.height


def figure(pixels: np.ndarray, *, alt: str, caption: Child = None, longest_px: int) -> Markup:
    """Shows a picture without anything on it."""
    uri, width, height = picture_uri(pixels, longest_px=longest_px)
    image = element("img", src=uri, width=width, height=height, alt=alt)
    return element("figure", image, element("figcaption", caption) if caption else None)


def drawing(
    uri: str, width: int, height: int, shapes: Sequence[Shape], *, alt: str, caption: Child = None
) -> Markup:
    """Shows a picture with shapes on it.

    Args:
      uri: Of the picture.
      width: Of the picture, in pixels.
      height: The same.
      shapes: What to draw.
      alt: What it shows, in words.
      caption: Below it.
    """
    drawn: list[Child] = [element("image", href=uri, width=width, height=height)]
    for shape in shapes:
        drawn += _drawn(shape)
    picture = element(
        "svg",
        *drawn,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_label=alt,
    )
    return element("figure", picture, element("figcaption", caption) if caption else None)


def _drawn(shape: Shape) -> list[Markup]:
    if shape.kind == "point":
        x, y = (f"{value:.1f}" for value in shape.at)
        return [element("circle", cx=x, cy=y, r=5, class_="pin")]
    x1, y1, x2, y2 = shape.at
    box = {
        "x": f"{x1:.1f}",
        "y": f"{y1:.1f}",
        "width": f"{max(0.0, x2 - x1):.1f}",
        "height": f"{max(0.0, y2 - y1):.1f}",
    }
    # The dark line below it is seen on bright pictures.
    lines = [
        element("rect", **box, class_="halo", stroke_width=4),
        element("rect", **box, class_=shape.kind, stroke_width=2),
    ]
    if shape.label:
        label = element("text", shape.label, x=f"{x1 + 4:.1f}", y=f"{y1 + 14:.1f}", class_="label")
        lines.append(label)
    return lines


def loss_text(pieces: Sequence[Piece], *, label: str) -> Markup:
    """Shows decoded tokens, with those that are learned as `mark` elements."""
    shown = [
        element(
            "mark" if piece.learned else "span",
            _visible(piece.text),
            class_="symbol" if piece.symbol else None,
        )
        for piece in pieces
    ]
    return element("div", *shown, class_="text tokens", role="group", aria_label=label)


def card(title: str, *children: Child, meta: Child = None) -> Markup:
    """Frames what is shown of one sample."""
    told = element("p", meta, class_="meta") if meta else None
    return element("article", element("h3", title), told, *children, class_="card")


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
        f"{int(row['num_tokens']):,} text tokens, {int(row['num_loss_tokens']):,} of them learned",
        f"{int(row['num_bytes']):,} bytes",
    ]
    metadata = sample.record.get("metadata")
    return card(
        sample.key,
        *_pictures(sample, reader),
        *_texts(sample, tokenizer),
        element(
            "details",
            element("summary", f"Metadata of {sample.key}"),
            element("div", _shortened(str(metadata)), class_="text"),
        )
        if metadata
        else None,
        meta="; ".join(filter(None, facts)),
    )


def _pictures(sample: Sample, reader: SampleReader) -> list[Child]:
    views = [ImageView.from_dict(v) for v in reader.manifest.recipe["image"]["views"]]
    sizes = [image.source_size for image in sample.images]
    found = marks(sample.record, sizes)
    shown: list[Child] = []
    for i, image in enumerate(sample.images[:_MOST_IMAGES]):
        where = f"{sample.shard} sample {sample.key}"
        pixels = decode_stored(image.payload, codec=reader.codec, where=where)
        uri, width, height = picture_uri(pixels)
        own = [mark for mark in found if mark.image == i]
        shapes = [
            *crop_shapes(image.source_size, views[-1], (width, height)),
            *(_mark_shape(mark, (width, height)) for mark in own),
        ]
        told = [
            f"{num_crops(*image.source_size, view)} crops and "
            f"{num_image_tokens(*image.source_size, view):,} image tokens at {view.size_px} px"
            for view in views
        ]
        size = f"{image.source_size[0]}×{image.source_size[1]}"
        stored = f"{image.stored_size[0]}×{image.stored_size[1]}"
        geometry = Geometry(int(sample.row["geometry"])).name or "none"
        number = f" {i + 1} of {len(sample.images)}" if len(sample.images) > 1 else ""
        named = sorted({mark.label for mark in own if mark.label})
        marked = (
            (f", {len(own)} marked" + (f": {', '.join(named)}" if named else "")) if own else ""
        )
        shown.append(
            drawing(
                uri,
                width,
                height,
                shapes,
                alt=f"Picture{number} of sample {sample.key}, {size} pixels, {told[-1]}{marked}",
                caption=f"{size}, stored as {stored}, {len(image.payload):,} bytes; "
                f"{'; '.join(told)}; may change: {geometry.lower().replace('|', ', ')}{marked}",
            )
        )
    rest = len(sample.images) - _MOST_IMAGES
    shown.append(element("p", f"{rest} more pictures.", class_="note") if rest > 0 else None)
    return shown


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


def _mark_shape(mark: Mark, shown: tuple[int, int]) -> Shape:
    at = tuple(min(max(v, 0.0), 1.0) * shown[k % 2] for k, v in enumerate(mark.at))
    return Shape("point" if len(at) == 2 else "box", at, mark.label if len(at) == 4 else "")


def _texts(sample: Sample, tokenizer: Tokenizer) -> list[Child]:
    turns: dict[tuple[int, int], list[list[int]]] = {}
    for row in text_rows(sample.spans).tolist():
        turns.setdefault((row[1], row[2]), []).append(row)
    shown: list[Child] = []
    for (branch, turn), rows in turns.items():
        if branch >= _MOST_BRANCHES:
            rest = 1 + max(b for b, _ in turns) - _MOST_BRANCHES
            shown.append(element("p", f"{rest} more conversations.", class_="note"))
            break
        title = f"Conversation {branch + 1}, exchange {turn + 1}"
        weight = rows[0][7] / WEIGHT_ONE
        weighed = "" if weight == 1 else f", loss weight {weight:g}"
        ids = [tuple(sample.tokens[row[3] : row[4]].tolist()) for row in rows]
        responses = [tuple(sample.tokens[row[5] : row[6]].tolist()) for row in rows]
        several = "1 variant" if len(rows) == 1 else f"{len(rows)} variants"
        answers = list(dict.fromkeys(responses))
        shown += [
            element("h4", f"{title}: {several}{weighed}"),
            _variants("Prompt", list(dict.fromkeys(ids)), tokenizer),
            _variants("Answer", answers, tokenizer),
            element(
                "details",
                element("summary", f"Tokens of the first variant, {title.lower()}"),
                loss_text(
                    token_pieces(
                        [*ids[0], *responses[0]],
                        [False] * len(ids[0]) + [True] * len(responses[0]),
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
            pieces.append(Piece(f"… {len(ids) - start:,} more tokens", False, symbol=True))
            break
        text = decode(list(ids[start:stop]))
        incomplete = "\N{REPLACEMENT CHARACTER}" in text and stop - start < 4
        if incomplete and stop < len(ids) and learned[stop] == learned[start]:
            continue
        pieces.append(Piece(text, learned[start]))
        start = stop
    return pieces


def _visible(text: str) -> str:
    """Makes spaces and ends of lines seen.

    >>> _visible(" a\\n")
    '·a⏎'
    """
    return text.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def _shortened(text: str) -> str:
    if len(text) <= _MOST_CHARS:
        return text
    return f"{text[:_MOST_CHARS]} … ({len(text) - _MOST_CHARS:,} more characters)"
