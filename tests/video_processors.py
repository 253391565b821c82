"""Video processors of transformers, without torchvision: three functions of it are written here."""

import contextlib
import enum
import functools
import importlib.util
import sys
import types

import pytest
import torch


class InterpolationMode(enum.Enum):
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def resize(image, size, interpolation=None, antialias=True):
    if tuple(size) == tuple(image.shape[-2:]):
        return image
    flat = torch.nn.functional.interpolate(
        image.flatten(0, -4), size=tuple(size), mode=interpolation.value, antialias=antialias
    )
    return flat.reshape(*image.shape[:-2], *size)


def normalize(image, mean, std, inplace=False):
    mean, std = (torch.as_tensor(part, dtype=image.dtype)[:, None, None] for part in (mean, std))
    return image.sub(mean).div_(std)


@contextlib.contextmanager
def torchvision():
    """Gives the processors what they need of it."""
    from transformers import image_processing_backends, video_processing_utils

    stubs = _torchvision()
    functional = stubs["torchvision.transforms.v2.functional"]
    filters = {2: InterpolationMode.BILINEAR, 3: InterpolationMode.BICUBIC}
    with pytest.MonkeyPatch.context() as patch:
        for module in (image_processing_backends, video_processing_utils):
            patch.setattr(module, "tvF", functional, raising=False)
        patch.setattr(image_processing_backends, "pil_torch_interpolation_mapping", filters)
        yield


def _torchvision():
    """The modules that the processors import."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")
    modules = {name: types.ModuleType(name) for name in names}
    functional = types.ModuleType(f"{names[2]}.functional")
    functional.InterpolationMode = InterpolationMode
    functional.resize, functional.normalize = resize, normalize
    functional.grayscale_to_rgb = lambda image: image
    modules[names[2]].functional = functional
    return {**modules, functional.__name__: functional}


@functools.cache
def video_class(kind):
    """Loads the file of a processor past the check for torchvision."""
    import transformers

    stubs = _torchvision()
    name = f"transformers.models.{kind}.loaded_for_tests"
    path = f"{transformers.__path__[0]}/models/{kind}/video_processing_{kind}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for each, stub in {**stubs, name: module}.items():
            patch.setitem(sys.modules, each, stub)
        spec.loader.exec_module(module)
    title = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}[kind]
    return getattr(module, title)


def video_processor(kind, **settings):
    """Makes the video processor of Qwen2-VL, 2.5 or 3."""
    own = "qwen3_vl" if kind == "qwen3_vl" else "qwen2_vl"
    return video_class(own)(**settings, do_sample_frames=False, cap_pixels_per_frame=False)


def processor(kind, folder, *, videos):
    """Makes transformers' processor of a folder, with Pillow's pictures and these videos."""
    import json

    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
    from transformers.models.auto.processing_auto import processor_class_from_name
    from transformers.processing_utils import ProcessorMixin

    titles = {
        "qwen2_vl": "Qwen2VLProcessor",
        "qwen2_5_vl": "Qwen2_5_VLProcessor",
        "qwen3_vl": "Qwen3VLProcessor",
    }
    images = json.loads((folder / "preprocessor_config.json").read_text())
    images.pop("image_processor_type")
    loaded = AutoTokenizer.from_pretrained(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        return processor_class_from_name(titles[kind])(
            image_processor=get_image_processor_class_from_name("Qwen2VLImageProcessorPil")(
                **images
            ),
            tokenizer=loaded,
            video_processor=videos,
            chat_template=loaded.chat_template,
        )
