"""Parts of pages about samples: pictures with shapes on them, tokens with their loss, cards."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from preprocess.page.html import Child, Markup, element

PICTURE_PX = 480
"""Longest side of a picture on a page."""

_QUALITY = 80


class Piece(NamedTuple):
    """Tokens that are decoded together."""

    text: str
    learned: bool
    symbol: bool = False
    """Whether it describes tokens, and is not their text."""


class Shape(NamedTuple):
    """Something drawn on a picture, in pixels of the picture as it is shown."""

    kind: str
    """"crop", "box", "point" or "word"."""
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
    image = thumbnail(pixels, longest_px=longest_px)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY)
    text = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/jpeg;base64,{text}", image.width, image.height


def thumbnail(pixels: np.ndarray, *, longest_px: int) -> Image.Image:
    """Reduces a picture, uint8 [H, W, 3], to a longest side; smaller ones stay as they are."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    return image


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
    if shape.kind == "word":  # of which a page has hundreds
        return [element("rect", **box, class_="word")]
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
            visible(piece.text),
            class_="symbol" if piece.symbol else None,
        )
        for piece in pieces
    ]
    return element("div", *shown, class_="text tokens", role="group", aria_label=label)


def card(title: str, *children: Child, meta: Child = None) -> Markup:
    """Frames what is shown of one sample."""
    told = element("p", meta, class_="meta") if meta else None
    return element("article", element("h3", title), told, *children, class_="card")


def visible(text: str) -> str:
    """Makes spaces and ends of lines seen; a line may end in front of a space.

    >>> visible(" a\\n")
    '\\u200b·a⏎'
    """
    return text.replace(" ", "\u200b·").replace("\n", "⏎").replace("\t", "⇥")
