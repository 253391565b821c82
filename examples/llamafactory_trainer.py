"""Trains with LLaMA-Factory's own trainer, `CustomSeq2SeqTrainer`; the same command again resumes.

    make shards DATASET=pixmo_cap SOURCE=sample MODEL=Qwen/Qwen2-VL-2B-Instruct OUT=shards/captions
    python examples/llamafactory_trainer.py shards/captions folder-of-the-model --steps 8

Its workflow makes the trainer in the same way; only dataset and collator are these here.
"""

import argparse
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("model", help="folder or hub id; the MODEL= of the shards")
parser.add_argument("--random", action="store_true", help="train from random weights")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="runs/llamafactory")
options = parser.parse_args()

import torch
from llamafactory.hparams import FinetuningArguments, TrainingArguments
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, set_seed

from loader import StreamingDataset, make_dataloader
from loader.integrations import hf

set_seed(0)
kind = AutoModelForImageTextToText
saved = Path(options.out).glob("checkpoint-*/trainer_state.json")  # which is written last
last = max((each.parent for each in saved), key=lambda each: int(each.name[11:]), default=None)
if options.random and last is None:
    model = kind.from_config(AutoConfig.from_pretrained(options.model))
else:
    model = kind.from_pretrained(last or options.model)
args = TrainingArguments(
    output_dir=options.out,
    max_steps=options.steps,
    save_steps=4,
    per_device_train_batch_size=4,
    lr_scheduler_type="constant",
    report_to="none",
    logging_steps=1,
    use_cpu=not torch.cuda.is_available(),
)
trainer = CustomSeq2SeqTrainer(
    model=model,
    args=args,
    finetuning_args=FinetuningArguments(),
    processor=None,
    tokenizer=AutoTokenizer.from_pretrained(options.model),
    train_dataset=hf.dataset(),
    data_collator=hf.collate,
)
loader = make_dataloader(
    StreamingDataset(options.shards, seed=0), global_batch_size=4, sequence_length=2048
)
hf.attach_to_trainer(trainer, loader)
trainer.train(resume_from_checkpoint=last)
