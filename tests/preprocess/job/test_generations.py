"""Rows that a source gets after its split was finished: new shards, the old ones as they were."""

import hashlib
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest

from preprocess.job import (
    dry_run,
    generation,
    lease,
    part_run,
    read_status,
    remove_strays,
    verify,
)
from preprocess.job.gc import find_strays
from preprocess.job.generation import RowMarks
from preprocess.job.job import JobSettings
from preprocess.job.part_run import run_part
from preprocess.job.pipeline import commit_job, run_job
from preprocess.job.plan import parse_part
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec import storage
from shardspec.errors import BudgetError, ConflictError, StorageError
from shardspec.index import open_index
from shardspec.manifest import load_manifest
from tests.inline import Processes, Quiet, cluster

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 60.0)
    monkeypatch.setattr(part_run, "POLL_S", 0.02)


def texts(*numbers):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"It is number {i}."},
            ]
        }
        for i in numbers
    ]


def write(source, rows):
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return source


def settings(source, out, **more):
    return JobSettings(
        **{
            "dataset": str(source),
            "source": str(source),
            "out": str(out),
            "cache": str(source.parent / "cache"),
            "num_shards": 2,
            "new_rows": "append",
            "own_disk": "allow",
            "part_wait_s": 0.0,
            "recipe": Recipe(text=TextPolicy(num_variants=1)),
            **more,
        }
    )


def run(chosen):
    if chosen.part is None:
        return run_job(chosen, Quiet())
    return run_part(chosen, Quiet())


def stored(out):
    """The dataset's own files: without what is for people, and plans."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.parent.name in ("train", "validation", "receipts")
    }


def keys(out, split="train"):
    manifest = load_manifest(str(out))
    found = []
    for shard in manifest.select(split) if split in manifest.splits else ():
        url = out / shard.index_url
        rows = open_index(str(url), num_samples=shard.nsamples, shard_bytes=shard.num_bytes)
        found += rows["key"].tolist()
    return found


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "rows.jsonl", texts(*range(6)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_new_rows_get_shards_of_their_own_and_the_old_stay(source, out):
    run(settings(source, out))
    before, first = stored(out), keys(out)
    assert run(settings(source, out)).fresh is False
    write(source, texts(*range(9)))
    with pytest.raises(ConflictError) as caught:
        run(settings(source, out, new_rows="refuse"))
    assert (caught.value.reason, "NEW_ROWS=append" in str(caught.value)) == ("source_changed", True)
    planned = [dry_run(settings(source, out, new_rows=n), Quiet()) for n in ("append", "refuse")]
    assert [each.num_rows for each in planned] == [3, 9]
    outcome = run(settings(source, out))
    assert (outcome.fresh, outcome.built_shards, outcome.result.split.num_samples) == (True, 2, 9)
    assert {name: stored(out)[name] for name in before} == before
    assert (keys(out)[:6], len({*keys(out)})) == (first, 9)
    write(source, texts(*range(10)))
    again = run(settings(source, out)).result
    described = again.split.source["generations"]
    assert [each["num_samples"] for each in described] == [6, 3, 1]
    assert [each["num_shards"] for each in described] == [2, 2, 1]
    assert described[2]["build_key"] == again.split.build_key
    urls = [shard.url for shard in again.manifest.select("train")]
    assert urls[-1] == "train/rows-train-g00002-00000-of-00001.tar"
    assert again.split.source["rows_read"] == 10
    assert verify(str(out), deep=True, report=Quiet()) == []
    for new_rows in ("append", "refuse"):
        assert run(settings(source, out, new_rows=new_rows)).fresh is False


@pytest.mark.slow
def test_a_first_build_does_not_depend_on_the_setting(source, out, tmp_path):
    made = [
        run(settings(source, tmp_path / name, new_rows=name)).result.sha256
        for name in ("append", "refuse")
    ]
    assert made[0] == made[1]
    write(source, texts(*range(8)))
    grown = [run(settings(source, tmp_path / name)).result.sha256 for name in ("append", "refuse")]
    assert grown[0] == grown[1] != made[0]


CHANGES = {
    "changed": (texts(0, 1, 77, 3, 4, 5, 6), "rows"),
    "removed, others appended": (texts(1, 2, 3, 4, 5, 6, 7), "rows"),
    "last removed": (texts(*range(5)), "removed"),
}


def test_old_rows_that_are_not_what_they_were_are_refused(source, out):
    run(settings(source, out))
    before = (out / "manifest.json").read_bytes()
    for rows, words in CHANGES.values():
        write(source, rows)
        with pytest.raises(ConflictError) as caught:
            run(settings(source, out))
        assert caught.value.reason == "source_changed"
        assert ("last" in caught.value.facts) == (words == "rows")
        assert "FORCE=1" in caught.value.fix
    marks = out / "plan" / "train-rows.json.gz"
    payload = marks.read_bytes()
    write(source, texts(*range(7)))
    for damaged in (payload[:-9], b"", payload.replace(b"\x1f\x8b", b"\x1f\x8c")):
        marks.write_bytes(damaged)
        with pytest.raises(ConflictError) as caught:
            run(settings(source, out))
        assert (caught.value.reason, "marks" in caught.value.what) == ("source_changed", True)
    assert (out / "manifest.json").read_bytes() == before
    assert run(settings(source, out, force=True)).result.split.num_samples == 7
    write(source, texts(*range(8)))
    assert run(settings(source, out)).result.split.num_samples == 8


@pytest.mark.slow
def test_a_picture_of_an_old_row_that_has_changed_is_refused(tmp_path, out, small_jpeg):
    rows = [{"image": f"{i}.jpg", "question": "what?", "answer": f"{i}"} for i in range(5)]
    source = write(tmp_path / "rows.jsonl", rows[:3])
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(small_jpeg(i))
    run(settings(source, out))
    write(source, rows)
    (tmp_path / "1.jpg").write_bytes(small_jpeg(77))
    with pytest.raises(ConflictError) as caught:
        run(settings(source, out))
    assert str(tmp_path / "1.jpg") in caught.value.facts
    assert run(settings(source, out, compare="none")).result.split.num_samples == 5
    (tmp_path / "4.jpg").write_bytes(small_jpeg(78))  # of the generation that was added
    with pytest.raises(ConflictError) as caught:
        run(settings(source, out))
    assert str(tmp_path / "4.jpg") in caught.value.facts


CODE = """
import json
from pathlib import Path
from preprocess.datasets import DatasetBase

class Groups(DatasetBase):
    def load(self):
        return [json.loads(line) for line in Path(self.source).read_text().splitlines()]

    @classmethod
    def source_files(cls, source, split, *, unmatched):
        return [Path(source)]
"""


@pytest.mark.slow
def test_groups_are_in_one_generation(tmp_path, source, out):
    (tmp_path / "code.py").write_text(CODE)
    rows = [{**row, "group": f"g{i // 2}"} for i, row in enumerate(texts(*range(10)))]
    chosen = settings(source, out, dataset=f"{tmp_path}/code.py:Groups")
    write(source, rows[:5])
    run(chosen)
    for more in (rows[:6], [*rows[:5], *texts(6)]):
        write(source, more)
        with pytest.raises(ConflictError) as caught:
            run(chosen)
        assert (caught.value.reason, "group" in caught.value.what) == ("source_changed", True)
    write(source, [*rows[:5], *rows[6:]])
    assert run(chosen).result.split.num_samples == 9


@pytest.mark.slow
@pytest.mark.parametrize(("duplicates", "number"), [("drop", 8), ("keep", 12)])
def test_rows_that_repeat_old_ones_are_duplicates(source, out, duplicates, number):
    write(source, texts(*range(6), 5))
    run(settings(source, out, duplicates=duplicates))
    write(source, texts(*range(6), 5, 5, 7, 0, 5, 8))
    outcome = run(settings(source, out, duplicates=duplicates))
    assert outcome.result.split.num_samples == len({*keys(out)}) == number
    lost = {"duplicate": 12 - number} if number < 12 else {}
    assert outcome.result.split.quarantined == lost
    assert outcome.result.split.source["rows_read"] == 12
    if duplicates == "drop":
        before = (out / "manifest.json").read_bytes()
        write(source, texts(*range(6), 5, 5, 7, 0, 5, 8, 8))
        with pytest.raises(BudgetError) as caught:
            run(settings(source, out))
        assert caught.value.reason == "nothing_left"
        assert (out / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_a_row_is_in_one_split_whatever_comes_after_it(tmp_path, out, small_jpeg):
    (tmp_path / "spec.toml").write_text(
        'name = "set"\nformat = "vqa"\nvalidation = 0.4\n[columns]\nimage = "image"\n'
    )
    rows = [{"image": f"{i}.jpg", "question": "what?", "answer": f"{i}"} for i in range(24)]
    for i in range(24):
        (tmp_path / f"{i}.jpg").write_bytes(small_jpeg(i))
    source = tmp_path / "rows.jsonl"
    found = {}
    for number in (12, 18, 24):
        write(source, rows[:number])
        for split in ("train", "validation"):
            chosen = settings(source, out, dataset=str(tmp_path / "spec.toml"), split=split)
            run(chosen)
            now = keys(out, split)
            assert now[: len(found.get(split, ()))] == found.get(split, [])
            found[split] = now
    assert len({*found["train"], *found["validation"]}) == 24
    assert min(map(len, found.values())) > 2


# --- interrupted


@pytest.fixture
def grown(tmp_path):
    """Makes outputs that are to get a generation, and tells what they become undisturbed."""

    def make(name):
        source = write(tmp_path / "grown" / "rows.jsonl", texts(*range(4)))
        run(settings(source, tmp_path / name))
        write(source, texts(*range(7)))
        return settings(source, tmp_path / name)

    want = run(make("undisturbed")).result.sha256
    return make, want


def storage_sha256(chosen):
    return hashlib.sha256(storage.read_bytes(f"{chosen.out}/manifest.json")).hexdigest()


def after_kill(chosen, before, want):
    """Until its commit a generation changes nothing that a reader sees."""
    sha256 = storage_sha256(chosen)
    assert sha256 in (before, want)
    if sha256 == before:
        assert load_manifest(chosen.out).splits["train"].num_samples == 4
    assert verify(chosen.out, report=Quiet()) == []
    return sha256 == before


@pytest.mark.parametrize(("first", "step"), [(17, 90), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_job_killed_at_any_change_of_storage_ends_in_the_same_bytes(
    grown, monkeypatch, first, step
):
    make, want = grown
    processes = Processes(monkeypatch)
    at, early = first, 0
    while True:
        chosen = make(f"at-{at}")
        before = storage_sha256(chosen)
        done = processes.run(run, chosen, at=at)
        if done is not None:
            break
        open_yet = after_kill(chosen, before, want)
        early += open_yet
        if step == 1 and at % 3 == 0:  # other commands in between take nothing that is needed
            remove_strays(chosen.out, find_strays(chosen.out))
        if step == 1 and at % 3 == 1:
            with pytest.raises(ConflictError) if open_yet else nullcontext():
                processes.run(run, replace(chosen, new_rows="refuse"))
        processes.run(run, chosen)
        assert storage_sha256(chosen) == want
        assert read_status(chosen.out).state == "complete"
        at += step
    assert early >= 1


def test_parts_append_what_one_process_does(grown):
    make, want = grown
    chosen = make("parts")
    ended = [run(replace(chosen, part=parse_part(f"{i}/2"))) for i in (1, 0)]
    assert [each.result and each.result.sha256 for each in ended] == [None, want]
    assert run(replace(chosen, part=parse_part("1/2"))).fresh is False
    other = make("one after parts")
    run(replace(other, part=parse_part("1/2")))
    assert run(other).result.sha256 == want
    last = make("commit")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.job.pipeline.commit", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(last)
    assert read_status(last.out).jobs[0].shards_done == 2
    assert find_strays(last.out).objects == ()
    assert commit_job(last, Quiet()).result.sha256 == want


def test_a_cluster_appends_what_one_process_does(grown):
    make, want = grown
    for name, parts in (("whole", [None]), ("parts", [parse_part("0/2"), parse_part("1/2")])):
        chosen = replace(make(name), engine="ray")
        with cluster(2) as sent:
            ended = [run(replace(chosen, part=part)) for part in parts]
        assert sent == [0, 1]
        assert ended[-1].result.sha256 == storage_sha256(chosen) == want


@pytest.mark.slow
def test_a_dataset_in_a_store_grows_by_parts(source, s3_server):
    write(source, texts(*range(4)))
    with s3_server.entered():
        chosen = settings(source, s3_server.make_bucket() + "/out")
        run(chosen)
        write(source, texts(*range(7)))
        for part in ("0/2", "1/2"):
            ended = run(replace(chosen, part=parse_part(part)))
        assert ended.result.split.num_samples == 7
        assert verify(chosen.out, report=Quiet()) == []


def _interrupted(*args, **more):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_source_that_grows_meanwhile_is_planned_again(grown):
    make, _ = grown
    chosen = make("twice")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.job.pipeline.commit", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(chosen)
    write(storage.local_path(chosen.source), texts(*range(9)))
    assert run(chosen).result.split.num_samples == 9
    assert [each["num_samples"] for each in run(chosen).result.split.source["generations"]] == [
        4,
        5,
    ]


@pytest.mark.slow
def test_two_jobs_cannot_append_the_same_generation(grown, monkeypatch):
    make, want = grown
    chosen = make("overtaken")
    from preprocess.job import pipeline

    real = pipeline.make_board

    def overtake(job, report):
        monkeypatch.setattr(pipeline, "make_board", real)
        run(chosen)
        return real(job, report)

    monkeypatch.setattr(pipeline, "make_board", overtake)
    with pytest.raises(ConflictError) as caught:
        run(chosen)
    assert caught.value.reason == "manifest_conflict"
    assert storage_sha256(chosen) == want


@pytest.mark.slow
def test_a_damaged_generation_is_refused_by_name(grown, tmp_path):
    make, _ = grown
    chosen = make("damaged")
    run(chosen)
    shard = next((tmp_path / "damaged" / "train").glob("*-g00001-*.tar"))
    shard.unlink()
    for new_rows in ("append", "refuse"):
        with pytest.raises(StorageError) as caught:
            run(replace(chosen, new_rows=new_rows))
        assert caught.value.reason == "generation_damaged"
    rebuilt = run(replace(chosen, force=True)).result.split
    assert (rebuilt.num_samples, "generations" in rebuilt.source) == (7, False)


# --- marks


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 8])
def test_marks_find_the_block_that_differs(monkeypatch, number):
    monkeypatch.setattr(generation, "BLOCK", 4)

    def marks(examples):
        made = RowMarks()
        for each in examples:
            made.add(each)
        return made

    examples = [{"n": i, "image": b"%d" % i} for i in range(number)] + [None]
    usual = marks(examples)
    assert (usual.num_examples, len(usual.blocks)) == (number + 1, (number + 1) // 4)
    more = usual.copy()
    more.add({"n": "new"})
    assert more.blocks[: len(usual.blocks)] == usual.blocks
    assert marks([*examples, {"n": "new"}]).last == more.last != usual.last
    for i in range(number):
        changed = marks([*examples[:i], {**examples[i], "image": b"x"}, *examples[i + 1 :]])
        assert changed.last != usual.last
        same = [a == b for a, b in zip(changed.blocks, usual.blocks, strict=True)]
        assert same == [block < i // 4 for block in range(len(same))]
