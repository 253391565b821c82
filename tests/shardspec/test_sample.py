import dataclasses
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shardspec.errors import ShardError
from shardspec.sample import (
    ARRAY_HEADER_BYTES,
    CODEC_SUFFIX,
    KEY_PATTERN,
    LOSSLESS_CODECS,
    SPAN_COLUMNS,
    Geometry,
    PreparedImage,
    PreparedSample,
    SpanKind,
    decode_array,
    encode_array,
    encode_record,
    image_rows,
    image_suffix,
    lead_rows,
    num_images,
    overview_rows,
    sample_members,
    spans_table,
    text_rows,
    window_images,
)

INT32 = st.integers(-(2**31), 2**31 - 1)
TOKENS = hnp.arrays("<i4", st.integers(0, 50), elements=INT32)
SPANS = hnp.arrays("<i4", st.tuples(st.integers(0, 9), st.just(SPAN_COLUMNS)), elements=INT32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def numpy_saves(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def picture(width, height, *, geometry=Geometry.NONE):
    return PreparedImage(
        pixels=np.zeros((height, width, 3), np.uint8),
        source_width=2 * width,
        source_height=2 * height,
        geometry=geometry,
    )


def sample(*, images=(), key="set-0001"):
    return PreparedSample(
        key=key,
        tokens=np.arange(5, dtype="<i4"),
        spans=spans_table([(0, 0, 0, 2, 2, 5, 1_000_000)], images),
        images=tuple(images),
        record={"style": "long_caption"},
    )


@given(
    hnp.arrays(
        st.sampled_from(["<i4", "|u1", "<i8", "<f4", "<u2"]),
        hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=70),
    )
)
def test_encoded_array_is_byte_for_byte_what_numpy_saves(array):
    assert encode_array(array) == numpy_saves(array)


@given(TOKENS)
def test_token_member_reads_back_here_and_with_numpy(tokens):
    payload = encode_array(tokens)
    assert decode_array(payload, dtype="<i4").tolist() == tokens.tolist()
    assert np.load(io.BytesIO(payload), allow_pickle=False).tolist() == tokens.tolist()
    assert len(payload) == ARRAY_HEADER_BYTES + 4 * len(tokens)


@given(SPANS)
def test_spans_member_reads_back_here_and_with_numpy(spans):
    payload = memoryview(encode_array(spans))
    assert np.array_equal(decode_array(payload, dtype="<i4", columns=SPAN_COLUMNS), spans)
    assert np.array_equal(np.load(io.BytesIO(payload), allow_pickle=False), spans)


def test_strided_array_is_stored_in_row_order():
    array = np.arange(12, dtype="<i4").reshape(3, 4)
    assert encode_array(array.T) == numpy_saves(np.ascontiguousarray(array.T))
    assert encode_array(array[:, ::2]) == numpy_saves(np.ascontiguousarray(array[:, ::2]))


def test_array_with_too_many_axes_for_the_header_is_refused():
    with pytest.raises(ValueError, match="128-byte"):
        encode_array(np.zeros((1,) * 30, np.uint8))


def test_decoding_shares_the_payloads_memory_and_cannot_write_it():
    payload = encode_array(np.arange(3, dtype="<i4"))
    array = decode_array(payload, dtype="<i4")
    assert np.shares_memory(array, np.frombuffer(payload, np.uint8))
    assert not array.flags.writeable


@given(array=SPANS, cut=st.integers(1, 400))
def test_array_cut_anywhere_is_refused(array, cut):
    payload = encode_array(array)
    with pytest.raises(ShardError) as raised:
        decode_array(payload[:-cut], dtype="<i4", columns=SPAN_COLUMNS, where="a.tar k")
    # A cut of whole rows is seen only because the header says how many there were.
    assert raised.value.reason in ("array_size", "array_header")
    assert raised.value.where == "a.tar k"


@given(array=TOKENS, position=st.integers(0, ARRAY_HEADER_BYTES - 1), flip=st.integers(1, 255))
def test_array_with_any_other_header_byte_is_refused(array, position, flip):
    payload = bytearray(encode_array(array))
    payload[position] ^= flip
    with pytest.raises(ShardError) as raised:
        decode_array(bytes(payload), dtype="<i4")
    assert raised.value.reason == "array_header"


@pytest.mark.parametrize(
    "payload, reason",
    [
        (b"", "array_header"),
        (encode_array(np.zeros(8, "<i8")), "array_header"),
        (encode_array(np.zeros(8, ">i4")), "array_header"),
        (encode_array(np.zeros(16, "<i4")), "array_header"),
        (numpy_saves(np.asfortranarray(np.ones((2, 8), "<i4"))), "array_header"),
        (encode_array(np.zeros((2, 8), "<i4")) + b"\0", "array_size"),
        (encode_array(np.zeros((2, 8), "<i4")) + bytes(32), "array_header"),
        (encode_array(np.zeros(9, "<i4")), "array_size"),
    ],
    ids=["empty", "int64", "big-endian", "flat", "fortran", "long-byte", "long-row", "nine"],
)
def test_payload_that_is_not_a_spans_table_is_refused(payload, reason):
    with pytest.raises(ShardError) as raised:
        decode_array(payload, dtype="<i4", columns=SPAN_COLUMNS)
    assert raised.value.reason == reason


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_record_is_one_canonical_line_of_json(record):
    payload = encode_record(record)
    assert json.loads(payload) == record
    assert payload.endswith(b"\n")
    assert payload.count(b"\n") == 1
    assert encode_record(dict(reversed(record.items()))) == payload


def test_record_keeps_text_readable():
    assert encode_record({"b": "Grüße 猫", "a": [1, 2]}) == '{"a":[1,2],"b":"Grüße 猫"}\n'.encode()


def with_overview(image):
    return dataclasses.replace(image, overview=np.zeros((2, 3, 3), np.uint8))


@given(texts=st.integers(0, 5), images=st.integers(0, 4), led=st.booleans())
def test_rows_of_a_table_are_split_into_texts_leads_and_images(texts, images, led):
    leads = [(i, i + 2) for i in range(images if led else 0)]
    table = spans_table(
        [(0, t, 1, 2, 3, 4, 5) for t in range(texts)],
        [picture(3 + i, 7) for i in range(images)],
        leads=leads,
    )
    assert (table.dtype.str, table.shape) == ("<i4", (texts + len(leads) + images, SPAN_COLUMNS))
    assert num_images(table) == images
    assert text_rows(table).tolist() == [[0, 0, t, 1, 2, 3, 4, 5] for t in range(texts)]
    assert lead_rows(table).tolist() == [[2, i, i, i + 2, 0, 0, 0, 0] for i in range(len(leads))]
    assert image_rows(table).tolist() == [
        [1, i, 6 + 2 * i, 14, 3 + i, 7, 0, 0] for i in range(images)
    ]


def test_row_selections_are_views():
    table = spans_table([(0, 0, 0, 1, 1, 2, 3)], [with_overview(picture(4, 4))])
    text_rows(table)[:, 1] = 9
    overview_rows(table)[:, 4] = 7
    image_rows(table)[:, 6] = 8
    assert (table[0, 1], table[1, 4], table[2, 6]) == (9, 7, 8)


@pytest.mark.parametrize("leads", [(), [(0, 1), (1, 2), (2, 3)]], ids=["bare", "led"])
def test_overviews_have_rows_of_their_own_between_leads_and_images(leads):
    images = [with_overview(picture(8, 4)), picture(6, 6), with_overview(picture(4, 9))]
    table = spans_table([(0, 0, 0, 1, 1, 2, 3)], images, leads=leads)
    assert overview_rows(table).tolist() == [[3, 0, 3, 2, 0, 0, 0, 0], [3, 2, 3, 2, 0, 0, 0, 0]]
    assert len(text_rows(table)) == 1
    assert len(lead_rows(table)) == len(leads)
    assert image_rows(table)[:, 1].tolist() == [0, 1, 2]
    assert num_images(table) == 3


def test_overview_is_stored_directly_after_its_image():
    images = [picture(8, 4), with_overview(picture(6, 6))]
    members = sample_members(
        sample(images=images),
        [b"first", b"second!"],
        overviews=[b"small"],
        codec="jpeg",
        several=True,
    )
    assert members[3:] == [
        ("set-0001.0.jpg", b"first"),
        ("set-0001.1.jpg", b"second!"),
        ("set-0001.1.overview.jpg", b"small"),
    ]
    stored = decode_array(members[1][1], dtype="<i4", columns=SPAN_COLUMNS)
    assert overview_rows(stored).tolist() == [[3, 1, 3, 2, 5, 0, 0, 0]]
    assert image_rows(stored)[:, 6].tolist() == [5, 7]


def test_sample_with_another_number_of_encoded_overviews_is_refused():
    images = [with_overview(picture(8, 4)), with_overview(picture(6, 6))]
    with pytest.raises(ValueError):
        sample_members(
            sample(images=images), [b"1", b"2"], overviews=[b"3"], codec="png", several=True
        )


def test_numbers_of_the_contract_never_change():
    kinds = (SpanKind.TEXT, SpanKind.IMAGE, SpanKind.LEAD, SpanKind.OVERVIEW)
    assert kinds == (0, 1, 2, 3)
    assert (SpanKind.VIDEO, SpanKind.SUBTITLE, SpanKind.WINDOW) == (4, 5, 6)
    assert (Geometry.FLIP, Geometry.CROP, Geometry.COLOR, Geometry.ALL) == (1, 2, 4, 7)
    assert (ARRAY_HEADER_BYTES, SPAN_COLUMNS) == (128, 8)
    assert CODEC_SUFFIX == {
        "jpeg": "jpg",
        "png": "png",
        "webp": "webp",
        "raw": "image.npy",
        "features": "features.npy",
    }
    assert {"png", "webp", "raw", "lossless"} == LOSSLESS_CODECS


def test_windows_list_as_many_images_as_they_show():
    images = [picture(4, 4)] * 3
    windows = [[0, 0, 1, 2, 1, 0, 2], [2] * 7]
    spans = spans_table([(0, 0, 0, 1, 1, 2, 10**6)], images, windows=windows)
    assert spans[:, 0].tolist() == [0, 6, 6, 6, 6, 1, 1, 1]
    assert spans[2].tolist() == [6, 0, 2, -1, -1, -1, -1, -1]
    assert window_images(spans) == windows
    assert window_images(spans_table([], images)) == []


@pytest.mark.parametrize("codec, suffix", CODEC_SUFFIX.items())
def test_several_images_are_numbered_in_front_of_the_suffix(codec, suffix):
    assert image_suffix(codec, image=0, several=False) == suffix
    assert image_suffix(codec, image=11, several=True) == f"11.{suffix}"


def test_members_stand_in_the_contracts_order_with_image_sizes_filled_in():
    images = [picture(4, 4, geometry=Geometry.FLIP), picture(8, 2)]
    before = sample(images=images)
    members = sample_members(before, [b"first", b"second!"], codec="jpeg", several=True)
    assert [name for name, _ in members] == [
        "set-0001.json",
        "set-0001.spans.npy",
        "set-0001.tokens.npy",
        "set-0001.0.jpg",
        "set-0001.1.jpg",
    ]
    stored = decode_array(members[1][1], dtype="<i4", columns=SPAN_COLUMNS)
    assert image_rows(stored).tolist() == [[1, 0, 8, 8, 4, 4, 5, 1], [1, 1, 16, 4, 8, 2, 7, 0]]
    assert decode_array(members[2][1], dtype="<i4").tolist() == [0, 1, 2, 3, 4]
    assert [payload for _, payload in members[3:]] == [b"first", b"second!"]
    assert image_rows(before.spans)[:, 6].tolist() == [0, 0]


def test_sample_without_images_has_three_members():
    assert len(sample_members(sample(), [], codec="png", several=False)) == 3


def test_sample_with_another_number_of_encoded_images_is_refused():
    with pytest.raises(ValueError):
        sample_members(sample(images=[picture(4, 4)] * 3), [b"1", b"2"], codec="png", several=True)


@pytest.mark.parametrize(
    "key, good",
    [
        ("0", True),
        ("pixmo_cap-0000123", True),
        ("x" * 60, True),
        ("x" * 61, False),
        ("", False),
        ("a.b", False),
        ("A", False),
        ("../a", False),
        ("a/b", False),
        ("ü", False),
        ("a\n", False),
    ],
)
def test_keys_are_safe_as_names_of_members(key, good):
    assert bool(re.fullmatch(KEY_PATTERN, key)) == good


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().key = "other"
