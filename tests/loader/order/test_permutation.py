"""The keyed bijections: exact on every small domain, pinned, and free of visible bias."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.order.permutation import TABLE_LIMIT, keyed_array, permute
from shardspec.keyed import keyed
from tests.examples import examples


@settings(max_examples=examples(60), deadline=None)
@given(size=st.integers(1, 20_000), key=st.integers(0, 2**64 - 1))
def test_every_index_is_the_image_of_exactly_one_index(size, key):
    images = permute(np.arange(size), size=size, key=key)
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4095, 4096, 4097, 4098, 4225, 65_536, 65_537])
def test_sizes_around_the_change_of_method_and_around_squares_are_bijective(size):
    images = permute(np.arange(size), size=size, key=99)
    assert np.array_equal(np.sort(images), np.arange(size))


@settings(max_examples=examples(40), deadline=None)
@given(size=st.integers(TABLE_LIMIT + 1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_sampled_images_of_a_large_domain_are_distinct_and_inside(size, key, data):
    start = data.draw(st.integers(0, size - 1))
    index = np.unique(np.concatenate([np.arange(start, min(size, start + 500)), [0, size - 1]]))
    images = permute(index, size=size, key=key)
    assert len(np.unique(images)) == len(index)
    assert images.min() >= 0
    assert images.max() < size


def test_arrays_of_sizes_and_keys_give_what_single_calls_give():
    index = np.array([[3, 17, 4000], [5000, 0, 6]])
    size = np.array([[4, 30, 4096], [100_000, 1, 10]])
    key = np.array([[1, 2, 3], [4, 5, 6]], np.uint64)
    single = [
        int(permute(int(i), size=int(n), key=int(k))[0])
        for i, n, k in zip(index.ravel(), size.ravel(), key.ravel(), strict=True)
    ]
    assert permute(index, size=size, key=key).ravel().tolist() == single


def test_no_index_gives_no_image():
    assert permute(np.zeros(0, np.int64), size=5, key=1).shape == (0,)


@pytest.mark.parametrize(
    ("size", "golden"),
    [
        (10, [6, 0, 3, 1, 4, 9]),
        (4096, [1456, 4095, 581, 1425, 2090, 121]),
        (4097, [2663, 3789, 2086, 925, 3084, 1738]),
        (10**10, [8446922334, 5083104299, 3984763907, 7885937260, 2002222170, 8610915476]),
    ],
)
def test_images_are_the_ones_of_the_first_release(size, golden):
    assert permute(np.arange(6), size=size, key=keyed(2024, size)).tolist() == golden


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
def test_array_hash_equals_the_scalar_hash(parts):
    assert keyed_array(*parts).tolist() == [keyed(*parts)]
    assert keyed_array(*[np.array([part]) for part in parts]).tolist() == [keyed(*parts)]


@pytest.mark.parametrize("size", [2, 5, 17, 64, 4097])
def test_images_over_many_keys_are_uniform(size):
    """Chi-square per degree of freedom of one image and of the distance between two.

    40,000 keys; over 4096 the images are counted in 64 bins. The bounds are five standard
    deviations of chi-square / df around 1: sqrt(2 / df) * 5.
    """
    keys = keyed_array(7, np.arange(40_000))
    first = permute(0, size=size, key=keys)
    near = (permute(1, size=size, key=keys) - first) % size
    far = (permute(size - 1, size=size, key=keys) - first) % size
    for values, possible in (
        (first, np.arange(size)),
        (near, np.arange(1, size)),
        (far, np.arange(1, size)),
    ):
        bins = min(64, len(possible))
        place = values if len(possible) == size else values - 1
        counts = np.bincount(place * bins // len(possible), minlength=bins)
        widths = np.bincount(np.arange(len(possible)) * bins // len(possible), minlength=bins)
        expected = len(keys) * widths / len(possible)
        freedom = max(1, bins - 1)
        chi_square = float(((counts - expected) ** 2 / expected).sum()) / freedom
        assert chi_square < 1 + 5 * np.sqrt(2 / freedom)


def test_all_orders_of_four_are_equally_likely():
    keys = keyed_array(11, np.arange(24_000))
    images = permute(np.arange(4)[None, :], size=4, key=keys[:, None])
    counts = np.unique(images @ np.array([64, 16, 4, 1]), return_counts=True)[1]
    assert len(counts) == 24
    assert float(((counts - 1000) ** 2 / 1000).sum()) / 23 < 1 + 5 * np.sqrt(2 / 23)
