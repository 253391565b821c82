import gc
import hashlib
import io
import random
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.errors import ShardError
from shardspec.index import (
    INDEX_DTYPE,
    RowFile,
    encode_index,
    index_row,
    longest_text,
    open_index,
    parse_index,
    sample_layout,
    sample_places,
)
from shardspec.sample import (
    Geometry,
    PreparedImage,
    PreparedSample,
    sample_members,
    spans_table,
)
from shardspec.tar import TarRange, TarWriter, walk_tar


def picture(width, height):
    return PreparedImage(
        pixels=np.zeros((height, width, 3), np.uint8),
        source_width=width * 3,
        source_height=height * 3,
        geometry=Geometry.CROP,
    )


def stored(num_tokens, sizes, *, key="set-1", record=None):
    """Stores one sample with images of those lengths: (tar, index row, member payloads)."""
    images = tuple(picture(4 + i, 5) for i in range(len(sizes)))
    sample = PreparedSample(
        key=key,
        tokens=np.arange(num_tokens, dtype="<i4"),
        spans=spans_table([(0, 0, 0, num_tokens, 0, 0, 1_000_000)], images),
        images=images,
        record=record or {},
    )
    encoded = [bytes([i + 1]) * size for i, size in enumerate(sizes)]
    members = sample_members(sample, encoded, codec="jpeg", several=len(sizes) > 1)
    stream = io.BytesIO()
    writer = TarWriter(stream)
    writer.write_sample([("before.json", b"x" * 600)])
    place = writer.write_sample(members)
    writer.finish()
    row = index_row(sample, place=place, json_bytes=len(members[0][1]), image_sizes=sizes)
    return stream.getvalue(), row, members


def rows(count, *, num_bytes=2048):
    table = np.zeros(count, dtype=INDEX_DTYPE)
    table["offset"] = np.arange(count) * num_bytes
    table["num_bytes"] = num_bytes
    table["key"] = [f"set-{i}".encode() for i in range(count)]
    return table


@pytest.fixture
def index_path(tmp_path):
    def write(payload):
        path = tmp_path / "a.index.npy"
        path.write_bytes(payload)
        return str(path)

    return write


def refusal(path, *, num_samples=3, shard_bytes=3 * 2048):
    with pytest.raises(ShardError) as raised:
        open_index(path, num_samples=num_samples, shard_bytes=shard_bytes)
    assert raised.value.where == path
    return raised.value.reason


def test_columns_of_the_contract_never_change():
    # Columns may be appended in a later version, never renamed or given another type.
    assert INDEX_DTYPE.descr == [
        ("offset", "<u8"),
        ("num_bytes", "<u4"),
        ("crc32", "<u4"),
        ("json_bytes", "<u4"),
        ("spans_bytes", "<u4"),
        ("tokens_bytes", "<u4"),
        ("image_bytes", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("num_images", "<u2"),
        ("geometry", "<u2"),
        ("num_tokens", "<u4"),
        ("num_loss_tokens", "<u4"),
        ("key", "|S60"),
    ]
    assert INDEX_DTYPE.itemsize == 112


@given(
    num_tokens=st.integers(0, 300),
    sizes=st.lists(st.integers(1, 1500), max_size=3),
    text=st.text(max_size=300),
)
def test_row_finds_every_payload_without_the_tar_headers(num_tokens, sizes, text):
    tar, row, members = stored(num_tokens, sizes, record={"text": text})
    row = row[0]
    layout = sample_layout(row)
    base = int(row["offset"])
    found = list(walk_tar(io.BytesIO(tar)))[1:]
    starts = [layout.json, layout.spans, layout.tokens, layout.image]
    lengths = [row["json_bytes"], row["spans_bytes"], row["tokens_bytes"], row["image_bytes"]]
    for member, (_, payload), start, length in zip(
        found, members, starts, map(int, lengths), strict=False
    ):
        assert (member.offset, member.num_bytes) == (base + start, length)
        assert tar[base + start : base + start + length] == payload
    assert row["num_images"] == len(sizes)
    assert base + int(row["num_bytes"]) == len(tar) - 1024


def test_row_describes_the_first_image_and_the_longest_text():
    _, row, _ = stored(7, [10, 20], key="pixmo_cap-0000042")
    assert row.dtype == INDEX_DTYPE
    first = dict(zip(INDEX_DTYPE.names, row[0].tolist(), strict=True))
    assert (first["width"], first["height"], first["geometry"]) == (12, 15, Geometry.CROP)
    assert (first["num_images"], first["image_bytes"]) == (2, 10)
    assert (first["num_tokens"], first["num_loss_tokens"]) == (7, 0)
    assert first["key"] == b"pixmo_cap-0000042"


def test_row_of_a_sample_without_images_has_zeros():
    _, row, _ = stored(7, [])
    assert [int(row[0][n]) for n in ("width", "height", "geometry", "num_images")] == [0] * 4
    assert row[0]["image_bytes"] == 0


def test_sample_too_long_for_its_column_is_an_error_not_a_wrapped_number():
    sample = PreparedSample(
        key="k", tokens=np.zeros(0, "<i4"), spans=np.zeros((0, 8), "<i4"), record={}
    )
    place = TarRange(offset=0, num_bytes=2**32, crc32=0)
    with pytest.raises(OverflowError):
        index_row(sample, place=place, json_bytes=3, image_sizes=[])


def test_longest_text_adds_the_longest_variant_of_every_turn():
    spans = spans_table(
        [
            # branch, turn, prompt, response, weight
            (0, 0, 0, 2, 2, 5, 1),  # 2 + 3
            (0, 0, 0, 4, 2, 3, 1),  # 4 + 1, as long, with fewer response tokens
            (0, 1, 0, 0, 5, 9, 1),  # 0 + 4
            (1, 0, 0, 6, 6, 6, 1),  # 6 + 0
            (1, 0, 0, 1, 6, 10, 1),  # 1 + 4
        ],
        [picture(4, 4)],
    )
    assert longest_text(spans) == (5 + 4 + 6, 3 + 4 + 0)


def test_longest_text_of_no_text_is_nothing():
    assert longest_text(np.zeros((0, 8), "<i4")) == (0, 0)


TEXTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(0, 2),
        *[st.integers(0, 9)] * 4,
    ).map(lambda t: (*t[:2], min(t[2:4]), max(t[2:4]), min(t[4:]), max(t[4:]), 1)),
    max_size=8,
)


@given(TEXTS, st.randoms(use_true_random=False))
def test_longest_text_bounds_every_draw_and_ignores_the_order_of_rows(texts, shuffle):
    longest, loss = longest_text(spans_table(texts, []))
    turns = {}
    for branch, turn, *rest in texts:
        length = (rest[1] - rest[0]) + (rest[3] - rest[2])
        turns.setdefault((branch, turn), []).append(length)
    assert longest == sum(max(lengths) for lengths in turns.values())
    assert 0 <= loss <= longest
    shuffled = list(texts)
    shuffle.shuffle(shuffled)
    assert longest_text(spans_table(shuffled, [])) == (longest, loss)


def test_index_opens_mapped_and_read_only(index_path):
    path = index_path(encode_index(rows(3)))
    opened = open_index(path, num_samples=3, shard_bytes=3 * 2048)
    assert not opened.flags.owndata
    assert not opened.flags.writeable
    assert np.array_equal(opened, rows(3))


def test_same_rows_give_the_same_bytes_which_numpy_reads():
    payload = encode_index(rows(3))
    assert payload == encode_index(rows(3).copy())
    assert np.array_equal(np.load(io.BytesIO(payload), allow_pickle=False), rows(3))


def test_index_of_an_empty_shard_opens(index_path):
    assert len(open_index(index_path(encode_index(rows(0))), num_samples=0, shard_bytes=1024)) == 0


def test_index_with_a_further_column_opens(index_path):
    wider = np.zeros(3, dtype=[*INDEX_DTYPE.descr, ("clip_frames", "<u2")])
    for name in INDEX_DTYPE.names:
        wider[name] = rows(3)[name]
    stream = io.BytesIO()
    np.save(stream, wider)
    opened = open_index(index_path(stream.getvalue()), num_samples=3, shard_bytes=3 * 2048)
    assert opened["key"].tolist() == [b"set-0", b"set-1", b"set-2"]


def test_missing_index_is_named(tmp_path):
    assert refusal(str(tmp_path / "none.index.npy")) == "index_missing"


def numpy_saves(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def numpy_saves_archive(array):
    stream = io.BytesIO()
    np.savez(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no numpy file",
        encode_index(rows(3))[:100],
        encode_index(rows(3))[:-1],
        encode_index(rows(3)) + b"\0",
        numpy_saves(np.zeros(3)),
        numpy_saves(rows(3).reshape(3, 1)),
        numpy_saves(rows(3)[[n for n in INDEX_DTYPE.names if n != "crc32"]]),
        numpy_saves(
            rows(3).astype([(n, "<f8" if n == "width" else t) for n, t in INDEX_DTYPE.descr])
        ),
        numpy_saves(rows(3).astype([(n, t.replace("<", ">")) for n, t in INDEX_DTYPE.descr])),
        numpy_saves(np.array([{}, {}, {}], dtype=object), allow_pickle=True),
        numpy_saves_archive(rows(3)),
    ],
    ids=[
        "empty",
        "text",
        "cut-in-header",
        "cut-in-rows",
        "too-long",
        "plain-floats",
        "two-axes",
        "column-missing",
        "column-of-another-type",
        "big-endian",
        "pickled-objects",
        "npz",
    ],
)
def test_file_that_is_not_an_index_is_refused(index_path, payload):
    assert refusal(index_path(payload)) == "index_format"


def test_folder_in_the_place_of_an_index_is_refused(tmp_path):
    assert refusal(str(tmp_path)) == "index_format"


@pytest.mark.parametrize("promised", [2, 4])
def test_index_with_another_number_of_rows_is_refused(index_path, promised):
    assert refusal(index_path(encode_index(rows(3))), num_samples=promised) == "index_count"


def test_index_that_points_past_its_shard_is_refused(index_path):
    path = index_path(encode_index(rows(3)))
    assert refusal(path, shard_bytes=3 * 2048 - 1) == "index_range"


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
def test_damaged_header_is_refused_or_harmless(index_path):
    # NumPy's parser fails in many ways, among them tokenize.TokenError, which is no ValueError.
    good = encode_index(rows(3))
    header_bytes = len(good) - 3 * INDEX_DTYPE.itemsize
    rng = random.Random(0)
    refused = 0
    for _ in range(1200):
        broken = bytearray(good)
        for _ in range(rng.choice([1, 1, 3])):
            broken[rng.randrange(header_bytes)] = rng.randrange(256)
        try:
            opened = open_index(index_path(broken), num_samples=3, shard_bytes=3 * 2048)
        except ShardError:
            refused += 1
        else:
            assert opened.tobytes() == rows(3).tobytes()
    assert refused > 1000


def test_threads_may_open_indexes_at_once():
    # A collection in the middle of Python 3.11's parser lets another thread into it.
    payload = memoryview(encode_index(rows(3)))
    thresholds = gc.get_threshold()

    def let_go(phase, info):
        time.sleep(1e-5)

    gc.callbacks.append(let_go)
    gc.set_threshold(5)
    try:
        with ThreadPoolExecutor(4) as pool:
            opened = pool.map(
                lambda _: parse_index(payload, where="x", num_samples=3, shard_bytes=3 * 2048),
                range(200),
            )
            assert all(len(each) == 3 for each in opened)
    finally:
        gc.callbacks.remove(let_go)
        gc.set_threshold(*thresholds)


@given(
    num=st.integers(1, 90),
    draws=st.lists(st.integers(0, 10**6), max_size=40),
    near=st.sampled_from([1, 300, 10**6]),
    most=st.sampled_from([1, 500, 10**6]),
)
def test_rows_that_are_read_from_the_file_are_those_in_memory(
    tmp_path_factory, num, draws, near, most
):
    table = rows(num)
    path = tmp_path_factory.mktemp("rows") / "index.npy"
    path.write_bytes(encode_index(table))
    file = RowFile(str(path), cut="index_cut")
    assert file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    file.parse()
    assert (file.dtype, file.shape) == (table.dtype, table.shape)
    numbers = np.array(draws, np.int64) % num
    with mock.patch.multiple("shardspec.index", _NEAR_BYTES=near, _READ_BYTES=most):
        found = file.values(["offset", "key"], numbers)
    for name in ("offset", "key"):
        assert found[name].tolist() == table[name][numbers].tolist()
    places = sample_places(table)
    for i in numbers.tolist():
        assert file.place(i) == places[i].item()
        assert file.row(i).item() == table[i].item()
