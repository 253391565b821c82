"""Foreign tars with odd headers: each is listed, skipped and counted, or refused by name."""

import contextlib
import io
import tarfile
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec.errors import ShardError
from shardspec.foreign import walk_foreign
from shardspec.tar import BLOCK

SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.txt"}


def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def filled(payload):
    return payload + bytes(-len(payload) % BLOCK)


def record(name, value):
    body = f" {name}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


def extended(fields):
    records = b"".join(record(name, value) for name, value in fields.items())
    return header("pax", len(records), b"x") + filled(records)


def walk(payload):
    skipped = Counter()
    return [file.key for file in walk_foreign(io.BytesIO(payload), where="t", skipped=skipped)]


def one_file(extra, payload=b"abc"):
    return extra + header("a.txt", len(payload)) + filled(payload) + bytes(2 * BLOCK)


@pytest.mark.parametrize(
    "fields, payload",
    [
        (SPARSE, filled(b"many\n")),
        (SPARSE, filled(b"99999999999\n0\n3\n")),
        ({**SPARSE, "GNU.sparse.realsize": "long"}, filled(b"1\n0\n3\n")),
        ({"GNU.sparse.map": "0,x"}, b"abc"),
        ({"GNU.sparse.offset": "0", "GNU.sparse.numbytes": "3", "GNU.sparse.size": "no"}, b"abc"),
        ({"size": "-5"}, b"abc"),
    ],
)
def test_numbers_of_extended_headers_that_are_none_are_refused_by_name(fields, payload):
    with pytest.raises(ShardError) as caught:
        walk(one_file(extended(fields), payload))
    assert caught.value.reason == "foreign_tar"


@pytest.mark.parametrize("count", [500, 20_000])
def test_thousands_of_extended_headers_before_a_file_are_refused_by_name(count):
    with pytest.raises(ShardError) as caught:
        walk(one_file(count * extended({"comment": "x"})))
    assert caught.value.reason == "foreign_tar"
    assert "too many extended headers" in str(caught.value)


def test_an_extended_header_before_each_of_thousands_of_files_is_read():
    files = [
        extended({"comment": "x"}) + header(f"{i}.txt", 3) + filled(b"abc") for i in range(2000)
    ]
    assert walk(b"".join(files) + bytes(2 * BLOCK)) == [str(i) for i in range(2000)]


@given(
    fields=st.dictionaries(
        st.sampled_from(
            ["size", "path", "GNU.sparse.map", "GNU.sparse.size", "GNU.sparse.offset"]
            + ["GNU.sparse.numbytes", "GNU.sparse.realsize", "mtime", "uid", *SPARSE]
        ),
        st.text(st.characters(codec="ascii", exclude_characters="\n\0"), max_size=12)
        | st.integers(-9, 9).map(str),
        max_size=4,
    ),
    payload=st.binary(max_size=40),
)
def test_any_extended_header_is_read_or_refused_by_name(fields, payload):
    with contextlib.suppress(ShardError):
        walk(one_file(extended(fields), payload))
