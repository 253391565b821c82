"""What a server that misbehaves in every way sees of FETCH, and how each URL ends.

Judged from the server's log, in virtual time.
"""

import ast
import dataclasses
import itertools
import socket
from collections import Counter, defaultdict
from pathlib import Path
from typing import get_type_hints

import pytest

from preprocess.fetch import (
    BlobCache,
    FetchPolicy,
    FetchResult,
    Ledger,
    download,
    fetch_all,
    hosts,
    placeholders,
    robots,
    survey_results,
)
from preprocess.fetch.download import TRANSIENT
from preprocess.fetch.hosts import text_key
from preprocess.fetch.robots import Robots, forbids_use
from preprocess.settings import Setting
from tests.preprocess.fetch.virtual_time import virtual_server  # noqa: F401

PLAIN, STRICT, NONE, DOWN, SILENT, SLOW, LIMITED, CLOSED, REFUSED, HURRIED, GARBLED = HOSTS = [
    f"127.0.0.{i}" for i in range(2, 13)
]
RATE, PER_HOST = 4.0, 2
POLICY = FetchPolicy(
    user_agent="testbot/1.0 (me@example.com)",
    allow_hosts=frozenset(HOSTS),
    host_rate=RATE,
    per_host=PER_HOST,
    attempts=3,
    max_bytes=50_000,
    max_redirects=3,
    max_pause_s=120.0,
)
DAY_S = 24 * 3600

PATHS = {
    "/ok/a.png": "ok",
    "/slowly/a.png": "ok",
    "/slowly/b.png": "ok",
    "/slowly/c.png": "ok",
    "/flaky/500/1/a.png": "ok",
    "/flaky/503/1/a.png?after=7": "ok",
    "/to?url=/ok/moved.png": "ok",
    "/status/403": "http_403",
    "/status/404": "http_404",
    "/status/410": "http_410",
    "/status/451": "http_451",
    "/status/204": "http_204",
    "/status/500": "http_5xx",
    "/status/429": "http_429",
    "/status/408": "timeout",
    "/hang": "timeout",
    "/trickle": "timeout",
    "/short/a.png": "truncated",
    "/chop/a.png": "truncated",
    "/close/a.png": "truncated",
    "/garbage": "protocol",
    "/reset": "connect",
    "/html": "not_image",
    "/empty": "empty",
    "/big": "too_big",
    "/endless": "too_big",
    "/loop": "too_many_redirects",
    "/chain/0": "too_many_redirects",
    "/flaky/503/1/b.png?after=soon": "ok",
    "/flaky/503/1/c.png?after=Tue,+14+Nov+2023+22:14:00+GMT": "ok",
    "/cut/a.png": "incomplete",
    "/claims/60000": "bomb",
    "/typed/a.png": "ok",
    "/zipped/a.png": "ok",
    "/inflates": "too_big",
    "/overruns/a.png": "protocol",
    "/heads/a.png": "protocol",
    "/to?url=ftp://example.com/a.png": "bad_scheme",
    "/to?url=http://127.0.0.200/a.png": "private_addr",
    f"/to?url=http://{STRICT}:PORT/secret/a.png": "robots",
    "/header/a.png?X-Robots-Tag=noai": "x_robots",
    "/header/b.png?X-Robots-Tag=otherbot:+noindex": "ok",
    "/header/c.png?TDM-Reservation=1": "x_robots",
}


class Site:
    """The server, and FETCH with one cache and ledger."""

    def __init__(self, server, folder):
        self.server, self.folder = server, folder

    def fetch(self, *urls, again=True, **settings):
        """Fetches URLs; returns how each ended, and the log of this run."""
        self.server.log.clear()
        with Ledger(self.folder / "ledger.jsonl") as ledger:
            results = fetch_all(
                urls,
                cache=BlobCache(self.folder / "cache"),
                ledger=ledger,
                policy=FetchPolicy(**{**{n: getattr(POLICY, n) for n in NAMES}, **settings}),
                clock=self.server.clock,
                again=again,
            )
        return {url: result.reason or "ok" for url, result in results.items()}, [*self.server.log]


NAMES = FetchPolicy.__dataclass_fields__


@pytest.fixture
def site(virtual_server, tmp_path):  # noqa: F811
    return Site(virtual_server(*HOSTS), tmp_path)


def misbehaving(server):
    """Sets up the hosts; returns the class that each URL is to have."""
    server.robots |= {
        PLAIN: (200, "User-agent: *\nDisallow: /private/\nAllow: /private/open/\n"),
        STRICT: (200, "User-agent: testbot\nDisallow: /secret\n\nUser-agent: *\nDisallow: /\n"),
        DOWN: (503, ""),
        SILENT: (0, ""),
        SLOW: (200, "\ufeffUser-agent: *\nCrawl-delay: 5\n"),
        CLOSED: (200, "User-agent: vlm-shards\nDisallow: /\n"),
        REFUSED: (403, "User-agent: *\nDisallow: /\n"),
        HURRIED: (429, ""),
        GARBLED: (200, "\0\ufffd<html>Disallow: /\n" * 100),
    }
    port = str(server.ports[STRICT])
    want = {server.url(p.replace("PORT", port), host=PLAIN): c for p, c in PATHS.items()}
    more = {
        PLAIN: {"/private/a.png": "robots", "/private/open/../b.png": "robots"},
        STRICT: {"/secret/b.png": "robots", "/ok/s.png": "ok"},
        NONE: {"/ok/n.png": "ok"},
        DOWN: {"/ok/1.png": "robots_unreachable", "/ok/2.png": "robots_unreachable"},
        SILENT: {"/ok/1.png": "timeout", "/ok/2.png": "timeout"},
        SLOW: {f"/ok/{i}.png": "ok" for i in range(5)},
        LIMITED: {f"/ok/{i}.png": "ok" for i in range(6)} | {"/flaky/429/1/a?after=30": "ok"},
        CLOSED: {"/ok/1.png": "robots"},
        REFUSED: {"/ok/1.png": "ok"},
        HURRIED: {"/ok/1.png": "robots_unreachable"},
        GARBLED: {"/ok/1.png": "ok"},
    }
    for host, paths in more.items():
        want |= {server.url(path, host=host): reason for path, reason in paths.items()}
    return want


def by_host(log):
    found = defaultdict(list)
    for line in log:
        found[line.host].append(line)
    return found


def test_each_url_has_its_class_and_the_log_shows_good_manners(site):
    want = misbehaving(site.server)
    got, log = site.fetch(*want)
    assert got == want
    seen = by_host(log)

    # Rates and numbers of requests at a time, redirects and robots.txt included.
    for host, lines in seen.items():
        least_s = 5.0 if host == SLOW else 1 / RATE
        gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(lines[host == SLOW :])]
        assert min(gaps, default=least_s) >= least_s - 1e-6, host
        running = [sum(a.at_s <= b.at_s < a.until_s for a in lines) for b in lines]
        assert max(running) <= PER_HOST, host

    # Robots: asked first, once, and held; nothing is requested where it cannot be had.
    for host, lines in seen.items():
        paths = [line.path for line in lines]
        asked = POLICY.attempts if host in (DOWN, SILENT, HURRIED) else 1
        assert (paths[0], paths.count("/robots.txt")) == ("/robots.txt", asked)
    assert not [line for line in log if line.path.startswith(("/private", "/secret"))]
    for host in (DOWN, SILENT, HURRIED, CLOSED):
        assert {line.path for line in seen[host]} == {"/robots.txt"}

    # Retry-After: the whole host is quiet.
    first = next(line for line in seen[LIMITED] if line.path.startswith("/flaky"))
    assert not [line for line in seen[LIMITED] if first.until_s < line.at_s < first.until_s + 30]

    # Nothing twice that is settled, and no more than the attempts otherwise.
    requests = Counter((line.host, line.path) for line in log)
    for url, reason in want.items():
        host, _, path = url.removeprefix("http://").partition(":")
        path = "/" + path.partition("/")[2]
        if reason == "ok" and "flaky" not in path or (reason not in TRANSIENT | {"ok"}):
            assert requests[host, path] <= (4 if path == "/loop" else 1), url
        assert requests[host, path] <= max(POLICY.attempts, 4), url
    assert {line.user_agent for line in log} == {"testbot/1.0 (me@example.com) vlm-shards"}


def test_hosts_that_ask_for_long_delays_hold_up_no_others(site):
    slow, fast = HOSTS[:8], HOSTS[8:10]
    for host in slow:
        site.server.robots[host] = (200, "User-agent: *\nCrawl-delay: 20\n")
    want = {host: 4 for host in slow} | {host: 24 for host in fast}
    urls = [site.server.url(f"/ok/{i}.png", host=host) for host in want for i in range(want[host])]
    got, log = site.fetch(*urls, per_host=2, concurrency=1)
    assert set(got.values()) == {"ok"}
    ends_s = {host: lines[-1].at_s - log[0].at_s for host, lines in by_host(log).items()}
    assert max(ends_s[host] for host in fast) < 12  # 25 requests at 4 a second
    assert max(ends_s[host] for host in slow) < 90  # 4 requests, 20 s apart


def test_later_runs_ask_only_for_what_may_have_changed(site):
    want = misbehaving(site.server)
    site.fetch(*want)
    site.server.now_s += 3600
    got, log = site.fetch(*want)
    assert got == {**want, **{u: "ok" for u, reason in want.items() if "flaky" in u}}
    asked = {site.server.url(line.path, host=line.host) for line in log}
    # What is too large for one run may not be for the next.
    transient = {url for url, reason in want.items() if reason in TRANSIENT | {"bomb"}}
    robots = {site.server.url("/robots.txt", host=host) for host in (DOWN, SILENT, HURRIED)}
    assert asked <= transient | robots
    site.server.now_s += 31 * DAY_S  # failures of any class have expired
    _, log = site.fetch(*want)
    asked = {site.server.url(line.path, host=line.host) for line in log}
    assert {url for url, reason in want.items() if reason.startswith("http_")} <= asked


def test_a_long_pause_leaves_the_host_for_a_later_run_that_holds_it(site):
    others = [site.server.url(f"/ok/{i}.png", host=LIMITED) for i in range(30)]
    # The order of URLs follows from their text, and ports differ: a third comes after this one.
    third = sorted(map(text_key, others))[10]
    named = (site.server.url(f"/flaky/429/1/{i}?after=3600", host=LIMITED) for i in range(999))
    busy = next(url for url in named if text_key(url) > third)
    free = site.server.url("/ok/a.png", host=PLAIN)
    settings = {"per_host": 1, "robots_txt": "ignore"}
    got, log = site.fetch(busy, *others, free, **settings)
    assert got.pop(busy) == "http_429"
    assert got.pop(free) == "ok"
    assert set(got.values()) <= {"ok", "host_busy"}
    left = [url for url, reason in got.items() if reason == "host_busy"]
    assert left
    assert by_host(log)[LIMITED][-1].path.startswith("/flaky")
    site.server.now_s += 1800
    again, log = site.fetch(busy, *others, **settings)
    assert not log
    assert {again[url] for url in left} == {"host_busy"}
    site.server.now_s += 1800
    again, log = site.fetch(busy, *others, **settings)
    assert set(again.values()) == {"ok"}
    assert len(log) == len(left) + 1


def test_a_later_run_holds_the_pause_of_a_host_that_redirects_lead_to(site):
    server = site.server
    busy = f"http://{LIMITED}:{server.ports[LIMITED]}/flaky/429/1/a?after=3600"
    url, other = server.url(f"/to?url={busy}", host=PLAIN), server.url("/ok/a.png", host=PLAIN)
    settings = {"robots_txt": "ignore"}
    assert site.fetch(url, **settings)[0] == {url: "http_429"}
    for _ in range(2):
        server.now_s += 1200
        got, log = site.fetch(url, other, **settings)
        assert got == {url: "host_busy", other: "ok"}  # only the host that has asked is left alone
        assert LIMITED not in by_host(log)
    server.now_s += 1300
    assert site.fetch(url, **settings)[0] == {url: "ok"}


def test_a_host_that_failed_often_is_tried_again_after_pauses(site):
    site.server.down_until_s[PLAIN] = 24.0  # the third pause ends after 28 s or later
    urls = [site.server.url(f"/ok/{i}.png", host=PLAIN) for i in range(30)]
    other = [site.server.url(f"/ok/{i}.png", host=LIMITED) for i in range(20)]
    found, log = site.fetch(*urls, *other, host_failures=3)
    ended = Counter(found[url] for url in urls)
    assert ended["ok"] >= 20
    assert ended.total() - ended["ok"] <= 3 + PER_HOST + 2  # until it opened, and the trials
    assert "host_down" not in ended
    assert {found[url] for url in other} == {"ok"}
    assert max(each.at_s for each in log if each.host == LIMITED) < 6.0  # 4 a second
    # Between the pauses of 4, 8 and 16 s there is one request, or one URL's of robots.txt.
    asked_s = [each.at_s for each in log if each.host == PLAIN]
    pauses_s = [b - a for a, b in itertools.pairwise(asked_s) if b - a > 5.0]
    assert len(pauses_s) == 2
    assert 7.9 < pauses_s[0] < 10.0
    assert 15.9 < pauses_s[1] < 18.0
    assert asked_s[-1] < 60.0


def test_a_host_that_stays_down_is_left_and_asked_at_once_by_the_next_run(site):
    site.server.down_until_s[PLAIN] = 1e9
    urls = [site.server.url(f"/ok/{i}.png", host=PLAIN) for i in range(30)]
    settings = {"robots_txt": "ignore", "host_failures": 3}
    found, log = site.fetch(*urls, **settings)
    ended = Counter(found.values())
    assert ended["http_5xx"] + ended["host_down"] == 30
    assert ended["http_5xx"] <= 3 + PER_HOST + 3
    assert site.server.now_s < 4 + 8 + 16 + 20
    trials = [each for each in log if each.at_s > log[0].at_s + 24.0]
    assert len(trials) == 1
    site.server.down_until_s.clear()
    began_s = site.server.now_s
    found, log = site.fetch(*urls, **settings)
    assert set(found.values()) == {"ok"}
    assert log[0].at_s - began_s < 0.5


def most_at_a_time(log):
    return max(sum(other.at_s <= line.at_s < other.until_s for other in log) for line in log)


def test_a_host_that_is_overrun_gets_half_as_many_requests_at_a_time(site):
    site.server.now_s = 1000.0
    urls = [site.server.url(f"/crowded/3/{i}", host=SLOW) for i in range(40)]
    settings = {"per_host": 8, "host_rate": 0.0, "attempts": 6, "robots_txt": "ignore"}
    found, log = site.fetch(*urls, **settings)
    assert set(found.values()) == {"ok"}
    refused = [line for line in log if line.until_s - line.at_s < 1.0]
    assert len(refused) <= 8 + 4  # at first, and when it gets one more
    assert most_at_a_time(log) <= 4
    urls = [site.server.url(f"/slowly/{i}.png", host=PLAIN) for i in range(60)]
    named = (site.server.url(f"/flaky/503/1/{i}", host=PLAIN) for i in itertools.count())
    last = max(map(text_key, urls))
    once = next(url for url in named if text_key(url) > last)  # the first to be requested
    found, log = site.fetch(once, *urls, host_failures=10, **{**settings, "per_host": 4})
    assert set(found.values()) == {"ok"}
    assert most_at_a_time(log[-20:]) == 4


def test_a_pause_is_held_no_longer_than_was_set(site):
    busy = site.server.url("/flaky/429/1/a?after=3600", host=LIMITED)
    settings = {"robots_txt": "ignore", "longest_pause_s": 600.0}
    assert site.fetch(busy, **settings)[0] == {busy: "http_429"}
    site.server.now_s += 300
    assert site.fetch(busy, **settings)[0] == {busy: "host_busy"}
    site.server.now_s += 600
    assert site.fetch(busy, **settings)[0] == {busy: "ok"}


def test_only_as_much_of_robots_txt_is_read_as_was_set(site):
    site.server.robots[SLOW] = (200, "User-agent: *\nDisallow: /a\nDisallow: /ok\n")
    url = site.server.url("/ok/1.png", host=SLOW)
    assert site.fetch(url, robots_bytes=30)[0] == {url: "ok"}
    other = site.server.url("/ok/2.png", host=SLOW)
    assert site.fetch(other)[0] == {other: "robots"}


def test_every_limit_of_the_module_that_requests_is_a_setting():
    """Numbers of modules are the defaults of settings, units, or named here with what they are."""
    known = {
        "MAX_IMAGE_BYTES": "default of MAX_DOWNLOAD",
        "MAX_VIDEO_BYTES": "the same",
        "_DAY_S": "a unit",
        "_LOOK_AGAIN_S": "how soon an idle task sees what has changed",
        "_ROBOTS_IN_MEMORY": "files of which more are read again from the cache",
        "_WORKERS_PER_SLOT": "tasks, which request nothing by themselves",
    }
    found = set()
    for module in (download, hosts, robots, placeholders):
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(
                getattr(module, node.targets[0].id, None), (int, float)
            ):
                found.add(node.targets[0].id)
    assert found == set(known)
    hints = get_type_hints(FetchPolicy, include_extras=True)
    for each in dataclasses.fields(FetchPolicy):
        assert isinstance(hints[each.name].__metadata__[0], Setting)


def test_an_opt_out_that_was_ignored_is_obeyed_when_asked_to(site):
    site.server.robots[PLAIN] = (200, "User-agent: *\nDisallow: /ok/\n")
    url = site.server.url("/ok/a.png", host=PLAIN)
    assert site.fetch(url)[0] == {url: "robots"}
    assert site.fetch(url, robots_txt="ignore")[0] == {url: "ok"}
    assert site.fetch(url)[0] == {url: "robots"}
    tagged = site.server.url("/header/a.png?X-Robots-Tag=noindex", host=NONE)
    assert site.fetch(tagged)[0] == {tagged: "x_robots"}
    assert site.fetch(tagged, x_robots_tag="ignore")[0] == {tagged: "ok"}
    assert site.fetch(tagged)[0] == {tagged: "x_robots"}


INSIDE = "inside.test"
"""A name whose address is private."""
MOVED = "/to?url=/ok/moved.png"
THROUGH = f"/to?url=http://{INSIDE}:PORT/to?url=http://{PLAIN}:PORT/ok/a.png"
NO_HOST, BOTH = frozenset(), frozenset({PLAIN, INSIDE})
TAGGED = "/header/a.png?X-Robots-Tag=noai"
JUDGED = [
    # setting, URL, other settings with which it is kept, and refused, class
    ("allow_hosts", f"http://{PLAIN}:PORT/ok/a.png", {}, {"allow_hosts": NO_HOST}, "private_addr"),
    ("allow_hosts", f"http://{INSIDE}:PORT/ok/a.png", {"allow_hosts": BOTH}, {}, "private_addr"),
    ("allow_hosts", f"http://{PLAIN}:PORT{THROUGH}", {"allow_hosts": BOTH}, {}, "private_addr"),
    ("robots_txt", "/ok/no/a.png", {"robots_txt": "ignore"}, {"x_robots_tag": "ignore"}, "robots"),
    ("x_robots_tag", TAGGED, {"x_robots_tag": "ignore"}, {"robots_txt": "ignore"}, "x_robots"),
    ("max_bytes", "/ok/a.png", {}, {"max_bytes": 20}, "too_big"),
    ("max_redirects", MOVED, {}, {"max_redirects": 0}, "too_many_redirects"),
]
"""Settings that apply to what earlier runs have kept, of this dataset or another."""
OF_REQUESTS = {
    "user_agent": "other",
    "robots_age_s": 1.0,
    "robots_bytes": 1,
    "per_host": 1,
    "host_rate": 0.01,
    "concurrency": 1,
    "max_pause_s": 1.0,
    "longest_pause_s": 1.0,
    "host_failures": 1,
    "attempts": 1,
    "backoff_s": 0.0,
    "connect_timeout_s": 0.1,
    "read_timeout_s": 0.1,
    "wall_timeout_s": 0.1,
    "dns_cache_s": 0,
    "keepalive_s": 0.1,
    "pack_bytes": 1,
    "breaker_window": 1,
    "breaker_hosts": 1,
    "breaker_success": 1.0,
}
"""Settings of requests: what is kept needs none."""
OF_OTHERS = {
    "retry": "of failures",
    "failures_expire_days": "of failures",
    "sha256": "PLAN compares what is kept too",
    "placeholder_urls": "PLAN counts what is kept too",
}


def test_of_every_setting_it_is_known_whether_it_applies_to_what_is_kept():
    groups = [{row[0] for row in JUDGED}, OF_REQUESTS, OF_OTHERS]
    assert sorted(name for names in groups for name in names) == sorted(NAMES)


def test_settings_of_requests_change_nothing_of_what_is_kept(site):
    urls = [site.server.url(path) for path in ("/ok/a.png", MOVED)]
    want = dict.fromkeys(urls, "ok")
    assert site.fetch(*urls)[0] == want
    assert site.fetch(*urls, **OF_REQUESTS) == (want, [])


@pytest.mark.parametrize("url, kept, refused, reason", [row[1:] for row in JUDGED])
def test_what_an_earlier_run_has_kept_is_judged_as_if_it_were_requested(
    site, monkeypatch, url, kept, refused, reason
):
    address = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (PLAIN, site.server.ports[PLAIN]))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [address])
    site.server.robots[PLAIN] = (200, "User-agent: *\nDisallow: /ok/no/\n")
    url = url.replace("PORT", str(site.server.ports[PLAIN]))
    url = url if url.startswith("http") else site.server.url(url)
    assert site.fetch(url, **kept)[0] == {url: "ok"}
    assert site.fetch(url, **kept) == ({url: "ok"}, [])
    assert site.fetch(url, **refused, again=False) == ({url: "ok"}, [])
    assert site.fetch(url, **refused)[0] == {url: reason}
    assert site.fetch(url, **refused) == ({url: reason}, [])
    assert site.fetch(url, **refused, again=False) == ({url: reason}, [])
    assert site.fetch(url, **kept, again=False)[0] == {url: "ok"}


def test_what_was_never_kept_stays_refused_where_a_split_is_repaired(site):
    url = site.server.url("/ok/a.png")
    assert site.fetch(url, max_bytes=20)[0] == {url: "too_big"}
    assert site.fetch(url, again=False) == ({url: "too_big"}, [])
    assert site.fetch(url)[0] == {url: "ok"}


def test_what_older_ledgers_do_not_say_counts_as_allowed(site):
    old = {"status": "ok", "sha256": BlobCache(site.folder / "cache").put(b"x"), "num_bytes": 1}
    by_name = FetchResult(url=f"http://{INSIDE}/a", final_url=f"http://{INSIDE}/b", **old)
    ignored = FetchResult(url=f"http://{INSIDE}/c", opt_outs_ignored=True, **old)
    addresses = [
        FetchResult(url=f"http://{PLAIN}/a", **old),
        FetchResult(url=f"http://{INSIDE}/d", final_url=f"http://{PLAIN}/a", **old),
    ]
    with Ledger(site.folder / "ledger.jsonl") as ledger:
        for each in (by_name, ignored, *addresses):
            ledger.append(each)
    assert site.fetch(by_name.url, allow_hosts=NO_HOST) == ({by_name.url: "ok"}, [])
    assert site.fetch(ignored.url, x_robots_tag="ignore") == ({ignored.url: "ok"}, [])
    for each in addresses:
        assert site.fetch(each.url) == ({each.url: "ok"}, [])
        assert site.fetch(each.url, allow_hosts=NO_HOST)[0] != {each.url: "ok"}


@pytest.mark.parametrize("settings, kept_s", [({}, DAY_S), ({"robots_age_s": 3600.0}, 3600)])
def test_robots_txt_is_kept_for_a_day_or_as_long_as_was_set(site, settings, kept_s):
    urls = [site.server.url(f"/ok/{i}.png", host=SLOW) for i in range(3)]
    site.server.robots[SLOW] = (200, "User-agent: *\nDisallow: /private\n")
    for url, later_s, asked in ((urls[0], 0, 1), (urls[1], kept_s - 60, 0), (urls[2], 120, 1)):
        site.server.now_s += later_s
        _, log = site.fetch(url, **settings)
        assert [line.path for line in log].count("/robots.txt") == asked


def test_few_robots_txt_are_in_memory_and_each_is_requested_once(site, monkeypatch):
    monkeypatch.setattr(download, "_ROBOTS_IN_MEMORY", 2)
    get, read = BlobCache.get, []
    monkeypatch.setattr(BlobCache, "get", lambda self, sha: read.append(sha) or get(self, sha))
    paths = {f"/{kind}/{i}.png": c for i in "ab" for kind, c in (("ok", "ok"), ("no", "robots"))}
    want = {}
    for host in (PLAIN, STRICT, NONE, LIMITED):
        site.server.robots[host] = (200, "User-agent: *\nDisallow: /no\n")
        want |= {site.server.url(path, host=host): reason for path, reason in paths.items()}
    site.server.robots[DOWN] = (503, "")
    want |= {site.server.url(f"/ok/{i}", host=DOWN): "robots_unreachable" for i in range(3)}
    got, log = site.fetch(*want, per_host=1, concurrency=1)
    assert got == want
    assert len(read) > 4
    asked = Counter(line.host for line in log if line.path == "/robots.txt")
    assert asked == {PLAIN: 1, STRICT: 1, NONE: 1, LIMITED: 1, DOWN: POLICY.attempts}


def test_placeholders_are_found_among_the_results(site):
    gone = [site.server.url(f"/gone/{i}.png", host=NONE) for i in range(5)]
    good = [site.server.url(f"/ok/{i}.png", host=NONE) for i in range(5)]
    with Ledger(site.folder / "ledger.jsonl") as ledger:
        results = fetch_all(
            gone + good, cache=BlobCache(site.folder / "cache"), ledger=ledger, policy=POLICY
        )
    survey = survey_results(results, num_urls=5)
    assert [*survey.placeholders.values()] == [(5, gone[0])]
    assert {survey.results[url].reason for url in gone} == {"placeholder"}
    assert {survey.results[url].status for url in good} == {"ok"}
    for num_urls in (0, 6):
        assert survey_results(results, num_urls=num_urls).results == results


# --- robots.txt, by RFC 9309 ------------------------------------------------------------------

CASES = [
    # text, path, allowed
    ("", "/a", True),
    ("User-agent: *\nDisallow:", "/a", True),
    ("User-agent: *\nDisallow: /", "/a", False),
    ("User-agent: *\nDisallow: /", "/robots.txt", True),
    ("user-AGENT: TestBot\ndisallow: /", "/a", False),
    ("User-agent: other\nDisallow: /", "/a", True),
    ("User-agent: testbots\nDisallow: /", "/a", True),
    ("User-agent: TestBot/1.0 (old)\nDisallow: /", "/a", False),
    ("User-agent: test\nAllow: /\nUser-agent: *\nDisallow: /", "/a", False),
    ("User-agent: vlm\nDisallow: /", "/a", True),
    ("User-agent: testbot\nDisallow: /a\nUser-agent: vlm-shards\nDisallow: /b", "/a", False),
    ("User-agent: testbot\nAllow: /\nUser-agent: *\nDisallow: /", "/a", True),
    ("User-agent: vlm-shards\nDisallow: /\nUser-agent: *\nAllow: /", "/a", False),
    ("User-agent: testbot\nDisallow: /a\nUser-agent: testbot\nDisallow: /b", "/b", False),
    ("User-agent: testbot\nUser-agent: other\nDisallow: /a", "/a", False),
    ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),
    ("User-agent: *\nAllow: /a/b\nDisallow: /a", "/a/b/c", True),
    ("User-agent: *\nAllow: /a\nDisallow: /a", "/a", True),
    ("User-agent: *\nDisallow: /*.png$", "/x/y.png", False),
    ("User-agent: *\nDisallow: /*.png$", "/x/y.png?size=2", True),
    ("User-agent: *\nDisallow: /A", "/a", True),
    ("User-agent: *\nDisallow: /%7Ejoe", "/~joe/a.png", False),
    ("User-agent: *\nDisallow: /a%2Fb", "/a/b", True),
    ("User-agent: *\nSitemap: http://h/s.xml\nDisallow: /a", "/a", False),
    ("User-agent: * # all\n\nDisallow: /a # this", "/a", False),
    ("\ufeffUser-agent: *\nDisallow: /a", "/a", False),
    ("<html>not found</html>", "/a", True),
    ("User-agent: *\nDisallow: /a\r\nDisallow: /b", "/b", False),
    ("User-agent: *\nDisallow: /" + "*a" * 20 + "b", "/" + "a" * 60, True),
]


@pytest.mark.parametrize("text, path, allowed", CASES)
def test_robots_txt_is_read_as_the_standard_says(text, path, allowed):
    robots = Robots(text.encode(), "TestBot/2.0 (me@example.com)", 10_000)
    assert robots.allows(f"http://h{path}") == allowed


def test_a_huge_robots_txt_is_read_up_to_its_last_whole_line():
    line = b"Disallow: /nothing/of/this\n"
    body = b"User-agent: *\nDisallow: /a\n" + line * 100 + b"Disallow: /b\n"
    robots = Robots(body, "me", 100 * len(line))
    assert not robots.allows("http://h/a")
    assert robots.allows("http://h/b")


@pytest.mark.parametrize(
    "value, forbidden",
    [
        ("noai", True),
        ("NoImageAI, nofollow", True),
        ("none", True),
        ("nofollow, noarchive", False),
        ("testbot: noindex", True),
        ("otherbot: noindex, nofollow", False),
        ("otherbot: nofollow, testbot: noimageindex", True),
        ("unavailable_after: Fri, 25 Jun 2010 15:00:00 PST, noai", True),
        ("max-image-preview: none", False),
    ],
)
def test_x_robots_tag_counts_where_it_is_for_us(value, forbidden):
    assert forbids_use({"x-robots-tag": [value]}, user_agent="TestBot/2") == forbidden
