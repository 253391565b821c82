"""LeRobot folders as datasets: frames, values, windows, masks, statistics, and what is refused."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from preprocess.datasets import LeRobot, get_dataset
from preprocess.datasets import episodes as episodes_module
from preprocess.episodes import WindowPolicy
from preprocess.media import VideoDecoder, VideoPolicy
from shardspec.actions import normalize, value_bins, value_statistics
from shardspec.errors import ConfigError, SampleError, SourceError
from shardspec.video.reader import VideoReader
from tests.lerobot_folders import (
    CAMERAS,
    FPS,
    WRITERS,
    episodes_of,
    write_v2,
    write_v3,
    write_video,
)

LENGTHS = (7, 4, 9)


def windows(policy, **attributes):
    """Makes a dataset's class with another policy."""
    return type("Own", (LeRobot,), {"window": policy, **attributes})


@pytest.fixture(scope="module")
def decoder():
    with VideoDecoder(VideoPolicy()) as decoder:
        yield decoder


@pytest.fixture(autouse=True)
def one_decoder(decoder, monkeypatch):
    """Starts one process for all datasets of these tests."""
    monkeypatch.setattr(episodes_module, "VideoDecoder", lambda policy: decoder)  # noqa: ARG005


@pytest.fixture(scope="module")
def episodes():
    return episodes_of(LENGTHS)


@pytest.fixture(scope="module", params=WRITERS)
def folder(request, tmp_path_factory, episodes):
    return WRITERS[request.param](tmp_path_factory.mktemp("lerobot") / "x", episodes)


def reference_frames(folder, episodes):
    """Decodes all videos of a folder whole: {(camera, episode, step): pixels}.

    That this reader's pixels are those of the program `ffmpeg` is shown by its own tests.
    """
    found = {}
    for name in CAMERAS:
        paths = sorted(p for p in folder.rglob("*.mp4") if name in p.parts)
        decoded = []
        for path in paths:
            with VideoReader(path) as reader:
                decoded += reader.read(list(range(len(reader.times_N))))
        steps = [(e, t) for e, one in enumerate(episodes) for t in range(len(one.actions))]
        found |= {(name, *step): pixels for step, pixels in zip(steps, decoded, strict=True)}
    return found


def test_folders_that_are_links_are_read_and_compared(folder, tmp_path):
    linked = tmp_path / "x"
    shutil.copytree(folder, linked)
    for i, place in enumerate(sorted(linked.rglob("chunk-000"))):
        place.rename(tmp_path / f"disk-{i}")
        place.symlink_to(tmp_path / f"disk-{i}")

    def names(root):
        found = LeRobot.source_files(str(root), "train", unmatched="refuse")
        return {str(path.relative_to(root)) for path in found}

    assert len(windows(WindowPolicy())(source=str(linked))) == sum(LENGTHS)
    assert names(linked) == names(folder)


def test_frames_and_values_are_those_of_the_folder(folder, episodes):
    """Every camera's frame of every step: written as a colour, compared with a whole decode."""
    policy = WindowPolicy(history=3, history_hz=5.0, chunk=4, stride=2)
    dataset = windows(policy)(source=str(folder))
    reference = reference_frames(folder, episodes)
    statistics = value_statistics(np.concatenate([e.actions for e in episodes]))
    item = 0
    for e, episode in enumerate(episodes):
        length = len(episode.actions)
        for t in range(0, length, 2):
            example = dataset[item]
            item += 1
            metadata, (message,) = example["metadata"], example["message_list"]
            assert (metadata["episode"], metadata["step"]) == (e, t)
            assert metadata["time_s"] == float(np.float32(t / FPS))
            shown = [max(t - back, 0) for back in (4, 2, 0)]
            assert metadata["history_mask"] == [t >= back for back in (4, 2, 0)]
            assert metadata["views"] == [*CAMERAS] * 3
            wanted = [(camera, e, row) for row in shown for camera in CAMERAS]
            for image, place in zip(example["image"], wanted, strict=True):
                pixels = image.read()
                assert np.array_equal(pixels, reference[place])
                drawn = episodes[place[1]].frames[place[0]][place[2]]
                assert np.abs(pixels.astype(int) - drawn).max() <= 5
            rows = [min(t + i, length - 1) for i in range(4)]
            mask = [t + i < length for i in range(4)]
            actions = np.array(metadata["actions"], np.float32)
            assert actions.tobytes() == episode.actions[rows].tobytes()
            assert metadata["action_mask"] == mask
            state = np.array(metadata["state"], np.float32)
            assert state.tobytes() == episode.state[t].tobytes()
            assert message["instruction"] == episode.task
            bins = value_bins(normalize(episode.actions[t : t + 4], statistics))
            assert np.array_equal(value_bins(np.array(message["action"])), bins)
    assert item == len(dataset)
    described = dataset.rows.kind["robot"]
    assert described["statistics"]["actions"] == statistics.to_dict()
    assert described["action_names"] == described["state_names"] == ["x", "y", "gripper"]
    assert (described["robot"], described["fps"]) == ("so100", 10.0)


def test_a_folder_that_lerobot_wrote_is_read_as_lerobot_reads_it():
    """lerobot 0.6.1 wrote it, AV1 videos and all, and gave the values that are beside it.

    Its pixels are means of each channel, of pictures of one colour.
    """
    folder = Path(__file__).parents[2] / "golden/lerobot-v3.0"
    dataset = windows(WindowPolicy(chunk=1))(source=str(folder))
    wanted = json.loads((folder / "as-lerobot-reads-it.json").read_text())
    assert len(dataset) == len(wanted) == 8
    for i, want in enumerate(wanted):
        example = dataset[i]
        for image, camera in zip(example["image"], ("front", "wrist"), strict=True):
            assert np.allclose(image.read().mean(axis=(0, 1)), want[camera], atol=1)
        assert example["metadata"]["actions"] == [want["action"]]
        assert example["message_list"][0]["instruction"] == f"Task {int(i >= 5)}."


def test_windows_out_of_order_have_the_same_frames(folder):
    dataset = windows(WindowPolicy(history=2, stride=1))(source=str(folder))
    in_order = [[image.read() for image in dataset[i]["image"]] for i in range(len(dataset))]
    again = windows(WindowPolicy(history=2, stride=1))(source=str(folder))
    for i in np.random.RandomState(0).permutation(len(again))[:8].tolist():
        for image, want in zip(again[i]["image"], in_order[i], strict=True):
            assert np.array_equal(image.read(), want)


def test_segments_have_the_frames_of_their_windows_once(folder):
    policies = [WindowPolicy(history=3, history_hz=5.0, segment=segment) for segment in (1, 3)]
    single, joined = (windows(policy)(source=str(folder)) for policy in policies)
    found = {}
    for i in (*range(len(joined)), 0):  # the last one out of order
        example = joined[i]
        places = [(image.camera, image.row) for image in example["image"]]
        assert len({*places}) == len(places)
        images = [image.read() for image in example["image"]]
        for message, shown in zip(example["message_list"], example["windows"], strict=True):
            found[message["episode"], message["step"]] = [images[i] for i in shown]
    assert len(found) == len(single)
    for i in range(len(single)):
        example = single[i]
        got = found[example["metadata"]["episode"], example["metadata"]["step"]]
        for image, pixels in zip(example["image"], got, strict=True):
            assert np.array_equal(image.read(), pixels)


def test_both_versions_give_the_same_samples(tmp_path, episodes):
    first, second = (
        windows(WindowPolicy(history=2, chunk=3))(source=str(write(tmp_path / name, episodes)))
        for name, write in WRITERS.items()
    )
    assert len(first) == len(second) == sum(LENGTHS)
    for i in range(len(first)):
        a, b = first[i], second[i]
        assert (a["message_list"], a["metadata"]) == (b["message_list"], b["metadata"])
    assert first.rows.kind["robot"] == second.rows.kind["robot"]


def test_zeros_may_fill_a_chunk(folder, episodes):
    dataset = windows(WindowPolicy(chunk=3, padding="zero"))(source=str(folder))
    last = dataset[LENGTHS[0] - 1]["metadata"]
    assert last["actions"] == [episodes[0].actions[-1].tolist(), [0.0] * 3, [0.0] * 3]
    assert last["action_mask"] == [True, False, False]


def test_cameras_may_be_chosen_and_dimensions_kept(folder, episodes):
    policy = WindowPolicy(cameras=(CAMERAS[1],), kept=("gripper",), chunk=1)
    dataset = windows(policy)(source=str(folder))
    example = dataset[0]
    assert example["metadata"]["views"] == [CAMERAS[1]]
    bins = value_bins(np.array(example["message_list"][0]["action"]))
    assert bins[0, 2] == value_bins(episodes[0].actions[0, 2])
    assert dataset.rows.kind["robot"]["kept"] == [2]


def test_kept_dimensions_that_texts_cannot_write_are_named(folder, episodes):
    dataset = windows(WindowPolicy(kept=("gripper",)))(source=str(folder))
    values = np.concatenate([each.actions for each in episodes])[:, 2]
    told = f"kept: gripper is from {values.min():g} to {values.max():g}; texts end at -1 and 1"
    assert dataset.notes() == [told]
    assert windows(WindowPolicy())(source=str(folder)).notes() == []


def test_splits_are_those_of_the_folder_or_of_whole_episodes(tmp_path, episodes):
    own = write_v2(tmp_path / "own", episodes, splits={"train": "0:2", "val": "2:3"})
    train, validation = (
        get_dataset("lerobot", s, source=str(own)) for s in ("train", "validation")
    )
    assert (len(train), len(validation)) == (11, 9)
    statistics = value_statistics(np.concatenate([e.actions for e in episodes[:2]])).to_dict()
    for dataset in (train, validation):
        assert dataset.rows.kind["robot"]["statistics"]["actions"] == statistics
    with pytest.raises(SourceError) as caught:
        get_dataset("lerobot", "test", source=str(own))
    assert caught.value.reason == "source_split"

    many = write_v2(tmp_path / "many", episodes_of([2] * 12))
    kind = windows(WindowPolicy(), validation_share=0.4)
    found = [
        {d[i]["metadata"]["episode"] for i in range(len(d))}
        for d in (kind(split, source=str(many)) for split in ("train", "validation"))
    ]
    assert found[0] | found[1] == set(range(12))
    assert not found[0] & found[1]
    assert all(found)


# --- bad input


def refused(dataset):
    """Reads all windows and frames: the reason of each window, "" for a good one."""
    reasons = []
    for i in range(len(dataset)):
        try:
            for image in dataset[i]["image"]:
                image.read()
        except SampleError as error:
            reasons.append(error.reason)
        else:
            reasons.append("")
    return reasons


def change_steps(path, **columns):
    table = pq.read_table(path)
    for name, values in columns.items():
        number = table.schema.get_field_index(name)
        table = table.set_column(number, name, pa.array(values, table[name].type))
    pq.write_table(table, path)


@pytest.fixture
def broken(tmp_path, episodes):
    """A v2.1 folder to break, and the paths of its second episode."""
    folder = write_v2(tmp_path / "x", episodes)
    data = folder / "data/chunk-000/episode_000001.parquet"
    video = folder / "videos/chunk-000" / CAMERAS[1] / "episode_000001.mp4"
    return folder, data, video


GOOD = [""]


def reasons_of(folder, **policy):
    return refused(windows(WindowPolicy(chunk=2, **policy))(source=str(folder)))


def test_values_that_are_not_finite_cost_their_windows_only(broken, episodes):
    folder, data, _ = broken
    actions = episodes[1].actions.copy()
    actions[2, 1] = np.nan
    change_steps(data, action=actions.tolist())
    want = GOOD * 7 + ["", "robot_values", "robot_values", ""] + GOOD * 9
    assert reasons_of(folder) == want


def test_vectors_of_another_length_cost_their_episode(broken, episodes):
    folder, data, _ = broken
    actions = episodes[1].actions.tolist()
    actions[3] = actions[3][:2]
    change_steps(data, action=actions)
    assert reasons_of(folder) == GOOD * 7 + ["robot_values"] * 4 + GOOD * 9


@pytest.mark.parametrize("harm", ["missing", "cut", "cut_end", "short", "garbage"])
def test_broken_videos_cost_windows_by_name(broken, episodes, harm):
    folder, _, video = broken
    frames = episodes[1].frames[CAMERAS[1]]
    if harm == "missing":
        video.unlink()
        want = ["robot_frame"] * 4
    elif harm == "short":  # this camera stopped before the other one
        write_video(video, frames[:2])
        want = ["", "", "robot_frame", "robot_frame"]
    elif harm == "cut_end":  # its index is at the front, and names frames that are not there
        noise = np.random.RandomState(0).randint(0, 255, (4, 48, 32, 3)).astype(np.uint8)
        write_video(video, list(noise), index_first=True)
        video.write_bytes(video.read_bytes()[: -video.stat().st_size // 3])
        want = ["", "", "robot_frame", "robot_frame"]
    elif harm == "garbage":
        video.write_bytes(b"not a video" * 99)
        want = ["video_open"] * 4
    else:
        video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
        want = ["video_open"] * 4
    assert reasons_of(folder) == GOOD * 7 + want + GOOD * 9


def test_a_camera_without_an_episode_costs_its_windows(tmp_path, episodes):
    folder = write_v3(tmp_path / "x", episodes)
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1][f"videos/{CAMERAS[0]}/file_index"] = None
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert reasons_of(folder) == GOOD * 7 + ["robot_frame"] * 4 + GOOD * 9
    assert reasons_of(folder, cameras=(CAMERAS[1],)) == GOOD * 20


def test_a_camera_that_lacks_frames_does_not_show_the_next_episode(tmp_path):
    """In v3.0 both are in one video."""
    episodes = episodes_of(LENGTHS)
    episodes[0].frames[CAMERAS[0]].pop()
    lost = reasons_of(write_v3(tmp_path / "x", episodes))
    assert lost == GOOD * 6 + ["robot_frame"] + GOOD * 13


def test_drift_within_the_tolerance_is_taken_and_beyond_it_refused(tmp_path):
    episodes = episodes_of([4, 4])
    episodes[1].times = np.arange(4) / FPS + [0.0, 0.0, 0.004, 0.0]
    folder = write_v3(tmp_path / "x", episodes)
    # With two actions a window has the late step from the one before it on.
    assert reasons_of(folder) == GOOD * 5 + ["robot_time"] * 2 + GOOD
    assert reasons_of(folder, tolerance_s=0.005) == GOOD * 8


def test_an_episode_that_points_elsewhere_in_a_video_is_refused(tmp_path):
    folder = write_v3(tmp_path / "x", episodes_of([4, 4]))
    path = folder / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1][f"videos/{CAMERAS[0]}/from_timestamp"] += 0.03
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert reasons_of(folder) == GOOD * 4 + ["robot_frame"] * 4


@pytest.mark.parametrize("harm", ["missing", "garbage", "steps", "task", "text", "ragged"])
def test_broken_steps_cost_their_episode(broken, harm):
    folder, data, _ = broken
    reason = "robot_episode"
    if harm == "missing":
        data.unlink()
    elif harm == "garbage":
        data.write_bytes(b"PAR1" * 9)
    elif harm == "steps":
        change_steps(data, frame_index=[0, 1, 1, 3])
    elif harm in ("text", "ragged"):
        table = pq.read_table(data)
        values = pa.array(["a"] * 4 if harm == "text" else [[[1.0], [1.0, 2.0]]] * 4)
        at = table.schema.get_field_index("action")
        pq.write_table(table.set_column(at, "action", values), data)
        reason = "robot_values"
    else:
        change_steps(data, task_index=[9] * 4)
        reason = "robot_task"
    assert reasons_of(folder) == GOOD * 7 + [reason] * 4 + GOOD * 9


def test_an_absurd_length_costs_one_window_and_no_time(broken):
    folder, _, _ = broken
    path = folder / "meta" / "episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["length"] = 10**12
    path.write_text("\n".join(map(json.dumps, rows)))
    assert reasons_of(folder) == GOOD * 7 + ["robot_episode"] + GOOD * 9


def test_episodes_that_failed_may_be_left_out(broken):
    folder, _, _ = broken
    for e, length in enumerate(LENGTHS):
        path = folder / f"data/chunk-000/episode_{e:06d}.parquet"
        table = pq.read_table(path)
        flags = pa.array([False] * (length - 1) + [e != 1] if e else [None] * length, pa.bool_())
        pq.write_table(table.append_column("next.success", flags), path)
    assert reasons_of(folder, only_success=True) == GOOD * 7 + ["robot_failed"] * 4 + GOOD * 9
    dataset = get_dataset("lerobot", source=str(folder))
    found = [dataset[i]["metadata"].get("success") for i in (0, 7, 11)]
    assert found == [None, False, True]  # the first one does not say it


@pytest.mark.parametrize(
    "change",
    [
        {"codebase_version": "v1.6"},
        {"fps": 0},
        {"features": {}},
        {"data_path": "../../{episode_index}"},
        {"splits": {"train": "all"}},
    ],
)
def test_metadata_that_cannot_be_used_are_refused(broken, change):
    path = broken[0] / "meta/info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SourceError) as caught:
        get_dataset("lerobot", source=str(broken[0]))
    assert caught.value.reason == "robot_source"


def test_sources_without_any_episode_are_refused(broken):
    shutil.rmtree(broken[0] / "data")
    with pytest.raises(SourceError) as caught:
        get_dataset("lerobot", source=str(broken[0]))
    assert caught.value.reason == "robot_source"
    for source in ("hub", str(broken[0] / "nothing")):
        with pytest.raises(SourceError) as caught:
            get_dataset("lerobot", source=source)
        assert caught.value.reason == "source_missing"


@pytest.mark.parametrize(
    "make",
    [
        lambda: WindowPolicy(history=0),
        lambda: WindowPolicy(padding="last"),
        lambda: WindowPolicy(history_hz="5"),
        lambda: WindowPolicy(kept="gripper"),  # a comma is missing
        lambda: WindowPolicy(cameras="front"),
        lambda: WindowPolicy(tolerance_s=0),
        lambda: WindowPolicy(history_hz=3.0).step(10.0),
        lambda: windows(WindowPolicy(cameras=("top",)))(source="sample"),
    ],
)
def test_policies_that_mean_nothing_are_refused(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.reason == "window_policy"


# --- generated episodes


def test_actions_of_the_simulated_arm_are_true_of_its_pictures():
    dataset = windows(WindowPolicy(chunk=1, cameras=("overhead",)))(source="sample", limit=48)
    moved = 0
    for i in range(47):
        now, after = dataset[i], dataset[i + 1]
        if after["metadata"]["step"] == 0:
            continue
        state, then = (np.array(one["metadata"]["state"]) for one in (now, after))
        action = np.array(now["metadata"]["actions"][0])
        assert np.allclose(state[:2] + action[:2], then[:2], atol=1e-6)
        assert then[2] == action[2]
        seen = []
        for one in (now, after):
            pixels = one["image"][0].read().astype(int)
            color = (20, 30, 60) if one["metadata"]["state"][2] else (40, 90, 200)
            rows, columns = np.nonzero((pixels == color).all(axis=2))
            seen.append(np.array([columns.mean(), rows.mean()]))
        assert np.abs(seen[1] - seen[0] - 160 * action[:2]).max() <= 1.5
        moved += bool(np.abs(action[:2]).max() > 0.02)
    assert moved > 10


def test_images_may_be_in_the_steps_and_tasks_in_the_index_of_pandas(tmp_path, episodes):
    """As lerobot writes them: structs of PNG files, and a table whose index is the text."""
    folder = write_v3(tmp_path / "x", episodes)
    path = folder / "meta/info.json"
    info = json.loads(path.read_text())
    info["features"][CAMERAS[0]]["dtype"] = "image"
    info["features"][CAMERAS[1]]["info"] = {"video.is_depth_map": True}
    path.write_text(json.dumps(info))
    table = pa.table({"task_index": [0, 1], "__index_level_0__": ["Task 0.", "Task 1."]})
    pq.write_table(table, folder / "meta/tasks.parquet")
    for number, part in ((0, (0, 1)), (1, (2,))):
        data = folder / f"data/chunk-000/file-00{number}.parquet"
        files = []
        for e in part:
            for frame in episodes[e].frames[CAMERAS[0]]:
                stream = io.BytesIO()
                Image.fromarray(frame).save(stream, "PNG")
                files.append({"bytes": stream.getvalue(), "path": None})
        if number:
            files[2]["bytes"] = None
        table = pq.read_table(data)
        pq.write_table(table.append_column(CAMERAS[0], pa.array(files)), data)
    dataset = get_dataset("lerobot", source=str(folder))
    assert list(dataset.rows.kind["robot"]["cameras"]) == [CAMERAS[0]]
    assert refused(dataset) == GOOD * 13 + ["robot_frame"] + GOOD * 6
    (image,) = dataset[8]["image"]
    with Image.open(io.BytesIO(image.read())) as opened:
        assert np.array_equal(np.asarray(opened), episodes[1].frames[CAMERAS[0]][1])
    assert dataset[8]["message_list"][0]["instruction"] == "Task 1."
