"""FETCH against a real server on the loopback interface, a killed process, and a fake resolver."""

import asyncio
import dataclasses
import hashlib
import io
import logging
import random
import signal
import socket
import subprocess
import sys
import threading
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocess.fetch import BlobCache, FetchResult, Ledger, read_ledger, survey_results
from preprocess.fetch import download as fetch
from preprocess.fetch.download import TRANSIENT, fetch_all, image_fault, is_public
from preprocess.fetch.hosts import group_by_host, host_of
from preprocess.fetch.policy import FetchPolicy
from preprocess.media import ImageLimits
from shardspec.errors import BudgetError, ConfigError, StorageError
from tests.preprocess.fetch.damage import blobs_of, damage_blob
from tests.preprocess.fetch.faulty_http import FaultyServer, picture

POLICY = FetchPolicy(
    backoff_s=0.01,
    attempts=2,
    read_timeout_s=5.0,
    wall_timeout_s=10.0,
    max_bytes=50_000,
    host_rate=0.0,
    robots_txt="ignore",  # test_manners.py obeys it
    allow_hosts=frozenset({"127.0.0.1"}),
)


NOW_S = 1_700_000_000


@pytest.fixture(scope="module")
def shared_server():
    with FaultyServer() as server:
        yield server


@pytest.fixture
def server(shared_server):
    shared_server.requests.clear()
    shared_server.headers.clear()
    shared_server.times_s.clear()
    shared_server.most_running.clear()
    shared_server.hanging.clear()
    return shared_server


@pytest.fixture
def cache(tmp_path):
    return BlobCache(tmp_path / "cache")


@pytest.fixture
def run(tmp_path, cache):
    """Fetches with the ledger of the test; settings change POLICY, keywords go to fetch_all."""

    def call(
        *urls, expected_sha256=None, sha_policy="require", limits=None, on_result=None, **settings
    ):
        with Ledger(tmp_path / "ledger.jsonl") as ledger:
            return fetch_all(
                urls,
                cache=cache,
                ledger=ledger,
                policy=dataclasses.replace(POLICY, **settings),
                expected_sha256=expected_sha256,
                sha_policy=sha_policy,
                limits=limits,
                on_result=on_result,
                clock=lambda: NOW_S,
            )

    return call


@pytest.fixture
def fake_dns(monkeypatch):
    """Answers names from a dict; addresses and unknown names as the C library would."""
    names = {}

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names[host]
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


def one(results):
    (result,) = results.values()
    return result


# --- what ends well ---------------------------------------------------------------------------


def test_image_is_stored_by_content_and_recorded(server, run, cache, tmp_path):
    url = server.url("/ok/a.png")
    result = one(run(url))
    body = picture("/ok/a.png")
    assert result == FetchResult(
        url=url,
        status="ok",
        http_status=200,
        sha256=hashlib.sha256(body).hexdigest(),
        num_bytes=len(body),
        attempts=1,
        content_type="image/png",
        final_url=url,
        finished_unix_s=NOW_S,
        opt_outs_ignored=True,
        ignored_opt_outs="robots_txt",
        private_hosts="127.0.0.1",
    )
    assert cache.get(result.sha256) == body
    assert read_ledger(tmp_path / "ledger.jsonl") == {url: result}


def test_server_error_is_tried_again(server, run):
    result = one(run(server.url("/flaky/500/1/a.png")))
    assert (result.status, result.reason, result.attempts) == ("ok", "", 2)


def test_redirect_is_followed_and_the_final_url_kept(server, run):
    target = server.url("/ok/a.png")
    result = one(run(server.url(f"/to?url={target}")))
    assert (result.status, result.final_url) == ("ok", target)
    result = one(run(server.url("/to?url=/ok/b.png")))
    assert (result.status, result.final_url) == ("ok", server.url("/ok/b.png"))


def test_duplicate_urls_are_requested_once(server, run):
    urls = [server.url("/ok/a.png"), server.url("/ok/b.png")] * 5
    assert len(run(*urls)) == 2
    assert set(server.requests.values()) == {1}


def test_spellings_of_one_request_are_one_download_and_one_url(server, run, tmp_path):
    first = server.url("/ok/a~b.png?c=%26")
    spellings = [
        first,
        *(f"{first}#{i}" for i in range(10)),
        first.replace("http", "HTTP"),
        first.replace("~", "%7e"),
        first.replace("b", "%62"),
        first.replace("/ok", "/no/../ok"),
        f" {first} ",
    ]
    results = run(*spellings)
    assert list(server.requests.values()) == [1]
    assert list(results) == [first]
    assert {results[url].sha256 for url in spellings} == {results[first].sha256}
    # What plans and shards say of a row's image is as it was spelled there.
    assert [results[url].url for url in spellings] == spellings
    assert survey_results(results, num_urls=10).placeholders == {}
    for url in spellings:
        assert run(url)[url].status == "ok"
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert len(ledger) == 1
    assert sum(server.requests.values()) == 1


def test_a_fragment_hides_neither_a_document_nor_its_expected_content(server, run, cache):
    pdf = server.url("/pdf/a.pdf")
    assert one(run(f"{pdf}#page=3")).status == "ok"
    image = server.url("/ok/a.png")
    found = run(f"{image}#1", expected_sha256={image: "0" * 64})
    assert one(found).reason == "sha_mismatch"


def test_equal_contents_of_two_urls_are_one_blob(server, run, cache):
    results = run(server.url("/ok/a.png?1"), server.url("/ok/a.png?2"))
    assert len({result.sha256 for result in results.values()}) == 1
    assert len(blobs_of(cache.root)) == 1


def test_user_agent_is_sent(server, run):
    run(server.url("/ok/a.png"), user_agent="tester (me@example.com)")
    assert server.headers[0]["User-Agent"] == "tester (me@example.com) vlm-shards"


def test_no_urls_give_no_results(run):
    assert run() == {}


# --- how it can fail --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, reason, http_status, requests",
    [
        ("/status/404", "http_404", 404, 1),
        ("/status/403", "http_403", 403, 1),
        ("/status/204", "http_204", 204, 1),
        ("/status/302", "http_302", 302, 1),
        ("/status/500", "http_5xx", 500, 2),
        ("/status/503", "http_5xx", 503, 2),
        ("/status/429", "http_429", 429, 2),
        ("/status/408", "timeout", 408, 2),
        ("/short/a.png", "truncated", 200, 2),
        ("/chop/a.png", "truncated", 200, 2),
        ("/garbage", "protocol", None, 2),
        ("/html", "not_image", 200, 1),
        ("/empty", "empty", 200, 1),
        ("/big", "too_big", 200, 1),
        ("/endless", "too_big", 200, 1),
        ("/to?url=ftp://example.com/a.png", "bad_scheme", None, 1),
        ("/to?url=http://[bad/", "bad_url", None, 1),
    ],
)
def test_failure_has_its_class_and_only_transient_ones_are_retried(
    server, run, cache, path, reason, http_status, requests
):
    result = one(run(server.url(path)))
    assert (result.status, result.reason) == ("failed", reason)
    assert result.http_status == http_status
    assert result.attempts == requests == sum(server.requests.values())
    assert (reason in TRANSIENT) == (requests == 2)
    assert not cache.root.exists()


def test_reset_connection_is_a_connect_failure(server, run):
    assert one(run(server.url("/reset"), attempts=1)).reason == "connect"


@pytest.fixture(scope="module")
def closed_port():
    """A port that refuses connections and that no other process gets, at any address."""
    with socket.socket() as bound:
        bound.bind(("", 0))
        yield bound.getsockname()[1]


def test_closed_port_is_a_connect_failure(run, closed_port):
    assert one(run(f"http://127.0.0.1:{closed_port}/a.png")).reason == "connect"


def test_https_of_a_plain_server_is_a_tls_failure(server, run):
    url = server.url("/ok/a.png").replace("http:", "https:")
    assert one(run(url)).reason == "tls"


def test_unknown_name_is_a_dns_failure(run, fake_dns):
    result = one(run("http://nowhere.test/a.png"))
    assert (result.reason, result.attempts) == ("dns", 2)


def test_silent_server_times_out_and_others_do_not_wait(server, run):
    hanging, good = server.url("/hang"), server.url("/ok/a.png")
    order = []
    results = run(hanging, good, read_timeout_s=0.2, on_result=lambda r: order.append(r.url))
    assert (results[hanging].reason, results[hanging].attempts) == ("timeout", 2)
    assert order == [good, hanging]


def test_slow_drip_ends_at_the_wall_limit(server, run):
    result = one(run(server.url("/drip"), read_timeout_s=5.0, wall_timeout_s=0.3, attempts=1))
    assert (result.status, result.reason) == ("failed", "timeout")  # it would drip for ever


def test_images_above_the_limits_are_bombs(server, run):
    low, enough = (ImageLimits(max_source_side_px=side) for side in (99, 100))
    assert one(run(server.url("/wide"), limits=low)).reason == "bomb"
    assert one(run(server.url("/wide"), limits=low, retry="none")).reason == "bomb"
    assert server.requests["/wide"] == 1
    assert one(run(server.url("/wide"), limits=enough)).status == "ok"


def test_redirect_in_another_encoding_leads_where_its_bytes_say(server, run):
    result = one(run(server.url("/latin/1.png")))
    assert (result.status, result.final_url) == ("ok", server.url("/ok/%E4.png"))


def test_redirect_loop_ends_at_the_limit(server, run):
    result = one(run(server.url("/loop"), max_redirects=3))
    assert (result.status, result.reason, result.attempts) == ("failed", "too_many_redirects", 1)
    assert server.requests["/loop"] == 4


def test_exactly_the_allowed_redirects_are_followed(server, run):
    url = server.url("/to?url=/to%3Furl=/ok/a.png")
    assert one(run(url, max_redirects=1)).reason == "too_many_redirects"
    assert one(run(url, max_redirects=2, retry="all")).status == "ok"


# --- what must not be asked -------------------------------------------------------------------


@pytest.mark.parametrize(
    "url, reason",
    [
        ("ftp://example.com/a.png", "bad_scheme"),
        ("file:///etc/passwd", "bad_scheme"),
        ("data:image/png;base64,AAAA", "bad_scheme"),
        ("images/a.png", "bad_url"),
        ("", "bad_url"),
        ("http://", "bad_url"),
        ("http://h:99999/", "bad_url"),
        ("http://\ud800/", "bad_url"),
        ("http://example.com/\ud800.png", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://2130706433/", "bad_url"),
        ("http://127.1/", "bad_url"),
        ("http://0x7f.0x1/", "bad_url"),
        ("http://0177.0.0.1/", "bad_url"),
        ("http://127.0.0.2/", "private_addr"),
        ("http://127.0.0.2./", "private_addr"),
        ("http://10.1.2.3/", "private_addr"),
        ("http://169.254.169.254/latest/meta-data", "private_addr"),
        ("http://[::1]/", "private_addr"),
        ("http://[::ffff:127.0.0.1]/", "private_addr"),
        ("http://[fe80::1%25eth0]/", "private_addr"),
        ("http://\uff11\uff12\uff17.0.0.1/", "private_addr"),
    ],
)
def test_url_is_refused_without_an_attempt(run, url, reason):
    result = one(run(url, allow_hosts=frozenset()))
    assert (result.status, result.reason, result.attempts) == ("failed", reason, 0)


def test_url_that_only_the_client_refuses_is_a_failure_like_others(server, run):
    url = server.url("/ok/a.png").replace("//", "//\u3002@")  # no Latin-1, so no Basic credentials
    assert one(run(url)).reason == "bad_url"


def test_loopback_is_refused_unless_allowed(server, run):
    assert one(run(server.url("/ok/a.png"), allow_hosts=frozenset())).reason == "private_addr"
    assert not server.requests


def test_name_of_a_private_address_is_refused_unless_allowed(server, run, fake_dns):
    fake_dns["inside.test"] = ["127.0.0.1"]
    url = server.url("/ok/a.png", host="inside.test")
    result = one(run(url))
    assert (result.reason, result.attempts) == ("private_addr", 1)
    assert not server.requests
    assert one(run(url, allow_hosts=frozenset({"inside.test"}), retry="all")).status == "ok"


def test_redirect_to_a_private_address_is_refused(server, run, fake_dns):
    fake_dns["inside.test"] = ["127.0.0.1"]
    by_name = server.url("/ok/a.png", host="inside.test")
    assert one(run(server.url(f"/to?url={by_name}"))).reason == "private_addr"
    assert one(run(server.url("/to?url=http://127.0.0.2/a.png"))).reason == "private_addr"
    assert not [path for path in server.requests if path.startswith("/ok")]


def test_resolver_keeps_the_public_ones_of_mixed_addresses(fake_dns):
    fake_dns["mixed.test"] = ["10.0.0.1", "8.8.8.8", "127.0.0.1"]

    async def resolve(allow_hosts):
        resolver = fetch._PublicResolver(frozenset(allow_hosts))
        return [a["host"] for a in await resolver.resolve("mixed.test", 80, socket.AF_INET)]

    assert asyncio.run(resolve([])) == ["8.8.8.8"]
    assert asyncio.run(resolve(["mixed.test"])) == ["10.0.0.1", "8.8.8.8", "127.0.0.1"]


@pytest.mark.parametrize(
    "url",
    [
        "http://B\u00fccher.example/1",
        "http://xn--bcher-kva.example./2",
        "http://\uff42\u00fccher\u3002example/4",
    ],
)
def test_all_spellings_of_a_host_are_one_host(url):
    assert host_of(url) == host_of("http://b\u00fccher.example")


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


PRIVATE_ADDRESSES = [
    "0.0.0.0",
    "10.0.0.1",
    "100.64.0.1",
    "127.0.0.1",
    "169.254.1.1",
    "172.16.0.1",
    "192.0.2.1",
    "192.168.0.1",
    "198.18.0.1",
    "224.0.1.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b:1::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:a00:1::1",
    "fc00::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def test_credentials_are_sent_but_stay_out_of_everything_written(
    server, run, tmp_path, caplog, capfd
):
    caplog.set_level(logging.DEBUG)
    url = server.url("/ok/a.png").replace("//", "//user:topsecret@")
    broken = server.url("/status/404").replace("//", "//user:topsecret@")
    results = run(url, broken, server.url("/ok/a.png").replace("//", "//user:other@"))
    assert any("Authorization" in headers for headers in server.headers)
    assert results[url].url == url.replace("user:topsecret", "***")
    assert results[url].final_url == server.url("/ok/a.png")
    assert server.requests["/ok/a.png"] == 1  # other credentials make no other URL
    written = (tmp_path / "ledger.jsonl").read_text() + caplog.text + "".join(capfd.readouterr())
    assert "secret" not in written
    assert "secret" not in repr(results.values())


# --- expected contents ------------------------------------------------------------------------


def test_other_content_than_expected_is_refused_under_require(server, run, cache):
    url = server.url("/ok/a.png")
    result = one(run(url, expected_sha256={url: "0" * 64}))
    assert (result.status, result.reason, result.attempts) == ("failed", "sha_mismatch", 1)
    assert result.sha256 == hashlib.sha256(picture("/ok/a.png")).hexdigest()
    assert not cache.has(result.sha256)


def test_expected_content_passes_in_upper_case_too(server, run):
    url = server.url("/ok/a.png")
    want = hashlib.sha256(picture("/ok/a.png")).hexdigest().upper()
    assert one(run(url, expected_sha256={url: want})).status == "ok"


def test_other_content_is_kept_and_marked_under_warn(server, run, cache):
    url = server.url("/ok/a.png")
    result = one(run(url, expected_sha256={url: "0" * 64}, sha_policy="warn"))
    assert (result.status, result.reason) == ("ok", "sha_mismatch")
    assert cache.has(result.sha256)


def test_other_content_is_nothing_under_ignore(server, run):
    url = server.url("/ok/a.png")
    result = one(run(url, expected_sha256={url: "0" * 64}, sha_policy="ignore"))
    assert (result.status, result.reason) == ("ok", "")


def test_mismatch_is_settled_until_the_expectation_goes(server, run):
    url = server.url("/ok/a.png")
    for _ in range(2):
        assert one(run(url, expected_sha256={url: "0" * 64})).reason == "sha_mismatch"
    assert server.requests["/ok/a.png"] == 1
    assert one(run(url)).status == "ok"
    assert server.requests["/ok/a.png"] == 2


def test_ok_of_an_earlier_run_does_not_hide_a_mismatch(server, run):
    url = server.url("/ok/a.png")
    assert one(run(url)).status == "ok"
    assert one(run(url, expected_sha256={url: "0" * 64})).reason == "sha_mismatch"


def test_unknown_sha_policy_is_refused(run):
    with pytest.raises(ConfigError) as caught:
        run(sha_policy="requires")
    assert caught.value.reason == "bad_sha_policy"
    assert "'require'" in caught.value.fix


# --- the second run ---------------------------------------------------------------------------


def test_second_run_asks_for_nothing_that_is_settled(server, run):
    urls = [server.url(path) for path in ("/ok/a.png", "/status/404", "/html", "/big", "/loop")]
    first = run(*urls)
    server.requests.clear()
    seen = []
    assert run(*urls, on_result=seen.append) == first
    assert not server.requests
    assert sorted(seen, key=lambda r: r.url) == sorted(first.values(), key=lambda r: r.url)


def test_second_run_tries_transient_failures_again(server, run):
    url = server.url("/flaky/503/2/a.png")
    assert one(run(url)).reason == "http_5xx"
    assert one(run(url, retry="none")).reason == "http_5xx"
    assert server.requests["/flaky/503/2/a.png"] == 2
    assert one(run(url)).status == "ok"


def test_permanent_failures_are_tried_again_only_on_demand(server, run):
    url = server.url("/flaky/404/1/a.png")
    assert one(run(url)).reason == "http_404"
    assert one(run(url)).reason == "http_404"
    assert one(run(url, retry="all")).status == "ok"
    assert server.requests["/flaky/404/1/a.png"] == 2


def test_a_url_of_half_a_character_leaves_a_ledger_that_can_be_read(run, tmp_path):
    url = "http://example.com/\ud800.png"
    assert run(url)[url].reason == "bad_url"
    (line,) = read_ledger(tmp_path / "ledger.jsonl").values()
    assert run(url)[url] == line


@pytest.mark.parametrize(
    "path, before, same, after",
    [
        ("/ok/a.png", {"max_bytes": 20}, {"max_bytes": 10}, {}),
        ("/to?url=/ok/a.png", {"max_redirects": 0}, {"max_redirects": 0}, {}),
        ("/ok/a.png", {"allow_hosts": frozenset()}, {"allow_hosts": frozenset()}, {}),
    ],
)
def test_what_a_setting_refused_is_requested_when_the_setting_allows_it(
    server, run, path, before, same, after
):
    url = server.url(path)
    assert one(run(url, **before)).status == "failed"
    server.requests.clear()
    assert one(run(url, **same)).status == "failed"
    assert not server.requests
    assert one(run(url, **after)).status == "ok"


@pytest.mark.parametrize("damage", ["delete", "truncate", "flip"])
def test_damaged_blob_is_noticed_and_fetched_again(server, run, cache, damage):
    url = server.url("/ok/a.png")
    result = one(run(url))
    body = cache.get(result.sha256)
    damage_blob(cache.root, result.sha256, damage)
    if damage == "flip":
        with pytest.raises(StorageError):
            cache.get(result.sha256)
    assert one(run(url)) == result
    assert server.requests["/ok/a.png"] == 2
    assert cache.get(result.sha256) == body


def test_torn_ledger_line_costs_one_request(server, run, tmp_path):
    urls = [server.url(f"/ok/{i}.png") for i in range(5)]
    first = run(*urls)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-20])
    server.requests.clear()
    assert run(*urls) == first
    assert sum(server.requests.values()) == 1


# --- manners ----------------------------------------------------------------------------------


def test_host_is_never_asked_more_than_its_limit_at_a_time(server, run):
    run(*[server.url(f"/slow/{i}.png") for i in range(40)], per_host=3, concurrency=32)
    assert server.most_running[""] == 3


def test_limit_of_a_host_holds_after_redirects_from_other_hosts(run):
    hosts = tuple(f"127.0.0.{i}" for i in range(1, 9))
    with FaultyServer(hosts=hosts) as server:
        target = server.url("/slow/a.png", host="127.0.0.1")
        urls = [server.url(f"/to?url={target}?{i}", host=host) for i, host in enumerate(hosts[1:])]
        results = run(*urls, per_host=2, allow_hosts=frozenset(hosts))
        assert {result.status for result in results.values()} == {"ok"}
        assert server.most_running[f"127.0.0.1:{server.ports['127.0.0.1']}"] == 2


@pytest.mark.parametrize("seconds, lookups", [(300, 1), (0, 4)])
def test_the_addresses_of_a_name_are_looked_up_once_or_each_time(
    server, run, monkeypatch, seconds, lookups
):
    asked = []

    def getaddrinfo(host, port, *args, **kwargs):  # noqa: ARG001
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    urls = [server.url(f"/slow/{i}.png", host="pictures.test") for i in range(8)]
    allowed = frozenset({"pictures.test"})
    # Connections stay open, so there are as many as requests at a time.
    results = run(*urls, per_host=4, keepalive_s=60.0, dns_cache_s=seconds, allow_hosts=allowed)
    assert {result.status for result in results.values()} == {"ok"}
    assert asked == ["pictures.test"] * lookups


@pytest.mark.parametrize(
    "videos, max_bytes, status",
    [(False, None, "failed"), (True, None, "ok"), (True, 10, "failed"), (False, 10_000, "ok")],
)
def test_the_largest_file_is_what_was_set_else_it_depends_on_videos(
    server, cache, tmp_path, monkeypatch, videos, max_bytes, status
):
    monkeypatch.setattr(fetch, "MAX_IMAGE_BYTES", 10)
    monkeypatch.setattr(fetch, "MAX_VIDEO_BYTES", 10_000)
    policy = dataclasses.replace(POLICY, max_bytes=max_bytes)
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        urls = [server.url("/ok/a.png")]
        found = fetch_all(urls, cache=cache, ledger=ledger, policy=policy, videos=videos)
    assert one(found).status == status


def test_hosts_are_asked_side_by_side_up_to_the_limit_of_all(run):
    hosts = tuple(f"127.0.0.{i}" for i in range(1, 9))
    with FaultyServer(hosts=hosts) as server:
        urls = [server.url(f"/slow/{i}.png", host=host) for host in hosts for i in range(6)]
        results = run(*urls, per_host=2, concurrency=5, allow_hosts=frozenset(hosts))
        assert len(results) == 48
        assert server.most_running[""] == 5


def test_hanging_host_does_not_hold_up_another(run):
    hosts = ("127.0.0.1", "127.0.0.2")
    with FaultyServer(hosts=hosts) as server:
        hanging = [server.url(f"/hang/{i}", host="127.0.0.1") for i in range(20)]
        good = [server.url(f"/ok/{i}.png", host="127.0.0.2") for i in range(20)]
        order = []
        run(
            *hanging,
            *good,
            attempts=1,
            per_host=2,
            concurrency=4,
            read_timeout_s=1.0,
            host_failures=4,
            allow_hosts=frozenset(hosts),
            on_result=lambda result: order.append(result.status),
        )
        assert order[:20] == ["ok"] * 20


def test_retry_after_is_honoured_by_the_whole_host(server, run):
    limited = "/flaky/429/1/a.png?after=1"
    urls = [server.url(limited)] + [server.url(f"/ok/{i}.png") for i in range(3)]
    results = run(*urls, per_host=1)
    assert {result.status for result in results.values()} == {"ok"}
    first_s, second_s = server.times_s[limited]
    assert second_s - first_s >= 0.95
    quiet = [t for times in server.times_s.values() for t in times if first_s < t < first_s + 0.95]
    assert not quiet


def test_host_that_only_fails_is_left_for_a_later_run(server, run):
    urls = [server.url(f"/status/500?{i}") for i in range(30)]
    results = run(*urls, attempts=1, per_host=1, host_failures=5)
    assert sum(server.requests.values()) == 5 + 1  # as many trials as attempts
    reasons = [result.reason for result in results.values()]
    assert (reasons.count("http_5xx"), reasons.count("host_down")) == (6, 24)
    server.requests.clear()
    run(*urls, attempts=1, host_failures=1000)
    assert sum(server.requests.values()) == 30


def test_work_is_dealt_with_few_tasks_and_few_bodies(server, run):
    most_tasks = 0

    def count(result):
        nonlocal most_tasks
        most_tasks = max(most_tasks, len(asyncio.all_tasks()))

    urls = [server.url(f"/slow/{i}.png") for i in range(50)]
    run(*urls, per_host=20, concurrency=2, on_result=count)
    assert most_tasks <= 4 * 2 + 2 + 1  # workers, attempts, main
    assert server.most_running[""] == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), unique=True), st.randoms())
def test_dealing_loses_no_url_and_does_not_depend_on_their_order(pairs, random_order):
    urls = [f"http://{host}.test/{i}" for host, i in pairs]
    hosts = [(host.name, [*host.urls]) for host in group_by_host(urls)]
    assert sorted(url for _, found in hosts for url in found) == sorted(urls)
    assert all(f"//{name}/" in url for name, found in hosts for url in found)
    random_order.shuffle(urls)
    assert [(host.name, [*host.urls]) for host in group_by_host(urls)] == hosts


# --- offline ----------------------------------------------------------------------------------


IN_TURN = {"concurrency": 1, "per_host": 1}
"""One request at a time: the hosts strictly take turns, so windows hold all of them."""


def offline_urls(port, num_hosts, num_urls):
    """URLs at loopback addresses where nothing listens."""
    hosts = [f"127.0.0.{2 + i % num_hosts}" for i in range(num_urls)]
    urls = [f"http://{host}:{port}/{i}.png" for i, host in enumerate(hosts)]
    return urls, {"host_failures": 1000, "attempts": 1, **IN_TURN, "allow_hosts": frozenset(hosts)}


def test_dead_network_stops_the_run_early(run, tmp_path, closed_port):
    urls, settings = offline_urls(closed_port, num_hosts=10, num_urls=500)
    seen = []
    with pytest.raises(BudgetError) as caught:
        run(*urls, on_result=seen.append, **settings)
    assert caught.value.reason == "looks_offline"
    assert caught.value.facts == {"window": 200, "connect": 200}
    assert len(seen) == 200
    results = read_ledger(tmp_path / "ledger.jsonl")
    assert {result.reason for result in results.values()} == {"offline"}


def test_nothing_of_a_dead_window_is_permanent(run, tmp_path):
    hosts = tuple(f"127.0.0.{i}" for i in range(2, 12))
    with FaultyServer(hosts=hosts) as server:
        # A captive portal: everything is answered, nothing is an image.
        urls = [server.url(f"/html/{i}", host=hosts[i % 10]) for i in range(30)]
        settings = {"breaker_window": 20, **IN_TURN, "allow_hosts": frozenset(hosts)}
        with pytest.raises(BudgetError):
            run(*urls, **settings)
        results = read_ledger(tmp_path / "ledger.jsonl").values()
        assert [result.reason for result in results] == ["offline"] * 20
        with pytest.raises(BudgetError):
            run(*urls, **settings)  # such failures count again
        results = run(*urls, **settings, breaker_success=0.0)
        assert {result.reason for result in results.values()} == {"not_image"}


def test_few_dead_hosts_are_not_a_dead_network(run, closed_port):
    urls, settings = offline_urls(closed_port, num_hosts=9, num_urls=250)
    assert len(run(*urls, **settings)) == 250


def test_known_failures_do_not_stop_a_later_run(run, closed_port):
    urls, settings = offline_urls(closed_port, num_hosts=10, num_urls=220)
    first = run(*urls, **settings, breaker_success=0.0)
    assert run(*urls, **settings) == first


def test_one_success_in_ten_is_enough(run):
    hosts = tuple(f"127.0.0.{i}" for i in range(2, 12))
    with FaultyServer(hosts=hosts) as server:
        good = [server.url("/ok/a.png", host=host) for host in hosts[:2]]
        bad = [server.url("/status/404", host=host) for host in hosts]
        bad += [server.url("/status/410", host=host) for host in hosts[:8]]
        settings = {"breaker_window": 20, **IN_TURN, "allow_hosts": frozenset(hosts)}
        assert len(run(*good, *bad, **settings)) == 20


# --- interruption -----------------------------------------------------------------------------

PROGRAM = """
import sys
from preprocess.fetch import BlobCache, Ledger
from preprocess.fetch.download import FetchPolicy, fetch_all
root, *urls = sys.argv[1:]
policy = FetchPolicy(
    concurrency=4, host_rate=0.0, robots_txt="ignore", allow_hosts=frozenset({"127.0.0.1"})
)
with Ledger(root + "/ledger.jsonl") as ledger:
    fetch_all(urls, cache=BlobCache(root + "/cache"), ledger=ledger, policy=policy)
"""


def start_until_hanging(server, tmp_path):
    """Starts a process that fetches some images and then hangs in some others."""
    urls = [server.url(f"/ok/{i}.png") for i in range(20)]
    urls += [server.url(f"/hang/{i}") for i in range(4)]
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", PROGRAM, str(tmp_path), *urls],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.hanging.wait(60)
    return urls, process


def test_killed_process_leaves_nothing_wrong_and_is_taken_up_where_it_was(
    server, run, cache, tmp_path
):
    urls, process = start_until_hanging(server, tmp_path)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    done = read_ledger(tmp_path / "ledger.jsonl")
    assert {result.status for result in done.values()} <= {"ok"}
    for result in done.values():
        assert cache.get(result.sha256)
    with (tmp_path / "ledger.jsonl").open("a") as stream:
        stream.write('{"url":"http://127.0.0.1/torn')
    server.requests.clear()
    results = run(*urls[:20])
    assert {result.status for result in results.values()} == {"ok"}
    # Requests that the dead process had sent may still come in, but none for what it had done.
    assert set(server.requests).isdisjoint(url[url.index("/ok") :] for url in done)
    for url, result in results.items():
        path = url[url.index("/ok") :]
        assert cache.get(result.sha256) == picture(path)


def test_interrupted_process_ends_cleanly(server, run, cache, tmp_path):
    _, process = start_until_hanging(server, tmp_path)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    for complaint in ("Unclosed", "never", "destroyed", "ResourceWarning"):
        assert complaint not in stderr
    for result in read_ledger(tmp_path / "ledger.jsonl").values():
        assert cache.get(result.sha256)


def test_error_in_the_callback_ends_the_run_and_leaves_no_task(server, run, tmp_path):
    threads = {*threading.enumerate()}  # of other tests, whose last ones may end meanwhile

    def refuse(result):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        run(server.url("/ok/a.png"), server.url("/hang"), on_result=refuse)
    assert {*threading.enumerate()} <= threads
    assert len(read_ledger(tmp_path / "ledger.jsonl")) == 1


def test_callback_that_raised_is_not_called_again(run, closed_port):
    urls, settings = offline_urls(closed_port, num_hosts=10, num_urls=500)
    calls = []

    def refuse(result):
        calls.append(result)
        if len(calls) == 100:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        run(*urls, on_result=refuse, **{**settings, "concurrency": 32, "per_host": 4})
    assert len(calls) == 100


def test_disk_that_refuses_a_blob_ends_the_run_and_blames_no_url(server, run, cache, tmp_path):
    cache.root.mkdir()
    (cache.root / "open").write_text("a file where the directory should be")
    with pytest.raises(StorageError):
        run(server.url("/ok/a.png"))
    assert read_ledger(tmp_path / "ledger.jsonl") == {}


# --- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_images_of_the_usual_formats_are_usable(image_format):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, image_format)
    assert image_fault(buffer.getvalue(), limits=ImageLimits(max_source_side_px=20)) == ""
    assert image_fault(buffer.getvalue(), limits=ImageLimits(max_source_side_px=19)) == "bomb"


def test_limit_of_pixels_is_ours_and_not_pillows():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 9_500)).save(buffer, "PNG")  # 190 MP: Image.open refuses
    limits = ImageLimits(max_decode_bytes=2 * 2**30)
    assert image_fault(buffer.getvalue(), limits=limits) == ""


def test_postscript_is_not_an_image():
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10)).save(buffer, "EPS")
    assert image_fault(buffer.getvalue(), limits=ImageLimits()) == "not_image"


def test_mutilated_headers_never_raise():
    draw = random.Random(7)
    seeds = []
    for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16)).save(buffer, image_format)
        seeds.append(buffer.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            for _ in range(300):
                body = bytearray(seed)
                for _ in range(draw.randint(1, 8)):
                    body[draw.randrange(min(len(body), 120))] = draw.randrange(256)
                body = bytes(body[: draw.randint(1, len(body))])
                fault = image_fault(body, limits=ImageLimits(max_megapixels=1))
                assert fault in ("", "bomb", "empty", "not_image", "incomplete")


@pytest.mark.parametrize(
    "settings",
    [
        {"attempts": 0},
        {"wall_timeout_s": 0.0},
        {"max_redirects": -1},
        {"breaker_success": 1.5},
        {"retry": "some"},
        {"host_rate": -1.0},
        {"robots_txt": "no"},
        {"user_agent": "me\r\nX-Evil: 1"},
    ],
)
def test_policy_out_of_range_is_refused(settings):
    with pytest.raises(ConfigError) as caught:
        FetchPolicy(**settings)
    assert caught.value.reason == "bad_policy"
    assert caught.value.facts == settings
