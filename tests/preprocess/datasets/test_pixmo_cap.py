"""PixMo-Cap: each mode's examples for a handful of rows are golden files."""

import json

import pytest

from preprocess.datasets.pixmo_cap import PixMoCap
from shardspec.errors import SampleError
from shardspec.keyed import hash_text

ROWS = [
    {
        "image_url": "http://example.com/0.jpg",
        "caption": "A red ball on a table.",
        "transcripts": ["So, a ball.", "I see a red ball.", "It is on a table."],
    },
    {
        "image_url": "http://example.com/1.jpg",
        "caption": "One transcript only: naïve café, 你好.",
        "transcripts": ["Only one."],
    },
    {
        "image_url": "http://example.com/2.jpg",
        "caption": "No transcript.",
        "transcripts": [],
    },
    {
        "image_url": "http://example.com/3.jpg",
        "caption": "Transcripts with nothing in them.",
        "transcripts": ["", "  \n", "The third speaks."],
    },
    {
        "image_url": "http://example.com/4.jpg",
        "caption": "The list of transcripts is missing.",
        "transcripts": None,
    },
]


def in_train(url):
    share = hash_text(f"{PixMoCap.split_salt}\0{url}") / 2**64
    return share >= PixMoCap.validation_share


@pytest.fixture
def folder(tmp_path, write_parquet):
    assert all(in_train(row["image_url"]) for row in ROWS)
    return str(write_parquet(tmp_path / "source", ROWS))


@pytest.mark.parametrize("mode", PixMoCap.modes)
def test_examples_of_a_mode_are_the_golden_ones(folder, golden, mode):
    dataset = PixMoCap(source=folder, mode=mode)
    examples = [dataset[i] for i in range(len(dataset))]
    golden(
        f"pixmo_cap-{mode}.json",
        json.dumps(examples, ensure_ascii=False, indent=1, sort_keys=True) + "\n",
    )


def test_default_mode_is_the_one_of_pre_training(folder):
    assert PixMoCap(source=folder).mode == "transcript_and_caption"


@pytest.mark.parametrize("mode", PixMoCap.modes)
def test_generated_rows_have_messages_in_every_mode(mode):
    dataset = PixMoCap(source="sample", limit=5, mode=mode)
    for i in range(5):
        messages = dataset[i]["message_list"]
        assert messages
        styles = [message["style"] for message in messages]
        assert ("long_caption" in styles) == ("caption" in mode)
        assert ("transcript" in styles) == ("transcript" in mode)


@pytest.mark.parametrize("transcripts", ["one text", [3], [["a"]]])
def test_transcripts_that_are_not_a_list_of_texts_are_a_sample_error(transcripts):
    row = {"image_url": "http://example.com/0.jpg", "caption": "A.", "transcripts": transcripts}
    with pytest.raises(SampleError) as caught:
        PixMoCap(source="sample", limit=1).to_example(row)
    assert caught.value.reason == "row_field"
