import pytest

from loader import StreamingDataset, make_dataloader
from loader.integrations import DistributedState


def load(url):
    dataset = StreamingDataset(url, seed=1, rank=0, world_size=1)
    return make_dataloader(dataset, global_batch_size=4, sequence_length=512, with_metadata=True)


def keys(batch):
    return [row["key"] for row in batch["metadata"]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changed", [False, True])
def test_distributed_checkpoints_keep_the_state_of_a_run_that_changed(
    changed, tiny_dataset, tmp_path
):
    import torch.distributed.checkpoint as dcp

    loader, other = load(tiny_dataset), load(tiny_dataset)
    next(iter(loader))
    if changed:
        loader.change(global_batch_size=8)
        next(iter(loader))
    dcp.save({"loader": DistributedState(loader)}, checkpoint_id=tmp_path)
    dcp.load({"loader": DistributedState(other)}, checkpoint_id=tmp_path)
    assert other.state_dict() == loader.state_dict()
    assert keys(next(iter(other))) == keys(next(iter(loader)))
