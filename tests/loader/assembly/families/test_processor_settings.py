"""No setting of an image processor is ignored: families do as the processor, or refuse it."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from loader.assembly.families.kernels import unit_shape, write_units
from shardspec.errors import ConfigError, SampleError
from shardspec.families import ModelConfig, read_family
from shardspec.families.settings import CLASSES, OF_MODELS
from tests import model_folders, video_processors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

SIZES = ((61, 97), (200, 150), (150, 40), (56, 56))
"""(height, width)."""

NOT_OF_PIXELS = {"device", "return_tensors", "disable_grouping", "image_seq_length"}
"""Where, in which container, and a number that only PaliGemma's processor reads."""

SQUARES = [{"height": side, "width": side} for side in (28, 56, 84)]
EDGES = [{"shortest_edge": 56}, {"longest_edge": 56}, {"shortest_edge": 28, "longest_edge": 112}]
AREAS = [{"shortest_edge": 1568, "longest_edge": 3136}, {"longest_edge": 112}]
FLAGS = [False, True]
CHANGES = {
    "do_convert_rgb": FLAGS,
    "do_resize": FLAGS,
    "do_rescale": FLAGS,
    "do_normalize": FLAGS,
    "rescale_factor": [1 / 127.5, 1 / 255],
    "image_mean": [0.5, [0.1, 0.2, 0.3]],
    "image_std": [0.5, [0.1, 0.2, 0.3]],
    "resample": [0, 1, 2, 3, 4, 5],
    "size": [28, 56, *SQUARES, {"height": 56, "width": 84}, *EDGES, *AREAS],
    "default_to_square": FLAGS,
    "crop_size": [28, 56, *SQUARES, {"height": 28, "width": 56}],
    "do_center_crop": FLAGS,
    "do_pad": FLAGS,
    "pad_size": [{"height": 200, "width": 200}],
    "data_format": ["channels_first", "channels_last"],
    "input_data_format": ["channels_last"],
    "image_seq_length": [9, 16],
    "min_pixels": [28 * 28 * 9],
    "max_pixels": [28 * 28 * 5],
    "patch_size": [7, 28],
    "temporal_patch_size": [1, 3],
    "merge_size": [1, 3],
    "image_grid_pinpoints": [[[56, 112]], [[112, 112], [56, 56]]],
    "crop_to_patches": FLAGS,
    "min_patches": [2],
    "max_patches": [1, 3],
    "do_image_splitting": FLAGS,
    "max_image_size": [{"longest_edge": 56}, {"longest_edge": 20}, {"height": 28, "width": 28}],
    "return_row_col_info": FLAGS,
    "use_square_size": FLAGS,
    "do_pan_and_scan": [False],
    "pan_and_scan_min_crop_size": [9],
    "pan_and_scan_max_num_crops": [2],
    "pan_and_scan_min_ratio_to_activate": [1.0],
}
"""Values of each setting; of `do_pan_and_scan` tests/e2e/test_pan_and_scan.py tries the other."""

BESIDE = [
    {"do_center_crop": True, "crop_size": SQUARES[0]},
    {"do_center_crop": False, "crop_size": SQUARES[0]},
    {"do_center_crop": False, "crop_size": None},
    {"do_pad": True, "pad_size": {"height": 200, "width": 200}},
    *({"size": 56, "default_to_square": flag} for flag in FLAGS),
    *({"size": size, "do_center_crop": flag} for flag in FLAGS for size in (SQUARES[0], EDGES[0])),
]
"""Settings that mean something beside each other."""


def image_class(name):
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name

    return get_image_processor_class_from_name(f"{name}ImageProcessorPil")


def fields_of(kind):
    found = set()
    for base in kind.valid_kwargs.__mro__:
        found |= set(getattr(base, "__annotations__", {}))
    return found


def plain(value):
    if isinstance(value, list | tuple):
        return tuple(plain(each) for each in value)
    return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.endswith("Video")])
def test_what_files_leave_out_is_what_the_class_has(name):
    kind, known = image_class(name), CLASSES[name].known
    fields = fields_of(kind)
    assert fields <= known.keys() | NOT_OF_PIXELS | {"min_pixels", "max_pixels"}
    assert fields <= CHANGES.keys() | NOT_OF_PIXELS
    for field, value in known.items():
        if field in fields and not field.startswith("pan_and_scan") and field != "data_format":
            assert plain(getattr(kind, field, None)) == plain(value), field


@pytest.mark.parametrize("name", ["Qwen2VLVideo", "Qwen3VLVideo"])
def test_what_files_of_videos_leave_out_is_what_the_class_has(name):
    kind = video_processors.video_class("qwen2_vl" if name == "Qwen2VLVideo" else "qwen3_vl")
    for field, value in CLASSES[name].known.items():
        if hasattr(kind, field) and field not in ("data_format", "return_tensors"):
            assert plain(getattr(kind, field)) == plain(value), field


FAMILIES = {
    **{name: (write, name) for name, write in model_folders.WRITERS.items()},
    "smolvlm": (lambda folder: model_folders.idefics3(folder, kind="smolvlm"), "idefics3"),
    "paligemma": (model_folders.paligemma, "paligemma"),
    "siglip": (model_folders.llava, "llava"),
}
"""How to write the folder of a model, and the name of its processor in `model_folders`."""


class Files:
    """The files of a model and what makes its processor with other settings of pictures."""

    def __init__(self, name, folder):
        write, self.title = FAMILIES[name]
        write(folder)
        self.base = json.loads((folder / "preprocessor_config.json").read_text())
        if name == "siglip":
            size = {"size": SQUARES[1], "resample": 3, **model_folders.HALF}
            self.base = {"image_processor_type": "SiglipImageProcessor", **size}
        self.config = json.loads((folder / "config.json").read_text())
        path = folder / "processor_config.json"
        self.processor = json.loads(path.read_text()) if path.exists() else {}
        self.theirs = model_folders.processor(self.title, folder)
        kind = self.config["model_type"]
        self.kind = image_class(
            self.base.get("image_processor_type", OF_MODELS[kind][0]).removesuffix("ImageProcessor")
        )
        tokenizer = self.theirs.tokenizer
        token = self.config.get("image_token_id", self.config.get("image_token_index"))
        self.soft_id, self.token = token, tokenizer.convert_ids_to_tokens(token)

    def family(self, images):
        return read_family(
            ModelConfig(
                config=self.config,
                image_processor=images,
                processor=self.processor,
                image_token=self.token,
            )
        )

    def same(self, family, images, sizes=SIZES):
        """Compares a family with the processor; False if the processor takes no such settings."""
        given = {k: v for k, v in images.items() if k != "image_processor_type"}
        marker = getattr(self.theirs, "boi_token", None) or self.token
        try:
            self.theirs.image_processor = self.kind(**copy.deepcopy(given))
            if self.title == "paligemma":
                self.theirs.image_seq_length = self.theirs.image_processor.image_seq_length
            made = [
                self.theirs(
                    text=[marker], images=[[picture(size)]], return_tensors="np", **more(self.title)
                )
                for size in sizes
            ]
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
            return False
        for size, own in zip(sizes, made, strict=True):
            plan = family.plan(size)
            soft = sum(count for symbol, count in plan.layout if symbol == family.image_token)
            assert soft * plan.num_blocks == (own["input_ids"] == self.soft_id).sum()
            out = np.full((plan.num_units, *unit_shape(family, [plan])), np.nan, np.float32)
            write_units(family, plan, np.asarray(picture(size)), out, backend="pil")
            want = np.asarray(own["pixel_values"])
            assert out.size == want.size
            np.testing.assert_array_equal(out, want.reshape(out.shape))
        return True


def more(title):
    return {"add_special_tokens": False} if title != "paligemma" else {}


def picture(size):
    levels = np.random.RandomState(sum(size)).randint(0, 256, (*size, 3))
    return Image.fromarray(levels.astype(np.uint8))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_setting_is_the_processors_or_refused(tmp_path, name):
    files = Files(name, tmp_path / "m")
    assert files.same(files.family(files.base), files.base)
    cases = [{field: value} for field, values in CHANGES.items() for value in values]
    cases += [{field: None} for field in files.base if field != "image_processor_type"]
    reasons = ("family_setting", "family_field")
    done = dict.fromkeys(("the same", "refused by the processor", *reasons), 0)
    for case in [*cases, *BESIDE]:
        if not case.keys() <= fields_of(files.kind) | {"use_square_size"}:
            continue
        images = {**files.base, **case}
        if files.title == "idefics3" and case.get("size") == AREAS[0]:
            continue  # thousands of tiles
        try:
            family = files.family(images)
        except ConfigError as error:
            done[error.reason] += 1
            continue
        try:
            done["the same" if files.same(family, images) else "refused by the processor"] += 1
        except AssertionError as error:
            raise AssertionError(f"{name} with {case} is another") from error
    assert min(done["the same"], done["family_setting"]) > 5


EXTREME = [(1, 1), (1, 2), (2, 1), (1, 97), (97, 1), (3, 500), (500, 3), (28, 5600), (8000, 41)]
EXTREME += [(41, 8000), (7, 7), (29, 28), (1, 8000), (8000, 1)]
MANY = [*EXTREME, *map(tuple, np.random.RandomState(5).randint(1, 300, (300, 2)).tolist())]


@pytest.mark.parametrize("name", FAMILIES)
def test_any_size_is_what_the_processor_makes_of_it(tmp_path, name):
    files = Files(name, tmp_path / "m")
    family, refused = files.family(files.base), []
    for size in MANY:
        try:
            # Refused when it is stored: the centre of a picture of millions of pixels.
            family.plan(size), family.stored_size(size)
        except SampleError as error:
            refused.append((size, error.reason))
            continue
        assert files.same(family, files.base, [size]), size
    assert {reason for _, reason in refused} <= {"picture_shape"}
    assert {size for size, _ in refused} <= {*EXTREME}
