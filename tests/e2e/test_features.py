"""Datasets of features: batches equal those of pictures, shown to the backbone and nothing else."""

import hashlib
import itertools
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from loader import (
    IterableDatasetMixture,
    StreamingDataset,
    View,
    assemble,
    make_dataloader,
    view_collator,
)
from loader.assembly import Augment
from loader.features import Backbone, check_backbone, load_backbone
from preprocess.annotate import AnnotateSettings, annotate, plan_annotation
from preprocess.job import Part, read_status, verify
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, SampleError, ShardError
from shardspec.families import Qwen2VL, StoredModel
from shardspec.features import StoredFeatures
from shardspec.manifest import require_manifest
from shardspec.tiling import ImageView
from tests import model_folders
from tests.e2e.test_models import datasets, folders  # noqa: F401 - fixtures
from tests.inline import Quiet, cluster
from vlm_shards import features
from vlm_shards.__main__ import main
from vlm_shards.features import FeatureSettings, make_features, plan_features

TILED = ImageView(
    size_px=56,
    patch_px=14,
    pool=(2, 2),
    crop_mode="overlap-and-resize-c2",
    max_crops=4,
    margin_patches=(0, 0),
)
SEQUENCE = 256


class Tower(torch.nn.Module):
    """Features of patches of 14 px, another for each seed: [N, 3, S, S] to [N, tokens, 6]."""

    def __init__(self, seed=0, *, fail_at=None):
        super().__init__()
        self._fail_at = fail_at
        made = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(6, 3, 14, 14, generator=made) / 24)
        self._num_calls = 0

    def forward(self, pixel_values):
        if self._num_calls == self._fail_at:
            raise KeyboardInterrupt
        self._num_calls += 1
        cells = torch.nn.functional.conv2d(pixel_values, self.weight, stride=14)
        return cells.flatten(2).transpose(1, 2)


class Merged(torch.nn.Module):
    """A row for each four patches, as Qwen2-VL's tower gives; the sum needs all of a picture."""

    def forward(self, patches, grid_thw):
        assert grid_thw.prod(dim=1).sum() == len(patches)
        return patches[:, :5].unflatten(0, (-1, 4)).sum(1)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def source(tiny_sample, write_dataset, tmp_path_factory):
    """Samples of no, one and two pictures of several sizes, in two shards."""
    folder = tmp_path_factory.mktemp("features")
    sizes = ((56, 56), (112, 56), (40, 150))
    samples = [tiny_sample(i, num_images=i % 3, size=sizes[i % 2 + i // 6]) for i in range(10)]
    url = write_dataset(folder / "src", samples, num_shards=2, several=True, view=TILED)
    manifest = require_manifest(url)
    manifest = replace(manifest, recipe={**manifest.recipe, "several_images": True})
    (folder / "src" / "manifest.json").write_bytes(manifest.encode())
    return url


def make(src, dst, *, tower=None, seed=0, tokens="all", layer=None, **settings):
    """Makes a dataset of features and returns its URL."""
    settings = {"normalize": "siglip", "dtype": "float32", **settings}
    given = FeatureSettings(src=str(src), dst=str(dst), backbone="Tower", **settings)
    backbone = Backbone(tower or Tower(seed), name="Tower", tokens=tokens, layer=layer)
    return make_features(plan_features(given, Quiet(), backbone=backbone), Quiet())


@pytest.fixture(scope="module")
def stored(source, tmp_path_factory):
    """The features of the source: a URL by type."""
    folder = tmp_path_factory.mktemp("stored")
    found = {}

    def get(dtype):
        if dtype not in found:
            make(source, folder / dtype, dtype=dtype)
            found[dtype] = str(folder / dtype)
        return found[dtype]

    return get


def test_parts_of_features_are_the_dataset_of_one_process(source, stored, tmp_path):
    """The last part to end completes it; one that never began is named."""
    more = {"own_disk": "allow"}
    first = make(source, tmp_path / "out", part=Part(index=1, count=2), **more)
    assert (first.num_shards, first.missing_shards) == (1, 1)
    found = read_status(str(tmp_path / "out"))
    (status,) = found.jobs
    assert found.state == "stopped"
    assert [(each.life, each.shards_done) for each in status.parts] == [("absent", 0), ("ended", 1)]
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert make(source, tmp_path / "out", part=Part(index=0, count=2), **more).fresh
    assert not make(source, tmp_path / "out", part=Part(index=1, count=2), **more).fresh
    want = Path(stored("float32"))
    names = {path.relative_to(want) for path in want.rglob("*") if path.is_file()}
    got = {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert got == names
    assert all((want / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in got)


def open_pictures(source, **options):
    return StreamingDataset(source, seed=3, view=View(image=TILED, normalize="siglip"), **options)


def batches(dataset, count=3, **options):
    options = {"global_batch_size": 4, "sequence_length": SEQUENCE, **options}
    loader = make_dataloader(dataset, decode_threads=0, **options)
    return [dict(batch) for batch in itertools.islice(loader, count)]


def shown(batch, tower):
    """What a tower makes of the pictures of a batch, one picture at a time."""
    want = torch.zeros((*batch["images"].shape[:2], 16, 6))
    for row, told in enumerate(batch["metadata"]):
        done = 0
        for picture in [each for one in told.get("examples", [told]) for each in one["images"]]:
            stop = done + picture["crops"]
            want[row, done:stop] = tower(batch["images"][row, done:stop].contiguous()).detach()
            done = stop
    return want


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == theirs[name].dtype, name
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name]


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"min_images": 9, "pad_side": "left"}])
def test_a_batch_is_that_of_pictures_with_their_features(source, stored, options):
    url = stored("float32")
    pictures = batches(open_pictures(source), with_metadata=True, **options)
    with mock.patch("loader.assembly.pixels.decode_stored", side_effect=AssertionError):
        own = batches(StreamingDataset(url, seed=3), with_metadata=True, **options)
    for batch, other in zip(own, pictures, strict=True):
        assert torch.equal(batch.pop("image_features"), shown(other, Tower()))
        del other["images"]
        same(batch, other)


@pytest.mark.parametrize(
    "dtype, kind, error",
    [
        pytest.param("float16", torch.float16, 2e-3, marks=pytest.mark.slow),
        ("bfloat16", torch.bfloat16, 1.6e-2),
        ("int8", torch.float32, 2e-2),
    ],
)
def test_smaller_types_are_delivered_within_their_error(stored, dtype, kind, error):
    (want,) = batches(StreamingDataset(stored("float32"), seed=3), 1)
    (got,) = batches(StreamingDataset(stored(dtype), seed=3), 1)
    assert got["image_features"].dtype == kind
    difference = got["image_features"].float() - want["image_features"]
    assert 0 < difference.abs().max() < error


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_finished_examples_collate_to_the_same_batch(stored, dtype):
    dataset = StreamingDataset(stored(dtype), seed=3)
    (want,) = batches(dataset, 1)
    (mapped,) = batches(
        StreamingDataset(stored(dtype), seed=3), 1, map=lambda example, rng: example
    )
    same(mapped, want)
    collate = view_collator(dataset.view, sequence_length=SEQUENCE)
    plain = StreamingDataset(stored(dtype), seed=3, batch_size=4, view=dataset.view)
    same(next(iter(torch.utils.data.DataLoader(plain, batch_size=4, collate_fn=collate))), want)


@pytest.mark.slow
def test_worker_processes_deliver_the_same(stored):
    want = batches(StreamingDataset(stored("bfloat16"), seed=3))
    dataset = StreamingDataset(stored("bfloat16"), seed=3)
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=SEQUENCE, workers=1)
    for batch, other in zip(loader, want, strict=False):
        same(dict(batch), other)


@pytest.mark.parametrize("pack", [False, True])
def test_ranks_and_resumes_see_one_order(stored, pack):
    def open_rank(rank=0, world_size=1):
        dataset = StreamingDataset(
            stored("int8"), seed=3, rank=rank, world_size=world_size, canonical_ranks=2
        )
        limits = {"max_crops": 10} if pack else {"max_images": 10}
        return make_dataloader(
            dataset,
            global_batch_size=2 if pack else 4,
            sequence_length=SEQUENCE,
            pad_mode="max_len",
            min_images=10,
            pack=pack,
            decode_threads=0,
            **limits,
        )

    want = [batch["image_features"] for batch in itertools.islice(open_rank(), 2)]
    halves = [next(iter(open_rank(rank, 2)))["image_features"] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), want[0])
    first = open_rank()
    next(iter(first))
    second = open_rank()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert torch.equal(next(iter(second))["image_features"], want[1])


@pytest.fixture(scope="module")
def family_source(tiny_sample, write_dataset, tmp_path_factory):
    """Samples of one picture each for a model of Qwen2-VL's family, of several sizes."""
    folder, samples = tmp_path_factory.mktemp("family"), []
    for i, size in enumerate(((56, 56), (112, 56), (40, 150), (84, 84))):
        sample = tiny_sample(i, size=size)
        tokens = np.concatenate([sample.tokens, [128]]).astype("<i4")  # the picture's placeholder
        spans = sample.spans.copy()
        spans[0, 3:5] = len(tokens) - 1, len(tokens)
        samples.append(replace(sample, tokens=tokens, spans=spans[[0, -1]]))
    url = write_dataset(folder / "src", samples, num_shards=2)
    manifest = require_manifest(url)
    model = StoredModel(family=Qwen2VL(), symbols={"<|image_pad|>": (120,)}, placeholder=128)
    manifest = replace(manifest, recipe={**manifest.recipe, "model": model.to_dict()})
    (folder / "src" / "manifest.json").write_bytes(manifest.encode())
    return url


def test_a_family_delivers_the_rows_of_its_pictures(family_source, tmp_path):
    check_family(family_source, tmp_path / "out", packs=(False,))


@pytest.mark.slow
def test_samples_of_several_pictures_deliver_the_rows_of_all(datasets, tmp_path):  # noqa: F811
    check_family(datasets / "qwen2_vl", tmp_path / "out", packs=(False, True))


def check_family(src, out, *, packs):
    make(src, out, tower=Merged(), normalize=None)
    options = {"sequence_length": 512, "with_metadata": True}
    for pack in packs:
        pictures = batches(StreamingDataset(src, seed=3), 2, pack=pack, **options)
        own = batches(StreamingDataset(out, seed=3), 2, pack=pack, **options)
        for batch, other in zip(own, pictures, strict=True):
            if "pixel_values" in other:
                grids = other["image_grid_thw"]
                want = Merged()(other.pop("pixel_values"), grids)
                assert torch.equal(batch.pop("image_features"), want)
            same(batch, other)
    example = StreamingDataset(out, seed=3).example(0)
    assert example["image_features"].shape == (example["image_grid_thw"].prod(1).sum() // 4, 5)
    mapped = batches(StreamingDataset(out, seed=3), 1, map=lambda e, rng: e, **options)
    same(mapped[0], batches(StreamingDataset(out, seed=3), 1, **options)[0])


# --- the job


def listed(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_interrupted_job_resumes_to_the_same_bytes(source, tmp_path):
    make(source, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        make(source, tmp_path / "cut", tower=Tower(fail_at=9))
    receipts = list((tmp_path / "cut" / "receipts").iterdir())
    assert len(receipts) == 1
    assert not (tmp_path / "cut" / "manifest.json").exists()
    done = make(source, tmp_path / "cut")
    assert (done.made_shards, done.fresh) == (1, True)
    assert listed(tmp_path / "cut") == listed(tmp_path / "whole")
    again = make(source, tmp_path / "cut")
    assert (again.made_shards, again.fresh, again.sha256) == (0, False, done.sha256)
    for other in ({"dtype": "int8"}, {"seed": 1}, {"normalize": "openai"}):
        with pytest.raises(ConflictError) as raised:
            make(source, tmp_path / "cut", **other)
        assert raised.value.reason == "job_conflict"


@pytest.mark.slow
def test_features_of_one_backbone_are_mixed(stored, tmp_path, tiny_sample, write_dataset):
    other = write_dataset(tmp_path / "src", [tiny_sample(1)], name="other", view=TILED)
    make(other, tmp_path / "out", batch=2)
    parts = [StreamingDataset(url) for url in (stored("float32"), tmp_path / "out")]
    assert "image_features" in batches(IterableDatasetMixture(parts, seed=3), 1)[0]


def test_several_pictures_a_call_give_the_same_rows(source, stored, tmp_path):
    tower = Tower()
    make(source, tmp_path / "out", tower=tower, batch=4)
    want = batches(StreamingDataset(stored("float32"), seed=3))
    for batch, other in zip(batches(StreamingDataset(tmp_path / "out", seed=3)), want, strict=True):
        assert torch.allclose(batch["image_features"], other["image_features"], atol=1e-6)
    assert tower._num_calls < 9


@pytest.mark.slow
def test_dataset_of_features_is_verified_resharded_and_annotated(stored, tmp_path):
    url = stored("int8")
    found = verify(url, Quiet(), deep=True)
    assert [error.reason for error in found] == ["tokenizer_file"]  # the source has none
    want = batches(StreamingDataset(url, seed=3))
    settings = ReshardSettings(sources=(url,), out=str(tmp_path / "view"), num_shards=3)
    reshard(plan_reshard(settings, Quiet()), Quiet())
    keys = [f"sample-{i:04d}" for i in range(10)]
    lines = [json.dumps({"key": key, "score": i}) for i, key in enumerate(keys)]
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    given = AnnotateSettings(
        src=str(tmp_path / "view"),
        dst=str(tmp_path / "scored"),
        columns=str(tmp_path / "scores.jsonl"),
    )
    annotate(plan_annotation(given, Quiet()), Quiet())
    for name in ("view", "scored"):
        for batch, other in zip(
            batches(StreamingDataset(tmp_path / name, seed=3)), want, strict=True
        ):
            same(batch, other)


@pytest.mark.slow
def test_added_columns_and_views_of_a_source_are_kept(source, tmp_path):
    lines = [json.dumps({"key": f"sample-{i:04d}", "score": i}) for i in range(10)]
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    given = AnnotateSettings(
        src=source, dst=str(tmp_path / "scored"), columns=str(tmp_path / "scores.jsonl")
    )
    annotate(plan_annotation(given, Quiet()), Quiet())
    make(tmp_path / "scored", tmp_path / "out")
    dataset = StreamingDataset(tmp_path / "out", seed=3, where="score >= 4")
    assert dataset.num_samples == 6
    (batch,) = batches(dataset, 1, columns=("score",), with_metadata=True)
    told = [int(each["key"][-4:]) for each in batch["metadata"]]
    assert batch["column_score"].tolist() == told


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_changed_byte_is_never_delivered(stored, tmp_path, at):
    shutil.copytree(stored("int8"), tmp_path / "out")
    (path, *_) = sorted((tmp_path / "out" / "train").glob("*.tar"))
    payload = bytearray(path.read_bytes())
    payload[int(len(payload) * at)] ^= 1
    path.write_bytes(payload)
    with pytest.raises(ShardError) as raised:
        batches(StreamingDataset(tmp_path / "out", seed=3))
    assert raised.value.reason == "sample_crc"


# --- what is refused


def refused(reason, call, *args, **options):
    with pytest.raises(ConfigError) as raised:
        call(*args, **options)
    assert raised.value.reason == reason, raised.value
    return str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"image": TILED, "augment": Augment.standard()},
        {"image": TILED, "augment": lambda image, rng: image},
        {"image": TILED, "normalize": "openai"},
        {"image": TILED, "resample": "bilinear"},
        {"image": TILED, "pixels": "patches"},
        {"image": TILED, "high_res": TILED, "high_res_probability": 0.5},
        {"image": ImageView(size_px=56, patch_px=14)},
        {},
    ],
)
def test_view_of_other_pictures_is_refused(stored, fields):
    told = refused("features_view", StreamingDataset, stored("float32"), view=View(**fields))
    wrong = next((name for name in reversed(fields) if name != "high_res_probability"), "image")
    assert f"{wrong}=" in told or wrong in told


def test_views_that_fit_are_taken(stored):
    features = StreamingDataset(stored("float32")).view.features
    for view in (
        View(image=TILED),
        View(image=TILED, normalize="siglip", image_map="pooling", loss="flat"),
        View(features=features),
        View(image=TILED, features=features, purpose="inference"),
        View(image=TILED, max_images=1, sequence_length=SEQUENCE),
    ):
        dataset = StreamingDataset(stored("float32"), view=view)
        assert dataset.view.features == features
        assert (dataset.view.image, dataset.view.normalize) == (TILED, "siglip")


def test_features_of_another_backbone_are_refused(
    source, stored, tmp_path, tiny_sample, write_dataset
):
    other = write_dataset(tmp_path / "src", [tiny_sample(1)], name="other", view=TILED)
    make(other, tmp_path / "out", seed=1)
    others = StreamingDataset(tmp_path / "out").view.features
    told = refused("features_view", StreamingDataset, stored("float32"), view=View(features=others))
    assert "fingerprint" in told
    refused("features_view", StreamingDataset, source, view=View(image=TILED, features=others))
    parts = [StreamingDataset(url) for url in (stored("float32"), tmp_path / "out")]
    with pytest.raises(ConfigError) as raised:
        IterableDatasetMixture(parts, seed=3)
    assert raised.value.reason == "mixture_view"
    assert "fingerprint" in str(raised.value)
    for tower in (Tower(), Backbone(Tower())):
        check_backbone(stored("float32"), tower)
        assert "Tower" in refused("features_view", check_backbone, str(tmp_path / "out"), tower)
    refused("features_view", check_backbone, source, Tower())
    reader = StreamingDataset(source, view=View(image=TILED)).reader
    ids = StreamingDataset(source, view=View(image=TILED)).ids
    sample, rng = reader.read(1), np.random.RandomState(0)
    refused("features_view", assemble, sample, rng, view=View(features=others), ids=ids)


def test_datasets_without_plain_pictures_are_refused(source, stored, tmp_path, family_source):
    for src in (stored("int8"), family_source):  # again; NORMALIZE for a model
        refused("features_dataset", make, src, tmp_path / "out")
    refused("features_dataset", make, source, tmp_path / "out", backend="pil")
    with mock.patch.object(Tower, "config", {}, create=True):
        refused("features_backbone", make, source, tmp_path / "out", normalize=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pictures_that_go_through_a_processor_are_refused(datasets, tmp_path):  # noqa: F811
    refused("features_dataset", make, datasets / "aya_vision", tmp_path / "out", normalize=None)


class Odd(torch.nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, pixel_values):
        return self.result(pixel_values)


@pytest.mark.parametrize(
    "result, options",
    [
        (lambda x: x, {}),
        (lambda x: x.flatten(1).mean(), {}),
        (lambda x: x.new_zeros((5, 2))[: len(x) * 3 // 2 + 1], {"batch": 2}),
        (lambda x: "text", {}),
        (lambda x: x.flatten(1), {"tokens": "patches"}),
        (lambda x: x.flatten(2), {"layer": -2}),
        (lambda x: x.flatten(2).repeat(2, 1, 1), {}),
        (lambda x: x.flatten(2)[..., : 4 + len(x)], {}),
        (lambda x: x.flatten(2)[:: 1 + (len(x) == 2)], {}),
    ],
)
def test_results_that_are_no_rows_of_features_are_refused(source, tmp_path, result, options):
    refused("features_backbone", make, source, tmp_path / "out", tower=Odd(result), **options)


def test_values_that_cannot_be_stored_end_the_job(source, tmp_path):
    with pytest.raises(SampleError) as raised:
        make(source, tmp_path / "out", tower=Odd(lambda x: x.flatten(2) / 0), dtype="float16")
    assert raised.value.reason == "features_value"
    assert not (tmp_path / "out" / "manifest.json").exists()


MODULE = """
import torch
class Made(torch.nn.Module):
    def forward(self, pixel_values):
        return pixel_values.flatten(2)[..., :6]
made = Made()
number = 3
"""


def test_features_made_on_a_cluster_are_those_of_one_machine(source, tmp_path):
    module = tmp_path / "towers.py"
    module.write_text(MODULE)

    def planned(name, **more):
        settings = FeatureSettings(
            src=str(source),
            dst=str(tmp_path / name),
            backbone=f"{module}:made",
            normalize="siglip",
            **more,
        )
        return plan_features(settings, Quiet())

    make_features(planned("local"), Quiet())
    reporter = Quiet()
    with cluster(2) as sent:
        assert make_features(planned("ray", engine="ray"), reporter).made_shards == 2
    assert len(reporter.steps) == sum(task.shard.nsamples for task in sent)
    assert listed(tmp_path / "ray") == listed(tmp_path / "local")
    other = planned("other", engine="ray")
    module.write_text(MODULE.replace("Made()", "torch.nn.Sequential(Made())"))
    features._loaded.cache_clear()
    with cluster(2), pytest.raises(ConflictError, match="backbone") as caught:
        make_features(other, Quiet())
    assert caught.value.reason == "mixed_cluster"


def test_command_line_makes_features_of_a_module_by_path(source, tmp_path, capsys):
    (tmp_path / "towers.py").write_text(MODULE)
    command = ["features", source, "--normalize", "siglip", "--dst", str(tmp_path / "out")]
    for name in ("made", "Made"):
        assert main([*command, "--backbone", f"{tmp_path}/towers.py:{name}"]) == 0
    told = capsys.readouterr().out
    assert "float16 [3, 6]" in told
    assert "nothing to do" in told
    variables = [f"BACKBONE={tmp_path}/towers.py:made", f"SRC={source}", "NORMALIZE=siglip"]
    assert main(["make", "features", *variables, f"DST={tmp_path / 'out'}"]) == 0
    for name in ("number", "missing", "os:getcwd", "no.such.module:x"):
        source_of = name if ":" in name else f"{tmp_path}/towers.py:{name}"
        assert main([*command, "--backbone", source_of]) == 1


@pytest.mark.slow
def test_folders_without_a_model_or_its_weights_are_refused(folders, tmp_path):  # noqa: F811
    refused("features_backbone", load_backbone, str(tmp_path))
    model = model_folders.model("llava", folders / "llava")
    weights = model.state_dict()
    model.save_pretrained(tmp_path / "whole")
    gone = next(name for name in weights if "vision_tower" in name and name.endswith("bias"))
    kept = {name: value for name, value in weights.items() if name != gone}
    model.save_pretrained(tmp_path / "part", state_dict=kept)
    assert load_backbone(str(tmp_path / "whole")).fingerprint
    assert "weights" in refused("features_backbone", load_backbone, str(tmp_path / "part"))


# --- models of transformers


def tower_of(model):
    names = ("visual", "vision_tower", "vision_model")
    return next(getattr(model.model, each) for each in names if hasattr(model.model, each))


@pytest.mark.slow
@pytest.mark.parametrize("name", model_folders.WRITERS)
def test_models_get_the_features_of_their_towers(datasets, folders, tmp_path, name):  # noqa: F811
    model = model_folders.model(name, folders / name).eval()
    model.save_pretrained(tmp_path / "model")
    given = FeatureSettings(
        src=str(datasets / name),
        dst=str(tmp_path / "out"),
        backbone=str(tmp_path / "model"),
        dtype="float32",
    )
    plan = plan_features(given, Quiet())
    make_features(plan, Quiet())
    check_backbone(str(tmp_path / "out"), load_backbone(str(tmp_path / "model")))
    assert plan.backbone.fingerprint == Backbone(tower_of(model)).fingerprint
    options = {"sequence_length": 512, "global_batch_size": 8, "with_metadata": True}
    for pack in (False, name != "gemma3"):
        (pictures,) = batches(StreamingDataset(datasets / name, seed=3), 1, pack=pack, **options)
        (own,) = batches(StreamingDataset(tmp_path / "out", seed=3), 1, pack=pack, **options)
        features, pixels = own.pop("image_features"), pictures.pop("pixel_values")
        same(own, pictures)
        further = {}
        if name == "qwen2_vl":
            further["grid_thw"] = own["image_grid_thw"]
        elif name == "pixtral":
            further["image_sizes"] = own["image_sizes"]
        pixels = pixels[0] if name in ("idefics3", "smolvlm") else pixels
        want = plan.backbone.features(pixels, **further)
        want = want[0] if name == "pixtral" else want
        assert features.shape == want.shape
        assert torch.allclose(features, want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_vl"])
def test_stored_features_replace_the_pictures_of_a_model(datasets, folders, tmp_path, name):  # noqa: F811
    model = model_folders.model(name, folders / name).eval()
    config = model.config
    backbone = Backbone(
        tower_of(model),
        layer=config.vision_feature_layer if name == "llava" else None,
        tokens="all" if name == "qwen2_vl" else "patches",
    )
    given = FeatureSettings(
        src=str(datasets / name), dst=str(tmp_path / "out"), backbone="x", dtype="float32"
    )
    make_features(plan_features(given, Quiet(), backbone=backbone), Quiet())
    options = {"sequence_length": 512, "global_batch_size": 8}
    (pictures,) = batches(StreamingDataset(datasets / name, seed=3), 1, **options)
    (own,) = batches(StreamingDataset(tmp_path / "out", seed=3), 1, **options)
    features = own.pop("image_features")
    with torch.no_grad():
        if name == "internvl":
            side = int(features.shape[1] ** 0.5)
            cells = features.reshape(len(features), side, side, -1)
            cells = model.model.pixel_shuffle(cells, scale_factor=config.downsample_ratio)
            features = model.model.multi_modal_projector(
                cells.reshape(len(features), -1, cells.shape[-1])
            )
        elif name == "llava":
            features = model.model.multi_modal_projector(features)
        embedded = model.get_input_embeddings()(own["input_ids"])
        places = own["input_ids"] == config.image_token_id
        embedded[places] = features.reshape(-1, features.shape[-1])
        want = model(**pictures).loss
        further = {n: v for n, v in own.items() if n != "input_ids"}
        if name == "qwen2_vl":
            further["position_ids"], _ = model.model.get_rope_index(
                own["input_ids"],
                mm_token_type_ids=own["mm_token_type_ids"],
                image_grid_thw=own["image_grid_thw"],
                attention_mask=own["attention_mask"],
            )
            del further["image_grid_thw"], further["mm_token_type_ids"]
        got = model(inputs_embeds=embedded, **further).loss
    assert torch.allclose(got, want, atol=1e-5)


def test_a_dataset_says_whose_features_it_has(stored):
    document = require_manifest(stored("int8")).recipe["features"]
    assert StoredFeatures.from_dict(document).row_shape == (16, 6)
    assert document["image"] == TILED.to_dict()
    assert document["fingerprint"] == Backbone(Tower()).fingerprint
    assert np.dtype(np.float32) == StoredFeatures.from_dict(document).array_dtype


@pytest.mark.slow
def test_features_of_other_tiles_than_an_example_sees_are_refused(datasets, tmp_path):  # noqa: F811
    src = datasets / "llava_onevision"
    make(src, tmp_path / "out", tower=Tower(), normalize=None)
    view = View(purpose="evaluation")
    dataset, pictures = (
        StreamingDataset(url, seed=3, tail="pad", view=view) for url in (tmp_path / "out", src)
    )
    counts = dataset.reader.column("num_images", np.arange(len(dataset.reader))).tolist()
    several = counts.index(3)  # of one picture it would see more tiles than of three
    with pytest.raises(SampleError) as raised:
        dataset.example(several, question=0)
    assert raised.value.reason == "features_rows"
    for sample, question in ((several, 1), (counts.index(1), 0)):
        got = dataset.example(sample, question=question)["image_features"]
        pixels = pictures.example(sample, question=question)["pixel_values"]
        assert torch.equal(torch.from_numpy(got), Tower()(torch.from_numpy(pixels)))


@pytest.mark.slow
def test_features_are_made_from_store_to_store(s3_server, source, stored):
    bucket = s3_server.make_bucket()
    with mock.patch.dict(os.environ, s3_server.env):
        for path in sorted(Path(source).rglob("*.*")):
            name = path.relative_to(source).as_posix()
            storage.publish_bytes(f"{bucket}/src/{name}", path.read_bytes())
        make(f"{bucket}/src", f"{bucket}/out")
        assert not make(f"{bucket}/src", f"{bucket}/out").fresh
        got = batches(StreamingDataset(f"{bucket}/out", seed=3))
    for batch, other in zip(got, batches(StreamingDataset(stored("float32"), seed=3)), strict=True):
        same(batch, other)
