"""Jobs in parts: who may join, what the parts agree on, and that the bytes are those of one run."""

import hashlib
import itertools
import json
import os
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.fetch import (
    FetchPolicy,
    FetchResult,
    Ledger,
    download,
    host_key,
)
from preprocess.job import fetching, lease, part_run, read_status
from preprocess.job.board import MAX_REASONS, MAX_SLOWEST, Board
from preprocess.job.engines.engine import node_proof
from preprocess.job.job import Job, JobSettings
from preprocess.job.lease import LEASE_NAME, output_lock, part_name, parts_folder, read_lease
from preprocess.job.part_run import run_part
from preprocess.job.parts import PartOfJob, join_job
from preprocess.job.pipeline import commit_job, run_job
from preprocess.job.plan import MAX_PARTS, Part, parse_part
from preprocess.recipe import Recipe
from preprocess.text import TextPolicy
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, ShardsError, StorageError
from tests.inline import Processes, Quiet, cluster
from tests.odd_disks import lack, remember

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leases that beat ten times a second.

    They expire as late as those of real jobs: on a busy machine, a renewal may last for seconds.
    """
    monkeypatch.setattr(lease, "BEAT_S", 0.1)
    monkeypatch.setattr(part_run, "POLL_S", 0.02)


@pytest.fixture
def expiring(monkeypatch):
    """Leases that are dead after a second, for tests that wait until one is."""
    monkeypatch.setattr(lease, "TTL_S", 1.0)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(params=["local", slow("s3"), slow("gcs")])
def place(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path)
        return
    server = request.getfixturevalue(f"{request.param}_server")
    with server.entered():
        yield f"{server.bucket}/{tmp_path.name}"


def settings(tmp_path, part=None, *, out=None, seed=0, **more):
    return JobSettings(
        **{
            "dataset": "text_sft",
            "source": "sample",
            "limit": 10,
            "num_shards": 5,
            "out": out or str(tmp_path / "out"),
            "cache": str(tmp_path / "cache"),
            "part": part and parse_part(part),
            "part_wait_s": 0.0,
            "own_disk": "allow",
            "recipe": Recipe(text=TextPolicy(num_variants=1), seed=seed),
            **more,
        }
    )


def run(chosen):
    return run_part(chosen, Quiet())


def names(out):
    return [each.name for each in storage.list_objects(out)]


# --- the rule


@given(count=st.integers(1, 70), num_shards=st.integers(0, 300))
def test_each_shard_belongs_to_one_part_and_parts_differ_by_one_shard_at_most(count, num_shards):
    dealt = [Part(index=index, count=count).shards(num_shards) for index in range(count)]
    assert sorted(shard for mine in dealt for shard in mine) == [*range(num_shards)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@given(st.lists(st.from_regex(r"[a-z]{1,8}\.(com|org)", fullmatch=True), max_size=30))
def test_all_urls_of_a_host_belong_to_one_part(hosts):
    for host in hosts:
        urls = [f"http://{host}/{i}" for i in range(3)]
        urls += [f"https://me:pw@{host.upper()}:8080/x", f"http://{host}./y"]
        owners = {i for i in range(7) for u in urls if Part(index=i, count=7).has_host(host_key(u))}
        assert len(owners) == 1


@pytest.mark.parametrize(
    "text", ["", "3", "3/3", "-1/3", "1/0", "a/b", "1/3/4", "0x1/3", "1.0/3", f"0/{MAX_PARTS + 1}"]
)
def test_what_is_not_a_part_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_part(text)
    assert caught.value.reason == "part_text"


def test_a_part_does_not_replace_what_others_have_built(tmp_path):
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, "0/2", force=True)
    assert caught.value.reason == "part_force"


# --- the bytes


_KNOWN = []


@pytest.fixture
def undisturbed(tmp_path):
    """The sha256 of the manifest that one process makes."""
    if not _KNOWN:
        out = str(tmp_path / "one")
        _KNOWN.append(run_job(settings(tmp_path, out=out), Quiet()).result.sha256)
    return _KNOWN[0]


@pytest.mark.parametrize("order", [(0, 1, 2), pytest.param((2, 0, 1), marks=pytest.mark.slow)])
def test_the_last_of_the_parts_commits_the_bytes_of_one_run(tmp_path, place, undisturbed, order):
    out = f"{place}/out"
    outcomes = [run(settings(tmp_path, f"{index}/3", out=out)) for index in order]
    assert [each.result and each.result.sha256 for each in outcomes] == [None, None, undisturbed]
    assert sum(each.built_shards for each in outcomes) == 5
    assert [each.missing_shards for each in outcomes] == [
        *(3 if order[0] < 2 else 4, 1 if order[0] < 2 else 2, 0),
    ]
    left = [name for name in names(out) if name.split("/")[0] not in ("train", "receipts")]
    assert left == ["manifest.json", "plan/train.json", "run.json", "tokenizer/tokenizer.json"]
    assert not (tmp_path / "cache" / "tokens").exists() or names(f"{tmp_path}/cache/tokens") == []
    again = run(settings(tmp_path, "1/3", out=out))
    assert (again.result.sha256, again.fresh) == (undisturbed, False)


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_parts_that_start_together_agree_on_one_plan(tmp_path, place, undisturbed):
    out, outcomes, plans = f"{place}/out", {}, []
    real = part_run.make_plan

    def make_plan(*args, **more):
        plans.append(1)
        return real(*args, **more)

    def come(index):
        try:
            outcomes[index] = run(settings(tmp_path, f"{index}/4", out=out)).result
        except ShardsError as error:
            outcomes[index] = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_run, "make_plan", make_plan)
        threads = [threading.Thread(target=come, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    results = [each for each in outcomes.values() if each is not None]
    assert {getattr(each, "sha256", each) for each in results} == {undisturbed}
    assert len(plans) == 1


def test_one_process_finishes_what_parts_have_begun_and_the_other_way_round(tmp_path, undisturbed):
    run(settings(tmp_path, "1/3"))
    whole = run_job(settings(tmp_path), Quiet())
    assert (whole.result.sha256, whole.built_shards) == (undisturbed, 3)
    assert LEASE_NAME not in names(str(tmp_path / "out"))
    other = str(tmp_path / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.job.pipeline.commit", _killed)
        with pytest.raises(KeyboardInterrupt):
            run_job(settings(tmp_path, out=other), Quiet())
    assert run(settings(tmp_path, "0/3", out=other)).result.sha256 == undisturbed


def _killed(*args, **more):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "error", [StorageError("cache_not_shared.part", where="cache", part="1/3"), FileNotFoundError()]
)
def test_what_a_part_misses_after_the_commit_of_another_is_no_failure(
    tmp_path, undisturbed, monkeypatch, error
):
    def work(*args):
        raise error

    run_job(settings(tmp_path), Quiet())
    real, not_yet = part_run.committed, iter([None])
    monkeypatch.setattr(part_run, "committed", lambda job: next(not_yet, real(job)))
    monkeypatch.setattr(part_run, "_work", work)
    assert run(settings(tmp_path, "1/3")).result.sha256 == undisturbed


def test_the_verb_commit_completes_what_nobody_has_committed(tmp_path, undisturbed):
    with pytest.raises(StorageError) as caught:
        commit_job(settings(tmp_path), Quiet())
    assert caught.value.reason == "commit_unfinished"
    run(settings(tmp_path, "0/2"))
    with pytest.raises(StorageError) as caught:
        commit_job(settings(tmp_path), Quiet())
    assert (caught.value.reason, caught.value.facts["missing"]) == ("commit_unfinished", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_run, "commit", _killed)
        with pytest.raises(KeyboardInterrupt):
            run(settings(tmp_path, "1/2"))
    assert commit_job(settings(tmp_path), Quiet()).result.sha256 == undisturbed
    assert commit_job(settings(tmp_path), Quiet()).fresh is False


@pytest.mark.parametrize(("first", "step"), [(1, 9), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_parts_killed_at_any_change_of_storage_end_in_the_same_bytes(
    tmp_path, undisturbed, monkeypatch, first, step
):
    """Of the part that plans (0/2), and of the one that commits (1/2)."""
    monkeypatch.setattr(lease, "BEAT_S", 60.0)  # only the changes of the work itself are counted
    processes = Processes(monkeypatch)
    killed = 0
    for part, before in (("0/2", ()), ("1/2", ("0/2",))):
        at = first
        while True:
            out = str(tmp_path / f"{part[0]}-{at}")
            for other in before:
                processes.run(run, settings(tmp_path, other, out=out))
            if processes.run(run, settings(tmp_path, part, out=out), at=at) is not None:
                break
            killed += 1
            for other in ("1/2", "0/2"):
                processes.run(run, settings(tmp_path, other, out=out))
            payload = storage.read_bytes(f"{out}/manifest.json")
            assert hashlib.sha256(payload).hexdigest() == undisturbed
            left = {name.split("/")[0] for name in names(out)}
            assert left <= {"manifest.json", "plan", "receipts", "run.json", "tokenizer", "train"}
            at += step
    assert killed >= 5


@pytest.mark.parametrize("at", range(1, 9))
def test_a_part_killed_after_its_commit_is_tidied_up_by_the_next(tmp_path, monkeypatch, at):
    out, seen = tmp_path / "out", []

    def wrapped(function):
        def remove(*args):
            if (out / "manifest.json").exists():
                seen.append(args)
                if len(seen) == at:
                    raise KeyboardInterrupt
            return function(*args)

        return remove

    with monkeypatch.context() as patch:
        for name in ("delete", "delete_temporaries"):
            patch.setattr(storage, name, wrapped(getattr(storage, name)))
        try:
            run(settings(tmp_path, "0/1"))
        except KeyboardInterrupt:
            assert len(seen) == at
        else:
            assert len(seen) < at, "every removal is tried"
    run(settings(tmp_path, "0/1"))
    left = {path.name for path in out.iterdir()} - {"run.json"}
    assert left == {"manifest.json", "plan", "receipts", "tokenizer", "train"}
    assert [path.name for path in (out / "plan").iterdir()] == ["train.json"]


UNFINISHED = [
    f"{name}.tmp-{0:032x}"
    for name in (".proof", ".look", "..lease", ".manifest.json", ".run.json", "train/.a.tar")
]


@pytest.mark.parametrize("part", [None, "0/1"])
def test_what_killed_writers_have_left_is_removed_by_whoever_completes_or_comes_later(
    part, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    make = partial(run_part if part else run_job, settings(tmp_path, part), Quiet())

    def leave():
        (out / ".scratch" / "part-00001-of-00002").mkdir(parents=True)
        for name in UNFINISHED:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(b"half")

    leave()
    assert make().fresh
    assert not [*out.rglob("*.tmp-*"), *out.glob(".scratch")]
    leave()
    lease_of_another = out / LEASE_NAME
    lease_of_another.write_text(json.dumps({"job": "another", "host": "elsewhere", "pid": 1}))
    assert not make().fresh, "it may be alive, so it is neither waited for nor disturbed"
    assert len([*out.rglob("*.tmp-*")]) == len(UNFINISHED)
    lease_of_another.unlink()
    with monkeypatch.context() as patched:

        def refuse(url):
            raise StorageError("permission.file", where=url, error="read only")

        patched.setattr(storage, "delete_temporaries", refuse)
        assert not make().fresh, "what can only be read is complete as well"
    assert not make().fresh
    assert not [*out.rglob("*.tmp-*"), *out.glob(".scratch")]
    assert not lease_of_another.exists()


@pytest.mark.parametrize("ends", ["well", "killed", "refused"])
def test_a_part_that_joins_while_the_last_one_tidies_up_leaves_nothing(ends, tmp_path, monkeypatch):
    chosen = settings(tmp_path, "0/1")
    assert run(chosen).fresh
    want = [path for path in names(chosen.out) if path != "run.json"]
    looks, really, join = Counter(), part_run.committed, part_run.join_job

    def committed(job):
        looks["committed"] += 1
        return really(job) if looks["committed"] > 1 else None

    @contextmanager
    def refuse(*_, **more):
        raise StorageError("output_busy.job", where=chosen.out, host="here", pid=1)
        yield

    with monkeypatch.context() as patched:
        patched.setattr(part_run, "committed", committed)
        patched.setattr(part_run, "join_job", refuse if ends == "refused" else join)
        if ends == "killed":
            patched.setattr(part_run, "forget_parts", lambda out, job: None)
        assert not run(chosen).fresh
    left = {name.split("/")[0] for name in names(chosen.out)} & {LEASE_NAME, lease.PARTS_FOLDER}
    assert left == ({LEASE_NAME, lease.PARTS_FOLDER} if ends == "killed" else set())
    assert not run(chosen).fresh
    assert [path for path in names(chosen.out) if path != "run.json"] == want
    assert not (tmp_path / "out" / lease.PARTS_FOLDER).exists()


def test_an_output_that_other_machines_do_not_see_is_refused(tmp_path, monkeypatch):
    shared = []
    monkeypatch.setattr(storage, "is_own_disk", lambda url: url not in shared)
    with pytest.raises(StorageError) as caught:
        run(settings(tmp_path, "0/2", own_disk="refuse"))
    assert caught.value.reason == "own_disk"
    assert not (tmp_path / "out").exists()
    shared.append(str(tmp_path / "out"))
    run(settings(tmp_path, "0/2", own_disk="refuse"))
    assert run(settings(tmp_path, "1/2", own_disk="refuse")).result is not None
    run(settings(tmp_path, "0/1", own_disk="refuse", out=str(tmp_path / "alone")))


def test_parts_on_a_disk_that_cannot_keep_them_apart_are_refused(tmp_path, monkeypatch):
    lack(monkeypatch, "gcsfuse")
    with pytest.raises(StorageError) as caught:
        run(settings(tmp_path, "0/2", own_disk="refuse"))
    assert caught.value.reason == "disk_unfit"
    assert names(str(tmp_path / "out")) == []


def test_the_part_that_builds_the_last_shard_commits_whatever_its_machine_remembers(
    tmp_path, monkeypatch
):
    remember(monkeypatch)
    run(settings(tmp_path, "0/2", own_disk="refuse"))
    assert run(settings(tmp_path, "1/2", own_disk="refuse")).result is not None


# --- who may join


def me(part="0/2", job="a" * 64, identity=None):
    return PartOfJob(
        part=parse_part(part),
        job=job,
        title="set, split train",
        identity=identity or {"limit": 1},
        dataset="set",
        split="train",
    )


@contextmanager
def joined(out, *members):
    with ExitStack() as stack:
        yield [stack.enter_context(join_job(out, each, state=dict)) for each in members]


def elsewhere(out, member, *, beats=0):
    """Writes the lease of a part as a machine somewhere else would."""
    url = storage.join(out, parts_folder(member.job), part_name(member.part.index, 2))
    holder = {"job": "x", "host": "elsewhere", "pid": 1, "boot": "b", "pids": "p", "born": "9"}
    storage.publish_bytes(url, json.dumps({**holder, "beats": beats}).encode())


@contextmanager
def beating(out, member):
    """Renews the lease of a part whenever somebody waits to see if it is renewed."""
    numbers = itertools.count()
    elsewhere(out, member, beats=next(numbers))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "_pause", lambda _: elsewhere(out, member, beats=next(numbers)))
        yield


@pytest.mark.parametrize("place", ["local", "s3"], indirect=True)
def test_parts_of_one_job_join_and_the_same_part_does_not(place):
    out = f"{place}/out"
    with joined(out, me("0/2"), me("1/2")) as held:
        with pytest.raises(StorageError) as caught, joined(out, me("1/2")):
            pass
        assert caught.value.reason == "part_busy"
        assert caught.value.facts["part"] == "1/2"
        for each in held:
            each.check()
    with joined(out, me("1/2")):  # one that has ended holds nothing
        pass


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (me("1/2", "b" * 64, {"limit": 2}), ("set, split train", "LIMIT", " 1 ", " 2")),
        (
            me("1/2", "b" * 64, {"libraries": {"pillow": "13"}, "limit": 1}),
            ("libraries.pillow", "13"),
        ),
        (me("1/3"), ("divided into 2 parts", "PART=1/3")),
    ],
)
def test_another_job_is_refused_by_name_while_a_part_is_alive(place, other, words):
    out = f"{place}/out"
    with joined(out, me("0/2", identity={"limit": 1, "libraries": {"pillow": "12"}})) as held:
        with pytest.raises(ConflictError) as caught, joined(out, other):
            pass
        assert caught.value.reason == "job_conflict"
        assert all(word in str(caught.value) for word in words), str(caught.value)
        held[0].check()
    with joined(out, other) as held:  # nobody is at work any more
        held[0].check()


def test_other_work_on_the_output_is_refused_while_a_part_is_alive_and_the_other_way_round(place):
    out = f"{place}/out"
    with joined(out, me("1/2")):
        with pytest.raises(StorageError) as caught, output_lock(out):
            pass
        assert caught.value.reason == "output_busy"
        assert "set, split train" in caught.value.what
    with output_lock(out):
        with pytest.raises(StorageError) as caught, joined(out, me("1/2")):
            pass
        assert caught.value.reason == "output_busy"
    with joined(out, me("1/2")) as held:
        held[0].check()


def test_a_part_of_another_machine_that_beats_holds_the_output_and_its_number(place, monkeypatch):
    out = f"{place}/out"
    with joined(out, me("0/2")):
        pass
    with beating(out, me("1/2")):
        for other in (me("1/2"), me("0/2", "b" * 64, {"limit": 2})):
            with pytest.raises(ShardsError) as caught, joined(out, other):
                pass
            assert caught.value.reason in ("part_busy", "job_conflict")
        with pytest.raises(StorageError), output_lock(out):
            pass
    monkeypatch.setattr(lease, "TTL_S", 1.0)
    with joined(out, me("1/2")) as held:  # it is dead: its part can be given to this machine
        held[0].check()


@pytest.mark.usefixtures("expiring")
def test_a_part_that_waits_for_another_jobs_dead_parts_keeps_its_lease(tmp_path, monkeypatch):
    out, beaten = str(tmp_path / "out"), []
    with joined(out, me("0/2")):
        pass
    elsewhere(out, me("1/2"))

    def renew_while_it_waits(seconds):
        waiting = [each for each in lease_objects if each._renewed_s]
        beaten.extend(each._renew() for each in waiting)
        threading.Event().wait(seconds)

    lease_objects, real = [], lease.Lease.__init__

    def noted(self, *args, **more):
        real(self, *args, **more)
        lease_objects.append(self)

    monkeypatch.setattr(lease.Lease, "__init__", noted)
    monkeypatch.setattr(lease, "_pause", renew_while_it_waits)
    with joined(out, me("0/2", "b" * 64, {"limit": 2})) as held:
        assert beaten
        held[0].check()


def test_a_job_that_found_no_living_part_does_not_take_an_output_that_one_has_joined_since(
    tmp_path, monkeypatch
):
    out, late = str(tmp_path / "out"), ExitStack()
    with joined(out, me("0/2")):
        pass
    real = lease.require_no_parts

    def join_after_the_look(output, record):
        real(output, record)
        monkeypatch.undo()
        late.enter_context(join_job(out, me("1/2"), state=dict))

    monkeypatch.setattr(lease, "require_no_parts", join_after_the_look)
    with late:
        with pytest.raises(StorageError) as caught, output_lock(out):
            pass
        assert caught.value.reason == "output_busy"


def test_a_part_whose_job_has_lost_the_output_stops(place):
    out = f"{place}/out"
    waited = threading.Event()
    with joined(out, me("0/2")) as held:
        record = {**read_lease(f"{out}/{LEASE_NAME}"), "job": "b" * 64}
        storage.publish_bytes(f"{out}/{LEASE_NAME}", json.dumps(record).encode())

        def until_lost():
            for _ in range(100):
                held[0].check()
                waited.wait(0.1)

        with pytest.raises(StorageError) as caught:
            until_lost()
        assert caught.value.reason == "lease_lost"


def test_what_a_part_writes_beside_its_lease_is_bounded():
    board = Board(Quiet())
    board.stage("build", 10**6)
    for i in range(1000):
        board.step(f"reason_{i}")
        board.shard(i, "progress")
        board.shard(i, "done")
    found = board.snapshot()
    assert (found["done"], found["total"]) == (1000, 10**6)
    assert len(found["failed"]) == MAX_REASONS + 1
    assert sum(found["failed"].values()) == 1000
    assert len(found["slowest"]) == MAX_SLOWEST
    assert len(json.dumps(found)) < 1000


# --- FETCH


HOSTS = [f"host-{i}.example" for i in range(6)]


@pytest.fixture
def urls(write_parquet, tmp_path, small_jpeg, monkeypatch):
    """A source of 24 URLs on six hosts, and the requests of each part; the web is a function."""
    rows = [
        {"image_url": f"http://{HOSTS[i % 6]}/{i}.jpg", "caption": f"no {i}", "transcripts": []}
        for i in range(24)
    ]
    source = write_parquet(tmp_path / "source", rows)
    requests = []

    def fetch_all(found, *, cache, ledger, policy, limits, on_result, **_):  # noqa: ARG001
        results = {url: ledger.get(url) for url in found if ledger.get(url)}
        for url in found:
            if url in results:
                continue
            requests.append((ledger.path.name, url))
            number = int(url.rpartition("/")[2].partition(".")[0])
            if number % 11 == 3:
                results[url] = FetchResult(url=url, status="failed", reason="http_404")
            else:
                with cache.writing():
                    sha256 = cache.put(small_jpeg(number))
                results[url] = FetchResult(url=url, status="ok", sha256=sha256, num_bytes=1)
            ledger.append(results[url])
        return results

    monkeypatch.setattr(download, "fetch_all", fetch_all)
    return source, requests


def url_job(tmp_path, source, part=None, **more):
    return settings(
        tmp_path,
        part,
        **{
            "dataset": "pixmo_cap",
            "source": str(source),
            "limit": None,
            "fetch": FetchPolicy(),
            "max_lost_rows": 1.0,
            **more,
        },
    )


def test_hosts_are_dealt_and_no_url_is_requested_by_two_parts(tmp_path, urls):
    source, requests = urls
    chosen = url_job(tmp_path, source, out=str(tmp_path / "one"), cache=str(tmp_path / "own"))
    one = run_job(chosen, Quiet()).result.sha256
    whole, requests[:] = [*requests], []
    outcomes = []

    def come(index):
        outcomes.append(run(url_job(tmp_path, source, f"{index}/3", part_wait_s=60.0)).result)

    threads = [threading.Thread(target=come, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {each.sha256 for each in outcomes if each is not None} == {one}
    assert Counter(url for _, url in requests) == Counter(url for _, url in whole)
    owners = {(urlsplit(url).hostname, ledger) for ledger, url in requests}
    assert len(owners) == len({host for host, _ in owners})
    assert len({ledger for _, ledger in owners}) > 1

    requests.clear()  # what is known is known for any number of parts, and for none
    for part in ("0/1", None):
        again = url_job(
            tmp_path, source, part, out=str(tmp_path / ("again" if part else "once more"))
        )
        assert (run(again) if part else run_job(again, Quiet())).result.sha256 == one
    assert requests == []


def test_images_that_another_dataset_has_are_not_requested(tmp_path, urls):
    source, requests = urls
    one = run_job(url_job(tmp_path, source), Quiet()).result.sha256
    ledgers = tmp_path / "cache" / "ledgers"
    (ledgers / "pixmo_cap.jsonl").rename(ledgers / "another.jsonl")
    # Of others, what this job cannot read does not concern it.
    (ledgers / "a.jsonl").symlink_to("removed")
    (ledgers / "b.jsonl").mkdir()
    (ledgers / "c.jsonl").write_bytes(b"damaged\n")
    requests.clear()
    again = url_job(tmp_path, source, out=str(tmp_path / "again"))
    assert run_job(again, Quiet()).result.sha256 == one
    # What has failed for another may be what this one takes.
    assert {int(url.rpartition("/")[2].partition(".")[0]) % 11 for _, url in requests} == {3}


def test_a_part_that_waits_for_the_downloads_of_one_that_never_started_names_it(tmp_path, urls):
    source, _ = urls
    for index in (0, 2):
        with pytest.raises(StorageError) as caught:
            run(url_job(tmp_path, source, f"{index}/3"))
        assert (caught.value.reason, caught.value.exit_code) == ("parts_missing", 1)
        assert "1/3" in caught.value.what
    found = read_status(str(tmp_path / "out"))
    assert found.state == "stopped"
    assert [each.life for each in found.jobs[0].parts] == ["ended", "absent", "ended"]
    assert run(url_job(tmp_path, source, "1/3")).missing_shards > 0  # plans, and builds its own
    run(url_job(tmp_path, source, "0/3"))
    parts = run(url_job(tmp_path, source, "2/3")).result
    whole = run_job(url_job(tmp_path, source, out=str(tmp_path / "whole")), Quiet()).result
    assert parts == whole


def test_a_part_that_does_not_see_the_image_cache_is_refused(tmp_path, urls):
    source, _ = urls
    cut = {"max_dead_links": 1.0}
    run(url_job(tmp_path, source, "0/1", out=str(tmp_path / "warm"), **cut))
    with pytest.raises(StorageError):
        run(url_job(tmp_path, source, "0/2", **cut))
    assert run(url_job(tmp_path, source, "1/2", **cut)).missing_shards > 0
    with pytest.raises(StorageError) as caught:
        run(url_job(tmp_path, source, "0/2", cache=str(tmp_path / "own"), **cut))
    assert caught.value.reason == "cache_not_shared"
    assert run(url_job(tmp_path, source, "0/2", **cut)).result is not None


@pytest.mark.slow
def test_images_may_be_in_a_store_that_all_parts_see(tmp_path, urls, s3_server, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # has the ledger of a cache in a store
    source, requests = urls
    one = run_job(url_job(tmp_path, source, out=str(tmp_path / "one")), Quiet()).result.sha256
    with s3_server.entered():
        cache = f"{s3_server.bucket}/{tmp_path.name}/cache"
        chosen = url_job(tmp_path, source, "0/1", cache=cache)
        assert run(chosen).result.sha256 == one
        assert len([name for name in names(cache) if name.startswith("packs/")]) == 2 * 22
        assert not [name for name in names(cache) if name.startswith("tokens/")]

        requests.clear()  # other machines request nothing, in any number of parts
        for home, parts in (("two", ["0/2", "1/2", "0/2"]), ("three", [None])):
            monkeypatch.setenv("HOME", str(tmp_path / home))
            for part in parts:
                again = url_job(tmp_path, source, part, out=str(tmp_path / home), cache=cache)
                if part is None:
                    assert run_job(again, Quiet()).result.sha256 == one
                else:
                    with suppress(StorageError):  # the first part misses what the second has
                        done = run(again)
            assert part is None or done.result.sha256 == one
        assert requests == []
        assert len([name for name in names(cache) if name.startswith("results/")]) == 1

        requests[:] = []  # parts on machines of their own tell each other what they requested
        cache = f"{cache}-2"
        for home, part in (("four", "1/2"), ("five", "0/2"), ("four", "1/2"), ("six", None)):
            monkeypatch.setenv("HOME", str(tmp_path / home))
            out = str(tmp_path / ("four" if part else "six"))
            again = url_job(tmp_path, source, part, out=out, cache=cache)
            with suppress(StorageError):
                done = run(again) if part else run_job(again, Quiet())
        assert done.result.sha256 == one
        assert max(Counter(url for _, url in requests).values()) == 1
        assert len([name for name in names(cache) if name.startswith("results/")]) == 2


def test_a_part_with_another_source_is_refused(tmp_path, urls):
    source, _ = urls
    for compare, second in (("time", "1/2"), ("content", "0/2")):
        chosen = {"out": str(tmp_path / compare), "compare": compare}
        with pytest.raises(StorageError):
            run(url_job(tmp_path, source, "0/2", **chosen))
        run(url_job(tmp_path, source, "1/2", **chosen))
        os.utime(source / "part.parquet", ns=(1, 1))  # as a copy on another machine has it
        if compare == "time":
            with pytest.raises(ConflictError) as caught:
                run(url_job(tmp_path, source, "0/2", **chosen))
            assert caught.value.reason == "source_changed"
        else:
            assert run(url_job(tmp_path, source, second, **chosen)).result is not None


def test_a_part_whose_source_has_other_urls_is_refused(tmp_path, urls, monkeypatch):
    source, _ = urls
    with pytest.raises(StorageError):
        run(url_job(tmp_path, source, "0/2"))
    real = part_run.image_urls
    monkeypatch.setattr(
        part_run, "image_urls", lambda *a, **k: [*real(*a, **k), "http://new.example/1.jpg"]
    )
    monkeypatch.setattr(part_run, "fetch_images", lambda *a, **k: {})
    with pytest.raises(ConflictError) as caught:
        run(url_job(tmp_path, source, "1/2"))
    assert caught.value.reason == "source_changed"


def test_results_are_handed_in_as_they_are(tmp_path):
    results = {
        f"http://h/{i}?token=s{i}": FetchResult(
            url=f"http://h/{i}", status="ok", sha256="0" * 64, num_bytes=i
        )
        for i in range(3)
    }
    folder, scratch = tmp_path / "out", str(tmp_path / "scratch")
    names = set()
    for _ in range(2):
        with join_job(str(folder), me("0/1"), state=dict) as held:
            held.publish_fetched(results, scratch)
            names |= {path.name for path in tmp_path.rglob("fetched-*")}
            assert [*held.read_fetched(scratch).values()] == [*results.values()]
    assert len(names) == 1  # the same results give the same file


# --- status


@pytest.mark.usefixtures("expiring")
def test_status_names_the_dead_and_those_that_never_started(tmp_path, undisturbed):
    out = str(tmp_path / "out")
    run(settings(tmp_path, "0/4"))
    job = Job(settings(tmp_path)).key
    dead = replace(me("1/4", job), part=parse_part("1/4"))
    url = storage.join(out, parts_folder(job), part_name(1, 4))
    holder = {"job": "x", "host": "gone", "pid": 1, "boot": "b", "pids": "p", "born": "9"}
    storage.publish_bytes(url, json.dumps({**holder, "stage": "build"}).encode())
    del dead
    found = read_status(out)
    (split,) = found.jobs
    assert found.state == "stopped"
    assert [each.life for each in split.parts] == ["ended", "dead", "absent", "absent"]
    assert [each.needs_start for each in split.parts] == [False, True, True, True]
    assert [each.shards_done for each in split.parts] == [2, 0, 0, 0]
    for index in (3, 2, 1):
        done = run(settings(tmp_path, f"{index}/4"))
    assert done.result.sha256 == undisturbed
    assert read_status(out).state == "complete"


def test_status_shows_what_a_living_part_does(tmp_path):
    out = str(tmp_path / "out")
    run(settings(tmp_path, "1/2"))
    board = Board(Quiet())
    job = Job(settings(tmp_path))
    member = replace(me("0/2", job.key), part=parse_part("0/2"))
    board.stage("build", 100)
    for _ in range(10):
        board.step("")
    board.step("image_decode")
    with join_job(out, member, state=board.snapshot):
        found = read_status(out)
    first = found.jobs[0].parts[0]
    assert found.state == "working"
    assert (first.life, first.stage) == ("alive", "build")
    assert first.failed == {"image_decode": 1}
    assert found.jobs[0].num_shards == 5


@pytest.mark.parametrize("name", [None, "renamed"])
def test_status_of_a_job_without_parts(name, tmp_path):
    out = str(tmp_path / "out")
    with output_lock(out):
        found = read_status(out)
        assert (found.state, found.jobs[0].holder_life) == ("working", "alive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preprocess.job.pipeline.commit", _killed)
        with pytest.raises(KeyboardInterrupt):
            run_job(replace(settings(tmp_path), name=name), Quiet())
    found = read_status(out)
    assert (found.state, found.jobs[0].shards_done) == ("stopped", 5)
    assert found.jobs[0].title.startswith(name or "text_sft")


@pytest.mark.parametrize("code", [0, 5, 6])
def test_the_exit_code_of_status_says_what_is_to_be_done(inline_cli, tmp_path, code):
    out = tmp_path / "out"
    run(settings(tmp_path, "0/2" if code else "0/1"))
    with ExitStack() as stack:
        if code == 5:
            key = Job(settings(tmp_path)).key
            stack.enter_context(join_job(str(out), me("1/2", key), state=dict))
        finished = inline_cli.run("status", out)
    assert finished.code == code, finished.out
    assert ("PART=1/2" in finished.out) is (code == 6)


# --- on a cluster


@pytest.mark.parametrize("part", [None, pytest.param("1/2", marks=pytest.mark.slow)])
def test_hosts_are_dealt_to_the_machines_of_a_cluster(tmp_path, urls, part):
    source, requests = urls
    one = run_job(
        url_job(tmp_path, source, out=str(tmp_path / "one"), cache=str(tmp_path / "own")), Quiet()
    )
    whole, requests[:] = Counter(url for _, url in requests), []
    chosen = url_job(tmp_path, source, part, engine="ray", part_wait_s=0.0)
    with cluster(3) as sent:
        if part is None:
            assert run_job(chosen, Quiet()).result.sha256 == one.result.sha256
        else:
            with pytest.raises(StorageError):  # the downloads of the other part are missing
                run(chosen)
            run_part(url_job(tmp_path, source, "0/2", engine="ray"), Quiet())
            assert run(chosen).result.sha256 == one.result.sha256
    assert Counter(url for _, url in requests) == whole
    owners = {(urlsplit(url).hostname, ledger) for ledger, url in requests}
    assert len(owners) == len({host for host, _ in owners})
    shares = [each for each in sent if not isinstance(each, int)]
    assert {each.part.count for each in shares} == {3 if part is None else 6}
    assert len({ledger for ledger, _ in requests}) == len({each.part.index for each in shares}) > 1
    assert not list((tmp_path / "cache" / "tokens").glob("*"))

    requests.clear()  # what machines have found is known to whoever comes without them
    run_job(url_job(tmp_path, source, out=str(tmp_path / "again")), Quiet())
    for ledger in (tmp_path / "cache" / "ledgers" / "nodes").iterdir():
        ledger.unlink()  # of machines that are gone, with their disks
    with cluster(4):
        run_job(url_job(tmp_path, source, engine="ray", out=str(tmp_path / "other")), Quiet())
    assert requests == []


def test_a_machine_that_dies_costs_what_it_was_fetching_alone(tmp_path, urls, monkeypatch):
    source, requests = urls
    real = download.fetch_all

    def dies(found, *, ledger, **more):
        real([*found][:1], ledger=ledger, **more)
        raise KeyboardInterrupt

    chosen = url_job(tmp_path, source, engine="ray")
    with cluster(3):
        with monkeypatch.context() as patch:
            patch.setattr(download, "fetch_all", dies)
            with pytest.raises(KeyboardInterrupt):
                run_job(chosen, Quiet())
        assert len(requests) == 1
        run_job(chosen, Quiet())
    assert max(Counter(url for _, url in requests).values()) == 1


def test_a_machine_that_does_not_see_the_image_cache_downloads_nothing(tmp_path, urls, monkeypatch):
    source, requests = urls
    monkeypatch.setattr(
        fetching, "node_proof", lambda *a, **k: replace(node_proof(*a, **k), cache="/nowhere")
    )
    with cluster(2), pytest.raises(StorageError) as caught:
        run_job(url_job(tmp_path, source, engine="ray"), Quiet())
    assert (caught.value.reason, requests) == ("cache_not_shared", [])


def test_a_ledger_that_an_earlier_attempt_holds_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "LOCK_WAIT_S", 0)
    with Ledger(tmp_path / "own.jsonl"), pytest.raises(StorageError) as caught:
        fetching._opened(tmp_path / "own.jsonl")
    assert caught.value.reason == "ledger_locked"
    with ExitStack() as stack:
        held = stack.enter_context(Ledger(tmp_path / "own.jsonl"))
        monkeypatch.setattr(fetching, "LOCK_WAIT_S", 2)
        monkeypatch.setattr(fetching, "_pause", held.close)
        fetching._opened(tmp_path / "own.jsonl").close()
