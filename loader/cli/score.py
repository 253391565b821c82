"""`python -m loader score`: scores of predictions that were written as JSON lines."""

from __future__ import annotations

import argparse

from loader.assembly import Questions, View
from loader.cli.verb import Verb, add_flag
from loader.evaluation import (
    METRICS,
    Score,
    questions_of,
    read_table,
    references,
    result_table,
    score_results,
)
from loader.stream import StreamingDataset, stored_view
from shardspec.manifest import require_manifest


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predictions", help="JSON lines with key, question_idx and prediction")
    add_flag(parser, "--dataset", "dataset that was evaluated; without it, each line's record", "")
    add_flag(parser, "--split", "split that was evaluated", "validation")
    parser.add_argument("--first", action="store_true", help="only first questions were asked")
    parser.add_argument("--metric", choices=METRICS, help="default: the one of each row's style")


def _run(options: argparse.Namespace) -> str:
    rows = read_table(options.predictions)
    if not options.dataset:
        return _described(score_results(result_table(rows), metric=options.metric))
    image = stored_view(require_manifest(options.dataset))
    questions: Questions = "first" if options.first else "all"
    view = View(image=image, purpose="evaluation", questions=questions)
    dataset = StreamingDataset(
        options.dataset, split=options.split, view=view, tail="pad", rank=0, world_size=1
    )
    table = result_table(rows, expected=questions_of(dataset))
    scores = score_results(table, metric=options.metric, references=references(dataset))
    return _described(scores)


def _described(scores: list[Score]) -> str:
    lines = [f"{'metric':<10} {'score':>7}  questions"]
    for score in scores:
        parts = "".join(f"  {name} {value:.4f}" for name, value in score.parts.items())
        lines.append(f"{score.metric:<10} {score.score:>7.4f}  {score.num_questions:,}{parts}")
    return "\n".join(lines)


SCORE = Verb(name="score", help="score predictions against what the shards say", add=_add, run=_run)
