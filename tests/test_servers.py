"""The servers that the suite starts: they are real, and they keep to themselves."""

import os
import subprocess
import sys

import pytest

CLIENT = """
import sys, fsspec
fs, path = fsspec.core.url_to_fs(sys.argv[1])
fs.pipe_file(path, b"from another process")
print(*fs.ls(fs._parent(path), detail=False))
"""


@pytest.fixture(params=["s3", "gcs"])
def server(request):
    return request.getfixturevalue(f"{request.param}_server")


def test_another_process_needs_nothing_but_the_environment(server):
    bucket = server.make_bucket()
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, f"{bucket}/set/a"],
        env={**os.environ, **server.env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"{bucket}/set/a".split("://")[1]]
    assert server.objects(bucket) == {"set/a": 20}
    assert server.read(f"{bucket}/set/a") == b"from another process"


def test_a_server_leaves_nothing_in_the_environment(server):
    before = dict(os.environ)
    with server.entered():
        assert dict(os.environ) == {**before, **server.env}
    assert dict(os.environ) == before


def test_what_was_stored_survives_the_death_of_the_server(s3_servers):
    with s3_servers() as server:
        bucket = server.make_bucket()
        server.client().pipe_file(f"{bucket}/a", b"x" * 1000)
        server.kill()
        assert not server.answers()
        server.start()
        assert server.objects(bucket) == {"a": 1000}


def test_open_multipart_uploads_are_seen(s3_server):
    bucket = s3_server.make_bucket()
    client = s3_server.client()
    name = bucket.removeprefix("s3://")
    client.call_s3("create_multipart_upload", Bucket=name, Key="set/a")
    assert s3_server.uploads(bucket) == ["set/a"]
    assert s3_server.uploads(f"{bucket}/other") == []
    assert s3_server.objects(bucket) == {}
