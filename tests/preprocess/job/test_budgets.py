"""What ends a job: settings out of range, adapters that break their contract, too many losses."""

import dataclasses

import pytest

from preprocess.fetch.blobs import BlobCache
from preprocess.job import dry_run, run_job
from preprocess.job.build import prepare_row
from preprocess.job.commit import check_bad_samples
from preprocess.job.job import Job, JobSettings
from preprocess.job.planner import make_plan
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import BudgetError, ConfigError, SampleError
from tests.preprocess.job.test_commit import Silent, built

RECIPE = Recipe(text=TextPolicy(num_variants=1))


@pytest.fixture
def job_of(write_parquet, tmp_path):
    """A function from PixMo-Cap rows to an opened job."""

    def job(rows, **settings):
        source = write_parquet(tmp_path / "source", rows)
        return Job(
            JobSettings(
                dataset="pixmo_cap",
                source=str(source),
                out=str(tmp_path / "out"),
                cache=str(tmp_path / "cache"),
                recipe=RECIPE,
                **settings,
            )
        )

    return job


def stopped(job):
    with pytest.raises(BudgetError) as caught:
        make_plan(job, Silent())
    return caught.value


def with_image(row, **image):
    return {**row, "image": {"bytes": None, "path": None, **image}, "image_url": None}


@pytest.mark.parametrize(
    "wrong",
    [
        {"limit": 0},
        {"num_workers": 0},
        {"num_shards": 0},
        {"shard_bytes": 1000},
        {"max_dead_links": 1.5},
        {"max_bad_samples": -0.1},
        {"split": "../train"},
        {"limit": -1, "num_shards": -1},
        {"source": "", "cache": " "},
        {"image_memory": 0},
    ],
)
def test_settings_out_of_range_are_all_named(wrong):
    with pytest.raises(ConfigError) as caught:
        JobSettings(dataset="pixmo_cap", out="out", **wrong)
    assert (caught.value.reason, caught.value.facts) == ("job_settings", wrong)


@pytest.mark.parametrize(
    "place, reason",
    [({"source": "https://host/rows"}, "source_url"), ({"out": "memory://out"}, "out_memory")],
)
def test_places_that_a_job_cannot_use_are_refused(place, reason):
    with pytest.raises(ConfigError) as caught:
        JobSettings(**{"dataset": "pixmo_cap", "out": "out", **place})
    assert caught.value.reason == reason


@pytest.mark.parametrize("run", [run_job, dry_run])
@pytest.mark.parametrize("name", ["file", "file/sub/out"])
def test_output_that_is_a_file_is_refused(tmp_path, run, name):
    (tmp_path / "file").write_text("x")
    settings = JobSettings(
        dataset="text_sft",
        source="sample",
        limit=1,
        out=str(tmp_path / name),
        cache=str(tmp_path / "cache"),
    )
    with pytest.raises(ConfigError) as caught:
        run(settings, Silent())
    assert (caught.value.reason, caught.value.where) == ("out_file", str(tmp_path / "file"))


def test_output_that_is_a_file_is_named_by_the_verbs_that_take_one(tmp_path, inline_cli):
    (tmp_path / "file").write_text("x")
    for verb in (["verify"], ["gc"], ["merge"]):
        more = [tmp_path / "out"] if verb == ["merge"] else []
        done = inline_cli.run(*verb, tmp_path / "file", *more)
        assert done.code == 1
        assert "file where a folder is needed" in done.err


def test_source_of_which_no_row_is_left_stops_the_job(job_of, captioned_rows):
    rows = [with_image(row, path=f"gone/{i}.jpg") for i, row in enumerate(captioned_rows(3))]
    error = stopped(job_of(rows))
    assert (error.reason, error.facts.pop("first")[:5]) == ("nothing_left", "image")
    assert error.facts == {"image_missing": 3}


@pytest.mark.parametrize("lost, allowed", [(11, 10), (13, 12)])
def test_more_lost_rows_than_the_budget_stop_the_job(job_of, captioned_rows, lost, allowed):
    rows = captioned_rows(30)
    for i in range(lost):
        rows[i] = with_image(rows[i], path=f"gone/{i}.jpg")
    share = None if allowed == 10 else allowed / 30
    error = stopped(job_of(rows, max_lost_rows=share, max_dead_links=1.0))
    assert error.reason == "lost_rows"
    assert error.facts == {
        "setting": "MAX_LOST_ROWS",
        "rows": 30,
        "allowed": allowed,
        "image_missing": lost,
    }


def test_a_budget_of_zero_allows_none(job_of, captioned_rows):
    rows = captioned_rows(4)
    rows[1] = with_image(rows[1], path="gone.jpg")
    assert stopped(job_of(rows, max_lost_rows=0.0)).facts["allowed"] == 0
    rows[1] = {**rows[1], "image": None, "image_url": "http://127.0.0.1/1.jpg"}
    error = stopped(job_of(rows, max_dead_links=0.0))
    assert (error.reason, error.facts["allowed"]) == ("dead_links", 0)


def test_duplicates_and_rows_without_a_message_are_not_losses(job_of, captioned_rows):
    rows = captioned_rows(5)
    rows += [rows[0], {**rows[1], "transcripts": []}]
    plan = make_plan(job_of(rows, max_lost_rows=0.0, mode="transcript"), Silent())
    assert (plan.num_samples, plan.num_rows) == (5, 5)
    assert plan.quarantined == {"duplicate": 1, "no_message": 1}


def test_more_dead_links_than_the_budget_stop_the_job(job_of, captioned_rows):
    # No network is needed to see that these addresses are not public.
    rows = [
        {**row, "image": None, "image_url": f"http://127.0.0.1/{i}.jpg"}
        for i, row in enumerate(captioned_rows(12))
    ]
    job = job_of(rows)
    error = stopped(job)
    num_links = len(job.dataset)
    assert error.reason == "dead_links"
    assert error.facts == {"links": num_links, "allowed": 10, "private_addr": num_links}


def test_recipe_that_no_probed_sample_survives_stops_the_job(job_of, captioned_rows):
    rows = [with_image(row, bytes=b"no image %d" % i) for i, row in enumerate(captioned_rows(6))]
    error = stopped(job_of(rows))
    assert error.reason == "probe_failed"
    assert error.facts["first_reason"] == "image_decode"


def test_more_bad_samples_than_the_budget_are_not_committed(tmp_path):
    job, plan, (receipt,) = built(tmp_path, "train")
    few, many = (
        dataclasses.replace(receipt, quarantined={"image_decode": n - 1, "control_token": 1})
        for n in (10, 11)
    )
    check_bad_samples(job, plan, [few])
    strict = dataclasses.replace(job.settings, max_bad_samples=0.0)
    with pytest.raises(BudgetError):
        check_bad_samples(Job(strict), plan, [few])
    with pytest.raises(BudgetError) as caught:
        check_bad_samples(job, plan, [many])
    assert caught.value.reason == "bad_samples"
    assert caught.value.facts["allowed"] == 10


def test_picture_that_has_changed_since_the_plan_is_a_bad_sample(tmp_path, small_jpeg):
    path = tmp_path / "a.jpg"
    path.write_bytes(small_jpeg(1))
    row = {
        "key": "k",
        "image": {"kind": "path", "path": str(path), "sha256": "0" * 64},
        "example": {"message_list": [{"style": "long_caption", "text": "A cat."}]},
    }
    preparer = Preparer(recipe=RECIPE, tokenizer=load_tokenizer())
    with pytest.raises(SampleError) as caught:
        prepare_row(preparer, row, cache=BlobCache(tmp_path / "cache"))
    assert (caught.value.reason, caught.value.where) == ("image_changed", str(path))


def test_adapter_that_gives_more_images_than_it_may_is_named(job_of, captioned_rows):
    job = job_of(captioned_rows(1))
    message = {"style": "long_caption", "text": "A cat."}
    example = {"image": [b"one", b"two"], "message_list": [message]}

    job.dataset.to_example = lambda row: dict(example)
    with pytest.raises(ConfigError) as caught:
        make_plan(job, Silent())
    assert caught.value.reason == "image_number"
