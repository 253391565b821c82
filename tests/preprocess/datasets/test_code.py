"""Datasets that are code of the user's: what a class needs, what counts as its code, its errors."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from loader import StreamingDataset
from preprocess.datasets import Dataset, DatasetBase, dataset_class
from preprocess.datasets.code import code_beside
from preprocess.media import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import ConfigError, SampleError, SourceError
from shardspec.manifest import load_manifest
from shardspec.tiling import ImageView

PHOTO = np.full((42, 56, 3), 90, np.uint8)

NUMBERED = """
import numpy as np
from preprocess.datasets import Dataset

class CustomDataset(Dataset):
    size = 4

    def __len__(self):
        return self.size

    def get(self, item, rng):
        if item == 2:
            raise ZeroDivisionError("no such page")
        return {
            "image": np.full((42, 56, 3), 40 * item, np.uint8),
            "messages": [
                {"role": "user", "content": "Number?"},
                {"role": "assistant", "content": f"{item}, {rng.randint(1000)}"},
            ],
            "metadata": {"page": item},
        }

class OfSplits(CustomDataset):
    def __init__(self, split, size=2):
        self.split, self.size = split, size

class NeedsMore(CustomDataset):
    def __init__(self, folder):
        self.folder = folder

class Half(Dataset):
    def __len__(self):
        return 1
"""


@pytest.fixture
def numbered(tmp_path):
    path = tmp_path / "numbered.py"
    path.write_text(NUMBERED)
    return path


@pytest.fixture(scope="module")
def shards(inline_cli, tmp_path_factory):
    """The folder of numbered.py, with the shards of its first class in out/."""
    folder = tmp_path_factory.mktemp("numbered")
    (folder / "numbered.py").write_text(NUMBERED)
    job = ("shards", f"{folder}/numbered.py:CustomDataset", "--out", folder / "out")
    job += ("--workers", 1, "--codec", "png", "--image-size", 56)
    inline_cli.good(*job, "--cache", folder / "cache")
    return folder


def test_class_with_a_length_and_get_becomes_shards(shards):
    manifest = load_manifest(str(shards / "out"))
    assert manifest.dataset == "custom_dataset"
    split = manifest.splits["train"]
    assert (split.num_samples, dict(split.quarantined)) == (3, {"row_error": 1})
    (line,) = (shards / "out").glob("quarantine/*")
    told = json.loads(line.read_text().splitlines()[0])
    assert "ZeroDivisionError: no such page" in json.dumps(told)


def test_examples_of_a_numbered_class_draw_the_same_each_time(numbered):
    kind = dataset_class(f"{numbered}:CustomDataset")
    answers = [kind().get(i)["message_list"][0]["messages"][1] for i in (0, 1, 3)]
    assert answers == [kind().get(i)["message_list"][0]["messages"][1] for i in (0, 1, 3)]
    assert len({answer.split()[1] for answer in answers}) == 3


def test_constructor_of_a_numbered_class_is_given_the_split_if_it_takes_one(numbered):
    kind = dataset_class(f"{numbered}:OfSplits")
    dataset = kind("validation")
    assert len(dataset) == 2
    assert dataset.rows[0]["metadata"] == {"page": 0}
    with pytest.raises(SourceError) as caught:
        dataset_class(f"{numbered}:CustomDataset")("validation")
    assert caught.value.reason == "source_split"


@pytest.mark.parametrize("name, want", [("NeedsMore", "'folder'"), ("Half", "get")])
def test_numbered_class_that_cannot_be_made_is_refused(name, want, numbered):
    with pytest.raises(ConfigError) as caught:
        dataset_class(f"{numbered}:{name}")
    assert caught.value.reason == "dataset_code"
    assert want in str(caught.value)


def test_row_of_a_numbered_class_that_raises_is_named(numbered):
    dataset = dataset_class(f"{numbered}:CustomDataset")()
    with pytest.raises(SampleError) as caught:
        dataset.get(2)
    assert caught.value.reason == "row_error"
    assert caught.value.facts["row"] == 2
    assert "ZeroDivisionError" in str(caught.value)


HUB = """
from preprocess.datasets import HfDataset

class Chats(HfDataset):
    PATH = "somebody/chats"

class Captions(HfDataset):
    PATH = "somebody/captions"

    def to_example(self, row):
        message = {"style": "long_caption", "text": row["words"]}
        return {"image": row["picture"], "message_list": [message]}
"""


def test_rows_of_the_hub_need_a_path_and_where_columns_differ_to_example(tmp_path, write_parquet):
    stream = io.BytesIO()
    Image.fromarray(PHOTO).save(stream, "PNG")
    stored = {"bytes": stream.getvalue(), "path": None}
    told = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chats = write_parquet(tmp_path / "chats", [{"image": stored, "messages": told}])
    captions = write_parquet(tmp_path / "captions", [{"picture": stored, "words": "Grey."}])
    (tmp_path / "hub.py").write_text(HUB)
    example = dataset_class(f"{tmp_path}/hub.py:Chats")(source=str(chats)).get(0)
    assert example["image"] in (stored["bytes"], [stored["bytes"]])
    assert example["message_list"] == [{"style": "demo", "messages": ["Hi", "Ho"]}]
    example = dataset_class(f"{tmp_path}/hub.py:Captions")(source=str(captions)).get(0)
    assert example["image"] == stored["bytes"]


# --- what counts as its code


@pytest.fixture
def tree(tmp_path):
    """A file that imports a module and a package from beside it, and those import others."""
    files = {
        "mine.py": "import words\nimport numpy, json\ndef later():\n    from bag.deep import x\n",
        "words.py": "from more import A\n",
        "more.py": "A = 1\n",
        "bag/__init__.py": "",
        "bag/deep.py": "from . import side\nfrom .under import y\nx = 1\n",
        "bag/side.py": "from ..outside import z\n",
        "bag/under.py": "y = 1\nfrom bag import side\n",
        "other.py": "raise SystemExit\n",
        "broken.py": "def (",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_code_of_a_file_is_what_it_imports_from_beside_it(tree):
    found = [p.relative_to(tree).as_posix() for p in code_beside(tree / "mine.py", "mine")]
    want = ["bag/__init__.py", "bag/deep.py", "bag/side.py", "bag/under.py", "more.py", "words.py"]
    assert found == want
    assert code_beside(tree / "broken.py", "broken") == []


def test_code_of_a_package_is_the_package_alone(tree):
    (tree / "bag" / "deep.py").write_text("import words, json\nfrom bag.under import y\n")
    found = [p.relative_to(tree).as_posix() for p in code_beside(tree / "bag/deep.py", "bag.deep")]
    assert found == ["bag/__init__.py", "bag/side.py", "bag/under.py"]


def test_change_of_a_module_beside_the_file_is_another_job(inline_cli, tmp_path):
    name = f"{tmp_path.name}_texts"
    head = f"from preprocess.datasets import DatasetBase\nfrom {name} import TEXT\n"
    (tmp_path / f"{name}.py").write_text("TEXT = 'one'\n")
    (tmp_path / "mine.py").write_text(
        f"{head}class Mine(DatasetBase):\n    def load(self):\n"
        "        return [{'message_list': [{'style': 'text_sft', 'messages': ['a', TEXT]}]}]\n"
    )
    job = ("shards", f"{tmp_path}/mine.py:Mine", "--out", tmp_path / "out", "--workers", 1)
    job += ("--image-size", 112, "--cache", tmp_path / "cache")
    inline_cli.good(*job)
    (tmp_path / f"{name}.py").write_text("TEXT = 'two'\n")
    done = inline_cli.run(*job)
    assert done.code == 3
    assert "\n  code " in done.err


# --- in memory


class Files(DatasetBase):
    """Rows that name image files; the second cannot become an example."""

    folder = None

    def load(self):
        told = {"message_list": [{"style": "text_sft", "messages": ["a", "b"]}]}
        names = [f"{self.folder}/0.png", f"{self.folder}/none.png"]
        return [{**told, "image": names[0]}, {}, {**told, "image": names}]


def test_preloaded_dataset_reads_nothing_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "folder", tmp_path)
    Image.fromarray(PHOTO).save(tmp_path / "0.png")
    payload = (tmp_path / "0.png").read_bytes()
    dataset = Files()
    before = dataset.get(0)
    dataset.preload()
    (tmp_path / "0.png").unlink()
    dataset.rows = None
    assert dataset.get(0) == {**before, "image": payload}
    assert dataset[2]["image"] == [payload, tmp_path / "none.png"]
    with pytest.raises(SampleError) as caught:
        dataset.get(1)
    assert caught.value.reason == "row_fields"
    with pytest.raises(IndexError):
        dataset.get(3)


def test_dataset_that_holds_nothing_has_nothing_to_preload():
    class One(Dataset):
        def __len__(self):
            return 1

        def get(self, item, rng=None):
            return {"messages": []}

    One().preload()
    assert One.name == "one"


def test_pixels_of_an_adapter_become_the_sample_that_the_unsharded_path_makes(shards):
    reader = StreamingDataset(str(shards / "out")).reader
    image = ImagePolicy(views=(ImageView(size_px=56),), codec="png")
    text = TextPolicy(system_prompt="none")
    prepare = Preparer(recipe=Recipe(text=text, image=image), tokenizer=load_tokenizer())
    dataset = dataset_class(f"{shards}/numbered.py:CustomDataset")()
    want = {sample.key: sample for sample in (prepare(dataset.get(i)) for i in (0, 1, 3))}
    for i in range(3):
        found = reader.read(i)
        sample = want.pop(found.key)
        assert np.array_equal(found.tokens, sample.tokens)
        assert np.array_equal(found.images[0].pixels, sample.images[0].pixels)
    assert not want
