"""The verbs as commands: what they print, how they end, and kills at any moment."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from shardspec.manifest import load_manifest, require_manifest


def tree(folder):
    """Every file of a folder but the notes of unfinished ones, by its sha256."""
    folder = Path(folder)
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def source(tiny_sample, write_dataset, tmp_path_factory):
    """A dataset of 240 samples of 12 KiB in 6 shards."""
    folder = tmp_path_factory.mktemp("reshard-job") / "source"
    samples = [tiny_sample(i, size=(64, 40)) for i in range(240)]
    return Path(write_dataset(folder, samples, num_shards=6))


def copying(source, out):
    return ("reshard", source, out, "--copy", "--shards", 60, "--order", "shuffle", "--jobs", 2)


@pytest.fixture(scope="module")
def undisturbed(source, inline_cli, tmp_path_factory):
    out = tmp_path_factory.mktemp("reshard-done") / "out"
    inline_cli.good(*copying(source, out))
    return tree(out)


def receipts(out):
    return len(list((out / "receipts").glob("*.json"))) if (out / "receipts").is_dir() else 0


def held_at(cli, source, out, when):
    """Starts a copy, and stops it in a state."""
    return cli.start_held(*copying(source, out), when=when, undo=partial(shutil.rmtree, out))


def check_whole_or_nothing(out):
    """What a reader finds after a kill: no dataset, or all of it."""
    manifest = load_manifest(str(out))
    if manifest is None:
        return
    for shard in manifest.shards:
        assert (out / shard.url).stat().st_size == shard.num_bytes
        assert (out / shard.index_url).stat().st_size == shard.index_bytes


@pytest.mark.slow
def test_a_killed_copy_continues_and_ends_as_undisturbed(cli, source, undisturbed, tmp_path):
    before, out = tree(source), tmp_path / "out"
    held_at(cli, source, out, lambda _: 7 <= receipts(out) <= 40).kill_group()
    assert 7 <= receipts(out) < 60
    assert load_manifest(str(out)) is None
    finished = cli.good(*copying(source, out))
    assert "of 60 shards are finished" in finished.err
    assert tree(out) == undisturbed
    assert tree(source) == before
    assert "nothing to do" in cli.good(*copying(source, out)).out


@pytest.mark.slow
def test_a_killed_worker_costs_its_shard_only(cli, source, undisturbed, tmp_path):
    out = tmp_path / "out"
    running = held_at(
        cli, source, out, lambda running: 3 <= receipts(out) <= 40 and running.workers()
    )
    os.kill(running.workers()[0], signal.SIGKILL)
    running.signal_group(signal.SIGCONT)
    finished = running.wait()
    assert finished.code == 0, finished.err
    assert "its shard is copied again" in finished.err
    assert tree(out) == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_at_random_points_leave_the_old_state_or_the_new_one(
    cli, source, undisturbed, tmp_path
):
    before, out = tree(source), tmp_path / "out"
    rng = random.Random(5)
    kills = 0
    while kills < 15:
        running = cli.start(*copying(source, out))
        # Around the whole of a run: its imports, the copies, the commit and its end.
        time.sleep(rng.uniform(0.2, 2.5))
        running.kill_group()
        kills += 1
        check_whole_or_nothing(out)
        assert tree(source) == before
        if load_manifest(str(out)) is not None:
            cli.good(*copying(source, out))
            assert tree(out) == undisturbed
            shutil.rmtree(out)
    cli.good(*copying(source, out))
    assert tree(out) == undisturbed
    assert tree(source) == before


def test_a_dry_run_prints_the_plan_and_writes_nothing(inline_cli, source, tmp_path):
    finished = inline_cli.good(
        *("reshard", source, tmp_path / "out", "--dry-run"),
        *("--nodes", 2, "--ranks", 4, "--workers", 3),
    )
    assert "24 (1 for each of 24 readers)" in finished.out
    assert "view: our loader reads byte ranges" in finished.out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_verbs_can_follow_one_another(inline_cli, source, tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    inline_cli.good("split", source, a, "--into", "train=0.75,validation=0.25", "--salt", "x")
    inline_cli.good("filter", a, b, "--where", "num_tokens < 9", "--split", "train")
    inline_cli.good("filter", a, c, "--where", "num_tokens >= 9", "--split", "train")
    printed = inline_cli.good("merge", b, c, d, "--order", "shuffle", "--copy", "--jobs", 1).out
    assert printed.splitlines()[0].split() == ["source", str(b)]
    train = require_manifest(str(a)).splits["train"]
    assert require_manifest(str(d)).splits["train"].num_samples == train.num_samples
    keys = tmp_path / "keys.txt"
    keys.write_text("sample-0001\nsample-0002\n")
    inline_cli.good("filter", source, tmp_path / "e", "--keys", keys)
    assert require_manifest(str(tmp_path / "e")).splits["train"].num_samples == 2


@pytest.mark.parametrize(
    "args, code, text",
    [
        (("filter", "{source}", "{out}"), 1, "give --where or --keys"),
        (("filter", "{source}", "{out}", "--where", "widht < 3"), 1, "did you mean 'width'?"),
        (("filter", "{source}", "{out}", "--keys", "{out}/none"), 1, "list of keys"),
        (("reshard", "{source}", "{out}", "--shards", "0"), 1, "--shards must be at least 1"),
        (("reshard", "{source}", "{out}", "--nodes", "0"), 1, "at least one node"),
        (("reshard", "{source}", "{out}", "--split", "trian"), 1, "did you mean 'train'?"),
        (("reshard", "{out}", "{source}"), 1, "has no manifest"),
        (("split", "{source}", "{out}", "--into", "a=0.5"), 1, "sum to 1"),
        (("merge", "{source}", "{source}", "{out}"), 3, "same key"),
        (("reshard", "{source}", "{source}/x"), 1, "are inside one another"),
    ],
)
def test_requests_that_cannot_be_honoured_say_why(args, code, text, source, tmp_path, capsys):
    from preprocess.__main__ import main

    handler = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    got = main([arg.format(source=source, out=out) for arg in args])
    signal.signal(signal.SIGTERM, handler)
    err = capsys.readouterr().err
    assert got == code
    assert text in err
    assert "Traceback" not in err
    assert not out.exists()


def test_the_manifest_names_what_it_came_from(source, inline_cli, tmp_path):
    out = tmp_path / "out"
    shuffled = ("--order", "shuffle", "--seed", 3)
    inline_cli.good("reshard", source, out, *shuffled, "--copy", "--jobs", 1)
    split = json.loads((out / "manifest.json").read_bytes())["splits"]["train"]
    digest = hashlib.sha256((source / "manifest.json").read_bytes()).hexdigest()
    assert split["source"]["from"][0]["manifest_sha256"] == digest
    assert (split["source"]["order"], split["source"]["seed"]) == ("shuffle", 3)
