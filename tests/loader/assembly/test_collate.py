import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.assembly.collate import IGNORE_INDEX, MMCollator
from shardspec.errors import ConfigError, SampleError
from tests.examples import examples

SHAPE = (3, 4, 6)
PATCHES = 5
KEYS = {"input_ids", "labels", "images", "image_masks", "image_input_idx", "attention_mask"}
EXTRAS = ("position_ids", "subsegment_ids", "loss_weights")


def collator(**settings_):
    return MMCollator(
        **{"sequence_length": 64, "image_shape": SHAPE, "num_patches": PATCHES, **settings_}
    )


def example(length, num=0, *, seed=0, key=None, dtype=np.uint8, channels_last=True):
    rng = np.random.RandomState(seed)
    channels, height, width = SHAPE
    made = {
        "input_ids": rng.randint(1, 1000, length),
        "labels": rng.randint(0, 1000, length),
        "position_ids": np.arange(length),
        "subsegment_ids": rng.randint(0, 5, length),
        "loss_weights": rng.random_sample(length).astype(np.float32),
        "metadata": {} if key is None else {"key": key},
    }
    if num:
        pixels = rng.randint(0, 256, (num, height, width, channels)).astype(dtype)
        images = pixels.transpose(0, 3, 1, 2)
        made["images"] = images if channels_last else np.ascontiguousarray(images)
        made["image_masks"] = rng.random_sample((num, PATCHES)).astype(np.float32)
        made["image_input_idx"] = np.sort(rng.randint(0, max(length, 1), num)).astype(np.int32)
    return made


# --------------------------------------------------------------------------------- pad modes


@pytest.mark.parametrize(
    ("pad_mode", "lengths", "want"),
    [
        ("max_len", [3, 7], 64),
        ("batch_max", [3, 7], 7),
        ("to_5", [3, 7], 10),
        ("to_5", [3, 10], 10),
        ("to_1", [3, 7], 7),
        ("to_128", [3, 7], 64),
        ("to_50", [3, 51], 64),
    ],
)
def test_pad_mode_sets_the_length_of_the_batch(pad_mode, lengths, want):
    batch = collator(pad_mode=pad_mode)([example(length) for length in lengths])
    for key in ("input_ids", "labels", "attention_mask"):
        assert batch[key].shape == (2, want)


@pytest.mark.parametrize("pad_mode", ["max_len", "batch_max", "to_8"])
def test_batch_has_exactly_the_promised_keys_shapes_types_and_padding(pad_mode):
    batch = collator(pad_mode=pad_mode, pad_token_id=9)([example(6, 2), example(3, 1, seed=1)])
    length = {"max_len": 64, "batch_max": 6, "to_8": 8}[pad_mode]
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in batch.items()} == {
        "input_ids": (torch.int64, (2, length)),
        "labels": (torch.int64, (2, length)),
        "images": (torch.uint8, (2, 2, *SHAPE)),
        "image_masks": (torch.float32, (2, 2, PATCHES)),
        "image_input_idx": (torch.int64, (2, 2)),
        "attention_mask": (torch.int64, (2, length)),
    }
    assert torch.all(batch["input_ids"][1, 3:] == 9)
    assert torch.all(batch["labels"][1, 3:] == -100)
    assert batch["attention_mask"].tolist() == [
        [1] * 6 + [0] * (length - 6),
        [1] * 3 + [0] * (length - 3),
    ]
    assert not batch["images"][1, 1].any()
    assert not batch["image_masks"][1, 1].any()
    assert batch["image_input_idx"][1, 1] == -1


def test_extra_keys_come_only_when_asked_for():
    rows = [example(4, key="a"), example(2, seed=1)]
    batch = collator(pad_mode="batch_max", extra_keys=EXTRAS, with_metadata=True)(rows)
    assert batch.keys() == KEYS | {*EXTRAS, "metadata"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    assert batch["subsegment_ids"][1, 2:].tolist() == [-1, -1]
    assert batch["subsegment_ids"].dtype == torch.int64
    assert batch["loss_weights"][1, 2:].tolist() == [0, 0]
    assert batch["loss_weights"].dtype == torch.float32
    assert batch["metadata"] == [{"key": "a"}, {}]
    assert collator()(rows).keys() == KEYS


# ------------------------------------------------------------------------------------ images


def empty_images():
    return {
        "images": np.empty((0, *SHAPE), np.uint8),
        "image_masks": np.empty((0, PATCHES), np.float32),
        "image_input_idx": np.empty(0, np.int32),
    }


def test_text_rows_beside_images_are_zeros():
    rows = [example(4), example(4, 2), example(4) | empty_images()]
    batch = collator()(rows)
    assert batch["images"].shape == (3, 2, *SHAPE)
    for row in (0, 2):
        assert not batch["images"][row].any()
        assert not batch["image_masks"][row].any()
        assert batch["image_input_idx"][row].tolist() == [-1, -1]
    assert np.array_equal(batch["images"][1].numpy(), rows[1]["images"])


@pytest.mark.parametrize(("max_images", "want"), [(None, 0), (0, 0), (3, 3)])
def test_batch_of_text_alone_keeps_the_image_keys(max_images, want):
    batch = collator(max_images=max_images)([example(4), example(5) | empty_images()])
    assert batch.keys() == KEYS
    assert batch["images"].shape == (2, want, *SHAPE)
    assert batch["images"].dtype == torch.uint8
    assert batch["image_masks"].shape == (2, want, PATCHES)
    assert not batch["images"].any()
    assert not batch["image_masks"].any()
    assert torch.all(batch["image_input_idx"] == -1)


def test_fixed_number_of_images_is_kept():
    batch = collator(max_images=4)([example(4, 1), example(4, 2)])
    assert batch["images"].shape == (2, 4, *SHAPE)
    assert batch["image_input_idx"].shape == (2, 4)


def test_pictures_in_channels_last_memory_stay_there():
    batch = collator()([example(4, 2), example(4, 1)])
    images = batch["images"]
    assert images.permute(0, 1, 3, 4, 2).is_contiguous()
    flat = images.flatten(0, 1)
    assert flat.data_ptr() == images.data_ptr()
    assert flat.is_contiguous(memory_format=torch.channels_last)


def test_pictures_in_channels_first_memory_stay_there():
    batch = collator()([example(4, 2, dtype=np.float32, channels_last=False), example(4)])
    assert batch["images"].is_contiguous()
    assert batch["images"].dtype == torch.float32


def test_memory_order_of_the_examples_never_changes_the_values():
    first, second = example(4, 2), example(6, 1, seed=1)
    other = second | {"images": np.ascontiguousarray(second["images"])}
    want = collator()([first, second])["images"]
    assert torch.equal(collator()([first, other])["images"], want)
    assert torch.equal(collator()([other, first])["images"].flip(0), want)


def test_batch_is_made_in_the_memory_that_is_given():
    given = []

    def allocate(shape, dtype):
        given.append(np.full(shape, 77, dtype))
        return given[-1]

    examples = [example(9, 1), example(5)]
    batch = collator(pad_mode="max_len")(examples, allocate=allocate)
    places = {array.ctypes.data for array in given}
    assert {tensor.data_ptr() for tensor in batch.values()} <= places
    want = collator(pad_mode="max_len")(examples)
    assert all(torch.equal(batch[name], want[name]) for name in want)


def test_batch_owns_its_memory():
    row = example(8, 1)
    batch = collator(pad_mode="batch_max", max_images=1)([row])
    want = {key: batch[key].clone() for key in KEYS}
    for key in ("input_ids", "labels", "images", "image_masks", "image_input_idx"):
        row[key][...] = 0
    assert all(torch.equal(batch[key], want[key]) for key in KEYS)


@given(
    rows=st.lists(st.tuples(st.integers(1, 64), st.integers(0, 4)), min_size=1, max_size=5),
    pad_mode=st.sampled_from(["max_len", "batch_max", "to_7", "to_128"]),
    max_images=st.sampled_from([None, 4, 6]),
    dtype=st.sampled_from([np.uint8, np.float32]),
    channels_last=st.booleans(),
)
@settings(max_examples=examples(100))
def test_unpadding_a_batch_gives_back_every_example(
    rows, pad_mode, max_images, dtype, channels_last
):
    examples = [
        example(length, num, seed=seed, dtype=dtype, channels_last=channels_last)
        for seed, (length, num) in enumerate(rows)
    ]
    make = collator(pad_mode=pad_mode, max_images=max_images, extra_keys=EXTRAS)
    batch = make(examples)
    for i, (want, (length, num)) in enumerate(zip(examples, rows, strict=True)):
        row = {key: batch[key][i].numpy() for key in batch}
        assert row["attention_mask"].sum() == length
        for key in ("input_ids", "labels", *EXTRAS):
            assert np.array_equal(row[key][:length], want[key])
        assert np.count_nonzero(row["image_input_idx"] >= 0) == num
        if num:
            for key in ("images", "image_masks", "image_input_idx"):
                assert np.array_equal(row[key][:num], want[key])
        for key, pad in (
            ("input_ids", 0),
            ("labels", IGNORE_INDEX),
            ("attention_mask", 0),
            ("position_ids", 0),
            ("subsegment_ids", -1),
            ("loss_weights", 0),
        ):
            assert np.all(row[key][length:] == pad)
        for key, pad in (("images", 0), ("image_masks", 0), ("image_input_idx", -1)):
            assert np.all(row[key][num:] == pad)


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("key", "where"), [("a17", "sample a17 (row 1 of the batch)"), (None, "row 1 of the batch")]
)
def test_overlong_example_is_refused_by_name_length_and_limit(key, where):
    with pytest.raises(SampleError) as error:
        collator(sequence_length=8)([example(8), example(9, key=key)])
    assert error.value.reason == "too_long"
    assert error.value.where == where
    assert error.value.facts == {"tokens": 9, "sequence_length": 8}


def test_truncation_keeps_the_first_tokens():
    row = example(12, 1) | {"image_input_idx": np.array([2]), "image_end": np.array([8])}
    batch = collator(sequence_length=8, overlong="truncate", extra_keys=EXTRAS)([row])
    for key in ("input_ids", "labels", *EXTRAS):
        assert np.array_equal(batch[key][0].numpy(), row[key][:8])
    assert torch.all(batch["attention_mask"] == 1)


@pytest.mark.parametrize(
    "place",
    [
        {"image_input_idx": np.array([2, 8])},
        {"image_input_idx": np.array([2, 4]), "image_end": np.array([4, 9])},
    ],
    ids=["start", "end"],
)
def test_truncation_never_cuts_an_image(place):
    make = collator(sequence_length=8, overlong="truncate")
    with pytest.raises(SampleError) as error:
        make([example(12, 2, key="a17") | place])
    assert error.value.reason == "image_cut"
    assert "a17" in error.value.where
    assert error.value.facts == {"tokens": 12, "sequence_length": 8, "image_end": 9}


def test_truncation_that_leaves_nothing_to_learn_is_refused():
    row = example(12, key="a17")
    row["labels"][:8] = IGNORE_INDEX
    make = collator(sequence_length=8, overlong="truncate")
    with pytest.raises(SampleError, match="a17") as error:
        make([row])
    assert error.value.reason == "no_loss"
    row["labels"][7] = 1
    assert make([row])["labels"][0, 7] == 1


def test_example_without_loss_that_fits_is_kept():
    row = example(4)
    row["labels"][:] = IGNORE_INDEX
    assert torch.all(collator()([row])["labels"] == IGNORE_INDEX)


def test_more_images_than_the_fixed_number_are_refused():
    with pytest.raises(SampleError, match="a17") as error:
        collator(max_images=2)([example(4, 1), example(9, 3, key="a17")])
    assert error.value.reason == "too_many_images"
    assert error.value.facts == {"images": 3, "max_images": 2}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"images": np.zeros((1, 3, 9, 9), np.uint8)}, "images has another shape"),
        ({"images": np.zeros((2, *SHAPE), np.uint8)}, "image_input_idx differ in length"),
        ({"images": np.zeros((1, *SHAPE), np.float64)}, "not uint8 or float32"),
        ({"images": np.zeros((1, *SHAPE), np.float32)}, "images of several types"),
        ({"image_masks": np.zeros((1, 7), np.float32)}, "image_masks has another shape"),
        ({"image_input_idx": np.zeros((1, 2), int)}, "image_input_idx has another shape"),
        ({"image_input_idx": np.zeros(2, int)}, "image_input_idx differ in length"),
        ({"image_end": np.zeros(2, int)}, "image_end has another shape"),
        ({"labels": np.zeros(3, int)}, "labels has another shape"),
        ({"labels": np.zeros(4)}, "labels is not of integers"),
        ({"image_masks": None}, "image_masks is missing"),
        ({"labels": None}, "labels is missing"),
        ({"loss_weights": None}, "loss_weights is missing"),
        ({"labels": [1, 2, 3, 4]}, "labels is not an array: list"),
        ({"images": torch.zeros(1, *SHAPE)}, "images is not an array: Tensor"),
        ({"image_masks": 3}, "image_masks is not an array: int"),
        ({"image_input_idx": np.array(3)}, "image_input_idx is not an array: ndarray"),
    ],
)
def test_examples_that_do_not_fit_together_are_all_listed(change, problem):
    odd = {k: v for k, v in (example(4, 1, key="b") | change).items() if v is not None}
    with pytest.raises(ConfigError) as error:
        collator(extra_keys=("loss_weights",))([example(6, 2, key="a"), odd])
    assert error.value.reason == "example_mismatch"
    assert problem in error.value.where
    message = str(error.value)
    assert "sample a (row 0 of the batch)=input_ids int64 [6]" in message
    assert "sample b (row 1 of the batch)=input_ids int64 [4]" in message
    assert "images uint8 [2, 3, 4, 6]" in message


def test_empty_batch_is_refused():
    with pytest.raises(ConfigError) as error:
        collator()([])
    assert error.value.reason == "empty_batch"


@pytest.mark.parametrize("pad_mode", ["to_max", "to_0", "to_", "to_-8", "to_1.5", "128", "to_²"])
def test_unknown_pad_mode_names_the_choices(pad_mode):
    with pytest.raises(ConfigError, match=re.escape('"max_len", "batch_max", or "to_N"')) as error:
        collator(pad_mode=pad_mode)
    assert error.value.reason == "pad_mode"


@pytest.mark.parametrize(
    ("settings_", "reason"),
    [
        ({"sequence_length": 0}, "collator_range"),
        ({"max_images": -1}, "collator_range"),
        ({"image_shape": (3, 0, 4)}, "collator_range"),
        ({"overlong": "drop"}, "overlong"),
        ({"extra_keys": ("position_idx",)}, "extra_key"),
    ],
)
def test_impossible_settings_are_refused(settings_, reason):
    with pytest.raises(ConfigError) as error:
        collator(**settings_)
    assert error.value.reason == reason


def test_misspelt_extra_key_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'position_ids'"):
        collator(extra_keys=("position_idx",))


def test_collator_survives_pickling():
    make = collator(pad_mode="to_16", max_images=2)
    rows = [example(4, 1), example(9)]
    again = pickle.loads(pickle.dumps(make))(rows)
    assert all(torch.equal(again[key], tensor) for key, tensor in make(rows).items())
