"""FeatureCache: one computation per picture, whichever threads ask, within a bound of bytes."""

import threading

import numpy as np
import pytest
import torch

from loader.features import FeatureCache
from shardspec.errors import ConfigError

ROW_BYTES = 16


def features(number):
    return torch.full((4,), float(number))


class Counted:
    """Computes features of numbers and counts how often."""

    def __init__(self):
        self.calls = []

    def __call__(self, picture):
        self.calls.append(int(picture[0]))
        return features(picture[0])


def picture(number):
    return torch.full((3,), number, dtype=torch.uint8)


def test_a_picture_is_computed_once():
    cache, compute = FeatureCache("print"), Counted()
    for number in (1, 2, 1, 1):
        assert torch.equal(cache.get(picture(number), compute), features(number))
    assert (compute.calls, cache.hits, cache.misses) == ([1, 2], 2, 2)
    cache.clear()
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_the_least_recently_used_goes_first():
    cache, compute = FeatureCache("print", max_bytes=2 * ROW_BYTES), Counted()
    for number in (1, 2, 1, 3, 1, 2):
        cache.get(picture(number), compute)
        assert cache.num_bytes == ROW_BYTES * len(cache) <= 2 * ROW_BYTES
    assert compute.calls == [1, 2, 3, 2]


def test_what_is_larger_than_the_cache_is_handed_out_only():
    cache = FeatureCache("print", max_bytes=ROW_BYTES - 1)
    assert torch.equal(cache.get(picture(5), Counted()), features(5))
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_a_view_is_kept_without_the_rest_of_its_memory():
    cache = FeatureCache("print")
    cache.get(picture(1), lambda _: torch.zeros(1000)[:4])
    kept = cache.get(picture(1), Counted())
    assert kept.untyped_storage().nbytes() == ROW_BYTES == cache.num_bytes


def test_keys_tell_content_type_shape_and_backbone_apart():
    cache = FeatureCache("one")
    pixels = np.arange(12, dtype=np.uint8)
    pictures = [
        pixels,
        pixels[::-1],
        pixels.reshape(3, 4),
        pixels.astype(np.int16),
        pixels.tobytes(),
        pixels.tobytes()[:-1],
        torch.arange(12).to(torch.bfloat16),
    ]
    keys = [cache.key(each) for each in pictures]
    assert len(set(keys)) == len(keys)
    assert cache.key(pixels.copy()) == keys[0]
    assert cache.key(np.arange(24, dtype=np.uint8)[::2] // 2) == keys[0]
    assert FeatureCache("two").key(pixels) != keys[0]


def test_equal_patches_of_other_grids_are_other_pictures():
    cache, patches = FeatureCache("print"), torch.ones(16, 4)
    grids = [torch.tensor([[1, *sides]]) for sides in ((4, 4), (2, 8), (4, 4))]
    found = [
        cache.get(patches, lambda x, grid_thw: x * grid_thw[0, 1], grid_thw=grid) for grid in grids
    ]
    assert [each[0, 0].item() for each in found] == [4, 2, 4]
    assert (cache.hits, cache.misses) == (1, 2)


def test_threads_that_want_the_same_picture_wait_for_one():
    cache, started, release = FeatureCache("print"), threading.Event(), threading.Event()
    calls, found = [], []

    def slow(picture):
        calls.append(1)
        started.set()
        assert release.wait(60)
        return features(picture[0])

    threads = [
        threading.Thread(target=lambda: found.append(cache.get(picture(7), slow))) for _ in range(4)
    ]
    threads[0].start()
    assert started.wait(60)
    for thread in threads[1:]:
        thread.start()
    cache.get(picture(8), Counted())  # another picture waits for nobody
    release.set()
    for thread in threads:
        thread.join()
    assert calls == [1]
    assert all(each is found[0] for each in found)
    assert len(found) == 4


def test_an_error_is_not_kept():
    cache = FeatureCache("print")

    def fail(picture):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        cache.get(picture(1), fail)
    assert torch.equal(cache.get(picture(1), Counted()), features(1))


@pytest.mark.parametrize("most", [-1, 1.5, True, None])
def test_another_bound_is_refused(most):
    with pytest.raises(ConfigError):
        FeatureCache("print", max_bytes=most)
