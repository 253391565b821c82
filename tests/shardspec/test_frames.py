"""Frame sampling: against closed forms, and by what must hold of any video."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardspec.errors import ConfigError
from shardspec.frames import (
    FPS_CANDIDATES,
    FrameSampling,
    adaptive_frames,
    choose_frames,
    clip_frames,
    draw_frames,
    even_frames,
    find_cuts,
    fps_times,
    frames_at,
    random_times,
    uniform_last_times,
    uniform_times,
)

MODES = ("uniform", "uniform_last", "fps", "random", "adaptive")
STEPS = st.lists(st.sampled_from([0.01, 1 / 29.97, 0.04, 0.1, 1.0]), min_size=0, max_size=60)


def chi_square(counts):
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 for count in counts) / expected


@given(
    steps=STEPS,
    mode=st.sampled_from(MODES),
    number=st.integers(1, 20),
    spacing=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
def test_chosen_frames_exist_ascend_and_keep_to_the_limits(steps, mode, number, spacing, seed):
    times = np.concatenate([[0.0], np.cumsum(steps)]) + 1.5
    rng = np.random.RandomState(seed)
    change = rng.random_sample(len(times)) * 0.05
    sampling = FrameSampling(mode=mode, max_frames=number, min_spacing_s=spacing)
    frames = choose_frames(times, sampling, end_s=float(times[-1]) + 0.04, rng=rng, change_N=change)
    assert 1 <= len(frames) <= number
    assert frames.dtype == np.int64
    assert np.all(np.diff(frames) > 0)
    assert frames[0] >= 0
    assert frames[-1] < len(times)
    assert np.all(np.diff(times[frames]) >= spacing - 1e-5)
    if mode == "uniform_last" and not spacing and number > 1:
        assert (frames[0], frames[-1]) == (0, len(times) - 1)


@given(duration=st.floats(0.01, 1e4), number=st.integers(1, 200))
def test_uniform_times_are_even_and_leave_out_the_end(duration, number):
    times = uniform_times(duration, number)
    assert times == pytest.approx([i * duration / number for i in range(number)])
    assert times[-1] < duration


@pytest.mark.parametrize(
    "duration, want",
    [  # as Molmo 2's own tests have it, for 4 frames at 1 frame per second
        (2.1, [0, 1, 2, 2.1]),
        (2.0, [0, 1, 2]),
        (0.4, [0, 0.4]),
        (3.0, [0, 1, 2, 3]),
        (3.001, [0, 3.001 / 3, 2 * 3.001 / 3, 3.001]),
        (60.0, [0, 20, 40, 60]),
    ],
)
def test_uniform_last_follows_molmo_2(duration, want):
    assert uniform_last_times(duration, 4, max_fps=1.0) == pytest.approx(want)


@given(
    duration=st.floats(0.01, 500), number=st.integers(2, 130), rate=st.sampled_from([1, 2, 3, 0.7])
)
def test_uniform_last_ends_with_the_last_frame_at_no_more_than_its_rate(duration, number, rate):
    times = uniform_last_times(duration, number, max_fps=rate)
    assert len(times) <= number
    assert times[-1] == pytest.approx(duration)
    assert np.all(np.diff(times) > 0)
    if (number - 1) / rate >= duration:
        assert times[:-1] == pytest.approx(np.arange(len(times) - 1) / rate)
    else:
        assert times == pytest.approx(np.linspace(0, duration, number))


@given(duration=st.floats(0.05, 3000), number=st.integers(1, 400))
def test_fps_is_the_largest_rate_that_spans_the_video(duration, number):
    times = fps_times(duration, number, candidates=FPS_CANDIDATES)
    spanning = [rate for rate in FPS_CANDIDATES if number / rate >= duration]
    rate = max(spanning, default=FPS_CANDIDATES[0])
    want = [i / rate for i in range(number) if i / rate < duration - 1e-6 or not i]
    assert times == pytest.approx(want)


@settings(max_examples=30)
@given(number=st.integers(1, 30), seed=st.integers(0, 99))
def test_random_times_are_one_in_each_part(number, seed):
    times = random_times(12.0, number, np.random.RandomState(seed))
    assert (times * number / 12).astype(int).tolist() == list(range(number))
    again = random_times(12.0, number, np.random.RandomState(seed))
    assert np.array_equal(times, again)


def test_random_times_are_uniform():
    rng = np.random.RandomState(5)
    times = np.concatenate([random_times(1.0, 7, rng) for _ in range(3000)])
    counts = np.bincount((times * 40).astype(int), minlength=40)
    assert chi_square(counts) < 72  # of 39 degrees of freedom; above once in 1,000


@pytest.mark.parametrize("stored, number", [(10, 3), (7, 5), (64, 16), (9, 9), (5, 1)])
def test_stored_frames_are_drawn_equally_often_and_spread(stored, number):
    rng = np.random.RandomState(11)
    counts = np.zeros(stored, int)
    for _ in range(4000):
        frames = draw_frames(stored, number, rng)
        assert len(frames) == number == len(set(frames.tolist()))
        assert sorted(frames) == frames.tolist()
        counts[frames] += 1
        # One from each part: no two neighbours are further apart than two parts.
        gaps = np.diff(np.append(frames, frames[0] + stored))
        assert gaps.max() <= 2 * -(-stored // number)
    assert counts.sum() == 4000 * number
    assert chi_square(counts) < 2 * stored + 20


def test_draws_depend_on_nothing_but_the_generator():
    draws = [draw_frames(30, 8, np.random.RandomState(s)).tolist() for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@given(stored=st.integers(1, 300), number=st.integers(1, 300))
def test_even_frames_are_distinct_and_include_both_ends(stored, number):
    frames = even_frames(stored, number)
    assert len(frames) == min(stored, number)
    assert np.all(np.diff(frames) > 0)
    assert frames[0] == 0
    if number > 1:
        assert frames[-1] == stored - 1
        assert np.diff(frames).max(initial=0) - np.diff(frames).min(initial=9999) <= 1


def test_frame_of_an_instant_is_the_last_one_that_is_not_later():
    times = np.array([0.0, 1 / 30, 0.5, 2.0])
    assert frames_at(times, np.array([-1, 0, 0.033, 0.0333333, 0.49, 0.5, 9])).tolist() == [
        *(0, 1, 2, 3)
    ]
    assert frames_at(times, np.array([0.033])).tolist() == [0]
    assert frames_at(times, np.array([0.0333333])).tolist() == [1]


@pytest.mark.parametrize(
    "clip, want",
    [
        ((None, None), range(10)),
        ((0.0, 1.0), range(10)),
        ((0.25, 0.5), range(2, 5)),
        ((0.25, 0.26), range(2, 3)),
        ((0.95, None), range(9, 10)),
        ((None, 0.3), range(3)),
        ((0.4, 0.3), ()),
    ],
)
def test_clip_begins_with_the_frame_that_is_shown_and_leaves_out_its_end(clip, want):
    times = np.arange(10) / 10
    start, end = clip
    assert list(range(10))[clip_frames(times, start_s=start, end_s=end)] == list(want)


def changes(rng, num_frames, cuts):
    """Slow motion, with a jump at each cut."""
    change = rng.random_sample(num_frames) * 0.03
    change[0] = 0.0
    change[list(cuts)] = 0.15 + 0.5 * rng.random_sample(len(cuts))
    return change


@given(num_frames=st.integers(30, 200), data=st.data(), seed=st.integers(0, 999))
def test_every_cut_gets_a_frame_on_each_side(num_frames, data, seed):
    cuts = data.draw(
        st.lists(st.integers(1, num_frames // 10 - 1), min_size=0, max_size=6, unique=True)
    )
    cuts = sorted(10 * cut for cut in cuts)
    change = changes(np.random.RandomState(seed), num_frames, cuts)
    assert sorted(find_cuts(change)) == cuts
    frames = adaptive_frames(np.arange(num_frames) / 24, change, 16)
    assert len(frames) == min(16, num_frames)
    assert {side for cut in cuts for side in (cut - 1, cut)} <= set(frames.tolist())


def test_too_many_cuts_leave_the_greatest():
    change = np.zeros(100)
    change[[10, 30, 50, 70]] = 0.2, 0.9, 0.4, 0.8
    assert adaptive_frames(np.arange(100.0), change, 4).tolist() == [29, 30, 69, 70]
    assert adaptive_frames(np.arange(100.0), change, 1).tolist() == [0]


def test_fast_motion_is_not_a_cut():
    assert find_cuts(np.full(50, 0.2)).tolist() == []


def test_frames_go_where_most_changes():
    change = np.full(100, 0.0001)
    change[60:80] = 0.05
    frames = adaptive_frames(np.arange(100) / 10, change, 12)
    assert np.count_nonzero((frames >= 59) & (frames < 80)) >= 8
    still = adaptive_frames(np.arange(101) / 10, np.zeros(101), 5)
    assert still.tolist() == pytest.approx([0, 25, 50, 75, 100], abs=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "some"},
        {"max_frames": 0},
        {"max_fps": 0.0},
        {"min_spacing_s": -1.0},
        {"fps_candidates": ()},
        {"fps_candidates": (2.0, 1.0)},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match="out of range") as found:
        FrameSampling(**wrong)
    assert found.value.reason == "frame_sampling"


@pytest.mark.parametrize("mode, needs", [("random", "rng"), ("adaptive", "change_N")])
def test_modes_say_what_they_need(mode, needs):
    with pytest.raises(ConfigError, match=needs):
        choose_frames(np.arange(3.0), FrameSampling(mode=mode))
