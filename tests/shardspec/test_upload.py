"""Uploads in chunks to Google's store: what its protocol allows and the emulator never does."""

import base64
import hashlib
import json

import pytest

from shardspec.errors import StorageError
from shardspec.upload import PART_BYTES, put_file


class Bucket:
    """A resumable session as Google documents it, behind the calls of gcsfs that are used."""

    protocol = ("gs", "gcs")
    base = "http://store/storage/v1/"

    def __init__(self, keeps):
        self.keeps = iter(keeps)
        """Of each request with bytes: how many of them are kept."""
        self.kept = b""
        self.cancelled = False

    def split_path(self, path):
        bucket, _, key = path.partition("/")
        return bucket, key, None

    def call(self, method, path, *, headers=None, data=None, **_):
        if method == "POST":
            return {"Location": "session"}, b""
        if method == "DELETE":
            self.cancelled = True
            return {}, b""
        span, _, total = headers["Content-Range"].removeprefix("bytes ").partition("/")
        if span != "*":
            start = int(span.partition("-")[0])
            payload = data.read()
            assert start == len(self.kept), "the store refuses a gap"
            self.kept += payload[: next(self.keeps, len(payload))]
        if len(self.kept) == int(total) and next(self.keeps, 1):
            md5 = hashlib.md5(self.kept, usedforsecurity=False).digest()

            return {}, json.dumps({"md5Hash": base64.b64encode(md5).decode()}).encode()
        return ({"Range": f"bytes=0-{len(self.kept) - 1}"} if self.kept else {}), b""


PAYLOAD = bytes(range(251)) * (2 * PART_BYTES // 251 + 1000)


@pytest.mark.parametrize(
    "keeps",
    [
        [],
        [0],  # nothing of the first chunk
        [5, PART_BYTES - 5, 0],  # a part of the first, nothing of the second
        [PART_BYTES, PART_BYTES, 7],  # a part of the last
        [PART_BYTES, PART_BYTES, 2**30, 0],  # all, and no object yet
    ],
)
def test_what_the_store_has_not_kept_is_sent_again(keeps, tmp_path):
    (tmp_path / "a").write_bytes(PAYLOAD)
    store = Bucket(keeps)
    put_file(store, "bucket/a", tmp_path / "a", where="gs://bucket/a")
    assert store.kept == PAYLOAD
    assert not store.cancelled


def test_a_store_that_keeps_nothing_is_given_up(tmp_path):
    (tmp_path / "a").write_bytes(PAYLOAD)
    store = Bucket([0] * 1000)
    with pytest.raises(StorageError) as caught:
        put_file(store, "bucket/a", tmp_path / "a", where="gs://bucket/a")
    assert caught.value.reason == "store_unavailable"
    assert store.cancelled
