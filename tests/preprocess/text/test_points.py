"""Points as text: the exact strings of both notations, and reading them back."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.text.points import (
    PointGroup,
    fill_placeholders,
    parse_points,
    point_sentence,
    point_tag,
)
from shardspec.errors import ConfigError, SampleError

PERCENT = (100.0, 100.0)


def group(*points, scale=PERCENT, image=1):
    return PointGroup(points=points, scale=scale, image=image)


def xml(*points, label="dog", alt=None, scale=PERCENT):
    return point_tag([group(*points, scale=scale)], label=label, alt=alt, point_format="xml")


def coords(*groups, label="dog", alt=None):
    return point_tag(groups, label=label, alt=alt, point_format="coords")


def test_one_point_in_xml():
    assert xml((10, 20), label="cat") == '<point x="10.0" y="20.0" alt="cat">cat</point>'


def test_several_points_in_xml():
    want = '<points x1="10.3" y1="33.3" x2="90.0" y2="20.0" alt="dog">dog</points>'
    assert xml((90, 20), (10.34, 33.333)) == want


def test_pixels_become_percent_of_each_side_in_xml():
    assert (
        xml((64, 48), scale=(640, 480), label="a") == '<point x="10.0" y="10.0" alt="a">a</point>'
    )


def test_alternative_text_in_xml_is_the_label_unless_given():
    assert xml((1, 2), label="here", alt="cat") == '<point x="1.0" y="2.0" alt="cat">here</point>'


def test_no_coordinate_is_written_as_minus_zero():
    assert xml((-0.04, 0)) == '<point x="0.0" y="0.0" alt="dog">dog</point>'


def test_points_of_one_image_in_coords():
    want = '<points coords="1 1 900 400 2 911 800">dog</points>'
    assert coords(group((91.1, 80), (90, 40))) == want


def test_coords_have_three_digits_and_four_at_the_far_border():
    assert coords(group((0.1, 100))) == '<points coords="1 1 001 1000">dog</points>'


def test_alternative_text_in_coords_stands_only_where_given():
    want = '<points alt="cat" coords="1 1 010 020">here</points>'
    assert coords(group((1, 2)), label="here", alt="cat") == want


def test_ids_run_on_over_images_and_empty_images_leave_a_gap_in_the_numbers():
    got = coords(
        group((10, 20), (5, 6)),
        group(image=2),
        group((64, 48), scale=(640, 480), image=3),
    )
    assert got == '<points coords="1 1 050 060 2 100 200;3 3 100 100">dog</points>'


@pytest.mark.parametrize(
    "point, want",
    [
        ((120, 50), "1000 500"),
        ((50, 120), "500 1000"),
        ((-1, 50), "000 500"),
        ((50, -1), "500 000"),
    ],
)
def test_points_outside_are_clamped_on_both_axes(point, want):
    assert coords(group(point)) == f'<points coords="1 1 {want}">dog</points>'


def test_points_are_sorted_as_they_are_written():
    # Before rounding the first has the smaller x; after it they tie and y decides.
    assert xml((10.01, 9), (10.04, 3)) == (
        '<points x1="10.0" y1="3.0" x2="10.0" y2="9.0" alt="dog">dog</points>'
    )
    assert coords(group((10.01, 9), (10.04, 3))) == (
        '<points coords="1 1 100 030 2 100 090">dog</points>'
    )


def test_clipping_moves_points_to_the_border():
    clipped = group((-1, 50), (700, 481), scale=(640, 480), image=2).clipped()
    assert clipped.points == [(0, 50), (640, 480)]
    assert (clipped.scale, clipped.image) == ((640, 480), 2)


def test_xml_cannot_tell_images_apart():
    with pytest.raises(ConfigError) as caught:
        point_tag([group((1, 2)), group(image=2)], label="a", point_format="xml")
    assert caught.value.reason == "point_format"


@pytest.mark.parametrize(
    "mode, want",
    [
        ("point", "TAG"),
        ("point_then_count", "Counting the TAG shows a total of 3."),
        ("count_then_point", "There are 3 TAG."),
        ("count", "3"),
    ],
)
def test_sentences_of_the_modes(mode, want):
    assert point_sentence("TAG", count=3, mode=mode) == want


def test_label_with_a_field_name_in_it_stays_as_it_is():
    got = point_sentence("<p>{count} {tag}</p>", count=3, mode="count_then_point")
    assert got == "There are 3 <p>{count} {tag}</p>."


def test_placeholders_are_filled_in_order_even_by_texts_with_placeholders():
    assert fill_placeholders("a <|POINT|> b <|POINT|>.", ["<|POINT|>", "Y"]) == "a <|POINT|> b Y."


@pytest.mark.parametrize("tags", [[], ["X", "Y"]])
def test_other_number_of_tags_than_placeholders_is_refused(tags):
    with pytest.raises(SampleError) as caught:
        fill_placeholders("a <|POINT|> b", tags)
    assert caught.value.reason == "message_fields"


@pytest.mark.parametrize(
    "points",
    [
        5,
        None,
        "ab",
        ["12"],
        [1, 2],
        [[1]],
        [[1, 2, 3]],
        [["1", "2"]],
        [{"x": 1, "y": 2}],
        [[1, float("nan")]],
        [[float("inf"), 0]],
        [[10**400, 0]],
        [[[1, 2]]],
    ],
)
def test_points_that_are_not_pairs_of_finite_numbers_are_refused(points):
    with pytest.raises(SampleError) as caught:
        parse_points(points)
    assert caught.value.reason == "points_shape"


def test_no_points_are_a_list_of_none():
    assert parse_points([]) == []


def read_xml(text):
    pairs = re.findall(r'x\d*="(\S+)" y\d*="(\S+)"', text)
    return [(float(x), float(y)) for x, y in pairs]


def read_coords(text):
    """Gives (image, id, x, y) of each point."""
    (attribute,) = re.findall(r'^<points coords="([0-9 ;]+)">', text)
    found = []
    for written in attribute.split(";"):
        image, *words = map(int, written.split())
        found += [(image, *words[i : i + 3]) for i in range(0, len(words), 3)]
    return found


SIDES = st.integers(1, 5000)
FRACTIONS = st.tuples(st.floats(0, 1), st.floats(0, 1))
LABELS = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12)


@given(st.lists(FRACTIONS, min_size=1, max_size=40), SIDES, SIDES, LABELS)
def test_xml_reads_back_to_the_points_within_rounding(fractions, width, height, label):
    points = [(x * width, y * height) for x, y in fractions]
    text = xml(*points, scale=(width, height), label=label.replace("=", ""))
    found = read_xml(text)
    assert found == sorted(found)
    want = sorted((round(100 * x, 1), round(100 * y, 1)) for x, y in fractions)
    assert len(found) == len(points)
    assert sorted(x for x, _ in found) == pytest.approx(sorted(x for x, _ in want), abs=0.1001)
    assert sorted(y for _, y in found) == pytest.approx(sorted(y for _, y in want), abs=0.1001)
    assert all(
        min(max(abs(100 * fx - x), abs(100 * fy - y)) for x, y in found) <= 0.0501
        for fx, fy in fractions
    )


@given(st.lists(st.lists(FRACTIONS, max_size=12), min_size=1, max_size=4).filter(any), SIDES, SIDES)
def test_coords_read_back_to_the_points_of_each_image_within_rounding(images, width, height):
    groups = [
        group(*((x * width, y * height) for x, y in own), scale=(width, height), image=i)
        for i, own in enumerate(images, start=1)
    ]
    found = read_coords(coords(*groups))
    assert [number for _, number, _, _ in found] == list(range(1, len(found) + 1))
    for i, own in enumerate(images, start=1):
        mine = [(x, y) for image, _, x, y in found if image == i]
        assert len(mine) == len(own)
        assert mine == sorted(mine)
        assert all(
            min(max(abs(1000 * fx - x), abs(1000 * fy - y)) for x, y in mine) <= 0.5001
            for fx, fy in own
        )
