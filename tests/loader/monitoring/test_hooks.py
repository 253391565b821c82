"""Monitoring hooks: what they write, that it adds up, and that a full disk ends no run."""

import json
import logging
import re
from collections import Counter

import pytest
import torch

from loader import IterableDatasetMixture, StreamingDataset, View, make_dataloader
from loader.delivery import Stats
from loader.delivery.stats import StageTimings
from loader.monitoring import Fanout, JsonLines, Prometheus, TensorBoard, WandB
from shardspec.errors import ConfigError
from shardspec.tiling import ImageView

SAMPLE = re.compile(
    r'([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
    r'(?:,[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*")*\})? (\S+)'
)


def stats(samples=4, **counters):
    timings = StageTimings(
        batches=2, samples=samples, positions=100, tokens=75, loss_tokens=30, decode_s=0.5
    )
    return Stats(timings=timings, wait_s=1.0, use_s=3.0, ready=2, counters=counters)


def parsed(text):
    """Reads OpenMetrics: {name: (type, labels, value)}, or {name + labels: ...} of a dataset."""
    *lines, end = text.splitlines()
    assert end == "# EOF"
    found, families = {}, set()
    for line in lines:
        if line.startswith("#"):
            family, kind = re.fullmatch(r"# TYPE (\w+) (gauge|counter)", line).groups()
            assert family not in families  # all its samples follow
            families.add(family)
            continue
        name, labels, value = SAMPLE.fullmatch(line).groups()
        assert name == (f"{family}_total" if kind == "counter" else family)
        key = name + labels if "dataset=" in (labels or "") else name
        assert key not in found
        found[key] = kind, labels or "", float(value)
    return found


def test_rates_are_those_of_the_last_steps():
    flat = stats().to_dict()
    assert flat["padding_share"] == 0.25
    assert (flat["samples_per_s"], flat["tokens_per_s"], flat["loss_tokens_per_s"]) == (
        1,
        18.75,
        7.5,
    )
    assert Stats().padding_share == 0


def test_json_lines_are_appended(tmp_path):
    for step in (2, 4):
        JsonLines(tmp_path / "a.jsonl")(step, stats(retries=step))
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert [line["retries"] for line in lines] == [2, 4]
    assert lines[0] == {"step": 2, **stats(retries=2).to_dict()}


def test_prometheus_sums_counters_and_keeps_gauges(tmp_path):
    hook = Prometheus(tmp_path / "a.prom", labels={"rank": "0", "run": 'a"b\\c\nd'})
    hook(2, stats(samples=4, retries=1))
    hook(4, stats(samples=6, retries=2))
    found = parsed((tmp_path / "a.prom").read_text())
    labels = '{rank="0",run="a\\"b\\\\c\\nd"}'
    assert found["vlm_shards_loader_samples_total"] == ("counter", labels, 10)
    assert found["vlm_shards_loader_retries_total"] == ("counter", labels, 3)
    assert found["vlm_shards_loader_decode_seconds_total"] == ("counter", labels, 1.0)
    assert found["vlm_shards_loader_samples_per_second"] == ("gauge", labels, 6 / 4)
    assert found["vlm_shards_loader_step"] == ("gauge", labels, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.prom"]


def test_datasets_of_a_mixture_are_told_apart_by_a_label(tmp_path):
    names = ["a-b", "a_b", "a.b", "x_s", "x_seconds", "x", "x_total", 'q"', "日本", "中国"]
    hook = Prometheus(tmp_path / "a.prom", labels={"rank": "0"})
    counts = {f"samples_of_{name}": i + 1 for i, name in enumerate(names)}
    hook(2, stats(samples=100, **counts))
    hook(4, stats(samples=100, **counts))
    found = parsed((tmp_path / "a.prom").read_text(encoding="utf-8"))
    for i, name in enumerate(names):
        escaped = name.replace('"', r"\"")
        labels = f'{{rank="0",dataset="{escaped}"}}'
        total = found[f"vlm_shards_loader_dataset_samples_total{labels}"]
        assert total == ("counter", labels, 2 * (i + 1))
        share = found[f"vlm_shards_loader_dataset_share{labels}"]
        assert share == ("gauge", labels, (i + 1) / 100)


@pytest.mark.parametrize("name", ["", "a-b", "1a", "__name", "dataset"])
def test_labels_that_prometheus_refuses_are_refused(tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        Prometheus(tmp_path / "a.prom", labels={name: "x"})
    assert caught.value.reason == "metric_label"


def test_tensorboard_gets_scalars():
    class Writer:
        scalars = []

        def add_scalar(self, name, value, step):
            self.scalars.append((name, value, step))

    TensorBoard(Writer())(2, stats())
    assert Writer.scalars == [(f"loader/{name}", v, 2) for name, v in stats().to_dict().items()]


def test_wandb_gets_numbers_with_their_step():
    class Run:
        logged = []

        def log(self, numbers):
            self.logged.append(numbers)

    Fanout(WandB(Run()), WandB(Run(), prefix="x/"))(2, stats())
    first, second = Run.logged
    assert first["loader/step"] == second["x/step"] == 2
    assert first["loader/padding_share"] == 0.25


@pytest.mark.parametrize("kind", [JsonLines, Prometheus])
def test_what_cannot_be_written_is_logged_once_and_tried_again(tmp_path, caplog, kind):
    hook = kind(tmp_path / "none" / "file")
    with caplog.at_level(logging.WARNING):
        hook(1, stats())
        hook(2, stats())
    assert len(caplog.records) == 1
    assert "step 1" in caplog.text
    (tmp_path / "none").mkdir()
    hook(3, stats())
    text = (tmp_path / "none" / "file").read_text()
    if kind is Prometheus:
        assert parsed(text)["vlm_shards_loader_samples_total"][2] == 12
    else:
        assert json.loads(text)["step"] == 3


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"pad_mode": "max_len"}])
def test_tokens_of_a_run_are_those_of_its_batches(write_dataset, tiny_sample, tmp_path, options):
    url = write_dataset(tmp_path / "data", [tiny_sample(i) for i in range(12)])
    view = View(image=ImageView(size_px=28, patch_px=14, pool=(1, 1)))
    dataset = StreamingDataset(url, view=view)
    loader = make_dataloader(dataset, global_batch_size=2, sequence_length=64, **options)
    loader.watch(JsonLines(tmp_path / "a.jsonl"), every_steps=1)
    batches = list(loader)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    got = [(line["positions"], line["tokens"], line["loss_tokens"]) for line in lines]
    assert got == [
        (
            batch["input_ids"].numel(),
            int(batch["attention_mask"].sum()),
            int((batch["labels"] != -100).sum()),
        )
        for batch in batches
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"pack": True}, pytest.param({"workers": 1}, marks=pytest.mark.slow)],
    ids=["rows", "packed", "workers"],
)
def test_numbers_of_a_mixture_are_those_of_its_batches(
    write_dataset, tiny_sample, tmp_path, options
):
    parts = []
    for name in ("caps", "vqa"):
        samples = [tiny_sample(i) for i in range(12)]
        url = write_dataset(tmp_path / name, samples, name=name)
        view = View(image=ImageView(size_px=28, patch_px=14, pool=(1, 1)))
        parts.append(StreamingDataset(url, view=view))
    mixture = IterableDatasetMixture(parts, weights=[0.75, 0.25], seed=0)
    loader = make_dataloader(
        mixture, global_batch_size=4, sequence_length=64, with_metadata=True, **options
    )
    hook = Fanout(JsonLines(tmp_path / "a.jsonl"), Prometheus(tmp_path / "a.prom"))
    loader.watch(hook, every_steps=1)
    seen = Counter()
    for batch in loader:
        rows = [part for row in batch["metadata"] for part in row.get("examples", [row])]
        seen.update(part["dataset"] for part in rows)
        if loader.step == 4:
            break
    loader.close()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    for name in ("caps", "vqa"):
        assert sum(line.get(f"samples_of_{name}", 0) for line in lines) == seen[name]
    assert all(line["share_of_caps"] == line["samples_of_caps"] / line["samples"] for line in lines)
    found = parsed((tmp_path / "a.prom").read_text())
    label = '{dataset="caps"}'
    assert found[f"vlm_shards_loader_dataset_samples_total{label}"][2] == seen["caps"]
    assert found[f"vlm_shards_loader_dataset_share{label}"][2] == lines[-1]["share_of_caps"]


def test_batches_of_the_users_own_are_counted_as_far_as_they_say(
    write_dataset, tiny_sample, tmp_path
):
    url = write_dataset(tmp_path / "data", [tiny_sample(i) for i in range(4)])
    view = View(image=ImageView(size_px=28, patch_px=14, pool=(1, 1)))

    def collate(examples):
        return {"input_ids": torch.zeros(2, 3), "labels": "none"}

    loader = make_dataloader(
        StreamingDataset(url, view=view),
        global_batch_size=2,
        sequence_length=64,
        collate_fn=collate,
    )
    assert len(list(loader)) == 2
    flat = loader.stats().to_dict()
    assert (flat["samples"], flat["positions"], flat["padding_share"]) == (4, 0, 0)
