"""Writes LeRobot folders by their documented layout, with pyarrow and PyAV alone."""

import json
from dataclasses import dataclass, field
from fractions import Fraction

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FPS = 10
CAMERAS = ("observation.images.front", "observation.images.wrist")
SIDES = {CAMERAS[0]: (48, 32), CAMERAS[1]: (32, 48)}


@dataclass
class WrittenEpisode:
    """What a test knows of an episode."""

    actions: np.ndarray
    state: np.ndarray
    task: str
    frames: dict[str, list[np.ndarray]] = field(default_factory=dict)
    times: np.ndarray | None = None


def episodes_of(lengths, *, dims=3, seed=0):
    """Draws episodes: values at random, and pictures whose colour names camera and step."""
    rng = np.random.RandomState(seed)
    made = []
    for e, length in enumerate(lengths):
        frames = {}
        for c, name in enumerate(CAMERAS):
            width, height = SIDES[name]
            frames[name] = [
                np.full((height, width, 3), (40 + 10 * t, 60 * (e + 1), 90 + 80 * c), np.uint8)
                for t in range(length)
            ]
        values = rng.normal(size=(2, length, dims)).astype(np.float32)
        made.append(WrittenEpisode(values[0], values[1], f"Task {e % 2}.", frames))
    return made


def write_video(path, frames, *, fps=FPS, index_first=False):
    """Writes H.264, 4:2:0, a key frame every two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "faststart"} if index_first else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.pix_fmt = "yuv420p"
        stream.options = {"g": "2", "crf": "18", "preset": "veryfast"}
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def info_of(version, episodes, *, splits=None):
    vector = {
        "dtype": "float32",
        "shape": [episodes[0].actions.shape[1]],
        "names": ["x", "y", "gripper"],
    }
    cameras = {
        name: {"dtype": "video", "shape": [*SIDES[name][::-1], 3], "names": None}
        for name in CAMERAS
    }
    total = len(episodes)
    paths = {
        "v3.0": (
            "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
            "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        ),
        "v2.1": (
            "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        ),
    }
    return {
        "codebase_version": version,
        "robot_type": "so100",
        "fps": FPS,
        "chunks_size": 1000,
        "total_episodes": total,
        "features": {
            "action": vector,
            "observation.state": {**vector, "names": {"motors": ["x", "y", "gripper"]}},
            **cameras,
        },
        "data_path": paths[version][0],
        "video_path": paths[version][1],
        "splits": splits or {"train": f"0:{total}"},
    }


def steps_of(episodes, numbers):
    """Makes the columns of the steps of some episodes."""
    columns = {
        name: []
        for name in (
            *("action", "observation.state", "timestamp", "frame_index"),
            *("episode_index", "index", "task_index"),
        )
    }
    for e in numbers:
        episode = episodes[e]
        length = len(episode.actions)
        times = np.arange(length) / FPS if episode.times is None else episode.times
        columns["action"] += episode.actions.tolist()
        columns["observation.state"] += episode.state.tolist()
        columns["timestamp"] += times.tolist()
        columns["frame_index"] += range(length)
        columns["episode_index"] += [e] * length
        columns["index"] += range(len(columns["index"]), len(columns["index"]) + length)
        columns["task_index"] += [e % 2] * length
    kinds = {"action": pa.list_(pa.float32()), "observation.state": pa.list_(pa.float32())}
    kinds["timestamp"] = pa.float32()
    return pa.table({n: pa.array(v, kinds.get(n, pa.int64())) for n, v in columns.items()})


def write_v3(folder, episodes, *, splits=None):
    """Writes v3.0: two data files; the first camera in one video, the second one in two.

    So where an episode is differs between its data and each of its cameras.
    """
    meta = folder / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info_of("v3.0", episodes, splits=splits)))
    tasks = pa.table({"task_index": [0, 1], "task": ["Task 0.", "Task 1."]})
    pq.write_table(tasks, meta / "tasks.parquet")
    half = (len(episodes) + 1) // 2
    file_of = {name: [0] * len(episodes) for name in CAMERAS}
    file_of[CAMERAS[1]] = [int(e >= 1) for e in range(len(episodes))]
    data_of = [int(e >= half) for e in range(len(episodes))]
    rows = []
    for e, episode in enumerate(episodes):
        row = {
            "episode_index": e,
            "tasks": [episode.task],
            "length": len(episode.actions),
            "data/chunk_index": 0,
            "data/file_index": data_of[e],
        }
        for name in CAMERAS:
            before = [
                len(episodes[b].frames[name])
                for b in range(e)
                if file_of[name][b] == file_of[name][e]
            ]
            row[f"videos/{name}/chunk_index"] = 0
            row[f"videos/{name}/file_index"] = file_of[name][e]
            row[f"videos/{name}/from_timestamp"] = sum(before) / FPS
            row[f"videos/{name}/to_timestamp"] = (sum(before) + row["length"]) / FPS
        rows.append(row)
    (meta / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), meta / "episodes" / "chunk-000" / "file-000.parquet")
    for number in sorted({*data_of}):
        path = folder / "data" / "chunk-000" / f"file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(steps_of(episodes, [e for e, f in enumerate(data_of) if f == number]), path)
    for name in CAMERAS:
        for number in sorted({*file_of[name]}):
            frames = [
                frame
                for e, episode in enumerate(episodes)
                if file_of[name][e] == number
                for frame in episode.frames[name]
            ]
            write_video(folder / "videos" / name / "chunk-000" / f"file-{number:03d}.mp4", frames)
    return folder


def write_v2(folder, episodes, *, splits=None):
    """Writes v2.1: a file per episode, and one per camera of it."""
    meta = folder / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").write_text(json.dumps(info_of("v2.1", episodes, splits=splits)))
    tasks = [{"task_index": i, "task": f"Task {i}."} for i in (0, 1)]
    (meta / "tasks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in tasks))
    lines = []
    for e, episode in enumerate(episodes):
        lines.append({"episode_index": e, "tasks": [episode.task], "length": len(episode.actions)})
        data = folder / "data" / "chunk-000" / f"episode_{e:06d}.parquet"
        data.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(steps_of(episodes, [e]), data)
        for name in CAMERAS:
            path = folder / "videos" / "chunk-000" / name / f"episode_{e:06d}.mp4"
            write_video(path, episode.frames[name])
    (meta / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


WRITERS = {"v3.0": write_v3, "v2.1": write_v2}
