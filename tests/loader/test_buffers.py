import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loader.buffers import LEAST_POOLED_BYTES, BufferPool, Scratch

SHAPE = (LEAST_POOLED_BYTES, 3)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_when_the_last_view_is_gone():
    pool = BufferPool(keep_bytes=1 << 30)
    first = pool.empty(SHAPE, np.uint8)
    place = address(first)
    view = first[5:][::2]
    del first
    assert address(pool.empty(SHAPE, np.uint8)) != place
    del view
    assert address(pool.empty(SHAPE, np.uint8)) == place


@pytest.mark.parametrize(
    "derive",
    [
        lambda t: t[3],
        lambda t: t.permute(1, 0),
        lambda t: t.numpy(),
        lambda t: t.view(-1)[:7],
        lambda t: memoryview(t.numpy()),
        lambda t: t.detach(),
        lambda t: {"images": [t[1:]]},
    ],
)
def test_whatever_is_derived_from_a_tensor_keeps_its_memory(derive):
    pool = BufferPool(keep_bytes=1 << 30)
    tensor = torch.from_numpy(pool.empty(SHAPE, np.uint8))
    place = tensor.data_ptr()
    kept = derive(tensor)
    del tensor  # its memory returns as soon as nobody refers to it, without a collection
    others = [pool.empty(SHAPE, np.uint8) for _ in range(3)]
    assert place not in {address(other) for other in others}
    del kept
    assert address(pool.empty(SHAPE, np.uint8)) == place


@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    dtype=st.sampled_from([np.uint8, np.int64, np.float32]),
)
def test_arrays_have_the_shape_and_type_that_was_asked_for(shape, dtype):
    array = BufferPool(keep_bytes=1 << 20).empty(tuple(shape), dtype)
    assert (array.shape, array.dtype) == (tuple(shape), dtype)
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_no_more_waits_than_is_allowed():
    pool = BufferPool(keep_bytes=2 * (1 << 18))
    arrays = [pool.empty(SHAPE, np.uint8) for _ in range(5)]  # 192 KiB, held in 256 KiB each
    places = {address(array) for array in arrays}
    arrays.clear()
    again = [pool.empty(SHAPE, np.uint8) for _ in range(5)]
    assert pool._free_bytes == 0
    assert len({address(array) for array in again} & places) >= 2
    again.clear()
    pool.empty((1 << 20,), np.uint8)
    assert pool._free_bytes <= pool.keep_bytes


def test_pool_is_safe_to_share_between_threads():
    pool = BufferPool(keep_bytes=1 << 24)
    wrong = []

    def work(number):
        for _ in range(200):
            array = pool.empty(SHAPE, np.uint8)
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pool_may_go_before_its_arrays():
    pool = BufferPool(keep_bytes=1 << 24)
    array = pool.empty(SHAPE, np.uint8)
    array[:] = 7
    del pool
    assert (array == 7).all()


def test_scratch_is_one_buffer_per_purpose_and_thread():
    scratch = Scratch()
    large = scratch("picture", (100, 100, 3))
    small = scratch("picture", (10, 10, 3))
    assert address(small) == address(large)
    assert address(scratch("overview", (10, 10, 3))) != address(large)
    found = []
    thread = threading.Thread(target=lambda: found.append(scratch("picture", (10, 10, 3))))
    thread.start()
    thread.join()
    assert address(found[0]) != address(large)
    assert isinstance(pickle.loads(pickle.dumps(scratch)), Scratch)


def test_huge_scratch_is_not_kept():
    scratch = Scratch()
    huge = scratch("picture", (5000, 5000, 3))
    assert huge.shape == (5000, 5000, 3)
    assert not scratch._local.__dict__
