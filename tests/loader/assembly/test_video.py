"""The brief's call: VideoPreprocessor()(video [T, H, W, C], max_frames=16) -> [T', C, H, W]."""

import numpy as np
import pytest
import torch

from loader import VideoPreprocessor
from loader.assembly.pixels import normalize, resize
from loader.assembly.video import frame_change
from shardspec.errors import ConfigError
from shardspec.tiling import ImageView

SMALL = ImageView(size_px=56)


def movie(count, height=48, width=64):
    rng = np.random.RandomState(count)
    still = rng.randint(0, 200, (height, width, 3))
    return np.stack([(still + t) % 256 for t in range(count)]).astype(np.uint8)


def test_call_as_the_brief_has_it():
    tensor = VideoPreprocessor()(movie(40), max_frames=16)
    assert isinstance(tensor, torch.Tensor)
    assert tensor.shape == (16, 3, 336, 336)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert VideoPreprocessor()(movie(3)).shape == (3, 3, 336, 336)


def test_pixels_are_those_of_the_frames_resized_and_normalised():
    video = movie(9)
    preprocessor = VideoPreprocessor(view=SMALL, sampling="uniform", normalize="openai")
    numbers = preprocessor.choose(video, 3)
    assert numbers.tolist() == [0, 3, 6]
    tensor = preprocessor(video, 3)
    for made, number in zip(tensor, numbers, strict=True):
        frame = resize(video[number], 56, 56)
        want = normalize(torch.from_numpy(frame.copy()).permute(2, 0, 1), kind="openai")
        assert torch.equal(made, want)


def test_uint8_is_left_to_the_device():
    tensor = VideoPreprocessor(view=SMALL, normalize=None)(movie(2))
    assert tensor.dtype == torch.uint8


def test_times_follow_from_the_rate():
    preprocessor = VideoPreprocessor(view=SMALL)
    video = movie(48)
    assert preprocessor.choose(video, 16, fps=24.0, max_fps=2.0).tolist() == [0, 12, 24, 36, 47]
    assert preprocessor.choose(video, 3, fps=24.0, max_fps=2.0).tolist() == [0, 24, 47]


def test_random_frames_follow_the_generator():
    preprocessor = VideoPreprocessor(view=SMALL, sampling="random")
    draws = [
        preprocessor.choose(movie(60), 8, rng=np.random.RandomState(s)).tolist() for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    with pytest.raises(ConfigError, match="needs rng"):
        preprocessor(movie(60), 8)


def test_adaptive_frames_are_on_both_sides_of_a_cut():
    video = np.concatenate([movie(20) // 4, 255 - movie(20) // 4])
    assert frame_change(video).argmax() == 20
    numbers = VideoPreprocessor(view=SMALL, sampling="adaptive").choose(video, 6)
    assert {19, 20} <= set(numbers.tolist())


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
        torch.zeros(2, 8, 8, 3),
    ],
)
def test_other_arrays_are_refused(wrong):
    with pytest.raises(ConfigError, match="video must be a uint8 array") as found:
        VideoPreprocessor()(wrong)
    assert found.value.reason == "video_array"


def test_other_settings_are_refused():
    with pytest.raises(ConfigError, match="out of range"):
        VideoPreprocessor(sampling="some")
    with pytest.raises(ConfigError, match="out of range"):
        VideoPreprocessor()(movie(2), max_frames=0)
    with pytest.raises(ConfigError, match="fps a number above 0"):
        VideoPreprocessor()(movie(2), fps=0)
