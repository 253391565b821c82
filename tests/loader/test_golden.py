"""Published worked numbers: Molmo 1's 480x640 example, end to end through `assemble`."""

import numpy as np

from loader.assembly.assemble import assemble
from loader.assembly.layout import TokenIds
from loader.assembly.view import View
from shardspec.sample import PreparedImage, PreparedSample, spans_table
from shardspec.tiling import ImageTokenIds, ImageView

MOLMO_1 = ImageView(
    size_px=336,
    patch_px=14,
    crop_mode="overlap-and-resize-c2",
    max_crops=12,
    fit="pad",
    pooling="per-crop",
    overview_column_tokens=True,
)
BOS, EOS, IM_END, IM_COL, IM_PATCH = 1, 2, 102, 104, 103
IDS = TokenIds(
    bos=BOS,
    eos=EOS,
    pad=0,
    image=ImageTokenIds(
        im_start=101, im_end=IM_END, im_patch=IM_PATCH, im_col=IM_COL, low_res_im_start=105
    ),
)


def molmo_1_example():
    """480 x 640, conversations (10 11 -> 20 21 22) and (12 -> 23)."""
    pixels = np.full((480, 640, 3), 128, np.uint8)
    image = PreparedImage(pixels=pixels, source_width=640, source_height=480)
    tokens = np.array([10, 11, 20, 21, 22, 12, 23], "<i4")
    one = 1_000_000
    texts = [(0, 0, 0, 2, 2, 5, one), (1, 0, 5, 6, 6, 7, one)]
    sample = PreparedSample(
        key="k", tokens=tokens, spans=spans_table(texts, [image]), images=(image,)
    )
    view = View(
        image=MOLMO_1,
        pixels="patches",
        normalize="openai",
        image_map="per_token",
        tree="molmo1",
        loss="root_subsegments",
        branch_order="stored",
    )
    return assemble(sample, np.random.RandomState(0), view=view, ids=IDS)


def test_sequence_of_molmo_1_has_749_tokens_with_the_published_tail():
    example = molmo_1_example()
    assert example["input_ids"].shape == (749,)
    assert example["input_ids"][0] == BOS
    assert example["input_ids"][-9:].tolist() == [IM_END, 10, 11, 20, 21, 22, EOS, 12, 23]
    assert example["labels"][-9:].tolist() == [-100, -100, 20, 21, 22, EOS, -100, 23, EOS]
    assert example["subsegment_ids"][-9:].tolist() == [10000, 1, 1, 1, 1, 1, 1, 2, 2]
    assert example["position_ids"][-9:].tolist() == [740, 741, 742, 743, 744, 745, 746, 741, 742]
    weights = [0, 0, 0.707, 0.707, 0.707, 0.707, 0, 0.707, 0.707]
    assert np.round(example["loss_weights"][-9:], 3).tolist() == np.float32(weights).tolist()
    assert (example["labels"][:-7] == -100).all()


def test_pictures_of_molmo_1_have_seven_crops_and_their_tokens_in_place():
    example = molmo_1_example()
    assert example["images"].shape == (7, 576, 588)
    assert example["images"].dtype == np.float32
    assert example["image_masks"].shape == (7, 576)
    idx = example["image_input_idx"]
    assert idx.shape == (7, 144)
    # The overview is the first crop: its first row stands at 2..13, a column token at 14.
    assert idx[0, :13].tolist() == [*range(2, 14), 15]
    assert example["input_ids"][14] == IM_COL
    placed = np.sort(idx[idx >= 0])
    assert placed.tolist() == np.flatnonzero(example["input_ids"] == IM_PATCH).tolist()
