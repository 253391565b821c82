"""What every page of ours must be: whole HTML that loads nothing and that a screen reader can read.

`Page` parses a document with html.parser and keeps its elements; `problems` lists what is wrong.
"""

import re
from html.parser import HTMLParser

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
KNOWN = set(
    re.findall(
        r"\w+",
        """html head meta title style body header nav main section article h1 h2 h3 h4 p a ul li
        dl dt dd div span b mark br figure figcaption img table caption thead tbody tr th td details
        summary svg g image path rect line circle text""",
    )
)
PARENTS = {
    "li": {"ul"},
    "tr": {"thead", "tbody"},
    "th": {"tr"},
    "td": {"tr"},
    "thead": {"table"},
    "tbody": {"table"},
    "caption": {"table"},
    "summary": {"details"},
    "figcaption": {"figure"},
    "dt": {"div", "dl"},
    "dd": {"div", "dl"},
    "title": {"head"},
    "style": {"head"},
    **dict.fromkeys(("g", "image", "path", "rect", "line", "circle", "text"), {"svg", "g"}),
}
PHRASING_ONLY = {"p", "h1", "h2", "h3", "h4", "span", "b", "mark", "summary", "a", "caption", "dt"}
BLOCKS = {"div", "p", "ul", "table", "section", "article", "figure", "details", "h2", "h3", "h4"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Page(HTMLParser):
    """A parsed document: `elements` are (tag, attributes, path of the tags around it)."""

    def __init__(self, document):
        super().__init__(convert_charrefs=True)
        self.document = document
        self.elements, self.problems, self._open, self._texts = [], [], [], []
        self.feed(document)
        self.close()
        self.problems += [f"<{tag}> is not closed" for tag in self._open]
        self._check()

    def handle_starttag(self, tag, attrs):
        self._add(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        if tag in VOID or "svg" not in self._open:
            self.problems.append(f"<{tag}/> outside of svg")
        self._add(tag, attrs)

    def _add(self, tag, attrs):
        if len(attrs) != len(dict(attrs)):
            self.problems.append(f"<{tag}> has an attribute twice")
        self.elements.append((tag, dict(attrs), tuple(self._open)))

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data):
        self._texts.append((tuple(self._open), data))

    def text_of(self, tag):
        """The texts of the elements of a name, one for each run of characters."""
        return [text for path, text in self._texts if path and path[-1] == tag]

    def all(self, tag):
        return [attrs for name, attrs, _ in self.elements if name == tag]

    @property
    def text(self):
        return "".join(text for path, text in self._texts if "style" not in path)

    def _check(self):
        say = self.problems.append
        if not self.document.startswith("<!DOCTYPE html>\n<html lang="):
            say("no doctype or language")
        ids = [attrs["id"] for _, attrs, _ in self.elements if "id" in attrs]
        if len(ids) != len(set(ids)):
            say("an id occurs twice")
        levels = []
        for tag, attrs, path in self.elements:
            if tag not in KNOWN:
                say(f"<{tag}> is not used here")
            if tag in PARENTS and (not path or path[-1] not in PARENTS[tag]):
                say(f"<{tag}> in {path[-1:]}")
            if tag in BLOCKS and PHRASING_ONLY & set(path):
                say(f"<{tag}> inside of {path}")
            for name, value in attrs.items():
                if name.startswith("on") or value is None:
                    say(f"{tag} {name}={value}")
                loads = name in ("src", "srcset", "action", "data", "poster")
                if loads and not value.startswith("data:image/"):
                    say(f"{tag} loads {value[:80]}")
                if name == "href":
                    fine = (
                        value.startswith("data:image/")
                        if tag == "image"
                        else (tag == "a" and value[:1] == "#" and value[1:] in ids)
                    )
                    if not fine:
                        say(f"{tag} leads to {value[:80]}")
                if name in ("aria-labelledby", "for") and not set(value.split()) <= set(ids):
                    say(f"{name} names no element: {value}")
            if tag == "img" and not (attrs.get("alt") or "").strip():
                say("img without alt")
            if tag == "svg" and not (attrs.get("role") == "img" and attrs.get("aria-label")):
                say("svg without a name")
            # What a named picture consists of is not read.
            named = attrs.get("aria-label") or attrs.get("aria-labelledby") or "svg" in path
            if "role" in attrs and not named:
                say(f"{tag} with a role has no name")
            if tag == "th" and attrs.get("scope") not in ("row", "col"):
                say("th without scope")
            if re.fullmatch("h[1-6]", tag):
                level = int(tag[1])
                if level > (levels[-1] if levels else 0) + 1:
                    say(f"<{tag}> after h{levels[-1] if levels else 0}")
                levels.append(level)
        if levels.count(1) != 1:
            say("not one h1")
        if len(self.all("caption")) != len(self.all("table")):
            say("a table without caption")
        policies = [m["content"] for m in self.all("meta") if "http-equiv" in m]
        if policies != [POLICY]:
            say(f"policy {policies}")
        if not any("width=device-width" in meta.get("content", "") for meta in self.all("meta")):
            say("no viewport")
        style = "".join(self.text_of("style"))
        if re.search(r"url\(|@import|expression\(", style):
            say("style loads something")


def checked(document):
    """Parses a page and fails where something is wrong with it."""
    page = Page(document)
    assert page.problems == []
    return page
