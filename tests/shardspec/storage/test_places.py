"""Which hosts a manifest may send a reader to."""

import pytest

from shardspec import storage
from shardspec.errors import StorageError

BASES = ["/data/set", "s3://bucket/set", "https://data.example.org/set", "https://me:pw@h:1/set"]

OURS = ["train/a.tar", "../other/a.tar", "/data/other/a.tar", "file:///data/a.tar"]

OTHER_BUCKETS = [
    "s3://other/a.tar",
    "gs://other/a.tar",
    "s3a://other/a.tar",
    "s3://bucket.other/set/a.tar",
    "hf://datasets/x/y/a.tar",
    "weka://bucket/a.tar",
]

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


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("url", OTHER_BUCKETS)
def test_no_other_bucket_is_read_with_the_user_s_credentials(base, url, monkeypatch):
    with pytest.raises(StorageError) as caught:
        storage.resolve_place(base, url)
    assert caught.value.reason == "foreign_host"
    # What the message says to set is enough, and lets nothing else in.
    variable, _, place = caught.value.fix.split()[1].partition("=")
    monkeypatch.setenv(variable, place)
    assert storage.resolve_place(base, url) == url
    for other in OTHER_BUCKETS:
        if other.split("/")[2] != url.split("/")[2]:
            with pytest.raises(StorageError):
                storage.resolve_place(base, other)


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("s3://bucket/set", "s3://bucket/other/a.tar"),
        ("s3://bucket/set", "s3a://bucket/other/a.tar"),
        ("gs://bucket/set", "gcs://bucket/other/a.tar"),
        ("weka://bucket/set", "weka://bucket/other/a.tar"),
        ("hf://datasets/x/y/set", "hf://datasets/x/y/other/a.tar"),
        ("hf://datasets/x/y@main/set", "hf://datasets/x/y@v2/a.tar"),
    ],
)
def test_the_dataset_s_own_bucket_is_read(base, url):
    assert storage.resolve_place(base, url) == url


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("hf://datasets/x/y/set", "hf://datasets/x/z/a.tar"),
        ("hf://datasets/x/y/set", "hf://datasets/x/y2/a.tar"),
        ("s3://bucket/set", "weka://bucket/set/a.tar"),
        ("s3://bucket/set", "gs://bucket/set/a.tar"),
    ],
)
def test_another_repository_or_store_is_not_the_dataset_s_own(base, url):
    with pytest.raises(StorageError):
        storage.resolve_place(base, url)


PREFIXES = {
    "s3://other/sets/a.tar": True,
    "s3a://other/sets/deep/a.tar": True,
    "s3://other/sets2/a.tar": False,
    "s3://other/private/a.tar": False,
    "s3://other/sets/../private/a.tar": False,
    "s3://other.org/sets/a.tar": False,
}


@pytest.mark.parametrize("url", PREFIXES)
def test_a_prefix_lets_in_what_is_below_it(url, monkeypatch):
    monkeypatch.setenv("VLM_SHARDS_HOSTS", "example.org, s3://other/sets/")
    if PREFIXES[url]:
        assert storage.resolve_place("/data/set", url) == url
    else:
        with pytest.raises(StorageError):
            storage.resolve_place("/data/set", url)


@pytest.mark.parametrize(
    ("url", "is_listed"),
    [
        ("weka://sets/a.tar", True),
        ("weka://public/vision/a.tar", True),
        ("weka://public/audio/a.tar", False),
        ("weka://private/a.tar", False),
        ("s3://sets/a.tar", False),
    ],
)
def test_buckets_of_a_store_s_entry_are_read(url, is_listed, monkeypatch):
    monkeypatch.setenv("VLM_SHARDS_STORE_WEKA_BUCKETS", "sets, public/vision")
    if is_listed:
        assert storage.resolve_place("/data/set", url) == url
    else:
        with pytest.raises(StorageError):
            storage.resolve_place("/data/set", url)


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
