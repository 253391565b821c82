import argparse
import pstats
import re

import pytest

from loader.__main__ import main
from loader.cli.bench import BENCH, describe_feeding, feeding
from loader.delivery.stats import StageTimings, Stats
from shardspec.errors import ConfigError


def stats(*, batches=10, work_s=2.0, workers=2):
    return Stats(
        timings=StageTimings(batches=batches, decode_s=work_s), workers=workers, wait_s=2.0
    )


@pytest.mark.parametrize(
    ("model_step_s", "waits", "needed"),
    [(0.1, 0.5, 2), (0.05, 0.75, 4), (0.2, 0.0, 1), (5.0, 0.0, 1), (0.19, 0.05, 2)],
)
def test_waiting_and_workers_follow_from_the_time_of_a_batch(model_step_s, waits, needed):
    """A batch every 0.2 s, of 0.2 s of work."""
    found = feeding(stats(), wall_s=2.0, model_step_s=model_step_s)
    assert found == (pytest.approx(waits), needed)


def test_advice_names_the_stage_that_takes_most():
    text = describe_feeding(stats(), wall_s=2.0, model_step_s=0.1)
    for part in ("would wait 50%", "needs 2 workers", "add threads or worker processes"):
        assert part in text
    assert "would not wait" in describe_feeding(stats(), wall_s=2.0, model_step_s=1)


@pytest.fixture
def shards(tiny_dataset):
    return str(tiny_dataset)


def test_bench_times_a_dataset_and_answers_for_a_model(shards, capsys):
    assert not main(["bench", shards, "--steps", "3", "--batch-size", "2", "--model-step", "1000"])
    out = capsys.readouterr().out
    assert out.startswith("pixmo_cap train: 3 batches of 2\n")
    table = dict(re.findall(r"^([a-z ]{12}) (.*)$", out, re.MULTILINE))
    assert {name.strip() for name in table} == {
        *("first batch", "samples", "tokens", "read", "batch", "work", "workers")
    }
    assert table["workers     "].startswith("2 (thread)")
    assert "A model with 1000 s a step would not wait" in out


def test_bench_writes_a_profile_of_the_functions(shards, tmp_path, capsys):
    path = tmp_path / "made.prof"
    assert not main(["bench", shards, "--steps", "2", "--batch-size", "2", "--profile", str(path)])
    assert str(path) in capsys.readouterr().out
    files = {file for file, _, _ in pstats.Stats(str(path)).stats}
    assert any("loader/assembly" in file for file in files)


def test_bench_draws_a_flame_graph_of_the_threads(shards, tmp_path, capsys):
    path = tmp_path / "flame.svg"
    assert not main(["bench", shards, "--steps", "2", "--batch-size", "2", "--profile", str(path)])
    assert str(path) in capsys.readouterr().out
    assert path.read_text().startswith("<svg ")


@pytest.mark.parametrize(
    "flag", [("--steps", "0"), ("--model-step", "-1"), ("--model-step", "nan")]
)
def test_what_cannot_be_timed_is_refused(flag, shards):
    parser = argparse.ArgumentParser()
    BENCH.add(parser)
    with pytest.raises(ConfigError, match=flag[0]) as caught:
        BENCH.run(parser.parse_args([shards, *flag]))
    assert caught.value.reason == "bench_setting"


@pytest.mark.parametrize("name", ["flame.svg", "made.prof"])
def test_profile_that_cannot_be_written_is_one_error(shards, tmp_path, capsys, name):
    (tmp_path / "file").write_text("")
    flags = ["--steps", "1", "--batch-size", "2", "--profile", str(tmp_path / "file" / name)]
    assert main(["bench", shards, *flags]) == 1
    assert "storage operation failed" in capsys.readouterr().err
