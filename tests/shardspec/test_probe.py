"""The tokenizer's fingerprint: behaviour counts, added symbols do not."""

import hashlib
import json
from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from preprocess.text.tokens import EMBEDDED_PATH, load_tokenizer
from shardspec.errors import ConfigError, ShardError
from shardspec.probe import PROBE_TEXTS, check_stored_tokenizer, check_tokenizer, probe_sha256


@pytest.fixture
def run_tokenizer():
    return AutoTokenizer.from_pretrained(str(EMBEDDED_PATH))


@pytest.fixture(scope="module")
def entry():
    return load_tokenizer().entry


def test_the_same_tokenizer_is_accepted(entry, run_tokenizer):
    check_tokenizer(entry, run_tokenizer, where="x")


def test_symbols_that_the_run_has_added_do_not_count(entry, run_tokenizer):
    run_tokenizer.add_special_tokens({"extra_special_tokens": ["<im_patch>", "<|image|>"]})
    check_tokenizer(entry, run_tokenizer, where="x")


def test_a_tokenizer_of_other_behaviour_is_refused_field_by_field(entry, run_tokenizer):
    class Reversed:
        bos_token_id = 7
        eos_token_id = 7

        def __len__(self):
            return 100

        def encode(self, text, *, add_special_tokens):
            return run_tokenizer.encode(text, add_special_tokens=add_special_tokens)[::-1]

    with pytest.raises(ConfigError) as caught:
        check_tokenizer(entry, Reversed(), where="shards/x")
    assert caught.value.reason == "tokenizer_mismatch"
    for field in ("vocab_size", "probe_sha256", "bos"):
        assert f"tokenizer.{field}" in str(caught.value)


def test_bos_of_a_dataset_whose_sequences_begin_without_one_is_not_compared(entry, run_tokenizer):
    ids = {name: i for name, i in entry.special_ids.items() if name != "bos"}
    tokens = {name: token for name, token in entry.special_tokens.items() if name != "bos"}
    bare = replace(entry, special_ids=ids, special_tokens=tokens)
    assert run_tokenizer.bos_token_id is not None
    check_tokenizer(bare, run_tokenizer, where="shards/x")


def test_the_probe_tells_case_spaces_and_digits_apart():
    def plain(text):
        return list(text.encode())

    fingerprints = {
        probe_sha256(plain),
        probe_sha256(lambda text: plain(text.lower())),
        probe_sha256(lambda text: plain(" ".join(text.split()))),
        probe_sha256(lambda text: plain(text.replace("1", "2"))),
    }
    assert len(fingerprints) == 4
    assert len(set(PROBE_TEXTS)) == len(PROBE_TEXTS)


@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
def test_a_special_id_that_is_not_the_runs_is_named(name, entry, run_tokenizer):
    changed = replace(entry, special_ids={**entry.special_ids, name: 5})
    with pytest.raises(ConfigError) as caught:
        check_tokenizer(changed, run_tokenizer, where="x")
    assert caught.value.reason == "tokenizer_mismatch"
    assert (
        f"tokenizer.{name} {entry.special_tokens[name]}: [5] here"
        in caught.value.facts["differences"]
    )


@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
def test_a_special_id_that_is_not_the_stored_tokenizers_is_named(name, entry):
    payload = load_tokenizer().json.encode()
    check_stored_tokenizer(entry, payload, where="x")
    changed = replace(entry, special_ids={**entry.special_ids, name: 5})
    with pytest.raises(ShardError) as caught:
        check_stored_tokenizer(changed, payload, where="x")
    assert caught.value.reason == "tokenizer_file"
    assert f"special_ids.{name}: 5 here" in caught.value.facts["differences"]


def test_a_stored_tokenizer_of_other_bytes_is_refused(entry):
    with pytest.raises(ShardError) as caught:
        check_stored_tokenizer(entry, load_tokenizer().json.encode() + b" ", where="x")
    assert (caught.value.reason, caught.value.what) == (
        "tokenizer_file",
        "dataset's copy of its tokenizer is missing or changed",
    )


UNIGRAM = {"added_tokens": [], "model": {"vocab": [["<s>", 0.0], ["</s>", 0], ["<pad>", 0]]}}


@pytest.mark.parametrize(
    "document, is_right",
    [
        (UNIGRAM, True),
        ({**UNIGRAM, "added_tokens": [{"content": "<s>", "id": 9}]}, False),
        ({}, False),
        ([], False),
        ({"added_tokens": [], "model": None}, False),
        ({"added_tokens": [1], "model": {"vocab": {}}}, False),
    ],
)
def test_ids_are_read_from_any_kind_of_tokenizer(document, is_right, entry):
    payload = json.dumps(document).encode()
    made = replace(
        entry,
        sha256=hashlib.sha256(payload).hexdigest(),
        special_ids={"bos": 0, "eos": 1, "pad": 2},
        special_tokens={"bos": "<s>", "eos": "</s>", "pad": "<pad>"},
    )
    if is_right:
        check_stored_tokenizer(made, payload, where="x")
        return
    with pytest.raises(ShardError) as caught:
        check_stored_tokenizer(made, payload, where="x")
    assert caught.value.reason == "tokenizer_file"
