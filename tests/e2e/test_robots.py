"""A robot's folder from Parquet and MP4 to batches with actions, and the same without shards."""

import dataclasses

import numpy as np
import pytest
import torch

from loader import StreamingDataset, View, make_dataloader
from loader.assembly import Augment
from preprocess.datasets import LeRobot
from preprocess.episodes import WindowPolicy
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.reshard import ReshardSettings, plan_reshard
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.actions import ValueStatistics, denormalize, normalize, value_statistics
from shardspec.errors import ConfigError, ConflictError
from shardspec.manifest import require_manifest
from shardspec.tiling import ImageView
from tests import inline
from tests.lerobot_folders import episodes_of, write_v3
from tests.robot_files import write_aloha, write_rlds
from tests.unsharded import require_unsharded

SMALL = ImageView(size_px=56, patch_px=14, max_crops=1)
RECIPE = Recipe(image=ImagePolicy(views=(SMALL,), codec="png"), seed=3)
LENGTHS = (5, 3)
CODE = """
from preprocess.datasets import LeRobot
from preprocess.episodes import WindowPolicy


class Arm(LeRobot):
    name = "arm"
    window = WindowPolicy(
        history=2, chunk=3, kept=("gripper",), conventions=(("gripper", "1 opens"),)
    )
"""


@pytest.fixture(scope="module")
def episodes():
    return episodes_of(LENGTHS)


@pytest.fixture(scope="module")
def source(tmp_path_factory, episodes):
    return write_v3(tmp_path_factory.mktemp("lerobot") / "x", episodes)


@pytest.fixture(scope="module")
def built(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("robots")
    (folder / "arm.py").write_text(CODE)
    settings = JobSettings(
        dataset=f"{folder / 'arm.py'}:Arm",
        source=str(source),
        out=str(folder / "shards"),
        cache=str(folder / "cache"),
        recipe=RECIPE,
        num_shards=2,
    )
    with inline.jobs():
        run_job(settings, inline.Quiet())
    return settings.out


def test_the_manifest_has_the_statistics_and_the_conventions(built, episodes):
    manifest = require_manifest(built)
    described = manifest.splits["train"].source["robot"]
    actions = np.concatenate([episode.actions for episode in episodes])
    statistics = ValueStatistics.from_dict(described["statistics"]["actions"])
    assert statistics == value_statistics(actions)
    assert (described["kept"], described["conventions"]) == ([2], {"gripper": "1 opens"})
    assert manifest.recipe["window"]["history"] == 2
    scaled = normalize(actions, statistics, kept=described["kept"])
    back = denormalize(scaled, statistics, kept=described["kept"])
    assert np.allclose(back[:, 2], actions[:, 2])


def test_batches_have_the_values_of_the_folder_bit_for_bit(built, episodes):
    stream = StreamingDataset(built, seed=5, view=View(image=SMALL))
    loader = make_dataloader(
        stream,
        global_batch_size=4,
        sequence_length=256,
        arrays=("actions", "action_mask", "state", "history_mask"),
        metadata=("episode", "step"),
    )
    seen = set()
    batches = iter(loader)
    for _ in range(2):
        batch = next(batches)
        assert batch["actions"].shape == (4, 3, 3)
        assert batch["actions"].dtype == batch["state"].dtype == torch.float32
        assert batch["action_mask"].dtype == batch["history_mask"].dtype == torch.bool
        for row in range(4):
            record = batch["metadata"][row]["record"]
            assert set(record) == {"episode", "step"}
            e, t = record["episode"], record["step"]
            seen.add((e, t))
            length = LENGTHS[e]
            rows = [min(t + i, length - 1) for i in range(3)]
            assert batch["actions"][row].numpy().tobytes() == episodes[e].actions[rows].tobytes()
            assert batch["action_mask"][row].tolist() == [t + i < length for i in range(3)]
            assert batch["state"][row].numpy().tobytes() == episodes[e].state[t].tobytes()
            assert batch["history_mask"][row].tolist() == [t > 0, True]
    assert seen == {(e, t) for e, length in enumerate(LENGTHS) for t in range(length)}


def test_the_windows_of_an_episode_are_in_one_shard(built):
    reader = StreamingDataset(built).reader
    episodes = [reader.record(i)["metadata"]["episode"] for i in range(sum(LENGTHS))]
    sizes = [shard.nsamples for shard in require_manifest(built).shards]
    assert sorted(sizes) == sorted(LENGTHS)
    first = sizes[0]
    assert len({*episodes[:first]}) == len({*episodes[first:]}) == 1
    wanted = ReshardSettings(sources=(built,), out="nowhere", num_shards=4, order="shuffle")
    again = plan_reshard(wanted, inline.Quiet()).splits[0]
    cut = [{episodes[i] for i in again.shard_numbers(shard).tolist()} for shard in range(2)]
    assert again.num_shards == 2
    assert sorted(cut, key=min) == [{0}, {1}]


def test_metadata_that_nobody_wants_are_not_in_the_batch(built):
    stream = StreamingDataset(built, seed=5, view=View(image=SMALL))
    settings = {"global_batch_size": 2, "sequence_length": 256, "decode_threads": 0}
    bare = next(iter(make_dataloader(stream, arrays=("state",), **settings)))
    assert "metadata" not in bare
    named = next(iter(make_dataloader(stream, arrays=("state",), with_metadata=True, **settings)))
    assert "record" not in named["metadata"][0]
    assert torch.equal(bare["state"], named["state"])


@pytest.mark.parametrize("name", ["views", "nothing", "success"])
def test_fields_that_are_not_arrays_are_refused(built, name):
    stream = StreamingDataset(built, seed=5, view=View(image=SMALL))
    loader = make_dataloader(
        stream, global_batch_size=2, sequence_length=256, arrays=(name,), decode_threads=0
    )
    with pytest.raises(ConfigError) as caught:
        next(iter(loader))
    assert caught.value.reason == "loader_arrays"


def test_arrays_mean_nothing_with_packs(built):
    stream = StreamingDataset(built, seed=5, view=View(image=SMALL))
    with pytest.raises(ConfigError) as caught:
        make_dataloader(
            stream, global_batch_size=2, sequence_length=256, arrays=("state",), pack=True
        )
    assert caught.value.reason == "argument_unused"


def test_shards_equal_the_unsharded_path_with_augmentation(built, source):
    policy = WindowPolicy(history=2, chunk=3, kept=("gripper",))
    rows = type("Arm", (LeRobot,), {"window": policy, "name": "arm"})(source=str(source))
    prepare = Preparer(recipe=RECIPE, tokenizer=load_tokenizer())
    view = View(image=SMALL, augment=Augment.standard())
    require_unsharded(built, rows, prepare, view=view, seed=5, epochs=2, num_images=4)


def test_the_text_names_the_task_and_the_actions_that_are_there(built):
    reader = StreamingDataset(built).reader
    found = {}
    for number in range(sum(LENGTHS)):
        record = reader.record(number)
        found[record["metadata"]["episode"], record["metadata"]["step"]] = record
    last = found[1, 2]
    assert last["message_list"][0]["instruction"] == "Task 1."
    assert len(last["message_list"][0]["action"]) == 1
    assert last["metadata"]["action_mask"] == [True, False, False]


FILES = """
from preprocess.datasets import EpisodeFiles
from preprocess.episodes import EpisodeFields, WindowPolicy


class Arm(EpisodeFiles):
    name = "arm"
    fields = EpisodeFields(fps=10, task_field="{task}", last_step="keep")
    window = WindowPolicy(chunk=3)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["aloha", "rlds"])
def test_damage_to_files_is_counted_and_the_job_goes_to_its_end(tmp_path, layout):
    """Five episodes: one cut, one with a value that is not a number, one short of pictures."""
    episodes = episodes_of([5] * 5)
    episodes[1].actions[4, 0] = np.nan
    name = next(iter(episodes[2].frames))
    del episodes[2].frames[name][3:]
    write = {"aloha": write_aloha, "rlds": write_rlds}[layout]
    folder = write(tmp_path / "x", episodes)
    last = sorted(folder.glob("*tfrecord*") if layout == "rlds" else folder.glob("*.hdf5"))[-1]
    last.write_bytes(last.read_bytes()[:-99])
    task = {"aloha": "task", "rlds": "language_instruction"}[layout]
    (tmp_path / "arm.py").write_text(FILES.replace("{task}", task))
    settings = JobSettings(
        dataset=f"{tmp_path / 'arm.py'}:Arm",
        source=str(folder),
        out=str(tmp_path / "shards"),
        cache=str(tmp_path / "cache"),
        recipe=dataclasses.replace(RECIPE, text=TextPolicy(actions="tokens")),
        num_shards=2,
        max_lost_rows=0.5,
    )
    with inline.jobs():
        outcome = run_job(settings, inline.Quiet())
    split = outcome.result.split
    assert split.quarantined == {"robot_episode": 1, "robot_values": 3, "robot_frame": 5}
    assert split.num_samples == 5 + 2 + 0 + 5
    manifest = require_manifest(settings.out)
    assert manifest.recipe["fields"]["fps"] == 10
    assert manifest.recipe["action_vocab_size"] == load_tokenizer().own_size
    described = split.source["robot"]["statistics"]["actions"]
    good = np.concatenate([e.actions for e in episodes[:4]])
    assert described == value_statistics(good).to_dict()
    found = StreamingDataset(settings.out, seed=1, view=View(image=SMALL))
    assert {found.reader.record(i)["metadata"]["episode"] for i in range(12)} == {0, 1, 3}


def test_actions_that_are_scaled_by_other_quantiles_are_not_joined(tmp_path):
    """Episodes that came after a split was built change the quantiles of those built later."""
    episodes = episodes_of((3, 2, 4, 3))
    write_aloha(tmp_path / "x", episodes[:3])
    text = FILES.replace("{task}", "task") + "    validation_share = 0.5\n"
    (tmp_path / "arm.py").write_text(text)

    def build(out, split="train"):
        settings = JobSettings(
            dataset=f"{tmp_path / 'arm.py'}:Arm",
            source=str(tmp_path / "x"),
            out=str(tmp_path / out),
            cache=str(tmp_path / "cache"),
            split=split,
            recipe=RECIPE,
            num_shards=1,
        )
        with inline.jobs():
            run_job(settings, inline.Quiet())
        return settings.out

    def merged(*sources):
        return plan_reshard(ReshardSettings(sources=sources, out="nowhere"), inline.Quiet())

    old, whole = build("old"), build("whole")
    build("whole", "validation")
    write_aloha(tmp_path / "x", [*episodes[:3], episodes_of([3], seed=9)[0]])
    before = require_manifest(old)
    with pytest.raises(ConflictError) as caught:
        build("old", "validation")
    assert caught.value.reason == "recipe_conflict"
    assert "q01" in caught.value.what
    assert require_manifest(old) == before
    with pytest.raises(ConflictError) as caught:
        merged(old, build("new"))
    assert caught.value.reason == "recipe_conflict"
    assert "q99" in caught.value.what
    with pytest.raises(ConflictError) as caught:
        merged(old, whole)
    assert caught.value.reason == "key_collision"
