"""The flame graph of `bench --profile`: bars as wide as their share, callees below callers."""

import re
import sys
import xml.etree.ElementTree as ET

import pytest

from loader.cli.flame import StackSampler, draw_flame_graph, stack_of

SVG = "{http://www.w3.org/2000/svg}"


def bars(document):
    """{tooltip: (x, y, width)} of the bars."""
    found = {}
    for group in ET.fromstring(document).iter(f"{SVG}g"):
        rect = group.find(f"{SVG}rect")
        found[group.find(f"{SVG}title").text] = tuple(
            float(rect.get(name)) for name in ("x", "y", "width")
        )
    return found


def test_bars_are_as_wide_as_their_share_and_stand_under_their_callers():
    stacks = {("a.py:run", "b.py:<lambda>"): 3, ("a.py:run", "c.py:read"): 5, ("a.py:run",): 2}
    drawn = draw_flame_graph(stacks, title="train & more")
    found = bars(drawn)
    assert found["a.py:run, 100.0%"] == (0, 18, 1200)
    assert found["b.py:<lambda>, 30.0%"] == (0, 36, 360)
    assert found["c.py:read, 50.0%"] == (360, 36, 600)
    assert "train &amp; more: 10 samples" in drawn
    assert drawn == draw_flame_graph(dict(reversed(stacks.items())), title="train & more")


def test_bars_too_narrow_to_see_are_left_out_and_nothing_is_drawn_of_nothing():
    stacks = {("a.py:run",): 100_000, ("z.py:run",): 1}
    assert list(bars(draw_flame_graph(stacks, title="t"))) == ["a.py:run, 100.0%"]
    assert bars(draw_flame_graph({}, title="t")) == {}


def test_a_stack_is_named_from_the_outermost_function():
    stack = stack_of(sys._getframe())
    assert stack[-1] == "test_flame.py:test_a_stack_is_named_from_the_outermost_function"
    assert re.fullmatch(r".+\.py:.+|<.+>:.+", stack[0])


@pytest.mark.timeout(60)
def test_a_function_that_runs_is_seen_and_the_sampler_is_not():
    with StackSampler() as sampler:
        while not any("test_flame" in name for stack in list(sampler.stacks) for name in stack):
            sum(range(1000))
    assert not any("flame.py:_sample" in stack for stack in sampler.stacks)
