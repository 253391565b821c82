"""One picture under several names: its rows are of one split, and what that costs is told."""

import json
import tarfile
from types import SimpleNamespace

import pytest

from preprocess.fetch import FetchPolicy, FetchResult, download
from preprocess.job import count_rows, part_run, planner
from preprocess.job.job import JobSettings
from preprocess.job.part_run import run_part
from preprocess.job.pipeline import run_job
from preprocess.job.plan import parse_part
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec.errors import StorageError
from tests.inline import Quiet

pytestmark = pytest.mark.usefixtures("in_this_process")

NUM_PICTURES, NUM_NAMES = 8, 24
"""Name i is of picture i % 8."""


@pytest.fixture(params=["urls", pytest.param("paths", marks=pytest.mark.slow)])
def names(request, tmp_path, small_jpeg, monkeypatch):
    if request.param == "paths":
        for i in range(NUM_NAMES):
            (tmp_path / f"{i}.jpg").write_bytes(small_jpeg(i % NUM_PICTURES))
        return [f"{i}.jpg" for i in range(NUM_NAMES)]

    def fetch_all(found, *, cache, ledger, on_result, **more):  # noqa: ARG001
        for url in found:
            number = int(url.rpartition("/")[2].partition(".")[0])
            sha256 = cache.put(small_jpeg(number % NUM_PICTURES))
            ledger.append(FetchResult(url=url, status="ok", sha256=sha256, num_bytes=1))
        return {url: ledger.get(url) for url in found}

    monkeypatch.setattr(download, "fetch_all", fetch_all)
    return [f"http://h{i % 5}.example.org/{i}.jpg" for i in range(NUM_NAMES)]


def stored_pictures(out, split):
    """Gives the number of the picture of each sample."""
    found = []
    for path in (out / split).glob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    text = tar.extractfile(name).read().decode()
                    found.append(int(text.partition("picture ")[2].partition(".")[0]))
    return found


@pytest.fixture
def settings(tmp_path, names):
    (tmp_path / "set.toml").write_text('name = "set"\nformat = "vqa"\nvalidation = 0.1\n')
    rows = [
        {"image": name, "question": f"{i}?", "answer": f"picture {i % NUM_PICTURES}."}
        for i, name in enumerate(names)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(out, split, part=None):
        return JobSettings(
            dataset=str(tmp_path / "set.toml"),
            source=str(tmp_path / "rows.jsonl"),
            split=split,
            out=str(tmp_path / out),
            cache=str(tmp_path / "cache"),
            num_shards=2,
            part=part and parse_part(part),
            own_disk="allow",
            part_wait_s=0.0,
            recipe=Recipe(text=TextPolicy(num_variants=1)),
        )

    return make


def test_a_picture_under_several_names_is_in_one_split(tmp_path, names, settings):
    told = Quiet()
    train = run_job(settings("out", "train"), told).result
    validation = run_job(settings("out", "validation"), Quiet()).result
    found = {split: stored_pictures(tmp_path / "out", split) for split in ("train", "validation")}
    assert {*found["train"]}.isdisjoint(found["validation"])
    assert {*found["train"], *found["validation"]} == {*range(NUM_PICTURES)}
    assert len(found["validation"]) == validation.split.num_samples > 0
    lost = count_rows(train.split).left_out
    assert lost == {"held_out": NUM_NAMES - sum(map(len, found.values()))} != {"held_out": 0}
    assert any("several URLs" in note for note in told.notes) == names[0].startswith("http")


def test_placeholders_are_reported_with_an_example():
    results = {
        url: FetchResult(url=url, status="ok", sha256=sha256 * 64)
        for sha256, urls in {"a": ["http://x/1", "http://x/2"], "b": ["http://x/3"]}.items()
        for url in urls
    }
    job = SimpleNamespace(
        settings=SimpleNamespace(fetch=FetchPolicy(placeholder_urls=2), max_dead_links=1.0),
        dataset=SimpleNamespace(held_out=lambda: iter(())),
    )
    told = Quiet()
    marked = planner._judged(job, results, told)
    assert [each.reason for each in marked.values()] == ["placeholder", "placeholder", ""]
    (note,) = told.notes
    assert note.startswith(f"2 URLs give one image ({'a' * 16}, for example http://x/1)")


@pytest.mark.slow
@pytest.mark.parametrize("names", ["urls"], indirect=True)
def test_parts_hold_out_what_one_process_does(settings, monkeypatch):
    monkeypatch.setattr(part_run, "POLL_S", 0.02)
    alone = run_job(settings("alone", "train"), Quiet()).result
    assert alone.split.quarantined["held_out"] > 0
    with pytest.raises(StorageError, match="not at work: 1/2"):
        run_part(settings("parts", "train", "0/2"), Quiet())
    for part in ("1/2", "0/2"):
        ended = run_part(settings("parts", "train", part), Quiet())
    assert ended.result.sha256 == alone.sha256
