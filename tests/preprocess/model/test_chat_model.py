"""Rendering conversations by a model's own template, and finding what is learned in them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from preprocess.formats import Spec, parse_row
from preprocess.job.job import Job, JobSettings
from preprocess.media import VideoPolicy
from preprocess.model import ChatModel, Turn, Turns, conversations, load_model
from preprocess.model import tokenized_conversations as tokenized
from preprocess.recipe import Preparer, Recipe
from preprocess.text import Branch, TextPolicy, Variant, load_tokenizer
from shardspec.errors import ConfigError, SampleError
from shardspec.families import FixedSize, StoredModel
from tests import model_folders
from tests.chat_shapes import SHAPES, make_tokenizer

PAIRS = (
    ("What is it?", "A red ball."),
    ("And  that:", "3 cats, naïve ones!\n\n- a\n- b"),
    ("x", "1"),
)

NOT_BY_PREFIX = {
    # Its generation prompt opens a thinking block that its conversations do not have.
    "deepseek": "the conversation does not begin with what is in front of an answer",
}


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The model of each shape, whose texts are the tokenizer's own, without pictures."""
    made = {}

    def get(name, **changes):
        from transformers import PreTrainedTokenizerFast

        if name not in made:
            folder = make_tokenizer(tmp_path_factory.mktemp("shape") / "t", SHAPES[name])
            made[name] = PreTrainedTokenizerFast.from_pretrained(folder)
        theirs = made[name]
        values = {
            "name": name,
            "stored": StoredModel(family=FixedSize(), symbols={"<image>": (0,)}, placeholder=-5),
            "template": theirs.chat_template,
            "tokenizer_json": theirs.backend_tokenizer.to_str(),
            "added_tokens": tuple(t.content for t in theirs.added_tokens_decoder.values()),
            "special_tokens": {
                k: v for k, v in theirs.special_tokens_map.items() if isinstance(v, str)
            },
            "content": "text",
            "date": SHAPES[name].date,
        }
        return ChatModel(**values | changes), theirs

    return get


def chat(model, pairs, system=""):
    found = [model.message("system", system)] if system else []
    for user, answer in pairs:
        found += [model.message("user", user), model.message("assistant", answer)]
    return found


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_that_of_transformers_and_its_answers_are_learned(shapes, name, count):
    model, theirs = shapes(name)
    pairs = PAIRS[:count]
    try:
        found = model.tokenize(chat(model, pairs), sizes=[])
    except SampleError as error:
        assert name in NOT_BY_PREFIX, error  # noqa: PT017 - a template that is refused by name
        assert error.reason == "loss_span"  # noqa: PT017
        assert error.facts["problem"] == NOT_BY_PREFIX[name]  # noqa: PT017
        return
    assert name not in NOT_BY_PREFIX
    if not SHAPES[name].date:
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        text = theirs.apply_chat_template(messages, tokenize=False)
        bos = theirs.bos_token
        own = theirs(text, add_special_tokens=not (bos and text.startswith(bos)))
        assert found.ids.tolist() == own["input_ids"]
    # As many runs as answers: the answer and one token that ends it, and nothing of the users'.
    edges = np.flatnonzero(np.diff(found.learned.astype(int), prepend=0, append=0))
    runs = edges.reshape(-1, 2).tolist()
    assert len(runs) == count
    for (start, stop), (_, answer) in zip(runs, pairs, strict=True):
        shown = theirs.decode(found.ids[start:stop].tolist())
        assert answer in shown
        last = theirs.convert_ids_to_tokens(int(found.ids[stop - 1]))
        assert last in model.added_tokens
        assert len(shown) <= len(answer) + len(last) + len("<think>\n\n</think>\n\n  ")


def test_what_cannot_be_told_is_refused_by_name(shapes):
    model, _ = shapes("qwen3")

    def problem(pairs, **changes):
        changed, _ = shapes("qwen3", **changes)
        with pytest.raises(SampleError) as caught:
            changed.tokenize(chat(changed, pairs), sizes=[])
        assert caught.value.reason == "loss_span"
        return caught.value.facts["problem"]

    counted = "{% for m in messages %}{{ m.content|length }}{{ m.content }}<|im_end|>{% endfor %}"
    assert "depends on its text" in problem([("q", "abc")], template=counted)
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}"
    assert "written twice" in problem([("q", "a")], template=twice)
    bare = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert "no token ends" in problem([("q", "a")], template=bare)
    late = (
        "{% for m in messages %}{{ loop.length }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    assert "does not begin" in problem([("q", "a")], template=late)
    changed, _ = shapes("qwen3", template="{{ raise_exception('no') }}")
    with pytest.raises(SampleError) as caught:
        changed.tokenize(chat(changed, [("q", "a")]), sizes=[])
    assert caught.value.reason == "chat_render"
    with pytest.raises(SampleError) as caught:
        model.tokenize(chat(model, [("q", "a")]), sizes=[(9, 9)])
    assert caught.value.reason == "image_placeholder"


BESIDE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""It writes the thought that a message has beside its text, of the last answer alone."""


@pytest.mark.parametrize("beside", [False, True])
def test_thoughts_are_where_the_template_puts_them_and_are_learned(shapes, beside):
    model, theirs = shapes("qwen3", **({"template": BESIDE} if beside else {}))

    def answer(text, thought):
        whole = text if beside else f"<think>\n{thought}\n</think>\n\n{text}"
        return model.message("assistant", whole, reasoning=thought if beside else "")

    messages = [
        *(model.message("user", "q"), answer("A ball.", "Round?")),
        *(model.message("user", "r"), answer("b", "Hm.")),
    ]
    found = model.tokenize(messages, sizes=[])
    assert theirs.decode(found.ids.tolist()) == model.render(messages)[0]
    learned = theirs.decode(found.ids[found.learned].tolist())
    assert learned == "A ball.<|im_end|><think>\nHm.\n</think>\n\nb<|im_end|>"
    # A template that leaves the last one out would teach another answer.
    plain, _ = shapes("qwen3", template=BESIDE.replace("loop.last", "loop.first"))
    with pytest.raises(SampleError) as caught:
        plain.tokenize([messages[0], plain.message("assistant", "b", reasoning="Hm.")], sizes=[])
    assert caught.value.reason == "reasoning"


def test_conversations_keep_the_thoughts_of_variants():
    variant = Variant(prompt="q", response="a", user="q", answer="a", reasoning="Hm.")
    (found,) = conversations([Branch(turns=((variant,),))], [""])
    assert found.turns == (Turn("q", "a", "Hm."),)


def test_marks_must_be_those_of_the_answers(shapes):
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    model, theirs = shapes("chatml", template=marked)
    found = model.tokenize(chat(model, PAIRS), sizes=[])
    text = theirs.decode(found.ids[found.learned].tolist())
    assert text == "".join(f"{answer}<|im_end|>" for _, answer in PAIRS)
    once = marked.replace("m.role == 'assistant'", "loop.last")
    model, _ = shapes("chatml", template=once)
    with pytest.raises(SampleError) as caught:
        model.tokenize(chat(model, PAIRS), sizes=[])
    assert caught.value.facts["problem"] == "3 answers, 1 marked as generated"
    users = marked.replace("'assistant'", "'user'")
    model, _ = shapes("chatml", template=users)
    with pytest.raises(SampleError) as caught:
        model.tokenize(chat(model, PAIRS), sizes=[])
    assert caught.value.facts["problem"] == "an answer is not in its marked part"


def branch(*turns, weight=1_000_000):
    made = [tuple(Variant(prompt=u, response=a) for u, a in variants) for variants in turns]
    return Branch(turns=tuple(made), weight=weight)


def test_every_message_is_drawn_equally_often_whatever_its_variants():
    one = branch([("q", "a"), ("r", "b")], [("s", "c")])
    other = branch([("t", "d")])
    found = conversations([one, other], ["", "Be brief."])
    assert [each.system for each in found] == ["", "", "Be brief.", "Be brief."]
    assert found[0].turns == (Turn("q", "a"), Turn("s", "c"))
    assert found[1].turns == (Turn("r", "b"), Turn("s", "c"))
    with pytest.raises(SampleError) as caught:  # an answer without loss would be learned
        conversations([Branch(turns=one.turns, shares=(0.0, 1.0))], [""])
    assert caught.value.reason == "loss_span"
    with pytest.raises(SampleError) as caught:
        conversations([Branch(turns=one.turns, unanswered=True)], [""])
    assert caught.value.reason == "unanswered"
    same = branch([("q", "a"), ("q", "a")])
    assert len(conversations([same], [""])) == 1


def test_tokens_of_repeated_conversations_are_stored_once(shapes):
    model, _ = shapes("chatml")
    each = Turns(turns=(Turn("q", "a"),), weight=1)
    once = tokenized(model, [each], sizes=[], key="k")
    twice = tokenized(model, [each, each], sizes=[], key="k")
    assert once.tokens.tolist() == twice.tokens.tolist()
    assert len(twice.rows) == 2 * len(once.rows)
    for turn, reason in (
        (Turn("q", " "), "empty_response"),
        (Turn("<|image|>", "a"), "image_placeholder"),
        (Turn("q", "<|image|>"), "image_placeholder"),
    ):
        with pytest.raises(SampleError) as caught:
            tokenized(model, [Turns(turns=(turn,), weight=1)], sizes=[], key="k")
        assert (caught.value.reason, caught.value.where) == (reason, "k")


# Folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folders.qwen2_vl(tmp_path_factory.mktemp("model") / "m")


def changed(folder, tmp_path, name, document):
    import shutil

    copy = tmp_path / "m"
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    if document is None:
        (copy / name).unlink()
    elif isinstance(document, str):
        (copy / name).write_text(document)
    else:
        old = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(old | document))
    return str(copy)


def load(folder, **options):
    tokenizer = load_tokenizer(str(folder), policy=TextPolicy(message_format="none"))
    return load_model(str(folder), tokenizer=tokenizer, **options)


def test_a_template_is_found_wherever_a_model_keeps_it(folder, tmp_path):
    usual = load(folder)
    assert (usual.content, usual.marks_generation) == ("parts", False)
    path = Path(folder) / "chat_template.jinja"
    older = changed(folder, tmp_path, "chat_template.json", "{}")
    Path(older, "chat_template.jinja").unlink()
    Path(older, "chat_template.json").write_text(json.dumps({"chat_template": path.read_text()}))
    assert load(older).describe() == usual.describe()


def test_of_several_files_that_say_the_same_the_one_of_transformers_is_taken(folder, tmp_path):
    usual = load(folder)
    again = json.loads((folder / "preprocessor_config.json").read_text()) | {"min_pixels": 56 * 56}
    where = changed(
        folder, tmp_path, "processor_config.json", json.dumps({"image_processor": again})
    )
    older = (folder / "chat_template.jinja").read_text().replace("helpful", "humble")
    Path(where, "chat_template.json").write_text(json.dumps({"chat_template": older}))
    Path(where, "chat_template.jinja").write_text("another")
    model = load(where)
    assert model.stored.family == replace(usual.stored.family, min_pixels=56 * 56)
    assert model.template == usual.template.replace("helpful", "humble")


def test_templates_of_texts_get_texts(folder, tmp_path):
    text = "{% for m in messages %}{{ m.role + m.content }}<|im_end|>{% endfor %}"
    model = load(changed(folder, tmp_path, "chat_template.jinja", text))
    assert model.content == "text"
    messages = [model.message("user", "a<|image|>b", images=0), model.message("assistant", "x")]
    rendered, _ = model.render(messages)
    assert rendered == "usera<|image_pad|>b<|im_end|>assistantx<|im_end|>"


@pytest.mark.parametrize(
    ("name", "document", "reason"),
    [
        ("config.json", None, "model_file"),
        ("config.json", "[1]", "model_file"),
        ("preprocessor_config.json", None, "model_file"),
        ("preprocessor_config.json", "{", "model_file"),
        ("config.json", {"model_type": "bert"}, "family_unknown"),
        ("config.json", {"model_type": "mllama"}, "family_processor"),
        ("config.json", {"model_type": "qwen3_5"}, "family_processor"),
        ("config.json", {"model_type": "idefics2"}, "family_processor"),
        ("config.json", {"image_token_id": 3}, "model_template"),
        ("preprocessor_config.json", {"do_rescale": False}, "family_setting"),
        ("chat_template.jinja", "{{ strftime_now('%Y') }}", "chat_date"),
        ("chat_template.jinja", "no picture {{ messages[0].role }}", "model_template"),
        ("chat_template.jinja", "{{ messages[0].absent.more }}", "model_template"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(folder, tmp_path, name, document, reason):
    where = changed(folder, tmp_path, name, document)
    tokenizer = load_tokenizer(str(folder), policy=TextPolicy(message_format="none"))
    with pytest.raises(ConfigError) as caught:
        load_model(where, tokenizer=tokenizer)
    assert caught.value.reason == reason


def test_a_family_goes_through_its_processor_on_request(folder):
    family = load(folder, own=False).stored.family
    assert (family.kind, family.image_processor) == ("processor", "Qwen2VLImageProcessor")
    assert (family.marker, family.type_ids) == ("<|image_pad|>", "mm_token_type_ids")


def test_settings_that_the_model_decides_are_refused_beside_it(folder):
    settings = {"dataset": "text_sft", "source": "sample", "out": "out", "model": str(folder)}
    styled = Recipe(text=TextPolicy(system_prompt="style", message_format="role"))
    for changes, names in (
        ({"tokenizer": "Qwen/Qwen2-7B"}, "tokenizer"),
        ({"recipe": styled}, "system_prompt"),
        ({"recipe": Recipe(text=TextPolicy(message_format="chatml"))}, "message_format"),
    ):
        with pytest.raises(ConfigError) as caught:
            Job(JobSettings(**settings, **changes))
        assert caught.value.reason == "model_settings"
        assert names in str(caught.value)
    job = Job(JobSettings(**settings))
    text = job.recipe["text"]
    assert (text["system_prompt"], text["message_format"]) == ("none", "none")
    assert job.recipe["model"]["family"]["kind"] == "qwen2_vl"
    assert job.recipe["image"]["views"] == []
    assert job.recipe["image"]["resample"] == "bicubic"
    assert "transformers" in job.libraries


def test_videos_for_a_model_need_a_template_for_them(folder):
    settings = {"source": "sample", "out": "out", "model": str(folder)}
    recipe = Recipe(video=VideoPolicy(store="clip"))
    with pytest.raises(ConfigError) as caught:
        Job(JobSettings(dataset="moving_shapes", recipe=recipe, **settings))
    assert caught.value.reason == "model_template"
    assert "<|video_pad|>" in str(caught.value)


CALLED = [{"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}]
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Tells the time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
WITH_TOOLS = [
    {"role": "system", "content": "Be exact."},
    {"role": "user", "content": "Now, and at noon?"},
    {"role": "assistant", "content": "", "tool_calls": CALLED},
    {"role": "tool", "content": '12:40 "UTC"', "name": "clock"},
    {"role": "tool", "content": "It rains."},
    {"role": "assistant", "content": "Wait.", "tool_calls": [*CALLED, *CALLED]},
    {"role": "tool", "content": "12:41"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "12:41."},
]
CALL = '<tool_call>\n{"name": "clock", "arguments": {"zone": "UTC"}}\n</tool_call>'
LEARNED = [CALL, f"Wait.\n{CALL}\n{CALL}", "12:41."]


def prepared_with_tools(model, theirs, row, tmp_path):
    """The ids and the learned texts of a row with tools, by the offline half of a job."""
    preparer = Preparer(
        recipe=Recipe(text=TextPolicy(message_format="none", system_prompt="none")),
        tokenizer=load_tokenizer(str(tmp_path)),
        model=model,
    )
    sample = preparer({**row})
    rows = sample.spans[sample.spans[:, 0] == 0][:, 3:7].tolist()
    parts = [(sample.tokens[a:b].tolist(), sample.tokens[c:d].tolist()) for a, b, c, d in rows]
    ids = [i for pair in parts for part in pair for i in part]
    return ids, [theirs.decode(answer) for _, answer in parts if answer]


@pytest.mark.parametrize("name, content", [("qwen2.5-tools", "text"), ("qwen3-vl", "parts")])
def test_tools_are_what_the_template_writes_and_results_are_not_learned(
    shapes, tmp_path, name, content
):
    model, theirs = shapes(name, content=content)
    theirs.save_pretrained(str(tmp_path))
    row = {"messages": WITH_TOOLS, "tools": [CLOCK]}
    ids, learned = prepared_with_tools(model, theirs, row, tmp_path)
    own = theirs.apply_chat_template(WITH_TOOLS, tools=[CLOCK], tokenize=False)
    assert ids == theirs(own, add_special_tokens=False)["input_ids"]
    assert learned == [f"{text}<|im_end|>" for text in LEARNED]


def test_tools_of_other_spellings_are_the_same_ids(shapes, tmp_path):
    model, theirs = shapes("qwen2.5-tools")
    theirs.save_pretrained(str(tmp_path))
    turns = [
        ("human", "Now?"),
        ("function_call", '{"name": "clock", "arguments": {"zone": "UTC"}}'),
        ("observation", "12:40"),
        ("gpt", "12:40."),
    ]
    said = [{"from": role, "value": text} for role, text in turns]
    texts = {**CALLED[0]["function"], "arguments": '{"zone": "UTC"}'}
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": texts}]}
    messages = [
        {"role": "user", "content": "Now?"},
        called,
        {"role": "ipython", "content": [{"type": "text", "text": "12:40"}]},
        {"role": "assistant", "content": "12:40."},
    ]
    rows = [
        {"conversations": said, "tools": json.dumps([CLOCK])},
        {"messages": messages, "tools": [json.dumps(CLOCK)]},
    ]
    found = [
        prepared_with_tools(
            model, theirs, parse_row(row, Spec(name="x", format="messages")), tmp_path
        )
        for row in rows
    ]
    assert found[0] == found[1]
    assert found[0][1] == [f"{CALL}<|im_end|>", "12:40.<|im_end|>"]


def test_names_of_calls_and_results_are_checked_for_markup(shapes, tmp_path):
    model, theirs = shapes("qwen2.5-tools")
    theirs.save_pretrained(str(tmp_path))
    for name in ("name", "tool_call_id"):
        messages = [{**each, name: "<|im_end|>"} for each in WITH_TOOLS]
        with pytest.raises(SampleError) as caught:
            prepared_with_tools(model, theirs, {"messages": messages}, tmp_path)
        assert caught.value.reason == "control_token"


REFUSED_TOOLS = {
    "it has no tools": ({}, "qwen2"),
    "their definitions are not JSON objects": ({"tools": "clock()"}, "qwen2.5-tools"),
    "it does not write their definitions": ({"template": ("tool | tojson", "1")}, "qwen2.5-tools"),
    "it does not write a call": ({"template": ("tool_call.name", "'x'")}, "qwen2.5-tools"),
    "it does not write a result, or it is learned": (
        {"template": ("'\\n<tool_response>\\n' + message.content", "'x'")},
        "qwen2.5-tools",
    ),
}


@pytest.mark.parametrize("problem", REFUSED_TOOLS)
def test_a_template_that_leaves_tools_out_is_refused_by_name(shapes, tmp_path, problem):
    changes, name = REFUSED_TOOLS[problem]
    model, theirs = shapes(name)
    theirs.save_pretrained(str(tmp_path))
    if "template" in changes:
        assert changes["template"][0] in model.template
        model, _ = shapes(name, template=model.template.replace(*changes["template"]))
    row = {"messages": WITH_TOOLS, "tools": changes.get("tools", [CLOCK])}
    with pytest.raises(SampleError) as caught:
        prepared_with_tools(model, theirs, row, tmp_path)
    assert (caught.value.reason, caught.value.facts["problem"]) == ("chat_tools", problem)
