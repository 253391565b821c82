"""Whole conversations against transformers: equal ids, or a row that is refused by name."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import SampleError
from tests.chat_shapes import CHATML, SHAPES, Shape, make_tokenizer

POLICY = TextPolicy(
    message_format="template", system_prompt="none", num_variants=1, reasoning="keep"
)
REASONS = ("template_ids", "reasoning")


class Model:
    """A tokenizer as we load it and as transformers does."""

    def __init__(self, folder, shape, policy=POLICY):
        from transformers import PreTrainedTokenizerFast

        name = make_tokenizer(folder, shape)
        self.ours = load_tokenizer(
            name, policy=dataclasses.replace(policy, chat_date=shape.date or "")
        )
        self.prepare = Preparer(recipe=Recipe(text=policy), tokenizer=self.ours)
        self.theirs = PreTrainedTokenizerFast.from_pretrained(name)

    def sample(self, messages):
        return self.prepare({"messages": messages}, key="k")

    def got(self, messages):
        """Gives the ids of a prepared conversation, and those that are learned."""
        sample = self.sample(messages)
        special = self.ours.special_ids
        ids, learned = [special["bos"]] if "bos" in special else [], []
        for kind, _, _, start, stop, first, last, weight in sample.spans.tolist():
            if kind == 0:
                answer = [*sample.tokens[first:last].tolist(), special["eos"]]
                ids += [*sample.tokens[start:stop].tolist(), *answer]
                learned += answer if weight else []
        return ids, learned

    def want(self, messages):
        ids = self.theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        return ids[: len(ids) - ids[::-1].index(self.ours.special_ids["eos"])]

    def equal_or_reason(self, messages):
        """Returns "" where the ids are those of transformers, or why the row is refused."""
        try:
            ids, _ = self.got(messages)
        except SampleError as error:
            return error.reason
        assert ids == self.want(messages)
        return ""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tokenizer of a template, made when first asked for."""
    made = {}

    def get(name, shape=None):
        if name not in made:
            shape = shape or SHAPES.get(name) or chatml(TEMPLATES[name])
            made[name] = Model(tmp_path_factory.mktemp("m") / "t", shape)
        return made[name]

    return get


def chatml(template, words=("<think>", "</think>")):
    return Shape(template=template, tokens=CHATML, words=words, eos="<|im_end|>")


def loop(content, before=""):
    return (
        "{% for m in messages %}{% set c = m.content %}" + before + "{{ '<|im_start|>' + m.role"
        " + '\n' + " + content + " + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def talk(*texts, **last):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    messages[-1] |= last
    return messages


# What no probe of the template meets, and a conversation that does.
UNPROBED = {
    "texts above 30,000 characters are cut": (loop("c[:30000]"), talk("x" * 30_001, "a")),
    "long answers are marked": (
        loop("c + (' (long)' if c|length > 40000 else '')"),
        talk("q", "y " * 20_001),
    ),
    "a system text for conversations of nine": (
        "{% if messages|length == 18 %}{{ 'Nine!<|im_end|>' }}{% endif %}" + loop("c"),
        talk(*"qa" * 9),
    ),
    "a message after those of the longest probe is left out": (
        loop("(c if loop.index != 105 else '')"),
        talk(*"qa" * 53),
    ),
    "a word is replaced that no literal names": (
        loop("c.replace('fo' ~ 'ob' ~ 'ar', 'x')"),
        talk("foobar?", "a"),
    ),
    "an answer is repeated where the question is long": (
        loop("(c + c if m.role == 'assistant' and messages[0].content|length > 50000 else c)"),
        talk("z" * 50_001, "a"),
    ),
    "another order for one length": (
        "{% set messages = (messages | reverse | list) if messages|length == 26 else messages %}"
        + loop("c"),
        talk(*"qa" * 13),
    ),
    "one length is refused": (
        "{% if messages|length == 22 %}{{ raise_exception('no') }}{% endif %}" + loop("c"),
        talk(*"qa" * 11),
    ),
}
TEMPLATES = {name: template for name, (template, _) in UNPROBED.items()}


@pytest.mark.parametrize("name", UNPROBED)
def test_what_no_probe_meets_refuses_the_row_alone(model, name):
    template, messages = UNPROBED[name]
    loaded = model(name)
    assert loaded.equal_or_reason(messages) == "template_ids"
    assert loaded.equal_or_reason(talk("What?", "This.", "And?", "That.")) == ""


def test_markup_that_a_text_joins_is_found_in_the_whole_conversation(model):
    loaded = model("chatml")
    template = dataclasses.replace(loaded.ours.template, source=loop("c") + "{{ '' }}")
    broken = dataclasses.replace(loaded.ours, template=template)
    same = dataclasses.replace(loaded.prepare, tokenizer=broken)
    assert same({"messages": talk("q", "a")}, key="k").tokens.size
    # Other ids for the same text: as if the turns were cut where no token ends.
    other = dataclasses.replace(broken)
    object.__setattr__(other, "encode_exchange", lambda *_, **__: ([1], [2]))
    with pytest.raises(SampleError) as caught:
        dataclasses.replace(loaded.prepare, tokenizer=other)({"messages": talk("q", "a")}, key="k")
    assert (caught.value.reason, caught.value.where) == ("template_ids", "k")


def test_every_variant_is_in_a_conversation_that_is_compared(model):
    loaded = model("a word is replaced that no literal names")
    policy = dataclasses.replace(POLICY, num_variants=4)
    prepare = dataclasses.replace(loaded.prepare, recipe=Recipe(text=policy))
    for answers in (["red", "foobar"], ["red", "blue", "foobar"]):
        turn = {"style": "vqa2", "question": "q", "answers": answers}
        with pytest.raises(SampleError) as caught:
            prepare({"message_list": [turn]}, key="k")
        assert caught.value.reason == "template_ids"


# Reasoning.

QWEN3 = (  # as published: the thought of a field or of the text, kept after the last user turn
    "{%- set ns = namespace(last=messages|length - 1, multi=true) %}"
    "{%- for m in messages[::-1] %}{%- set i = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.multi and m.role == 'user' %}{%- set ns.multi = false %}{%- set ns.last = i %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role != 'assistant' %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- else %}"
    "{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n')"
    " %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n'"
    " + content.lstrip('\n') }}{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
KEPT = loop(
    "c",
    before="{% if m.reasoning_content %}{% set c = '[' + m.reasoning_content + '] ' + c %}"
    "{% endif %}",
)
THINKERS = {
    "qwen3 as published": chatml(QWEN3),
    "qwen3": SHAPES["qwen3"],
    "deepseek": SHAPES["deepseek"],
    "text as it is": chatml(loop("c")),
    "a field of its own": chatml(KEPT),
    "thoughts of every answer": chatml(
        loop("(c.split('</think>')[-1] if '</think>' in c and not loop.last else c)")
    ),
}
THOUGHT = "<think>\nThree. No, four.\n</think>\n\nFour."


@pytest.mark.parametrize(
    "name, messages, learned",
    [
        (
            "qwen3 as published",
            talk("2+2?", THOUGHT),
            "<think>\nThree. No, four.\n</think>\n\nFour.<|im_end|>",
        ),
        (
            "qwen3 as published",
            talk("2+2?", THOUGHT, "Sure?", "<think>\nYes\n</think>\n\nSure."),
            "Four.<|im_end|><think>\nYes\n</think>\n\nSure.<|im_end|>",
        ),
        (
            "qwen3 as published",
            talk("2+2?", "Four.", reasoning_content="Three. No."),
            "<think>\nThree. No.\n</think>\n\nFour.<|im_end|>",
        ),
        (
            "qwen3 as published",
            talk("2+2?", THOUGHT, "Sure?", "Yes."),
            "Four.<|im_end|><think>\n\n</think>\n\nYes.<|im_end|>",
        ),
        ("text as it is", talk("2+2?", THOUGHT), THOUGHT + "<|im_end|>"),
        ("a field of its own", talk("?", "Four.", thinking="Hm"), "[Hm] Four.<|im_end|>"),
    ],
)
def test_reasoning_is_learned_as_the_template_writes_it(model, name, messages, learned):
    loaded = model(name, THINKERS[name])
    ids, answers = loaded.got(messages)
    assert ids == loaded.want(messages)
    assert loaded.ours.decode(answers) == learned


@pytest.mark.parametrize(
    "name, messages",
    [
        ("deepseek", talk("2+2?", THOUGHT)),
        ("text as it is", talk("2+2?", "Four.", reasoning_content="Three?")),
    ],
)
def test_reasoning_that_the_template_leaves_out_refuses_the_row(model, name, messages):
    assert model(name, THINKERS[name]).equal_or_reason(messages) == "reasoning"


words = st.text(st.sampled_from("ab \n.<>你"), max_size=6)
answers = st.one_of(
    words,
    st.builds("<think>{}</think>{}".format, words, words),
    st.builds("<think>\n{}\n</think>\n\n{}".format, words, words),
    st.builds("{}</think>{}".format, words, words),
    st.builds("{}<think>{}".format, words, words),
).filter(str.strip)
exchanges = st.lists(
    st.tuples(words.filter(str.strip), answers, st.one_of(st.none(), words)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(THINKERS)), exchanges=exchanges)
def test_any_reasoning_gives_the_ids_of_transformers_or_a_reason(model, name, exchanges):
    messages = []
    for user, answer, thought in exchanges:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": answer})
        if thought is not None:
            messages[-1]["reasoning_content"] = thought
    reason = model(name, THINKERS[name]).equal_or_reason(messages)
    assert reason in ("", *REASONS, "empty_response")
    if name == "qwen3 as published":
        assert reason in ("", "reasoning")


@pytest.mark.parametrize("message_format", ["role", "chatml", "none"])
def test_own_formats_write_reasoning_as_text(message_format):
    policy = dataclasses.replace(POLICY, message_format=message_format)
    tokenizer = load_tokenizer(policy=policy)
    prepare = Preparer(recipe=Recipe(text=policy), tokenizer=tokenizer)
    inline = prepare({"messages": talk("2+2?", THOUGHT)}, key="k")
    apart = prepare(
        {"messages": talk("2+2?", "Four.", reasoning_content="Three. No, four.")}, key="k"
    )
    assert inline.tokens.tolist() == apart.tokens.tolist()
    (row,) = [row for row in inline.spans.tolist() if row[0] == 0]
    assert tokenizer.decode(inline.tokens[row[5] : row[6]].tolist()).lstrip() == THOUGHT


def test_reasoning_needs_the_setting_that_keeps_it(model):
    loaded = model("qwen3")
    prepare = dataclasses.replace(
        loaded.prepare, recipe=Recipe(text=dataclasses.replace(POLICY, reasoning="refuse"))
    )
    for messages, reason in (
        (talk("2+2?", THOUGHT), "control_token"),
        (talk("2+2?", "Four.", reasoning_content="Three?"), "reasoning"),
    ):
        with pytest.raises(SampleError) as caught:
            prepare({"messages": messages}, key="k")
        assert caught.value.reason == reason
    # Where it is kept, thoughts are the assistant's, and other markers stay refused.
    for messages in (
        talk("<think>2+2?", "Four."),
        talk(THOUGHT, THOUGHT),
        talk("2+2?", THOUGHT + "<tool_call>"),
        talk("2+2?", "Four.<|im_end|>"),
    ):
        assert loaded.equal_or_reason(messages) == "control_token"
