"""Pointing: reading points of answers, pairing them with wanted ones, and what a hit is."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.evaluation.pointing import assign, parse_predicted, score_points, wanted_points
from preprocess.text.points import PointGroup, point_sentence, point_tag

PIXELS = [(64.0, 48.0), (320.0, 240.0), (630.0, 10.0)]


@pytest.mark.parametrize("notation, error", [("xml", 0.0006), ("coords", 0.0006)])
def test_points_that_the_formatter_writes_are_read_back(notation, error):
    group = PointGroup(points=PIXELS, scale=(640, 480))
    tag = point_tag([group], label='cat " x="9"', point_format=notation)
    found = parse_predicted(point_sentence(tag, count=3, mode="point_then_count"))
    wanted = wanted_points(PIXELS, sizes=[(640, 480)], scale=None)
    assert [image for image, *_ in found] == [1, 1, 1]
    assert [xy for _, *xy in found] == [pytest.approx(xy, abs=error) for _, *xy in wanted]


def test_points_of_several_images_keep_their_image():
    groups = [
        PointGroup(points=[(10, 20)], scale=(100, 100), image=1),
        PointGroup(points=[(30, 40)], scale=(100, 100), image=3),
    ]
    assert parse_predicted(point_tag(groups, label="x")) == [(1, 0.1, 0.2), (3, 0.3, 0.4)]
    wanted = wanted_points([[[10, 20]], [], [[30, 40]]], sizes=[], scale=100)
    assert score_points(parse_predicted(point_tag(groups, label="x")), wanted).f1 == 1
    assert score_points([(2, 0.1, 0.2)], [(1, 0.1, 0.2)]).f1 == 0


@pytest.mark.parametrize("text", ["", "There are none.", 'coords="1 2"', "<point>", "Point: <a>"])
def test_texts_without_whole_points_have_none(text):
    assert parse_predicted(text) == []


def test_plain_points_are_percent():
    assert parse_predicted("Point: <12.5, 80>") == [(1, 0.125, 0.8)]


def test_where_nothing_is_wanted_no_point_is_right():
    assert score_points([], []).f1 == 1
    assert score_points([(1, 0.5, 0.5)], []).f1 == 0
    assert score_points([], [(1, 0.5, 0.5)]).f1 == 0


def test_a_hit_is_inside_of_the_mask_of_its_own_thing():
    left, right = ([[True, False]], [[False, True]])
    wanted = [(1, 0.1, 0.5), (1, 0.9, 0.5)]
    found = score_points([(1, 0.3, 0.9), (1, 1.0, 0.0), (1, 0.4, 0.5)], wanted, masks=[left, right])
    assert (found.precision, found.recall) == (2 / 3, 1.0)
    assert score_points([(1, 0.6, 0.5)], wanted[:1], masks=[left]).f1 == 0


def test_distances_are_shares_of_the_diagonal_in_pixels():
    wanted = [(1, 0.5, 0.5)]
    assert score_points([(1, 0.54, 0.5)], wanted, sizes=[(100, 1000)]).f1 == 1
    assert score_points([(1, 0.5, 0.56)], wanted, sizes=[(100, 1000)]).f1 == 0


@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 20), min_size=width, max_size=width), min_size=1, max_size=4
        )
    )
)
def test_no_other_pairing_costs_less(costs):
    pairs = assign(costs)
    fewer = min(len(costs), len(costs[0]))
    assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs) == fewer
    rows, columns = range(len(costs)), range(len(costs[0]))
    if len(costs) <= len(costs[0]):
        best = min(
            sum(costs[i][j] for i, j in zip(rows, chosen, strict=True))
            for chosen in itertools.permutations(columns, fewer)
        )
    else:
        best = min(
            sum(costs[i][j] for i, j in zip(chosen, columns, strict=True))
            for chosen in itertools.permutations(rows, fewer)
        )
    assert sum(costs[i][j] for i, j in pairs) == best
