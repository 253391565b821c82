"""Sheets: a page as one PNG, drawn with Pillow and its built-in font; equal content, equal bytes.

A sheet is blocks from top to bottom. Each is made for the one width that all have, so that its
height is known before anything is drawn, and a sheet ends at a block where it would get too high.
The font has the characters of ASCII and few others; what it lacks is drawn as a box.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess.page.html import printable
from preprocess.page.parts import Piece, thumbnail
from shardspec.messages import counted

MOST_HEIGHT_PX = 16_000
"""Of a sheet, but for its last line: viewers have trouble with higher pictures."""

MOST_LINES = 40
"""Of a text."""

_MOST_CHARS = 500
"""Of a line."""

_WIDTH, _MARGIN, _PAD, _GAP = 1280, 32, 16, 8
_LEFT = _MARGIN + _PAD
_INNER = _WIDTH - 2 * _LEFT
_PAPER, _CARD, _INK, _SOFT = "#ffffff", "#f5f7fa", "#1b232d", "#4c5967"
_LINE, _BAR, _LEARNED = "#cdd5de", "#2a6bb0", "#ffe9a3"
"""The colors of page.css in its light scheme."""


class Block(NamedTuple):
    """A part of a sheet, as wide as all are."""

    height: int
    draw: Callable[[Image.Image, int], None]
    """Draws it into the sheet, its upper edge at a y."""


class Figure(NamedTuple):
    """A picture with a caption below it."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    caption: str
    longest_px: int


def draw_sheet(head: Sequence[Block], cards: Sequence[Sequence[Block]], *, of: str) -> bytes:
    """Makes a PNG.

    Args:
      head: What is above the cards.
      cards: The blocks of each.
      of: What a card is of, for the line that says how many were left out: "row".
    """
    bottom = _MARGIN + sum(block.height for block in head)
    placed: list[Sequence[Block]] = []
    note = None
    for i, card in enumerate(cards):
        fitting, height = 0, bottom + 3 * _PAD
        while fitting < len(card) and height + card[fitting].height <= MOST_HEIGHT_PX:
            height += card[fitting].height
            fitting += 1
        if fitting:
            placed.append(card[:fitting])
            bottom = height
        if fitting < len(card):
            rest = [f"the end of {of} {i}"] if fitting else []
            whole = len(cards) - i - bool(fitting)
            rest += [counted(whole, f"more {of}")] if whole else []
            (note,) = text_blocks(f"Left out of this picture: {' and '.join(rest)}.", size=16)
            break
    height = bottom + _MARGIN + (note.height + _PAD if note else 0)
    image = Image.new("RGB", (_WIDTH, height), _PAPER)
    y = _drawn(image, head, _MARGIN)
    for card in placed:
        frame = (_MARGIN, y + _PAD, _WIDTH - _MARGIN, y + 3 * _PAD + sum(b.height for b in card))
        ImageDraw.Draw(image).rounded_rectangle(frame, 8, fill=_CARD)
        y = _drawn(image, card, y + 2 * _PAD) + _PAD
    if note:
        note.draw(image, y + _PAD)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _drawn(image: Image.Image, blocks: Sequence[Block], y: int) -> int:
    """Draws blocks from a y on, and gives the y below them."""
    for block in blocks:
        block.draw(image, y)
        y += block.height
    return y


def text_blocks(text: str, *, size: int = 14, soft: bool = False) -> list[Block]:
    """Writes a text, one block for each of its lines.

    Args:
      text: Its lines end where they are full.
      size: Of the font, in pixels.
      soft: In the paler color.
    """
    font, color = _font(size), _SOFT if soft else _INK

    def line(words: str) -> Block:
        def drawn(image: Image.Image, y: int) -> None:
            ImageDraw.Draw(image).text((_LEFT, y), words, font=font, fill=color)

        return Block(size * 3 // 2, drawn)

    return [line(words) for words in _wrapped(text, font, _INNER)]


def space_block(height: int = _PAD) -> Block:
    """Leaves space."""
    return Block(height, lambda _, __: None)


def fact_blocks(facts: Sequence[tuple[str, str]]) -> list[Block]:
    """Shows names with their values, side by side."""
    width = _INNER // max(1, len(facts))

    def drawn(image: Image.Image, y: int) -> None:
        draw = ImageDraw.Draw(image)
        for i, (name, value) in enumerate(facts):
            x = _LEFT + i * width
            draw.rounded_rectangle((x, y + 6, x + width - _GAP, y + 62), 6, fill=_CARD)
            draw.text((x + 12, y + 12), name, font=_font(13), fill=_SOFT)
            draw.text((x + 12, y + 32), value, font=_font(20), fill=_INK)

    return [Block(76, drawn)]


def table_blocks(rows: Sequence[Sequence[str]]) -> list[Block]:
    """Tabulates texts, with the first row as the titles of the columns."""
    font = _font(13)
    rows = [[" ".join(cell.split()) for cell in row] for row in rows]
    widths = [round(max(map(font.getlength, column))) + 24 for column in zip(*rows, strict=True)]

    def line(i: int, cells: Sequence[str]) -> Block:
        def drawn(image: Image.Image, y: int) -> None:
            draw = ImageDraw.Draw(image)
            x = _LEFT
            for cell, width in zip(cells, widths, strict=True):
                draw.text((x, y + 2), cell, font=font, fill=_INK if i else _SOFT)
                x += width
            draw.line((_LEFT, y + 21, x, y + 21), fill=_LINE)

        return Block(22, drawn)

    return [line(i, cells) for i, cells in enumerate(rows)]


def fill_block(lengths: Sequence[int], total: int) -> Block:
    """Draws a bar that parts of some lengths fill in order, each with a gap after it."""

    def drawn(image: Image.Image, y: int) -> None:
        draw = ImageDraw.Draw(image)
        draw.rectangle((_LEFT, y + 6, _LEFT + _INNER - 1, y + 17), fill=_LINE)
        start = 0
        for length in lengths:
            x1, x2 = (_LEFT + _INNER * each // max(1, total) for each in (start, start + length))
            draw.rectangle((x1, y + 6, max(x1, x2 - 3), y + 17), fill=_BAR)
            start += length

    return Block(26, drawn)


def figure_blocks(figures: Sequence[Figure]) -> list[Block]:
    """Shows pictures side by side, in as many rows as they need."""
    rows: list[list[tuple[int, Image.Image, list[str]]]] = []
    x = _INNER
    for figure in figures:
        image = thumbnail(figure.pixels, longest_px=figure.longest_px)
        width = max(image.width, 96)
        if x + width > _INNER:
            rows.append([])
            x = 0
        rows[-1].append((x, image, _wrapped(figure.caption, _font(12), width)))
        x += width + _GAP

    def row(placed: Sequence[tuple[int, Image.Image, list[str]]]) -> Block:
        def drawn(image: Image.Image, y: int) -> None:
            draw = ImageDraw.Draw(image)
            for x, picture, caption in placed:
                image.paste(picture, (_LEFT + x, y + 4))
                for i, words in enumerate(caption):
                    at = (_LEFT + x, y + 8 + picture.height + 16 * i)
                    draw.text(at, words, font=_font(12), fill=_SOFT)

        tallest = max(image.height + 16 * len(caption) for _, image, caption in placed)
        return Block(tallest + 4 + _GAP, drawn)

    return [row(placed) for placed in rows]


def token_blocks(pieces: Sequence[Piece]) -> list[Block]:
    """Shows decoded tokens; what is learned has a background and a line below it."""
    font = _font(14)
    lines: list[list[tuple[float, str, Piece]]] = [[]]
    x, left = 0.0, 0
    for piece in pieces:
        for word in _words(piece):
            for part in _broken(word, font, _INNER) if len(lines) <= MOST_LINES else [word]:
                width = font.getlength(_drawable(part))
                if x + width > _INNER:
                    lines.append([])
                    x = 0.0
                if len(lines) > MOST_LINES:
                    left += len(part)
                    continue
                lines[-1].append((x, part, piece))
                x += width
        x += 6 if x else 0

    def line(runs: Sequence[tuple[float, str, Piece]]) -> Block:
        def drawn(image: Image.Image, y: int) -> None:
            draw = ImageDraw.Draw(image)
            for x, text, piece in runs:
                x1, text = _LEFT + round(x), _drawable(text)
                x2 = _LEFT + round(x + font.getlength(text))
                if piece.learned:
                    draw.rectangle((x1, y, x2 - 1, y + 20), fill=_LEARNED)
                    draw.rectangle((x1, y + 19, x2 - 1, y + 20), fill=_INK)
                draw.text((x1, y + 1), text, font=font, fill=_SOFT if piece.symbol else _INK)

        return Block(26, drawn)

    more = text_blocks(f"… ({counted(left, 'more character')})", soft=True) if left else []
    return [*map(line, lines[:MOST_LINES]), *more]


def _words(piece: Piece) -> list[str]:
    """Splits a piece in front of its spaces."""
    text = printable(piece.text)
    return re.findall(" ?[^ ]+| ", f"[{text}]" if piece.symbol else text)


def _drawable(text: str) -> str:
    """Writes what would end a line as programmers do."""
    return text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines, between words where that is possible."""
    lines = [""]
    for word in printable(text).split():
        for part in _broken(word, font, width):
            longer = f"{lines[-1]} {part}".strip()
            if font.getlength(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(part)
    return [line for line in lines if line]


def _broken(word: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Breaks a word that is wider than a line."""
    while word:
        count = _num_fitting(word[:_MOST_CHARS], font, width)
        yield word[:count]
        word = word[count:]


def _num_fitting(word: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """Counts the characters of a word that fit into a line, at least one."""

    def fits(count: int) -> bool:
        return font.getlength(_drawable(word[:count])) <= width

    if fits(len(word)):
        return len(word)
    return max(1, sum(1 for _ in takewhile(fits, range(1, len(word)))))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # of any size that is given
    return font
