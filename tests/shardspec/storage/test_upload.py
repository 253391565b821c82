"""Uploads in chunks to Google's store: what its protocol allows and the emulator never does."""

import base64
import hashlib
import json
from functools import partial
from types import SimpleNamespace

import pytest

from shardspec import storage
from shardspec.errors import StorageError
from shardspec.storage.upload import (
    PART_BYTES,
    put_file,
    put_in_parts_s3,
    send_part_s3,
    version_of_entry,
)


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


def test_a_store_that_keeps_nothing_is_abandoned(tmp_path):
    (tmp_path / "a").write_bytes(PAYLOAD)
    store = Bucket([0] * 1000)
    with pytest.raises(StorageError) as caught:
        put_file(store, "bucket/a", tmp_path / "a", where="gs://bucket/a")
    assert caught.value.reason == "store_unavailable"
    assert store.cancelled


PART = bytes(2**16)


@pytest.mark.parametrize("ended_by", ["itself", "another"])
def test_an_upload_whose_end_was_not_heard_of_removes_nothing(s3_server, monkeypatch, ended_by):
    url = s3_server.make_bucket() + "/shard"
    with s3_server.entered():
        fs, path = storage.filesystem(url)
        call = fs.call_s3

        def unheard(method, *args, **options):
            if method == "complete_multipart_upload":
                if ended_by == "itself":
                    call(method, *args, **options)
                else:  # it was aborted, and another job's shard is there by now
                    place = {name: options[name] for name in ("Bucket", "Key", "UploadId")}
                    call("abort_multipart_upload", **place)
                    fs.pipe_file(path, b"another")
                raise FileNotFoundError("NoSuchUpload")
            return call(method, *args, **options)

        monkeypatch.setattr(fs, "call_s3", unheard)

        def send(number, upload):
            return send_part_s3(fs, PART, upload, url)

        put = partial(
            put_in_parts_s3, num_bytes=len(PART), where=url, on_part=lambda num_bytes: None
        )
        if ended_by == "itself":
            put(fs, path, [len(PART)], send)
            assert fs.cat_file(path) == PART
        else:
            with pytest.raises(StorageError) as caught:
                put(fs, path, [len(PART)], send)
            assert caught.value.reason == "upload_lost"
            assert fs.cat_file(path) == b"another"


def test_versions_of_web_servers_are_what_their_headers_say():
    web = SimpleNamespace(protocol=("http", "https"))
    assert version_of_entry(web, {"size": 10, "ETag": '"abc"'}) == '"abc"'
    assert version_of_entry(web, {"size": 10, "Last-Modified": "then"}) == "then"
    assert version_of_entry(web, {"size": 10, "mtime": 3}) == "10-3"
