"""`python -m loader peek`: one batch as training sees it, with its text decoded.

Joins both halves of the project: the loader gives the batch, the offline half its tokenizer.
"""

from __future__ import annotations

import argparse

from loader.cli.opened import open_dataset
from loader.cli.readable import describe_batch, readable_model_rows, readable_rows
from loader.cli.verb import Verb, add_dataset, add_flag
from loader.dataloader import make_dataloader
from preprocess.text import IMAGE_SYMBOLS, Tokenizer, tokenizer_from_entry
from shardspec import storage
from shardspec.errors import ShardError
from shardspec.manifest import TOKENIZER_NAME, Manifest
from shardspec.messages import counted
from shardspec.probe import check_stored_tokenizer


def _add(parser: argparse.ArgumentParser) -> None:
    add_dataset(parser)
    add_flag(parser, "--batch-size", "samples in the batch", 4)
    add_flag(parser, "--sequence-length", "longest sequence", 2048)
    parser.add_argument("--augment", action="store_true", help="augment images as in training")


def _run(options: argparse.Namespace) -> str:
    opened = open_dataset(options)
    manifest, model = opened.manifest, opened.model
    loader = make_dataloader(
        opened.dataset,
        global_batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        with_metadata=True,
    )
    batch = next(iter(loader))
    tokenizer = open_tokenizer(options.shards, manifest)
    ids = manifest.tokenizer.special_ids
    if model is not None:
        rows = readable_model_rows(batch, decode=tokenizer.decode, soft_id=model.soft_id)
    else:
        rows = readable_rows(
            batch,
            decode=tokenizer.decode,
            image_ids={ids[symbol]: symbol for symbol in IMAGE_SYMBOLS},
        )
    keys = [metadata["key"] for metadata in batch.pop("metadata")]
    split = manifest.splits[options.split]
    head = (
        f"{manifest.dataset} {options.split}: {counted(split.num_samples, 'sample')}, "
        f"{counted(len(loader), 'step')} of {options.batch_size} per epoch"
    )
    shown = [f"--- {key}\n{row}" for key, row in zip(keys, rows, strict=True)]
    legend = "tokens under loss are between ⟦ and ⟧"
    return "\n".join([head, "", describe_batch(batch), "", legend, *shown])


def open_tokenizer(url: str, manifest: Manifest) -> Tokenizer:
    """Reads the tokenizer that a dataset carries.

    Raises:
      ShardError: `tokenizer_file`.
    """
    entry = manifest.tokenizer
    where = storage.join(url, TOKENIZER_NAME)
    try:
        payload = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ShardError("tokenizer_file.missing", where=where) from error
    check_stored_tokenizer(entry, payload, where=where)
    return tokenizer_from_entry(payload.decode(), entry)


PEEK = Verb(
    name="peek", help="print one batch: keys, shapes, types, decoded text", add=_add, run=_run
)
