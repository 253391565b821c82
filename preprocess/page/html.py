"""HTML as values: elements that escape what they contain, and the page around them.

A page is one file: its style is inline, it has no script, and its Content-Security-Policy forbids
every request. Text of a dataset is escaped here and nowhere else, so that no row can add markup.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

VOID = frozenset({"meta", "br", "img", "rect", "line", "circle", "image"})
"""Elements without an end tag; those of SVG are closed by a slash."""

_SVG_VOID = frozenset({"rect", "line", "circle", "image"})

_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
"""Characters that an HTML document may not contain, not even escaped."""


class Markup(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


Child = str | int | None
"""Of an element: a text is escaped, Markup is not, None is left out."""


def escape(text: str) -> Markup:
    """Escapes a text, also for attributes.

    >>> escape('<b>&"')
    '&lt;b&gt;&amp;&quot;'
    """
    return Markup(html.escape(printable(text), quote=True))


def printable(text: str) -> str:
    """Replaces control characters, but for spaces and ends of lines, and surrogates."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def element(tag: str, /, *children: Child, **attributes: str | int | None) -> Markup:
    """Makes an element.

    Args:
      tag: Name of the element.
      children: Its content, in order.
      attributes: By name, in order: `class_` is class, other underscores are dashes. None leaves
        an attribute out; an empty text is one without a value.

    >>> element("p", "a < b", element("br"), class_="x")
    '<p class="x">a &lt; b<br></p>'
    """
    parts = [f"<{tag}"]
    for key, value in attributes.items():
        if value is not None:
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"')
    if tag in VOID:
        return Markup("".join([*parts, "/>" if tag in _SVG_VOID else ">"]))
    return Markup("".join([*parts, ">", join(children), f"</{tag}>"]))


def join(children: Iterable[Child]) -> Markup:
    """Joins markup and texts."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child))
            for child in children
            if child is not None
        )
    )


def section(title: str, *children: Child, anchor: str) -> Markup:
    """Makes a section of a page with its heading."""
    heading = element("h2", title, id=f"{anchor}-title")
    return element("section", heading, *children, id=anchor, aria_labelledby=f"{anchor}-title")


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]], *, numeric: bool = True
) -> Markup:
    """Makes a table whose first column names its rows.

    Args:
      caption: What it lists; also the name of the area that scrolls on narrow screens.
      head: Titles of the columns.
      rows: Cells of each row.
      numeric: Whether the further columns are numbers, which are set to the right.
    """
    titles = [element("th", title, scope="col") for title in head]
    body = []
    for first, *rest in rows:
        cells = [element("td", cell) for cell in rest]
        body.append(element("tr", element("th", first, scope="row"), *cells))
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *titles)),
        element("tbody", *body),
        class_="numbers" if numeric else "texts",
    )
    return element("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)


def page(title: str, *sections: Markup, lead: Child, contents: Sequence[tuple[str, str]]) -> str:
    """Makes the whole document.

    Args:
      title: Of the page.
      sections: Its parts.
      lead: What is said below the title.
      contents: (anchor, title) of each part, for the list of contents.
    """
    links = [element("li", element("a", name, href=f"#{anchor}")) for anchor, name in contents]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", title),
        element("style", Markup(_style())),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), element("p", lead, class_="lead")),
        element("nav", element("ul", *links), aria_label="Contents"),
        element("main", *sections, id="content"),
    )
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@functools.cache
def _style() -> str:
    return resources.files("preprocess.page").joinpath("page.css").read_text("utf-8")
