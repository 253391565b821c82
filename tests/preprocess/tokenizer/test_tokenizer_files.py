"""The embedded tokenizer: reproducible files, lossless on any text, loadable without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import preprocess.tokenizer
from preprocess.synthetic.scenes import plan_scene
from preprocess.tokenizer.train import END, SCENE_SEED, VOCAB_SIZE, train

FOLDER = Path(preprocess.tokenizer.__file__).parent
FILES = ("tokenizer.json", "tokenizer_config.json")
BACKEND = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def round_trip(text):
    return BACKEND.decode(BACKEND.encode(text).ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", FILES)
def test_training_again_gives_the_shipped_bytes(tmp_path, name):
    train(tmp_path)
    assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_training_with_other_hash_seeds_and_threads_gives_the_shipped_bytes(tmp_path):
    code = (
        "import sys, pathlib, preprocess.tokenizer.train as t; t.train(pathlib.Path(sys.argv[1]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=True)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_shipped_vocabulary_is_reached_and_the_file_is_small():
    assert BACKEND.get_vocab_size() == VOCAB_SIZE
    assert sorted(BACKEND.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert (FOLDER / "tokenizer.json").stat().st_size < 300_000


def test_merges_are_spelled_so_that_older_readers_take_them():
    merges = json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)


@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox didn't jump; it's asleep.",
        "def f(x):\n\treturn {'a': [x ** 2]}  # squared\r\n",
        "赤い丸が三つあります。こんにちは、世界！",
        "👩‍👩‍👧‍👦 🏳️‍🌈 é \u0065\u0301 \u200b\u00a0\ufeff",
        "\x00\x01\x1f\x7f\x85\ud7ff\ufffe",
        "   leading and trailing   ",
        "",
        f"a{END}b",
    ],
)
def test_text_survives(text):
    assert round_trip(text) == text


@given(st.text(max_size=200))
def test_any_text_survives(text):
    assert round_trip(text) == text


@given(st.text(max_size=60))
def test_plain_text_never_gives_the_special_token(text):
    assert BACKEND.token_to_id(END) not in BACKEND.encode(text).ids


def test_unseen_captions_cost_few_tokens():
    captions = [plan_scene(SCENE_SEED + 1, idx).caption for idx in range(100)]
    num_tokens = sum(len(BACKEND.encode(caption).ids) for caption in captions)
    num_words = sum(len(caption.split()) for caption in captions)
    assert num_tokens / num_words < 1.2  # most of what is above 1 is punctuation


def test_everyday_english_is_mostly_whole_words():
    text = "How many people are standing next to the red car in this picture?"
    assert BACKEND.encode(text).tokens == [
        "How", "Ġmany", "Ġpeople", "Ġare", "Ġstanding", "Ġnext", "Ġto", "Ġthe", "Ġred", "Ġcar",
        "Ġin", "Ġthis", "Ġpicture", "?",
    ]  # fmt: skip


def test_auto_tokenizer_loads_it_offline_with_its_tokens_and_chat_template():
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(str(FOLDER))
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    end = BACKEND.token_to_id(END)
    assert {
        "fast": t.is_fast,
        "tokens": [t.eos_token, t.bos_token, t.pad_token],
        "ids": [t.eos_token_id, t.bos_token_id, t.pad_token_id],
        "length": len(t),
        "chat": t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True),
        "encoded": t("A red circle.")["input_ids"],
        "decoded": t.decode(t(" a , b  c . 's")["input_ids"]),
    } == {
        "fast": True,
        "tokens": [END] * 3,
        "ids": [end] * 3,
        "length": VOCAB_SIZE,
        "chat": f"User:\nHi\nAssistant:\nHello.{END}\nUser:\nBye\nAssistant:\n",
        "encoded": BACKEND.encode("A red circle.").ids,
        "decoded": " a , b  c . 's",
    }
