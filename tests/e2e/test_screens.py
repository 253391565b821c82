"""Pages in a headless Chromium, on a laptop and a phone, light and dark: by structure, not pixels.

`tests/golden/screens.txt` is what a screen reader is told of each page, and what stands side by
side at each width. tests/preprocess/report and tests/loader/cli hold the same pages without a
browser. Pictures to look at: SCREENS=folder keeps them.
"""

import itertools
import os
import re
from pathlib import Path

import pytest

from loader.__main__ import main
from tests.browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[2]
SITE = ROOT / "build" / "docs" / "site"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here"),
]

WIDTHS = {"laptop": 1280, "phone": 390}
NAMELESS = ("banner", "main", "article", "figure")
ROLES = (*NAMELESS, "navigation", "region", "heading", "table", "image", "link")
ROLES += ("DisclosureTriangle",)

MEASURED = (ROOT / "tests" / "screens.js").read_text()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def pages(inline_cli, tiny_dataset, tmp_path_factory):
    """Reports of pictures with points and crops, videos, documents and robots; previews."""
    folder = tmp_path_factory.mktemp("screens")
    made = {}
    for name, *flags in (
        ("pixmo_points", "--image-size", 168, "--crops", 4),
        ("moving_shapes",),
        ("documents",),
        ("lerobot",),
    ):
        inline_cli.good(
            *("shards", name, "--source", "sample", "--limit", 3, "--workers", 1, *flags),
            *("--out", folder / name, "--cache", folder / "cache"),
        )
        made[f"report {name}"] = folder / f"{name}.html"
        inline_cli.good("report", folder / name, "--samples", 1, "--to", folder / f"{name}.html")
    for name, url, *flags in (
        ("crops", folder / "pixmo_points", "--augment"),
        ("frames", folder / "moving_shapes"),
        ("packed", tiny_dataset, "--pack"),
    ):
        made[f"preview {name}"] = out = folder / f"preview-{name}.html"
        code = main(["preview", str(url), "--global-batch", "2", "--out", str(out), *flags])
        assert code == 0
    return made


def shown(browser, name, path, scheme, width, *, but=()):
    """Opens a page, and fails where something is wrong with it, but for some kinds.

    Gives its outline and columns.
    """
    browser.open(path, width_px=WIDTHS[width], scheme=scheme)
    assert browser.run("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    if kept := os.environ.get("SCREENS"):
        Path(kept).mkdir(exist_ok=True)
        file = f"{name}-{width}-{scheme}.png".replace(" ", "-").replace("/", "-")
        (Path(kept) / file).write_bytes(browser.picture(6000))
    measured = browser.run(MEASURED)
    problems = [problem for problem in measured["problems"] if not problem.startswith(but)]
    assert problems == [], (name, width, scheme)
    return browser.outline(ROLES), measured["columns"]


def lines(outline):
    """Writes an outline: without keys and numbers, and each line once."""
    levels, told = 0, []
    for role, level, name in outline:
        levels = level or levels
        name = re.sub(r"\b[0-9a-f]{24}\b", "KEY", name)
        name = re.sub(r"\d[\d,.×]*", "N", name)
        indent = "  " * (levels - 1 if role == "heading" else levels)
        told.append(f"{indent}{role}{f' {level}' if level else ''}: {name[:60].rstrip()}")
    return dict.fromkeys(told)


def test_pages_are_whole_on_a_laptop_and_a_phone_light_and_dark(browser, pages, golden):
    text = []
    for name, path in pages.items():
        seen = {
            (scheme, width): shown(browser, name, path, scheme, width)
            for scheme in ("light", "dark")
            for width in WIDTHS
        }
        outlines = [outline for outline, _ in seen.values()]
        assert all(outline == outlines[0] for outline in outlines), name
        heads = [level for role, level, _ in outlines[0] if role == "heading"]
        assert heads[0] == 1
        assert heads.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(heads))
        assert all(told.strip() for role, _, told in outlines[0] if role not in NAMELESS), name
        text += [f"== {name}"]
        for width in WIDTHS:
            columns = seen["light", width][1]
            assert columns == seen["dark", width][1]
            side = ", ".join(f"{kind} {num}" for kind, num in columns.items() if num)
            text += [f"{width}: {side or 'one below the other'}"]
        text += lines(outlines[0])
    golden("screens.txt", "\n".join([*text, ""]))


@pytest.mark.skipif(not SITE.exists(), reason="`make docs` was not run")
@pytest.mark.parametrize("page", ["", "tutorial", "concepts", "errors", "api/loader", "format"])
def test_pages_of_the_site_are_whole_too(browser, page):
    path = SITE / page / "index.html"
    assert path.exists()
    heads = set()
    for scheme, width in itertools.product(("light", "dark"), WIDTHS):
        # Colours, sizes and focus are the theme's.
        but = ("contrast", "letters", "scrolls")
        outline, _ = shown(browser, f"site {page}", path, scheme, width, but=but)
        style = "default" if scheme == "light" else "slate"
        assert browser.run("document.body.dataset.mdColorScheme") == style
        heads.add(tuple(name for role, _, name in outline if role == "heading"))
    assert len(heads) == 1
    assert all(heads)
