"""HTML: escaping, structure, and contrast of the colours in both schemes."""

import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.page import element, page, section, table
from tests.pages import Page, checked

STYLE = resources.files("preprocess.page").joinpath("page.css").read_text("utf-8")


def whole(*children):
    return page(
        "A page", section("Part", *children, anchor="part"), lead="x", contents=[("part", "Part")]
    )


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_no_text_adds_markup_or_breaks_the_page(text):
    body = [element("p", text), element("img", src="data:image/png;base64,", alt=f"a{text}")]
    seen = checked(whole(*body, table(f"c{text}", ("a", "b"), [(text, text)])))
    assert len(seen.all("p")) == 2  # the lead, and the text
    whole(*body).encode()


def test_texts_come_back_as_they_are():
    text = '<script>alert("1")</script> & <b> \u2028 é 語 🙂'
    seen = checked(whole(element("p", text)))
    assert text in seen.text
    assert seen.all("script") == []


def test_attributes_are_in_the_order_given_and_none_is_left_out():
    made = element("a", "x", href="#a", class_="b", aria_label='"', title=None)
    assert made == '<a href="#a" class="b" aria-label="&quot;">x</a>'


@pytest.mark.parametrize(
    "broken",
    [
        '<img src="data:image/png;base64,">',
        '<img alt="a" src="http://example.com/a.png">',
        '<a href="http://example.com">a</a>',
        '<a href="#none">a</a>',
        '<p onclick="x">a</p>',
        "<h4>a</h4>",
        "<p><div></div></p>",
        "<script></script>",
        "<b>a",
        "<table><tbody><tr><th>a</th></tr></tbody></table>",
        "<svg></svg>",
    ],
)
def test_the_check_of_pages_finds_what_is_wrong(broken):
    document = whole(element("p", "X")).replace("<p>X</p>", broken)
    assert Page(document).problems


# --- colours


def colours(scheme):
    light, dark = re.findall(r":root\{(.*?)\}", STYLE, re.DOTALL)
    named = dict(re.findall(r"--(\w+):(#[0-9a-f]+)", light))
    return named if scheme == "light" else named | dict(re.findall(r"--(\w+):(#[0-9a-f]+)", dark))


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(d * 2 for d in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_the_contrast_that_wcag_asks_for(scheme):
    """WCAG 2.2: 4.5 for texts (1.4.3), 3 for graphics (1.4.11)."""
    named = colours(scheme)
    for text in ("ink", "soft", "link"):
        for ground in ("paper", "card"):
            assert contrast(named[text], named[ground]) >= 4.5, (text, ground)
    assert contrast(named["ink"], named["learned"]) >= 4.5
    assert contrast(named["bar"], named["card"]) >= 3
