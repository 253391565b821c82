"""The Ray engine: the same manifest as one machine's, also where a node dies in the middle.

Ray is an extra that CI does not install; without it, only the refusal is tested.
"""

import sys
from dataclasses import replace
from unittest import mock

import pytest

from preprocess.job import pipeline, run_job
from preprocess.job.engines import ray_cluster
from preprocess.job.engines.engine import Engine, _Proven, check_node, node_proof
from preprocess.job.engines.local import Deferred, TaskDone, TaskProgress
from preprocess.job.job import Job, JobSettings
from shardspec import storage
from shardspec.errors import ConfigError, ConflictError, StorageError
from tests.inline import Quiet


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


def test_what_a_task_reports_comes_with_its_result():
    def work(context, task, report):
        report("")
        report("")
        report("bad")
        return Deferred(finish=lambda: context + task)

    assert ray_cluster._run_task(work, 40, 7, 2) == ([("", 2), ("bad", 1)], 42)


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


@pytest.fixture
def two_nodes():
    """A cluster of two raylets with a core each; gives its address, and kills the second."""
    pytest.importorskip("ray", reason="the extra [ray] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("RAY_health_check_initial_delay_ms", "500"),
            ("RAY_health_check_period_ms", "500"),
            ("RAY_health_check_timeout_ms", "1000"),
            ("RAY_health_check_failure_threshold", "3"),
            ("RAY_AUTH_MODE", "disabled"),
        ):
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        cluster = Cluster(
            initialize_head=True, head_node_args={**small, "include_dashboard": False}
        )
        second = cluster.add_node(**small)
        yield cluster.address, lambda: cluster.remove_node(second, allow_graceful=False)
        cluster.shutdown()


class KillsAtFirstShard(Quiet):
    def __init__(self, kill):
        super().__init__()
        self.kill, self.stage_name = kill, ""

    def step(self, reason):
        if self.stage_name == "build" and self.kill:
            kill, self.kill = self.kill, None
            kill()

    def stage(self, name, total):
        self.stage_name = name


def echo(context, task, report):
    report(task)
    return context * task


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_a_node_that_is_killed_in_the_middle_changes_no_byte(two_nodes, tmp_path):
    address, kill = two_nodes
    want = run_job(settings(tmp_path / "local"), Quiet()).result.sha256
    on_ray = settings(tmp_path / "ray", engine="ray", ray_address=address)
    got = run_job(on_ray, KillsAtFirstShard(kill))
    assert got.result.sha256 == want
    assert got.built_shards == 12
    again = run_job(on_ray, Quiet())
    assert (again.fresh, again.result.sha256) == (False, want)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(120)
def test_a_cluster_is_started_and_ended_where_none_is_named(tmp_path):
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    chosen = settings(tmp_path, engine="ray", num_workers=2)
    (tmp_path / "mark").write_text("a plan")
    with Engine(chosen) as engine:
        assert engine.num_nodes == 1
        proof = node_proof(str(tmp_path), str(tmp_path / "mark"))
        events = list(engine.run(range(5), work=echo, context=10, proof=proof))
    done = {each.task: each.value for each in events if isinstance(each, TaskDone)}
    assert done == {task: 10 * task for task in range(5)}
    assert sorted(e.note for e in events if isinstance(e, TaskProgress)) == list(range(5))
    assert not ray.is_initialized()
