"""Writes robots' episodes as HDF5 files (robomimic, ALOHA) and as an RLDS folder.

TFRecords are made by the protobuf library and google-crc32c, not by code of the project.
"""

import io
import json
import struct

import google_crc32c
import h5py
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

_LISTS = {"bytes_list": 12, "float_list": 2, "int64_list": 3}  # types of FieldDescriptorProto


def _example_class():
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(parent, name, *fields):
        made = parent.add(name=name)
        for number, (field, kind, type_name, repeated) in enumerate(fields, 1):
            label = 3 if repeated else 1
            told = {"type_name": type_name} if type_name else {}
            made.field.add(name=field, number=number, type=kind, label=label, **told)
        return made

    for name, kind in _LISTS.items():
        message(file.message_type, name, ("value", kind, "", True))
    feature = message(
        file.message_type, "Feature", *((name, 11, f".t.{name}", False) for name in _LISTS)
    )
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    entry_name = ".t.Features.FeatureEntry"
    features = message(file.message_type, "Features", ("feature", 11, entry_name, True))
    entry = message(
        features.nested_type,
        "FeatureEntry",
        ("key", 9, "", False),
        ("value", 11, ".t.Feature", False),
    )
    entry.options.map_entry = True
    message(file.message_type, "Example", ("features", 11, ".t.Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = _example_class()


def example_bytes(values):
    """Serializes an Example: lists of bytes, float arrays, or integer arrays by name."""
    made = EXAMPLE()
    for name, value in values.items():
        kind = {"f": "float_list", "i": "int64_list"}.get(
            getattr(getattr(value, "dtype", None), "kind", ""), "bytes_list"
        )
        getattr(made.features.feature[name], kind).value.extend(list(value))
    return made.SerializeToString()


def record_bytes(payload):
    """Frames a record."""

    def crc(part):
        value = google_crc32c.value(part)
        return struct.pack("<I", (((value >> 15) | (value << 17)) + 0xA282EAD8) % 2**32)

    head = struct.pack("<Q", len(payload))
    return head + crc(head) + payload + crc(payload)


def png(pixels, form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **({"quality": 95} if form == "JPEG" else {}))
    return stream.getvalue()


def write_robomimic(folder, episodes, *, masks=None):
    """Writes one file; names of demonstrations are not in the order of their numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demos.hdf5"
    with h5py.File(path, "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"data/demo_{number}")
            group.attrs["ep_meta"] = json.dumps({"lang": episode.task})
            group["actions"], group["obs/state"] = episode.actions, episode.state
            group["dones"] = np.arange(len(episode.actions)) == len(episode.actions) - 1
            for name, frames in episode.frames.items():
                group[f"obs/{name}"] = np.array(frames)
            group["obs/depth"] = np.zeros((len(episode.actions), 4, 4, 1), np.uint8)
        for name, members in (masks or {}).items():
            file[f"mask/{name}"] = np.array([f"demo_{i}".encode() for i in members])
    return path


def write_aloha(folder, episodes, *, form=None):
    """Writes a file per episode; with `form` pictures are files that zeros follow."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, episode in enumerate(episodes):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file["action"], file["observations/qpos"] = episode.actions, episode.state
            file.attrs["task"] = episode.task
            for name, frames in episode.frames.items():
                value = np.array(frames)
                if form is not None:
                    files = [png(frame, form) for frame in frames]
                    longest = max(map(len, files)) + 7
                    padded = [each.ljust(longest, b"\0") for each in files]
                    value = np.frombuffer(b"".join(padded), np.uint8).reshape(len(files), -1)
                file[f"observations/images/{name}"] = value
    return folder


def _tensor(dtype, *sides):
    shape = {"dimensions": [str(side) for side in sides]} if sides else {}
    return {"tensor": {"shape": shape, "dtype": dtype, "encoding": "none"}}


def write_rlds(folder, episodes, *, shards=2, splits=None, extra_step=False):
    """Writes the folder of a version; by default one split, dealt to several files."""
    folder.mkdir(parents=True, exist_ok=True)
    cameras = {
        name: {"image": {"shape": {"dimensions": ["-1", "-1", "3"]}, "encodingFormat": "png"}}
        for name in episodes[0].frames
    }
    depth = {"image": {"shape": {"dimensions": ["4", "4", "1"]}, "dtype": "uint16"}}
    dims = episodes[0].actions.shape[1]
    steps = {
        "action": _tensor("float32", dims),
        "is_first": _tensor("bool"),
        "language_instruction": {"text": {}},
        "observation": {
            "featuresDict": {
                "features": {"state": _tensor("float32", dims), "depth": depth, **cameras}
            }
        },
    }
    features = {"steps": {"sequence": {"feature": {"featuresDict": {"features": steps}}}}}
    document = {"featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(document))
    told = []
    for split, numbers in (splits or {"train": range(len(episodes))}).items():
        parts = np.array_split(list(numbers), shards)
        told.append({"name": split, "shardLengths": [str(len(part)) for part in parts]})
        for i, part in enumerate(parts):
            records = [record_bytes(rlds_example(episodes[e], extra_step)) for e in part]
            name = f"arm-{split}.tfrecord-{i:05d}-of-{shards:05d}"
            (folder / name).write_bytes(b"".join(records))
    info = {"name": "arm", "fileFormat": "tfrecord", "splits": told}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def rlds_example(episode, extra_step=False):
    """Serializes an episode; the extra step repeats the last one, with an action of no meaning."""
    rows = [*range(len(episode.actions))]
    actions = episode.actions
    if extra_step:
        rows, actions = [*rows, rows[-1]], np.concatenate([actions, np.full_like(actions[:1], 9)])
    values = {
        "steps/action": actions.reshape(-1),
        "steps/is_first": (np.array(rows) == 0).astype(np.int64),
        "steps/language_instruction": [episode.task.encode()] * len(rows),
        "steps/observation/state": episode.state[rows].reshape(-1),
    }
    for name, frames in episode.frames.items():
        kept = [frames[row] for row in rows if row < len(frames)]
        values[f"steps/observation/{name}"] = [png(frame) for frame in kept]
    return example_bytes(values)
