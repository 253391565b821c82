"""The public names. A name leaves this list, or joins it, on purpose."""

import importlib
import types
from pathlib import Path

import pytest

PUBLIC = {
    "shardspec": [
        "FORMAT_VERSION",
        "BudgetError",
        "ConfigError",
        "ConflictError",
        "FetchError",
        "FrameView",
        "Geometry",
        "ImageView",
        "Manifest",
        "ManifestError",
        "PreparedImage",
        "PreparedSample",
        "SampleError",
        "ShardError",
        "ShardsError",
        "SourceError",
        "StateError",
        "StorageError",
        "WorkerError",
        "load_manifest",
    ],
    "preprocess.datasets": [
        "VQA2",
        "AOkVqa",
        "Clip",
        "Dataset",
        "DatasetBase",
        "DocumentDataset",
        "DocumentPolicy",
        "Documents",
        "EpisodeDataset",
        "EpisodeFiles",
        "EpisodeFrame",
        "HfDataset",
        "ImageSource",
        "LeRobot",
        "OwnDataset",
        "PageImage",
        "PixMoAskModelAnything",
        "PixMoCap",
        "PixMoCapQa",
        "PixMoCount",
        "PixMoMultiImageQa",
        "PixMoPointExplanations",
        "PixMoPoints",
        "RemoteImage",
        "RobotDataset",
        "SceneImage",
        "SceneVideo",
        "TextSft",
        "VideoSource",
        "dataset_class",
        "dataset_names",
        "example_clips",
        "example_images",
        "example_subtitles",
        "example_videos",
        "get_dataset",
        "is_own",
    ],
    "loader": [
        "Augment",
        "ClipLimits",
        "DeterministicDataset",
        "DevicePrefetcher",
        "IterableDatasetMixture",
        "MMCollator",
        "ModelPreprocessor",
        "ModelView",
        "MolmoPreprocessor",
        "Network",
        "Order",
        "OrderConfig",
        "RawDataset",
        "RawSample",
        "RetryPolicy",
        "SampleRef",
        "Stats",
        "StreamLoader",
        "StreamingDataset",
        "VideoPreprocessor",
        "View",
        "assemble",
        "group_by",
        "make_dataloader",
        "model_view",
        "plan_order",
        "view_collator",
    ],
    "loader.evaluation": [
        "METRICS",
        "Metric",
        "Score",
        "gather_results",
        "load_results",
        "metric_of",
        "questions_of",
        "read_table",
        "references",
        "result_table",
        "results_of",
        "save_results",
        "score_results",
        "write_table",
    ],
    "loader.features": [
        "Backbone",
        "FeatureCache",
        "Shown",
        "check_backbone",
        "extract",
        "load_backbone",
        "show_pictures",
    ],
    "loader.integrations": [
        *("DistributedState", "SteadyPasses", "attach_to_trainer", "check_model", "hf"),
    ],
    "loader.monitoring": ["Fanout", "JsonLines", "Prometheus", "TensorBoard", "WandB"],
    "vlm_shards": [
        "VQA2",
        "AOkVqa",
        "Augment",
        "DataFormatter",
        "Dataset",
        "DatasetBase",
        "DeterministicDataset",
        "DocumentDataset",
        "DocumentPolicy",
        "HfDataset",
        "ImagePreprocessor",
        "InterleavedTextPreprocessor",
        "IterableDatasetMixture",
        "MMCollator",
        "MolmoPreprocessor",
        "PipelineConfig",
        "PixMoAskModelAnything",
        "PixMoCap",
        "PixMoCapQa",
        "PixMoCount",
        "PixMoMultiImageQa",
        "PixMoPointExplanations",
        "PixMoPoints",
        "RobotDataset",
        "StreamingDataset",
        "TextSft",
        "VideoPreprocessor",
        "View",
        "get_dataset",
        "make_dataloader",
    ],
}


def constants_classes_functions(name: str) -> tuple[int, str]:
    """Orders names as the import sorter does: constants, classes, functions."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_these(package):
    assert importlib.import_module(package).__all__ == PUBLIC[package]


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_sorted_and_single(package):
    names = importlib.import_module(package).__all__
    assert names == sorted(set(names), key=constants_classes_functions)


@pytest.mark.parametrize("package", PUBLIC)
def test_star_import_gives_exactly_the_public_names(package):
    namespace: dict[str, object] = {}
    exec(f"from {package} import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(PUBLIC[package])


@pytest.mark.parametrize("package", PUBLIC)
def test_nothing_of_ours_is_visible_beside_the_public_names(package):
    module = importlib.import_module(package)
    room = package.split(".")[0]
    visible = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType)
        and getattr(value, "__module__", room).split(".")[0] == room
    }
    assert visible <= set(PUBLIC[package])


@pytest.mark.parametrize(
    "package, name", [(package, name) for package, names in PUBLIC.items() for name in names]
)
def test_public_name_is_documented(package, name):
    value = getattr(importlib.import_module(package), name)
    if isinstance(value, type) or callable(value):
        assert (value.__doc__ or "").strip()
        assert not (value.__doc__ or "").startswith(f"{name}(")


MEMBERS = {
    "Augment": [
        *("brightness", "contrast", "crop_ratio", "crop_scale", "flip_probability", "hue"),
        *("resample", "saturation", "standard"),
    ],
    "ClipLimits": ["memory_bytes", "processes", "time_limit_s"],
    "DeterministicDataset": ["epoch", "example", "get", "preload", "set_epoch"],
    "DevicePrefetcher": ["load_state_dict", "state_dict"],
    "IterableDatasetMixture": [
        *("epoch", "fingerprint", "ids", "load_state_dict", "set_epoch", "set_step"),
        *("state_dict", "view"),
    ],
    "MMCollator": ["collate"],
    "ModelPreprocessor": [],
    "ModelView": ["backend", "family"],
    "MolmoPreprocessor": ["questions"],
    "Network": [
        *("ahead_bytes", "ahead_steps", "block_bytes", "cold_steps", "requests", "retry"),
        *("stall_s", "streams"),
    ],
    "Order": [
        *("batch_at", "blocks", "changed", "continued", "describe", "epoch_start", "num_steps"),
        "slots",
    ],
    "OrderConfig": [
        *("active_blocks", "before", "block_size", "canonical_ranks", "canonical_workers"),
        *("first_epoch", "from_dict", "global_batch_size", "layout", "locality", "num_lanes"),
        *("num_samples", "owed", "ramp", "seed", "since", "steps_per_epoch", "tail", "to_dict"),
    ],
    "RawDataset": [
        *("epoch", "example", "fingerprint", "load_state_dict", "sample", "set_epoch"),
        *("set_step", "state_dict"),
    ],
    "RawSample": ["fields", "key", "real", "where"],
    "RetryPolicy": [
        "attempts",
        "first_wait_s",
        "idle_s",
        "limit_s",
        "longest_wait_s",
        "outage_s",
        "wall_s",
    ],
    "SampleRef": ["dataset", "epoch", "question", "real", "sample"],
    "Stats": [
        *("bottleneck", "busy_share", "counters", "line", "loss_tokens_per_s", "mean_ready"),
        *("padding_share", "plan_s", "ready", "samples_per_s", "since", "timings", "to_dict"),
        *("tokens_per_s", "use_s", "verdict", "wait_s", "wait_share", "worker_kind", "workers"),
    ],
    "StreamLoader": [
        *("change", "close", "epoch", "load_state_dict", "pass_is_exact", "places", "state_dict"),
        *("stats", "watch"),
    ],
    "StreamingDataset": [
        *("bad", "epoch", "example", "fingerprint", "load_state_dict", "set_epoch"),
        *("set_step", "state_dict"),
    ],
    "VideoPreprocessor": ["choose"],
    "View": [
        *("augment", "branch_order", "features", "frames", "high_res", "high_res_probability"),
        *("image", "image_map", "loss", "max_images", "model", "normalize", "pixels", "purpose"),
        *("questions", "reduced_decoding", "resample", "sequence_length", "shapes", "tree"),
        "weight",
    ],
}
"""Methods, properties and fields of the loader's public classes; what is inherited is not ours."""

ATTRIBUTES = {
    "DevicePrefetcher": ["device", "dtype", "loader", "normalization"],
    "IterableDatasetMixture": ["datasets", "num_samples"],
    "RawDataset": ["manifest", "num_samples", "reader"],
    "StreamLoader": ["bad_samples", "dataset", "step"],
    "StreamingDataset": ["ids", "manifest", "num_samples", "reader", "view"],
}
"""What objects of these classes have besides."""

MOST_MEMBERS = 9
"""Of a class that users drive; settings and totals have as many fields as there are."""


def own_members(kind: type) -> list[str]:
    """Lists the public names that a class has and its bases outside the project lack."""
    others = {
        name
        for base in kind.__mro__
        if base.__module__.split(".")[0] != "loader"
        for name in dir(base)
    }
    own = kind.__module__.split(".")[0] != "loader"
    return [n for n in dir(kind) if not n.startswith("_") and (own or n not in others)]


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_public_classes_are_these(name):
    assert own_members(getattr(importlib.import_module("loader"), name)) == MEMBERS[name]


def test_every_public_class_of_the_loader_is_listed():
    loader = importlib.import_module("loader")
    classes = [name for name in PUBLIC["loader"] if isinstance(getattr(loader, name), type)]
    assert classes == list(MEMBERS)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_classes_that_users_drive_have_few_members(name):
    assert len(MEMBERS[name]) <= MOST_MEMBERS


def test_attributes_of_objects_are_these(tiny_sample, write_dataset, tmp_path):
    import loader

    raw = Path(__file__).parent / "conformance" / "v2-raw" / "index"
    dataset = loader.StreamingDataset(write_dataset(tmp_path / "set", [tiny_sample(0)]))
    batches = loader.make_dataloader(dataset, global_batch_size=1, sequence_length=64)
    objects = [
        loader.DevicePrefetcher(batches, "cpu"),
        loader.IterableDatasetMixture([dataset], seed=1),
        loader.RawDataset(str(raw), decode=lambda sample, rng: sample.key),
        batches,
        dataset,
    ]
    found = {
        type(one).__name__: sorted(n for n in vars(one) if not n.startswith("_")) for one in objects
    }
    assert found == ATTRIBUTES
