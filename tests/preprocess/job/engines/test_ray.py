"""The Ray engine: the same manifest as one machine's, also where a node dies in the middle.

Ray is an extra that CI does not install; without it, only the refusal is tested.
"""

import sys
from dataclasses import replace
from unittest import mock

import pytest

from preprocess.job import pipeline, run_job
from preprocess.job.engines import ray_cluster
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
    with pytest.raises(ConfigError) as caught:
        list(ray_cluster.run([0], work=abs, context=None, num_workers=1))
    assert caught.value.reason == "ray_missing"


def test_a_cluster_that_does_not_answer_is_named():
    def init(**known):
        raise ConnectionError(f"nobody at {known['address']}")

    ray = mock.Mock(**{"is_initialized.return_value": False})
    ray.init = init
    with (
        pytest.raises(StorageError, match="ray://there:1") as caught,
        ray_cluster._connected(ray, "ray://there:1", 2),
    ):
        pass
    assert caught.value.reason == "ray_unreachable"


def test_what_a_task_reports_comes_with_its_result():
    def work(context, task, report):
        report("")
        report("")
        report("bad")
        return Deferred(finish=lambda: context + task)

    assert ray_cluster._run_task(work, 40, 2) == ([("", 2), ("bad", 1)], 42)


@pytest.fixture
def cluster_task(tmp_path):
    """A planned job, and a function that runs a task of it as a node would, with other facts."""
    job = Job(settings(tmp_path, num_shards=1, limit=2))
    plan = pipeline.make_plan(job, Quiet())
    cluster = pipeline._Cluster(
        context=pipeline.build_context(job, plan),
        dataset="pixmo_cap",
        libraries=job.libraries,
        plan_url=pipeline.plan_url(job),
        cache_token="",
    )
    return lambda **other: pipeline._cluster_task(replace(cluster, **other), 0, lambda note: None)


def test_a_node_refuses_what_it_cannot_build_rightly(cluster_task):
    with pytest.raises(ConflictError) as caught:
        cluster_task(libraries={"numpy": "0.1"})
    assert caught.value.reason == "mixed_cluster"
    for other, reason in (
        ({"plan_url": "/nowhere/plan.json"}, "output_not_shared"),
        ({"cache_token": "left-by-the-planner"}, "cache_not_shared"),
    ):
        with pytest.raises(StorageError) as caught:
            cluster_task(**other)
        assert caught.value.reason == reason


def test_two_attempts_at_a_shard_are_one(cluster_task, tmp_path):
    first, second = (cluster_task() for _ in range(2))
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
def test_a_cluster_is_started_and_ended_where_none_is_named():
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    events = list(ray_cluster.run(range(5), work=echo, context=10, num_workers=2))
    done = {each.task: each.value for each in events if isinstance(each, TaskDone)}
    assert done == {task: 10 * task for task in range(5)}
    assert sorted(e.note for e in events if isinstance(e, TaskProgress)) == list(range(5))
    assert not ray.is_initialized()
