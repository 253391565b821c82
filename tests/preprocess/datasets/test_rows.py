"""Rows of a source: real Parquet and Arrow files, read in pieces, chosen by the split they name."""

import weakref
from collections import UserList

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.datasets.rows import Rows, hub_rows, local_rows
from shardspec.errors import SampleError, SourceError

WANT = ("image|image_url", "caption")


def table(start, stop):
    return pa.table(
        {
            "image_url": [f"http://example.com/{i}.jpg" for i in range(start, stop)],
            "caption": [f"caption {i}" for i in range(start, stop)],
            "transcripts": [[f"one {i}", f"two {i}"] for i in range(start, stop)],
        }
    )


def write_parquet(path, start, stop, *, group=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(start, stop), path, row_group_size=group)


def open_rows(folder, split="train", want=WANT):
    return local_rows(str(folder), split=split, want=want)


def check_is_range(rows, count):
    """In order, backwards, and at random: each row is the one with its number."""
    assert len(rows) == count
    in_order = list(rows)
    assert [row["caption"] for row in in_order] == [f"caption {i}" for i in range(count)]
    assert [row["transcripts"][1] for row in in_order] == [f"two {i}" for i in range(count)]
    for i in [*range(count - 1, -1, -1), *(7 * i % count for i in range(count))]:
        assert rows[i] == in_order[i]


def reason_of(call, *args, **settings):
    with pytest.raises(SourceError) as caught:
        call(*args, **settings)
    return caught.value.reason


# --- rows that cannot be read


def with_bad_text(path, numbers, *, count=40, group=20):
    """Rows of which some have a caption that is not UTF-8."""
    captions = [b"\xff" if i in numbers else b"caption %d" % i for i in range(count)]
    bad = pa.Array.from_buffers(pa.string(), count, pa.array(captions, pa.binary()).buffers())
    rows = table(0, count)
    at = rows.schema.get_field_index("caption")
    pq.write_table(rows.set_column(at, "caption", bad), path, row_group_size=group)


@pytest.mark.parametrize("bad", [{0}, {5}, {19, 20}, {39}, set(range(16, 33))])
def test_a_row_that_cannot_be_read_costs_no_other(tmp_path, bad):
    with_bad_text(tmp_path / "a.parquet", bad)
    rows = open_rows(tmp_path)
    found = list(rows.attempts())
    assert len(found) == 40
    assert {i for i, row in enumerate(found) if isinstance(row, UnicodeDecodeError)} == bad
    for i in sorted(range(40), key=lambda i: 7 * i % 40):
        if i in bad:
            with pytest.raises(UnicodeDecodeError):
                rows[i]
        else:
            assert rows[i] == found[i]
            assert rows[i]["caption"] == f"caption {i}"


class Odd(UserList):
    """Rows of an adapter: those that are exceptions are raised."""

    def __getitem__(self, i):
        row = self.data[i]
        if isinstance(row, Exception):
            raise row
        return row

    def __iter__(self):
        return (self[i] for i in range(len(self)))


def test_rows_of_an_adapter_raise_what_they_like():
    listed = [{"a": 1}, KeyError("x"), {"a": 2}, SampleError("no_message.mode"), OSError(), {}]
    rows = Rows([lambda: Odd(listed), lambda: listed[:1]], lengths=[6, 1], kind={})
    assert list(rows.attempts()) == [*listed, listed[0]]


@pytest.mark.parametrize("error", [SourceError("source_unreadable"), MemoryError()])
def test_an_error_of_the_source_is_not_one_of_a_row(error):
    rows = Rows([lambda: Odd([{"a": 1}, error])], lengths=[2], kind={})
    with pytest.raises(type(error)):
        list(rows.attempts())


# --- formats


def test_parquet_files_with_several_row_groups_are_one_sequence(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10)
    write_parquet(tmp_path / "b.parquet", 10, 11)
    write_parquet(tmp_path / "c.parquet", 11, 30, group=5)
    check_is_range(open_rows(tmp_path), 30)


def test_empty_parquet_file_among_others_holds_no_row(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 3)
    write_parquet(tmp_path / "b.parquet", 3, 3)
    write_parquet(tmp_path / "c.parquet", 3, 5)
    check_is_range(open_rows(tmp_path), 5)


@pytest.mark.parametrize("open_writer", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrow_streams_and_files_are_read(tmp_path, open_writer, compression):
    options = pyarrow.ipc.IpcWriteOptions(compression=compression)
    whole = table(0, 25)
    with open_writer(str(tmp_path / "a.arrow"), whole.schema, options=options) as writer:
        writer.write_table(whole, max_chunksize=10)
    check_is_range(open_rows(tmp_path), 25)


def test_folder_of_save_to_disk_is_read(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(table(0, 12)).save_to_disk(tmp_path / "flat", num_shards=3)
    check_is_range(open_rows(tmp_path / "flat"), 12)


def test_splits_of_save_to_disk_are_kept_apart(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    splits = {"train": datasets.Dataset(table(0, 6)), "test": datasets.Dataset(table(6, 8))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    check_is_range(open_rows(tmp_path / "both"), 6)
    assert [row["caption"] for row in open_rows(tmp_path / "both", "test")] == [
        "caption 6",
        "caption 7",
    ]


def test_images_embedded_as_the_hub_does_it_come_out_as_bytes(tmp_path):
    image = [{"bytes": b"\xff\xd8", "path": None}]
    pq.write_table(pa.table({"image": image, "caption": ["a"]}), tmp_path / "a.parquet")
    assert open_rows(tmp_path)[0]["image"] == {"bytes": b"\xff\xd8", "path": None}


# --- splits


@pytest.mark.parametrize(
    "name, split",
    [
        ("train-00000-of-00002.parquet", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("train/part-0.parquet", "train"),
        ("train.parquet", "train"),
        ("default/validation/0000.parquet", "validation"),
        ("val-0.parquet", "validation"),
        ("val/0.parquet", "validation"),
        ("test-00000-of-00001.parquet", "test"),
    ],
)
def test_files_that_name_a_split_are_of_that_split_only(tmp_path, name, split):
    write_parquet(tmp_path / name, 0, 3)
    others = {"train", "validation", "test"} - {split}
    check_is_range(open_rows(tmp_path, split), 3)
    for other in others:
        with pytest.raises(SourceError) as caught:
            open_rows(tmp_path, other)
        assert caught.value.reason == "source_split"
        assert caught.value.facts["splits"] == [split]


@pytest.mark.parametrize("name", ["0000.parquet", "data/part.parquet", "trainset.parquet"])
def test_files_that_name_no_split_are_for_training(tmp_path, name):
    write_parquet(tmp_path / name, 0, 3)
    check_is_range(open_rows(tmp_path, "train"), 3)
    for split in ("validation", "test"):
        assert reason_of(open_rows, tmp_path, split) == "source_split"


def test_rows_are_located_in_their_files(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 10)
    write_parquet(tmp_path / "b" / "b.parquet", 10, 17)
    rows = open_rows(tmp_path)
    assert [rows.locate(i) for i in (0, 9, 10, 16)] == [
        *[("a.parquet", 0), ("a.parquet", 9)],
        *[("b/b.parquet", 0), ("b/b.parquet", 6)],
    ]


def test_split_named_above_the_folder_does_not_count(tmp_path):
    folder = tmp_path / "test" / "set"
    write_parquet(folder / "part.parquet", 0, 3)
    check_is_range(open_rows(folder, "train"), 3)


# --- errors


def test_missing_folder_is_named(tmp_path):
    assert reason_of(open_rows, tmp_path / "none") == "source_missing"


def test_file_instead_of_a_folder_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 3)
    assert reason_of(open_rows, tmp_path / "a.parquet") == "source_missing"


def test_folder_without_rows_is_named(tmp_path):
    (tmp_path / "readme.txt").write_text("no rows here")
    assert reason_of(open_rows, tmp_path) == "source_empty"


@pytest.mark.parametrize("name", ["metadata.jsonl", "train/metadata.csv"])
def test_folder_of_pictures_with_metadata_says_what_to_do(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("file_name,text\n")
    with pytest.raises(SourceError) as caught:
        open_rows(tmp_path)
    assert caught.value.reason == "source_empty"
    assert caught.value.where == str(tmp_path / name)
    assert "save_to_disk" in caught.value.fix


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("payload", [b"", b"junk" * 100])
def test_garbage_file_is_named(tmp_path, name, payload):
    (tmp_path / name).write_bytes(payload)
    with pytest.raises(SourceError) as caught:
        open_rows(tmp_path)
    assert caught.value.reason == "source_unreadable"
    assert caught.value.where == str(tmp_path / name)
    assert caught.value.facts["error"]


def test_parquet_file_cut_short_is_named(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 30)
    payload = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(payload[: len(payload) // 2])
    assert reason_of(open_rows, tmp_path) == "source_unreadable"


def test_arrow_stream_cut_short_is_named(tmp_path):
    whole = table(0, 25)
    with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), whole.schema) as writer:
        writer.write_table(whole, max_chunksize=10)
    payload = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(payload[: len(payload) // 2])
    assert reason_of(open_rows, tmp_path) == "source_unreadable"


def test_damaged_row_group_is_named_when_it_is_read(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 400, group=100)
    payload = bytearray((tmp_path / "a.parquet").read_bytes())
    payload[8:200] = b"\xff" * 192
    (tmp_path / "a.parquet").write_bytes(payload)
    rows = open_rows(tmp_path)
    assert rows[399]["caption"] == "caption 399"
    with pytest.raises(SourceError) as caught:
        rows[0]
    assert caught.value.reason == "source_unreadable"
    assert caught.value.where == str(tmp_path / "a.parquet")


def test_wrong_schema_names_what_is_missing_in_which_file(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 3)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError) as caught:
        open_rows(tmp_path)
    assert caught.value.reason == "source_schema"
    assert caught.value.where == str(tmp_path / "b.parquet")
    assert caught.value.facts == {"missing": ["image|image_url", "caption"], "got": ["text"]}


@pytest.mark.parametrize("column", ["image", "image_url"])
def test_one_of_the_alternative_columns_is_enough(tmp_path, column):
    pq.write_table(pa.table({column: ["x"], "caption": ["a"]}), tmp_path / "a.parquet")
    assert len(open_rows(tmp_path)) == 1


# --- the hub, through the real library, from a folder laid out as one of its repositories


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "repo" / "train-00000-of-00002.parquet", 0, 4)
    write_parquet(tmp_path / "repo" / "train-00001-of-00002.parquet", 4, 9)
    return str(tmp_path / "repo")


def test_hub_rows_are_one_sequence(hub):
    rows = hub_rows(hub, revision=None, split="train", want=WANT)
    check_is_range(rows, 9)
    assert rows.kind["kind"] == "hub"
    assert rows.kind["path"] == hub


def test_hub_images_are_not_decoded(tmp_path, monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    payload = b"these bytes are no image, so decoding would fail"
    rows = {"image": [{"bytes": payload, "path": None}], "caption": ["a"]}
    (tmp_path / "repo").mkdir()
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "repo" / "train.parquet")
    found = hub_rows(str(tmp_path / "repo"), revision=None, split="train", want=WANT)
    assert found[0]["image"]["bytes"] == payload


def test_hub_errors_are_named(hub, tmp_path):
    settings = {"revision": None, "want": WANT}
    assert reason_of(hub_rows, hub, split="nope", **settings) == "source_missing"
    assert reason_of(hub_rows, str(tmp_path / "none"), split="train", **settings) == (
        "source_missing"
    )
    assert reason_of(hub_rows, "nobody/nothing", split="train", **settings) == "source_missing"
    assert reason_of(hub_rows, hub, split="train", revision=None, want=("text",)) == (
        "source_schema"
    )


# --- pieces


class Piece(UserList):
    """A list that can be referred to weakly, by what it is instead of what it holds."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


def counted_rows(lengths):
    """Rows over pieces that note each time they are read, and that can be seen to be dropped."""
    reads, alive, start = [], weakref.WeakSet(), 0
    pieces = []
    for p, length in enumerate(lengths):

        def read(p=p, start=start, length=length):
            assert not alive, "the piece before is still held"
            reads.append(p)
            piece = Piece({"i": i} for i in range(start, start + length))
            alive.add(piece)
            return piece

        pieces.append(read)
        start += length
    return Rows(pieces, lengths=lengths, kind={}), reads, alive


@given(lengths=st.lists(st.integers(0, 5), max_size=8), more=st.randoms(use_true_random=False))
def test_random_access_equals_reading_in_order(lengths, more):
    rows, _, _ = counted_rows(lengths)
    in_order = list(rows)
    assert in_order == [{"i": i} for i in range(sum(lengths))]
    order = list(range(len(rows)))
    more.shuffle(order)
    assert all(rows[i] == in_order[i] for i in order)


def test_reading_in_order_reads_each_piece_once():
    rows, reads, _ = counted_rows([3, 1, 4])
    assert [rows[i]["i"] for i in range(8)] == list(range(8))
    assert reads == [0, 1, 2]


def test_one_piece_is_in_memory_at_a_time():
    rows, _, alive = counted_rows([3, 1, 4, 2])
    for _ in rows:
        assert len(alive) == 1
    for i in (9, 0, 5):
        assert rows[i] == {"i": i}
        assert len(alive) == 1


def test_row_beyond_the_end_is_an_index_error():
    rows, _, _ = counted_rows([2])
    for i in (2, -1):
        with pytest.raises(IndexError, match=f"row {i} of 2"):
            rows[i]
