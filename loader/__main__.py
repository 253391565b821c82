"""The command line of the training half: `python -m loader <verb>`."""

from __future__ import annotations

import argparse
import sys

from loader.assembly import Augment, View
from loader.cli import Cluster, describe_batch, describe_plan, plan_cluster, readable_rows
from loader.dataloader import make_dataloader
from loader.stream import StreamingDataset, stored_view
from preprocess.text import IMAGE_SYMBOLS, tokenizer_from_entry
from shardspec import storage
from shardspec.errors import ShardError, ShardsError
from shardspec.manifest import TOKENIZER_NAME, require_manifest


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        print(_plan(options) if options.verb == "plan" else _peek(options))
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
        raise ShardError("tokenizer_file.missing", where=where) from error


def _plan(options: argparse.Namespace) -> str:
    plan = plan_cluster(
        require_manifest(options.shards),
        split=options.split,
        cluster=Cluster(nodes=options.nodes, ranks=options.ranks, workers=options.workers),
        global_batch_size=options.global_batch,
        canonical_ranks=options.canonical_ranks,
        seed=options.seed,
    )
    return describe_plan(plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loader", description="Look at shards the way training sees them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    peek = verbs.add_parser("peek", help="print one batch: keys, shapes, types, decoded text")
    plan = verbs.add_parser("plan", help="print what a cluster would read, from the manifest alone")

    def add(verb: argparse.ArgumentParser, flag: str, text: str, default: str | int) -> None:
        help_text = f"{text} (default: %(default)s)"
        verb.add_argument(flag, help=help_text, default=default, type=type(default))

    for verb in (peek, plan):
        verb.add_argument("shards", help="folder of the dataset")
        add(verb, "--split", "split to read", "train")
        add(verb, "--seed", "seed of the order and of the draws", 0)
    add(peek, "--batch-size", "samples in the batch", 4)
    add(peek, "--sequence-length", "longest sequence", 2048)
    peek.add_argument("--augment", action="store_true", help="augment images as in training")
    add(plan, "--nodes", "machines", 1)
    add(plan, "--ranks", "data-parallel ranks per machine", 8)
    add(plan, "--workers", "threads or worker processes per rank", 4)
    add(plan, "--global-batch", "samples per step over all ranks", 256)
    plan.add_argument("--canonical-ranks", type=int, help="width of the order (default: chosen)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
