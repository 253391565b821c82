import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shardspec.keyed import (
    SEED_MODULUS,
    SampleRng,
    dataset_seed,
    draw_below,
    draw_order,
    hash_text,
    keyed,
    mix,
    mix_array,
    sample_seed,
)

U64 = st.integers(0, 2**64 - 1)


# The reference: the sequence that splitmix64.c (Vigna, prng.di.unimi.it) gives from state 0 and
# from state 1234567; its step adds the golden gamma and applies the finaliser that `mix` is.
@pytest.mark.parametrize(
    "state, sequence",
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423]),
    ],
)
def test_mix_is_the_finaliser_of_splitmix64(state, sequence):
    gamma = 0x9E3779B97F4A7C15
    assert [mix(state + gamma * (i + 1)) for i in range(3)] == sequence


# These pin stored orders: a change would move every sample of every dataset.
def test_keyed_values_never_change():
    assert keyed() == 0
    assert keyed(0) == 0x397AB29740681D9
    assert keyed(1, 2, 3) == 0x3F53A1FE784BBF
    assert keyed(42, 2**64 - 1) == 0xF23B76FAA60BEF55
    assert hash_text("pixmo_cap/0") == 0x6C9FDA3D81C82E9A
    assert dataset_seed(42, "pixmo_cap") == 2140996424


def test_hash_text_is_eight_bytes_of_blake2b_in_network_order():
    # RFC 7693 gives blake2b itself; the digest length is part of its parameters.
    assert hash_text("") == 0xE4A6A0577479B2B4
    assert hash_text("ü") == hash_text("\u00fc") != hash_text("u\u0308")


@given(hnp.arrays(np.uint64, hnp.array_shapes(min_dims=0, max_dims=3), elements=U64))
def test_mix_array_equals_mix_elementwise_and_leaves_its_argument(values):
    before = values.copy()
    mixed = mix_array(values)
    assert (mixed.dtype, mixed.shape) == (np.uint64, values.shape)
    assert mixed.ravel().tolist() == [mix(v) for v in values.ravel().tolist()]
    assert np.array_equal(values, before)


@given(U64)
def test_mix_looks_at_the_low_64_bits_only(value):
    assert mix(value + 2**64) == mix(value) < 2**64


@given(st.sets(U64, min_size=2, max_size=50))
def test_mix_is_injective(values):
    assert len({mix(value) for value in values}) == len(values)


@given(st.lists(U64, max_size=4), st.lists(U64, max_size=4))
def test_keyed_tells_tuples_apart(a, b):
    assert (keyed(*a) == keyed(*b)) == (a == b)
    assert 0 <= keyed(*a) < 2**64


def test_keyed_spreads_neighbours_over_all_bits():
    values = np.array([keyed(7, i) for i in range(4096)], dtype=np.uint64)
    share = [(values >> np.uint64(bit) & np.uint64(1)).mean() for bit in range(64)]
    # Of 4096 fair coins the mean has a standard deviation of 1/128; five of them.
    assert max(abs(p - 0.5) for p in share) < 5 / 128


@given(
    base=st.integers(0, 2**32 - 1),
    length=st.integers(1, 2**40),
    epoch=st.integers(0, 10**6),
    data=st.data(),
)
def test_sample_seed_is_the_formula_and_a_seed_that_random_state_takes(base, length, epoch, data):
    idx = data.draw(st.integers(0, length - 1))
    seed = sample_seed(base, idx=idx, length=length, epoch=epoch)
    assert seed == (base * 195172 + idx + length * epoch) % (2**32 - 1)
    assert 0 <= seed < SEED_MODULUS
    np.random.RandomState(seed)


def test_sample_seeds_of_a_dataset_are_distinct_over_epochs():
    seeds = [sample_seed(5, idx=i, length=100, epoch=e) for e in range(20) for i in range(100)]
    assert len(set(seeds)) == len(seeds)


@given(st.integers(0, 2**31), st.text(max_size=8), st.text(max_size=8))
def test_dataset_seed_is_32_bits_and_depends_on_the_name(seed, a, b):
    assert 0 <= dataset_seed(seed, a) < 2**32
    if a != b:
        assert hash_text(f"{seed}\0{a}") != hash_text(f"{seed}\0{b}")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
def test_reseeded_generator_equals_a_fresh_one(seeds):
    sample_rng = SampleRng()
    for seed in seeds:
        rng, fresh = sample_rng(seed), np.random.RandomState(seed)
        # An odd number of normal draws leaves one cached: re-seeding must drop it.
        assert rng.standard_normal(3).tolist() == fresh.standard_normal(3).tolist()
        assert rng.randint(0, 1000, 5).tolist() == fresh.randint(0, 1000, 5).tolist()
        assert rng.permutation(9).tolist() == fresh.permutation(9).tolist()


def test_each_thread_has_its_own_generator_and_keeps_it():
    sample_rng = SampleRng()
    mine = sample_rng(1)
    found = []

    def work():
        found.append(sample_rng(2))
        found.append(sample_rng(3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] is found[1] is not mine
    assert sample_rng(4) is mine


def test_generator_of_one_thread_is_not_disturbed_by_another():
    sample_rng = SampleRng()
    rng = sample_rng(1)
    first = rng.random_sample()
    thread = threading.Thread(target=lambda: sample_rng(99).random_sample(100))
    thread.start()
    thread.join()
    assert [first, rng.random_sample()] == np.random.RandomState(1).random_sample(2).tolist()


def test_sample_rng_pickles_for_worker_processes():
    copy = pickle.loads(pickle.dumps(SampleRng()))
    assert copy(7).random_sample() == np.random.RandomState(7).random_sample()


def test_drawing_leaves_numpys_global_generator_alone():
    before = np.random.get_state()[1].tolist()
    SampleRng()(3).random_sample(10)
    assert np.random.get_state()[1].tolist() == before


@given(
    seed=st.integers(0, SEED_MODULUS - 1),
    counts=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 2**32)), max_size=8),
    size=st.integers(0, 40),
)
def test_own_draws_are_those_of_random_state_and_leave_it_in_the_same_state(seed, counts, size):
    ours, numpys = np.random.RandomState(seed), np.random.RandomState(seed)
    for count in counts:
        assert draw_below(ours, count) == numpys.randint(0, count)
    assert draw_order(ours, size) == numpys.permutation(size).tolist()
    assert ours.random_sample() == numpys.random_sample()
