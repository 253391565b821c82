"""The survey: what indexes say, however they are cut into parts, in bounded memory."""

from itertools import pairwise

import numpy as np
import pytest

from preprocess.report import survey as module
from preprocess.report.survey import chosen, survey
from shardspec.index import index_dtype


def rows_of(count, seed=0):
    rng = np.random.RandomState(seed)
    rows = np.zeros(count, index_dtype(2))
    for name in ("num_bytes", "image_bytes", "num_tokens", "num_loss_tokens"):
        rows[name] = rng.randint(1, 500, count)
    for name in ("width", "height"):
        rows[name] = rng.randint(1, 40, count)
    rows["num_images"] = rng.randint(0, 2, count)
    rows["view_crops"] = rng.randint(1, 9, (count, 2))
    rows["view_length"] = rng.randint(1, 900, (count, 2))
    return rows


def cut(rows, *borders):
    edges = [0, *borders, len(rows)]
    return [(a, rows[a:b]) for a, b in pairwise(edges)]


def described(found):
    bars = {name: counts.bars() for name, counts in found.histograms.items()}
    return found.num_samples, bars, found.aspects.tolist(), found.extremes, found.classes


def test_parts_give_what_the_whole_gives():
    rows = rows_of(300)
    assert described(survey(cut(rows, 1, 40, 40, 222))) == described(survey(cut(rows)))


def test_extremes_are_the_first_samples_with_the_largest_values():
    rows = rows_of(50)
    rows["num_bytes"][[7, 30, 31, 9]] = 1000
    rows["num_loss_tokens"][20] = 0
    found = survey(cut(rows, 8, 31))
    assert found.extremes["bytes"] == [(1000, 7), (1000, 9), (1000, 30)]
    assert found.extremes["least loss"][0] == (0, 20)
    crops = rows["view_crops"].max(axis=1)
    assert found.extremes["crops"][0] == (crops.max(), crops.argmax())


def test_aspects_are_counted_by_class_with_their_border_above():
    rows = rows_of(6)
    rows["num_images"] = [1, 1, 1, 1, 1, 0]
    rows["width"], rows["height"] = [30, 10, 20, 40, 100, 1], [30, 20, 10, 10, 1, 1]
    found = survey(cut(rows))
    names = [name for (name, _), n in zip(module.ASPECTS, found.aspects, strict=True) if n]
    assert names == [
        "1:2 to 2:3", "4:5 to 5:4, about square", "2:1 to 3:1", "wider than 3:1",
    ]  # fmt: skip
    assert found.aspects.sum() == 5


def alike(count):
    """Rows in pairs: 0 and 1, 2 and 3, ... have images of the same sizes."""
    rows = rows_of(count)
    rows["num_images"] = 1
    rows["image_bytes"] = 1000 + np.arange(count) // 2
    rows["width"] = rows["height"] = 30
    return rows


def test_images_of_equal_sizes_are_candidates():
    found = survey(cut(alike(40), 13))
    assert found.classes == [[i, i + 1] for i in range(0, 40, 2)]
    assert found.classes_share == 1


def test_candidates_of_many_samples_are_a_sample_of_whole_classes(monkeypatch):
    monkeypatch.setattr(module, "_MOST_CLASSES", 100)
    rows = alike(2000)
    found = survey(cut(rows, 500, 501, 1700))
    assert 0 < len(found.classes) <= 50
    assert all(pair == [pair[0], pair[0] + 1] for pair in found.classes)
    assert found.classes_share < 1 / 10
    assert described(found) == described(survey(cut(rows)))


@pytest.mark.parametrize("count", [0, 1, 24, 100])
def test_chosen_samples_are_different_and_the_same_each_time(count):
    found = chosen(100, count, seed=0)
    assert found == chosen(100, count, seed=0) == sorted(set(found))
    assert len(found) == count
