"""Named stores: from a file and the environment, with every way to get one wrong named."""

import subprocess
import sys
from pathlib import Path

import pytest

from shardspec import storage
from shardspec.errors import ConfigError, StorageError
from shardspec.storage.stores import Store, named_stores, parse_stores

ROOT = Path(__file__).parents[3]


@pytest.fixture
def stores_file(tmp_path, monkeypatch):
    """Writes the file of named stores and points at it."""

    def write(text):
        path = tmp_path / "stores.toml"
        path.write_text(text)
        monkeypatch.setenv("VLM_SHARDS_STORES", str(path))
        return path

    return write


def refusal(document, environment=None):
    with pytest.raises(ConfigError) as caught:
        parse_stores(document, environment=environment or {}, where="stores.toml")
    return caught.value


def test_a_store_is_read_from_the_file_and_overridden_field_by_field(stores_file, monkeypatch):
    stores_file('[weka]\nendpoint_url = "https://w:9000"\nprofile = "lab"\naddressing = "path"\n')
    monkeypatch.setenv("VLM_SHARDS_STORE_WEKA_PROFILE", "mine")
    monkeypatch.setenv("VLM_SHARDS_STORE_WEKA_REGION", "here")
    (store,) = named_stores().values()
    assert store == Store(
        name="weka",
        endpoint_url="https://w:9000",
        profile="mine",
        region="here",
        addressing="path",
    )
    assert store.options() == {
        "endpoint_url": "https://w:9000",
        "profile": "mine",
        "client_kwargs": {"region_name": "here"},
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }


def test_the_environment_alone_makes_a_store():
    environment = {"VLM_SHARDS_STORE_OUR_LAB_ENDPOINT_URL": "http://h:1", "PATH": "/bin"}
    assert parse_stores({}, environment=environment, where="") == {
        "our-lab": Store(name="our-lab", endpoint_url="http://h:1")
    }


def test_without_a_file_there_are_no_names(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VLM_SHARDS_STORES", raising=False)
    assert named_stores() == {}
    (tmp_path / ".config" / "vlm-shards").mkdir(parents=True)
    text = '[w]\nendpoint_url = "http://h:1"\n'
    (tmp_path / ".config" / "vlm-shards" / "stores.toml").write_text(text)
    assert [*named_stores()] == ["w"]


@pytest.mark.parametrize(
    "document, reason",
    [
        ({"Weka": {"endpoint_url": "http://h"}}, "store_name"),
        ({"we.ka": {"endpoint_url": "http://h"}}, "store_name"),
        ({"weka": {"profile": "lab"}}, "store_endpoint"),
        ({"weka": {"endpoint_url": "h:9000"}}, "store_endpoint"),
        ({"weka": {"endpoint_url": "ftp://h"}}, "store_endpoint"),
        ({"weka": {"endpoint_url": "http://h", "profil": "lab"}}, "store_field"),
        ({"weka": {"endpoint_url": "http://h", "region": 1}}, "store_field"),
        ({"weka": {"endpoint_url": "http://h", "addressing": "host"}}, "store_field"),
        ({"weka": "http://h"}, "store_field"),
        ({"weka": {"endpoint_url": "http://me:hunter2@h"}}, "store_credentials"),
        ({"weka": {"endpoint_url": "http://h?token=hunter2"}}, "store_credentials"),
        ({"weka": {"endpoint_url": "http://h", "secret_access_key": "hunter2"}}, "store_field"),
    ],
)
def test_what_is_wrong_with_a_store_is_named_and_no_secret_shown(document, reason):
    error = refusal(document)
    assert error.reason == reason
    assert "weka" in str(error).lower() or "we.ka" in str(error)
    assert "hunter2" not in str(error)
    assert error.fix


def test_a_variable_that_names_no_field_is_refused():
    error = refusal({}, {"VLM_SHARDS_STORE_WEKA_SECRET": "hunter2"})
    assert (error.reason, error.where) == ("store_field", "VLM_SHARDS_STORE_WEKA_SECRET")
    assert "hunter2" not in str(error)


@pytest.mark.parametrize("text", ["[weka", "weka = 1\n[weka]\n"])
def test_a_file_that_is_not_toml_is_named(stores_file, text):
    path = stores_file(text)
    with pytest.raises(ConfigError) as caught:
        named_stores()
    assert (caught.value.reason, caught.value.where) == ("stores_file", str(path))


def test_a_file_that_was_named_and_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("VLM_SHARDS_STORES", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError) as caught:
        named_stores()
    assert (caught.value.reason, caught.value.where) == ("stores_file", str(tmp_path / "none.toml"))


def test_an_unknown_scheme_lists_the_known_ones(stores_file):
    stores_file('[weka]\nendpoint_url = "http://h:1"\n')
    with pytest.raises(StorageError) as caught:
        storage.read_bytes("weca://bucket/a")
    assert caught.value.reason == "unknown_scheme"
    assert "s3://, gs://, memory://, weka://" in caught.value.facts["known"]
    assert "did you mean 'weka'?" in caught.value.fix


def test_a_name_that_fsspec_has_for_itself_is_not_taken(stores_file):
    stores_file('[memory]\nendpoint_url = "http://h:1"\n')
    fs, _ = storage.filesystem("memory://a")
    assert fs.protocol == "memory"


def test_a_profile_gives_the_credentials_and_they_go_no_further(s3_server, tmp_path, stores_file):
    """A whole process: the file names the store, the profile its keys; the environment has none."""
    bucket = s3_server.make_bucket()
    keys = s3_server.options
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {keys['key']}\naws_secret_access_key = {keys['secret']}\n"
    )
    file = stores_file(f'[weka]\nendpoint_url = "{s3_server.endpoint}"\nprofile = "lab"\n')
    url = bucket.replace("s3://", "weka://") + "/a"
    code = f"from shardspec import storage; storage.publish_bytes({url!r}, b'x' * 10)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
            "VLM_SHARDS_STORES": str(file),
            "PATH": "",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert s3_server.objects(bucket) == {"a": 10}
