"""The tokenizer's fingerprint: behaviour counts, added symbols do not."""

import dataclasses

import pytest
from transformers import AutoTokenizer

from preprocess.text.tokens import EMBEDDED_PATH, load_tokenizer
from shardspec.errors import ConfigError
from shardspec.probe import PROBE_TEXTS, check_tokenizer, probe_sha256


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
    bare = dataclasses.replace(entry, special_ids=ids)
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
