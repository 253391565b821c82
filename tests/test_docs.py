"""README and docs say what is true: Python runs, targets, variables and modules exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from tests import inline
from tests.test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
        *(ROOT / name for name in ("CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/ORDER.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
MAKEFILE = (ROOT / "Makefile").read_text()
WITH_PYTHON = [name for name, text in PAGES.items() if "```python\n" in text]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def variables(text: str) -> list[str]:
    """Lists the variables of a page's tables: the first cell of each row."""
    return re.findall(r"^\| `([A-Z][A-Z0-9_]+)` \|", text, flags=re.MULTILINE)


def make_variables_of(*verbs: str) -> set[str]:
    """Lists the variables of some make targets, which are the flags of their verbs."""
    from preprocess.__main__ import command_line
    from preprocess.cli import make_variables
    from vlm_shards.__main__ import command_line as of_both

    parsers = {**command_line()[1], **of_both()[1]}
    return {name for verb in verbs or parsers for name in make_variables(parsers[verb])}


@pytest.fixture
def help_of(capsys, monkeypatch):
    """A function that gives the --help of a program's verb, one option per line."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("NO_COLOR", "1")

    def show(main, verb):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        return re.sub(r"\n {8,}", "  ", capsys.readouterr().out)

    return show


# --- commands


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_named_exists(page):
    code = "\n".join(re.findall(r"`([^`]*)`", PAGES[page]) + blocks(PAGES[page], "bash"))
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", code))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert named <= targets


def test_every_make_target_is_documented():
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, flags=re.MULTILINE)) - {"help"}
    assert {
        target for target in targets if f"make {target}" not in "".join(PAGES.values())
    } == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_that_is_named_is_known_to_the_makefile(page):
    code = "\n".join(blocks(PAGES[page], "bash") + re.findall(r"`(make [^`]*)`", PAGES[page]))
    # An assignment behind `make`; before it stands what the shell puts into the environment.
    named = {
        name
        for line in code.splitlines()
        for name in re.findall(r" ([A-Z][A-Z_]+)=", line.partition("make ")[2])
    }
    named |= set(variables(PAGES[page]))
    known = make_variables_of() | set(re.findall(r"\b[A-Z_]+\b", MAKEFILE))
    assert named - known == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_variable_has_one_row_on_a_page(page):
    named = variables(PAGES[page])
    assert sorted(set(named)) == sorted(named)


def test_every_variable_of_a_job_is_documented_with_its_default(help_of):
    from preprocess.__main__ import main

    text = help_of(main, "shards")
    rows = dict(
        re.findall(r"^\| `([A-Z0-9_]+)` \| .* \| ([^|]*) \|$", PAGES["docs/build.md"], re.MULTILINE)
    )
    for variable in make_variables_of("shards") - {"DATASET"}:
        flag = variable.lower().replace("_", "-")
        option = re.search(rf"^  --{flag} .*", text, flags=re.MULTILINE)
        assert option, variable
        default = re.search(r"\(default: (.*)\)$", option[0])
        assert rows[variable].replace("`", "") == (default[1] if default else "none"), variable


def test_every_variable_of_resharding_is_documented():
    documented = set(variables(PAGES["docs/resharding.md"]))
    assert make_variables_of("reshard", "merge", "split", "filter") <= documented
    assert make_variables_of("annotate") == set(variables(PAGES["docs/columns.md"]))
    assert make_variables_of("features") == set(variables(PAGES["docs/features.md"]))


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_exists(page, help_of):
    from loader.__main__ import main as loader
    from preprocess.__main__ import main as preprocess

    code = "\n".join(re.findall(r"`([^`]*)`", PAGES[page]) + blocks(PAGES[page], "bash"))
    for package, verb, rest in re.findall(r"python -m (loader|preprocess) ([a-z-]+)(.*)", code):
        text = help_of(loader if package == "loader" else preprocess, verb)
        for flag in set(re.findall(r" (--[a-z0-9-]+)", rest)) - {"--help"}:
            assert re.search(rf"^  {flag}\b", text, flags=re.MULTILINE), f"{verb} {flag}"


# --- code


def annotated(url, folder):
    """Adds the columns of docs/columns.md to a dataset."""
    from loader import StreamingDataset
    from preprocess.annotate import AnnotateSettings, annotate, plan_annotation
    from tests.inline import Quiet

    keys = StreamingDataset(str(url)).reader.column("key", np.arange(24))
    lines = [f"{k.decode()},{(i + 6) / 24},{('cc0', 'cc-by')[i % 2]}" for i, k in enumerate(keys)]
    (folder / "scores.csv").write_text("\n".join(["key,score,licence", *lines, ""]))
    settings = AnnotateSettings(
        src=str(url), columns=str(folder / "scores.csv"), dst=str(folder / "scored")
    )
    annotate(plan_annotation(settings, Quiet()), Quiet())
    return folder / "scored"


@pytest.fixture(scope="module")
def datasets(tiny_dataset, movable_dataset, inline_cli, tmp_path_factory):
    """What the URLs of the pages stand for: small datasets on the local disk."""
    folder = tmp_path_factory.mktemp("docs")
    questions, raw = folder / "vqa2", folder / "raw"
    inline_cli.good(
        *("shards", "vqa2", "--source", "sample", "--limit", 8, "--num-shards", 1),
        *("--out", questions, "--cache", folder / "cache", "--workers", 1),
    )
    videos = folder / "moving_shapes"
    inline_cli.good(
        *("shards", "moving_shapes", "--source", "sample", "--limit", 2, "--num-shards", 1),
        *("--out", videos, "--cache", folder / "cache", "--workers", 1),
    )
    papers = folder / "documents"
    with inline.jobs():
        run_job(
            JobSettings(
                dataset="documents",
                source="sample",
                limit=2,
                out=str(papers),
                cache=str(folder / "cache"),
            ),
            inline.Quiet(),
        )
    inline_cli.good("import", tiny_dataset / "train", "--out", raw, "--name", "raw")
    scored = annotated(tiny_dataset, folder)
    return {
        "shards/pixmo_cap": tiny_dataset,
        "s3://bucket/pixmo_cap": tiny_dataset,
        "shards/vqa2": questions,
        "shards/laion": raw,
        "shards/moving_shapes": videos,
        "shards/documents": papers,
        "shards/scored": scored,
        "shards/pixmo_points": movable_dataset,
        "/nvme/cache": folder / "blocks",
    }


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs_from_top_to_bottom(page, datasets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # where files are kept by default
    names: dict = {}
    for code in blocks(PAGES[page], "python"):
        for url, path in datasets.items():
            code = code.replace(f'"{url}"', repr(str(path)))
        exec(compile(code, page, "exec"), names)
    if page == "README.md":
        assert names["loader"].epoch == 1, "the second pass ends the first epoch"
        assert names["batch"]["images"].shape[2:] == (3, 336, 336)
    if page == "docs/resuming.md":
        assert len(str(names["state"])) < 2000


def test_streaming_page_names_the_keys_of_a_batch(datasets):
    from loader import StreamingDataset, make_dataloader

    dataset = StreamingDataset(str(datasets["shards/pixmo_cap"]), seed=42)
    batch = next(iter(make_dataloader(dataset, global_batch_size=8, sequence_length=2048)))
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) `\[(.*?)\]` \|", PAGES["docs/streaming.md"], re.MULTILINE
    )
    assert {name for name, _, _ in rows} == set(batch)
    for name, kind, shape in rows:
        assert str(batch[name].dtype) == f"torch.{kind}"
        assert batch[name].ndim == len(shape.split(", "))


# --- files


def test_every_page_is_in_the_navigation_of_the_site():
    listed = set(re.findall(r'"([\w-]+\.md)"', (ROOT / "docs/site.toml").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= listed


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", PAGES[page]):
        if target and "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_every_path_into_the_repository_exists(page):
    folders = "shardspec|preprocess|loader|tests|benchmarks|docs|examples"
    named = re.findall(
        rf"(?<![\w/])(?:{folders})/[\w./]*\w\.\w+|(?:{folders})/[\w/]+/`", PAGES[page]
    )
    named = {name.rstrip("`") for name in named if "NAME" not in name and "train-000" not in name}
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("package", FLOORS)
def test_every_room_has_its_row_in_the_architecture(package):
    """A room is a folder or a single module; its row covers what is in it."""
    table = PAGES["ARCHITECTURE.md"].split(f"| {package} | decides | never |")[1].split("\n\n")[0]
    first = [line.split(" | ")[0] for line in table.splitlines()]
    named = [name for cell in first for name in re.findall(r"`(\w+/?)`", cell)]
    rooms = [
        f"{path.name}/" if path.is_dir() else path.stem
        for path in (ROOT / package).iterdir()
        if path.name not in ("__init__.py", "__pycache__")
        and (path.is_dir() or path.suffix == ".py")
    ]
    assert sorted(named) == sorted(rooms)


def test_floors_of_the_architecture_are_the_ones_that_are_enforced():
    drawing = PAGES["ARCHITECTURE.md"].split("## Floors")[1].split("```")[1].strip("\n").split("\n")
    head, _, *lines = drawing
    starts = [head.index(package) for package in FLOORS]
    for package, start, stop in zip(FLOORS, starts, [*starts[1:], None], strict=True):
        floors = [set(line[start:stop].split()) for line in reversed(lines)]
        assert tuple(floor for floor in floors if floor) == FLOORS[package]
