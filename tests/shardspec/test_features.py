"""Stored features: what each type keeps of a value, and what is refused."""

import numpy as np
import pytest

from shardspec.errors import ConfigError, SampleError, ShardError
from shardspec.families import Qwen2VL
from shardspec.features import StoredFeatures
from shardspec.media import decode_stored
from shardspec.tiling import ImageView

DTYPES = ("float32", "float16", "bfloat16", "int8")


def stored(dtype="float32", row_shape=(3, 5), **fields):
    return StoredFeatures(
        dtype=dtype, row_shape=row_shape, backbone="x", fingerprint="0" * 64, **fields
    )


def as_float(array, dtype):
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def values_of(shape, seed=0):
    """Values of many magnitudes, some of them 0."""
    rng = np.random.RandomState(seed)
    found = rng.standard_normal(shape) * 10.0 ** rng.randint(-6, 4, shape)
    found[..., 0] = 0
    return found.astype(np.float32)


def bound(values, dtype):
    """The largest error of each value, as the module states it."""
    if dtype == "int8":
        largest = np.abs(values).max(axis=-1, keepdims=True)
        return np.broadcast_to(largest / 254 * (1 + 1e-5), values.shape)
    relative, least = {"float32": (0, 0), "float16": (2**-11, 2**-25), "bfloat16": (2**-8, 0)}[
        dtype
    ]
    return np.maximum(np.abs(values) * relative, least)


@pytest.mark.parametrize("row_shape", [(4,), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_come_back_within_the_stated_bound(dtype, row_shape):
    made = stored(dtype, row_shape)
    values = values_of((7, *row_shape))
    payload = made.encode(values)
    assert made.num_rows(len(payload)) == 7
    found = made.decode(payload)
    assert (found.dtype, found.shape) == (made.array_dtype, values.shape)
    error = np.abs(as_float(found, dtype).astype(np.float64) - values)
    assert (error <= bound(values.astype(np.float64), dtype)).all()
    assert not as_float(found, dtype)[..., 0].any()
    out = np.ones_like(found)
    assert made.decode(payload, out=out) is out
    assert np.array_equal(out, found)


def test_bfloat16_is_rounded_as_torch_rounds_it():
    import torch

    values = values_of((400, 5))
    values[0, :4] = np.array([0x3F808000, 0x3F818000, 0x00000001, 0x7F7F0000], np.uint32).view("f4")
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    made = stored("bfloat16", (5,))
    assert np.array_equal(made.decode(made.encode(values)), want)


GPU_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
"""What CUDA computes where the result is no number; rounded as a number it would be -0.0."""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, GPU_NAN, -GPU_NAN])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_refused(dtype, bad):
    values = np.zeros((1, 3, 5), np.float32)
    values[0, 1, 2] = bad
    with pytest.raises(SampleError, match=dtype) as raised:
        stored(dtype).encode(values, where="key")
    assert raised.value.reason == "features_value"


@pytest.mark.parametrize("dtype, most", [("float16", 65_519.0), ("bfloat16", 3.39e38)])
def test_what_is_too_large_for_the_type_is_refused(dtype, most):
    values = np.full((1, 3, 5), most, np.float32)
    stored(dtype).encode(values)
    with pytest.raises(SampleError):
        stored(dtype).encode(values * np.float32(1.003))


@pytest.mark.parametrize("dtype", DTYPES)
def test_another_member_is_refused(dtype):
    made = stored(dtype)
    payload = made.encode(values_of((2, 3, 5)))
    for wrong, reason in (
        (payload[:-1], "array_size"),
        (payload[: 128 + made.row_bytes], "array_header"),
        (b"\0" + payload[1:], "array_header"),
    ):
        with pytest.raises(ShardError) as raised:
            made.decode(wrong)
        assert raised.value.reason == reason
    with pytest.raises(ShardError) as raised:
        made.decode(payload, out=np.empty((3, 3, 5), made.array_dtype))
    assert raised.value.reason == "features_rows"


@pytest.mark.parametrize(
    "fields",
    [
        {"image": ImageView(), "resample": "bicubic", "normalize": "siglip", "pixels": "crops"},
        {
            "family": Qwen2VL(max_pixels=5000),
            "backend": "pil",
            "layer": -2,
            "rows_per_units": (1, 4),
        },
    ],
)
def test_description_survives_the_manifest(fields):
    made = stored(**fields)
    assert StoredFeatures.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float8"},
        {"more": 1},
        {"row_shape": None},
        {"row_shape": ["x"]},
        {"rows_per_units": [1]},
    ],
)
def test_description_of_another_release_is_refused(change):
    with pytest.raises(ConfigError) as caught:
        StoredFeatures.from_dict({**stored().to_dict(), **change})
    assert caught.value.reason == "features_fields"


def test_same_features_made_elsewhere_are_equal():
    made = stored(device="cpu", batch=1)
    assert made == stored(device="cuda", batch=8)
    assert made != stored("float16")


def test_features_are_never_decoded_as_a_picture():
    payload = stored().encode(values_of((1, 3, 5)))
    with pytest.raises(ShardError) as raised:
        decode_stored(payload, codec="features")
    assert raised.value.reason == "image_decode"
