"""Sheets: any text can be drawn, marks are seen, and no sheet gets higher than viewers can show."""

import io
import re
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from preprocess.page import (
    Figure,
    Piece,
    draw_sheet,
    figure_blocks,
    fill_block,
    sheet,
    text_blocks,
    token_blocks,
)
from preprocess.page.sheet import MOST_LINES

TEXTS = {
    "empty": "",
    "spaces": "   ",
    "ends of lines": "a\nb\r\nc\u2028d\u2029e\x85f\vg\fh\ti",
    "other scripts": "中文 عربى हिन्दी café e\u0301 🙂👩\u200d👩 \u202eabc",
    "no text": "\x00\x1b\ud800\udfff\ufffe",
    "one long word": "W" * 300,
}


def pixels_of(payload):
    return np.asarray(Image.open(io.BytesIO(payload)).convert("RGB"))


def has(pixels, color):
    return bool((pixels == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).any())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_any_text_is_drawn_within_the_sheet(text):
    card = [
        *text_blocks(text),
        *token_blocks([Piece(text, True), Piece("a", False), Piece(text, False, symbol=True)]),
        *figure_blocks([Figure(np.zeros((4, 4, 3), np.uint8), text[:50], 128)]),
    ]
    payload = draw_sheet(text_blocks(text), [card], of="row")
    pixels = pixels_of(payload)
    assert payload == draw_sheet(text_blocks(text), [card], of="row")
    assert (pixels[:, :32] == 255).all()
    assert (pixels[:, -31:] == 255).all()


@pytest.mark.parametrize("learned", [False, True])
def test_learned_tokens_alone_have_a_background(learned):
    pixels = pixels_of(draw_sheet([], [token_blocks([Piece("two words", learned)])], of="row"))
    assert has(pixels, "#ffe9a3") == learned


def test_a_text_ends_after_its_lines_and_says_how_much_is_left(monkeypatch):
    told = spied(monkeypatch)
    blocks = token_blocks([Piece("many words " * 2_000, False), Piece("x" * 7, True)])
    assert len(blocks) == MOST_LINES + 1
    (text,) = told
    left = int(re.fullmatch(r"… \(([\d,]+) more characters\)", text)[1].replace(",", ""))
    assert 15_000 < left < 22_007


def spied(monkeypatch):
    """Collects the texts that a sheet writes by itself."""
    told = []

    def blocks(text, **settings):
        told.append(text)
        return text_blocks(text, **settings)

    monkeypatch.setattr(sheet, "text_blocks", blocks)
    return told


@pytest.mark.parametrize(
    "num_blocks, says",
    [
        ((10, 10), None),
        ((10, 50, 3), "Left out of this picture: the end of row 1 and 1 more row."),
        ((10, 50), "Left out of this picture: the end of row 1."),
        ((35, 3, 3), "Left out of this picture: 2 more rows."),
    ],
)
def test_a_sheet_ends_at_its_height_and_says_what_is_left_out(monkeypatch, num_blocks, says):
    told = spied(monkeypatch)
    monkeypatch.setattr(sheet, "MOST_HEIGHT_PX", 1_000)
    cards = [[fill_block([1], 2)] * number for number in num_blocks]
    height = len(pixels_of(draw_sheet([], cards, of="row")))
    assert told == [says] * bool(says)
    assert height < 1_100


def test_colors_are_those_of_the_light_page():
    style = resources.files("preprocess.page").joinpath("page.css").read_text("utf-8")
    light = style.partition("@media")[0]
    names = {"paper": "#fff", "card": sheet._CARD, "ink": sheet._INK, "soft": sheet._SOFT}
    names |= {"line": sheet._LINE, "bar": sheet._BAR, "learned": sheet._LEARNED}
    assert [name for name, color in names.items() if f"--{name}:{color}" not in light] == []
