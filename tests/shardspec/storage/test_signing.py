"""Signed URLs, beside those of the store's own client, which they must not differ from."""

import contextlib
import datetime
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import botocore.session
import pytest
from botocore.config import Config
from botocore.credentials import RefreshableCredentials
from hypothesis import given
from hypothesis import strategies as st

from loader import StreamingDataset
from shardspec.errors import StorageError
from shardspec.storage.ranges import RangeReader
from shardspec.storage.signing import make_signer
from tests import servers

KEYS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret"}
NOWHERE = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
ENDPOINT = "https://weka.example.org:9000"
VIRTUAL = {"addressing_style": "virtual"}
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)

PROFILE = """
[profile lab]
region = eu-west-3
aws_access_key_id = AKIDLAB
aws_secret_access_key = lab
aws_session_token = token/+=
services = lab-services
s3 =
    addressing_style = auto
    max_concurrent_requests = 20

[services lab-services]
s3 =
    endpoint_url = http://lab.example.org/below
"""


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "config"
    path.write_text(PROFILE)
    return str(path)


def environment(**variables):
    return mock.patch.dict(os.environ, {**NOWHERE, **variables}, clear=True)


def by_client(options, places):
    client = {**options.get("client_kwargs", {})}
    if "endpoint_url" in options:
        client["endpoint_url"] = options["endpoint_url"]
    config = Config(signature_version="s3v4", **options.get("config_kwargs", {}))
    session = botocore.session.Session(profile=options.get("profile"))
    client = session.create_client("s3", config=config, **client)
    with mock.patch("botocore.auth.get_current_datetime", return_value=NOW):
        return [
            client.generate_presigned_url(
                "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=60
            )
            for bucket, key in places
        ]


def by_signer(options, *places):
    signer = make_signer(options)
    if signer is None:
        return None
    with mock.patch("botocore.auth.get_current_datetime", return_value=NOW):
        return [signer.sign(*place, expires_s=60, limit_s=10) for place in places]


SETTINGS = {
    "endpoint of the environment": ({}, {"AWS_ENDPOINT_URL_S3": ENDPOINT, **KEYS}),
    "endpoint of all services": ({}, {"AWS_ENDPOINT_URL": f"{ENDPOINT}/", **KEYS}),
    "endpoint of a named store": ({"endpoint_url": ENDPOINT, "use_listings_cache": False}, KEYS),
    "by number": ({"endpoint_url": "http://127.0.0.1:9000"}, KEYS),
    "session token": ({"endpoint_url": ENDPOINT}, {**KEYS, "AWS_SESSION_TOKEN": "t/+="}),
    "region of the environment": (
        {"endpoint_url": ENDPOINT},
        {**KEYS, "AWS_DEFAULT_REGION": "ap-south-1"},
    ),
    "region of a named store": (
        {"endpoint_url": ENDPOINT, "client_kwargs": {"region_name": "eu-north-1"}},
        {**KEYS, "AWS_DEFAULT_REGION": "ap-south-1"},
    ),
    "bucket in the path": (
        {"endpoint_url": ENDPOINT, "config_kwargs": {"s3": {"addressing_style": "path"}}},
        KEYS,
    ),
    "profile": ({"profile": "lab"}, {}),
    "profile of the environment": ({}, {"AWS_PROFILE": "lab"}),
    "profile and endpoint": ({"profile": "lab", "endpoint_url": ENDPOINT}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_url_is_the_one_that_the_client_gives(name, profile):
    options, variables = SETTINGS[name]
    with environment(AWS_CONFIG_FILE=profile, **variables):
        places = [("bucket", "set/train-00000.tar"), ("Bucket_1", "a b/ü~+&%=?.tar")]
        expected = by_client(options, places)
        assert all("X-Amz-Signature=" in url for url in expected)
        assert by_signer(options, *places) == expected


@pytest.fixture(scope="module")
def client():
    with environment(**KEYS):
        session = botocore.session.Session()
        config = Config(signature_version="s3v4")
        return session.create_client("s3", endpoint_url=ENDPOINT, config=config)


# Surrogates are no text that a store could have taken; a key must not begin with a slash, which
# S3 file systems strip.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda key: not key.startswith("/")
)


@given(NAMES)
def test_any_key_is_quoted_as_the_client_does(client, key):
    with environment(**KEYS):
        (signed,) = by_signer({"endpoint_url": ENDPOINT}, ("bucket", key))
    with mock.patch("botocore.auth.get_current_datetime", return_value=NOW):
        wanted = {"Bucket": "bucket", "Key": key}
        assert signed == client.generate_presigned_url("get_object", Params=wanted, ExpiresIn=60)


@pytest.mark.parametrize(
    "options, variables",
    [
        ({}, KEYS),  # Amazon's own: the region decides about the address
        ({"endpoint_url": "https://s3-accelerate.amazonaws.com"}, KEYS),
        ({"endpoint_url": "https://s3.cn-north-1.amazonaws.com.cn"}, KEYS),
        ({"endpoint_url": "https://weka.example.org/a%20b"}, KEYS),
        ({"endpoint_url": "https://weka.example.org "}, KEYS),
        ({"endpoint_url": "http://localhost:99999"}, KEYS),
        ({"endpoint_url": ENDPOINT, "client_kwargs": {"region_name": "us-west-2-fips"}}, KEYS),
        ({"endpoint_url": ENDPOINT, "client_kwargs": {"region_name": "no_region"}}, KEYS),
        ({"endpoint_url": ENDPOINT, "anon": True}, KEYS),
        ({"endpoint_url": ENDPOINT, "requester_pays": True}, KEYS),
        ({"endpoint_url": ENDPOINT, "client_kwargs": {"verify": False}}, KEYS),
        ({"endpoint_url": ENDPOINT, "config_kwargs": {"proxies": {"http": "p"}}}, KEYS),
        ({"endpoint_url": ENDPOINT, "config_kwargs": {"s3": {"payload_signing_enabled": 1}}}, KEYS),
        ({"endpoint_url": ENDPOINT, "config_kwargs": {"s3": VIRTUAL}}, KEYS),
        ({"endpoint_url": ENDPOINT}, {**KEYS, "AWS_USE_FIPS_ENDPOINT": "true"}),
        ({}, {**KEYS, "AWS_ENDPOINT_URL": ENDPOINT, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}),
    ],
)
def test_what_only_the_client_knows_is_left_to_it(options, variables):
    with environment(**variables):
        assert make_signer(options) is None


def test_without_credentials_nothing_is_signed():
    # The machine that this runs on might be asked for a role otherwise.
    with environment(AWS_EC2_METADATA_DISABLED="true"):
        assert by_signer({"endpoint_url": ENDPOINT}, ("bucket", "a")) == [None]


class Role:
    """Credentials that a service gives for a while."""

    def __init__(self):
        self.asked, self.answers = 0, threading.Event()
        self.answers.set()
        self.credentials = RefreshableCredentials.create_from_metadata(
            self.metadata(), refresh_using=self.metadata, method="role"
        )

    def metadata(self):
        self.asked += 1
        assert self.answers.wait(60)
        until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=1)
        return {
            "access_key": f"AKID{self.asked}",
            "secret_key": "secret",
            "token": "token",
            "expiry_time": until.isoformat(),
        }


def test_credentials_that_run_out_are_fetched_again_and_waited_for_so_long_only():
    role = Role()
    with (
        environment(),
        mock.patch("botocore.session.Session.get_credentials", return_value=role.credentials),
    ):
        signer = make_signer({"endpoint_url": ENDPOINT})
        assert "AKID2%2F" in signer.sign("bucket", "a", expires_s=60, limit_s=10)
        role.answers.clear()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                signer.sign("bucket", "a", expires_s=60, limit_s=0.1)
        assert role.asked == 3  # once for all who wait
        role.answers.set()
        assert "X-Amz-Security-Token=token" in signer.sign("bucket", "a", expires_s=60, limit_s=10)


ASKED = """#!/bin/sh
echo asked >> {log}
sleep 0.3
{answer}
"""
GIVEN = 'echo \'{"Version": 1, "AccessKeyId": "test-access-key", "SecretAccessKey": "%s"}\''


@pytest.fixture
def signing_in(tmp_path, s3_server):
    """A profile whose credentials a program gives; the program's log."""
    program, log, config = tmp_path / "program", tmp_path / "log", tmp_path / "config"
    config.write_text(f"[profile lab]\ncredential_process = {program}\n")

    @contextlib.contextmanager
    def enter(answer):
        program.write_text(ASKED.format(log=log, answer=answer))
        program.chmod(0o755)
        env = {**s3_server.env, "AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "lab"}
        env = {name: value for name, value in env.items() if "KEY" not in name}
        with mock.patch.dict(os.environ, env):
            servers.forget_clients()
            try:
                yield log
            finally:
                servers.forget_clients()

    return enter


def test_credentials_are_asked_for_once_for_all_readers(signing_in, s3_server):
    bucket = s3_server.make_bucket()
    for i in range(16):
        s3_server.client().pipe_file(f"{bucket}/{i}", b"0123456789")
    with signing_in(GIVEN % servers.SECRET_KEY) as log:
        reader = RangeReader()
        with ThreadPoolExecutor(16) as pool:
            found = list(pool.map(lambda i: reader.read(f"{bucket}/{i}", 2, 5), range(16)))
        assert found == [b"234"] * 16
        assert log.read_text() == "asked\n"


@pytest.mark.parametrize("profile", ["lab", "nobody"], ids=["no credentials", "no profile"])
def test_what_fails_before_the_first_byte_is_a_storage_error(profile, signing_in):
    with (
        signing_in("exit 3"),
        mock.patch.dict(os.environ, {"AWS_PROFILE": profile}),
        pytest.raises(StorageError) as caught,
    ):
        StreamingDataset("s3://bucket/set")
    assert caught.value.where == "s3://bucket/set/manifest.json"


def test_a_store_with_an_endpoint_is_read_without_its_client(s3_server):
    url = s3_server.make_bucket() + "/set/a b+c.tar"
    s3_server.client().pipe_file(url, b"0123456789")
    with s3_server.entered():
        reader = RangeReader()
        reader.connect_soon(url, 4)
        signed, _ = reader._reader(url)
        urls = signed.urls
        wait_until(lambda: urls.connections and len(idle(urls.connections)) >= 4)
        # Whoever reads from that store in this process uses them, and opens no more.
        number = len(idle(urls.connections))
        RangeReader().connect_soon(url, 4)
        time.sleep(0.2)
        assert len(idle(urls.connections)) == number
        assert reader.read(url, 2, 5, total=10) == b"234"
        assert reader.read_all(url) == b"0123456789"
        assert urls._client.fs._s3 is None
        assert len(idle(urls.connections)) == number


def idle(connections):
    return [one for kept in connections._idle.values() for one in kept]


def wait_until(is_true):
    stop_s = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < stop_s
        time.sleep(0.01)
