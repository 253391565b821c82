"""Which failures pass by themselves, told from the errors that real clients raise."""

import asyncio
import errno
import http.client
import socket
from datetime import datetime, timezone

import aiohttp
import botocore.exceptions
import fsspec.exceptions
import gcsfs.retry
import google.auth.exceptions
import pytest
import requests.exceptions
from s3fs.errors import translate_boto_error

from shardspec.errors import ConfigError, StorageError
from shardspec.storage import failures, retries
from shardspec.storage.retries import (
    ACTION_POLICY,
    Clock,
    RetryPolicy,
    retry_after_s,
    with_retries,
)

QUICK = RetryPolicy(attempts=4, first_wait_s=0.001)


def s3_error(status, code):
    response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(response, "PutObject"))


def gcs_error(status):
    return gcsfs.retry.HttpError({"code": status, "message": "no"})


def gcs_answer(status):
    try:
        gcsfs.retry.validate_response(status, b"no", "b/bucket/o/a")
    except Exception as error:  # noqa: BLE001 - of whatever kind the client makes it
        return error
    raise AssertionError


CLOSED = botocore.exceptions.ConnectionClosedError(endpoint_url="http://h")
GONE = botocore.exceptions.EndpointConnectionError(endpoint_url="http://h")
PASSING = [
    *(s3_error(*each) for each in [(503, "SlowDown"), (500, "InternalError"), (429, "429")]),
    *(gcs_error(status) for status in (408, 429, 500, 502, 503, 504)),
    gcs_answer(502),
    CLOSED,
    GONE,
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://h"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError(),
    fsspec.exceptions.FSTimeoutError(),
    asyncio.TimeoutError(),
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    requests.exceptions.ConnectionError(),
    gcs_error(425),
    s3_error(400, "RequestTimeout"),
    socket.gaierror(socket.EAI_AGAIN, "no name service"),
    http.client.IncompleteRead(b""),
    http.client.BadStatusLine("no"),
    OSError(errno.ENETUNREACH, "unreachable"),
]
LASTING = [
    *(s3_error(*each) for each in [(403, "AccessDenied"), (400, "BadDigest"), (404, "NoSuchKey")]),
    *(s3_error(*each) for each in [(412, "PreconditionFailed"), (501, "NotImplemented")]),
    *(gcs_answer(status) for status in (400, 401, 403, 404, 412)),
    botocore.exceptions.NoCredentialsError(),
    botocore.exceptions.ParamValidationError(report="no"),
    google.auth.exceptions.DefaultCredentialsError(),
    OSError(errno.ENOSPC, "full"),
    FileNotFoundError(),
    KeyError("bug"),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass_is_tried_again_until_it_does(error):
    todo = [error, error, None]

    def action():
        now = todo.pop(0)
        if now is not None:
            raise now
        return "done"

    assert with_retries(action, where="s3://b/a", policy=QUICK) == "done"
    assert todo == []


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_lasts_is_raised_at_once(error):
    calls = []

    def action():
        calls.append(1)
        raise error

    with pytest.raises(type(error)) as caught:
        with_retries(action, where="s3://b/a", policy=QUICK)
    assert caught.value is error
    assert len(calls) == 1


def test_attempts_end_with_what_was_tried():
    with pytest.raises(StorageError) as caught:
        with_retries(lambda: (_ for _ in ()).throw(GONE), where="s3://b/a", policy=QUICK)
    error = caught.value
    assert (error.reason, error.where) == ("store_unavailable", "s3://b/a")
    assert error.facts["attempts"] == QUICK.attempts
    assert "EndpointConnectionError" in error.facts["error"]
    assert error.__cause__ is GONE


def test_attempts_end_with_their_time():
    calls = []

    def action():
        calls.append(1)
        raise TimeoutError

    with pytest.raises(StorageError):
        with_retries(action, where="s3://b/a", policy=RetryPolicy(attempts=99, wall_s=1e-9))
    assert len(calls) == 1


def test_waits_are_drawn_from_the_whole_span():
    draws = [retries.jitter("s3://b/a", attempt) for attempt in range(200)]
    assert 0 <= min(draws) < 0.1 < 0.9 < max(draws) < 1
    assert len(set(draws)) == 200


def test_waits_double_with_each_attempt_without_progress(monkeypatch):
    monkeypatch.setattr(retries, "jitter", lambda *_: 1.0)
    policy = RetryPolicy(attempts=6, first_wait_s=1.0, longest_wait_s=6.0, wall_s=120)
    attempts = retries.Attempts(policy, where="s3://b/a")
    assert [attempts.failed() for _ in range(3)] == [2.0, 4.0, 6.0]
    assert attempts.failed(has_progress=True) == 1.0
    assert attempts.failed(least_s=50.0) == 50.0
    assert [attempts.failed() for _ in range(5)] == [4.0, 6.0, 6.0, 6.0, None]
    assert attempts.number == 10
    assert attempts.failed(has_progress=True, least_s=121.0) is None


class Simulated:
    """A clock that only waiting and failing move, and a store that is away until `back_s`."""

    def __init__(self, *, back_s, fails_in_s, error=GONE):
        self.now_s, self.back_s, self.fails_in_s, self.error = 0.0, back_s, fails_in_s, error
        self.clock = Clock(now_s=lambda: self.now_s, sleep=self.sleep)
        self.calls = 0

    def sleep(self, seconds):
        assert seconds >= 0
        self.now_s += seconds

    def request(self):
        self.calls += 1
        if self.now_s >= self.back_s:
            return "done"
        self.now_s += self.fails_in_s  # an attempt that began before its end fails
        raise self.error


@pytest.mark.parametrize("policy", [RetryPolicy(), ACTION_POLICY, RetryPolicy(wall_s=330)])
@pytest.mark.parametrize("fails_in_s", [0.0, 0.003, 0.5, 7.0, 20.0])
def test_every_outage_up_to_the_stated_one_is_survived(policy, fails_in_s):
    assert policy.outage_s == (300 if policy.wall_s else 120)
    for i in range(40):
        back_s = policy.outage_s * (40 - i) / 40
        store = Simulated(back_s=back_s, fails_in_s=fails_in_s)
        answer = with_retries(store.request, where=f"s3://b/{i}", policy=policy, clock=store.clock)
        assert answer == "done"
        # Not hammered: the waits grow to ten seconds, drawn from 0 on.
        assert store.calls <= 120


def test_a_longer_outage_ends_when_its_time_is_over():
    store = Simulated(back_s=1e9, fails_in_s=0.001)
    with pytest.raises(StorageError) as caught:
        with_retries(store.request, where="s3://b/a", clock=store.clock)
    assert 149 <= store.now_s <= 150
    assert "VLM_SHARDS_OUTAGE_S" in caught.value.fix


def test_the_outage_to_survive_is_a_setting_of_the_environment(monkeypatch):
    monkeypatch.setenv("VLM_SHARDS_OUTAGE_S", "300")
    assert RetryPolicy().outage_s == ACTION_POLICY.outage_s == 300
    store = Simulated(back_s=300, fails_in_s=20.0)
    assert with_retries(store.request, where="s3://b/a", clock=store.clock) == "done"
    assert RetryPolicy(wall_s=60).outage_s == 30  # what code says comes first
    for wrong in ("5 minutes", "-1", "nan", "inf", "1e9", "9" * 5000):
        monkeypatch.setenv("VLM_SHARDS_OUTAGE_S", wrong)
        with pytest.raises(ConfigError) as caught:
            _ = RetryPolicy().limit_s
        assert caught.value.reason == "outage_s"
        assert len(str(caught.value)) < 300


def test_retry_after_may_be_a_date_that_counts_from_the_answers_own():
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)

    def read(text, **more):
        return retry_after_s({"retry-after": text, **more}, now=now)

    assert read("Fri, 02 Jan 2026 03:05:45 GMT") == 100
    assert read("Fri, 02 Jan 2026 03:05:45 -0000") == 100
    assert read("Fri, 02 Jan 2026 03:05:45 GMT", date="Fri, 02 Jan 2026 03:05:35 GMT") == 10
    assert read("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert retry_after_s({"Retry-After": "Fri, 02 Jan 2026 03:05:45 GMT"}) == 0.0
    assert read("17") == 17.0
    assert read("0.5") == 0.5
    assert read("-1") == read("soon") == read("") == read("\u0661") == 0.0


@pytest.mark.parametrize(
    "error, refused",
    [
        (s3_error(412, "PreconditionFailed"), True),
        (s3_error(409, "ConditionalRequestConflict"), True),
        (gcs_answer(412), True),
        (s3_error(403, "AccessDenied"), False),
        (s3_error(503, "SlowDown"), False),
        (OSError(errno.EINVAL, "invalid"), False),
    ],
    ids=repr,
)
def test_a_refused_condition_is_known_by_its_status(error, refused):
    assert failures.is_condition_refused(error) == refused


@pytest.mark.parametrize(
    "error, refused",
    [
        (s3_error(403, "AccessDenied"), True),
        (s3_error(403, "SignatureDoesNotMatch"), True),
        (gcs_answer(403), True),
        (gcs_answer(401), True),
        (botocore.exceptions.NoCredentialsError(), True),
        (botocore.exceptions.ProfileNotFound(profile="lab"), True),
        (google.auth.exceptions.DefaultCredentialsError(), True),
        (PermissionError(errno.EACCES, "no"), True),
        (s3_error(404, "NoSuchBucket"), False),
        (gcs_answer(404), False),
        (GONE, False),
    ],
    ids=repr,
)
def test_refused_access_is_known_whatever_the_client_calls_it(error, refused):
    assert failures.is_access_refused(error) == refused
