"""Chat templates: ids equal those of transformers' apply_chat_template, or a refusal by name."""

import datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.assembly.assemble import assemble
from loader.assembly.layout import TokenIds
from loader.assembly.view import View
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import SampleError
from tests.chat_shapes import SHAPES, make_tokenizer
from tests.examples import examples

EXCHANGES = (
    ("What is it?", "A red ball."),
    ("And  that:", "3 cats, naïve ones!\n\n- a\n- b"),
    ("x", "1"),
    ("Wie heißt das? 你好", "  Leading and trailing space \n"),
    ("\n\nlines", "```\ncode\n```"),
)
SYSTEM = "Be brief.\nAnswer in one word."


class Day:
    """A clock for transformers, whose templates may ask for the date."""

    def __init__(self, day):
        self.now = lambda: datetime.datetime.fromisoformat(day)


class Loaded:
    """A shape's tokenizer as we load it, and as transformers does."""

    def __init__(self, folder, shape):
        from transformers import PreTrainedTokenizerFast

        self.shape = shape
        self.policy = TextPolicy(
            message_format="template", system_prompt="none", chat_date=shape.date, num_variants=1
        )
        name = make_tokenizer(folder, shape)
        self.ours = load_tokenizer(name, policy=self.policy)
        self.theirs = PreTrainedTokenizerFast.from_pretrained(name)
        self.prepare = Preparer(recipe=Recipe(text=self.policy), tokenizer=self.ours)

    def example(self, conversations, system="", images=(), weights=None):
        """Prepares and lays conversations out."""
        messages = [
            {"style": "text_sft", "messages": [t for pair in pairs for t in pair]}
            for pairs in conversations
        ]
        for message in messages:
            if system:
                message["system"] = system
            if weights:
                message["turn_weights"] = list(weights)
        row = {"message_list": messages, **({"image": list(images)} if images else {})}
        sample = self.prepare(row, key="k")
        view = View(branch_order="stored")
        ids = TokenIds.from_special_ids(self.ours.special_ids)
        return assemble(sample, np.random.RandomState(0), view=view, ids=ids)

    def branches(self, conversations, system="", weights=None):
        """Lists, per branch, the inputs with the last target, and the labels."""
        example = self.example(conversations, system, weights=weights)
        segments = example["subsegment_ids"]
        prefix = example["input_ids"][segments == 10_000].tolist()
        found = []
        for b in range(len(conversations)):
            own = segments == b
            labels = example["labels"][own]
            found.append(
                (prefix + example["input_ids"][own].tolist() + [int(labels[-1])], labels.tolist())
            )
        return found

    def want(self, pairs, system="", *, theirs=None):
        """Gives the ids of transformers, up to the end of the last answer."""
        theirs = theirs or self.theirs
        messages = [{"role": "system", "content": system}] if system else []
        for user, answer in pairs:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": answer})
        from transformers.utils import chat_template_utils

        with pytest.MonkeyPatch.context() as patch:
            if self.shape.date:
                patch.setattr(chat_template_utils, "datetime", Day(self.shape.date))
            ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        last = len(ids) - ids[::-1].index(self.ours.special_ids["eos"])
        # After the end of turn: a line break, and the end of all in Phi 3.
        rest = theirs.decode(ids[last:]).replace("<|endoftext|>", "")
        assert rest.strip() == ""
        return ids[:last]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """The tokenizer of each shape, made when first asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Loaded(tmp_path_factory.mktemp("shape") / "t", SHAPES[name])
        return made[name]

    return get


@pytest.mark.parametrize("exchanges", [1, 2, 3, 5])
@pytest.mark.parametrize("name", SHAPES)
def test_ids_equal_apply_chat_template(shapes, name, exchanges):
    loaded = shapes(name)
    pairs = EXCHANGES[:exchanges]
    ((ids, _),) = loaded.branches([pairs])
    assert ids == loaded.want(pairs)


@pytest.mark.parametrize("exchanges", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_ids_equal_apply_chat_template_with_a_system_turn(shapes, name, exchanges):
    loaded, pairs = shapes(name), EXCHANGES[:exchanges]
    if loaded.shape.system:
        ((ids, _),) = loaded.branches([pairs], SYSTEM)
        assert ids == loaded.want(pairs, SYSTEM)
    else:
        with pytest.raises(SampleError) as caught:
            loaded.branches([pairs], SYSTEM)
        assert caught.value.reason == "system_turn"


@pytest.mark.parametrize("name", SHAPES)
def test_branches_of_a_tree_equal_apply_chat_template_each(shapes, name):
    loaded = shapes(name)
    trees = [EXCHANGES[:1], EXCHANGES[1:4], EXCHANGES[4:]]
    got = [ids for ids, _ in loaded.branches(trees)]
    assert got == [loaded.want(pairs) for pairs in trees]


@pytest.mark.parametrize("name", SHAPES)
def test_answers_are_learned_with_their_end_of_turn_and_nothing_else(shapes, name):
    loaded = shapes(name)
    pairs = (("One?", "1 ball"), ("Two?", "2 cats"))
    ((_, labels),) = loaded.branches([pairs])
    text = loaded.ours.decode([label for label in labels if label != -100])
    end = loaded.ours.chat.end
    answers = text.split(end)
    assert [answer.replace("<think>\n\n</think>\n\n", "").strip() for answer in answers] == [
        "1 ball",
        "2 cats",
        "",
    ]


@pytest.mark.parametrize("weights", [(0, 1, 1), (1, 0, 1), (0.5, 0, 1)])
@pytest.mark.parametrize("name", ["llama3", "qwen3", "olmo2", "phi3"])
def test_answers_without_loss_stay_in_the_context(shapes, name, weights):
    loaded, pairs = shapes(name), EXCHANGES[:3]
    ((ids, labels),) = loaded.branches([pairs], weights=weights)
    ((every_id, every_label),) = loaded.branches([pairs])
    assert ids == every_id == loaded.want(pairs)
    eos = loaded.ours.special_ids["eos"]
    found, turn = [], 0
    for label in every_label:
        found.append(label if weights[turn] else -100)
        turn += label == eos
    assert labels == found
    got = loaded.example([pairs], weights=weights)
    want = np.repeat([w for w in weights if w], np.diff([-1, *ends(labels, eos)]))
    assert got["loss_weights"][got["labels"] != -100].tolist() == want.tolist()


def ends(labels, eos):
    """Lists where, among the learned tokens, the answers end."""
    return [i for i, label in enumerate(x for x in labels if x != -100) if label == eos]


@pytest.mark.parametrize("name", SHAPES)
def test_bos_is_the_one_that_the_template_writes(shapes, name):
    loaded = shapes(name)
    ids = loaded.ours.special_ids
    assert ("bos" in ids) == loaded.shape.writes_bos
    ((sequence, _),) = loaded.branches([EXCHANGES[:1]])
    if loaded.shape.writes_bos:
        assert sequence.count(ids["bos"]) == 1 + (ids["bos"] == ids["eos"])
        assert sequence[0] == ids["bos"]
    assert loaded.ours.chat.changed == tuple(
        text for text in loaded.ours.chat.changed if "think" in text
    )
    assert set(loaded.shape.changed) <= set(loaded.ours.markers)


texts = st.text(
    st.one_of(
        st.sampled_from(" \n\t.,:;!?'\"<>|[]{}%#*-/\\_abcAÄß你👩é▁"),
        st.characters(exclude_categories=["Cs", "Cn", "Co", "Cc"]),
    ),
    min_size=1,
    max_size=30,
).filter(lambda text: text.strip())


@settings(max_examples=examples(30))
@given(
    name=st.sampled_from(sorted(SHAPES)),
    pairs=st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    system=st.one_of(st.just(""), texts),
)
def test_any_texts_give_the_ids_of_apply_chat_template(shapes, name, pairs, system):
    loaded = shapes(name)
    system = system if loaded.shape.system else ""
    ((ids, _),) = loaded.branches([pairs], system)
    assert ids == loaded.want(pairs, system)


@pytest.mark.parametrize("name", SHAPES)
def test_images_are_between_bos_and_the_rest_or_where_a_text_wants_them(shapes, name):
    loaded = shapes(name)
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(loaded.ours.name)
    theirs.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    symbols = loaded.ours.special_ids
    bos = [symbols["bos"]] if loaded.shape.writes_bos else []
    mark = theirs.convert_tokens_to_ids("<|image|>")

    def ids_of(pairs, images):
        """Inputs and the last target, with one mark for each image's block."""
        example = loaded.example([pairs], images=images)
        ids = [*example["input_ids"].tolist(), int(example["labels"][-1])]
        found, inside = [], False
        for i in ids:
            inside = inside or i == symbols["<im_start>"]
            if not inside:
                found.append(i)
            elif i == symbols["<im_end>"]:
                inside = False
                found.append(mark)
        return found

    pixels = np.full((20, 30, 3), 7, np.uint8)
    want = loaded.want(EXCHANGES[:2])
    assert ids_of(EXCHANGES[:2], [pixels]) == [*bos, mark, *want[len(bos) :]]
    placed = (("Compare <|image|> and\n<|image|>!", "They differ."), ("<|image|> x", "Yes."))
    assert ids_of(placed, [pixels] * 3) == loaded.want(placed, theirs=theirs)
