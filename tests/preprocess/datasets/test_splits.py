"""Which files make which split: usual layouts, beside the answer of the `datasets` library."""

from pathlib import Path

import pytest

from preprocess.datasets.splits import folder_layout
from shardspec.errors import SourceError

TRAIN, VAL, TEST = "train", "validation", "test"

# Files, our answer, and what `datasets` says where it is another: None for the same, a text for why
# ours differs. A name in UNMATCHED is refused.
LAYOUTS = {
    "one file": ({"part.parquet": TRAIN}, None),
    "no split anywhere": ({"a/0.parquet": TRAIN, "b/1.parquet": TRAIN}, None),
    "hub, at the top": (
        {"train-00000-of-00001.parquet": TRAIN, "validation-00000-of-00001.parquet": VAL},
        None,
    ),
    "hub, in data": (
        {
            "data/train-00000-of-00002.parquet": TRAIN,
            "data/train-00001-of-00002.parquet": TRAIN,
            "data/test-00000-of-00001.parquet": TEST,
        },
        None,
    ),
    "hub, more than 99,999 files": (
        {
            "data/odd-099999-of-100001.parquet": "odd",
            "data/odd-100000-of-100001.parquet": "odd",
        },
        "it knows numbers of five digits only",
    ),
    "hub, splits of other names": (
        {
            "data/train_sft-00000-of-00001.parquet": "train_sft",
            "data/train_gen-00000-of-00001.parquet": "train_gen",
            "data/test_sft-00000-of-00001.parquet": "test_sft",
        },
        None,
    ),
    "hub, converted": (
        {"default/train/0000.parquet": TRAIN, "default/validation/0000.parquet": VAL},
        None,
    ),
    "hub, converted in part": (
        {"default/partial-train/0000.parquet": TRAIN, "default/partial-test/0000.parquet": TEST},
        None,
    ),
    "folders": (
        {"train/0.parquet": TRAIN, "validation/0.parquet": VAL, "test/0.parquet": TEST},
        None,
    ),
    "folders with short names": ({"train/0.parquet": TRAIN, "val/0.parquet": VAL}, None),
    "dev": ({"train/0.parquet": TRAIN, "dev/0.parquet": VAL}, None),
    "eval": ({"train/0.parquet": TRAIN, "eval/0.parquet": TEST}, None),
    "long forms": ({"training/0.parquet": TRAIN, "evaluation/0.parquet": TEST}, None),
    "valid and testing": (
        {"training/0.parquet": TRAIN, "valid/0.parquet": VAL, "testing/0.parquet": TEST},
        None,
    ),
    "underscores": ({"train_0001.parquet": TRAIN, "val_0001.parquet": VAL}, None),
    "dots": ({"set.train.parquet": TRAIN, "set.dev.parquet": VAL}, None),
    "spaces": ({"my train 1.parquet": TRAIN, "my test 1.parquet": TEST}, None),
    "only the split": ({"train.parquet": TRAIN, "eval.parquet": TEST}, None),
    "name in front": ({"pixmo-cap_train.parquet": TRAIN, "pixmo-cap_test.parquet": TEST}, None),
    "number in front": ({"0001_train.parquet": TRAIN, "0001_valid.parquet": VAL}, None),
    "number behind": ({"train2014/0.parquet": TRAIN, "val2014/0.parquet": VAL}, None),
    "folder of a name": ({"coco_train/0.parquet": TRAIN, "coco_val/0.parquet": VAL}, None),
    "deep": ({"a/b/train/c/0.parquet": TRAIN, "a/b/test/c/0.parquet": TEST}, None),
    "words that only contain one": (
        {"trainset.parquet": TRAIN, "latest.parquet": TRAIN, "devices.parquet": TRAIN},
        None,
    ),
    "hidden": (
        {"train/0.parquet": TRAIN, ".cache/test/0.parquet": "", "__old/val/0.parquet": ""},
        None,
    ),
    "validation only": ({"val/0.parquet": VAL}, None),
    "capitals": (
        {"Train/0.parquet": TRAIN, "Val/0.parquet": VAL},
        "takes both for train: it minds the case",
    ),
    "val in data": (
        {"data/train-00000-of-00001.parquet": TRAIN, "data/val-00000-of-00001.parquet": VAL},
        "calls the second split val",
    ),
    "pieces in data": (
        {"data/part-00000-of-00002.parquet": TRAIN, "data/part-00001-of-00002.parquet": TRAIN},
        "calls the split part",
    ),
    "folder and file": (
        {"train/0.parquet": TRAIN, "val.parquet": VAL},
        "drops the second file",
    ),
    "data and another folder": (
        {"data/train-00000-of-00001.parquet": TRAIN, "dev/0.parquet": VAL},
        "drops the second file",
    ),
    "a file besides": (
        {"train/0.parquet": TRAIN, "heldout/0.parquet": "UNMATCHED"},
        "drops the second file",
    ),
    "a file besides, at the top": (
        {"train_1.parquet": TRAIN, "extra.parquet": "UNMATCHED"},
        "drops the second file",
    ),
    "two splits in one name": (
        {"train_val.parquet": "UNMATCHED", "test.parquet": TEST},
        "has the first file in both train and validation",
    ),
    "folder against file": (
        {"train/val_1.parquet": "UNMATCHED"},
        "goes by the folder",
    ),
    "file against folder": (
        {"my_test/train-0.parquet": "UNMATCHED"},
        "goes by the folder: test",
    ),
}


def write(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def of_datasets(folder):
    """What `datasets` makes of a folder: the files of each split."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    patterns = get_data_patterns(str(folder))
    found = DataFilesDict.from_patterns(
        patterns, base_path=str(folder), allowed_extensions=[".parquet", ".arrow"]
    )
    return {
        str(split): sorted(Path(file).relative_to(folder.resolve()).as_posix() for file in files)
        for split, files in found.items()
        if files
    }


def by_split(want):
    found = {}
    for name, split in sorted(want.items()):
        if split not in ("", "UNMATCHED"):
            found.setdefault(split, []).append(name)
    return found


@pytest.mark.parametrize("case", LAYOUTS)
def test_layout_gives_the_splits_that_people_mean(tmp_path, case):
    want, differs = LAYOUTS[case]
    write(tmp_path, want)
    layout = folder_layout(str(tmp_path))
    assert {split: list(files) for split, files in layout.splits.items()} == by_split(want)
    assert sorted(layout.unmatched) == sorted(n for n, s in want.items() if s == "UNMATCHED")
    theirs = of_datasets(tmp_path)
    same = theirs == by_split(want) and not layout.unmatched
    assert same == (differs is None)


def test_the_table_is_as_long_as_it_should_be():
    assert len(LAYOUTS) >= 25


@pytest.mark.parametrize("case", [c for c in LAYOUTS if "UNMATCHED" in LAYOUTS[c][0].values()])
def test_files_that_no_rule_explains_are_refused_taken_or_skipped(tmp_path, case):
    want = LAYOUTS[case][0]
    write(tmp_path, want)
    layout = folder_layout(str(tmp_path))
    lost = sorted(name for name, split in want.items() if split == "UNMATCHED")
    with pytest.raises(SourceError) as caught:
        layout.files("train", unmatched="refuse", where="here")
    assert caught.value.reason == "source_split"
    assert lost[0] in str(caught.value)
    train = by_split(want).get("train", [])
    assert layout.files("train", unmatched="take", where="") == sorted(train + lost)
    if train:
        assert layout.files("train", unmatched="skip", where="") == train


def test_take_builds_files_without_a_split_as_any_split(tmp_path):
    write(tmp_path, ["a.parquet"])
    with pytest.raises(SourceError) as caught:
        folder_layout(str(tmp_path)).files("validation", unmatched="refuse", where="")
    assert (caught.value.reason, caught.value.facts["splits"]) == ("source_split", ["train"])
    layout = folder_layout(str(tmp_path), unmatched="take")
    assert layout.files("validation", unmatched="take", where="") == ["a.parquet"]


def test_caches_beside_the_files_of_save_to_disk_are_not_rows(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    splits = {name: datasets.Dataset.from_dict({"a": [1, 2]}) for name in ("train", "odd_rows")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    write(tmp_path / "data", ["train/cache-0123.arrow"])
    layout = folder_layout(str(tmp_path / "data"))
    assert layout.splits == {
        "train": ["train/data-00000-of-00001.arrow"],
        "odd_rows": ["odd_rows/data-00000-of-00001.arrow"],
    }
    assert layout.configured_by == ["dataset_dict.json"]


README = {
    "by split": (
        "- config_name: default\n  data_files:\n  - split: train\n"
        "    path: [a.parquet, b.parquet]\n"
        "  - split: dev\n    path: c*.parquet\n",
        {"train": ["a.parquet", "b.parquet"], "validation": ["c.parquet"]},
    ),
    "brackets": (
        "- config_name: only\n  data_files:\n  - split: train\n    path: '[ab].parquet'\n"
        "  - split: test\n    path: c.parquet\n",
        {"train": ["a.parquet", "b.parquet"], "test": ["c.parquet"]},
    ),
    "one pattern": (
        "- config_name: only\n  data_files: '**/*.parquet'\n",
        {"train": ["a.parquet", "b.parquet", "c.parquet"]},
    ),
    "default among several": (
        "- config_name: other\n  data_files: c.parquet\n"
        "- config_name: default\n  data_files: ['a.parquet', 'b.parquet']\n",
        {"train": ["a.parquet", "b.parquet"]},
    ),
}


@pytest.mark.parametrize("case", README)
def test_splits_that_a_readme_configures_are_followed(tmp_path, case):
    import datasets

    datasets.disable_progress_bars()
    configs, want = README[case]
    for name in "abc":
        datasets.Dataset.from_dict({"name": [name]}).to_parquet(tmp_path / f"{name}.parquet")
    (tmp_path / "README.md").write_text(f"---\nlicense: odc-by\nconfigs:\n{configs}---\n# Data\n")
    layout = folder_layout(str(tmp_path))
    assert layout.splits == want
    assert (dict(layout.unmatched), layout.configured_by) == ({}, ["README.md"])
    theirs = datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / ".cache"))
    names = {"dev": "validation"}
    assert {names.get(split, split): rows["name"] for split, rows in theirs.items()} == {
        split: [file.removesuffix(".parquet") for file in files] for split, files in want.items()
    }


@pytest.mark.parametrize(
    "configs, says",
    [
        (
            "- config_name: a\n  data_files: a.parquet\n"
            "- config_name: b\n  data_files: b.parquet\n",
            "a, b",
        ),
        ("- config_name: a\n  data_files: [{'split': 'train'}]\n", "path"),
        ("- data_files: {train: a.parquet}\n", "README.md"),
        ("- [\n", "README.md"),
    ],
)
def test_readme_that_does_not_say_which_rows_is_refused(tmp_path, configs, says):
    write(tmp_path, ["a.parquet", "b.parquet"])
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with pytest.raises(SourceError) as caught:
        folder_layout(str(tmp_path))
    assert caught.value.reason == "source_split"
    assert says in str(caught.value)


def test_file_that_a_readme_forgets_is_unmatched(tmp_path):
    write(tmp_path, ["a.parquet", "b.parquet"])
    (tmp_path / "README.md").write_text("---\nconfigs:\n- data_files: a.parquet\n---\n")
    layout = folder_layout(str(tmp_path))
    assert layout.splits == {"train": ["a.parquet"]}
    assert layout.unmatched == {"b.parquet": "README.md does not configure it"}


def test_readme_without_front_matter_decides_nothing(tmp_path):
    write(tmp_path, ["a.parquet"])
    (tmp_path / "README.md").write_text("# configs: none\n")
    assert folder_layout(str(tmp_path)).splits == {"train": ["a.parquet"]}
