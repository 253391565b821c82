"""Points, counts and tracks with the times of a video."""

import numpy as np
import pytest

from preprocess.text import DataFormatter, TextPolicy, VideoFacts, chat_frame
from preprocess.text.styles import STYLES
from shardspec.errors import SampleError

PAPER = (
    '<tracks coords="0.0 1 635 522;0.5 1 606 490 2 511 124;1.0 2 515 164;1.5 2 520 168">'
    "player</tracks>"
)
"""The example of the paper of Molmo 2, with another text."""


def seen(time_s, *objects):
    points = [{"id": name, "point": [x, y], "occluded": hidden} for name, x, y, hidden in objects]
    return {"time": time_s, "points": points}


TRACK = {
    "label": "Player",
    "point_scale": 1000,
    "frame_trajectories": [
        seen(0.0, ("b", 635, 522, False)),
        seen(0.25, ("b", 620, 500, False)),
        seen(0.5, ("b", 606, 490, False), ("a", 511, 124, False)),
        seen(1.0, ("b", 600, 480, True), ("a", 515, 164, False)),
        seen(1.5, ("a", 520, 168, False)),
    ],
}
FACTS = VideoFacts(frame_times_s=[0.0, 0.504, 1.0, 1.5], clip=None, size=(1000, 1000))


def drawn(style, message, facts=FACTS, **policy):
    policy = TextPolicy(**{"system_prompt": "none", "num_variants": 40, **policy})
    formatter = DataFormatter(policy=policy, frame=chat_frame("none", None))
    (branch,) = formatter(
        {"message_list": [{"style": style, **message}]}, key="k", videos=[facts] if facts else []
    )
    (turn,) = branch.turns
    return {(variant.prompt, variant.response.strip()) for variant in turn}


def test_tracks_are_those_of_the_stored_frames_as_the_paper_writes_them():
    assert drawn("video_point_track_per_frame", TRACK) == {("player", PAPER)}


def test_tracks_follow_the_rate_that_is_wanted():
    found = drawn("video_point_track_per_frame", {**TRACK, "sampling_fps": 1})
    answer = '<tracks coords="0.0 1 635 522;1.0 2 515 164">player</tracks>'
    assert {response for _, response in found} == {answer}
    prompts = {prompt for prompt, _ in found}
    assert "player" in prompts  # half of them leave the rate out
    assert len(prompts) > 2
    assert all(" 1 " in prompt for prompt in prompts - {"player"})


def test_first_and_last_frames_of_each_object():
    answer = '<tracks coords="0.0 1 635 522;0.5 1 606 490 2 511 124;1.5 2 520 168">player</tracks>'
    assert drawn("video_point_ground_start_end", TRACK) == {("player", answer)}


def test_single_point_is_followed_from_where_it_is_given():
    frames = [seen(t, (0, 100 * t, 50, False)) for t in (0.0, 1.0, 1.5)]
    found = drawn("video_single_point_track_per_frame", {**TRACK, "frame_trajectories": frames})
    steps = ["0.0 1 000 050", "1.0 1 100 050", "1.5 1 150 050"]
    assert found == {
        (
            f'<points coords="{steps[i]}">player</points>',
            f'<tracks coords="{";".join(steps[i:])}">player</tracks>',
        )
        for i in range(3)
    }


@pytest.mark.parametrize(
    "style", ["track_per_frame", "ground_start_end", "single_point_track_per_frame"]
)
def test_nothing_to_follow_is_said_in_words(style):
    style = next(name for name in STYLES if name.endswith(style))
    late = VideoFacts(frame_times_s=[7.0], clip=None, size=(10, 10))
    assert {response for _, response in drawn(style, TRACK, late)} == {"No tracks available."}


POINTS = {
    "label": "Cups",
    "timestamps": [3.26, 2.0, 3.0],
    "points": [[[20, 50]], [[90, 20], [10, 30]], [[5, 5]]],
    "point_scale": 100,
}
TAG = '<points coords="2.0 1 100 300 2 900 200;3.0 3 050 050 4 200 500">cups</points>'


@pytest.mark.parametrize(
    "style, answer",
    [
        ("video_point", TAG),
        ("video_point_count", f"Counting the {TAG} shows a total of 4."),
        ("video_count_point", f"There are 4 {TAG}."),
        ("video_count", "4"),
    ],
)
def test_points_have_the_times_of_the_grid(style, answer):
    assert drawn(style, POINTS) == {("cups", answer)}
    assert drawn(style, {**POINTS, "timestamps": [], "points": []}) == {("cups", "There are none.")}


def test_times_count_from_the_beginning_of_the_clip():
    facts = VideoFacts(frame_times_s=[0.0, 0.5], clip=(1.0, 3.0), size=(200, 50))
    message = {**POINTS, "points": [[[1, 1]], [[100, 10]], [[1, 1]]]}
    del message["point_scale"]
    tag = '<points coords="1.0 1 500 200">cups</points>'
    assert drawn("video_point", message, facts) == {("cups", tag)}
    track = '<tracks coords="0.0 1 515 164;0.5 1 520 168">player</tracks>'
    assert drawn("video_point_track_per_frame", TRACK, facts) == {("player", track)}
    sized = {**message, "point_size": [100, 100]}
    assert "1000 100" in next(iter(drawn("video_point", sized, facts)))[1]


@pytest.mark.parametrize(
    "style, wrong",
    [
        ("video_point", {"timestamps": [1.0]}),
        ("video_point", {"timestamps": ["a", 1, 2]}),
        ("video_point", {"timestamps": None}),
        ("video_point", {"fps": 0}),
        ("video_point", {"point_scale": 0}),
        ("video_count", {"points": 3}),
        ("video_point_track_per_frame", {"frame_trajectories": [1]}),
        ("video_point_track_per_frame", {"frame_trajectories": [{"time": None}]}),
        ("video_point_track_per_frame", {"frame_trajectories": [seen(0.0) | {"points": [1]}]}),
        ("video_point_track_per_frame", {"sampling_fps": -1}),
    ],
)
def test_fields_of_another_form_are_named(style, wrong):
    message = TRACK if "track" in style else POINTS
    with pytest.raises(SampleError) as caught:
        drawn(style, {**message, **wrong})
    assert caught.value.reason in ("message_fields", "points_shape")


def test_templates_of_images_speak_of_a_video():
    prompts = {
        prompt
        for style in ("video_point", "video_point_count", "video_long_caption")
        for prompt, _ in drawn(
            style, {**POINTS, "text": "A cup."}, prompt_templates="uber_model_v2", num_variants=200
        )
    }
    assert len(prompts) > 20
    assert any("video" in prompt for prompt in prompts)
    assert not any(word in prompt for prompt in prompts for word in ("image", "picture", "photo"))


def test_same_draws_give_the_same_start():
    message = {"style": "video_single_point_track_per_frame", **TRACK}
    draw = DataFormatter().draw
    assert draw(message, np.random.RandomState(3)) == draw(message, np.random.RandomState(3))
