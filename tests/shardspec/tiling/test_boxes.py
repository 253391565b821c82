import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.assembly.pixels import render
from shardspec.tiling import ImageView, boxes_on_crops, num_crops

VIEWS = [
    ImageView(size_px=56, fit=fit, crop_mode=mode, max_crops=4, margin_patches=(1, 1))
    for mode, fits in {
        "resize": ("stretch", "pad", "center-crop"),
        "overlap-and-resize-c2": ("stretch", "pad"),
    }.items()
    for fit in fits
]

sides = st.integers(20, 300)
shares = st.tuples(st.floats(0, 0.6), st.floats(0, 0.6), st.floats(0.2, 0.4), st.floats(0.2, 0.4))


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: f"{v.crop_mode}-{v.fit}")
@given(width=sides, height=sides, share=shares)
def test_boxes_are_where_crops_show_what_is_in_them(view, width, height, share):
    """A picture is drawn that is dark inside of a box, and rendered as training does it."""
    x, y, w, h = share
    x0, x1 = int(x * width), max(int(x * width) + 2, int((x + w) * width))
    y0, y1 = int(y * height), max(int(y * height) + 2, int((y + h) * height))
    picture = np.full((height, width, 3), 255, np.uint8)
    picture[y0:y1, x0:x1] = 0
    crops = render(
        picture, source_width=width, source_height=height, view=view, resample="bilinear"
    )
    box = np.array([[x0 / width, y0 / height, x1 / width, y1 / height]])
    found = boxes_on_crops(box, width=width, height=height, view=view)
    assert len(crops) == num_crops(width, height, view)
    dark = crops.max(axis=-1) < 64
    if view.fit == "pad":  # padding is dark as well
        white = render(
            np.full_like(picture, 255), source_width=width, source_height=height, view=view
        )
        dark &= white.min(axis=-1) == 255
    inside = np.zeros(dark.shape, bool)
    well_inside = np.zeros(dark.shape, bool)
    for crop, (a, b, c, d) in zip(found.crop, found.corners, strict=True):
        inside[crop, int(b) : int(np.ceil(d)), int(a) : int(np.ceil(c))] = True
        # A pixel of the original may be this large, and two of them are blurred at a border.
        blur = 2 + int(np.ceil(2 * max(140 / width, 140 / height)))
        rows = slice(int(b) + blur, max(0, int(d) - blur))
        well_inside[crop, rows, int(a) + blur : max(0, int(c) - blur)] = True
    assert not (dark & ~inside).any()
    assert dark[well_inside].all()


@given(width=sides, height=sides, share=shares)
def test_parts_of_a_box_cover_it_on_the_overview_and_on_the_tiles(width, height, share):
    view = VIEWS[-2]
    x, y, w, h = share
    boxes = np.array([[x, y, x + w, y + h]])
    found = boxes_on_crops(boxes, width=width, height=height, view=view)
    assert (found.crop == 0).sum() == 1
    assert np.allclose(found.corners[0], boxes[0] * view.size_px)
    assert (np.diff(found.crop) >= 0).all()
    assert found.corners.min() >= 0
    assert found.corners.max() <= view.size_px


def test_boxes_without_an_area_and_outside_of_a_cut_are_left_out():
    view = ImageView(size_px=28, fit="center-crop")
    boxes = np.array([[0.0, 0.0, 0.2, 1.0], [0.5, 0.5, 0.5, 0.6], [0.4, 0.0, 0.6, 1.0]])
    found = boxes_on_crops(boxes, width=56, height=28, view=view)
    assert found.box.tolist() == [2]
    assert np.allclose(found.corners, [[8.4, 0.0, 19.6, 28.0]])


def test_no_boxes_give_none():
    found = boxes_on_crops(np.zeros((0, 4)), width=56, height=28, view=VIEWS[0])
    assert found.corners.shape == (0, 4)
