"""Trains in a trainer that wants a dataset and a collator, such as LLaMA-Factory's workflow.

    make shards DATASET=pixmo_cap SOURCE=sample MODEL=Qwen/Qwen2-VL-2B-Instruct OUT=shards/captions
    python examples/dataset_and_collator.py shards/captions Qwen/Qwen2-VL-2B-Instruct --steps 8

`hf.dataset()` and `hf.collate` fill the two arguments, and one line lets the loader's batches
replace what they would give. The trainer keeps its own loss, sampler and logs.
"""

import argparse

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from loader import StreamingDataset, make_dataloader
from loader.integrations import hf


class CustomTrainer(Seq2SeqTrainer):
    """What such frameworks have of their own: a sampler for their data, a loss."""

    def _get_train_sampler(self, *args, **kwargs):  # never called: the loader has its order
        raise NotImplementedError

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, inputs, *args, **kwargs)


parser = argparse.ArgumentParser()
parser.add_argument("shards")
parser.add_argument("model", help="hub id or folder; the MODEL= of the shards")
parser.add_argument("--random", action="store_true", help="train from random weights")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="runs/framework")
options = parser.parse_args()

set_seed(0)
kind, config = AutoModelForImageTextToText, AutoConfig.from_pretrained(options.model)
model = kind.from_config(config) if options.random else kind.from_pretrained(options.model)
settings = {"output_dir": options.out, "max_steps": options.steps, "report_to": "none"}
settings |= {"per_device_train_batch_size": 4, "use_cpu": not torch.cuda.is_available()}
settings |= {"logging_steps": 1, "predict_with_generate": True, "remove_unused_columns": False}
trainer = CustomTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(**settings),
    processing_class=AutoTokenizer.from_pretrained(options.model),
    data_collator=hf.collate,
    train_dataset=hf.dataset(),
)
dataset = StreamingDataset(options.shards, seed=0)
hf.attach_to_trainer(trainer, make_dataloader(dataset, global_batch_size=4, sequence_length=2048))
trainer.train()
