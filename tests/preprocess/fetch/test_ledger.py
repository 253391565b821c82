"""Ledgers, lists of URLs and counts of results: what dicts would give, in less memory."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from preprocess.fetch import (
    FetchResult,
    FetchResults,
    Ledger,
    UrlSpool,
    decode_result,
    encode_result,
    read_ledger,
    redact,
    survey_results,
    unique_urls,
    urls,
)
from preprocess.fetch.hosts import group_by_host
from preprocess.fetch.urls import request_of
from preprocess.hash_table import HashTable
from preprocess.job.planner import image_urls

texts = st.text(st.characters(), max_size=12) | st.text('a"\\\n\r\0\x7fé\ud800', max_size=6)
addresses = st.builds(
    lambda user, host, path, key: f"http://{user}{host}/{path}{key}",
    st.sampled_from(["", "me:secret@", "you:other@"]),
    st.sampled_from("ab"),
    st.sampled_from("xyz") | texts,
    st.sampled_from(["", "?key=1", "?key=2"]),
)
numbers = st.integers(0, 2**63)
results = st.builds(
    FetchResult,
    url=addresses.map(redact),
    status=st.sampled_from(["ok", "failed"]),
    reason=st.sampled_from(["", "http_404"]) | texts,
    http_status=st.none() | st.integers(0, 999),
    sha256=st.none() | st.sampled_from([digit * 64 for digit in "0af"]),
    num_bytes=numbers,
    attempts=st.integers(0, 9),
    content_type=texts,
    final_url=texts,
    finished_unix_s=numbers,
    not_before_unix_s=numbers,
    limit=numbers,
    opt_outs_ignored=st.booleans(),
    ignored_opt_outs=st.sampled_from(["", "robots_txt", "robots_txt,x_robots_tag"]),
    num_redirects=st.integers(0, 2),
    private_hosts=texts,
)


@settings(max_examples=40)
@given(results)
def test_a_result_is_read_as_it_was_written(result):
    assert decode_result(encode_result(result)) == result
    assert decode_result(json.dumps(asdict(result)).encode() + b"\n") == result


@settings(max_examples=20)
@given(st.data())
def test_a_ledger_is_a_dict_of_the_last_results(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    runs = data.draw(st.lists(st.lists(results, max_size=6), max_size=3))
    want = {}
    for appended in runs:
        with Ledger(path) as ledger:
            assert [*ledger] == [*want.values()]
            for result in appended:
                ledger.append(result)
                want[request_of(result.url)] = result
                assert ledger.get(result.url) == result
            known = ledger.results
        named = {result.url: result for result in want.values()}
        assert known == named  # after the ledger is closed, too
        assert [*known] == [*named]
        torn = encode_result(data.draw(results))
        with path.open("ab") as stream:
            stream.write(torn[: data.draw(st.integers(0, len(torn) - 1))])
        assert read_ledger(path) == named
        assert [*read_ledger(path).values()] == [*want.values()]
    for url in data.draw(st.lists(addresses)):
        if runs:
            found = want.get(request_of(url))
            # Whoever asks for a result sees it under the spelling that he knows.
            assert read_ledger(path).get(url) == (found and replace(found, url=redact(url)))


@settings(max_examples=40)
@given(st.lists(addresses), st.sampled_from([1, 30, 2**20]))
def test_a_list_of_urls_has_each_once_in_order(given_urls, held_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls, "_HELD_BYTES", held_bytes)  # in a file, partly, or in memory
        patch.setattr(urls, "_READ_BYTES", 7)
        spool, want = unique_urls(given_urls), {}
        for url in given_urls:
            want.setdefault(request_of(url), url)
        assert [*spool] == [*spool] == [*want.values()]
        assert len(spool) == len(want)
        again = UrlSpool()
        places = [(again.add(each), each) for each in given_urls]
        assert all(again.at(place) == each for place, each in places)


parts_of_urls = st.text("aZ0.-_~/%:@?&=#+ é[]\\\ud800", max_size=9) | st.sampled_from(
    ["", "h", "xn--h", ":80", ":443", "%7e", "/a/../b", "/.", "[::1]", "?", "#f", "http:", "https:"]
)


@settings(max_examples=60)
@given(
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", ""]),
    st.lists(parts_of_urls, max_size=4).map("".join),
)
def test_a_request_is_what_the_client_would_send(scheme, rest):
    url = f"{scheme}{rest}"
    request = request_of(url)
    assert request == request_of(redact(url))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls, "_SENT_AS_IT_IS", re.compile("(?!)"))
        assert request_of(url) == request
    try:
        sent = URL(redact(url).strip())
    except ValueError:
        return
    if scheme not in ("", "ftp://") and sent.raw_host and "\\" not in redact(url):
        again = URL(request)
        assert again.raw_path_qs == sent.raw_path_qs
        assert (again.scheme, again.raw_host, again.port) == (sent.scheme, sent.raw_host, sent.port)


@settings(max_examples=30)
@given(st.lists(results, max_size=30), st.integers(0, 4), st.sets(addresses.map(redact)))
def test_contents_are_counted_as_by_hand(found, num_urls, ignored):
    known = {result.url: result for result in found}
    survey = survey_results(known, num_urls=num_urls, ignored=ignored)
    own = {url: result for url, result in known.items() if url not in ignored}
    good = [each for each in own.values() if each.status == "ok" and each.sha256]
    gives = Counter(each.sha256 for each in good)
    gone = {sha256: n for sha256, n in gives.items() if num_urls and n >= num_urls}
    assert survey.placeholders == {
        sha256: (n, min(each.url for each in good if each.sha256 == sha256))
        for sha256, n in gone.items()
    }
    marked = {
        url: replace(each, status="failed", reason="placeholder")
        if url in own and each.status == "ok" and each.sha256 in gone
        else each
        for url, each in known.items()
    }
    assert dict(survey.results) == marked
    failed = Counter(marked[url].reason for url in own if marked[url].status == "failed")
    assert (survey.num_urls, survey.failed) == (len(own), failed)
    shared = [n for sha256, n in gives.items() if n > 1 and sha256 not in gone]
    assert (survey.num_shared, survey.num_sharing) == (len(shared), sum(shared))


@pytest.mark.parametrize("number", range(13))
def test_few_contents_are_no_placeholders(number):
    """Also where they are more than half of what makes one, but not all."""
    known = {
        f"http://h/{i}": FetchResult(url=f"http://h/{i}", status="ok", sha256=f"{i:064x}"[::-1])
        for i in range(number)
    }
    assert dict(survey_results(known, num_urls=10).results) == known


@given(st.lists(st.integers(0, 2000)), st.sampled_from([8, 16, 32]))
def test_hashes_are_numbered_as_they_come(found, num_bytes):
    table, want = HashTable(num_bytes), {}
    for number in found:
        hashed = number.to_bytes(num_bytes, "big")
        assert (hashed in table) == (hashed in want)
        assert table.add(hashed) == want.setdefault(hashed, len(want)) == table.find(hashed)
    assert [table[i] for i in range(len(table))] == [*want]


class Rows(list):
    def held_out(self):
        return iter(())


def test_nothing_of_many_urls_is_in_dicts_or_lists(tmp_path):
    """Beside arrays and what is on the disk, FETCH and PLAN hold no object for a URL."""
    source = [f"http://h{i % 3}.example.org/{i}.jpg" for i in range(3000)]
    dataset = [{"image": url, "message_list": []} for url in source]
    job = SimpleNamespace(dataset=Rows(dataset), examples=range(3000))
    report = SimpleNamespace(stage=lambda *_: None, step=lambda *_: None)
    spool = image_urls(job, report, folder=str(tmp_path))
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        for url in spool:
            ledger.append(FetchResult(url=url, status="ok", sha256="0" * 64))
    hosts = group_by_host(spool)
    held = FetchResults(spool, ledger.results)
    for each in (spool, held, ledger, ledger.results, survey_results(held, num_urls=0), *hosts):
        assert most_objects(each, set()) < 50
    assert most_objects({"a": [dict.fromkeys(source)]}, set()) == 3000


def most_objects(value, seen):
    """Gives the length of the longest container of objects that something holds."""
    if id(value) in seen or isinstance(value, (type, int, str, bytes, bytearray)):
        return 0
    seen.add(id(value))
    slots = [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
    fields = {**getattr(value, "__dict__", {}), **{n: getattr(value, n, None) for n in slots}}
    inside, own = [*fields.values()], 0
    if isinstance(value, dict):
        inside, own = [*value, *value.values()], len(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside, own = [*value], len(value)
    return max([own, *(most_objects(each, seen) for each in inside)])


MEMORY = """
import resource, sys, tempfile
from preprocess.fetch import FetchResult, FetchPolicy, BlobCache, Ledger, encode_result
from preprocess.fetch import fetch_all, survey_results, unique_urls
root, number = sys.argv[1], int(sys.argv[2])
def each():
    for i in range(number):
        yield f"http://host{i % 97}.example.com/a/path/as/long/as/others/{i}.jpg"
with open(root + "/ledger.jsonl", "wb") as stream:
    for i, url in enumerate(each()):
        stream.write(encode_result(FetchResult(
            url=url, status="failed", reason="http_404", sha256=f"{i:064x}", final_url=url)))
spool = unique_urls(each(), root)
with Ledger(root + "/ledger.jsonl") as ledger:
    policy = FetchPolicy(retry="none")
    results = fetch_all(spool, cache=BlobCache(root), ledger=ledger, policy=policy)
survey = survey_results(results, num_urls=10)
assert survey.failed == {"http_404": number} and all(results[url].attempts == 0 for url in spool)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_further_url_costs_less_than_a_hundred_bytes(tmp_path):
    peaks = []
    for number in (1000, 200_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, "-c", MEMORY, str(folder), str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 199_000 * 100
