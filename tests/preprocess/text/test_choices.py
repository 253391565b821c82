"""Multiple choice: the fixed forms exactly, and what holds for every varied one."""

import itertools
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import preprocess.text.choices
from preprocess.text.choices import STANDARD_INSTRUCTION, fill, write_choices
from shardspec.errors import SampleError
from shardspec.toml import load_toml

TEXTS = load_toml(Path(preprocess.text.choices.__file__).parent / "templates" / "choices.toml")
WORDS = ["zebra", "yacht", "xylophone", "walnut", "violin", "unicorn", "teapot", "saddle"]
ROMAN = ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x"]


def write(options, answer_idx=0, *, seed=0, question="Which?", **settings):
    rng = np.random.RandomState(seed)
    return write_choices(question, options, answer_idx, rng=rng, **settings)


def varied(options, answer_idx=0, *, count=300, **settings):
    return [write(options, answer_idx, seed=s, form="varied", **settings) for s in range(count)]


def test_standard_form():
    assert write(["cat", "dog", "cow"], 2) == (
        "Which?\nOnly return the correct answer option.\nA. cat\nB. dog\nC. cow",
        "C. cow",
    )


def test_standard_form_without_labels():
    assert write(["E", "K"], 1, labelled=False) == (
        "Which?\nOnly return the correct answer option.\nE\nK",
        "K",
    )


def test_letter_form():
    assert write(["cat", "dog"], 1, form="letter") == ("Which?\nA: cat\nB: dog\n", "B")


def test_letter_form_without_labels():
    assert write(["E", "K"], 1, form="letter", labelled=False) == ("Which?\nE\nK\n", "K")


def test_empty_right_option_is_named_by_its_label():
    assert write(["cat", ""], 1) == ("Which?\n" + STANDARD_INSTRUCTION + "\nA. cat\nB.", "B.")


def test_more_options_than_letters_are_numbered():
    options = [f"option {i}" for i in range(30)]
    assert write(options, 29)[1] == "30. option 29"


@pytest.mark.parametrize("form", ["standard", "letter"])
def test_fixed_forms_draw_nothing(form):
    rng = np.random.RandomState(1)
    write_choices("Which?", ["cat", "dog"], 1, form=form, rng=rng)
    assert rng.randint(0, 2**31) == np.random.RandomState(1).randint(0, 2**31)


@pytest.mark.parametrize("answer_idx", [-1, 2, None, "0", 0.0, True])
@pytest.mark.parametrize("form", ["standard", "letter", "varied"])
def test_answer_outside_of_the_options_is_refused(form, answer_idx):
    with pytest.raises(SampleError) as caught:
        write(["cat", "dog"], answer_idx, form=form)
    assert caught.value.reason == "answer_idx"


def test_empty_right_option_without_a_label_is_refused():
    with pytest.raises(SampleError) as caught:
        write(["E", " "], 1, labelled=False)
    assert caught.value.reason == "message_fields"


def names(answer):
    """Whether an answer is a label alone, by all the alphabets that are drawn from."""
    return re.fullmatch(r"[A-Z]|[a-z]|\d+|[ivx]+", answer) is not None


def option_named(user, answer, options):
    """The option that an answer names, by the user's own text alone."""
    inside = [option for option in options if option in answer]
    if inside:
        return max(inside, key=len)
    # A label alone: it stands in the user text right before its option, markup aside.
    label = rf"(?<![A-Za-z0-9]){re.escape(answer)}(?![A-Za-z0-9])\W*"
    found = [option for option in options if re.search(label + re.escape(option), user)]
    assert len(found) == 1, (user, answer)
    return found[0]


@given(
    st.permutations(WORDS).flatmap(lambda w: st.integers(2, 8).map(lambda n: w[:n])),
    st.data(),
    st.booleans(),
)
def test_every_varied_answer_names_the_right_option(options, data, labelled):
    answer_idx = data.draw(st.integers(0, len(options) - 1))
    seed = data.draw(st.integers(0, 2**32 - 1))
    user, answer = write(options, answer_idx, seed=seed, form="varied", labelled=labelled)
    assert option_named(user, answer, options) == options[answer_idx]
    assert all(user.count(option) == 1 for option in options)
    assert user.count("Which?") == 1


def test_labelled_answer_is_a_line_of_the_question():
    for user, answer in varied(["cat", "dog", "cow"], 1):
        assert names(answer) or answer in user


def test_varied_forms_differ():
    users = {user for user, _ in varied(["cat", "dog", "cow"])}
    assert len(users) > 250


def test_one_varied_form_in_ten_is_the_standard_one():
    drawn = varied(["cat", "dog"], count=2000)
    standard = sum(user == write(["cat", "dog"])[0] for user, _ in drawn)
    assert 150 < standard < 250


def test_a_quarter_of_labelled_answers_is_the_label_alone():
    # 0.9 not standard * 0.8 labelled * 0.25.
    drawn = varied(["cat", "dog"], count=2000)
    assert 300 < sum(names(answer) for _, answer in drawn) < 420


def test_orders_of_the_options_are_all_drawn():
    options = ["cat", "dog", "cow"]
    orders = Counter(
        tuple(sorted(options, key=user.index)) for user, _ in varied(options, count=1200)
    )
    assert set(orders) == set(itertools.permutations(options))
    # 120 more of the source's order: the standard forms.
    assert all(120 < count < 400 for count in orders.values())


@pytest.mark.parametrize("reference", ["None of the above", "all of these", "neither of them"])
def test_options_that_refer_to_places_keep_the_order(reference):
    options = ["cat", "dog", reference]
    for user, answer in varied(options, 2):
        assert sorted(options, key=user.index) == options
        assert names(answer) or reference in answer


def test_options_that_refer_to_letters_keep_letters_and_order():
    options = ["cat", "dog", "both A and B"]
    for user, answer in varied(options, 2):
        assert sorted(options, key=user.index) == options
        assert answer == "C" or answer.endswith("both A and B")
        assert re.search(r"\bA\b\W+cat.*\bB\b\W+dog.*\bC\b\W+both", user, re.DOTALL)


def test_empty_right_option_is_always_answered_by_its_label():
    for _, answer in varied(["cat", "", "dog"], 1, count=500):
        assert names(answer) or answer == "B."


def test_unlabelled_options_get_no_labels():
    for _, answer in varied(["walnut", "teapot"], 1, labelled=False):
        assert answer == "teapot"


@pytest.mark.parametrize("count", [1, 10, 11, 20, 21, 26, 27])
def test_any_number_of_options_can_be_labelled(count):
    options = [f"<{i}>" for i in range(count)]
    for user, answer in varied(options, count - 1, count=40):
        assert option_named(user, answer, options) == options[-1]


def test_templates_place_each_of_their_fields_once():
    assert all(marker.count("{}") == 1 for marker in TEXTS["common_markers"] + TEXTS["odd_markers"])
    for name, fields in [
        ("layouts", {"question", "options", "instruction"}),
        ("direct", {"question", "options"}),
    ]:
        for template in TEXTS[name]:
            assert sorted(re.findall(r"\{(\w*)\}", template)) == sorted(fields)
    assert not any("{" in text for text in TEXTS["instructions"] + TEXTS["bullets"])


def test_fields_are_not_filled_twice():
    assert fill("{a}{b}", {"a": "{b}", "b": "{a}"}) == "{b}{a}"
