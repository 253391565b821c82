"""The arithmetic of crops and tokens against known numbers and a construction crop by crop."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardspec.errors import ConfigError, SampleError
from shardspec.tiling import (
    ImageBounds,
    ImageTokenIds,
    ImageView,
    canvas_size,
    crop_boxes,
    first_patch_tokens,
    frame_size,
    image_bounds,
    image_input_idx,
    image_lengths,
    image_masks,
    image_token_ids,
    num_crops,
    num_image_tokens,
    overview_size,
    patch_grid,
    select_tiling,
    select_tilings,
    stored_size,
    token_pooling,
)
from tests.examples import examples

TILED = "overlap-and-resize-c2"
IDS = ImageTokenIds(im_start=100, im_end=101, im_patch=102, im_col=103, low_res_im_start=104)

# The views of the two Molmo releases; "clip" is 336 px and 12 crops, "siglip" 378 px and 8 or 24.
CLIP_2024 = ImageView(crop_mode=TILED, fit="pad", pooling="per-crop", overview_column_tokens=True)
CLIP_2026 = dataclasses.replace(CLIP_2024, pooling="global")
SIGLIP_2024 = dataclasses.replace(CLIP_2024, size_px=378, fit="stretch", max_crops=8)
SIGLIP = ImageView(size_px=378, crop_mode=TILED, max_crops=8, overview_start="low_res_im_start")
SIGLIP_24 = dataclasses.replace(SIGLIP, max_crops=24)
ONE_CROP = ImageView()

pure = settings(deadline=None, derandomize=True, database=None, max_examples=examples(150))
sides = st.one_of(st.integers(1, 5000), st.sampled_from([1, 2, 111, 112, 113, 336, 378, 5000]))


@st.composite
def views(draw, fits=("stretch", "pad"), poolings=("global", "per-crop")):
    pool = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    pooling = draw(st.sampled_from(poolings))
    step = int(np.lcm(*pool)) if pooling == "per-crop" else 1
    margins = tuple(step * draw(st.integers(0, 4 // step)) for _ in range(2))
    side = sum(margins) + draw(st.integers(1, 20))
    patch = draw(st.sampled_from([2, 14]))
    return ImageView(
        size_px=side * patch,
        patch_px=patch,
        crop_mode=draw(st.sampled_from([TILED, TILED, TILED, "resize"])),
        fit=draw(st.sampled_from(fits)),
        max_crops=draw(st.integers(1, 24)),
        margin_patches=margins,
        pool=pool,
        pooling=pooling,
        overview_start=draw(st.sampled_from(["im_start", "low_res_im_start"])),
        overview_column_tokens=draw(st.booleans()),
        column_tokens=draw(st.booleans()),
        small_sides=draw(st.sampled_from(["training", "serving"])),
    )


# ------------------------------------------------------------- the construction, crop by crop


def choose_grid(width, height, view):
    if view.crop_mode == "resize":
        return 0, 0
    window = (view.size_px // view.patch_px - sum(view.margin_patches)) * view.patch_px
    margin = view.size_px - window
    if view.small_sides == "serving" and min(width, height) < margin:
        return 1, 1
    inner_height = np.float32(max(height - margin, 1))
    inner_width = np.float32(max(width - margin, 1))
    if view.small_sides == "serving":
        # A side of just the margins fits into any grid.
        inner_height = np.float32(1e-9) if height == margin else inner_height
        inner_width = np.float32(1e-9) if width == margin else inner_width
    scored = []
    for rows, cols in itertools.product(range(1, view.max_crops + 1), repeat=2):
        if rows * cols <= view.max_crops:
            down = np.float32(rows * window) / inner_height
            across = np.float32(cols * window) / inner_width
            scored.append((min(down, across), rows * cols, rows, cols))
    if any(scale >= 1 for scale, *_ in scored):
        best = min(s for s in scored if s[0] >= 1)
    else:
        best = min(scored, key=lambda s: (-s[0], s[1], s[2]))
    return best[2:]


def whole_crop(crop, view):
    side = view.size_px // view.patch_px
    return crop * side * side + np.arange(side * side).reshape(side, side)


def kept_range(tile, num_tiles, view):
    """The rows (or columns) of a crop that no neighbour claims: start and stop."""
    side = view.size_px // view.patch_px
    left, right = view.margin_patches
    return (left if tile > 0 else 0), (side - right if tile < num_tiles - 1 else side)


def frame_of_patches(rows, cols, view):
    """Cuts the excluded margins off every crop and lays the rest side by side."""
    lines = []
    for i in range(rows):
        y0, y1 = kept_range(i, rows, view)
        line = []
        for j in range(cols):
            x0, x1 = kept_range(j, cols, view)
            line.append(whole_crop(1 + i * cols + j, view)[y0:y1, x0:x1])
        lines.append(line)
    return np.block(lines)


def pool_groups(grid, pool, *, end_only):
    """The groups of a padded grid, as lists of lists of index lists."""
    pads = []
    for length, step in zip(grid.shape, pool, strict=True):
        missing = -length % step
        pads.append((0, missing) if end_only else (missing // 2, missing - missing // 2))
    grid = np.pad(grid, pads, constant_values=-1)
    return [
        [
            grid[y : y + pool[0], x : x + pool[1]].ravel().tolist()
            for x in range(0, grid.shape[1], pool[1])
        ]
        for y in range(0, grid.shape[0], pool[0])
    ]


def crop_cells(tile, num_tiles, view, step):
    """The pooled cells of a crop, along one axis, that hold a patch the crop keeps."""
    start, stop = kept_range(tile, num_tiles, view)
    return range(start // step, -(-stop // step))


def token_grids(rows, cols, view):
    """The rows of each block of the text; a token is (crop, cell of the crop, patches)."""
    if view.pooling == "global":
        grids = [pool_groups(whole_crop(0, view), view.pool, end_only=False)]
        if rows:
            frame = frame_of_patches(rows, cols, view)
            grids.append(pool_groups(frame, view.pool, end_only=False))
        return [[[(None, None, patches) for patches in row] for row in grid] for grid in grids]

    def tokens(crop, cells_y, cells_x):
        groups = pool_groups(whole_crop(crop, view), view.pool, end_only=True)
        width = len(groups[0])
        return [[(crop, y * width + x, groups[y][x]) for x in cells_x] for y in cells_y]

    cells_y, cells_x = (range(-(-(view.size_px // view.patch_px) // step)) for step in view.pool)
    high_res = []
    for i in range(rows):
        lines = [[] for _ in crop_cells(i, rows, view, view.pool[0])]
        for j in range(cols):
            cells = (
                crop_cells(i, rows, view, view.pool[0]),
                crop_cells(j, cols, view, view.pool[1]),
            )
            for line, more in zip(lines, tokens(1 + i * cols + j, *cells), strict=True):
                line.extend(more)
        high_res.extend(lines)
    return [tokens(0, cells_y, cells_x)] + ([high_res] if rows else [])


def text_of(grids, view):
    starts = {"im_start": IDS.im_start, "low_res_im_start": IDS.low_res_im_start}
    text = []
    for block, grid in enumerate(grids):
        overview = block == 0
        text.append(starts[view.overview_start] if overview else IDS.im_start)
        with_columns = view.overview_column_tokens if overview else view.column_tokens
        for row in grid:
            text.extend([IDS.im_patch] * len(row))
            text.extend([IDS.im_col] if with_columns else [])
        text.append(IDS.im_end)
    return text


def flat_tokens(grids):
    return [token for grid in grids for row in grid for token in row]


@given(view=views(), width=sides, height=sides)
@pure
def test_grid_text_and_pooling_equal_the_construction_crop_by_crop(view, width, height):
    rows, cols = choose_grid(width, height, view)
    grids = token_grids(rows, cols, view)
    tokens = flat_tokens(grids)
    text = text_of(grids, view)

    assert select_tiling(width, height, view) == (rows, cols)
    assert num_crops(width, height, view) == 1 + rows * cols
    assert num_image_tokens(width, height, view) == len(text)
    ids = image_token_ids(width, height, view, IDS)
    assert ids.dtype == np.int32
    assert ids.tolist() == text
    pooling = token_pooling(width, height, view)
    assert pooling.dtype == np.int64
    assert pooling.tolist() == [patches for _, _, patches in tokens]
    assert len(pooling) == np.count_nonzero(ids == IDS.im_patch)


@given(view=views(), width=sides, height=sides)
@pure
def test_first_token_of_each_crop_is_the_first_that_pools_a_patch_of_it(view, width, height):
    first_of: dict[int, int] = {}
    for token, patches in enumerate(token_pooling(width, height, view).tolist()):
        for patch in patches:
            if patch >= 0:
                first_of.setdefault(patch // view.num_patches, token)
    found = first_patch_tokens(width, height, view)
    assert found.tolist() == [first_of[crop] for crop in range(num_crops(width, height, view))]
    assert not found.flags.writeable


@given(view=views(poolings=("per-crop",)), width=sides, height=sides, offset=st.integers(0, 999))
@pure
def test_input_positions_equal_the_construction_crop_by_crop(view, width, height, offset):
    rows, cols = choose_grid(width, height, view)
    grids = token_grids(rows, cols, view)
    patch_positions = np.flatnonzero(np.array(text_of(grids, view)) == IDS.im_patch)
    per_crop = int(np.prod([-(-(view.size_px // view.patch_px) // step) for step in view.pool]))
    expected = np.full((1 + rows * cols, per_crop), -100)
    for position, (crop, cell, _) in zip(patch_positions, flat_tokens(grids), strict=True):
        expected[crop, cell] = position + offset

    idx = image_input_idx(width, height, view, offset=offset)
    assert idx.dtype == np.int32
    np.testing.assert_array_equal(idx, expected)


@given(view=views(), width=sides, height=sides)
@pure
def test_every_patch_of_the_frame_belongs_to_one_crop_at_its_own_place(view, width, height):
    assume(view.crop_mode == TILED)
    grid = patch_grid(width, height, view)
    frame_width, frame_height = frame_size(width, height, view)
    assert grid.shape == (frame_height // view.patch_px, frame_width // view.patch_px)
    assert len(np.unique(grid)) == grid.size

    crop, place = np.divmod(grid, view.num_patches)
    y, x = np.divmod(place, view.patches_per_side)
    boxes = crop_boxes(width, height, view)
    assert boxes.dtype == np.int32
    assert boxes.shape == (num_crops(width, height, view) - 1, 4)
    assert crop.min() >= 1
    origin = boxes[crop - 1]
    y_px, x_px = origin[..., 1] + y * view.patch_px, origin[..., 0] + x * view.patch_px
    lines, columns = np.indices(grid.shape)
    np.testing.assert_array_equal(y_px, lines * view.patch_px)
    np.testing.assert_array_equal(x_px, columns * view.patch_px)


@given(view=views(), width=sides, height=sides)
@pure
def test_crop_boxes_are_whole_crops_that_cover_the_frame(view, width, height):
    boxes = crop_boxes(width, height, view)
    if view.crop_mode == "resize":
        assert boxes.shape == (0, 4)
        return
    assert (boxes[:, 2:] - boxes[:, :2] == view.size_px).all()
    assert boxes[:, :2].min() == 0
    assert tuple(boxes[:, 2:].max(axis=0)) == frame_size(width, height, view)
    starts = [(y0, x0) for x0, y0, _, _ in boxes.tolist()]
    assert starts == sorted(set(starts))


@given(view=views(), width=sides, height=sides)
@pure
def test_pooling_uses_every_patch_at_most_once_and_global_pooling_uses_all(view, width, height):
    pooling = token_pooling(width, height, view)
    used = pooling[pooling >= 0]
    assert len(np.unique(used)) == len(used)
    assert (pooling >= 0).any(axis=1).all()
    kept = np.concatenate([np.arange(view.num_patches), patch_grid(width, height, view).ravel()])
    assert set(kept.tolist()) <= set(used.tolist())
    if view.pooling == "global":
        assert len(used) == len(kept)


@given(view=views(), width=st.integers(1, 3000), height=st.integers(1, 3000))
@pure
def test_masks_equal_the_share_of_pixels_counted_one_by_one(view, width, height):
    def padded(size, frame):
        real = np.zeros((frame[1], frame[0]), np.uint8)
        top, left = (frame[1] - size[1]) // 2, (frame[0] - size[0]) // 2
        real[top : top + size[1], left : left + size[0]] = 1
        return real

    square = (view.size_px, view.size_px)
    crops = [padded(overview_size(width, height, view), square)]
    frame = padded(canvas_size(width, height, view), frame_size(width, height, view))
    for x0, y0, x1, y1 in crop_boxes(width, height, view):
        crops.append(frame[y0:y1, x0:x1])
    side, p = view.patches_per_side, view.patch_px
    counts = np.stack(crops).reshape(-1, side, p, side, p).sum(axis=(2, 4), dtype=np.float32)

    masks = image_masks(width, height, view)
    assert masks.dtype == np.float32
    np.testing.assert_array_equal(masks, counts.reshape(len(crops), -1) / np.float32(p * p))


@given(view=views(), sizes=st.lists(st.tuples(sides, sides), max_size=12))
@pure
def test_many_images_at_once_equal_one_at_a_time(view, sizes):
    widths = np.array([w for w, _ in sizes], np.int32)
    heights = np.array([h for _, h in sizes], np.int32)
    crops, tokens = image_lengths(widths, heights, view)
    assert crops.tolist() == [num_crops(w, h, view) for w, h in sizes]
    assert tokens.tolist() == [num_image_tokens(w, h, view) for w, h in sizes]
    grids = select_tilings(widths, heights, view)
    assert [tuple(grid) for grid in grids.tolist()] == [select_tiling(*s, view) for s in sizes]


def test_many_images_at_once_equal_one_at_a_time_over_several_chunks():
    rng = np.random.RandomState(0)
    widths, heights = rng.randint(1, 5000, 5000), rng.randint(1, 5000, 5000)
    grids = select_tilings(widths, heights, SIGLIP_24)
    assert (grids >= 1).all()
    for i in range(0, 5000, 61):
        assert tuple(grids[i]) == choose_grid(widths[i], heights[i], SIGLIP_24)


# ------------------------------------------------------------------------------ known numbers

# Made with the preprocessing functions of the two releases: (view, (height, width), grid, crops,
# tokens).
KNOWN = [
    (CLIP_2024, (224, 224), (1, 1), 2, 316),
    (CLIP_2024, (480, 640), (2, 3), 7, 740),
    (CLIP_2024, (1080, 1920), (3, 4), 13, 1196),
    (CLIP_2024, (3000, 400), (11, 1), 12, 1356),
    (CLIP_2026, (224, 224), (1, 1), 2, 316),
    (CLIP_2026, (480, 640), (2, 3), 7, 740),
    (CLIP_2026, (1080, 1920), (3, 4), 13, 1196),
    (CLIP_2026, (3000, 400), (11, 1), 12, 1356),
    (SIGLIP, (224, 224), (1, 1), 2, 410),
    (SIGLIP, (480, 640), (2, 2), 5, 752),
    (SIGLIP, (1080, 1920), (2, 4), 9, 1189),
    (SIGLIP, (3000, 400), (8, 1), 9, 1400),
    (SIGLIP_24, (224, 224), (1, 1), 2, 410),
    (SIGLIP_24, (480, 640), (2, 2), 5, 752),
    (SIGLIP_24, (1080, 1920), (4, 6), 25, 2804),
    (SIGLIP_24, (3000, 400), (11, 2), 23, 2816),
    (SIGLIP_2024, (480, 640), (2, 2), 5, 814),
]


@pytest.mark.parametrize("view, size, grid, crops, tokens", KNOWN)
def test_grid_crops_and_tokens_have_the_known_numbers(view, size, grid, crops, tokens):
    height, width = size
    assert select_tiling(width, height, view) == grid
    assert num_crops(width, height, view) == crops
    assert num_image_tokens(width, height, view) == tokens
    assert len(image_token_ids(width, height, view, IDS)) == tokens


def test_input_positions_of_a_480x640_picture_after_a_bos_token():
    idx = image_input_idx(640, 480, CLIP_2024, offset=1)
    tokens = image_token_ids(640, 480, CLIP_2024, IDS)
    assert idx.shape == (7, 144)
    assert idx[0, :12].tolist() == list(range(2, 14))
    assert tokens[14 - 1] == IDS.im_col
    assert idx[0, 12] == 15
    # The last crop ends the picture; im_col and im_end follow.
    assert idx[6, 143] == 740 - 2
    assert sorted(idx[idx != -100]) == (np.flatnonzero(tokens == IDS.im_patch) + 1).tolist()


def test_excluded_positions_are_not_shifted_by_the_offset():
    near, far = (image_input_idx(640, 480, CLIP_2024, offset=o) for o in (0, 500))
    assert (near == -100).any()
    np.testing.assert_array_equal(near == -100, far == -100)
    assert (far[far != -100] - near[near != -100] == 500).all()


def test_global_pooling_that_stays_inside_crops_places_tokens_like_per_crop_pooling():
    np.testing.assert_array_equal(
        image_input_idx(640, 480, CLIP_2026), image_input_idx(640, 480, CLIP_2024)
    )
    np.testing.assert_array_equal(
        token_pooling(640, 480, CLIP_2026), token_pooling(640, 480, CLIP_2024)
    )


def test_input_positions_of_an_untiled_view_are_the_overview_alone():
    idx = image_input_idx(640, 480, ONE_CROP, offset=3)
    assert idx.tolist() == [list(range(4, 4 + 144))]


@pytest.mark.parametrize("margins", [(4, 4), (3, 4), (3, 3), (4, 3)])
def test_input_positions_are_refused_where_tokens_mix_two_crops(margins):
    mixed = dataclasses.replace(SIGLIP, margin_patches=margins)
    with pytest.raises(ConfigError, match="per-crop") as caught:
        image_input_idx(640, 480, mixed)
    assert caught.value.reason == "image_view"


def test_first_tokens_of_both_overview_layouts():
    with_columns = image_token_ids(640, 480, SIGLIP_2024, IDS)
    assert with_columns[:17].tolist() == [100, *[102] * 14, 103, 102]
    without = image_token_ids(640, 480, SIGLIP, IDS)
    assert without[:199].tolist() == [104, *[102] * 196, 101, 100]
    assert without[-2:].tolist() == [103, 101]


def test_untiled_view_has_one_block_that_opens_with_im_start():
    tokens = image_token_ids(640, 480, ONE_CROP, IDS)
    assert tokens.tolist() == [100, *[102] * 144, 101]
    columns = image_token_ids(
        640, 480, dataclasses.replace(ONE_CROP, overview_column_tokens=True), IDS
    )
    assert columns.tolist() == [100, *([102] * 12 + [103]) * 12, 101]


def test_video_frame_pooled_three_by_three_has_81_tokens():
    frame = ImageView(size_px=378, pool=(3, 3))
    assert token_pooling(640, 480, frame).shape == (81, 9)


def test_odd_grid_is_padded_at_the_end_and_an_even_remainder_on_both_sides():
    odd = token_pooling(640, 480, ImageView(size_px=378))
    assert odd[0].tolist() == [0, 1, 27, 28]
    assert odd[13].tolist() == [26, -1, 53, -1]
    assert odd[-1].tolist() == [27 * 27 - 1, -1, -1, -1]
    both = token_pooling(640, 480, ImageView(size_px=14 * 4, pool=(3, 3)))
    assert both[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, 4, 5]


def test_padding_mask_has_the_overview_first():
    masks = image_masks(640, 480, CLIP_2024)
    assert masks.shape == (7, 576)
    # 640 x 480 fits 336 x 336 as 336 x 251 (float32 truncates 251.99998): 42 pixels of padding
    # above and 43 below, which is one line of the 21st line of patches.
    lines = masks[0].reshape(24, 24)
    expected = [0.0] * 3 + [1.0] * 17 + [np.float32(13 / 14)] + [0.0] * 3
    np.testing.assert_array_equal(lines, np.tile(np.array(expected, np.float32)[:, None], 24))
    # The canvas, 746 x 560, lies on a frame of 784 x 560: the padding is left and right.
    assert masks[1].reshape(24, 24)[:, 0].tolist() == [0.0] * 24
    assert masks[1].reshape(24, 24)[:, 1].tolist() == [np.float32(9 / 14)] * 24


def test_stretched_picture_has_no_padding():
    assert (image_masks(640, 480, SIGLIP) == 1).all()
    assert image_masks(640, 480, SIGLIP).shape == (5, 729)


@pytest.mark.parametrize(
    "view, bounds",
    [
        (CLIP_2024, ImageBounds(num_crops=13, num_tokens=1460, num_pooled=1344)),
        (SIGLIP, ImageBounds(num_crops=9, num_tokens=1400, num_pooled=1316)),
        (ONE_CROP, ImageBounds(num_crops=1, num_tokens=146, num_pooled=144)),
    ],
)
def test_bounds_have_the_known_numbers_and_a_thin_picture_reaches_them(view, bounds):
    assert image_bounds(view) == bounds
    assert num_crops(100, 10000, view) == bounds.num_crops
    assert num_image_tokens(100, 10000, view) == bounds.num_tokens
    assert len(token_pooling(100, 10000, view)) == bounds.num_pooled


@given(view=views(), width=sides, height=sides)
@pure
def test_no_picture_passes_the_bounds(view, width, height):
    bounds = image_bounds(view)
    assert num_crops(width, height, view) <= bounds.num_crops
    assert num_image_tokens(width, height, view) <= bounds.num_tokens
    assert len(token_pooling(width, height, view)) <= bounds.num_pooled


def test_picture_of_exactly_the_size_of_a_grid_is_not_resized():
    for rows, cols in itertools.product(range(1, 13), repeat=2):
        if rows * cols <= 12:
            size = (cols * 224 + 112, rows * 224 + 112)
            assert select_tiling(*size, CLIP_2024) == (rows, cols)
            assert canvas_size(*size, CLIP_2024) == size


def test_scales_are_compared_in_float32():
    # Without margins 12,000,001 x 8,000,000: float32 scales hold it for 3 : 2 and take the fewer
    # tiles; exact scales would take (2, 4).
    assert select_tiling(12_000_113, 8_000_112, SIGLIP) == (2, 3)


# ------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "view, size",
    [
        (ONE_CROP, (336, 336)),
        (dataclasses.replace(ONE_CROP, fit="pad"), (336, 251)),
        (dataclasses.replace(ONE_CROP, fit="center-crop"), (448, 336)),
        (SIGLIP, (2 * 266 + 112, 2 * 266 + 112)),
        (dataclasses.replace(CLIP_2024, fit="stretch"), (3 * 224 + 112, 2 * 224 + 112)),
        (CLIP_2024, (746, 560)),
    ],
)
def test_canvas_of_a_640x480_picture(view, size):
    assert canvas_size(640, 480, view) == size


def test_padded_size_is_truncated_in_float32():
    # 131 * float32(336 / 131) is a little less than 336.
    padded = dataclasses.replace(ONE_CROP, fit="pad")
    assert canvas_size(131, 131, padded) == (335, 335)


def test_thin_picture_keeps_one_pixel_when_padded():
    padded = dataclasses.replace(ONE_CROP, fit="pad")
    assert canvas_size(5000, 1, padded) == (336, 1)
    assert canvas_size(1, 5000, padded) == (1, 336)


@given(view=views(), width=sides, height=sides)
@pure
def test_canvas_lies_inside_the_frame_and_the_overview_inside_the_canvas(view, width, height):
    canvas, frame = canvas_size(width, height, view), frame_size(width, height, view)
    overview = overview_size(width, height, view)
    if view.fit == "stretch":
        assert canvas == frame
    else:
        gap = np.subtract(frame, canvas)
        assert gap.min() in (0, 1)
    assert all(1 <= o <= c <= f for o, c, f in zip(overview, canvas, frame, strict=True))


@given(size_px=st.integers(1, 60).map(lambda n: 14 * n), width=sides, height=sides)
@pure
def test_centre_crop_canvas_has_the_crop_as_its_shorter_side(size_px, width, height):
    view = ImageView(size_px=size_px, fit="center-crop")
    canvas = canvas_size(width, height, view)
    assert min(canvas) == size_px
    assert abs(canvas[0] * height - canvas[1] * width) <= max(width, height)


@given(view=views(fits=("stretch",)), width=sides, height=sides, more=st.integers(1, 12))
@pure
def test_more_crops_never_give_fewer_pixels(view, width, height, more):
    richer = dataclasses.replace(view, max_crops=view.max_crops + more)
    for fit in ("stretch", "pad"):
        few, many = (
            canvas_size(width, height, dataclasses.replace(v, fit=fit)) for v in (view, richer)
        )
        assert few[0] <= many[0]
        assert few[1] <= many[1]


any_views = st.lists(views(), min_size=1, max_size=3)


@given(choice=any_views, width=sides, height=sides, headroom=st.floats(1.0, 2.0))
@pure
def test_stored_picture_never_grows_and_covers_each_canvas_that_the_source_covers(
    choice, width, height, headroom
):
    stored = stored_size(width, height, choice, headroom=headroom)
    canvases = [canvas_size(width, height, view) for view in choice]
    for axis, source in enumerate((width, height)):
        largest = max(canvas[axis] for canvas in canvases)
        assert min(source, largest) <= stored[axis] <= source
        assert stored[axis] < largest * headroom + 1
    assert all(side >= 1 for side in stored)


def test_stored_picture_serves_both_crop_budgets_at_exactly_the_larger_canvas():
    both = [SIGLIP, SIGLIP_24]
    assert stored_size(6000, 4000, both) == canvas_size(6000, 4000, SIGLIP_24)
    assert stored_size(640, 480, both) == (640, 480)
    assert stored_size(6000, 500, [SIGLIP]) == (8 * 266 + 112, 266 + 112)


def test_stored_picture_of_an_aspect_kept_view_keeps_the_aspect():
    padded = dataclasses.replace(ONE_CROP, fit="pad")
    assert stored_size(4000, 3000, [padded]) == (336, 252)
    assert stored_size(4000, 3000, [padded], headroom=1.5) == (504, 378)
    assert stored_size(400, 300, [padded], headroom=1.5) == (400, 300)
    assert stored_size(4000, 3000, [padded], headroom=1.1) == (370, 278)
    cropped = dataclasses.replace(ONE_CROP, fit="center-crop")
    assert stored_size(4000, 3000, [cropped]) == (448, 336)


@pytest.mark.parametrize(
    "choice, headroom",
    [([], 1.0), ([ONE_CROP], 0.9), ([ONE_CROP], float("nan")), ([ONE_CROP], float("inf"))],
)
def test_stored_size_needs_a_view_and_head_room_of_at_least_one(choice, headroom):
    with pytest.raises(ConfigError) as caught:
        stored_size(640, 480, choice, headroom=headroom)
    assert caught.value.reason == "stored_size"


@pytest.mark.parametrize("size", [(0, 480), (640, 0), (-1, 480)])
@pytest.mark.parametrize("view", [ONE_CROP, SIGLIP])
def test_picture_without_pixels_is_a_bad_sample(size, view):
    for function in (canvas_size, overview_size, num_image_tokens, token_pooling, image_masks):
        with pytest.raises(SampleError) as caught:
            function(*size, view)
        assert caught.value.reason == "image_size"
        assert caught.value.facts == {"width": size[0], "height": size[1]}
    with pytest.raises(SampleError):
        image_lengths(np.array([640, size[0]]), np.array([480, size[1]]), view)


# ------------------------------------------------------------------------------------- views


@pytest.mark.parametrize(
    "field, fields",
    [
        ("size_px", {"size_px": 337}),
        ("size_px", {"size_px": 0}),
        ("size_px", {"size_px": 336.0}),
        ("patch_px", {"patch_px": 0}),
        ("patch_px", {"patch_px": True}),
        ("max_crops", {"max_crops": 0}),
        ("margin_patches", {"margin_patches": (12, 12), "crop_mode": TILED}),
        ("margin_patches", {"margin_patches": (-1, 4)}),
        ("margin_patches", {"margin_patches": (4,)}),
        ("margin_patches", {"margin_patches": 4}),
        ("margin_patches", {"margin_patches": (3, 4), "crop_mode": TILED, "pooling": "per-crop"}),
        ("pool", {"pool": (0, 2)}),
        ("pool", {"pool": (2, 2, 2)}),
        ("crop_mode", {"crop_mode": "tiled"}),
        ("fit", {"fit": "letterbox"}),
        ("fit", {"fit": "center-crop", "crop_mode": TILED}),
        ("pooling", {"pooling": "local"}),
        ("overview_start", {"overview_start": "im_end"}),
        ("column_tokens", {"column_tokens": 1}),
        ("overview_column_tokens", {"overview_column_tokens": None}),
    ],
)
def test_impossible_view_is_refused_by_the_name_and_value_of_its_field(field, fields):
    with pytest.raises(ConfigError) as caught:
        ImageView(**fields)
    assert caught.value.reason == "image_view"
    assert caught.value.where == f"ImageView.{field}"
    assert repr(fields[field]) in str(caught.value)


def test_untiled_view_may_have_any_margins():
    assert ImageView(size_px=28, margin_patches=(4, 4)).patches_per_side == 2


def test_unhashable_choice_is_refused_like_any_other():
    with pytest.raises(ConfigError, match="crop_mode"):
        ImageView.from_dict({"crop_mode": ["resize"]})


@given(view=views())
@pure
def test_view_survives_json(view):
    assert ImageView.from_dict(json.loads(json.dumps(view.to_dict()))) == view


def test_unknown_field_of_a_view_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'max_crops'") as caught:
        ImageView.from_dict({"max_crop": 8})
    assert caught.value.reason == "image_view"
    assert caught.value.where == "ImageView.max_crop"


# ------------------------------------------------------------- sides inside the margins


@pytest.mark.parametrize(
    "size, training, serving",
    [
        ((50, 500), (2, 1), (1, 1)),
        ((500, 50), (1, 2), (1, 1)),
        ((111, 3000), (8, 1), (1, 1)),
        ((112, 3000), (8, 1), (8, 1)),
        ((113, 3000), (8, 1), (8, 1)),
        ((112, 112), (1, 1), (1, 1)),
        ((20, 20), (1, 1), (1, 1)),
        ((640, 480), (2, 2), (2, 2)),
    ],
)
def test_sides_inside_the_margins_are_tiled_as_in_training_or_in_serving(size, training, serving):
    assert select_tiling(*size, SIGLIP) == training
    served = dataclasses.replace(SIGLIP, small_sides="serving")
    assert select_tiling(*size, served) == serving
    # Everything that is counted ahead follows.
    counts = [num_image_tokens(*size, view) for view in (SIGLIP, served)]
    assert (counts[0] == counts[1]) == (training == serving)
    assert num_crops(*size, served) == 1 + serving[0] * serving[1]


def test_serving_tiles_are_those_of_the_processor_of_transformers():
    try:
        from transformers.models.molmo2.image_processing_molmo2 import compute_crop_geometry
    except ImportError as error:
        pytest.skip(f"no processor: {error}")
    served = dataclasses.replace(SIGLIP, small_sides="serving")
    for width, height in itertools.product((1, 57, 111, 112, 113, 150, 378, 400, 900), repeat=2):
        rows, cols, frame_height, frame_width = compute_crop_geometry(
            height, width, 8, [4, 4], 378, 14
        )
        assert select_tiling(width, height, served) == (rows, cols)
        assert frame_size(width, height, served) == (frame_width, frame_height)
