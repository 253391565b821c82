"""Placeholders of media: the spellings of the common families, and what only looks like one."""

import pytest

from preprocess.text import media_placeholder

SPELLINGS = {
    "llava": ["<image>", "<video>", "<im_patch>", "<im_start>", "<im_end>"],
    "trainers": ["<image>", "<video>", "<audio>"],
    "qwen-vl": ["<img>http://a.org/b.png</img>", "<img></img>"],
    "qwen2-vl": ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"],
    "qwen-omni": ["<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>"],
    "internvl": ["<IMG_CONTEXT>", "<image>", "<tile_global_thumbnail>"],
    "internlm-xcomposer": ["<ImageHere>"],
    "minicpm-v": ["<image>", "<image_id>", "<video>"],
    "phi": ["<|image_1|>", "<|image_12|>", "<|audio_1|>", "<|image|>\t<|image_2|>"],
    "gemma": ["<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_audio>"],
    "pixtral": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"],
    "deepseek-vl": ["<image_placeholder>", "<begin_of_image>", "<image>"],
    "glm": ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>"],
    "llama 4": ["<|image_start|>", "<|image_end|>"],
    "idefics": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_2>"],
    "kimi": ["<|media_pad|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>"],
    "paligemma, florence": ["<image>"],
    "mmmu": ["<image 1>", "<image 12>"],
    "mantis, interleave": ["<image1>", "<image_1>", "<image-1>", "<video_1>"],
    "molmo": ["<im_col>", "<low_res_im_start>", "<im_low>", "<frame_start>", "<|video|>"],
    "ms-swift": ["<image>", "<ref-object>", "<bbox>"],
    "chameleon, emu": ["<boi>", "<eoi>", "<|image_token|>", "<|image start|>"],
}

TEXTS = [
    *("<|image|>", "an image", "<images>", "<imagine>", "image>", "<image", "< image >"),
    *('<img src="a.png">', "the <img> tag", "</img>", '<video controls src="x">', "<picture>"),
    *("List<Image>", "Promise<Video>", "std::vector<Image>", "[IMAGE]", "[img]", "a[IMGS]"),
    *("<|user|>", "<b>", "<image_url>", "<audio src=1>", "x < image > y", "<row_1>", "<frame>"),
    *("<bbox>[1, 2, 3, 4]</bbox>", "<ref>a</ref>"),
    "<img>" + "x" * 600 + "</img>",
]


@pytest.mark.parametrize("family", SPELLINGS)
def test_placeholders_of_a_family_are_found(family):
    for spelled in SPELLINGS[family]:
        found = media_placeholder(f"Look: {spelled}\nWhat is it?")
        assert found is not None, spelled
        assert found in spelled


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_only_looks_like_one_is_text(text):
    assert media_placeholder(f"a {text} b") is None
