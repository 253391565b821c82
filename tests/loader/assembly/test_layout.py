import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.assembly.layout import IGNORED, BranchTurns, TokenIds, Turn, lay_out, lay_out_prompt
from shardspec.errors import SampleError
from shardspec.tiling import ImageTokenIds

EOS = 2
SYMBOLS = ("<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>")
IDS = TokenIds(
    bos=1,
    eos=EOS,
    pad=0,
    image=ImageTokenIds(im_start=90, im_end=91, im_patch=92, im_col=93, low_res_im_start=94),
)
BLOCK = np.array([90, 92, 92, 91], dtype=np.int32)
ARRAYS = ("input_ids", "labels", "position_ids", "subsegment_ids", "loss_weights")


def branch(*turns, weight=1_000_000):
    """Makes a conversation from lists: (prompt, response) and perhaps the weight of the turn."""
    return BranchTurns(
        turns=[
            Turn(np.array(p, dtype=np.int32), np.array(r, dtype=np.int32), *own)
            for p, r, *own in turns
        ],
        weight=weight,
    )


TWO_BRANCHES = [branch(([10, 11], [20, 21])), branch(([12], [22, 23, 24]))]


def cut(sequence, limit):
    return {name: getattr(sequence, name)[:limit].tolist() for name in ARRAYS}


def expected(blocks, branches):
    """Lays out token by token: one long sequence, shifted by one, each branch closed by EOS."""
    tokens, learned = [IDS.bos, *np.concatenate([[], *blocks]).tolist()], []
    learned += [False] * len(tokens)
    prefix = len(tokens)
    positions, segments, weights = list(range(prefix)), [10_000] * prefix, [0.0] * prefix
    for k, one in enumerate(branches):
        start = len(tokens)
        for t, turn in enumerate(one.turns):
            weight = (one.weight if turn.weight is None else turn.weight) / 1e6
            tokens += [*turn.prompt.tolist(), *turn.response.tolist()]
            learned += [False] * len(turn.prompt) + [weight > 0] * len(turn.response)
            weights += [weight] * (len(turn.prompt) + len(turn.response))
            if t < len(one.turns) - 1:
                tokens.append(EOS)
                learned.append(weight > 0)
                weights.append(weight)
        length = len(tokens) - start
        positions += range(prefix, prefix + length)
        segments += [k] * length
    labels = [t if m else IGNORED for t, m in zip(tokens[1:], learned[1:], strict=True)] + [IGNORED]
    stop = prefix
    for one in branches:
        stop += sum(len(turn.prompt) + len(turn.response) + 1 for turn in one.turns) - 1
        turn = one.turns[-1]
        labels[stop - 1] = IGNORED if turn.weight == 0 else EOS
    # The weight of a target is at the position that predicts it.
    weights = [*weights[1:], 0.0]
    stop = prefix
    for one in branches:
        stop += sum(len(turn.prompt) + len(turn.response) + 1 for turn in one.turns) - 1
        turn = one.turns[-1]
        weights[stop - 1] = (one.weight if turn.weight is None else turn.weight) / 1e6
    return {
        "input_ids": tokens,
        "labels": labels,
        "position_ids": positions,
        "subsegment_ids": segments,
        "loss_weights": [
            float(np.float32(w)) if label != IGNORED else 0.0
            for w, label in zip(weights, labels, strict=True)
        ],
    }


ids = st.integers(10, 89)
turns = st.tuples(
    st.lists(ids, max_size=4),
    st.lists(ids, min_size=1, max_size=5),
    st.sampled_from([None, None, 0, 500_000]),
)
conversations = st.builds(
    lambda turns, weight: branch(*turns, weight=weight),
    st.lists(turns, min_size=1, max_size=3).filter(lambda t: any(each[2] != 0 for each in t)),
    st.sampled_from([1_000_000, 200_000, 707_107]),
)
images = st.lists(st.sampled_from([BLOCK, np.array([90, 92, 91], dtype=np.int32)]), max_size=3)
samples = st.tuples(images, st.lists(conversations, min_size=1, max_size=4))


def test_answer_of_weight_0_is_context_and_the_others_keep_their_weights():
    turns = ([10], [20, 21], 0), ([11], [22], 500_000), ([12], [23], 0)
    sequence = lay_out([], [branch(*turns)], ids=IDS)
    no = IGNORED
    assert sequence.input_ids.tolist() == [1, 10, 20, 21, EOS, 11, 22, EOS, 12, 23]
    assert sequence.labels.tolist() == [no] * 5 + [22, EOS] + [no] * 3
    assert sequence.loss_weights.tolist() == [0.0] * 5 + [0.5] * 2 + [0.0] * 3
    with pytest.raises(SampleError) as caught:
        lay_out([], [branch(turns[0])], ids=IDS)
    assert caught.value.reason == "no_loss"


@pytest.mark.parametrize("weights", [(0, None), (0, 0), (None, 0), (500_000, 0)])
def test_prompt_of_an_evaluation_does_not_depend_on_weights(weights):
    first, second = weights
    own = branch(([10], [20], first), ([11], [], second), weight=0)
    plain = branch(([10], [20]), ([11], []))
    got, want = (lay_out_prompt([BLOCK], each, ids=IDS) for each in (own, plain))
    assert got.input_ids.tolist() == want.input_ids.tolist()
    assert set(got.loss_weights.tolist()) == {0.0}


def test_two_branches_after_an_image_are_laid_out_as_molmo_2_does():
    sequence = lay_out([BLOCK], TWO_BRANCHES, ids=IDS)
    no = IGNORED
    assert sequence.input_ids.tolist() == [1, 90, 92, 92, 91, 10, 11, 20, 21, 12, 22, 23, 24]
    assert sequence.labels.tolist() == [no] * 6 + [20, 21, EOS, 22, 23, 24, EOS]
    assert sequence.position_ids.tolist() == [*range(9), 5, 6, 7, 8]
    assert sequence.subsegment_ids.tolist() == [10_000] * 5 + [0] * 4 + [1] * 4
    assert sequence.loss_weights.tolist() == [0.0] * 6 + [1.0] * 7
    assert (sequence.image_starts, sequence.image_ends) == ((1,), (5,))
    assert sequence.dropped_branches == 0


def test_arrays_have_the_types_that_the_collator_hands_over():
    sequence = lay_out([BLOCK], TWO_BRANCHES, ids=IDS)
    types = {name: str(getattr(sequence, name).dtype) for name in ARRAYS}
    assert types == {name: "int64" for name in ARRAYS[:4]} | {"loss_weights": "float32"}


def test_eos_between_turns_stands_in_the_input_and_is_learned():
    sequence = lay_out([], [branch(([10], [20, 21]), ([11], [22]))], ids=IDS)
    assert sequence.input_ids.tolist() == [1, 10, 20, 21, EOS, 11, 22]
    assert sequence.labels.tolist() == [IGNORED, 20, 21, EOS, IGNORED, 22, EOS]


def test_response_without_prompt_is_predicted_from_the_end_of_the_prefix():
    sequence = lay_out([BLOCK], [branch(([], [20, 21]), weight=200_000)], ids=IDS)
    assert sequence.input_ids.tolist() == [1, 90, 92, 92, 91, 20, 21]
    assert sequence.labels.tolist() == [IGNORED] * 4 + [20, 21, EOS]
    assert sequence.loss_weights.tolist() == pytest.approx([0] * 4 + [0.2] * 3)


def test_prefix_predicts_nothing_for_the_second_branch():
    sequence = lay_out([], [branch(([10], [20])), branch(([], [21, 22]))], ids=IDS)
    assert sequence.input_ids.tolist() == [1, 10, 20, 21, 22]
    assert sequence.labels.tolist() == [IGNORED, 20, EOS, 22, EOS]


def test_text_without_images_gets_bos_positions_and_the_shift_too():
    sequence = lay_out([], [branch(([10], [20]))], ids=IDS)
    assert sequence.input_ids.tolist() == [1, 10, 20]
    assert sequence.labels.tolist() == [IGNORED, 20, EOS]
    assert sequence.position_ids.tolist() == [0, 1, 2]
    assert sequence.subsegment_ids.tolist() == [10_000, 0, 0]
    assert sequence.image_starts == sequence.image_ends == ()


def test_images_stand_one_after_another_after_bos():
    sequence = lay_out([BLOCK, BLOCK[1:], BLOCK], [branch(([10], [20]))], ids=IDS)
    assert sequence.image_starts == (1, 5, 8)
    assert sequence.image_ends == (5, 8, 12)
    assert sequence.input_ids[8:12].tolist() == BLOCK.tolist()


@given(samples)
def test_layout_equals_the_sequence_that_is_built_token_by_token(sample):
    blocks, branches = sample
    assert cut(lay_out(blocks, branches, ids=IDS), None) == expected(blocks, branches)


@given(samples)
def test_labels_are_the_next_inputs_but_for_the_eos_that_ends_a_branch(sample):
    blocks, branches = sample
    s = lay_out(blocks, branches, ids=IDS)
    following = np.append(s.input_ids[1:], EOS)
    ends = np.append(s.subsegment_ids[1:] != s.subsegment_ids[:-1], True)
    ends &= s.subsegment_ids != 10_000
    learned = s.labels != IGNORED
    assert (s.labels[learned & ~ends] == following[learned & ~ends]).all()
    assert (s.labels[ends & learned] == EOS).all()
    assert ((s.loss_weights > 0) == learned).all()


@given(samples)
def test_positions_of_every_branch_continue_from_the_prefix(sample):
    blocks, branches = sample
    s = lay_out(blocks, branches, ids=IDS)
    prefix = int((s.subsegment_ids == 10_000).sum())
    for k in range(len(branches)):
        own = s.position_ids[s.subsegment_ids == k]
        assert own.tolist() == list(range(prefix, prefix + len(own)))


@given(samples, st.integers(1, 60))
def test_limit_drops_branches_whose_prompt_does_not_fit_and_cuts_the_last(sample, limit):
    blocks, branches = sample
    length = 1 + sum(map(len, blocks))
    kept = []
    for one in branches:
        if kept and length + len(one.turns[0].prompt) >= limit:
            continue
        kept.append(one)
        length += sum(len(t.prompt) + len(t.response) + 1 for t in one.turns) - 1
    whole = lay_out(blocks, kept, ids=IDS)
    has_loss = (whole.labels[:limit] != IGNORED).any()
    if 1 + sum(map(len, blocks)) > limit:
        with pytest.raises(SampleError) as caught:
            lay_out(blocks, branches, ids=IDS, limit=limit)
        assert caught.value.reason == "image_cut"
    elif not has_loss:
        with pytest.raises(SampleError) as caught:
            lay_out(blocks, branches, ids=IDS, limit=limit)
        assert caught.value.reason == "no_loss"
    else:
        got = lay_out(blocks, branches, ids=IDS, limit=limit)
        assert cut(got, None) == cut(whole, limit)
        assert got.dropped_branches == len(branches) - len(kept)
        assert got.image_ends == whole.image_ends
        assert all(end <= limit for end in got.image_ends)


def test_limit_that_everything_fits_changes_nothing():
    whole = lay_out([BLOCK], TWO_BRANCHES, ids=IDS)
    limited = lay_out([BLOCK], TWO_BRANCHES, ids=IDS, limit=13)
    assert cut(limited, None) == cut(whole, None)
    assert limited.dropped_branches == 0


def test_branch_is_dropped_when_only_its_prompt_would_fit():
    # Prefix 5 and branch 4: the second branch's prompt takes token 10, its response none.
    kept = lay_out([BLOCK], TWO_BRANCHES, ids=IDS, limit=11)
    dropped = lay_out([BLOCK], TWO_BRANCHES, ids=IDS, limit=10)
    assert kept.input_ids.tolist()[9:] == [12, 22]
    assert kept.labels.tolist()[9:] == [22, 23]
    assert dropped.input_ids.tolist()[5:] == [10, 11, 20, 21]
    assert (kept.dropped_branches, dropped.dropped_branches) == (0, 1)


def test_segments_of_the_branches_that_are_left_have_no_gap():
    branches = [branch(([10], [20])), branch(([11] * 9, [21])), branch(([12], [22]))]
    sequence = lay_out([], branches, ids=IDS, limit=6)
    assert sequence.input_ids.tolist() == [1, 10, 20, 12, 22]
    assert sequence.subsegment_ids.tolist() == [10_000, 0, 0, 1, 1]
    assert sequence.dropped_branches == 1


def test_images_longer_than_the_limit_are_refused_not_cut():
    with pytest.raises(SampleError) as caught:
        lay_out([BLOCK, BLOCK], TWO_BRANCHES, ids=IDS, limit=8, where="some-key")
    assert caught.value.reason == "image_cut"
    assert caught.value.where == "some-key"
    assert caught.value.facts == {"image_tokens": 9, "sequence_length": 8}


@pytest.mark.parametrize(
    "branches, limit", [([branch(([10, 11, 12], [20]))], 7), ([], None)], ids=["cut", "no text"]
)
def test_sample_without_anything_to_learn_is_refused(branches, limit):
    with pytest.raises(SampleError) as caught:
        lay_out([BLOCK], branches, ids=IDS, limit=limit, where="some-key")
    assert caught.value.reason == "no_loss"
    assert caught.value.where == "some-key"
    # One token more, and the last token of the prompt predicts the response.
    if branches:
        assert lay_out([BLOCK], branches, ids=IDS, limit=8).labels[-1] == 20


def test_molmo_1_numbers_branches_from_1_and_keeps_the_eos_between_them():
    branches = [branch(([10, 11], [20, 21, 22])), branch(([12], [23]))]
    sequence = lay_out([BLOCK], branches, ids=IDS, tree="molmo1", loss="root_subsegments")
    no = IGNORED
    assert sequence.input_ids.tolist() == [1, 90, 92, 92, 91, 10, 11, 20, 21, 22, EOS, 12, 23]
    assert sequence.labels.tolist() == [no] * 6 + [20, 21, 22, EOS, no, 23, EOS]
    assert sequence.subsegment_ids.tolist() == [10_000] * 5 + [1] * 6 + [2] * 2
    assert sequence.position_ids.tolist() == [*range(11), 5, 6]
    root = float(np.float32(0.5**0.5))
    assert sequence.loss_weights.tolist() == [0.0] * 6 + [root] * 4 + [0.0] + [root] * 2


@pytest.mark.parametrize(
    "loss, first, second",
    [
        ("flat", 1, 0.2),
        ("root_subsegments", 2**-0.5, 0.2 * 2**-0.5),
        ("root_length", 2 / 2**0.5, 0.2 * 2 / 3**0.5),
        ("root_both", 2**0.5 / 2**0.5, 0.2 * 2**0.5 / 3**0.5),
    ],
)
def test_loss_is_scaled_by_branches_and_their_lengths(loss, first, second):
    branches = [branch(([10, 11], [20, 21])), branch(([12], [22, 23, 24]), weight=200_000)]
    sequence = lay_out([], branches, ids=IDS, loss=loss)
    weights = sequence.loss_weights[sequence.labels != IGNORED]
    assert weights.tolist() == pytest.approx([first] * 3 + [second] * 4)


def molmo_2_weights(branches, *, dropped, roots):
    """Weighs branches as Molmo 2 does: before the EOS that ends a branch of a tree is there."""
    tree = len(branches) > 1
    kept = [one for b, one in enumerate(branches) if b not in dropped]
    found = []
    for one in kept:
        lengths = [len(turn.response) + 1 for turn in one.turns]
        lengths[-1] -= tree
        weight = one.weight / 1e6
        if "length" in roots:
            weight *= 2 / math.sqrt(sum(lengths))
        if tree and "subsegments" in roots:
            weight /= math.sqrt(len(kept))
        found += [weight] * (sum(lengths) + tree)
    return found


prompted = st.lists(
    st.builds(
        lambda turns, weight: branch(*turns, weight=weight),
        st.lists(
            st.tuples(st.lists(ids, min_size=1, max_size=4), st.lists(ids, min_size=1, max_size=5)),
            min_size=1,
            max_size=3,
        ),
        st.sampled_from([1_000_000, 200_000]),
    ),
    min_size=1,
    max_size=4,
)


@given(prompted, st.one_of(st.none(), st.integers(8, 60)))
def test_root_weights_are_those_of_molmo_2(branches, limit):
    for loss, roots in (
        ("root_length", {"length"}),
        ("root_subsegments", {"subsegments"}),
        ("root_both", {"length", "subsegments"}),
    ):
        try:
            got = lay_out([BLOCK], branches, ids=IDS, loss=loss, limit=limit)
        except SampleError:
            continue  # the limit leaves nothing to learn
        length, dropped = 5, set()
        for b, one in enumerate(branches):
            if b and limit is not None and length + len(one.turns[0].prompt) >= limit:
                dropped.add(b)
            else:
                length += sum(len(t.prompt) + len(t.response) + 1 for t in one.turns) - 1
        assert got.dropped_branches == len(dropped)
        want = molmo_2_weights(branches, dropped=dropped, roots=roots)
        weights = got.loss_weights[got.labels != IGNORED].tolist()
        # The limit cuts the end off; weights are those of whole branches.
        assert weights == pytest.approx(want[: len(weights)])


def test_one_token_answers_of_a_tree_weigh_two():
    sequence = lay_out(
        [], [branch(([10], [20])), branch(([11], [21]))], ids=IDS, loss="root_length"
    )
    assert sequence.loss_weights.tolist() == [0, 2, 2, 2, 2]
    alone = lay_out([], [branch(([10], [20]))], ids=IDS, loss="root_length")
    assert alone.loss_weights.tolist() == pytest.approx([0, 2**0.5, 2**0.5])


def test_branches_that_were_dropped_do_not_count_in_the_scale():
    sequence = lay_out([BLOCK], TWO_BRANCHES, ids=IDS, loss="root_subsegments", limit=10)
    assert sequence.dropped_branches == 1
    assert sequence.loss_weights.max() == 1.0


PLACED = TokenIds(bos=1, eos=EOS, pad=0, image=IDS.image, placeholder=95)


def test_images_stand_where_a_text_wants_them():
    one = branch(([10, 95, 11, 95], [20]))
    sequence = lay_out([BLOCK, BLOCK[1:]], [one], ids=PLACED)
    assert sequence.input_ids.tolist() == [1, 10, 90, 92, 92, 91, 11, 92, 92, 91, 20]
    assert sequence.labels.tolist() == [IGNORED] * 9 + [20, EOS]
    assert (sequence.image_starts, sequence.image_ends) == ((2, 7), (6, 10))
    assert sequence.position_ids.tolist() == list(range(11))
    assert sequence.subsegment_ids.tolist() == [10_000] * 10 + [0]


@given(
    st.lists(st.sampled_from([20, 21, 22, 95]), min_size=1, max_size=12),
    st.sampled_from([1, -1]),
    st.lists(st.sampled_from([10, 95]), max_size=3),
)
def test_all_text_of_a_document_is_learned_and_no_image_is(response, bos, prompt):
    """Each text token of the response, and the end, is the target of the position before it."""
    ids = replace(PLACED, bos=bos)
    num_images = response.count(95) + prompt.count(95)
    sequence = lay_out([BLOCK] * num_images, [branch((prompt, response))], ids=ids)
    marks = [(bos, False)] if bos >= 0 else []
    for token, learned in [(t, False) for t in prompt] + [(t, True) for t in response]:
        marks += [(b, False) for b in BLOCK.tolist()] if token == 95 else [(token, learned)]
    assert sequence.input_ids.tolist() == [token for token, _ in marks]
    after = [*marks[1:], (EOS, True)]
    assert sequence.labels.tolist() == [t if learned else IGNORED for t, learned in after]
    assert (sequence.loss_weights > 0).tolist() == [learned for _, learned in after]
    for start, end in zip(sequence.image_starts, sequence.image_ends, strict=True):
        assert sequence.input_ids[start:end].tolist() == BLOCK.tolist()


def test_an_empty_turn_before_another_one_is_refused():
    with pytest.raises(SampleError) as caught:
        lay_out([BLOCK], [branch(([], []), ([], [20]))], ids=IDS, where="some-key")
    assert caught.value.reason == "empty_turn"
    assert caught.value.where == "some-key"


@pytest.mark.parametrize(
    "blocks, branches",
    [
        ([BLOCK], [branch(([95, 95], [20]))]),
        ([], [branch(([95], [20]))]),
        ([BLOCK, BLOCK], [branch(([95], [20]))]),
        ([BLOCK], [branch(([95], [20])), branch(([10], [21]))]),
    ],
    ids=["too many", "no image", "too few", "two branches"],
)
def test_texts_that_want_other_images_than_there_are_are_refused(blocks, branches):
    with pytest.raises(SampleError) as caught:
        lay_out(blocks, branches, ids=PLACED, where="some-key")
    assert caught.value.reason == "image_placeholder"
    assert caught.value.where == "some-key"


def test_image_inside_the_text_is_not_cut_either():
    one = branch(([10] * 6 + [95], [20]))
    assert lay_out([BLOCK], [one], ids=PLACED, limit=11).image_ends == (11,)
    with pytest.raises(SampleError) as caught:
        lay_out([BLOCK], [one], ids=PLACED, limit=10)
    assert caught.value.reason == "image_cut"


def test_leads_stand_in_front_of_their_images():
    leads = [np.array([30, 31], dtype=np.int32), np.array([32], dtype=np.int32)]
    sequence = lay_out([BLOCK, BLOCK], [branch(([10], [20]))], ids=IDS, leads=leads)
    assert sequence.input_ids[:12].tolist() == [1, 30, 31, 90, 92, 92, 91, 32, 90, 92, 92, 91]
    assert (sequence.image_starts, sequence.image_ends) == ((3, 8), (7, 12))
    assert sequence.subsegment_ids[:12].tolist() == [10_000] * 12


NO_BOS = TokenIds(bos=-1, eos=EOS, pad=0, image=IDS.image)


@given(samples)
def test_without_bos_everything_is_one_position_earlier(sample):
    blocks, branches = sample
    if not blocks and not len(branches[0].turns[0].prompt):
        return  # nothing predicts the first token: below
    with_bos = cut(lay_out(blocks, branches, ids=IDS), None)
    want = {name: values[1:] for name, values in with_bos.items()}
    want["position_ids"] = [position - 1 for position in want["position_ids"]]
    got = lay_out(blocks, branches, ids=NO_BOS)
    assert cut(got, None) == want
    starts = lay_out(blocks, branches, ids=IDS).image_starts
    assert got.image_starts == tuple(start - 1 for start in starts)


def test_without_bos_and_prompt_the_first_token_is_not_predicted():
    sequence = lay_out([], [branch(([], [20, 21])), branch(([], [22]))], ids=NO_BOS)
    assert sequence.input_ids.tolist() == [20, 21, 22]
    assert sequence.labels.tolist() == [21, EOS, EOS]
    assert sequence.loss_weights.tolist() == [1.0, 1.0, 1.0]
    assert sequence.subsegment_ids.tolist() == [0, 0, 1]
    assert sequence.position_ids.tolist() == [0, 1, 0]


def test_special_ids_without_bos_give_none():
    ids = {name: 5 for name in ("eos", "pad", "<|image|>", *SYMBOLS)}
    assert TokenIds.from_special_ids(ids).bos == -1
    assert TokenIds.from_special_ids({**ids, "bos": 0}).bos == 0
