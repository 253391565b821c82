"""The CRC-32 of samples: zlib's numbers, from whichever library is there."""

import importlib
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec import checksum


@pytest.fixture(params=["isal", "zlib"])
def crc32(request, monkeypatch):
    if request.param == "zlib":
        monkeypatch.setitem(sys.modules, "isal", None)  # an import of it fails
    else:
        pytest.importorskip("isal")
    made = importlib.reload(checksum)
    assert (made._crc32 is zlib.crc32) == (request.param == "zlib")
    yield made.crc32
    monkeypatch.undo()
    importlib.reload(checksum)


def test_numbers_are_those_of_zlib(crc32):
    @given(st.binary(max_size=3000), st.binary(max_size=50))
    def equal(payload, rest):
        assert crc32(payload) == zlib.crc32(payload)
        assert crc32(memoryview(payload)[1:]) == zlib.crc32(payload[1:])
        assert crc32(rest, crc32(payload)) == zlib.crc32(payload + rest)

    equal()


def test_any_changed_bit_is_noticed(crc32):
    payload = bytes(range(256))
    changed = {
        crc32(bytes([*payload[:i], payload[i] ^ 1 << b, *payload[i + 1 :]]))
        for i in range(256)
        for b in range(8)
    }
    assert len(changed | {crc32(payload)}) == 2049
