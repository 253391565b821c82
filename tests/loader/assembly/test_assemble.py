from dataclasses import replace

import numpy as np
import pytest

from loader.assembly.assemble import assemble
from loader.assembly.augment import Augment, Draw, draw
from loader.assembly.collate import MMCollator
from loader.assembly.layout import TokenIds
from loader.assembly.pixels import normalize, render
from loader.assembly.view import View
from shardspec.errors import ConfigError, SampleError
from shardspec.sample import Geometry, PreparedImage, image_rows, spans_table, text_rows
from shardspec.tiling import (
    ImageTokenIds,
    ImageView,
    image_input_idx,
    image_masks,
    num_crops,
    num_image_tokens,
    token_pooling,
)

IDS = TokenIds(
    bos=1,
    eos=2,
    pad=0,
    image=ImageTokenIds(im_start=128, im_end=129, im_patch=130, im_col=131, low_res_im_start=132),
)
SMALL = ImageView(size_px=28, patch_px=14, pool=(1, 1))
TILED = {
    "global": ImageView(size_px=112, crop_mode="overlap-and-resize-c2", margin_patches=(2, 2)),
    "global, uneven": ImageView(
        size_px=126, crop_mode="overlap-and-resize-c2", margin_patches=(1, 2), fit="pad"
    ),
    "per-crop": ImageView(
        size_px=112,
        crop_mode="overlap-and-resize-c2",
        margin_patches=(2, 2),
        pooling="per-crop",
        overview_start="low_res_im_start",
        overview_column_tokens=True,
    ),
}
AUGMENTED = View(image=SMALL, augment=Augment.standard())


def example_of(sample, *, seed=0, view=AUGMENTED):
    return assemble(sample, np.random.RandomState(seed), view=view, ids=IDS)


def arrays(example):
    return {k: (v.dtype, v.shape, v.tobytes()) for k, v in example.items() if k != "metadata"}


def with_geometry(sample, geometry):
    """Changes what augmentation the images of a sample allow."""
    spans = sample.spans.copy()
    image_rows(spans)[:, 7] = int(geometry)
    return replace(sample, spans=spans)


def picture(width, height):
    pixels = np.random.RandomState(width).randint(0, 256, (height, width, 3), np.uint8)
    return PreparedImage(pixels=pixels, source_width=width, source_height=height)


@pytest.fixture(scope="module")
def rich(tiny_sample):
    """Two branches of three variants, two images."""
    return tiny_sample(7, num_images=2, num_branches=2, num_variants=3, size=(60, 40))


def test_same_seed_gives_the_same_example_and_another_one_does_not(rich):
    first, again, other = (example_of(rich, seed=seed) for seed in (3, 3, 4))
    assert arrays(first) == arrays(again)
    assert arrays(first) != arrays(other)
    sizes = [dict(width=i.source_width, height=i.source_height, crops=1) for i in rich.images]
    assert first["metadata"] == {"key": "sample-0007", "images": sizes, "dropped_branches": 0}


def test_variants_are_drawn_then_the_order_of_branches_and_then_each_image(rich):
    for seed in range(20):
        rng = np.random.RandomState(seed)
        chosen = [rng.randint(0, 3) for _ in range(2)]
        order = rng.permutation(2).tolist()
        draws = [
            draw(Augment.standard(), rng, geometry=Geometry.ALL, width=60, height=40)
            for _ in range(2)
        ]
        example = example_of(rich, seed=seed)
        rows = text_rows(rich.spans).reshape(2, 3, 8)
        text = np.concatenate(
            [rich.tokens[slice(*rows[b, chosen[b], c : c + 2])] for b in order for c in (3, 5)]
        )
        assert example["input_ids"][13:].tolist() == text.tolist()
        crops = [
            render(image.pixels, source_width=60, source_height=40, view=SMALL, draw=d)
            for image, d in zip(rich.images, draws, strict=True)
        ]
        want = np.concatenate(crops).transpose(0, 3, 1, 2)
        assert np.array_equal(example["images"], want)


def test_flags_of_the_images_change_neither_the_text_nor_the_next_image(rich):
    mixed = rich.spans.copy()
    image_rows(mixed)[0, 7] = int(Geometry.NONE)
    for seed in range(10):
        free = example_of(rich, seed=seed)
        fixed = example_of(replace(rich, spans=mixed), seed=seed)
        bare = example_of(with_geometry(rich, Geometry.NONE), seed=seed)
        assert free["input_ids"].tolist() == fixed["input_ids"].tolist()
        assert free["input_ids"].tolist() == bare["input_ids"].tolist()
        assert np.array_equal(free["images"][1], fixed["images"][1])
        assert not np.array_equal(free["images"][0], fixed["images"][0])


def test_every_variant_and_every_order_of_branches_is_drawn_equally_often(tiny_sample):
    sample = tiny_sample(1, num_images=0, num_branches=2, num_variants=4)
    rows = text_rows(sample.spans)
    rng = np.random.RandomState()
    counts = np.zeros((4, 4, 2), dtype=int)
    prompts = [sample.tokens[slice(*row[3:5])].tolist() for row in rows]
    responses = [sample.tokens[slice(*row[5:7])].tolist() for row in rows]
    texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    outcomes = {}
    for i in range(4):
        for j in range(4, 8):
            outcomes[tuple(texts[i] + texts[j])] = (i, j - 4, 0)
            outcomes[tuple(texts[j] + texts[i])] = (i, j - 4, 1)
    assert len(outcomes) == 32
    draws = 3200
    for seed in range(draws):
        rng.seed(seed)  # neighbouring seeds, as neighbouring samples have
        example = assemble(sample, rng, view=View(image=SMALL), ids=IDS)
        counts[outcomes[tuple(example["input_ids"][1:].tolist())]] += 1
    chi_square = ((counts - draws / 32) ** 2 / (draws / 32)).sum()
    assert chi_square < 70.0  # 31 degrees of freedom, p below 10**-4


def test_inference_takes_the_first_variant_and_leaves_pictures_alone(rich):
    inference = replace(AUGMENTED, purpose="inference")
    first, again = (example_of(rich, seed=seed, view=inference) for seed in (1, 2))
    assert arrays(first) == arrays(again)
    rows = text_rows(rich.spans).reshape(2, 3, 8)[:, 0]
    text = [rich.tokens[slice(*row[c : c + 2])] for row in rows for c in (3, 5)]
    assert first["input_ids"][13:].tolist() == np.concatenate(text).tolist()
    crops = [
        render(image.pixels, source_width=60, source_height=40, view=SMALL, draw=Draw())
        for image in rich.images
    ]
    assert np.array_equal(first["images"], np.concatenate(crops).transpose(0, 3, 1, 2))


def test_single_crop_is_placed_at_its_first_patch_token(rich):
    example = example_of(rich)
    assert example["input_ids"][:13].tolist() == [1] + [128, 130, 130, 130, 130, 129] * 2
    assert example["image_input_idx"].tolist() == [2, 8]
    assert example["image_end"].tolist() == [7, 13]
    assert example["image_masks"].tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("view", TILED.values(), ids=TILED.keys())
def test_crops_of_tiled_images_are_placed_at_their_first_patch_tokens(view, tiny_sample):
    images = [picture(300, 170), picture(90, 400), picture(20, 20)]
    text = tiny_sample(3, num_images=0, num_variants=1)
    row = text_rows(text.spans)[0, 1:].tolist()
    sample = replace(text, images=tuple(images), spans=spans_table([row], images))
    example = example_of(sample, view=View(image=view))
    start, masks, crop = 1, [], 0
    for image in images:
        size = (image.source_width, image.source_height)
        count, stop = num_crops(*size, view), start + num_image_tokens(*size, view)
        positions = start + np.flatnonzero(example["input_ids"][start:stop] == 130)
        pooled = token_pooling(*size, view)
        for c in range(count):
            in_crop = (pooled >= c * view.num_patches) & (pooled < (c + 1) * view.num_patches)
            assert example["image_input_idx"][crop + c] == positions[in_crop.any(axis=1)].min()
        if view.pooling == "per-crop":
            places = image_input_idx(*size, view, offset=start)
            want = np.where(places < 0, 10**6, places).min(axis=1)
            assert example["image_input_idx"][crop : crop + count].tolist() == want.tolist()
        assert example["image_end"][crop : crop + count].tolist() == [stop] * count
        assert example["input_ids"][stop - 1] == 129
        masks.append(image_masks(*size, view))
        want = render(
            image.pixels,
            source_width=image.source_width,
            source_height=image.source_height,
            view=view,
        )
        got = example["images"][crop : crop + count].transpose(0, 2, 3, 1)
        assert np.array_equal(got, want)
        start, crop = stop, crop + count
    assert crop == len(example["images"]) > len(images) + 3
    assert np.array_equal(example["image_masks"], np.concatenate(masks))
    assert example["position_ids"].tolist() == list(range(len(example["input_ids"])))


def test_text_alone_gives_image_arrays_of_no_rows(tiny_sample):
    example = example_of(tiny_sample(2, num_images=0))
    shapes = {k: (v.shape, str(v.dtype)) for k, v in example.items() if k.startswith("image")}
    assert shapes == {
        "images": ((0, 3, 28, 28), "uint8"),
        "image_masks": ((0, 4), "float32"),
        "image_input_idx": ((0,), "int64"),
        "image_end": ((0,), "int64"),
    }
    assert example["input_ids"][0] == 1


def test_examples_with_and_without_pictures_collate_together(tiny_sample):
    examples = [example_of(tiny_sample(i, num_images=i)) for i in range(3)]
    collate = MMCollator(sequence_length=64, image_shape=(3, 28, 28), num_patches=4)
    batch = collate(examples)
    assert batch["images"].shape == (3, 2, 3, 28, 28)
    assert batch["image_input_idx"].tolist() == [[-1, -1], [2, -1], [2, 8]]


def test_one_filter_is_drawn_for_all_images_of_a_sample_and_shifts_no_other_draw(rich):
    """Over seeds every filter appears; the rest of the example is that of the filter alone."""
    filters = ("bicubic", "bilinear-aliased", "nearest")
    base = Augment.standard()
    some = replace(AUGMENTED, augment=replace(base, resample=filters))
    found = set()
    for seed in range(12):
        got = arrays(example_of(rich, seed=seed, view=some))
        alone = {f: arrays(example_of(rich, seed=seed, view=replace(AUGMENTED, resample=f)))
                 for f in filters}  # fmt: skip
        assert list(alone.values()).count(got) == 1
        found.add(next(f for f in filters if alone[f] == got))
        assert got == arrays(example_of(rich, seed=seed, view=some))
    assert found == set(filters)


def test_filter_is_not_drawn_for_inference(rich):
    view = View(image=SMALL, purpose="inference")
    drawn = replace(view, augment=Augment(resample=("nearest", "bilinear")))
    assert arrays(example_of(rich, view=drawn)) == arrays(example_of(rich, view=view))


def test_unknown_filter_is_refused():
    with pytest.raises(ConfigError) as caught:
        View(resample="lanczos")
    assert caught.value.facts == {"resample": "lanczos"}


@pytest.mark.parametrize("kind", ["imagenet", "openai", "siglip"])
def test_pictures_are_normalised_where_the_view_says_so(kind, rich):
    plain = example_of(rich)["images"]
    images = example_of(rich, view=replace(AUGMENTED, normalize=kind))["images"]
    want = normalize(plain.transpose(0, 2, 3, 1), kind=kind).transpose(0, 3, 1, 2)
    assert plain.dtype == np.uint8
    assert images.dtype == np.float32
    assert np.array_equal(images, want)


def test_pictures_are_a_view_of_memory_with_channels_last(rich):
    images = example_of(rich)["images"]
    assert images.shape == (2, 3, 28, 28)
    assert images.transpose(0, 2, 3, 1).flags.c_contiguous


def test_read_only_pixels_as_mapped_shards_give_them_are_accepted(tiny_sample):
    sample = tiny_sample(5)
    pixels = sample.images[0].pixels.copy()
    pixels.setflags(write=False)
    frozen = replace(sample, images=(replace(sample.images[0], pixels=pixels),))
    for seed in range(5):
        assert arrays(example_of(frozen, seed=seed)) == arrays(example_of(sample, seed=seed))


def test_sequence_length_drops_branches_and_says_how_many(tiny_sample):
    sample = tiny_sample(4, num_branches=3, num_variants=1)
    short = example_of(sample, view=View(image=SMALL, sequence_length=12))
    assert len(short["input_ids"]) <= 12
    assert short["metadata"]["dropped_branches"] > 0


def test_images_beyond_the_sequence_length_name_the_sample(rich):
    with pytest.raises(SampleError) as caught:
        example_of(rich, view=View(image=SMALL, sequence_length=12))
    assert caught.value.reason == "image_cut"
    assert caught.value.where == "sample-0007"


def test_stored_order_of_branches_is_kept_where_asked_for(tiny_sample):
    sample = tiny_sample(4, num_branches=3, num_variants=1, num_images=0)
    rows = text_rows(sample.spans)
    text = [sample.tokens[slice(*row[c : c + 2])] for row in rows for c in (3, 5)]
    stored = View(image=SMALL, branch_order="stored")
    for seed in range(10):
        example = example_of(sample, seed=seed, view=stored)
        assert example["input_ids"][1:].tolist() == np.concatenate(text).tolist()


def test_high_resolution_is_drawn_for_its_share_of_the_samples(rich):
    view = View(image=SMALL, high_res=replace(SMALL, pool=(2, 2)), high_res_probability=0.25)
    lengths = [len(example_of(rich, seed=seed, view=view)["image_masks"]) for seed in range(4)]
    tokens = [(example_of(rich, seed=s, view=view)["input_ids"] == 130).sum() for s in range(400)]
    assert lengths == [2] * 4
    assert set(tokens) == {2, 8}
    assert 70 <= tokens.count(2) <= 130
    always = replace(view, high_res_probability=1.0)
    assert (example_of(rich, view=always)["input_ids"] == 130).sum() == 2
    inference = replace(always, purpose="inference")
    assert (example_of(rich, view=inference)["input_ids"] == 130).sum() == 8


def test_molmo_2_map_names_the_patches_of_every_image_token(rich):
    two = replace(SMALL, size_px=56, pool=(2, 2))
    example = example_of(rich, view=View(image=two, image_map="pooling"))
    pooled = token_pooling(60, 40, two)
    want = np.concatenate([pooled, np.where(pooled < 0, -1, pooled + two.num_patches)])
    assert example["token_pooling"].tolist() == want.tolist()
    assert len(want) == (example["input_ids"] == 130).sum()


def test_molmo_1_map_places_every_token_of_every_crop(rich):
    example = example_of(rich, view=View(image=SMALL, image_map="per_token"))
    assert example["image_input_idx"].tolist() == [[2, 3, 4, 5], [8, 9, 10, 11]]


def test_patches_are_the_crops_cut_up(rich):
    crops = example_of(rich, view=View(image=SMALL))["images"]
    patches = example_of(rich, view=View(image=SMALL, pixels="patches"))["images"]
    assert patches.shape == (2, 4, 14 * 14 * 3)
    corner = crops[1, :, 14:, :14].transpose(1, 2, 0)
    assert patches[1, 2].tolist() == corner.ravel().tolist()


def test_weight_of_the_view_multiplies_the_loss_and_nothing_else(rich):
    plain, light = (example_of(rich, view=View(image=SMALL, weight=w)) for w in (1.0, 0.25))
    assert light["loss_weights"].dtype == np.float32
    assert light["loss_weights"].tolist() == (plain["loss_weights"] / 4).tolist()
    assert light["labels"].tolist() == plain["labels"].tolist()


def test_sample_of_too_many_images_is_refused_by_its_key(rich):
    example_of(rich, view=View(image=SMALL, max_images=2))
    with pytest.raises(SampleError) as caught:
        example_of(rich, view=View(image=SMALL, max_images=1))
    assert caught.value.reason == "too_many_images"
    assert caught.value.where == "sample-0007"


@pytest.mark.parametrize(
    "settings",
    [
        {"high_res_probability": 1.5, "high_res": SMALL},
        {"high_res_probability": 0.5},
        {"high_res": replace(SMALL, size_px=42)},
        {"weight": -0.1},
    ],
)
def test_impossible_settings_of_a_view_are_refused(settings):
    with pytest.raises(ConfigError) as caught:
        View(image=SMALL, **settings)
    assert caught.value.reason == "view"
