"""Evaluation of shards that were built of real layouts: prompts, references, scores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loader import StreamingDataset, View, make_dataloader
from loader.__main__ import main
from loader.evaluation import (
    gather_results,
    read_table,
    references,
    results_of,
    score_results,
    write_table,
)
from preprocess.text.tokens import load_tokenizer
from shardspec.errors import ConfigError, SampleError
from tests.programs import torchrun

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

# Rows of four layouts, what a model says to each, and what that is worth by the row's metric.
KINDS = {
    "vqa2": [
        ({"question": "Which colour?", "answers": ["red"] * 3 + ["blue"] * 7}, "Red.", 0.9),
        ({"question": "How many?", "answers": ["2"] * 10}, "two", 1.0),
        ({"question": "Is it?", "answers": ["yes"] * 10}, "no", 0.0),
    ],
    "chart_qa": [
        ({"question": "What share?", "answer": "40"}, "41.9", 1.0),
        ({"question": "Which year?", "answer": "1999"}, "2200", 0.0),
    ],
    "doc_qa": [
        ({"question": "Who?", "answers": ["Coca Cola", "Coca Cola Company"]}, "CocaCola", 8 / 9),
        ({"question": "When?", "answers": ["May 5"]}, "never", 0.0),
    ],
    "science_qa": [
        ({"question": "Which?", "options": ["cat", "dog"], "answer": "B"}, "B. dog", 1.0),
        ({"question": "Which?", "options": ["cat", "dog"], "answer": "A"}, "dog", 0.0),
    ],
}
METRICS = {"vqa2": "vqa", "chart_qa": "relaxed", "doc_qa": "anls", "science_qa": "choice"}


@pytest.fixture(scope="module")
def built(tmp_path_factory, inline_cli):
    """A function that builds shards of the rows of a style, and returns their folder."""
    folder = tmp_path_factory.mktemp("evaluation")
    made = {}

    def build(style):
        if style not in made:
            lines = []
            for i, (row, _, _) in enumerate(KINDS[style]):
                pixels = np.random.RandomState(i).randint(0, 256, (40, 50, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{style}{i}.png")
                named = {"image": f"{style}{i}.png", "question_id": 100 + i, **row}
                lines.append(json.dumps(named))
            (folder / f"{style}.jsonl").write_text("\n".join(lines))
            spec = f'name = "{style}"\nformat = "vqa"\nsource = "{folder}/{style}.jsonl"\n'
            (folder / f"{style}.toml").write_text(f'{spec}style = "{style}"\n')
            flags = ("--image-size", 112, "--workers", 1, "--num-shards", 1)
            out = folder / "shards" / style
            inline_cli.good("shards", folder / f"{style}.toml", *flags, "--out", out)
            made[style] = str(out)
        return made[style]

    return build


def opened(url, split="train", **settings):
    image = StreamingDataset(url, split=split).view.image
    view = View(image=image, purpose="evaluation")
    return StreamingDataset(url, split=split, view=view, tail="pad", **settings)


def predicted(dataset, style):
    """Runs a model that knows what to say to each question id."""
    said = {100 + i: text for i, (_, text, _) in enumerate(KINDS[style])}
    loader = make_dataloader(
        dataset, global_batch_size=2, sequence_length=512, metadata=True, decode_threads=0
    )
    rows = []
    for batch in loader:
        answers = [said[row["record"]["question_id"]] for row in batch["metadata"]]
        rows += results_of(batch, answers)
    return gather_results(rows, dataset=dataset)


@pytest.mark.parametrize("style", KINDS)
def test_own_data_is_built_evaluated_and_scored(built, style, tmp_path, capsys):
    url = built(style)
    table = predicted(opened(url), style)
    worth = {100 + i: score for i, (_, _, score) in enumerate(KINDS[style])}
    (score,) = score_results(table)
    assert score.metric == METRICS[style]
    got = [row["record"]["question_id"] for row in table]
    assert dict(zip(got, score.values, strict=True)) == pytest.approx(worth)
    assert score.score == pytest.approx(sum(worth.values()) / len(worth))
    images = {row["record"]["image_names"][0] for row in table}
    assert images == {f"{style}{i}.png" for i in range(len(worth))}
    assert all(row["images"] == [{"width": 50, "height": 40, "crops": 1}] for row in table)

    bare = [{name: row[name] for name in ("key", "question_idx", "prediction")} for row in table]
    write_table(str(tmp_path / "said.jsonl"), bare)
    assert main(["score", str(tmp_path / "said.jsonl"), "--dataset", url, "--split", "train"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[:3] == [
        *(METRICS[style], f"{score.score:.4f}", str(len(worth)))
    ]
    write_table(str(tmp_path / "whole.jsonl"), table)
    assert main(["score", str(tmp_path / "whole.jsonl")]) == 0
    assert capsys.readouterr().out == printed
    assert main(["score", str(tmp_path / "said.jsonl")]) == 1
    assert "no reference" in capsys.readouterr().err


def test_prompts_read_as_the_question_and_nothing_more(built):
    dataset = opened(built("science_qa"), shuffle=False)
    batch = next(
        iter(
            make_dataloader(
                dataset, global_batch_size=2, sequence_length=512, pad_side="left", metadata=True
            )
        )
    )
    decode = load_tokenizer().decode
    for ids, row in zip(batch["input_ids"].tolist(), batch["metadata"], strict=True):
        text = decode([token for token in ids if token < 2944])  # without image symbols
        assert "A. cat" in text
        assert text.rstrip().endswith("Assistant:")
        assert row["record"]["answer_idx"] in (0, 1)
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]


@pytest.fixture
def hidden(tmp_path):
    """A function that makes a spec of rows without answers, and returns its path."""
    pixels = np.random.RandomState(3).randint(0, 256, (40, 50, 3), np.uint8)
    picture = tmp_path / "images" / "test2015" / "COCO_test2015_000000000007.png"
    picture.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(picture)
    os.link(picture, picture.with_suffix(".jpg"))
    name = f"test2015/{picture.name}"
    asked = {"question": "Which colour?", "question_id": 100}
    chat = [("human", "<image>\nWho?"), ("gpt", "Anna"), ("human", "Where?")]
    made = {
        "vqa": [{"image": name, **asked}, {"image": name, **asked, "answer": "red"}],
        "documents": [{"image": name, "questions": [{**asked, "question": q}]} for q in "ab"],
        "llava": [{"image": name, "conversations": [{"from": f, "value": v} for f, v in chat]}],
        "vqa2": {"data_subtype": "test2015", "questions": [{"image_id": 7, **asked}]},
    }

    def spec(kind):
        rows = made[kind]
        text = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows]))
        (tmp_path / "questions.json").write_text(text)
        path = tmp_path / "set.toml"
        format_ = {"vqa2": "vqa"}.get(kind, kind)
        (tmp_path / "train.json").write_text(text)
        path.write_text(
            f'name = "set"\nformat = "{format_}"\nimages = "{tmp_path}/images"\n'
            'unanswered = ["test"]\n[splits]\ntest = "questions.json"\ntrain = "train.json"\n'
        )
        return path

    return spec


@pytest.mark.parametrize("kind", ["vqa", "documents", "llava", "vqa2"])
def test_questions_whose_answers_are_hidden_are_asked_and_not_scored(
    kind, hidden, inline_cli, tmp_path
):
    flags = ("--image-size", 112, "--workers", 1, "--num-shards", 1, "--split", "test")
    inline_cli.good("shards", hidden(kind), *flags, "--out", tmp_path / "out")
    inline_cli.good("verify", tmp_path / "out")
    dataset = opened(str(tmp_path / "out"), split="test")
    loader = make_dataloader(
        dataset, global_batch_size=1, sequence_length=512, metadata=True, decode_threads=0
    )
    rows = [row for batch in loader for row in results_of(batch, ["Red."])]
    table = gather_results(rows, dataset=dataset)
    assert len(table) == (1 if kind == "vqa2" else 2)
    assert [row["prediction"] for row in table] == ["Red."] * len(table)
    write_table(str(tmp_path / "said.jsonl"), table)
    assert len(read_table(str(tmp_path / "said.jsonl"))) == len(table)
    with pytest.raises(ConfigError, match="no answer") as caught:
        score_results(table)
    assert caught.value.reason == "references"
    with pytest.raises(SampleError, match="no answer to learn") as refused:
        list(StreamingDataset(str(tmp_path / "out"), split="test"))
    assert refused.value.reason == "unanswered"


def test_a_missing_answer_of_another_split_is_a_counted_reason(hidden, inline_cli, tmp_path):
    flags = ("--image-size", 112, "--workers", 1, "--num-shards", 1, "--max-lost-rows", 0.9)
    inline_cli.good("shards", hidden("vqa"), *flags, "--out", tmp_path / "out")
    (bad,) = (tmp_path / "out").glob("quarantine/**/*.jsonl")
    assert json.loads(bad.read_text())["reason"] == "row_fields"


@pytest.fixture(scope="module")
def questions(tmp_path_factory, inline_cli):
    """Trees of five to twelve generated questions."""
    out = tmp_path_factory.mktemp("vqa2") / "vqa2"
    flags = ("--source", "sample", "--limit", 3, "--image-size", 112, "--workers", 1)
    inline_cli.good("shards", "vqa2", *flags, "--out", out)
    return str(out)


def run_example(questions, out, *, processes):
    command = [sys.executable]
    if processes > 1:
        command += torchrun(processes)
    done = subprocess.run(
        [*command, str(EXAMPLES / "evaluate.py"), questions, str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, read_table(str(out))


@pytest.mark.parametrize("mode, warns", [("style", False), ("style_and_length_v2", True)])
def test_prompts_that_name_the_length_of_the_answer_are_warned_of(
    mode, warns, inline_cli, tmp_path, caplog
):
    flags = ("--source", "sample", "--limit", 1, "--image-size", 112, "--workers", 1)
    flags += ("--system-prompt", mode, "--variants", 1)
    inline_cli.good("shards", "text_sft", *flags, "--out", tmp_path / "set")
    for rank in (1, 0):  # rank 0 alone says so
        opened(str(tmp_path / "set"), rank=rank, world_size=2)
        assert ("length of the answer" in caplog.text) == (warns and rank == 0)


def test_the_example_evaluates_a_random_model(questions, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import evaluate

    evaluate.main(questions, str(tmp_path / "said.jsonl"))
    wanted = references(opened(questions))
    printed = capsys.readouterr().out
    assert printed.startswith("vqa  0.")
    assert printed.endswith(f"of {len(wanted)} questions\n")
    table = read_table(str(tmp_path / "said.jsonl"))
    assert [row["key"] for row in table] == [row["key"] for row in wanted]
    assert len(wanted) >= 15
    (score,) = score_results(table, references=wanted)
    assert f"{score.score:.4f}" in printed


@pytest.mark.slow
def test_one_two_and_three_processes_print_the_same_scores(questions, tmp_path):
    found = [run_example(questions, tmp_path / f"{n}.jsonl", processes=n) for n in (1, 2, 3)]
    assert found[0] == found[1] == found[2]
