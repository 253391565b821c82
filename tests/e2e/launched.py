"""The program of tests/e2e/test_launchers.py: training loops of real libraries, on each rank.

Arguments: output folder, dataset, scenarios. What a rank has seen goes to NAME.RANK.json.
"""

import contextlib
import json
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from loader import DevicePrefetcher, StreamingDataset, make_dataloader
from loader.integrations import SteadyPasses, attach_to_trainer
from shardspec.errors import ShardsError

OUT, URL = Path(sys.argv[1]), sys.argv[2]
PAD = StreamingDataset(URL).ids.pad
BATCH = 4
"""Of all ranks."""


class Model(torch.nn.Module):
    """Learns nothing much, and notes what it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, input_ids, labels, **_):
        self.seen.append(rows({"input_ids": input_ids}))
        return {"loss": (self.weight * input_ids.sum()).square().mean() * 1e-9}


def rows(batch):
    """Names the rows of a batch: their tokens differ."""
    return [hash(tuple(row)) for row in batch["input_ids"].tolist()]


def make(**options):
    dataset = StreamingDataset(URL, seed=3)
    return make_dataloader(
        dataset, global_batch_size=BATCH, sequence_length=64, pad_mode="max_len", **options
    )


def tokens(examples):
    """Pads as the loader does."""
    found = torch.full((len(examples), 64), PAD)
    for row, example in zip(found, examples, strict=True):
        row[: len(example["input_ids"])] = torch.as_tensor(example["input_ids"])
    return {"input_ids": found}


def plain(batch_size=2, num_workers=0, **options):
    dataset = StreamingDataset(URL, seed=3, batch_size=2, **options)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=tokens, num_workers=num_workers)


@contextlib.contextmanager
def refused(found):
    try:
        yield
    except (ShardsError, RuntimeError) as error:
        found["refused"] = str(error)


def note(name, **found):
    rank = dist.get_rank() if dist.is_initialized() else 0
    (OUT / f"{name}.{rank}.json").write_text(json.dumps(found))


def accelerate_plain():
    """A DataLoader over a dataset that knows its rank, given to prepare()."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    for dispatch in (None, False):
        for num_workers in (0, 2):
            accelerator = Accelerator(
                cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch)
            )
            found = {}
            with refused(found):
                found["seen"] = [
                    rows(b) for b in accelerator.prepare(plain(num_workers=num_workers))
                ]
            note(f"accelerate_plain_{dispatch}_{num_workers}", **found)


def accelerate_alone():
    """Accelerate divides what every rank reads in whole."""
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(plain(rank=0, world_size=1))
    note("accelerate_alone", seen=[rows(batch) for batch in prepared])


def accelerate_recipe():
    """A loader beside prepare(), saved in the middle of an epoch and resumed."""
    from accelerate import Accelerator

    seen = []
    for resumed in (False, True):
        accelerator = Accelerator(cpu=True)
        loader = make()
        model, batches = accelerator.prepare(Model(), DevicePrefetcher(loader, accelerator.device))
        accelerator.register_for_checkpointing(batches)
        if resumed:
            accelerator.load_state(str(OUT / "accelerate"))
        for number, batch in enumerate(batches):
            accelerator.backward(model(**batch)["loss"])
            if not resumed and number == 2:
                accelerator.save_state(str(OUT / "accelerate"))
                break
        seen += accelerator.unwrap_model(model).seen
    note("accelerate_recipe", seen=seen)


def trainer(resume, steps):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(OUT / "trainer"),
        max_steps=steps,
        save_steps=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=resume,
    )
    model = Model()
    made = Trainer(model=model, args=args, train_dataset=plain().dataset, data_collator=tokens)
    return made, model


def trainer_plain():
    """A Trainer over a dataset that knows its rank."""
    found = {}
    made, _ = trainer(False, 4)
    with refused(found):
        made.train()
    note("trainer_plain", **found)


def trainer_adapter():
    """A Trainer with a loader: over the end of an epoch, and resumed."""
    seen = []
    for resume, steps in ((False, 4), (True, 8)):
        made, model = trainer(resume, steps)
        attach_to_trainer(made, make())
        made.train(resume_from_checkpoint=resume or None)
        seen += model.seen
    note("trainer_adapter", seen=seen)


def lightning():
    """Lightning makes the process group after the loader; in the middle of an epoch it resumes."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def training_step(self, batch, _):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    seen, checkpoint = [], None
    for steps in (5, 16):
        assert checkpoint is not None or not dist.is_initialized()
        module = Module()
        fit = pl.Trainer(
            max_steps=steps,
            max_epochs=-1,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(OUT),
        )
        fit.fit(module, SteadyPasses(make()), ckpt_path=checkpoint)
        checkpoint = str(OUT / "lightning.ckpt")
        fit.save_checkpoint(checkpoint)
        seen += module.model.seen
    note("lightning", seen=seen)


def alone():
    """The global batches of one process."""
    batches = SteadyPasses(make(), steps=16)
    note("alone", seen=[rows(batch) for batch in batches])


def in_child(rank, loader, port):
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    note("spawned", seen=[rows(batch) for batch in loader])
    dist.destroy_process_group()


def spawned():
    """A loader that the parent of all ranks has made."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(in_child, (make(), port), nprocs=2)


def late_group():
    """A loader and a dataset that were made, and asked for their lengths, before the group."""
    loader, data = make(), plain(num_workers=2)
    len(loader), len(data)
    dist.init_process_group("gloo")
    note("late_loader", seen=[rows(batch) for batch in loader])
    note("late_dataset", seen=[rows(batch) for batch in data])
    found = {}
    with refused(found):
        list(plain(batch_size=4, num_workers=1))
    note("other_batch", **found)


class Encoded(torch.nn.Module):
    """Runs an image encoder on steps that have crops, as models do."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = torch.nn.Linear(3, 8), torch.nn.Linear(8, 1)

    def forward(self, batch):
        hidden = batch["input_ids"].float().mean(1, keepdim=True).expand(-1, 8) / 1000
        if batch["images"].shape[1]:
            hidden = hidden + self.encoder(batch["images"].float().mean((-2, -1)) / 255).mean(1)
        return self.head(hidden).square().mean()


def fsdp():
    """A sharded model whose ranks wait for each other in the encoder, in every step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Ranks that hang end before the test does; on a busy machine one may come a minute later.
    dist.init_process_group("gloo", timeout=timedelta(seconds=180))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, options in {
        "least": {"min_images": 1},
        "fixed": {"max_images": 2},
        "shared": {"balance": "images", "min_images": 1},
    }.items():
        torch.manual_seed(0)
        model = Encoded()
        for part in (model.encoder, model.head, model):
            fully_shard(part, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses, real = [], []
        for batch in make(**options):
            loss = model(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            real.append(bool(batch["image_masks"].any()))
        weights = [p.full_tensor().tolist() for p in model.parameters()]
        note(f"fsdp_{name}", losses=losses, real=real, weights=weights)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for scenario in sys.argv[3:]:
        globals()[scenario]()
    if dist.is_initialized():
        dist.destroy_process_group()
    if "fsdp" in sys.argv:
        os._exit(0)  # now and then torch's own threads end the process with SIGABRT at its exit
