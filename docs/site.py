"""Puts the pages of the documentation site together; `make docs` builds them.

Pages are written for the repository, where links lead to files. Here README, benchmarks and
examples join docs/, the API follows from the public names, and each link becomes one between pages:
the strict build then refuses a link that leads nowhere.

    python docs/site.py FOLDER     writes FOLDER/zensical.toml and FOLDER/pages
"""

import inspect
import json
import posixpath
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
JOINED = {
    "README.md": "index.md",
    **{name: name for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")},
    **{f"benchmarks/{name}": name for name in ("RESULTS.md", "ORDER.md")},
}
# Packages and modules of the public API; tests/test_public_api.py holds the names.
PACKAGES = (
    "loader",
    "loader.integrations.hf",
    "loader.integrations.distributed",
    "loader.evaluation",
    "loader.features",
    "loader.monitoring",
    "preprocess.datasets",
    "shardspec",
    "vlm_shards",
)
LINK = re.compile(r"(?<=\]\()([^)#\s]*)(#[^)\s]*)?(?=\))")


def public_names(package: str) -> list[str]:
    module = import_module(package)
    defined = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == package
    ]
    return list(getattr(module, "__all__", defined))


def api_pages() -> dict[str, str]:
    """A page per package; what several packages export is described where it comes first."""
    pages: dict[str, str] = {}
    described: dict[int, str] = {}
    for package in PACKAGES:
        module = import_module(package)
        page, also = f"# {package}\n\n{module.__doc__}\n\n", []
        for name in public_names(package):
            value = getattr(module, name)
            first = described.setdefault(id(value), package)
            if first != package:
                also.append(f"- [`{name}`]({first}.md)\n")
                continue
            known = inspect.isclass(value) or inspect.isfunction(value)
            at = f"{value.__module__}.{value.__name__}" if known else f"{package}.{name}"
            page += f"::: {at}\n\n"
        if also:
            page += "## Described on other pages\n\n" + "".join(also)
        pages[f"api/{package}.md"] = page
    return pages


def example_page(path: Path) -> str:
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash"}[path.suffix]
    return f"# {path.name}\n\n```{language}\n{path.read_text()}```\n"


def as_example(paragraph: str) -> str:
    if not paragraph.startswith(">>> "):
        return paragraph
    return "Examples:\n" + "".join(f"    {line}\n" for line in paragraph.split("\n"))


class Doctests(griffe.Extension):
    """Gives the doctests of a docstring the heading that makes them code of the page."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            paragraphs = inspect.cleandoc(obj.docstring.value).split("\n\n")
            obj.docstring.value = "\n\n".join(map(as_example, paragraphs))


def page_of(path: str) -> str | None:
    """The page that shows a file of the repository, None if there is none."""
    if path == "examples":
        path = "examples/train.py"
    if path.startswith("examples/"):
        return f"{path}.md"
    return JOINED.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)


def between_pages(text: str, source: str, page: str) -> str:
    """Turns the links of a file of the repository into links of its page."""

    def moved(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        to = page_of(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        if not target or "://" in target or to is None:
            return match[0]
        return posixpath.relpath(to, posixpath.dirname(page) or ".") + anchor

    return LINK.sub(moved, text)


def write_site(folder: Path) -> None:
    examples = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("site.*"))
    texts = {f"examples/{path.name}.md": example_page(path) for path in examples}
    texts |= api_pages()
    sources = JOINED | {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}
    for source, page in sources.items():
        texts[page] = between_pages((ROOT / source).read_text(), source, page)
    for page, text in texts.items():
        (pages / page).parent.mkdir(parents=True, exist_ok=True)
        (pages / page).write_text(text)
    config = (ROOT / "docs/site.toml").read_text().replace("REPOSITORY", ROOT.as_posix())
    lists = {
        "EXAMPLES": {path.name: f"examples/{path.name}.md" for path in examples},
        "API": {package: f"api/{package}.md" for package in PACKAGES},
    }
    for name, listed in lists.items():
        rows = (f"{{ {json.dumps(title)} = {json.dumps(page)} }}" for title, page in listed.items())
        config = config.replace(f'= "{name}"', f"= [{', '.join(rows)}]")
    (folder / "zensical.toml").write_text(config)


if __name__ == "__main__":
    write_site(Path(sys.argv[1]))
