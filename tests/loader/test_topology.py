import contextlib
import logging
import os
import pickle

import pytest
import torch.distributed

from loader.topology import CurrentTopology, Topology, find_topology, find_worker
from shardspec.errors import ConfigError

ELASTIC = {"RANK": 3, "WORLD_SIZE": 8, "TORCHELASTIC_RUN_ID": "none"}
ENV_STORE = {"RANK": 3, "WORLD_SIZE": 8, "MASTER_ADDR": "node7", "MASTER_PORT": 29500}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": 3, "OMPI_COMM_WORLD_SIZE": 8}
HYDRA = {"PMI_RANK": 3, "PMI_SIZE": 8}
ALLOCATION = {"SLURM_JOB_ID": 7, "SLURM_PROCID": 0, "SLURM_NTASKS": 8, "SLURM_NPROCS": 8}
"""What an sbatch script has around it, and a shell inside an allocation."""
SRUN = {**ALLOCATION, "SLURM_PROCID": 3, "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": 8}
SHELL = {**SRUN, "SLURM_PROCID": 0, "SLURM_PTY_PORT": 40001}
INTERACTIVE = {**SRUN, "SLURM_PROCID": 0, "SLURM_STEP_ID": 4294967290}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MASTER_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def process_group_of_2(monkeypatch):
    """Lets torch.distributed say, for a time, that this is rank 1 of 2."""

    @contextlib.contextmanager
    def group():
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda: 1)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            yield

    return group


def test_process_alone_is_the_only_rank():
    assert find_topology() == Topology(rank=0, world_size=1)


@pytest.mark.parametrize("variables", [ELASTIC, ENV_STORE, OPEN_MPI, HYDRA, SRUN])
def test_a_launcher_says_who_the_process_is(monkeypatch, variables):
    set_all(monkeypatch, **variables)
    assert find_topology() == Topology(rank=3, world_size=8)


@pytest.mark.parametrize("around", [ALLOCATION, {**SRUN, "SLURM_PROCID": 0}, OPEN_MPI])
def test_the_innermost_launcher_counts(monkeypatch, around):
    set_all(monkeypatch, **around)
    set_all(monkeypatch, **{**ELASTIC, "RANK": 5})
    assert find_topology() == Topology(rank=5, world_size=8)


@pytest.mark.parametrize(
    "variables",
    [ALLOCATION, SHELL, INTERACTIVE, {"RANK": 3, "WORLD_SIZE": 8}, {**SRUN, "SLURM_PTY_PORT": 1}],
)
def test_variables_without_a_launcher_make_no_process_one_of_many(monkeypatch, caplog, variables):
    set_all(monkeypatch, **variables)
    topology = CurrentTopology()
    with caplog.at_level(logging.INFO, logger="loader.topology"):
        assert [topology.settle() for _ in range(3)] == [Topology()] * 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "=8 is set" in record.getMessage()


def test_one_task_of_a_large_allocation_is_alone(monkeypatch):
    set_all(monkeypatch, **{**ALLOCATION, "SLURM_STEP_ID": 2, "SLURM_STEP_NUM_TASKS": 1})
    assert find_topology() == Topology()


@pytest.mark.parametrize(
    "name", sorted({*ELASTIC, *OPEN_MPI, *HYDRA, *SRUN} - {"TORCHELASTIC_RUN_ID"})
)
def test_half_an_environment_says_nothing(name, monkeypatch):
    set_all(monkeypatch, **{name: 4})
    assert find_topology() == Topology()


def logged(caplog):
    with caplog.at_level(logging.INFO, logger="loader.topology"):
        topology = CurrentTopology()
        found = [topology.settle() for _ in range(3)]
    assert found[0] == found[1] == found[2]
    return found[0], [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", *OPEN_MPI, *HYDRA])
@pytest.mark.parametrize("beside", [{}, {"MASTER_ADDR": "node7"}])
def test_half_an_environment_is_warned_of(name, beside, monkeypatch, caplog):
    set_all(monkeypatch, **beside, **{name: 4})
    found, (warning,) = logged(caplog)
    assert found == Topology()
    assert f"{name}=4 is set, without " in warning


@pytest.mark.parametrize(
    "variables", [{}, {"WORLD_SIZE": 1}, {"SLURM_PROCID": 0, "SLURM_JOB_ID": 7}, {"PMI_SIZE": 1}]
)
def test_one_process_alone_is_not_warned_of(variables, monkeypatch, caplog):
    set_all(monkeypatch, **variables)
    assert logged(caplog) == (Topology(), [])


SMALL = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost"}
"""What is left over of a run on one process."""


@pytest.mark.parametrize(
    "inner, outer, by",
    [
        (SMALL, OPEN_MPI, "mpirun"),
        (SMALL, SRUN, "srun"),
        ({**SMALL, "TORCHELASTIC_RUN_ID": "none"}, SRUN, "srun"),  # torchrun without --nnodes
        ({**ENV_STORE, "RANK": 0}, OPEN_MPI, "mpirun"),
        ({**ENV_STORE, "RANK": 0}, SRUN, "srun"),
        ({"OMPI_COMM_WORLD_RANK": 0, "OMPI_COMM_WORLD_SIZE": 1}, SRUN, "srun"),
    ],
)
def test_launchers_that_contradict_each_other_are_warned_of(inner, outer, by, monkeypatch, caplog):
    set_all(monkeypatch, **outer)
    set_all(monkeypatch, **inner)
    found, (warning,) = logged(caplog)
    assert found.rank == 0
    assert f"but {by} started this process as rank 3 of 8" in warning


@pytest.mark.parametrize(
    "inner, outer",
    [
        (ELASTIC, {**SRUN, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}),
        ({**ELASTIC, "RANK": 5}, SRUN),  # its rendezvous numbers the nodes in any sequence
        ({**ENV_STORE, "RANK": 5}, {"OMPI_COMM_WORLD_RANK": 1, "OMPI_COMM_WORLD_SIZE": 2}),
        (ENV_STORE, SRUN),  # set from Slurm's
        (OPEN_MPI, {**SRUN, "SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}),
        (OPEN_MPI, HYDRA),
        (SMALL, {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "first"}),
    ],
)
def test_launchers_within_each_other_are_not_warned_of(inner, outer, monkeypatch, caplog):
    set_all(monkeypatch, **outer)
    set_all(monkeypatch, **inner)
    assert logged(caplog)[1] == []


def test_what_is_not_a_number_is_refused_with_the_variables(monkeypatch):
    set_all(monkeypatch, **{**ELASTIC, "RANK": "first"})
    with pytest.raises(ConfigError, match="RANK and WORLD_SIZE") as caught:
        find_topology()
    assert caught.value.reason == "rank"


def test_the_rank_is_looked_up_when_it_is_needed_and_logged_once(
    monkeypatch, caplog, process_group_of_2
):
    topology = CurrentTopology()
    assert topology.now() == Topology()
    with caplog.at_level(logging.INFO, logger="loader.topology"), process_group_of_2():
        assert [topology.settle() for _ in range(2)] == [Topology(rank=1, world_size=2)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "reading as rank 1 of 2, from torch.distributed"
    ]


def test_what_a_process_group_said_outlives_it_and_travels_to_workers(process_group_of_2):
    topology = CurrentTopology()
    early = pickle.dumps(topology)
    with process_group_of_2():
        late = pickle.dumps(topology)
    assert topology.now() == pickle.loads(late).now() == Topology(rank=1, world_size=2)
    assert pickle.loads(early).now() == Topology()


def test_initialised_process_group_goes_before_the_environment(monkeypatch, process_group):
    set_all(monkeypatch, **ELASTIC)
    assert find_topology() == Topology(rank=0, world_size=1)


def test_arguments_go_before_everything(monkeypatch, process_group):
    set_all(monkeypatch, **ELASTIC)
    assert find_topology(rank=1, world_size=2) == Topology(rank=1, world_size=2)


def test_rank_0_counts_as_given(monkeypatch):
    set_all(monkeypatch, **ELASTIC)
    assert find_topology(rank=0, world_size=4) == Topology(rank=0, world_size=4)


@pytest.mark.parametrize("given", [{"rank": 0}, {"world_size": 2}])
def test_rank_and_world_size_are_only_taken_together(given):
    with pytest.raises(ConfigError) as caught:
        find_topology(**given)
    assert caught.value.reason == "topology"


@pytest.mark.parametrize("rank, world_size", [(2, 2), (-1, 2), (0, 0)])
def test_impossible_ranks_are_refused_with_both_numbers(rank, world_size):
    with pytest.raises(ConfigError) as caught:
        find_topology(rank=rank, world_size=world_size)
    assert caught.value.reason == "rank"
    assert caught.value.facts == {"rank": rank, "world_size": world_size}


def test_impossible_environment_is_refused_too(monkeypatch):
    set_all(monkeypatch, **{**ELASTIC, "RANK": 8})
    with pytest.raises(ConfigError) as caught:
        find_topology()
    assert caught.value.reason == "rank"


def test_main_process_is_one_worker():
    assert find_worker() == (0, 1)
