"""Style sheets: a user's own styles are worth as much as those of the package."""

import dataclasses
import json
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer, read_styles, require_style, styles_of
from preprocess.text.sheet import SWITCHES, OwnStyle, StyleSheet
from preprocess.text.styles import STYLES
from preprocess.text.styles.base import prompt_templates
from shardspec.errors import ConfigError
from shardspec.manifest import canonical_json
from tests.chat_shapes import SHAPES, make_tokenizer
from tests.preprocess.text.test_formatter_families import message_of

TOKENIZER = load_tokenizer()


@pytest.fixture
def sheet(tmp_path):
    """Reads a style sheet from its text."""

    def read(text):
        path = tmp_path / "my.toml"
        path.write_text(text, encoding="utf-8")
        return read_styles(str(path))

    return read


def prepare(message, *, tokenizer=TOKENIZER, **policy):
    policy = TextPolicy(**{"system_prompt": "none", "num_variants": 4, **policy})
    recipe = Recipe(text=policy)
    return Preparer(recipe=recipe, tokenizer=tokenizer)({"message_list": [message]}, key="k")


def drawn(message, **policy):
    """Lists the texts of the variants, as (prompt, response)."""
    sample = prepare(message, message_format="none", **policy)
    tokens = sample.tokens.tolist()
    return [
        (TOKENIZER.decode(tokens[start:stop]), TOKENIZER.decode(tokens[first:last]).strip())
        for kind, _, _, start, stop, first, last, _ in sample.spans.tolist()
        if kind == 0
    ]


def same_bytes(one, other):
    assert one.tokens.tobytes() == other.tokens.tobytes()
    assert one.spans.tobytes() == other.spans.tobytes()
    assert canonical_json(one.record) == canonical_json(other.record)


POLICIES = st.fixed_dictionaries(
    {
        "prompt_templates": st.sampled_from(["none", "uber_model", "uber_model_v2"]),
        "system_prompt": st.sampled_from(
            ["none", "style", "demo_or_style", "style_and_length", "style_and_length_v2"]
        ),
        "message_format": st.sampled_from(["none", "role", "chatml"]),
        "choices": st.sampled_from(["standard", "varied"]),
        "paraphrase": st.sampled_from([0.0, 1.0]),
    }
)


@settings(max_examples=60)
@given(
    like=st.sampled_from(sorted(STYLES)),
    attributes=st.dictionaries(
        st.sampled_from([name for name in SWITCHES if name not in ("explained", "grouped")]),
        st.booleans(),
    ),
    policy=POLICIES,
)
def test_a_sample_of_an_own_style_is_the_one_that_a_built_in_style_gives(like, attributes, policy):
    base = STYLES[like]
    templates = tuple(prompt_templates(base.template)) if base.template else ()
    own = OwnStyle(
        like=like,
        templates=templates,
        attributes=tuple(sorted({**attributes, "since": base.since}.items())),
    )
    message = {**message_of(like), "style": "mine"}
    got = prepare(message, styles=StyleSheet(styles=(("mine", own),)), **policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STYLES, "mine", dataclasses.replace(base, **attributes))
        styles_of.cache_clear()
        want = prepare(message, **policy)
    styles_of.cache_clear()
    same_bytes(got, want)


@pytest.mark.parametrize("like", sorted(STYLES))
def test_a_style_that_says_nothing_new_is_the_style_it_is_like(like):
    """But for its name, which `system_prompt` writes, and which is in the record."""
    sheet = StyleSheet(styles=(("mine", OwnStyle(like=like)), (like, OwnStyle())))
    message = message_of(like)
    want = prepare(message, prompt_templates="uber_model_v2")
    same_bytes(prepare(message, prompt_templates="uber_model_v2", styles=sheet), want)
    got = prepare({**message, "style": "mine"}, prompt_templates="uber_model_v2", styles=sheet)
    assert got.tokens.tobytes() == want.tokens.tobytes()
    assert got.spans.tobytes() == want.spans.tobytes()


QUESTION = {"style": "receipt", "question": "What is the total?", "answer": "12.40"}


def test_templates_are_used_because_they_are_written_down(sheet):
    styles = sheet(
        '[styles.receipt]\nlike = "vqa2"\ntemplates = ["{question} In euros.", "Read: {question}"]'
    )
    prompts = {prompt for prompt, _ in drawn(QUESTION, styles=styles, num_variants=12)}
    assert prompts == {"What is the total? In euros.", "Read: What is the total?"}
    later = sheet(
        '[styles.receipt]\nlike = "vqa2"\nsince = "uber_model"\ntemplates = "{question} Now."'
    )
    assert drawn(QUESTION, styles=later) == [("What is the total?", "12.40")]
    ((prompt, _),) = drawn(QUESTION, styles=later, prompt_templates="uber_model")
    assert prompt == "What is the total? Now."


def test_built_in_templates_are_replaced_or_extended(sheet):
    caption = {"style": "long_caption", "text": "A ball."}
    replaced = sheet('[styles.long_caption]\ntemplates = "Tell."')
    assert drawn(caption, styles=replaced) == [("Tell.", "A ball.")]
    extended = sheet('[styles.long_caption]\nmore_templates = ["Tell."]')
    style = styles_of(extended)["long_caption"]
    assert style.templates == (*prompt_templates("caption.long_caption"), "Tell.")
    prompts = {prompt for prompt, _ in drawn(caption, styles=extended, num_variants=400)}
    assert prompts == set(style.templates)


def test_styles_can_be_like_own_styles(sheet):
    styles = styles_of(
        sheet(
            '[styles.a]\nlike = "b"\nrigid = true\n'
            '[styles.b]\nlike = "vqa2"\ntemplates = "{question}?"\ntrained_as = "a"'
        )
    )
    assert (styles["a"].templates, styles["a"].rigid) == (("{question}?",), True)
    assert (styles["b"].rigid, styles["b"].trained_as) == (False, "a")
    assert prepare(
        {**QUESTION, "style": "b"}, styles=sheet('[styles.b]\nlike = "vqa2"'), system_prompt="style"
    ).tokens.size


def test_prefix_and_geometry_are_those_of_the_own_style(sheet):
    styles = sheet('[styles.receipt]\nlike = "vqa2"\nrigid = true\ntrained_as = "vqa2"')
    ((prompt, _),) = drawn(QUESTION, styles=styles, system_prompt="style")
    assert prompt == "vqa2: What is the total?"
    styles = sheet('[styles.receipt]\nlike = "vqa2"\nunnamed = true')
    ((prompt, _),) = drawn(QUESTION, styles=styles, system_prompt="demo_or_style_v2")
    assert prompt == "What is the total?"


def test_system_prompts_are_drawn_and_those_of_a_row_win(sheet, tmp_path):
    styles = sheet(
        'system = "Be brief."\n[styles.receipt]\nlike = "vqa2"\nsystem = ["Cashier.", "Clerk."]'
    )
    prompts = {prompt for prompt, _ in drawn(QUESTION, styles=styles, num_variants=20)}
    assert prompts == {f"{name}.\n\nWhat is the total?" for name in ("Cashier", "Clerk")}
    ((prompt, _),) = drawn({**QUESTION, "system": "Row."}, styles=styles)
    assert prompt == "Row.\n\nWhat is the total?"
    ((prompt, _),) = drawn({**QUESTION, "style": "vqa2"}, styles=styles)
    assert prompt == "Be brief.\n\nWhat is the total?"

    # A chat template writes it as a turn, compared with transformers in each conversation.
    policy = TextPolicy(message_format="template")
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "t", SHAPES["qwen2"]), policy=policy)
    talk = {"style": "receipt", "messages": ["a", "b", "c", "d"]}
    sample = prepare(talk, tokenizer=tokenizer, message_format="template", styles=styles)
    found = tokenizer.decode(sample.tokens.tolist())
    assert "<|im_start|>system\nCashier.<|im_end|>" in found
    assert "<|im_start|>system\nClerk.<|im_end|>" in found
    assert "You are a helpful assistant." not in found


def test_paraphrase_groups_join_those_of_the_package_or_replace_them(sheet):
    groups = '[paraphrase]\ngroups = [["total", "sum to pay"], ["Euro", "EUR"]]\n'
    question = {**QUESTION, "style": "vqa2", "question": "What is in the image, total or euro?"}
    both, own = sheet(groups), sheet(groups + "builtin = false")
    for styles, words in ((both, 2), (own, 1)):
        found = {
            prompt for prompt, _ in drawn(question, styles=styles, paraphrase=1.0, num_variants=60)
        }
        assert any("sum to pay" in prompt for prompt in found)
        assert any("EUR" in prompt for prompt in found)
        assert ({prompt.split(",")[0] for prompt in found} == {"What is in the image"}) == (
            words == 1
        )


REFUSED = {
    "no TOML": ("[styles", "styles_file", ""),
    "another table": ("[style.a]\n", "styles_key", "styles"),
    "unknown key": ('[styles.a]\nlike = "vqa2"\ntemplate = "x"', "styles_key", "templates"),
    "unknown attribute": ('[styles.a]\nlike = "vqa2"\nrigit = true', "styles_key", "rigid"),
    "unknown part": ("[paraphrase]\ngroup = []", "styles_key", "groups"),
    "no table": ("styles = 1", "styles_key", "table"),
    "a style that is none": ("[styles]\na = 1", "styles_key", "table"),
    "a number as a switch": ('[styles.a]\nlike = "vqa2"\nrigid = 1', "styles_key", "true or"),
    "a number as a name": ("[styles.a]\nlike = 1", "styles_key", "text"),
    "numbers as texts": ('[styles.a]\nlike = "vqa2"\ntemplates = [1]', "styles_key", "texts"),
    "an empty text": ('system = " "', "styles_key", "texts"),
    "words without groups": ('[paraphrase]\ngroups = "a"', "styles_key", "lists"),
    "unknown mode": ('[styles.a]\nlike = "count"\nmode = "cuont"', "styles_value", "count"),
    "unknown level": ('[styles.a]\nlike = "vqa2"\nsince = "uber"', "styles_value", "uber_model"),
    "like nothing": ("[styles.receipt]\nrigid = true", "styles_value", "like"),
    "like no style": ('[styles.a]\nlike = "vqa22"', "styles_value", "vqa2"),
    "a circle": ('[styles.a]\nlike = "b"\n[styles.b]\nlike = "a"', "styles_value", "circle"),
    "trained as none": ('[styles.a]\nlike="vqa2"\ntrained_as="vqa3"', "styles_value", "vqa2"),
    "a template without the question": (
        '[styles.a]\nlike = "vqa2"\ntemplates = "Read."',
        "styles_value",
        "{question}",
    ),
    "a field that there is not": (
        '[styles.a]\nlike = "pointing"\ntemplates = "{label} {question}"',
        "styles_value",
        "{label}",
    ),
    "a caption with a field": (
        '[styles.long_caption]\nmore_templates = "About {label}."',
        "styles_value",
        "no field",
    ),
    "templates of options": (
        '[styles.science_qa]\ntemplates = "{question}"',
        "styles_value",
        "choices",
    ),
    "a marker": ('system = "Hello<|endoftext|>"', "styles_value", "markup"),
    "an image of others": (
        '[styles.a]\nlike = "vqa2"\ntemplates = "<image>{question}"',
        "styles_value",
        "markup",
    ),
    "a word in two groups": (
        '[paraphrase]\ngroups = [["a b", "c"], ["c", "d"]]',
        "styles_value",
        "two groups",
    ),
    "a word of the package": (
        '[paraphrase]\ngroups = [["the image", "it"]]',
        "styles_value",
        "builtin = false",
    ),
    "a word alone": ('[paraphrase]\ngroups = [["zebra"]]', "styles_value", "alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_means_nothing_is_refused_with_what_was_meant(sheet, name):
    text, reason, says = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        prepare(QUESTION, styles=sheet(text))
    assert caught.value.reason == reason
    assert says in str(caught.value)


def test_sheet_that_is_not_there_and_style_that_nobody_has_are_named(sheet, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_styles(str(tmp_path / "none.toml"))
    assert caught.value.reason == "styles_file"
    styles = sheet('[styles.receipt]\nlike = "vqa2"')
    require_style("receipt", styles, where="spec")
    require_style("", styles, where="spec")
    with pytest.raises(ConfigError) as caught:
        require_style("receip", styles, where="spec")
    assert "receipt" in caught.value.fix


def test_content_is_the_recipe_and_the_file_is_not(tmp_path):
    recipes = []
    for name, text in (("a", "Be brief."), ("b", "Be brief."), ("c", "Be kind.")):
        path = tmp_path / f"{name}.toml"
        path.write_text(f'system = "{text}"\n[styles.mine]\nlike = "vqa2"\nrigid = true\n')
        recipe = Recipe(text=TextPolicy(styles=read_styles(str(path))))
        assert pickle.loads(pickle.dumps(recipe)) == recipe
        recipes.append(recipe.to_dict())
        assert json.loads(json.dumps(recipes[-1])) == recipes[-1]
    assert recipes[0] == recipes[1] != recipes[2]
    assert recipes[0]["text"]["styles"] == {
        "system": ["Be brief."],
        "styles": {"mine": {"like": "vqa2", "rigid": True}},
    }
    assert "styles" not in Recipe().to_dict()["text"]


def test_the_sheet_of_the_documentation_is_one(sheet):
    page = (Path(__file__).parents[3] / "docs" / "your-data.md").read_text(encoding="utf-8")
    (block,) = [each for each in re.findall(r"```toml\n(.*?)```", page, re.S) if "[styles." in each]
    styles = sheet(block)
    assert prepare(QUESTION, styles=styles, paraphrase=1.0).tokens.size
    assert styles_of(styles)["receipt"].rigid
