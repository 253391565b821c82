"""Tables: results of all ranks, by a process group or through files, each question once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loader.evaluation import (
    gather_results,
    load_results,
    read_table,
    result_table,
    results_of,
    save_results,
    score_results,
    write_table,
)
from shardspec.errors import ConfigError

QUESTIONS = [("b", 0), ("b", 1), ("a", 0), ("c", 0)]


def row(key, number=0, said="yes", **more):
    return {"key": key, "question_idx": number, "prediction": said, **more}


ROWS = [row(key, number, f"{key}{number}") for key, number in QUESTIONS]


@given(st.permutations(ROWS), st.integers(0, 3))
def test_the_table_does_not_depend_on_the_order_of_the_rows(rows, repeated):
    rows = [*rows, rows[repeated], {"key": None, "prediction": "x"}, row("b", real=False)]
    assert result_table(rows, expected=QUESTIONS) == ROWS


def test_without_a_dataset_the_samples_numbers_are_the_order():
    rows = [row("a", 1, sample=9), row("c", sample=2), row("a", 0, sample=9)]
    assert [(r["key"], r["question_idx"]) for r in result_table(rows)] == [
        *(("c", 0), ("a", 0), ("a", 1))
    ]


@pytest.mark.parametrize(
    "rows, said",
    [
        ([*ROWS, row("b", 1, "other")], "two predictions for the same question differ"),
        (ROWS[:1] + ROWS[2:], "1 of 4 questions have no prediction"),
        ([], "4 of 4 questions have no prediction"),
        ([*ROWS, row("d")], "1 predictions are for questions that the dataset"),
        ([*ROWS, row("b", 2)], "b question 2"),
        ([{"prediction": "x"}], "does not name its question"),
        ([{"key": "b"}], "does not name its question"),
        ([{**row("b"), "question_idx": "0"}], "does not name its question"),
    ],
)
def test_tables_that_are_not_whole_are_refused(rows, said):
    with pytest.raises(ConfigError) as caught:
        result_table(rows, expected=QUESTIONS)
    assert caught.value.reason == "results"
    assert said in str(caught.value)


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    table = [row("b", 0, 'a "line"\n 🙂', record={"answers": ["é"], "points": [[1.5, 2]]})]
    write_table(str(tmp_path / "table.jsonl"), table)
    assert read_table(str(tmp_path / "table.jsonl")) == table


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(1), b"x"])
def test_values_that_json_has_not_are_refused(tmp_path, value):
    with pytest.raises(ConfigError) as caught:
        write_table(str(tmp_path / "table.jsonl"), [row("b", said=value)])
    assert caught.value.reason == "results"
    assert not list(tmp_path.iterdir())


def test_lines_that_are_not_rows_are_named(tmp_path):
    path = tmp_path / "table.jsonl"
    path.write_text('{"key": "a"}\n\n[1]\n')
    with pytest.raises(ConfigError) as caught:
        read_table(str(path))
    assert caught.value.where == f"{path} line 3"
    with pytest.raises(ConfigError) as caught:
        read_table(str(tmp_path / "none.jsonl"))
    assert caught.value.reason == "results"


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_files_of_all_ranks_make_one_table(tmp_path, world_size):
    for rank in range(world_size):
        save_results(str(tmp_path), ROWS[rank::world_size], rank=rank, world_size=world_size)
    assert load_results(str(tmp_path)) == sorted(ROWS, key=lambda r: (r["key"], r["question_idx"]))


@pytest.mark.parametrize("saved", [[], [(0, 2)], [(0, 1), (0, 2), (1, 2)], [(1, 2)]])
def test_folders_without_one_file_of_each_rank_are_refused(tmp_path, saved):
    for rank, world_size in saved:
        save_results(str(tmp_path), ROWS, rank=rank, world_size=world_size)
    with pytest.raises(ConfigError) as caught:
        load_results(str(tmp_path))
    assert caught.value.reason == "results"


def test_several_ranks_need_a_process_group(monkeypatch):
    assert gather_results(ROWS)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        gather_results(ROWS)
    assert caught.value.reason == "results"
    assert "save_results" in str(caught.value)


def test_batches_and_predictions_must_belong_together():
    for batch in ({}, {"metadata": [{"key": "a"}]}):
        with pytest.raises(ConfigError) as caught:
            results_of(batch, ["x", "y"])
        assert caught.value.reason == "results"


@pytest.mark.parametrize(
    "table, metric, reason",
    [
        ([], None, "results"),
        ([row("a")], None, "references"),
        ([row("a", record={"style": "vqa2"})], None, "references"),
        ([row("a", record={"answer": "x"})], "pointing", "references"),
        ([row("a", record={"answer": "x"})], "bleu", "metric"),
    ],
)
def test_what_cannot_be_scored_is_refused(table, metric, reason):
    with pytest.raises(ConfigError) as caught:
        score_results(table, metric=metric)
    assert caught.value.reason == reason


def test_references_are_found_by_key_and_question():
    right = [row("a", 0, record={"answer": "yes"}), row("a", 1, record={"answer": "no"})]
    (score,) = score_results([row("a", 1, "no")], references=right)
    assert (score.metric, score.score) == ("exact", 1.0)
    with pytest.raises(ConfigError) as caught:
        score_results([row("b", 1, "no")], references=right)
    assert caught.value.reason == "references"
