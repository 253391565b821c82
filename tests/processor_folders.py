"""Folders of models that have no family here: they go through their own processors."""

from tests.model_folders import (
    PADS,
    PIXELS,
    TOWER,
    VISION,
    processor_of,
    text_config,
    tokenizer,
    write_json,
)

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}@{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template for the models below; "@" is what their processor replaces."""

SMALL_AREA = {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 40}}
SMALL = {"size": {"height": 56, "width": 56}}
IMAGE = {"image_token": "<image>"}
GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
AYA = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL")
OCR = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "image_token": "<IMG_CONTEXT>",
}

KINDS = {
    "aya_vision": (
        {**SMALL, "max_patches": 6},
        {"patch_size": 14, "img_size": 56, "downsample_factor": 2},
        {"named": IMAGE, "tokens": AYA},
    ),
    "video_llama_3": ({"min_pixels": 784, "max_pixels": 31360}, {}, {}),
    "glm4v": (SMALL_AREA, {}, {"tokens": GLM}),
    "glm46v": (SMALL_AREA, {}, {"tokens": GLM}),
    "deepseek_vl": (
        {"size": {"height": 56, "width": 56}},
        {"num_image_tokens": 4},
        {"named": IMAGE},
    ),
    "deepseek_vl_hybrid": (
        {**SMALL, "high_res_size": {"height": 112, "width": 112}},
        {"num_image_tokens": 4},
        {"named": IMAGE},
    ),
    "ovis2": (
        {**SMALL, "max_patches": 6, "crop_to_patches": True},
        {"image_seq_length": 4},
        {"tokens": ("<image>", "<IMG_ATOM>")},
    ),
    "aria": ({"max_image_size": 490, "min_image_size": 56}, {}, {"named": IMAGE}),
    "vipllava": (
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        {"patch_size": 14, "num_additional_image_tokens": 1}
        | {"vision_feature_select_strategy": "default"},
        {"named": IMAGE},
    ),
    "qianfan_ocr": (
        {**SMALL, "max_patches": 6},
        {"image_seq_length": 4},
        {"named": OCR, "tokens": ("<image>",)},
    ),
    "paddleocr_vl": (
        {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 40},
        {},
        {"named": {"image_token": "<|IMAGE_PLACEHOLDER|>"}},
    ),
    "exaone4_5": (PIXELS, {}, {}),
    "hyperclovax_vision_v2": (PIXELS, {}, {}),
    "cohere_compass": (
        {"do_convert_rgb": True},
        {},
        {"tokens": ("<|IMAGE_PAD|>", "<|VIDEO_PAD|>")},
    ),
    "cosmos3_edge": (SMALL_AREA, {}, {}),
    "lighton_ocr": (
        {"size": {"longest_edge": 112}, "patch_size": 14},
        {"patch_size": 14, "spatial_merge_size": 2},
        {
            "named": {"image_token": "<|image_pad|>", "image_break_token": "<b>"}
            | {"image_end_token": "<e>"}
        },
    ),
}
"""Models without a family here: settings of the image processor and the processor, tokens."""


def _tower(kind, size=56, patch=14, **more):
    return {"model_type": kind, **TOWER, "image_size": size, "patch_size": patch, **more}


SIGLIP = _tower("siglip_vision_model", vision_use_head=False)
QWEN = {
    **{"depth": 2, "num_heads": 4, "patch_size": 14, "fullatt_block_indexes": [1]},
    **{"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48},
}
CONFIGS = {
    "aya_vision": {"vision_config": SIGLIP, "downsample_factor": 2},
    "deepseek_vl": {"vision_config": _tower("siglip_vision_model", patch=28)},
    "ovis2": {
        "vision_config": _tower("ovis2_visual", hidden_stride=2, vocab_size=32),
        "hidden_size": 32,
    },
    "exaone4_5": {
        "vision_config": {"model_type": "exaone4_5_vision", "num_key_value_heads": 4, **QWEN}
    },
    "hyperclovax_vision_v2": {"vision_config": {"model_type": "qwen2_5_vl_vision", **QWEN}},
    "lighton_ocr": {
        "vision_config": _tower("pixtral", 112, head_dim=8),
        "spatial_merge_size": 2,
    },
    "qianfan_ocr": {
        "vision_config": _tower("qianfan_ocr_vision", [56, 56], [14, 14]),
        "image_seq_length": 4,
    },
    "video_llama_3": {"vision_config": _tower("video_llama_3_vision")},
    "vipllava": {
        "vision_config": _tower("clip_vision_model", projection_dim=32),
        "vision_feature_layers": [-2, -1],
    },
}
"""What the configurations of tiny models have."""

TEXTS = {
    "exaone4_5": "exaone4",
    "hyperclovax_vision_v2": "hyperclovax",
    "lighton_ocr": "qwen3",
    "qianfan_ocr": "qwen3",
    "video_llama_3": "qwen2",
}
"""Their text models, where those are not Llama's."""


MARKERS = {
    "aya_vision": "<image>",
    "cohere_compass": "<|IMAGE_PAD|>",
    "glm4v": "<|image|>",
    "glm46v": "<|image|>",
    "ovis2": "<image>",
    "qianfan_ocr": "<image>",
}
"""What a template writes, where it is not the token that features replace."""

SOFT = {"aya_vision": "<|IMG_PATCH|>", "ovis2": "<IMG_ATOM>", "qianfan_ocr": "<IMG_CONTEXT>"}


def write(kind, folder):
    """Writes the folder of a model that goes through its own processor; tiny if in `CONFIGS`."""
    from transformers import AutoConfig
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    images, settings, tokens = KINDS[kind]
    folder.mkdir(parents=True)
    marker = MARKERS.get(kind, tokens.get("named", {}).get("image_token", "<|image_pad|>"))
    loaded = tokenizer(folder, template=TEMPLATE.replace("@", marker), named=tokens.get("named"))
    added = [*VISION, *PADS, *tokens.get("tokens", ())]
    loaded.add_special_tokens({"additional_special_tokens": added})
    loaded.save_pretrained(str(folder))
    config = {"model_type": kind}
    if kind in CONFIGS:
        text = {**text_config(len(loaded) + 8), "model_type": TEXTS.get(kind, "llama")}
        soft = SOFT.get(kind, marker)
        made = AutoConfig.for_model(kind, text_config=text, **CONFIGS[kind])
        made.image_token_id = loaded.convert_tokens_to_ids(soft)
        config = made.to_dict()
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", images)
    document = {"processor_class": PROCESSOR_MAPPING_NAMES[kind], **settings}
    write_json(folder / "processor_config.json", document)
    return folder


def processor(kind, folder):
    """Makes transformers' own processor of a folder, with Pillow's resize and without videos."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import (
        PROCESSOR_MAPPING_NAMES,
        processor_class_from_name,
    )

    found = processor_class_from_name(PROCESSOR_MAPPING_NAMES[kind])
    image_kind = IMAGE_PROCESSOR_MAPPING_NAMES[kind]["pil"]
    return processor_of(found, image_kind, KINDS[kind][1], folder)


def model(kind, folder):
    """Makes the tiny model of a folder, of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(str(folder))
    return AutoModelForImageTextToText.from_config(config).float().eval()
