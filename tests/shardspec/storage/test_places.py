"""Which hosts a manifest may send a reader to."""

import pytest

from shardspec import storage
from shardspec.errors import StorageError

BASES = ["/data/set", "s3://bucket/set", "https://data.example.org/set", "https://me:pw@h:1/set"]

OURS = ["train/a.tar", "../other/a.tar", "/data/other/a.tar", "file:///data/a.tar"]
OURS += ["s3://other/a.tar", "gs://other/a.tar", "s3a://b/a.tar", "hf://datasets/x/y/a.tar"]
OURS += ["weka://bucket/a.tar"]

FOREIGN = [
    "http://169.254.169.254/latest/meta-data",
    "https://evil.example.org/a.tar",
    "https://data.example.org:8443/set/a.tar",
    "https://data.example.org.evil.org/a.tar",
    "https://data.example.org@evil.org/a.tar",
    "http://[::1]/a.tar",
    "ftp://host/a.tar",
    "sftp://host/a.tar",
    "smb://host/share/a.tar",
    "webhdfs://host/a.tar",
    "github://org:repo@main/a.tar",
    "unknown://host/a.tar",
    "simplecache::https://evil.example.org/a.tar",
    "tar://a::https://evil.example.org/a.tar",
    "zip://a.tar::s3://bucket/b.zip",
    "abfs://container@evil.example.org/a.tar",
    "https://[bad/a.tar",
]


@pytest.fixture(autouse=True)
def _stores(monkeypatch):
    monkeypatch.setenv("VLM_SHARDS_STORE_WEKA_ENDPOINT_URL", "https://weka.example.org")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("url", OURS)
def test_places_that_the_user_has_named_are_read(base, url):
    assert storage.resolve_place(base, url) == storage.resolve(base, url)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("url", FOREIGN)
def test_no_other_host_is_asked(base, url):
    with pytest.raises(StorageError) as caught:
        storage.resolve_place(base, url)
    assert caught.value.reason == "foreign_host"
    assert "VLM_SHARDS_HOSTS" in caught.value.fix
    assert "pw" not in str(caught.value)


def test_the_dataset_s_own_host_is_read():
    base = "https://data.example.org/set"
    for url in ("https://data.example.org/other/a.tar", "HTTPS://DATA.example.org/a.tar"):
        assert storage.resolve_place(base, url) == url


def test_hosts_are_allowed_on_request(monkeypatch):
    url = "https://evil.example.org:8443/a.tar"
    monkeypatch.setenv("VLM_SHARDS_HOSTS", "other.org, Evil.example.org:8443")
    assert storage.resolve_place("/data/set", url) == url
    with pytest.raises(StorageError):
        storage.resolve_place("/data/set", "https://evil.example.org/a.tar")
