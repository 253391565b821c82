"""The job as a whole: splits that share an output, conflicts, Ctrl-C, budgets, the dry run."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest

from shardspec import storage
from shardspec.manifest import load_manifest


def sample_job(out, *more, split="train", verb="shards"):
    return (
        *(verb, "pixmo_cap", "--source", "sample", "--split", split, "--limit", 4),
        *("--num-shards", 2, "--workers", 1, "--image-size", 112),
        *("--out", out, "--cache", out.parent / "cache", *more),
    )


def parquet_job(source, out, *more, verb="shards"):
    return (
        *(verb, "pixmo_cap", "--source", source, "--num-shards", 20, "--workers", 2),
        *("--image-size", 112, "--out", out, "--cache", out.parent / "cache", *more),
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def manifest_bytes(out):
    return (out / "manifest.json").read_bytes()


def tree(folder):
    """Everything below a folder: names, contents and times."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def one_split(inline_cli, tmp_path_factory):
    """An output that holds the split "train"; not to be changed by what succeeds."""
    out = tmp_path_factory.mktemp("one") / "out"
    inline_cli.good(*sample_job(out))
    return out


@pytest.mark.slow
def test_two_splits_share_an_output_in_either_order(inline_cli, one_split, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(one_split, first)
    inline_cli.good(*sample_job(first, split="validation"))
    inline_cli.good(*sample_job(second, split="validation"))
    inline_cli.good(*sample_job(second, split="train"))
    assert manifest_bytes(first) == manifest_bytes(second)
    manifest = load_manifest(str(first))
    assert {name: entry.num_samples for name, entry in manifest.splits.items()} == {
        "train": 4,
        "validation": 4,
    }
    assert len(manifest.shards) == 4


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (("--quality", 80), "  QUALITY  95             80"),
        slow(("--seed", 7), "  SEED     0              7"),
        slow(("--limit", 5), "  LIMIT    4              5"),
    ],
)
def test_other_job_into_the_same_output_is_refused_by_field(inline_cli, one_split, more, field):
    before = tree(one_split)
    finished = inline_cli.run(*sample_job(one_split, *more))
    assert finished.code == 3
    assert field in finished.err
    assert "fix:" in finished.err
    assert "Traceback" not in finished.err
    assert tree(one_split) == before


def test_split_with_another_recipe_is_refused_before_anything_is_built(inline_cli, one_split):
    before = tree(one_split)
    finished = inline_cli.run(*sample_job(one_split, "--codec", "png", split="validation"))
    assert finished.code == 3
    assert "  CODEC    jpeg           png" in finished.err
    assert "Traceback" not in finished.err
    assert tree(one_split) == before


def test_finished_job_run_again_changes_no_file(inline_cli, one_split):
    before = tree(one_split)
    finished = inline_cli.good(*sample_job(one_split))
    assert "nothing to do" in finished.out
    assert tree(one_split) == before


@pytest.fixture(scope="module")
def source(write_parquet, captioned_rows, tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("source"), captioned_rows(160))


def interrupt(cli, source, out, *, number, when):
    undo = partial(shutil.rmtree, out)
    running = cli.start_held(*parquet_job(source, out), when=when, undo=undo)
    running.signal_group(number)
    running.signal_group(signal.SIGCONT)
    finished = running.wait()
    assert finished.code == 130, finished.err
    assert "Traceback" not in finished.err, finished.err
    assert "run the same command to resume" in finished.err
    assert running.workers() == []
    assert not (out / "manifest.json").exists()


def finish(inline_cli, source, out):
    inline_cli.good(*parquet_job(source, out))
    manifest = load_manifest(str(out))
    assert manifest.splits["train"].num_samples == 160


def num_receipts(out):
    return len([*(out / "receipts").glob("[!.]*.json")])


@pytest.mark.slow
def test_ctrl_c_while_building_exits_with_130_and_the_same_command_finishes(cli, source, tmp_path):
    out = tmp_path / "out"
    interrupt(cli, source, out, number=signal.SIGINT, when=lambda _: 2 <= num_receipts(out) <= 12)
    built = num_receipts(out)
    assert built < 20
    finish(cli, source, out)
    # The supervisor may have missed a receipt of its workers, never the other way round.
    assert json.loads((out / "run.json").read_text())["built_shards"] <= 20 - 2


@pytest.mark.slow
@pytest.mark.parametrize("library", ("numpy", slow("libc"), slow("_imaging"), slow("tokenizers")))
def test_ctrl_c_while_workers_start_is_quiet(cli, source, tmp_path, library):
    """A worker that is still importing when Ctrl-C comes has no say, and no traceback."""

    out = tmp_path / "out"

    def importing(running):
        return any(library in _maps(worker) for worker in running.workers()) and not num_receipts(
            out
        )

    interrupt(cli, source, out, number=signal.SIGINT, when=importing)


def _maps(pid):
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.slow
def test_ctrl_c_while_planning_and_sigterm_while_building_can_be_finished(cli, source, tmp_path):
    out = tmp_path / "out"
    scratch, plan = out / ".scratch", out / "plan" / "train" / "plan.json"

    def planning(_):
        return any(scratch.glob("*/spool.jsonl")) and not plan.exists()

    interrupt(cli, source, out, number=signal.SIGINT, when=planning)
    interrupt(cli, source, out, number=signal.SIGTERM, when=lambda _: 2 <= num_receipts(out) <= 12)
    finish(cli, source, out)


def test_more_broken_pictures_than_the_budget_stop_the_job_and_accepting_them_continues(
    inline_cli, write_parquet, captioned_rows, tmp_path
):
    source = write_parquet(tmp_path / "source", captioned_rows(40, broken=11))
    out = tmp_path / "out"
    finished = inline_cli.run(*parquet_job(source, out, "--num-shards", 4))
    assert finished.code == 2
    assert "allowed=10" in finished.err
    assert "image_decode=11" in finished.err
    assert "MAX_BAD_SAMPLES=" in finished.err
    assert "Traceback" not in finished.err
    assert not (out / "manifest.json").exists()
    shards = {path: path.stat().st_ino for path in (out / "train").iterdir()}

    # Accepting the loss is no other job: what is built stays.
    inline_cli.good(*parquet_job(source, out, "--num-shards", 4, "--max-bad-samples", 0.5))
    split = load_manifest(str(out)).splits["train"]
    assert split.num_samples == 29
    assert dict(split.quarantined) == {"image_decode": 11}
    assert {path: path.stat().st_ino for path in (out / "train").iterdir()} == shards
    listed = [
        json.loads(line)
        for path in (out / "quarantine").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len(listed) == 11
    assert {line["reason"] for line in listed} == {"image_decode"}


@pytest.mark.slow
def test_ten_broken_pictures_are_within_the_budget_of_the_smallest_job(
    inline_cli, write_parquet, captioned_rows, tmp_path
):
    source = write_parquet(tmp_path / "source", captioned_rows(40, broken=10))
    inline_cli.good(*parquet_job(source, tmp_path / "out", "--num-shards", 4))
    split = load_manifest(str(tmp_path / "out")).splits["train"]
    assert (split.num_samples, dict(split.quarantined)) == (30, {"image_decode": 10})


@pytest.mark.slow
def test_mended_source_leaves_no_list_of_what_was_broken_before(
    inline_cli, write_parquet, captioned_rows, tmp_path
):
    out = tmp_path / "out"
    source = write_parquet(tmp_path / "source", captioned_rows(40, broken=11))
    assert inline_cli.run(*parquet_job(source, out, "--num-shards", 4)).code == 2
    assert any((out / "quarantine").iterdir())
    write_parquet(tmp_path / "source", captioned_rows(40))
    inline_cli.good(*parquet_job(source, out, "--num-shards", 4))
    assert dict(load_manifest(str(out)).splits["train"].quarantined) == {}
    assert [*(out / "quarantine").iterdir()] == []


def test_plan_writes_nothing_at_all(inline_cli, source, one_split, tmp_path):
    (tmp_path / "work").mkdir()
    before = tree(tmp_path / "work")
    planned = inline_cli.good(*parquet_job(source, tmp_path / "work" / "out", verb="plan"))
    assert tree(tmp_path / "work") == before == {}
    assert "160" in planned.out
    assert "20 (20 shards requested)" in planned.out

    kept = tree(one_split.parent)
    inline_cli.good(*sample_job(one_split, verb="plan"))
    assert tree(one_split.parent) == kept


@pytest.mark.slow
def test_plan_of_links_asks_nobody_and_writes_nothing(inline_cli, write_parquet, tmp_path):
    rows = [
        {"image_url": f"http://10.0.0.1/{i}.jpg", "caption": f"no {i}", "transcripts": []}
        for i in range(5)
    ]
    source = write_parquet(tmp_path / "source", rows)
    before = tree(tmp_path)
    planned = inline_cli.good(*parquet_job(source, tmp_path / "out", verb="plan"))
    assert tree(tmp_path) == before
    assert "unknown" in planned.out
    assert os.listdir(tmp_path) == ["source"]


def test_a_job_is_refused_while_another_one_holds_its_output(
    inline_cli, tmp_path, captioned_rows, write_parquet
):
    source, out = write_parquet(tmp_path / "source", captioned_rows(6)), tmp_path / "out"
    job = ("shards", "pixmo_cap", "--source", source, "--out", out, "--workers", "1")
    with storage.exclusive(str(out)):
        refused = inline_cli.run(*job)
    assert refused.code == 1
    assert "output is locked by another job" in refused.err
    assert "Traceback" not in refused.err
    assert list(out.iterdir()) == []
    inline_cli.good(*job)
