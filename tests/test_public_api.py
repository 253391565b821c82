"""The public names. A name leaves this list, or joins it, on purpose."""

import importlib
import types

import pytest

PUBLIC = {
    "shardspec": [
        "FORMAT_VERSION",
        "BudgetError",
        "ConfigError",
        "ConflictError",
        "FetchError",
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
        "load_manifest",
    ],
    "preprocess.datasets": [
        "Dataset",
        "DatasetBase",
        "HfDataset",
        "ImageSource",
        "SceneImage",
        "dataset_class",
        "dataset_names",
        "example_images",
        "get_dataset",
    ],
    "loader": [
        "Augment",
        "DeterministicDataset",
        "IterableDatasetMixture",
        "MMCollator",
        "MolmoPreprocessor",
        "Network",
        "RawDataset",
        "RawSample",
        "RetryPolicy",
        "StreamLoader",
        "StreamingDataset",
        "View",
        "assemble",
        "make_dataloader",
        "view_collator",
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
