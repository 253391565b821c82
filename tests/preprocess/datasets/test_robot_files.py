"""HDF5 files and RLDS folders: the samples of LeRobot, and what damage costs."""

import gc
import gzip
import io
import json
import struct
import zlib
from contextlib import suppress

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocess.datasets import EpisodeFiles, LeRobot, RobotDataset
from preprocess.datasets import episodes as episodes_module
from preprocess.datasets.episodes import EPISODES_HELD
from preprocess.episodes import EpisodeFields, EpisodeFrames, WindowPolicy, hdf5
from preprocess.episodes.tfrecord import masked_crc, parse_example
from preprocess.media import VideoDecoder, VideoPolicy
from shardspec.errors import ConfigError, SampleError, SourceError
from tests.lerobot_folders import FPS, WrittenEpisode, episodes_of, write_v2
from tests.robot_files import (
    example_bytes,
    record_bytes,
    write_aloha,
    write_rlds,
    write_robomimic,
)

LENGTHS = (7, 4, 9)
NAMES = ("x", "y", "gripper")
STATED = {"fps": FPS, "action_names": NAMES, "state_names": NAMES}
STATE = {"state": ("obs/state",)}
LAYOUTS = {
    "robomimic": (write_robomimic, STATE),
    "aloha": (write_aloha, {"task_field": "task"}),
    "aloha files": (lambda f, e: write_aloha(f, e, form="PNG"), {"task_field": "task"}),
    "rlds": (write_rlds, {"last_step": "keep"}),
    "rlds by definition": (lambda f, e: write_rlds(f, e, extra_step=True), {}),
}


NOT_READ = {"robomimic": {"dones", "obs/depth"}, "rlds": {"observation/depth"}}


def files(source, policy=None, fields=None, **attributes):
    """Opens files as a dataset; `fields` are besides those that all layouts share."""
    stated = EpisodeFields(**{**STATED, **(fields or {})})
    attributes |= {"window": policy or WindowPolicy(chunk=2), "fields": stated}
    split = attributes.pop("split", "train")
    return type("Own", (EpisodeFiles,), attributes)(split, source=str(source))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Episodes whose frames are those of a LeRobot folder as decoded, and samples of that."""
    drawn = episodes_of(LENGTHS)
    folder = write_v2(tmp_path_factory.mktemp("v2") / "x", drawn)
    policy = WindowPolicy(history=2, chunk=3, kept=("gripper",))
    with pytest.MonkeyPatch.context() as patch, VideoDecoder(VideoPolicy()) as decoder:
        patch.setattr(episodes_module, "VideoDecoder", lambda policy: decoder)
        dataset = type("Own", (LeRobot,), {"window": policy})(source=str(folder))
        samples = [comparable(dataset[i]) for i in range(len(dataset))]
        described = dataset.rows.kind["robot"]
    found = [
        WrittenEpisode(e.actions, e.state, e.task, {name: [] for name in e.frames}) for e in drawn
    ]
    for sample in samples:
        for name, pixels in list(zip(sample["metadata"]["views"], sample["images"], strict=True))[
            2:
        ]:
            found[sample["metadata"]["episode"]].frames[name].append(pixels)
    return found, policy, samples, described


def comparable(example):
    """Reads an example whole. LeRobot keeps times as float32."""
    metadata = dict(example["metadata"])
    metadata["time_s"] = round(metadata["time_s"], 6)
    images = [pixels_of(image.read()) for image in example["image"]]
    return {"messages": example["message_list"], "metadata": metadata, "images": images}


def pixels_of(image):
    if isinstance(image, bytes):
        with Image.open(io.BytesIO(image)) as opened:
            return np.asarray(opened.convert("RGB"))
    return image


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_episode_gives_the_same_samples_in_all_layouts(shown, tmp_path, layout):
    episodes, policy, samples, described = shown
    write, fields = LAYOUTS[layout]
    dataset = files(write(tmp_path / "x", episodes), policy, fields)
    assert len(dataset) == len(samples) == sum(LENGTHS)
    for i, want in enumerate(samples):
        got = comparable(dataset[i])
        for a, b in zip(got.pop("images"), want["images"], strict=True):
            assert np.array_equal(a, b)
        assert got == {name: value for name, value in want.items() if name != "images"}
    told = dict(dataset.rows.kind["robot"])
    assert told.pop("not_read", {}).keys() == NOT_READ.get(layout.partition(" ")[0], set())
    assert {**told, "robot": described["robot"]} == described
    assert dataset.describe()["fields"]["fps"] == FPS


def test_splits_are_those_of_the_source(tmp_path):
    episodes = episodes_of(LENGTHS)
    masks = {"train": [2, 0], "valid": [1]}
    source = write_robomimic(tmp_path / "a", episodes, masks=masks)
    sizes = [len(files(source, fields=STATE, split=name)) for name in ("train", "validation")]
    assert sizes == [7 + 9, 4]
    folder = write_rlds(tmp_path / "b", episodes, splits={"val": [1], "train": [0, 2]})
    sizes = [len(files(folder, split=name)) for name in ("train", "validation")]
    assert sizes == [7 + 9 - 2, 4 - 1]
    with pytest.raises(SourceError) as caught:
        files(folder, split="test")
    assert caught.value.reason == "source_split"


def test_demonstrations_are_ordered_by_their_numbers(tmp_path):
    dataset = files(write_robomimic(tmp_path, episodes_of([1] * 12)), fields=STATE)
    assert [dataset[i]["metadata"]["episode"] for i in range(12)] == [*range(12)]


def test_pictures_of_recorders_with_other_channels_are_turned(tmp_path):
    episodes = episodes_of([2])
    turned = [
        WrittenEpisode(e.actions, e.state, e.task, {n: [f[..., ::-1] for f in fs]})
        for e in episodes
        for n, fs in e.frames.items()
    ][:1]
    (name,) = turned[0].frames
    for form in (None, "JPEG"):
        folder = write_aloha(tmp_path / str(form), turned, form=form)
        dataset = files(folder, fields={"channels": "bgr", "task_field": "task"})
        pixels = pixels_of(dataset[1]["image"][0].read()).astype(int)
        assert np.abs(pixels - episodes[0].frames[name][1]).max() <= (4 if form else 0)
    folder = write_rlds(tmp_path / "rlds", turned, shards=1)
    dataset = files(folder, fields={"channels": "bgr", **RLDS})
    assert np.array_equal(dataset[1]["image"][0].read(), episodes[0].frames[name][1])


ODD = {
    "opaque": (np.full((2, 32, 48, 4), 255, np.uint8), None, ""),
    "transparent": (np.full((2, 32, 48, 4), 254, np.uint8), None, "robot_frame"),
    "float": (np.zeros((2, 32, 48, 3), np.float32), "float32 [32, 48, 3], which looks", ""),
    "depth": (np.zeros((2, 32, 48), np.uint16), "uint16 [32, 48], which looks", ""),
    "grey": (np.zeros((2, 32, 48, 1), np.uint8), "uint8 [32, 48, 1], which looks", ""),
    "channels first": (np.zeros((2, 3, 32, 48), np.uint8), "uint8 [3, 32, 48], which looks", ""),
    "pairs": (np.zeros((2, 32, 48, 2), np.int8), "int8 [32, 48, 2], which looks", ""),
    "vector": (np.zeros((2, 7)), "float64 [7]", ""),
}


@pytest.mark.parametrize("odd", ODD)
def test_whatever_looks_like_a_camera_is_read_or_named(tmp_path, odd):
    value, text, reason = ODD[odd]
    source = write_robomimic(tmp_path, episodes_of([2, 3]))
    with h5py.File(source, "a") as file:
        file["data/demo_0/obs/odd"] = value
        file["data/demo_1/obs/linked"] = h5py.SoftLink("/data/demo_1/obs/depth")
    dataset = files(source, fields=STATE)
    told = dataset.rows.kind["robot"]["not_read"]
    notes = "\n".join(dataset.notes())
    assert told["obs/linked"] == "data that are not in the file itself (in 1 of 2 episodes)"
    if text is None:
        assert "obs/odd" not in told
        assert "odd" in dataset.rows.kind["robot"]["cameras"]
        assert reasons(dataset) == [reason, reason, *["robot_frame"] * 3]
        return
    assert told["obs/odd"].startswith(text)
    assert f"not read: obs/odd, {text}" in notes
    with pytest.raises(ConfigError, match="not obs/odd: ") as caught:
        len(files(source, WindowPolicy(cameras=("odd",)), fields=STATE))
    assert caught.value.reason == "window_policy"


def test_a_list_of_episodes_that_names_others_is_counted(tmp_path):
    source = write_robomimic(tmp_path, episodes_of([2, 3]), masks={"train": [0, 7], "valid": [1]})
    assert reasons(files(source, fields=STATE)) == ["", "", "robot_episode"]
    with pytest.raises(SampleError, match="mask/train names demo_7"):
        files(source, fields=STATE)[2]
    assert len(files(source, fields=STATE, split="validation")) == 3


def test_an_episode_is_in_one_split(tmp_path):
    episodes = episodes_of([2, 3, 1])
    source = write_robomimic(
        tmp_path / "a", episodes, masks={"valid": [1], "test": [2], "few": [0]}
    )
    parts = [files(source, fields=STATE, split=name) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [2, 3, 1]
    assert len(files(source, fields=STATE, split="few")) == 2  # a part of another
    source = write_robomimic(tmp_path / "b", episodes, masks={"train": [0, 1], "valid": [1]})
    folder = write_v2(tmp_path / "v2", episodes, splits={"train": "0:2", "val": "1:3"})
    for split in ("train", "validation"):
        for open_it in (
            lambda split=split: files(source, fields=STATE, split=split),
            lambda split=split: LeRobot(split, source=str(folder)),
        ):
            with pytest.raises(SourceError, match="1 episodes are in two splits") as caught:
                len(open_it())
            assert caught.value.reason == "source_split"


def test_features_of_folders_that_no_sample_has_are_named(tmp_path):
    folder = write_v2(tmp_path / "v2", episodes_of([2]))
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    features = {
        "observation.images.depth": {
            "dtype": "video",
            "shape": [8, 8, 1],
            "info": {"is_depth_map": True},
        },
        "observation.force": {"dtype": "float32", "shape": [6]},
        "observation.touch": {"dtype": "float32", "shape": [16, 16]},
    }
    path.write_text(json.dumps({**info, "features": {**info["features"], **features}}))
    attributes = {"window": WindowPolicy(cameras=("observation.images.wrist",))}
    told = type("Own", (LeRobot,), attributes)("train", source=str(folder)).rows.kind["robot"]
    assert {name: text[:20] for name, text in told["not_read"].items()} == {
        "observation.images.front": "a camera that `camer",
        "observation.images.depth": "video [8, 8, 1], pic",
        "observation.touch": "float32 [16, 16], wh",
        "observation.force": "float32 [6]",
    }


def test_fields_of_records_that_no_sample_has_are_named(tmp_path):
    folder = write_rlds(tmp_path, episodes_of([2]))
    path = folder / "features.json"
    document = json.loads(path.read_text())
    steps = document["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]
    tensor = {"shape": {"dimensions": ["4"]}, "dtype": "float32", "encoding": "none"}
    pixels = {"shape": {"dimensions": ["32", "48", "3"]}, "dtype": "float32", "encoding": "none"}
    steps["features"]["observation"]["featuresDict"]["features"] |= {
        "joints": {"tensor": {**tensor, "encoding": "zlib"}},
        "past": {"sequence": {"feature": {"image": {}}}},
        "hand": {"tensor": pixels},
    }
    steps["features"]["reward"] = {"classLabel": {}}
    path.write_text(json.dumps(document))
    told = files(folder, fields={"last_step": "keep"}).rows.kind["robot"]["not_read"]
    assert {name: text[:24] for name, text in told.items()} == {
        "observation/depth": "uint16 image [4, 4, 1], ",
        "observation/hand": "float32 [32, 48, 3], whi",
        "observation/joints": "float32 [4], with the en",
        "observation/past": "a sequence in each step,",
        "reward": "of the kind classLabel",
    }


def test_pictures_of_16_bits_are_depth_maps(tmp_path):
    deep = io.BytesIO()
    Image.fromarray(np.full((32, 48), 1000, np.uint16)).save(deep, "PNG")
    source = write_aloha(tmp_path, episodes_of([2]), form="PNG")
    with h5py.File(source / "episode_0.hdf5", "a") as file:
        del file[CAMERA]
        files_N = np.frombuffer(deep.getvalue() * 2, np.uint8).reshape(2, -1)
        file[CAMERA] = files_N
    assert reasons(files(source, fields=ALOHA)) == ["robot_frame"] * 2


def test_what_no_file_says_comes_from_the_class(tmp_path):
    source = write_robomimic(tmp_path, episodes_of([3]))
    with h5py.File(source, "a") as file:
        del file["data/demo_0"].attrs["ep_meta"]
    with pytest.raises(SourceError, match="states no task"):
        files(source, fields=STATE)
    dataset = files(source, fields={**STATE, "task": "Wait.", "success": "dones"})
    assert dataset[0]["message_list"][0]["instruction"] == "Wait."
    assert dataset[0]["metadata"]["success"] is True
    with pytest.raises(SourceError, match="no column 'donez'"):
        files(source, fields={**STATE, "task": "Wait.", "success": "donez"})
    with pytest.raises(ConfigError) as caught:
        type("Own", (EpisodeFiles,), {})(source=str(source))
    assert caught.value.reason == "episode_fields"


@pytest.mark.parametrize(
    "change",
    [
        {"fps": 0},
        {"channels": "grb"},
        {"last_step": "?"},
        {"actions": "actions"},
        {"state_names": ("a", "b")},
    ],
)
def test_fields_that_mean_nothing_are_refused(tmp_path, change):
    with pytest.raises(ConfigError) as caught:
        files(write_robomimic(tmp_path, episodes_of([1])), fields={**STATE, **change})
    assert caught.value.reason == "episode_fields"


# --- damage


def reasons(dataset):
    """Reads all windows and frames: the reason of each window, "" for a good one."""
    found = []
    for i in range(len(dataset)):
        try:
            for image in dataset[i]["image"]:
                image.read()
        except SampleError as error:
            found.append(error.reason)
        else:
            found.append("")
    return found


ALOHA = {"task_field": "task"}
FIRST = [""] * LENGTHS[0]
LAST = [""] * LENGTHS[2]
CAMERA = "observations/images/observation.images.front"


def replaced(file, name, value):
    """Replaces a dataset; a shape stands for one that states a size and has no data."""
    del file[name]
    if value is None or isinstance(value, tuple):
        shape = value or (2**40, 3)
        kind, chunks = ("u1", (1, 64, 64, 3)) if len(shape) == 4 else ("f4", (1, 3))
        file.create_dataset(name, shape, kind, chunks=chunks)
    else:
        file[name] = value


def no_link(file, name):
    del file[name]
    file[name] = h5py.ExternalLink("episode_0.hdf5", name)


@pytest.mark.parametrize("link", [h5py.SoftLink, lambda at: h5py.ExternalLink("o.hdf5", at)])
def test_no_episode_is_read_through_a_link(tmp_path, link):
    write_robomimic(tmp_path / "o", episodes_of((3,)))
    (path,) = [p for p in tmp_path.rglob("*") if p.is_file()]
    written = path.read_bytes()
    for name in ("o", "demo", "data"):
        (tmp_path / f"{name}.hdf5").write_bytes(written)
    with h5py.File(tmp_path / "demo.hdf5", "a") as file:
        file["data/demo_7"] = link("/data/demo_0")
    dataset = files(tmp_path / "demo.hdf5", fields=STATE)
    with pytest.raises(SampleError, match="links are not followed"):
        dataset[len(dataset) - 1]
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        file.move("data", "other")
        file["data"] = link("/other" if link is h5py.SoftLink else "/data")
    with pytest.raises(SourceError, match="links are not followed"):
        files(tmp_path / "data.hdf5", fields=STATE)


def test_a_lack_of_memory_is_not_a_fault_of_the_file(tmp_path, monkeypatch):
    def lacking(*_):
        raise MemoryError

    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["qpos"] = [1.0]
        assert dict(hdf5._walk(file)) == {"qpos": "float64"}
        monkeypatch.setattr(hdf5, "_own", lacking)
        with pytest.raises(MemoryError):
            list(hdf5._walk(file))


HARMS = {
    "not a number": (
        lambda file: file["action"].__setitem__((2, 1), np.nan),
        ["", "robot_values", "robot_values", ""],
    ),
    "other dimensions": (
        lambda file: replaced(file, "action", np.zeros((4, 2), np.float32)),
        ["robot_values"] * 4,
    ),
    "a short state": (
        lambda file: replaced(file, "observations/qpos", np.zeros((3, 3), np.float32)),
        ["robot_episode"] * 4,
    ),
    "texts for numbers": (
        lambda file: replaced(file, "action", np.full((4, 3), b"x")),
        ["robot_values"] * 4,
    ),
    "no action": (lambda file: file.__delitem__("action"), ["robot_episode"]),
    "no camera": (lambda file: file.__delitem__(CAMERA), ["robot_frame"] * 4),
    "a short camera": (
        lambda file: replaced(file, CAMERA, file[CAMERA][:2]),
        ["robot_frame"] * 4,
    ),
    "a camera of twice the rate": (
        lambda file: replaced(file, CAMERA, np.repeat(file[CAMERA][:], 2, axis=0)),
        ["robot_frame"] * 4,
    ),
    "a state of twice the rate": (
        lambda file: replaced(file, "observations/qpos", np.zeros((8, 3), np.float32)),
        ["robot_episode"] * 4,
    ),
    "one observation more": (
        lambda file: replaced(file, CAMERA, np.zeros((5, 32, 48, 3), np.uint8)),
        [""] * 4,
    ),
    "another file's camera": (lambda file: no_link(file, CAMERA), ["robot_frame"] * 4),
    "another file's action": (lambda file: no_link(file, "action"), ["robot_episode"]),
    "times of another shape": (
        lambda file: file.__setitem__("at", np.zeros((4, 2))),
        ["robot_values"] * 4,
    ),
    "more steps than memory": (
        lambda file: replaced(file, "action", None),
        ["robot_episode"],
    ),
    "more steps than windows": (
        lambda file: replaced(file, "action", (2**25, 3)),
        ["robot_episode"],
    ),
    "a picture beyond memory": (
        lambda file: replaced(file, CAMERA, (4, 2**18, 2**18, 3)),
        ["robot_episode"] * 4,
    ),
    "drift": (
        lambda file: file.__setitem__("at", np.array([5.0, 5.1, 5.23, 5.3])),
        ["", "robot_time", "robot_time", ""],  # in the windows from the step before it on
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_episode_of_hdf5_costs_its_windows_by_name(tmp_path, harm):
    change, want = HARMS[harm]
    folder = write_aloha(tmp_path / "x", episodes_of(LENGTHS))
    with h5py.File(folder / "episode_1.hdf5", "a") as file:
        change(file)
    fields = dict(ALOHA)
    if harm in ("drift", "times of another shape"):
        fields["times"] = "at"
        for e in (0, 2):
            with h5py.File(folder / f"episode_{e}.hdf5", "a") as file:
                file["at"] = 3 + np.arange(LENGTHS[e]) / FPS
    found = reasons(files(folder, fields=fields))
    assert found == FIRST + want + LAST


@pytest.mark.parametrize("kept", [0, 100, 0.3, 0.9])
def test_a_cut_file_of_hdf5_costs_its_episode(tmp_path, kept):
    folder = write_aloha(tmp_path / "x", episodes_of(LENGTHS))
    path = folder / "episode_1.hdf5"
    payload = path.read_bytes()
    path.write_bytes(payload[: int(kept if kept in (0, 100) else kept * len(payload))])
    assert reasons(files(folder, fields=ALOHA)) == [*FIRST, "robot_episode", *LAST]


def test_a_broken_file_of_robomimic_is_refused_by_name(tmp_path):
    path = write_robomimic(tmp_path, episodes_of([2]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SourceError) as caught:
        files(path)
    assert caught.value.reason == "robot_source"


RLDS = {"last_step": "keep"}


def shard(folder, number):
    return folder / f"arm-train.tfrecord-{number:05d}-of-00002"


def damaged(path, at):
    payload = bytearray(path.read_bytes())
    payload[at] ^= 1
    path.write_bytes(payload)


@pytest.mark.parametrize(
    "harm, want",
    [
        ("a bit of a record", ["robot_episode", *[""] * LENGTHS[1], *LAST]),
        ("a bit of a length", ["robot_episode", "robot_episode", *LAST]),
        ("a bit of the last checksum", [*FIRST, "robot_episode", *LAST]),
        ("cut", [*FIRST, "robot_episode", *LAST]),
        ("missing", ["robot_episode", "robot_episode", *LAST]),
        ("empty", ["robot_episode", "robot_episode", *LAST]),
        ("compressed", ["robot_episode", "robot_episode", *LAST]),
        ("no example", ["robot_episode", *[""] * LENGTHS[1], *LAST]),
    ],
)
def test_damage_to_a_file_of_records_costs_episodes_by_name(tmp_path, harm, want):
    folder = write_rlds(tmp_path / "x", episodes_of(LENGTHS))
    path = shard(folder, 0)
    payload = path.read_bytes()
    if harm.startswith("a bit"):
        damaged(path, {"record": 500, "length": 2, "checksum": -1}[harm.rpartition(" ")[2]])
    elif harm == "cut":
        path.write_bytes(payload[:-50])
    elif harm == "missing":
        path.unlink()
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "compressed":
        path.write_bytes(b"\x1f\x8b\x08" + payload)
    else:
        (length,) = struct.unpack("<Q", payload[:8])
        path.write_bytes(record_bytes(b"\xff" * 20) + payload[length + 16 :])
    assert reasons(files(folder, fields=RLDS)) == want


def members(payload):
    """A file of gzip may have several, which end anywhere."""
    return gzip.compress(payload[:700]) + gzip.compress(payload[700:])


@pytest.mark.parametrize("compress", [gzip.compress, zlib.compress, members])
def test_files_of_records_may_be_compressed(tmp_path, compress):
    plain = files(write_rlds(tmp_path / "plain", episodes_of(LENGTHS)), fields=RLDS)
    folder = write_rlds(tmp_path / "x", episodes_of(LENGTHS))
    for path in folder.glob("*tfrecord*"):
        path.write_bytes(compress(path.read_bytes()))
    dataset = files(folder, fields=RLDS)
    for i in (*range(len(plain)), 0, 19, 3):  # and back
        got, want = comparable(dataset[i]), comparable(plain[i])
        for a, b in zip(got.pop("images"), want.pop("images"), strict=True):
            assert np.array_equal(a, b)
        assert got == want
    path = shard(folder, 0)
    payload = path.read_bytes()
    path.write_bytes(payload[: len(payload) * 2 // 3])
    assert reasons(files(folder, fields=RLDS))[-len(LAST) - 1 :] == ["robot_episode", *LAST]
    huge = struct.pack("<Q", 2**60)
    path.write_bytes(compress(huge + struct.pack("<I", masked_crc(huge)) + b"x" * 20))
    dataset = files(folder, fields=RLDS)
    assert reasons(dataset) == ["robot_episode", "robot_episode", *LAST]
    with pytest.raises(SampleError, match="at most 2147483647 can be read"):
        dataset[0]


def test_steps_of_records_that_are_broken_cost_their_windows(tmp_path):
    episodes = episodes_of(LENGTHS)
    episodes[1].actions[2, 1] = np.inf
    name = next(iter(episodes[2].frames))
    del episodes[2].frames[name][7:]
    folder = write_rlds(tmp_path / "x", episodes)
    want = [*FIRST, "", "robot_values", "robot_values", "", *["robot_frame"] * 9]
    assert reasons(files(folder, fields=RLDS)) == want
    record = example_bytes(
        {
            "steps/is_first": np.array([1, 0, 0, 0]),
            "steps/action": episodes[0].actions[:3].reshape(-1),
            "steps/observation/state": episodes[0].state[:4].reshape(-1),
            "steps/language_instruction": [b"Go."] * 4,
        }
    )
    shard(folder, 1).write_bytes(record_bytes(record))
    assert reasons(files(folder, fields=RLDS))[-4:] == ["robot_values"] * 4


@pytest.mark.parametrize(
    "file, change",
    [
        ("dataset_info.json", {"fileFormat": "array_record"}),
        ("dataset_info.json", {"splits": [{"name": "train", "shardLengths": ["x"]}]}),
        (
            "dataset_info.json",
            {"splits": [{"name": "train", "shardLengths": ["1"], "filepathTemplate": "../x"}]},
        ),
        ("dataset_info.json", {"splits": 3}),
        ("features.json", {"featuresDict": {"features": {}}}),
        ("features.json", {"featuresDict": 3}),
        ("features.json", None),
    ],
)
def test_metadata_of_records_that_cannot_be_used_are_refused(tmp_path, file, change):
    folder = write_rlds(tmp_path / "x", episodes_of([1]))
    path = folder / file
    document = None if change is None else {**json.loads(path.read_text()), **change}
    path.write_text("{" if document is None else json.dumps(document))
    with pytest.raises(SourceError) as caught:
        files(folder, fields=RLDS)
    assert caught.value.reason == "robot_source"


def test_a_record_of_one_step_has_no_window_where_that_has_no_action(tmp_path):
    folder = write_rlds(tmp_path / "x", episodes_of([1, 3]))
    assert reasons(files(folder)) == [""] * 2


def test_few_episodes_are_held_however_many_are_read(tmp_path):
    dataset = files(write_rlds(tmp_path / "x", episodes_of([1] * 12)), fields=RLDS)
    for _ in range(2):
        assert reasons(dataset) == [""] * 12
    gc.collect()
    held = [each for each in gc.get_objects() if type(each) is EpisodeFrames]
    mine = [each for each in held if str(tmp_path) in each._where]
    assert len(mine) <= EPISODES_HELD


# --- rows of a user's own: navigation


class Rover(RobotDataset):
    only_success = True

    def load(self):
        return ROWS


VIEWS = {"overhead": ["o0.png", "o1.png"], "egocentric": ["e0.png", "e1.png"]}
ROWS = [
    {"views": VIEWS, "task": "Go.", "actions": ["move_forward", "stop"], "success": True},
    {"views": VIEWS, "task": "Go.", "actions": [{"turn_deg": 9}], "success": False},
    {"views": {**VIEWS, "overhead": ["o0.png"]}, "task": "Go.", "actions": ["stop"]},
    {"views": VIEWS, "task": "Go.", "actions": [{"turn_deg": 9}]},
    {"views": VIEWS, "task": "Go.", "actions": ["stop"], "success": "false"},
    {"views": VIEWS, "task": "Go.", "actions": ["stop"], "success": float("nan")},
    {"views": {}, "task": "Go.", "actions": ["stop"]},
    {"views": VIEWS, "task": "Go.", "actions": np.zeros((2, 3), np.float32)},
]


def test_episodes_of_a_rover_are_instants_of_views_and_structured_actions():
    dataset = Rover()
    first = dataset[0]
    assert [image.name for image in first["image"]] == ["e0.png", "o0.png", "e1.png", "o1.png"]
    assert first["metadata"] == {"views": ["egocentric", "overhead"] * 2, "success": True}
    assert first["message_list"][0]["action"] == ["move_forward", "stop"]
    want = ["", "robot_failed", "robot_frame", "", "row_fields", "", "row_fields", ""]
    assert reasons_of_rows(dataset) == want
    assert all("success" not in dataset[i]["metadata"] for i in (3, 5))
    assert dataset[7]["message_list"][0]["action"] == [[0.0] * 3] * 2
    assert "robot_failed" in dataset.leaves_out


def reasons_of_rows(dataset):
    found = []
    for i in range(len(dataset)):
        try:
            dataset[i]
        except SampleError as error:
            found.append(error.reason)
        else:
            found.append("")
    return found


# --- the parser, beside the protobuf library

_FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=5)
_INTEGERS = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5)


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.lists(st.binary(max_size=9), min_size=1, max_size=4),
            _FLOATS.map(lambda v: np.array(v, np.float32)),
            _INTEGERS.map(lambda v: np.array(v, np.int64)),
        ),
        max_size=4,
    ),
    st.integers(0, 200),
    st.integers(0, 255),
)
def test_examples_are_parsed_as_the_library_writes_them(values, at, byte):
    payload = example_bytes(values)
    found = parse_example(payload)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert np.array_equal(found[name], value)
    harmed = bytearray(payload)
    if at < len(harmed):
        harmed[at] = byte
    for wrong in (bytes(harmed), payload[:at]):
        with suppress(SampleError):  # and nothing else
            parse_example(wrong)


def test_lists_that_are_not_packed_are_read():
    floats = b"".join(b"\x0d" + struct.pack("<f", v) for v in (1.5, -2.0))
    integers = b"\x08\x05\x08\x96\x01"
    entries = b""
    for name, number, body in ((b"f", 2, floats), (b"i", 3, integers)):
        feature = bytes([number << 3 | 2, len(body)]) + body
        entry = b"\x0a\x01" + name + b"\x12" + bytes([len(feature)]) + feature
        entries += b"\x0a" + bytes([len(entry)]) + entry
    payload = b"\x0a" + bytes([len(entries)]) + entries
    found = parse_example(payload)
    assert (found["f"].tolist(), found["i"].tolist()) == ([1.5, -2.0], [5, 150])
