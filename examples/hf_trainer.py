"""Trains a model of transformers with its Trainer, or TRL's; the same command again resumes.

    make shards DATASET=pixmo_cap SOURCE=sample MODEL=Qwen/Qwen2-VL-2B-Instruct OUT=shards/captions
    python examples/hf_trainer.py shards/captions Qwen/Qwen2-VL-2B-Instruct --steps 8

Under torchrun each process is a rank; a run resumes on any number of them that divides the batch.
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

from loader import StreamingDataset, make_dataloader
from loader.integrations import hf

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("model", help="hub id or folder; the MODEL= of the shards")
parser.add_argument("--random", action="store_true", help="train from random weights")
parser.add_argument("--trl", action="store_true", help="train with TRL's SFTTrainer")
parser.add_argument("--pack", action="store_true", help="several samples in a row")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--batch-size", type=int, default=4, help="rows of all ranks")
parser.add_argument("--out", default="runs/hf")
options = parser.parse_args()

torch.manual_seed(0)
kind = AutoModelForImageTextToText
saved = Path(options.out).glob("checkpoint-*/trainer_state.json")  # which is written last
last = max((each.parent for each in saved), key=lambda each: int(each.name[11:]), default=None)
if options.random and last is None:
    model = kind.from_config(AutoConfig.from_pretrained(options.model))
else:  # a Trainer that resumes does not load the weights of every model: docs/trainers.md
    model = kind.from_pretrained(last or options.model)
rows = options.batch_size // int(os.environ.get("WORLD_SIZE", "1"))
settings = {"output_dir": options.out, "max_steps": options.steps, "save_steps": 4}
settings |= {"per_device_train_batch_size": rows, "lr_scheduler_type": "constant"}
settings |= {"report_to": "none", "logging_steps": 1, "use_cpu": not torch.cuda.is_available()}
if options.trl:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
    stand_in = {"train_dataset": hf.dataset(), "data_collator": hf.collate}
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = SFTTrainer(model=model, args=args, processing_class=tokenizer, **stand_in)
else:
    trainer = Trainer(model=model, args=TrainingArguments(**settings))

size = {"global_batch_size": options.batch_size, "sequence_length": 2048, "pack": options.pack}
hf.attach_to_trainer(trainer, make_dataloader(StreamingDataset(options.shards, seed=0), **size))
trainer.train(resume_from_checkpoint=last)
