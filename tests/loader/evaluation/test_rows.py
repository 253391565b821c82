"""Rows: an evaluation shows each question of a dataset once, on any number of ranks."""

import hashlib
import json
import multiprocessing
import shutil
from itertools import islice

import numpy as np
import pytest
from numpy.lib import recfunctions
from torch import distributed
from torch.utils.data import DataLoader

from loader import (
    IterableDatasetMixture,
    StreamingDataset,
    View,
    make_dataloader,
    view_collator,
)
from loader.evaluation import (
    gather_results,
    load_results,
    questions_of,
    references,
    result_table,
    results_of,
    save_results,
    score_results,
)
from shardspec.errors import ConfigError
from shardspec.manifest import sealed
from shardspec.tiling import ImageView

VIEW = View(image=ImageView(size_px=28, patch_px=14, pool=(1, 1)), purpose="evaluation")
SIZES = [3, 1, 2, 1, 4, 1, 1, 2, 1, 3, 1]
"""Questions of each sample."""

QUESTIONS = [(f"sample-{i:04d}", n) for i, size in enumerate(SIZES) for n in range(size)]


@pytest.fixture(scope="module")
def url(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i, num_branches=size) for i, size in enumerate(SIZES)]
    for sample in samples:
        sample.record["message_list"] = [
            {"style": "vqa2", "question": f"q{b}?", "answers": [f"{sample.key} {b}"] * 10}
            for b in range(4)
        ]
    return write_dataset(tmp_path_factory.mktemp("rows") / "set", samples, num_shards=3)


def opened(url, *, rank=0, world_size=1, **settings):
    settings = {"view": VIEW, "tail": "pad", "seed": 5, **settings}
    return StreamingDataset(url, rank=rank, world_size=world_size, **settings)


def batches(dataset, *, batch=6, **settings):
    settings = {"sequence_length": 64, "decode_threads": 0, "metadata": True, **settings}
    return list(make_dataloader(dataset, global_batch_size=batch, **settings))


def answered(made):
    """A model that says what it sees: the text of the prompt and the sum of its pixels."""
    rows = []
    for batch in made:
        said = [
            f"{ids[mask.bool()].tolist()} {image.sum()}"
            for ids, mask, image in zip(
                batch["input_ids"], batch["attention_mask"], batch["images"], strict=True
            )
        ]
        rows += results_of(batch, said)
    return rows


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_question_comes_once_on_any_number_of_ranks(url, world_size, shuffle):
    ranks = [
        opened(url, rank=rank, world_size=world_size, shuffle=shuffle) for rank in range(world_size)
    ]
    assert {dataset.num_samples for dataset in ranks} == {len(QUESTIONS)}
    made = [batches(dataset, pad_side="left" if shuffle else "right") for dataset in ranks]
    assert {len(each) for each in made} == {-(-len(QUESTIONS) // 6)}
    real = [row for each in made for batch in each for row in batch["real"].tolist()]
    assert real.count(True) == len(QUESTIONS)
    rows = [row for each in made for row in answered(each)]
    assert len(rows) == len(QUESTIONS)
    table = result_table(rows, expected=questions_of(ranks[0]))
    assert [(row["key"], row["question_idx"]) for row in table] == QUESTIONS
    assert result_table(rows) == table == result_table(answered(batches(opened(url))))


def test_stored_order_is_kept_without_a_shuffle(url):
    rows = answered(batches(opened(url, shuffle=False)))
    assert [(row["key"], row["question_idx"]) for row in rows] == QUESTIONS


def test_only_first_questions_are_asked_on_request(url):
    # Each conversation of these samples has one exchange.
    view = View(image=VIEW.image, purpose="evaluation", questions="first")
    assert opened(url, view=view).num_samples == len(QUESTIONS)


def test_batches_tell_the_wanted_fields_and_nothing_else(url):
    (batch, *_), (bare, *_) = (
        batches(opened(url, shuffle=False), metadata=fields)
        for fields in (("answers", "number", "colour"), False)
    )
    assert batch["metadata"][1] == {
        "key": "sample-0000",
        "sample": 0,
        "question_idx": 1,
        "images": [{"width": 28, "height": 28, "crops": 1}],
        "dropped_branches": 0,
        "record": {"answers": ["sample-0000 1"] * 10, "colour": None, "number": 0},
    }
    assert "metadata" not in bare
    assert (batch["labels"] == -100).all()
    keyed = batches(opened(url), metadata=False, with_metadata=True)[0]["metadata"][0]
    assert "record" not in keyed


def test_a_plain_dataloader_gives_the_same_rows(url):
    collate = view_collator(
        VIEW,
        sequence_length=64,
        pad_token_id=opened(url).ids.pad,
        with_metadata=True,
        with_real=True,
        pad_side="left",
    )
    dataset = opened(url, batch_size=6)
    found = list(DataLoader(dataset, batch_size=6, collate_fn=collate))
    assert answered(found) == answered(batches(opened(url), pad_side="left"))


def test_packs_tell_the_records_of_their_parts(url):
    dataset = opened(url, view=View(image=VIEW.image), tail="wrap", shuffle=False)
    batch = batches(dataset, batch=1, pack=True, metadata=("number",), sequence_length=256)[0]
    (row,) = batch["metadata"]
    assert len(row["examples"]) > 1
    assert all(part["record"].keys() == {"number"} for part in row["examples"])


def test_rows_that_fill_the_last_batch_have_no_key(url):
    *_, last = batches(opened(url))
    assert last["real"].tolist() == [True, True, False, False, False, False]
    assert [row["key"] for row in last["metadata"]][2:] == [None] * 4
    assert len(results_of(last, list("abcdef"))) == 2


def test_metadata_comes_along_in_training_too(url):
    dataset = opened(url, view=View(image=VIEW.image), tail="wrap", shuffle=False)
    batch = batches(dataset, metadata=("number", "message_list"))[0]
    assert batch["metadata"][2]["record"]["number"] == 2
    assert len(batch["metadata"][2]["record"]["message_list"]) == 4
    assert "question_idx" not in batch["metadata"][2]
    row = next(iter(make_dataloader(dataset, global_batch_size=6, sequence_length=64)))
    assert "metadata" not in row


def test_references_are_read_from_the_shards(url):
    found = references(opened(url))
    assert [(row["key"], row["question_idx"]) for row in found] == QUESTIONS
    assert found[1]["record"]["answers"] == ["sample-0000 1"] * 10
    assert found[1]["images"] == [{"width": 28, "height": 28}]


def test_an_object_store_gives_the_same_rows_and_references(url, s3_server):
    bucket = s3_server.make_bucket()
    s3_server.client().put(str(url), f"{bucket}/set", recursive=True)
    with s3_server.entered():
        dataset = opened(f"{bucket}/set")
        assert references(dataset) == references(opened(url))
        assert answered(batches(dataset)) == answered(batches(opened(url)))


def test_subsets_are_evaluated_by_their_questions(url):
    dataset = opened(url, where="num_turns >= 3", shuffle=False)
    wanted = [question for question in QUESTIONS if SIZES[int(question[0][-4:])] >= 3]
    assert questions_of(dataset) == wanted
    assert [(row["key"], row["question_idx"]) for row in answered(batches(dataset))] == wanted


@pytest.mark.parametrize("workers, threads", [(0, 2), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_threads_and_workers_make_the_same_rows(url, workers, threads):
    found = batches(opened(url), workers=workers, decode_threads=threads)
    assert answered(found) == answered(batches(opened(url)))


def test_a_run_is_resumed_between_two_rows_of_a_sample(url):
    loader = make_dataloader(
        opened(url), global_batch_size=2, sequence_length=64, metadata=True, decode_threads=0
    )
    first = list(islice(loader, 4))
    again = make_dataloader(
        opened(url), global_batch_size=2, sequence_length=64, metadata=True, decode_threads=0
    )
    again.load_state_dict(loader.state_dict())
    assert answered([*first, *again]) == answered(batches(opened(url), batch=2))


def test_indexes_of_an_earlier_release_are_counted_by_reading(url, tmp_path, caplog):
    old = tmp_path / "old"
    shutil.copytree(url, old)
    document = json.loads((old / "manifest.json").read_bytes())
    for entry in document["shardlist"]:
        path = old / entry["url"].replace(".tar", ".index.npy")
        rows = np.load(path)
        path.unlink()
        rows = recfunctions.drop_fields(rows, ["num_branches", "num_turns"], usemask=False)
        np.save(path, recfunctions.repack_fields(rows))
        payload = path.read_bytes()
        entry["index_bytes"] = len(payload)
        entry["index_sha256"] = hashlib.sha256(payload).hexdigest()
    (old / "manifest.json").write_bytes(sealed(document))
    dataset = opened(str(old))
    assert questions_of(dataset) == QUESTIONS
    assert "do not count questions" in caplog.text
    assert answered(batches(dataset)) == answered(batches(opened(url)))


@pytest.mark.parametrize(
    "settings", [{"tail": "wrap"}, {"tail": "drop_last"}, {"on_bad": "substitute"}]
)
def test_what_would_repeat_or_leave_out_questions_is_refused_by_its_name(url, settings):
    with pytest.raises(ConfigError) as caught:
        opened(url, **settings)
    assert caught.value.reason == "evaluation"
    assert next(iter(settings)) in str(caught.value)


def test_packs_and_mixtures_of_an_evaluation_are_refused(url):
    with pytest.raises(ConfigError) as caught:
        batches(opened(url), pack=True)
    assert caught.value.reason == "packing_tail"
    with pytest.raises(ConfigError) as caught:
        IterableDatasetMixture([opened(url)], seed=1)
    assert caught.value.reason == "mixture_tail"


def test_questions_are_of_evaluations_only(url):
    with pytest.raises(ConfigError) as caught:
        questions_of(opened(url, view=View(image=VIEW.image)))
    assert caught.value.reason == "results"


def _evaluate(url, folder, rank, world_size, pipe):
    """One of several processes: evaluates its share, and sends the table that it gets."""
    store = f"file://{folder}/store-{world_size}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    dataset = StreamingDataset(url, view=VIEW, tail="pad", seed=5)
    rows = answered(batches(dataset))
    for row in rows:  # half of the answers are right
        right = row["record"]["answers"][0]
        row["prediction"] = right if row["sample"] % 2 else row["prediction"]
    table = gather_results(rows, dataset=dataset)
    save_results(f"{folder}/saved-{world_size}", rows)
    distributed.barrier()
    distributed.destroy_process_group()
    pipe.send((len(rows), table))


# Python 3.12 warns of forking beside threads, and pytest has some.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_two_and_three_processes_give_the_same_table_and_the_same_scores(url, tmp_path):
    forked = multiprocessing.get_context("fork")
    found, loaded = [], []
    for world_size in (1, 2, 3):
        pipes = [forked.Pipe() for _ in range(world_size)]
        processes = [
            forked.Process(target=_evaluate, args=(url, str(tmp_path), rank, world_size, pipe[1]))
            for rank, pipe in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        answers = [pipe[0].recv() if pipe[0].poll(60) else None for pipe in pipes]
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert sum(count for count, _ in answers) == len(QUESTIONS)
        assert all(count for count, _ in answers)
        found += [table for _, table in answers]
        loaded.append(load_results(str(tmp_path / f"saved-{world_size}"), dataset=opened(url)))
    assert [(row["key"], row["question_idx"]) for row in found[0]] == QUESTIONS
    assert all(table == found[0] for table in [*found, *loaded])
    scores = [score_results(table) for table in found]
    assert all(score == scores[0] for score in scores)
    assert scores[0] == score_results(found[0], references=references(opened(url)))
    (score,) = scores[0]
    odd = sum(size for i, size in enumerate(SIZES) if i % 2)
    assert (score.metric, score.score) == ("vqa", odd / len(QUESTIONS))
