"""Datasets by name: what opens, what is refused, and a validation split that stays put."""

import numpy as np
import pytest
from PIL import Image

from preprocess.datasets import (
    Dataset,
    DatasetBase,
    HfDataset,
    SceneImage,
    dataset_class,
    dataset_names,
    get_dataset,
)
from preprocess.datasets.base import SAMPLE_ROWS, row_image
from preprocess.datasets.pixmo_cap import PixMoCap
from preprocess.datasets.rows import Rows
from shardspec.errors import ConfigError, SampleError, SourceError


class QuarterOut(PixMoCap):
    """PixMo-Cap with a validation share that small tables can show."""

    validation_share = 0.25


class OwnSplits(PixMoCap):
    """PixMo-Cap as if the source had splits of its own."""

    validation_share = 0.0


def rows(count):
    return [
        {
            "image_url": f"http://example.com/{i}.jpg",
            "caption": f"caption {i}",
            "transcripts": [f"transcript {i}"],
        }
        for i in range(count)
    ]


def urls(dataset):
    return [dataset[i]["metadata"]["image_url"] for i in range(len(dataset))]


@pytest.fixture
def folder(tmp_path, write_parquet):
    return str(write_parquet(tmp_path / "source", rows(400)))


# --- by name


def test_every_listed_dataset_is_a_named_class():
    assert "pixmo_cap" in dataset_names()
    for name in dataset_names():
        kind = dataset_class(name)
        assert issubclass(kind, DatasetBase)
        assert kind.name == name


@pytest.mark.parametrize("name", dataset_names())
def test_sample_rows_have_the_columns_that_real_rows_must_have(name):
    dataset = get_dataset(name, source="sample", limit=2)
    if isinstance(dataset, HfDataset):
        for column in dataset.COLUMNS:
            assert set(column.split("|")) & set(dataset.rows[0])
    assert dataset[0]["message_list"]


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(ConfigError) as caught:
        get_dataset("pixmo_cpa", source="sample")
    assert caught.value.reason == "unknown_dataset"
    assert "did you mean 'pixmo_cap'?" in caught.value.fix


@pytest.mark.parametrize("name", ["base", "own", "rows", "__init__", ""])
def test_modules_that_are_not_datasets_are_unknown(name):
    with pytest.raises(ConfigError) as caught:
        dataset_class(name)
    assert caught.value.reason == "unknown_dataset"


def test_unknown_mode_names_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        get_dataset("pixmo_cap", source="sample", mode="caption")
    assert caught.value.reason == "unknown_mode"
    assert caught.value.facts["modes"].split(", ") == list(PixMoCap.modes)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(SourceError) as caught:
        get_dataset("pixmo_cap", source=str(tmp_path / "none"))
    assert caught.value.reason == "source_missing"


# --- generated rows


def test_sample_source_repeats_itself_and_has_a_default_length():
    dataset = get_dataset("pixmo_cap", source="sample")
    again = get_dataset("pixmo_cap", source="sample")
    assert len(dataset) == SAMPLE_ROWS
    assert [dataset[i] for i in range(5)] == [again[i] for i in range(5)]


def test_sample_rows_stay_when_the_limit_changes():
    few = get_dataset("pixmo_cap", source="sample", limit=3)
    many = get_dataset("pixmo_cap", source="sample", limit=300)
    assert (len(few), len(many)) == (3, 300)
    assert [few[i] for i in range(3)] == [many[i] for i in range(3)]


def test_splits_of_the_sample_source_hold_other_rows():
    train = get_dataset("pixmo_cap", "train", source="sample", limit=20)
    validation = get_dataset("pixmo_cap", "validation", source="sample", limit=20)
    assert not set(urls(train)) & set(urls(validation))


def test_generated_scene_is_read_as_the_same_jpeg_each_time():
    scene = get_dataset("pixmo_cap", source="sample", limit=1)[0]["image"]
    assert isinstance(scene, SceneImage)
    assert scene.read() == SceneImage(seed=scene.seed, idx=scene.idx).read()
    assert scene.read().startswith(b"\xff\xd8")


# --- the validation split


def test_train_and_validation_share_no_row_and_together_are_all(folder):
    train, validation = (QuarterOut(s, source=folder) for s in ("train", "validation"))
    assert not set(urls(train)) & set(urls(validation))
    assert sorted(urls(train) + urls(validation)) == sorted(row["image_url"] for row in rows(400))


def test_the_split_of_a_row_depends_on_no_other_row(tmp_path, write_parquet):
    """It is chosen before any row is left out, for whatever reason."""
    whole = write_parquet(tmp_path / "whole", rows(60))
    fewer = [{**row, "image_url": None} if i % 3 else row for i, row in enumerate(rows(60))]
    left = write_parquet(tmp_path / "fewer", fewer)
    kept = {row["image_url"] for row in fewer}
    for split in ("train", "validation"):
        want = [url for url in urls(QuarterOut(split, source=str(whole))) if url in kept]
        assert urls(QuarterOut(split, source=str(left))) == want


def test_share_of_the_validation_split_is_about_right():
    count = 100_000

    class InMemory(PixMoCap):
        def load(self):
            return Rows([lambda: rows(count)], lengths=[count], kind={})

    want = count * 2048 / 717_042
    assert abs(len(InMemory("validation")) - want) < 4 * want**0.5


def test_split_of_a_row_does_not_depend_on_the_order_or_number_of_rows(
    tmp_path, folder, write_parquet
):
    other = rows(400)[::-1][:200]
    moved = write_parquet(tmp_path / "other", other)
    whole = set(urls(QuarterOut("validation", source=folder)))
    part = set(urls(QuarterOut("validation", source=str(moved))))
    assert part == whole & {row["image_url"] for row in other}


def test_split_of_a_row_does_not_depend_on_its_text(tmp_path, folder, write_parquet):
    other = [{**row, "caption": "another caption"} for row in rows(400)]
    moved = write_parquet(tmp_path / "other", other)
    assert urls(QuarterOut("validation", source=str(moved))) == (
        urls(QuarterOut("validation", source=folder))
    )


def test_split_of_local_images_does_not_depend_on_where_the_folder_lies(tmp_path, write_parquet):
    table = [{**row, "image": f"images/{i}.jpg"} for i, row in enumerate(rows(200))]
    first = write_parquet(tmp_path / "here", table)
    second = write_parquet(tmp_path / "somewhere" / "else", table)
    assert urls(QuarterOut("validation", source=str(first))) == (
        urls(QuarterOut("validation", source=str(second)))
    )


def test_rows_keep_their_order_within_a_split(folder):
    numbers = [int(url.split("/")[-1].split(".")[0]) for url in urls(QuarterOut(source=folder))]
    assert numbers == sorted(numbers)


def test_limit_counts_rows_of_the_split_from_the_first_on(folder):
    whole = urls(QuarterOut("validation", source=folder))
    assert urls(QuarterOut("validation", source=folder, limit=7)) == whole[:7]
    assert urls(OwnSplits(source=folder, limit=7)) == [row["image_url"] for row in rows(7)]
    assert len(QuarterOut("validation", source=folder, limit=10**6)) == len(whole)


def test_split_that_no_row_is_in_is_refused(folder):
    with pytest.raises(SourceError) as caught:
        QuarterOut("test", source=folder)
    assert caught.value.reason == "source_split"


def test_split_that_no_row_is_in_is_empty(tmp_path, write_parquet):
    folder = write_parquet(tmp_path / "train", rows(1))
    with pytest.raises(SourceError) as caught:
        QuarterOut("validation", source=str(folder))
    assert caught.value.reason == "source_empty"
    assert caught.value.facts["rows_in_source"] == 1


def test_rows_of_the_other_split_are_counted_and_said(folder):
    train, validation = (QuarterOut(split, source=folder) for split in ("train", "validation"))
    assert train.rows_not_taken["other_split"] == len(validation)
    assert validation.rows_not_taken["other_split"] == len(train)
    note = f"{len(validation)} of 400 rows are in the split validation: a hash of the image chooses"
    assert note in train.notes()[-1]
    assert "split train: 1 file: part.parquet" in train.notes()[0]


def test_no_hash_divides_a_source_with_a_validation_split_of_its_own(tmp_path, write_parquet):
    write_parquet(tmp_path / "train", rows(40))
    write_parquet(tmp_path / "dev", rows(7))
    write_parquet(tmp_path / "test", rows(3))
    for split, count in (("train", 40), ("validation", 7), ("test", 3)):
        dataset = QuarterOut(split, source=str(tmp_path))
        assert (len(dataset), dataset.num_rows_read) == (count, count)
        assert not any("hash" in line for line in dataset.notes())
    stored = QuarterOut.source_files(str(tmp_path), "validation", unmatched="refuse")
    assert stored == [tmp_path / "dev" / "part.parquet"]


def test_without_a_share_the_splits_of_the_source_are_used(tmp_path, write_parquet):
    table = write_parquet(tmp_path / "source" / "train", rows(5))
    write_parquet(table.parent / "test", rows(2))
    assert len(OwnSplits("train", source=str(table.parent))) == 5
    assert len(OwnSplits("test", source=str(table.parent))) == 2
    with pytest.raises(SourceError) as caught:
        OwnSplits("validation", source=str(table.parent))
    assert caught.value.reason == "source_split"


# --- the hub, through the real library


def test_hub_source_gives_the_rows_of_the_folder_source(
    tmp_path, folder, write_parquet, monkeypatch
):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    class Mirrored(QuarterOut):
        PATH = folder

    for split in ("train", "validation"):
        hub, local = Mirrored(split), QuarterOut(split, source=folder)
        assert [hub[i] for i in range(len(hub))] == [local[i] for i in range(len(local))]
        assert hub.rows.kind["kind"] == "hub"


# --- images of rows


@pytest.mark.parametrize(
    "row, want",
    [
        ({"image": b"bytes"}, b"bytes"),
        ({"image": {"bytes": b"bytes", "path": "a.jpg"}}, b"bytes"),
        ({"image_url": "http://a/b.jpg"}, "http://a/b.jpg"),
        ({"image": None, "image_url": "https://a/b.jpg"}, "https://a/b.jpg"),
        ({"image": {"bytes": None, "path": None}, "image_url": "https://a/b"}, "https://a/b"),
        ({"image": SceneImage(seed=1, idx=2)}, SceneImage(seed=1, idx=2)),
    ],
)
def test_image_of_a_row_is_found(row, want):
    assert row_image(row) == want


@pytest.mark.parametrize(
    "image", ["a.jpg", {"bytes": None, "path": "a.jpg"}, {"bytes": b"", "path": "a.jpg"}]
)
def test_relative_path_starts_from_the_folder(tmp_path, image):
    assert row_image({"image": image}, base=str(tmp_path)) == tmp_path / "a.jpg"


@pytest.mark.parametrize("image", ["/data/a.jpg", "file:///data/a.jpg"])
def test_absolute_path_stays_as_it_is(tmp_path, image):
    assert str(row_image({"image": image}, base=str(tmp_path))) == "/data/a.jpg"


@pytest.mark.parametrize("image", [np.zeros((2, 2, 3), np.uint8), Image.new("RGB", (2, 2))])
def test_pixels_are_handed_on(image):
    assert row_image({"image": image}) is image


@pytest.mark.parametrize("row", [{}, {"image": None}, {"image": 3}, {"image_url": None}])
def test_row_without_an_image_is_one_bad_row_not_a_bad_source(row):
    with pytest.raises(SampleError) as caught:
        row_image(row)
    assert caught.value.reason == "row_image"


def test_dataset_is_abstract_and_needs_rows():
    with pytest.raises(TypeError, match="abstract"):
        Dataset()
    assert DatasetBase.__abstractmethods__ == {"load"}
