"""The command line of the training half: `python -m loader <verb>`."""

from __future__ import annotations

import argparse
import sys

from loader.assemble import View
from loader.augment import Augment
from loader.dataloader import make_dataloader
from loader.peek import describe_batch, readable_rows
from loader.stream import StreamingDataset, stored_view
from preprocess.tokens import IMAGE_SYMBOLS, tokenizer_from_entry
from shardspec import storage
from shardspec.errors import ShardError, ShardsError
from shardspec.manifest import TOKENIZER_NAME, require_manifest


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        print(_peek(options))
    except ShardsError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _peek(options: argparse.Namespace) -> str:
    manifest = require_manifest(options.shards)
    augment = Augment.standard() if options.augment else Augment()
    view = View(image=stored_view(manifest), augment=augment)
    dataset = StreamingDataset(options.shards, split=options.split, seed=options.seed, view=view)
    loader = make_dataloader(
        dataset,
        global_batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        with_metadata=True,
    )
    batch = next(iter(loader))
    text = _tokenizer_json(options.shards)
    tokenizer = tokenizer_from_entry(text, manifest.tokenizer)
    ids = manifest.tokenizer.special_ids
    rows = readable_rows(
        batch,
        decode=tokenizer.decode,
        image_ids={ids[symbol]: symbol for symbol in IMAGE_SYMBOLS},
    )
    keys = [metadata["key"] for metadata in batch.pop("metadata")]
    split = manifest.splits[options.split]
    head = (
        f"{manifest.dataset} {options.split}: {split.num_samples:,} samples, "
        f"{len(loader):,} steps of {options.batch_size} per epoch"
    )
    shown = [f"--- {key}\n{row}" for key, row in zip(keys, rows, strict=True)]
    legend = "tokens under loss stand between ⟦ and ⟧"
    return "\n".join([head, "", describe_batch(batch), "", legend, *shown])


def _tokenizer_json(url: str) -> str:
    where = storage.join(url, TOKENIZER_NAME)
    try:
        return storage.read_bytes(where).decode()
    except FileNotFoundError as error:
        raise ShardError(
            "the dataset's copy of its tokenizer is missing",
            reason="tokenizer_file",
            where=where,
            fix="run the `make shards` command that made the dataset: it puts it back",
        ) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loader", description="Look at shards the way training sees them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    peek = verbs.add_parser("peek", help="print one batch: keys, shapes, types, decoded text")
    peek.add_argument("shards", help="folder of the dataset")

    def add(flag: str, text: str, default: str | int) -> None:
        help_text = f"{text} (default: %(default)s)"
        peek.add_argument(flag, help=help_text, default=default, type=type(default))

    add("--split", "split to read", "train")
    add("--batch-size", "samples in the batch", 4)
    add("--sequence-length", "longest sequence", 2048)
    add("--seed", "seed of the order and of the draws", 0)
    peek.add_argument("--augment", action="store_true", help="augment images as in training")
    return parser


if __name__ == "__main__":
    sys.exit(main())
