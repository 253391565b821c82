import pytest
import torch.distributed

from loader.topology import Topology, find_topology, find_worker
from shardspec.errors import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in VARIABLES:
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


def test_process_alone_is_the_only_rank():
    assert find_topology() == Topology(rank=0, world_size=1)


def test_torchrun_says_who_the_process_is(monkeypatch):
    set_all(monkeypatch, RANK=3, WORLD_SIZE=8)
    assert find_topology() == Topology(rank=3, world_size=8)


def test_slurm_says_who_the_process_is(monkeypatch):
    set_all(monkeypatch, SLURM_PROCID=5, SLURM_NTASKS=6)
    assert find_topology() == Topology(rank=5, world_size=6)


def test_torchrun_inside_a_slurm_job_goes_first(monkeypatch):
    set_all(monkeypatch, SLURM_PROCID=0, SLURM_NTASKS=2, RANK=3, WORLD_SIZE=8)
    assert find_topology() == Topology(rank=3, world_size=8)


@pytest.mark.parametrize("name", VARIABLES)
def test_half_an_environment_says_nothing(name, monkeypatch):
    set_all(monkeypatch, **{name: 4})
    assert find_topology() == Topology()


def test_initialised_process_group_goes_before_the_environment(monkeypatch, process_group):
    set_all(monkeypatch, RANK=3, WORLD_SIZE=8)
    assert find_topology() == Topology(rank=0, world_size=1)


def test_arguments_go_before_everything(monkeypatch, process_group):
    set_all(monkeypatch, RANK=3, WORLD_SIZE=8)
    assert find_topology(rank=1, world_size=2) == Topology(rank=1, world_size=2)


def test_rank_0_counts_as_given(monkeypatch):
    set_all(monkeypatch, RANK=3, WORLD_SIZE=8)
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
    set_all(monkeypatch, RANK=8, WORLD_SIZE=8)
    with pytest.raises(ConfigError) as caught:
        find_topology()
    assert caught.value.reason == "rank"


def test_main_process_is_one_worker():
    assert find_worker() == (0, 1)
