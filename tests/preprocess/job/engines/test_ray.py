"""The Ray engine: the same manifest as one machine's, also where a node dies in the middle.

Ray is an extra that `make test-ray` installs; without it, what needs no cluster is tested.
"""

import hashlib
import json
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

import pytest

from preprocess.fetch import FetchPolicy
from preprocess.job import pipeline, run_job, verify
from preprocess.job.engines import ray_cluster
from preprocess.job.engines.engine import Engine, _Proven, check_node, node_proof
from preprocess.job.engines.local import Deferred, TaskDone, TaskProgress
from preprocess.job.job import Job, JobSettings
from preprocess.job.part_run import run_part
from preprocess.job.plan import Part
from preprocess.reshard import ReshardSettings, plan_reshard, reshard
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, StorageError
from tests import ray_nodes
from tests.inline import Quiet
from vlm_shards.features import FeatureSettings, make_features, plan_features


def settings(folder, **more):
    given = {
        "dataset": "pixmo_cap",
        "source": "sample",
        "limit": 48,
        "num_shards": 12,
        "num_workers": 1,
        "cache": str(folder / "cache"),
        "out": str(folder / "out"),
    }
    return JobSettings(**given | more)


def test_without_ray_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as caught, ray_cluster.connected("", 1):
        pass
    assert caught.value.reason == "ray_missing"


def test_a_cluster_that_does_not_answer_is_named(monkeypatch):
    def init(**known):
        raise ConnectionError(f"nobody at {known['address']}")

    ray = mock.Mock(**{"is_initialized.return_value": False})
    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    with (
        pytest.raises(StorageError, match="ray://there:1") as caught,
        ray_cluster.connected("ray://there:1", 2),
    ):
        pass
    assert caught.value.reason == "ray_unreachable"


def test_a_sigterm_while_ray_connects_has_the_answer_of_the_program(monkeypatch):
    def init(**_):
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))  # as Ray does
        signal.raise_signal(signal.SIGTERM)

    def answer(number, _):
        raise KeyboardInterrupt(number)

    ray = mock.Mock(**{"is_initialized.return_value": False})
    ray.init = init
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.signal(signal.SIGTERM, answer)
    try:
        with pytest.raises(KeyboardInterrupt), ray_cluster.connected("ray://there:1", 2):
            pass
        assert signal.getsignal(signal.SIGTERM) is answer
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_a_task_reports_is_sent_while_it_runs_and_comes_with_its_result(monkeypatch):
    monkeypatch.setattr(ray_cluster, "REPORT_S", 0.0)

    def work(context, task, report):
        report("")
        report("")
        report("bad")
        return Deferred(finish=lambda: context + task)

    notes = mock.Mock()
    assert ray_cluster._run_task(work, 40, 7, 2, notes) == ({"": 2, "bad": 1}, 42)
    sent = [call.args for call in notes.put.remote.call_args_list]
    assert sent == [(7, {"": 1}), (7, {"": 2}), (7, {"": 2, "bad": 1})]


def test_what_two_attempts_report_is_counted_once():
    told, found = Counter(), []
    # The first attempt dies after its second note; two of a second one are late.
    for notes in ({"": 2}, {"": 1}, {"": 2, "bad": 1}, {"": 5, "bad": 1}):
        found.append([event.note for event in ray_cluster._progress(3, told, notes)])
    assert found == [["", ""], [], ["bad"], ["", "", ""]]


def test_a_machine_proves_what_it_has_in_common_before_it_works(tmp_path):
    (tmp_path / "mark").write_text("a plan")
    proof = node_proof(
        str(tmp_path), str(tmp_path / "mark"), dataset="pixmo_cap", cache=str(tmp_path)
    )
    done = []
    proven = _Proven(work=lambda *given: done.append(given), proof=proof)
    proven("context", 3, "report")
    assert done == [("context", 3, "report")]
    check_node(replace(proof, mark="", mark_sha256=""))
    for other, reason in (
        ({"libraries": (("numpy", "0.1"),)}, "mixed_cluster"),
        ({"mark": "/nowhere/plan.json"}, "output_not_shared"),
        ({"mark_sha256": "0" * 64}, "output_not_shared"),
        ({"cache_token": "left-by-the-planner"}, "cache_not_shared"),
    ):
        with pytest.raises((ConflictError, StorageError)) as caught:
            replace(proven, proof=replace(proof, **other))("context", 4, "report")
        assert caught.value.reason == reason
    assert len(done) == 1


def test_a_driver_that_died_before_the_commit_alone_is_started_again(monkeypatch, tmp_path):
    built = JobSettings(
        dataset="text_sft",
        source="sample",
        limit=4,
        out=str(tmp_path / "out"),
        cache=str(tmp_path / "cache"),
    )
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "commit", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_job(built, Quiet())
    # Nothing is left to build, so no cluster is needed.
    assert run_job(replace(built, engine="ray", ray_address="nowhere:1"), Quiet()).fresh


def test_two_attempts_at_a_shard_are_one(tmp_path):
    job = Job(settings(tmp_path, num_shards=1, limit=2))
    context = pipeline.build_context(job, pipeline.make_plan(job, Quiet()))
    first, second = (pipeline._build_task(context, 0, lambda note: None) for _ in range(2))
    receipt = first.finish()
    (name,) = storage.list_names(str(tmp_path / "out" / "receipts"))
    url = str(tmp_path / "out" / "receipts" / name)
    stored = storage.read_bytes(url)
    delete = storage.delete_objects
    # The first writes its receipt once more after the second has taken it away.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            storage,
            "delete_objects",
            lambda out, names: (delete(out, names), storage.publish_bytes(url, stored)),
        )
        assert second.finish() == receipt


@pytest.fixture(scope="module")
def head():
    """A cluster of one raylet with one core."""
    with ray_nodes.running(head_cores=1) as nodes:
        yield nodes


@pytest.fixture
def two_nodes(head):
    """The cluster with a second raylet; gives its address, and kills the second."""
    head.restore(1)
    yield head.address, head.kill
    head.restore(0)


def echo(context, task, report):
    report(task)
    return context * task


def wait_for(context, task, report):
    go, begun = context
    with begun.open("a") as log:
        log.write(f"{task}\n")
    report("begun")
    while not go.exists():
        time.sleep(0.01)
    report("ended")
    return task


class Once(Quiet):
    """A reporter that does something once, at the first step of a stage."""

    def __init__(self, stage, act):
        super().__init__()
        self.wanted, self.act, self.name, self.stages = stage, act, "", []

    def stage(self, name, total):
        self.name = name
        self.stages.append(name)

    def step(self, reason):
        super().step(reason)
        if self.name == self.wanted and self.act:
            act, self.act = self.act, None
            act()


@pytest.fixture
def web(small_jpeg, write_parquet, tmp_path):
    """A source of twelve URLs on four hosts, which are one server.

    Gives the source, what was asked for, and what is called at which of all requests.
    """
    asked, calls = Counter(), {"at": 0, "what": None}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.headers["Host"].partition(":")[0], self.path] += 1
            number = self.path.strip("/").removesuffix(".jpg")
            body = small_jpeg(int(number)) if number.isdigit() else b""
            if sum(asked.values()) == calls["at"]:
                calls["what"]()
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    hosts = [f"127.0.0.{i}" for i in range(1, 5)]
    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    rows = [
        {
            "image_url": f"http://{hosts[i % 4]}:{server.server_port}/{i}.jpg",
            "caption": f"number {i}",
            "transcripts": [],
        }
        for i in range(12)
    ]
    # One request at a time: no more than one of each host is lost with a machine.
    policy = FetchPolicy(allow_hosts=frozenset(hosts), host_rate=2.0, per_host=1)
    yield {"source": str(write_parquet(tmp_path / "rows", rows)), "fetch": policy}, asked, calls
    server.shutdown()
    thread.join()
    server.server_close()


# First: the cluster of the others would run beside its own.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_cluster_is_started_and_ended_where_none_is_named(tmp_path):
    chosen = settings(tmp_path, engine="ray", num_workers=2)
    (tmp_path / "mark").write_text("a plan")
    with ray_nodes.settings() as ray, Engine(chosen) as opened:
        assert opened.num_nodes == 1
        proof = node_proof(str(tmp_path), str(tmp_path / "mark"))
        events = list(opened.run(range(5), work=echo, context=10, proof=proof))
    done = {each.task: each.value for each in events if isinstance(each, TaskDone)}
    assert done == {task: 10 * task for task in range(5)}
    assert sorted(e.note for e in events if isinstance(e, TaskProgress)) == list(range(5))
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_node_that_is_killed_in_the_middle_changes_no_byte(two_nodes, tmp_path):
    address, kill = two_nodes
    want = run_job(settings(tmp_path / "local"), Quiet()).result.sha256
    on_ray = settings(tmp_path / "ray", engine="ray", ray_address=address)
    got = run_job(on_ray, Once("build", kill))
    assert got.result.sha256 == want
    assert got.built_shards == 12
    again = run_job(on_ray, Quiet())
    assert (again.fresh, again.result.sha256) == (False, want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_node_is_killed_while_it_downloads_and_the_same_dataset_comes(two_nodes, web, tmp_path):
    address, kill = two_nodes
    more, asked, calls = web
    job = {**more, "limit": None, "num_shards": 4}
    want = run_job(settings(tmp_path / "local", **job), Quiet()).result.sha256
    once = dict(asked)
    asked.clear()
    calls.update(at=9, what=kill)  # the four robots.txt, and some of the pictures
    on_ray = settings(tmp_path / "ray", engine="ray", ray_address=address, **job)
    assert run_job(on_ray, Quiet()).result.sha256 == want
    assert set(asked) == set(once)
    # The nodes keep their ledgers in one folder, so that what was done is not done again.
    assert sum(asked.values()) <= sum(once.values()) + 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_node_is_killed_while_it_copies_and_while_it_verifies(
    two_nodes, tiny_sample, write_dataset, tmp_path
):
    address, kill = two_nodes
    source = write_dataset(tmp_path / "source", [tiny_sample(i) for i in range(24)], num_shards=4)
    wanted = ReshardSettings(
        sources=(source,),
        out=str(tmp_path / "local"),
        form="copy",
        num_shards=12,
        seed=5,
        order="shuffle",
        sha256=True,
    )
    want = reshard(plan_reshard(wanted, Quiet()), Quiet()).sha256
    on_ray = replace(wanted, out=str(tmp_path / "ray"), engine="ray", ray_address=address)
    plan = plan_reshard(on_ray, Quiet())
    with Engine(on_ray) as opened:
        assert opened.num_nodes == 2
        assert reshard(plan, Once("copy", kill)).sha256 == want
        assert {error.reason for error in verify(on_ray.out, Quiet(), engine=opened)} == {
            error.reason for error in verify(wanted.out, Quiet())
        }
    assert reshard(plan, Quiet()).fresh is False


TOWER = """
import torch
class Tower(torch.nn.Module):
    def forward(self, pixel_values):
        return pixel_values.flatten(2)[..., :6]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_node_is_killed_while_it_makes_features(two_nodes, tiny_sample, write_dataset, tmp_path):
    address, kill = two_nodes
    module = tmp_path / "tower.py"
    module.write_text(TOWER)
    source = write_dataset(tmp_path / "source", [tiny_sample(i) for i in range(24)], num_shards=8)
    local = FeatureSettings(
        src=str(source),
        dst=str(tmp_path / "local"),
        backbone=f"{module}:Tower",
        normalize="siglip",
    )
    want = make_features(plan_features(local, Quiet()), Quiet()).sha256
    on_ray = replace(local, dst=str(tmp_path / "ray"), engine="ray", ray_address=address)
    made = make_features(plan_features(on_ray, Quiet()), Once("features", kill))
    assert (made.sha256, made.made_shards) == (want, 8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_lost_node_costs_what_it_was_working_on(two_nodes, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_cluster, "WAIT_S", 0.1)
    address, kill = two_nodes
    go, begun, found = tmp_path / "go", tmp_path / "begun", []
    with ray_cluster.connected(address, 1) as ray:
        for event in ray_cluster.run(ray, range(12), work=wait_for, context=(go, begun)):
            found.append(event)
            if len(found) == 2:  # one on each node: they are heard before their ends
                assert {event.note for event in found} == {"begun"}
                kill()
                go.touch()
    attempts = Counter(map(int, begun.read_text().split()))
    assert sorted(attempts) == list(range(12))
    assert attempts.total() == 13
    # What the second attempt reported is not counted again.
    assert Counter(type(event) for event in found) == {TaskProgress: 24, TaskDone: 12}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_node_with_other_libraries_is_refused_before_it_works(two_nodes, monkeypatch, tmp_path):
    address, _ = two_nodes
    other = mock.Mock(return_value=(("numpy", "0.1"),))
    monkeypatch.setattr("preprocess.job.engines.engine.node_libraries", other)
    with pytest.raises(ConflictError) as caught:
        run_job(settings(tmp_path, engine="ray", ray_address=address), Quiet())
    assert caught.value.reason == "mixed_cluster"
    assert not storage.list_names(str(tmp_path / "out" / "receipts"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_parts_append_rows_on_a_cluster(two_nodes, tmp_path):
    """A generation, in two parts, each of them on the cluster."""
    address, _ = two_nodes
    source = tmp_path / "rows.jsonl"
    turns = ({"role": "user", "content": "Count."}, {"role": "assistant", "content": "One."})
    sha256 = []
    for name, engine in (("local", "local"), ("ray", "ray")):
        for count in (6, 15):
            source.write_text(
                "".join(
                    json.dumps({"messages": [{**turns[0], "content": f"Count {i}."}, turns[1]]})
                    + "\n"
                    for i in range(count)
                )
            )
            chosen = settings(
                tmp_path / name,
                dataset=str(source),
                source=str(source),
                limit=None,
                num_shards=4,
                new_rows="append",
                own_disk="allow",
                engine=engine,
                ray_address=address if engine == "ray" else "",
            )
            if engine == "local":
                run_job(chosen, Quiet())
            else:
                ended = [
                    run_part(replace(chosen, part=Part(index=i, count=2)), Quiet()) for i in (1, 0)
                ]
                assert ended[1].fresh
        sha256.append(storage.read_bytes(f"{chosen.out}/manifest.json"))
    assert sha256[0] == sha256[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(480)
def test_a_driver_that_is_interrupted_or_killed_is_started_again(two_nodes, cli, tmp_path):
    address, _ = two_nodes
    command = ["shards", "pixmo_cap", "--source", "sample", "--limit", 36, "--num-shards", 36]
    want = run_job(
        settings(tmp_path / "local", limit=36, num_shards=36, out=str(tmp_path / "local")), Quiet()
    )
    out = tmp_path / "out"
    events = tmp_path / "events.jsonl"
    command += ["--out", out, "--cache", tmp_path / "cache", "--ray-address", address]
    command += ["--engine", "ray", "--events", events]

    def built():
        return events.read_bytes().count(b'"shard"') if events.exists() else 0

    for kind, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        before = built()
        running = cli.start(*command)
        running.wait_until(lambda before=before: built() > before, timeout_s=300)
        running.process.send_signal(kind)
        ended = running.wait(120)
        assert ended.code == code, ended.err
        assert not (out / "manifest.json").exists()
    cli.good(*command)
    manifest = storage.read_bytes(str(out / "manifest.json"))
    assert hashlib.sha256(manifest).hexdigest() == want.result.sha256
