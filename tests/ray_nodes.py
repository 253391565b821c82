"""Ray clusters of several raylets on this machine."""

import contextlib
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

START_S = 120
"""Until a raylet is known to its cluster, on a busy machine."""

_NODE = {"object_store_memory": 80 * 2**20}
_ENVIRONMENT = {
    # A killed raylet refuses connections at once; one of a busy machine has time to answer.
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "20000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Nodes:
    """A cluster; its head has no more than `head_cores`, each other node has one core."""

    def __init__(self, cluster):
        self._cluster, self._others = cluster, []

    @property
    def address(self):
        """Of the cluster, as `--ray-address` takes it."""
        return self._cluster.address

    def add(self):
        """Starts another node."""
        node = self._cluster.add_node(wait=False, num_cpus=1, **_NODE)
        self._cluster._wait_for_node(node, timeout=START_S)
        self._others.append(node)

    def kill(self):
        """Kills the node that was added last, if there is one."""
        if self._others:
            self._cluster.remove_node(self._others.pop(), allow_graceful=False)

    def restore(self, count):
        """Lets as many nodes be alive besides the head; killed ones are replaced."""
        for node in [node for node in self._others if not _is_alive(node)]:
            self._others.remove(node)
            self._cluster.remove_node(node, allow_graceful=False)
        while len(self._others) > count:
            self.kill()
        while len(self._others) < count:
            self.add()

    def while_alive(self, count, action):
        """Gives what an action returns; until then, nodes that die are replaced."""
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(action)
            while not running.done():
                self.restore(count)
                wait([running], timeout=0.1)
            return running.result()


def _is_alive(node):
    return not node.dead_processes()


@contextlib.contextmanager
def settings():
    """Gives Ray, with settings for tests; skips the test where it is not installed.

    A process keeps the way of authentication that it has found first.
    """
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _ENVIRONMENT.items():
            patch.setenv(name, value)
        yield ray


@contextlib.contextmanager
def running(*, head_cores):
    """Starts a cluster of one node for the block; skips the test where Ray is not installed."""
    with settings():
        from ray.cluster_utils import Cluster

        head = {**_NODE, "num_cpus": head_cores, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield Nodes(cluster)
        finally:
            cluster.shutdown()
