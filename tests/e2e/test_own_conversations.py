"""Conversations of a user's file, from JSON Lines to the arrays of a training step."""

import json

from loader import StreamingDataset
from preprocess.text import load_tokenizer


def test_answers_without_loss_and_reasoning_reach_the_batch(inline_cli, tmp_path):
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Wrong.", "train": False},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Right.", "weight": 0.5, "reasoning_content": "Hm."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Four?"},
        {"role": "assistant", "content": "Never.", "weight": 0},
    ]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    job = ["shards", tmp_path / "talk.jsonl", "--out", tmp_path / "out", "--workers", 1]
    job += ["--cache", tmp_path / "cache"]
    refused = inline_cli.run(*job)
    assert refused.code == 2
    assert "reasoning" in refused.err
    inline_cli.good(*job, "--reasoning", "keep")
    inline_cli.good("verify", tmp_path / "out", "--deep")
    example = StreamingDataset(str(tmp_path / "out"), seed=0).example(0)
    tokenizer = load_tokenizer()
    text = tokenizer.decode(example["input_ids"].tolist())
    assert "Wrong." in text
    assert "Never." not in text
    by_weight = {}
    for label, weight in zip(example["labels"], example["loss_weights"], strict=True):
        assert (label == -100) == (weight == 0)
        by_weight.setdefault(float(weight), []).append(int(label))
    eos = tokenizer.decode([tokenizer.special_ids["eos"]])
    learned = {weight: tokenizer.decode(ids) for weight, ids in by_weight.items() if weight}
    assert learned == {
        0.5: f" <think>\nHm.\n</think>\n\nRight.{eos}",
        1.0: f" Yes.{eos}",
    }
