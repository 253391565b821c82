"""Style sheets on the command line: beside a spec, as a flag, and in `inspect`."""

import json

import pytest

from preprocess.__main__ import command_line
from preprocess.cli import with_files
from preprocess.cli.build import job_settings
from preprocess.cli.make import make_arguments
from shardspec.manifest import load_manifest

SHEET = """
[styles.receipt]
like = "vqa2"
templates = ["{question} In euros."]
system = ["You are a cashier."]
"""


@pytest.fixture
def data(tmp_path):
    """Questions in JSON Lines, a spec with an own style, and its style sheet."""
    rows = [{"question": f"Total {i}?", "answer": f"{i}.40"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.toml").write_text(
        'format = "vqa"\nsource = "rows.jsonl"\nstyle = "receipt"\nstyles = "my.toml"\n'
        "[settings]\nworkers = 1\nvariants = 1\n"
    )
    (tmp_path / "my.toml").write_text(SHEET)
    return tmp_path


def build(cli, data, out, *more):
    job = ("shards", data / "mine.toml", "--out", data / out, "--cache", data / "cache")
    return cli.run(*job, *more)


def test_sheet_beside_a_spec_is_part_of_the_recipe(inline_cli, data):
    assert build(inline_cli, data, "out").code == 0
    recipe = load_manifest(str(data / "out")).recipe
    assert recipe["text"]["styles"]["styles"]["receipt"]["like"] == "vqa2"
    assert "styles" not in recipe["data"]
    assert "nothing to do" in build(inline_cli, data, "out").out
    (data / "my.toml").write_text(SHEET.replace("euros", "dollars"))
    other = build(inline_cli, data, "out")
    assert other.code == 3
    assert "STYLES styles.receipt.templates" in other.err
    # The same content under another name is the same job.
    (data / "again.toml").write_text(SHEET)
    assert "nothing to do" in build(inline_cli, data, "out", "--styles", data / "again.toml").out


def test_sheet_of_a_flag_is_used_for_any_dataset(data):
    parser, verbs = command_line()
    given = make_arguments(["shards", "DATASET=vqa2", f"STYLES={data / 'my.toml'}"], verbs)
    settings = job_settings(parser.parse_args(with_files(given, parser, verbs)))
    assert [name for name, _ in settings.recipe.text.styles.styles] == ["receipt"]


def test_inspect_shows_the_sheet_and_a_row_with_it(inline_cli, data):
    shown = inline_cli.good("inspect", data / "mine.toml").out
    assert "receipt: like vqa2, family qa, 1 template, 1 system prompt" in shown
    assert "You are a cashier.\\n\\nTotal 0? In euros." in shown
    (data / "other.toml").write_text(SHEET.replace("You are a cashier", "Hm"))
    shown = inline_cli.good("inspect", data / "mine.toml", "--styles", data / "other.toml").out
    assert "Hm." in shown


@pytest.mark.parametrize("verb", ["shards", "plan", "inspect"])
@pytest.mark.parametrize(
    "sheet, says",
    [
        (SHEET.replace("receipt", "receipts"), "receipts"),
        (SHEET.replace("like", "liek"), "like"),
        (SHEET.replace("{question}", "{questoin}"), "{question}"),
    ],
)
def test_mistakes_name_what_was_meant(inline_cli, data, verb, sheet, says):
    (data / "my.toml").write_text(sheet)
    more = () if verb == "inspect" else ("--out", data / "out", "--cache", data / "cache")
    done = inline_cli.run(verb, data / "mine.toml", *more)
    assert done.code == 1
    assert says in done.err
