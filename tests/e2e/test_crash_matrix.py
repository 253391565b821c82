"""Crashes of all kinds at random moments: the same command ends in the bytes of an undisturbed run.

The matrix of the engines and numbers of workers; `CRASH_SEEDS=100 pytest -m slow` on this file runs
more of it. Siblings with fewer crashes, in one process, are in tests/preprocess/job/test_parts.py
and test_generations.py.
"""

import hashlib
import itertools
import os
import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from preprocess.job.job import JobSettings
from preprocess.job.plan import Part
from tests import ray_nodes
from tests.crashes import Crashing, Driver, Fault

pytestmark = pytest.mark.slow

SEEDS = range(int(os.environ.get("CRASH_SEEDS", "4")))

KILLS = {"local": 7, "parts": 7, "ray": 4}
"""In each case. A driver takes seconds to connect to a cluster: it has fewer, and one seed."""

LONGEST_FILE = 30_000
OF_A_SHARD = 10
"""Changes of the file system that a worker makes for a shard, about."""

KINDS = ("worker", "driver", "part", "node", "full", "limit", "clock", "two drivers")
# On a cluster, a driver has no worker that could die with it; Ray's own processes would have the
# limit too.
CASES = {"local": KINDS, "parts": KINDS, "ray": {*KINDS} - {"part", "limit"}}

REFUSALS = {
    "full": {"no_space"},
    "limit": {"storage_failed"},
    "two drivers": {"output_busy", "part_busy"},
}
"""Reasons for which a driver may stop, by kind."""


@pytest.fixture(scope="module")
def crashing(tmp_path_factory):
    with Crashing(tmp_path_factory.mktemp("crashing")) as program:
        yield program


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster whose head has no core."""
    with ray_nodes.running(head_cores=0) as found:
        yield found


@pytest.fixture(scope="module")
def source(write_parquet, captioned_rows, tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("source"), captioned_rows(12))


def settings(source, folder, **more):
    return JobSettings(
        dataset="pixmo_cap",
        source=str(source),
        num_shards=5,
        out=str(folder / "out"),
        cache=str(folder / "cache"),
        own_disk="allow",
        part_wait_s=0.0,
        **more,
    )


@pytest.fixture(scope="module")
def undisturbed(crashing, source, tmp_path_factory):
    """The sha256 of the manifest of runs without crashes; how much a driver changes, by parts."""
    found, changes = set(), {}
    for num_parts in (1, 3):
        folder = tmp_path_factory.mktemp("undisturbed")
        ends = crashing.run(drivers(num_parts, settings(source, folder)))
        assert [end.code for end in ends] == [0] * num_parts, ends
        changes[num_parts] = max(end.changes for end in ends)
        found.add(manifest_sha256(folder))
    (sha256,) = found
    return sha256, changes


def drivers(num_parts, chosen):
    parts = [Part(index=i, count=num_parts) for i in range(num_parts)] if num_parts > 1 else [None]
    return [Driver(settings=replace(chosen, part=part)) for part in parts]


def manifest_sha256(folder):
    path = folder / "out" / "manifest.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def faulty(job, kind, rng, most_changes):
    """Gives the drivers of a run with a fault of a kind, one of them at least with that fault."""
    at = rng.randint(1, most_changes)
    fault = {
        "worker": Fault(what="kill", at=rng.randint(1, OF_A_SHARD), in_worker=True),
        "part": Fault(what="kill group", at=at),
        "full": Fault(what="full", at=at),
        "limit": Fault(what="limit", at=rng.randint(200, LONGEST_FILE)),
        "clock": Fault(what="clock", at=at),
    }.get(kind, Fault(what="kill", at=at))
    if kind == "node" and job[0].settings.engine == "ray":
        fault = Fault(what="kill node", at=rng.randint(1, OF_A_SHARD), in_worker=True)
    running = [*job, *job] if kind == "two drivers" else [*job]
    victim = rng.randrange(len(running))
    running[victim] = replace(running[victim], faults=(fault,))
    return running


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    ("engine", "seed"),
    [*itertools.product(["local", "parts"], SEEDS), ("ray", 0)],
)
def test_crashes_at_random_moments_change_no_byte(
    request, crashing, source, undisturbed, tmp_path, engine, num_workers, seed
):
    num_parts, most_kills, more = 1, KILLS[engine], {"num_workers": num_workers}
    nodes = request.getfixturevalue("nodes") if engine == "ray" else None
    if engine == "parts":
        num_parts = 3
    elif nodes:
        more = {"engine": "ray", "ray_address": nodes.address}
    want, changes = undisturbed
    rng = random.Random(f"{engine} {num_parts} {num_workers} {seed}")
    kinds = [kind for kind in rng.sample(KINDS, len(KINDS)) if kind in CASES[engine]]
    kills, runs, outputs, done, reasons = 0, 0, 0, Counter(), Counter()

    def job():
        folder = tmp_path / str(outputs)
        return drivers(num_parts, settings(source, folder, **more))

    def run(running, *, kind=""):
        if not nodes:
            return crashing.run(running, as_node=kind == "node")
        return nodes.while_alive(num_workers, partial(crashing.run, running))

    while kills < most_kills or runs < len(kinds):
        kind = kinds[runs % len(kinds)]
        ends = run(faulty(job(), kind, rng, changes[num_parts]), kind=kind)
        died = sum(end.kills for end in ends)
        kills, runs = kills + died, runs + 1
        done[kind] += died if kind in ("worker", "driver", "part", "node") else 1
        for end in ends:
            assert end.code in (0, 3, -9), (kind, end.log)
            refused = re.findall(r"^refused: (\w+)$", end.log, re.MULTILINE)
            assert REFUSALS.get(kind, set()).issuperset(refused), (kind, end.log)
            reasons.update(refused)
        found = manifest_sha256(tmp_path / str(outputs))
        if found is not None:
            assert found == want
            outputs += 1
    for end in run(job()):
        assert end.code == 0, end.log
    assert manifest_sha256(tmp_path / str(outputs)) == want
    left = {path.name for path in (tmp_path / str(outputs) / "out").iterdir()}
    assert left <= {"manifest.json", "plan", "receipts", "run.json", "tokenizer", "train"}
    print(f"{kills} kills in {runs} runs, {outputs + 1} outputs: {dict(done)} {dict(reasons)}")
