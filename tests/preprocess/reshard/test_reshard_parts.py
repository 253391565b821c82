"""Reshards and verification in parts and on a cluster: the bytes and findings of one process."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from preprocess.job import lease, node_proof, read_status, status_text, verify
from preprocess.job.engines.engine import Engine
from preprocess.job.lease import output_lock
from preprocess.job.parts import HeldPart
from preprocess.job.plan import parse_part
from preprocess.reshard import ReshardSettings, plan_reshard, reshard, reshard_part
from preprocess.reshard import run as job
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, StorageError
from shardspec.manifest import require_manifest
from tests.inline import Processes, Quiet, cluster

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(autouse=True)
def quiet_leases(monkeypatch):
    """Leases that are renewed by nobody else: a test counts the changes of storage."""
    monkeypatch.setattr(lease, "BEAT_S", 60.0)


@pytest.fixture(scope="module")
def source(tiny_sample, write_dataset, tmp_path_factory):
    """A dataset of 23 samples in 4 shards, which no test may change."""
    samples = [tiny_sample(i, size=(20 + i, 28)) for i in range(23)]
    return write_dataset(tmp_path_factory.mktemp("parts") / "source", samples, num_shards=4)


def settings(source, out, part=None, **more):
    return ReshardSettings(
        **{
            "sources": (source,),
            "out": str(out),
            "num_shards": 5,
            "form": "copy",
            "part": part and parse_part(part),
            "own_disk": "allow",
            **more,
        }
    )


def run(chosen):
    return reshard_part(plan_reshard(chosen, Quiet()), Quiet())


def files(out):
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture
def whole(source, tmp_path):
    """What one process makes of it, by options."""
    numbers = itertools.count()

    def get(**more):
        out = tmp_path / f"whole-{next(numbers)}"
        reshard(plan_reshard(settings(source, out, **more), Quiet()), Quiet())
        return files(out)

    return get


SPLITS = {"into": {"train": 0.6, "validation": 0.4}, "num_shards": 3}


@pytest.mark.parametrize(
    ("order", "more"), [("012", {}), ("201", {"order": "shuffle", "sha256": True}), ("10", SPLITS)]
)
def test_the_last_of_the_parts_completes_the_bytes_of_one_process(
    source, tmp_path, whole, order, more
):
    out = tmp_path / "out"
    ended = [run(settings(source, out, f"{i}/{len(order)}", **more)) for i in order]
    num_shards = len(require_manifest(str(out)).shards)
    own = [each.num_shards for each in ended[:-1]]
    assert [each.missing_shards for each in ended[:-1]] == [
        num_shards - done for done in itertools.accumulate(own)
    ]
    assert ended[-1].fresh
    assert ended[-1].copied_shards == num_shards - sum(own)
    assert files(out) == whole(**more)
    (out / f".proof.tmp-{0:032x}").touch()  # of a part that was killed when the others had ended
    again = run(settings(source, out, f"0/{len(order)}", **more))
    assert (again.fresh, again.sha256) == (False, ended[-1].sha256)
    assert files(out) == whole(**more)


def test_a_part_that_never_began_is_named_and_can_be_done_by_whoever_comes(source, tmp_path, whole):
    out = tmp_path / "out"
    for part in ("3/4", "0/4", "2/4"):
        assert run(settings(source, out, part)).missing_shards > 0
    found = read_status(str(out))
    assert found.state == "stopped"
    (status,) = found.jobs
    assert [each.life for each in status.parts] == ["ended", "absent", "ended", "ended"]
    assert [each.shards_done for each in status.parts] == [2, 0, 1, 1]
    assert status_text(found, duration=str)[-1] == "to be started, on any machine: PART=1/4"
    assert not (out / "manifest.json").exists()
    run(settings(source, out, "1/4"))
    assert files(out) == whole()
    assert read_status(str(out)).state == "complete"


def test_status_shows_the_copies_of_one_process(source, tmp_path):
    plan = plan_reshard(settings(source, tmp_path / "out"), Quiet())
    seen = []

    class Looks(Quiet):
        def step(self, reason):
            (status,) = read_status(plan.settings.out).jobs
            seen.append((status.shards_done, status.num_shards, status.state, status.title))

    reshard(plan, Looks())
    assert seen == [(i + 1, 5, "working", "tiny, split train") for i in range(5)]


def test_one_process_finishes_what_parts_have_begun_and_the_other_way_round(
    source, tmp_path, whole, monkeypatch
):
    run(settings(source, tmp_path / "out", "1/3"))
    assert run(settings(source, tmp_path / "out")).copied_shards == 3
    assert files(tmp_path / "out") == whole()
    with monkeypatch.context() as patch:
        patch.setattr(job, "publish_tokenizer", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(settings(source, tmp_path / "other"))
    assert run(settings(source, tmp_path / "other", "0/3")).copied_shards == 0
    assert files(tmp_path / "other") == whole()


@pytest.mark.parametrize("first", [11, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4))])
def test_parts_killed_at_any_change_of_storage_end_in_the_same_bytes(
    source, tmp_path, whole, monkeypatch, first
):
    want, processes, killed = whole(), Processes(monkeypatch), 0
    for part, before in (("0/2", ()), ("1/2", ("0/2",))):
        for at in itertools.count(first, 11):
            out = tmp_path / f"{part[0]}-{at}"
            for other in before:
                processes.run(run, settings(source, out, other))
            if processes.run(run, settings(source, out, part), at=at) is not None:
                break
            killed += 1
            for other in ("1/2", "0/2"):
                processes.run(run, settings(source, out, other))
            assert files(out) == want
    assert killed >= 2


def test_a_part_is_refused_what_would_not_be_one_job(source, tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as caught:
        settings(source, tmp_path, "0/2", form="view")
    assert caught.value.reason == "reshard_settings"
    monkeypatch.setattr(storage, "is_own_disk", lambda url: True)
    with pytest.raises(StorageError) as caught:
        run(settings(source, tmp_path / "out", "0/2", own_disk="refuse"))
    assert caught.value.reason == "own_disk"

    class Others(Quiet):
        def step(self, reason):
            for other, kind, reason in (
                (settings(source, tmp_path / "out", "0/2"), StorageError, "part_busy"),
                (settings(source, tmp_path / "out", "1/3"), ConflictError, "job_conflict"),
                (
                    settings(source, tmp_path / "out", "1/2", seed=9, order="shuffle"),
                    ConflictError,
                    "job_conflict",
                ),
                (settings(source, tmp_path / "out"), StorageError, "output_busy"),
            ):
                with pytest.raises(kind) as caught:
                    run(other)
                assert caught.value.reason == reason
            self.steps.append(reason)

    watched = Others()
    reshard_part(plan_reshard(settings(source, tmp_path / "out", "0/2"), Quiet()), watched)
    assert len(watched.steps) == 3


@pytest.mark.parametrize("notices", [False, True])
def test_a_part_that_another_overtakes_has_ended_well(
    source, tmp_path, whole, monkeypatch, notices
):
    """The other finds its shards, commits, and removes what this one holds."""
    out = tmp_path / "out"
    run(settings(source, out, "0/2"))

    class Overtaken(Quiet):
        def step(self, reason):
            super().step(reason)
            if len(self.steps) == 2:  # of two shards
                storage.delete(str(out / ".parts"))
                storage.delete(str(out / ".lease"))
                run(settings(source, out))
                if notices:
                    check.side_effect = StorageError("lease_lost", where=str(out))

    check = mock.Mock()
    monkeypatch.setattr(HeldPart, "check", check)
    watched = Overtaken()
    ended = reshard_part(plan_reshard(settings(source, out, "1/2"), Quiet()), watched)
    assert (ended.fresh, len(watched.steps)) == (False, 2)
    assert files(out) == whole()


# --- on a cluster


def test_a_cluster_copies_the_same_bytes(source, tmp_path, whole):
    for part in ("0/2", "1/2", None):
        with cluster(3) as sent:
            out = tmp_path / ("one" if part is None else "parts")
            run(settings(source, out, part, engine="ray"))
        assert {each.name[-14:] for each in sent} <= {f"{i:05d}-of-00005" for i in range(5)}
        assert all(len(each.rows) == len(each.files) > 0 for each in sent)
    assert files(tmp_path / "one") == files(tmp_path / "parts") == whole()


def test_a_node_that_sees_another_output_copies_nothing(source, tmp_path, monkeypatch):
    def forged(*given):
        return replace(node_proof(*given), mark_sha256="0" * 64)

    monkeypatch.setattr(job, "node_proof", forged)
    with pytest.raises(StorageError) as caught, cluster(1):
        run(settings(source, tmp_path / "out", engine="ray"))
    assert caught.value.reason == "output_not_shared"
    assert storage.list_names(str(tmp_path / "out" / "receipts")) == []


# --- verification


@pytest.fixture
def damaged(source, tmp_path):
    """A copy with two damaged tars and an index that is gone, of five."""
    out = tmp_path / "damaged"
    run(settings(source, out, sha256=True))
    tars = sorted(out.glob("train/*.tar"))
    for tar in (tars[0], tars[3]):
        payload = bytearray(tar.read_bytes())
        payload[600] ^= 1
        tar.write_bytes(payload)
    next(iter(sorted(out.glob("train/*00002-of-*.index.npy")))).unlink()
    return str(out)


def found(url, **more):
    return [(error.reason, Path(error.where).name) for error in verify(url, Quiet(), **more)]


def test_parts_and_machines_find_together_what_one_process_finds(damaged, monkeypatch):
    want = found(damaged)
    assert [reason for reason, _ in want] == [
        "tokenizer_file",
        "shard_sha256",
        "shard_missing",
        "shard_sha256",
    ]
    dealt = [found(damaged, part=parse_part(f"{i}/3")) for i in range(3)]
    assert sorted(itertools.chain(*dealt)) == sorted(want)
    assert [len(each) for each in dealt] == [3, 0, 1]
    for engine in ("local", "ray"):
        monkeypatch.setattr(sys.modules[verify.__module__], "PROCESS_BYTES", 0)
        with cluster(2) as sent, Engine(settings("", "", engine=engine)) as running:
            assert found(damaged, engine=running) == want
            assert found(damaged, engine=running, part=parse_part("0/3")) == dealt[0]
        assert sent == ([] if engine == "local" else [0, 1, 2, 3, 4, 0, 3])


def test_verify_in_parts_from_the_command_line(damaged, inline_cli):
    for part, code in (("0/3", 4), ("1/3", 0)):
        ended = inline_cli.run("verify", damaged, "--part", part)
        assert ended.code == code
        assert ("of part 1/3 matches" in ended.out) == (code == 0)


def test_a_lease_that_holds_the_output_alone_keeps_parts_away(source, tmp_path):
    with output_lock(str(tmp_path / "out")), pytest.raises(StorageError) as caught:
        run(settings(source, tmp_path / "out", "0/2"))
    assert caught.value.reason == "output_busy"
