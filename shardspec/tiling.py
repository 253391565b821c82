"""How a picture becomes crops, patches and image tokens: pure arithmetic, no pixels.

Both halves must agree on it: the planner counts tokens before any pixel is decoded, the loader cuts
crops and lays out tokens. Everything is a function of the *source* picture's width and height and
of an `ImageView`.

1. *Grid*: `select_tiling` picks rows x columns of tiles, at most `max_crops` of them.
2. *Frame*: the grid spans rows x cols windows and one pair of margins. The picture is resized to
   `canvas_size`, which fills the frame, or is centred on it (fit "pad").
3. *Crops*: crop 0 is the overview, the whole picture at `size_px`. Crops 1 ... are cut from the
   frame in row-major order (`crop_boxes`); neighbours overlap by both margins.
4. *Patches*: of every overlap each crop keeps the part that is nearer to its own centre, so that
   every patch of the frame belongs to exactly one crop (`patch_grid`).
5. *Tokens*: groups of patches are pooled into one token each (`token_pooling`), laid out as text
   by `image_token_ids`; `image_input_idx` is the same map seen from the crops.

The scheme, called "overlap-and-resize-c2", and its float32 arithmetic are those of the Molmo models
(allenai/molmo and allenai/molmo2); the two releases differ in how they pool, see
`ImageView.pooling`. A view with crop_mode "resize" has the overview alone.

Nothing here touches pixels, draws at random or knows a tokenizer.
"""

# Shape letters: N images, K candidate grids, R x C tiles or tokens of a picture, P patches per side
# of a crop, H x W patches of the frame. The last axis of a size is always (width, height), of a
# grid (rows, columns).

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from shardspec.errors import ConfigError, SampleError, nearest

CropMode = Literal["resize", "overlap-and-resize-c2"]
Fit = Literal["stretch", "pad", "center-crop"]
Pooling = Literal["global", "per-crop"]
OverviewStart = Literal["im_start", "low_res_im_start"]

EXCLUDED = -100
"""Entry of `image_input_idx` for a pooled token that no position of the text stands for."""

NO_PATCH = -1
"""Entry of `token_pooling` beyond the border of the patch grid."""

# Sizes compared with all candidate grids at once. For 1e6 sizes and 24 crops (84 grids), measured
# here: 2048 takes 0.29 s, 65536 takes 0.57 s because the tables fall out of the cache.
_CHUNK = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageView:
    """What a model sees of one image.

    Raises:
      ConfigError: `image_view`, for a field that is impossible by itself or with the others.
    """

    size_px: int = 336
    """Side of a crop (base size), a multiple of patch_px."""
    patch_px: int = 14
    """Side of a vision patch."""
    crop_mode: CropMode = "resize"
    """"resize": one crop of the whole image; "overlap-and-resize-c2": an overview and tiles."""
    fit: Fit = "stretch"
    """How the image meets the canvas: stretched, padded (aspect kept), or centre-cropped."""
    max_crops: int = 12
    """Most high-resolution crops; the overview is not counted. Not used by "resize"."""
    margin_patches: tuple[int, int] = (4, 4)
    """Overlap margins (left/top, right/bottom) of a tile, in patches. Not used by "resize"."""
    pool: tuple[int, int] = (2, 2)
    """Patches pooled into one image token, (rows, columns)."""
    pooling: Pooling = "global"
    """"global" (2026 release) groups the patches of the whole frame, so that a token may mix two
    crops; "per-crop" (2024 release) groups inside each crop, and needs margins that the pool
    divides. They agree where the pool divides the window of a tile as well."""
    overview_start: OverviewStart = "im_start"
    """Token that opens the overview: the 2026 release uses its own one when it tiles."""
    overview_column_tokens: bool = False
    """End each row of overview tokens with a column token."""
    column_tokens: bool = True
    """End each row of high-resolution tokens with a column token."""

    def __post_init__(self) -> None:
        for name in ("size_px", "patch_px", "max_crops"):
            _require(self, name, _is_int(getattr(self, name), at_least=1), "an integer >= 1")
        for name, least in (("margin_patches", 0), ("pool", 1)):
            value = getattr(self, name)
            pair = isinstance(value, tuple) and len(value) == 2
            good = pair and all(_is_int(v, at_least=least) for v in value)
            _require(self, name, good, f"a tuple of two integers >= {least}")
        for name, literal in _CHOICES.items():
            choices = get_args(literal)
            _require(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        for name in ("overview_column_tokens", "column_tokens"):
            _require(self, name, isinstance(getattr(self, name), bool), "true or false")

        multiple = self.size_px % self.patch_px == 0
        _require(self, "size_px", multiple, f"a multiple of patch_px={self.patch_px}")
        if self.crop_mode == "resize":
            return
        room = sum(self.margin_patches) < self.patches_per_side
        _require(self, "margin_patches", room, f"a sum below {self.patches_per_side} patches")
        _require(self, "fit", self.fit != "center-crop", 'crop_mode "resize" with center-crop')
        if self.pooling == "per-crop":
            divides = all(margin % p == 0 for margin in self.margin_patches for p in self.pool)
            want = f'multiples of pool={self.pool} with pooling "per-crop"'
            _require(self, "margin_patches", divides, want)

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of a crop."""
        return self.size_px // self.patch_px

    @property
    def num_patches(self) -> int:
        """Patches of one crop."""
        return self.patches_per_side**2

    @property
    def window_patches(self) -> int:
        """Stride from a tile to its neighbour, in patches: a crop less both margins."""
        return self.patches_per_side - sum(self.margin_patches)

    @property
    def window_px(self) -> int:
        """Stride from a tile to its neighbour, in pixels."""
        return self.window_patches * self.patch_px

    @property
    def margin_px(self) -> int:
        """Both margins together, in pixels: the overlap of two neighbours."""
        return sum(self.margin_patches) * self.patch_px

    @property
    def crop_tokens(self) -> tuple[int, int]:
        """Pooled tokens of a whole crop, (rows, columns); those of the overview in particular."""
        side, (pool_rows, pool_cols) = self.patches_per_side, self.pool
        return _ceil_div(side, pool_rows), _ceil_div(side, pool_cols)

    def to_dict(self) -> dict[str, Any]:
        """Lists every field in plain JSON types, for the manifest."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ImageView:
        """Reads what `to_dict` or a recipe wrote; an absent field has its default.

        Raises:
          ConfigError: `image_view`, for an unknown field or an impossible value.

        >>> ImageView.from_dict({"size_px": 378, "margin_patches": [4, 4]}).patches_per_side
        27
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(
                    "image_view.unknown",
                    where=f"ImageView.{name}",
                    hint=nearest(name, known),
                    got=fields[name],
                )
        values: dict[str, Any] = {}
        for name, value in fields.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)


_CHOICES: Mapping[str, Any] = {
    "crop_mode": CropMode,
    "fit": Fit,
    "pooling": Pooling,
    "overview_start": OverviewStart,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenIds:
    """The vocabulary entries that an image block is made of."""

    im_start: int
    im_end: int
    im_patch: int
    """Stands where a pooled image feature goes."""
    im_col: int
    """Ends a row of `im_patch`."""
    low_res_im_start: int
    """Opens an overview whose view says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBounds:
    """The most that one image of any size can need."""

    num_crops: int
    """Crops, the overview included."""
    num_tokens: int
    """Tokens of the block, the structure tokens included."""
    num_pooled: int
    """Tokens that stand for pooled patches: rows of `token_pooling`."""


# ---------------------------------------------------------------------------------------- sizes


def canvas_size(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Computes the size that the source is resized to before crops are cut.

    Args:
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.
      view: With fit "pad" the canvas is the picture without its padding, centred on the frame; with
        "center-crop" its shorter side is `size_px`, and the longer one is cut afterwards.

    Returns:
      (width, height) in pixels.

    >>> tiled = ImageView(crop_mode="overlap-and-resize-c2")
    >>> canvas_size(640, 480, ImageView()), canvas_size(640, 480, tiled)
    ((336, 336), (784, 560))
    """
    return _fit_into(width, height, frame_size(width, height, view), view.fit)


def overview_size(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Computes the size that the source is resized to for the overview crop: (width, height).

    It is `canvas_size` of the same view without tiles, and never larger than the canvas.
    """
    _check_size(width, height)
    return _fit_into(width, height, (view.size_px, view.size_px), view.fit)


def frame_size(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Computes the size of the frame that crops are cut from: (width, height) in pixels.

    Equal to `canvas_size` for fit "stretch". For "pad" the canvas lies on the frame with
    (frame - canvas) // 2 pixels of padding left and above; for "center-crop" the frame lies on the
    canvas, (canvas - frame) // 2 pixels from its left and upper borders.
    """
    rows, cols = select_tiling(width, height, view)
    if view.crop_mode == "resize":
        return view.size_px, view.size_px
    return cols * view.window_px + view.margin_px, rows * view.window_px + view.margin_px


def stored_size(
    width: int, height: int, views: Sequence[ImageView], *, headroom: float = 1.0
) -> tuple[int, int]:
    """Computes the size to store a picture at, so that it serves every one of the views.

    Each axis is the largest canvas that a view asks for, times the head room, and never more than
    the source has. The overview needs no more than the canvas. Fits that keep the aspect keep it
    here too, to a rounding of the head room's size.

    Args:
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.
      views: At least one; two crop budgets are two views.
      headroom: Factor >= 1 on both axes, for training that resizes or crops again.

    Returns:
      (width, height) in pixels.

    Raises:
      ConfigError: `stored_size`, for no view or a head room below 1.

    >>> stored_size(4000, 3000, [ImageView(crop_mode="overlap-and-resize-c2")])
    (1008, 784)
    """
    if not views or not 1 <= headroom < math.inf:
        raise ConfigError("stored_size", num_views=len(views), headroom=headroom)
    canvases = [canvas_size(width, height, view) for view in views]
    need_width = math.ceil(headroom * max(w for w, _ in canvases))
    need_height = math.ceil(headroom * max(h for _, h in canvases))
    return min(width, need_width), min(height, need_height)


def _fit_into(width: int, height: int, frame: tuple[int, int], fit: Fit) -> tuple[int, int]:
    if fit == "stretch":
        return frame
    if fit == "center-crop":  # the frame is square: views refuse it together with tiles
        side, short = frame[0], min(width, height)
        return side * width // short, side * height // short
    # float32 and truncation as the models were trained with; in float64 some sizes come out one
    # pixel larger. Neither axis can pass the frame: w * (f / w) rounds to at most the float32
    # above f, which truncates to f.
    w, h = np.float32(width), np.float32(height)
    scale = min(np.float32(frame[0]) / w, np.float32(frame[1]) / h)
    return max(1, int(w * scale)), max(1, int(h * scale))


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise SampleError("image_size.empty", width=width, height=height)


# ---------------------------------------------------------------------------------------- grids


def select_tiling(width: int, height: int, view: ImageView) -> tuple[int, int]:
    """Chooses the grid of high-resolution tiles, (rows, columns); (0, 0) for "resize".

    The grid that holds the picture with the least enlargement; where none holds it, the grid that
    shrinks it least; of equals, the one with fewer tiles, then fewer rows.

    >>> select_tiling(1920, 1080, ImageView(crop_mode="overlap-and-resize-c2"))
    (3, 4)
    """
    _check_size(width, height)
    return (0, 0) if view.crop_mode == "resize" else _select_tiling(width, height, view)


@functools.lru_cache(maxsize=1 << 14)
def _select_tiling(width: int, height: int, view: ImageView) -> tuple[int, int]:
    # Kept, as an example asks eight times for each of its images: 30 µs a time otherwise.
    rows, cols = select_tilings(np.array([width]), np.array([height]), view)[0].tolist()
    return rows, cols


def select_tilings(widths: np.ndarray, heights: np.ndarray, view: ImageView) -> np.ndarray:
    """Chooses the grids of many images; equals `select_tiling` for each.

    Args:
      widths: Integers [N], in pixels, >= 1.
      heights: Integers [N], in pixels, >= 1.
      view: The view.

    Returns:
      int64 [N, 2], (rows, columns).

    Raises:
      SampleError: `image_size`, for a size below 1 pixel.
    """
    widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    bad = np.flatnonzero((widths < 1) | (heights < 1))
    if len(bad):
        _check_size(int(widths[bad[0]]), int(heights[bad[0]]))
    chosen_N2 = np.zeros((len(widths), 2), np.int64)
    if view.crop_mode == "resize":
        return chosen_N2
    grids_K2 = _candidate_grids(view.max_crops)
    # float32 as the models were trained with; it calls scales equal that are not, but only for
    # sides of millions of pixels. A picture inside the margins counts as one pixel.
    targets_K2 = (grids_K2 * view.window_px).astype(np.float32)
    heights_N = np.maximum(heights - view.margin_px, 1).astype(np.float32)
    widths_N = np.maximum(widths - view.margin_px, 1).astype(np.float32)
    for start in range(0, len(widths), _CHUNK):
        part = slice(start, start + _CHUNK)
        scale_NK = np.minimum(
            targets_K2[:, 0] / heights_N[part, None], targets_K2[:, 1] / widths_N[part, None]
        )
        holds_NK = scale_NK >= 1
        least_enlarged_N = np.where(holds_NK, scale_NK, np.float32(np.inf)).argmin(axis=1)
        least_shrunk_N = scale_NK.argmax(axis=1)
        best_N = np.where(holds_NK.any(axis=1), least_enlarged_N, least_shrunk_N)
        chosen_N2[part] = grids_K2[best_N]
    return chosen_N2


@functools.lru_cache(maxsize=64)
def _candidate_grids(max_crops: int) -> np.ndarray:
    """Lists all grids of at most max_crops tiles, the one preferred among equals first."""
    grids = [(i, j) for i in range(1, max_crops + 1) for j in range(1, max_crops // i + 1)]
    grids.sort(key=lambda grid: (grid[0] * grid[1], grid[0]))
    array = np.array(grids, np.int64)
    array.setflags(write=False)
    return array


def crop_boxes(width: int, height: int, view: ImageView) -> np.ndarray:
    """Computes where the high-resolution crops lie on the frame, in the order of crops 1, 2 ...

    Returns:
      int32 [num_crops - 1, 4], (x0, y0, x1, y1) in pixels; x1 and y1 are exclusive. No rows for
      crop_mode "resize".
    """
    rows, cols = select_tiling(width, height, view)
    boxes = np.empty((rows, cols, 4), np.int32)
    boxes[..., 0] = np.arange(cols) * view.window_px
    boxes[..., 1] = np.arange(rows)[:, None] * view.window_px
    boxes[..., 2:] = boxes[..., :2] + view.size_px
    return boxes.reshape(-1, 4)


def patch_grid(width: int, height: int, view: ImageView) -> np.ndarray:
    """Maps the patches of the frame to the crops that they belong to.

    Returns:
      int64 [H, W], indices into the flattened (crop, patch row, patch column) list, in which crop 0
      is the overview. [0, 0] for crop_mode "resize".
    """
    rows, cols = select_tiling(width, height, view)
    return _patch_grid(rows, cols, view)


def _patch_grid(rows: int, cols: int, view: ImageView) -> np.ndarray:
    if rows == 0:
        return np.empty((0, 0), np.int64)
    side, (left, right) = view.patches_per_side, view.margin_patches
    tile_H, y_H = _owners(rows, left, view.window_patches, right)
    tile_W, x_W = _owners(cols, left, view.window_patches, right)
    row_H = (1 + tile_H * cols) * side**2 + y_H * side
    grid_HW: np.ndarray = row_H[:, None] + (tile_W * side**2 + x_W)
    return grid_HW


def _owners(num_tiles: int, left: int, window: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """Assigns the cells of one axis to tiles: (tile, cell inside the tile), int64 each.

    Tile t spans the cells from t * window on, and owns its window; the first and the last tile own
    the outer margins as well.
    """
    cells = np.arange(left + num_tiles * window + right)
    tiles = np.clip((cells - left) // window, 0, num_tiles - 1)
    return tiles, cells - tiles * window


# --------------------------------------------------------------------------------------- counts


def num_crops(width: int, height: int, view: ImageView) -> int:
    """Counts the crops of an image, the overview included."""
    rows, cols = select_tiling(width, height, view)
    return 1 + rows * cols


def num_image_tokens(width: int, height: int, view: ImageView) -> int:
    """Counts the tokens of an image's block, start, end and column tokens included.

    >>> num_image_tokens(640, 480, ImageView(crop_mode="overlap-and-resize-c2"))
    728
    """
    _, num_tokens = image_lengths(np.array([width]), np.array([height]), view)
    return int(num_tokens[0])


def image_lengths(
    widths: np.ndarray, heights: np.ndarray, view: ImageView
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the crops and the tokens of many images; equals the functions for one image.

    A million images take well under a second.

    Args:
      widths: Integers [N], in pixels, >= 1.
      heights: Integers [N], in pixels, >= 1.
      view: The view.

    Returns:
      (`num_crops`, `num_image_tokens`), int64 [N] each.

    Raises:
      SampleError: `image_size`, for a size below 1 pixel.
    """
    grids_N2 = select_tilings(widths, heights, view)
    crops_N, tokens_N, _ = _lengths(grids_N2, view)
    return crops_N, tokens_N


def image_bounds(view: ImageView) -> ImageBounds:
    """Computes the most that an image of any size can need, each count by itself.

    >>> image_bounds(ImageView())
    ImageBounds(num_crops=1, num_tokens=146, num_pooled=144)
    """
    tiled = view.crop_mode != "resize"
    grids_K2 = _candidate_grids(view.max_crops) if tiled else np.zeros((1, 2), np.int64)
    crops, tokens, pooled = (int(counts.max()) for counts in _lengths(grids_K2, view))
    return ImageBounds(num_crops=crops, num_tokens=tokens, num_pooled=pooled)


def _lengths(grids_N2: np.ndarray, view: ImageView) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts (crops, tokens, pooled tokens) of grids, int64 [N] each."""
    crops_N = 1 + grids_N2[:, 0] * grids_N2[:, 1]
    rows, cols = view.crop_tokens
    pooled_N = np.full(len(grids_N2), rows * cols)
    tokens_N = np.full(len(grids_N2), _block_tokens(rows, cols, view.overview_column_tokens))
    if view.crop_mode != "resize":
        rows_N = _tokens_along(grids_N2[:, 0], view, view.pool[0])
        cols_N = _tokens_along(grids_N2[:, 1], view, view.pool[1])
        pooled_N += rows_N * cols_N
        tokens_N += _block_tokens(rows_N, cols_N, view.column_tokens)
    return crops_N, tokens_N, pooled_N


def _block_tokens(rows: Any, cols: Any, column_tokens: bool) -> Any:
    """Counts a start token, the rows and an end token; integers or arrays of them."""
    return 1 + rows * (cols + column_tokens) + 1


def _tokens_along(num_tiles: Any, view: ImageView, pool: int) -> Any:
    """Counts the pooled tokens along one axis of the frame; an integer or an array of them."""
    window, margins = view.window_patches, sum(view.margin_patches)
    if view.pooling == "global":
        return _ceil_div(num_tiles * window + margins, pool)
    # The pool divides each margin, so only the windows are rounded up.
    return num_tiles * _ceil_div(window, pool) + margins // pool


def _ceil_div(number: Any, divisor: int) -> Any:
    return -(-number // divisor)


# --------------------------------------------------------------------------------------- tokens


def image_token_ids(width: int, height: int, view: ImageView, ids: ImageTokenIds) -> np.ndarray:
    """Lays out the token block of one image.

    `[start] overview rows [im_end]`, and for tiles `[im_start] high-resolution rows [im_end]`;
    where the view says so, each row ends with `im_col`.

    Returns:
      int32 [num_image_tokens]; read-only.
    """
    rows, cols = select_tiling(width, height, view)
    block: np.ndarray = _image_token_ids(rows, cols, view, ids)
    return block


@functools.lru_cache(maxsize=1024)
def _image_token_ids(rows: int, cols: int, view: ImageView, ids: ImageTokenIds) -> np.ndarray:
    start = ids.im_start if view.overview_start == "im_start" else ids.low_res_im_start
    parts = [_block_ids(*view.crop_tokens, start, view.overview_column_tokens, ids)]
    if rows:
        token_rows = _tokens_along(rows, view, view.pool[0])
        token_cols = _tokens_along(cols, view, view.pool[1])
        parts.append(_block_ids(token_rows, token_cols, ids.im_start, view.column_tokens, ids))
    block: np.ndarray = np.concatenate(parts)
    block.setflags(write=False)
    return block


def _block_ids(
    rows: int, cols: int, start: int, column_tokens: bool, ids: ImageTokenIds
) -> np.ndarray:
    block = np.full(_block_tokens(rows, cols, column_tokens), ids.im_patch, np.int32)
    block[0] = start
    block[-1] = ids.im_end
    if column_tokens:
        block[1:-1].reshape(rows, cols + 1)[:, -1] = ids.im_col
    return block


def token_pooling(width: int, height: int, view: ImageView) -> np.ndarray:
    """Lists the patches that each `im_patch` token of an image pools, in the order of the tokens.

    Returns:
      int64 [num_pooled, pool rows * pool columns], row-major inside a group: indices into the
      flattened (crop, patch) list, -1 (`NO_PATCH`) beyond the border; read-only.
    """
    rows, cols = select_tiling(width, height, view)
    pooling: np.ndarray = _kept_pooling(rows, cols, view)
    return pooling


@functools.lru_cache(maxsize=256)
def _kept_pooling(rows: int, cols: int, view: ImageView) -> np.ndarray:
    pooling = _token_pooling(rows, cols, view)
    pooling.setflags(write=False)
    return pooling


def _token_pooling(rows: int, cols: int, view: ImageView) -> np.ndarray:
    side = view.patches_per_side
    overview = np.arange(side**2).reshape(side, side)
    if view.pooling == "global":
        grids = [overview, _patch_grid(rows, cols, view)]
        return np.concatenate([_pool_global(grid, view.pool) for grid in grids])
    # Per crop, padding is at the end alone: token k of a crop starts at patch k * pool.
    padded = np.full(tuple(np.multiply(view.crop_tokens, view.pool)), NO_PATCH, np.int64)
    padded[:side, :side] = overview
    groups = _group(padded, view.pool)
    if rows == 0:
        return groups
    crop_RC, cell_RC = _token_cells(rows, cols, view)
    high_res = groups[cell_RC.ravel()]
    shift = crop_RC.reshape(-1, 1) * view.num_patches
    return np.concatenate([groups, np.where(high_res == NO_PATCH, NO_PATCH, high_res + shift)])


def first_patch_tokens(width: int, height: int, view: ImageView) -> np.ndarray:
    """Finds the first `im_patch` token of an image that pools a patch of each crop.

    Returns:
      int64 [num_crops], numbers of the image's `im_patch` tokens; read-only.

    >>> first_patch_tokens(640, 480, ImageView(crop_mode="overlap-and-resize-c2", max_crops=2))
    array([  0, 144, 154])
    """
    rows, cols = select_tiling(width, height, view)
    return _first_patch_tokens(rows, cols, view)


@functools.lru_cache(maxsize=1024)
def _first_patch_tokens(rows: int, cols: int, view: ImageView) -> np.ndarray:
    pooled = _token_pooling(rows, cols, view)
    crop_of = np.where(pooled == NO_PATCH, -1, pooled // view.num_patches)
    firsts = [np.argmax((crop_of == c).any(axis=1)) for c in range(1 + rows * cols)]
    array = np.array(firsts, np.int64)
    array.setflags(write=False)
    return array


def first_patch_positions(
    width: int, height: int, view: ImageView, ids: ImageTokenIds
) -> np.ndarray:
    """Finds the tokens of `first_patch_tokens` in the block of `image_token_ids`.

    Returns:
      int64 [num_crops], positions in the block; read-only.
    """
    rows, cols = select_tiling(width, height, view)
    return _first_patch_positions(rows, cols, view, ids)


@functools.lru_cache(maxsize=1024)
def _first_patch_positions(rows: int, cols: int, view: ImageView, ids: ImageTokenIds) -> np.ndarray:
    patches = np.flatnonzero(_image_token_ids(rows, cols, view, ids) == ids.im_patch)
    positions: np.ndarray = patches[_first_patch_tokens(rows, cols, view)]
    positions.setflags(write=False)
    return positions


def _pool_global(grid_HW: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Pads a grid of indices to whole groups, the odd line at the end, and groups it."""
    height, width = grid_HW.shape
    full = (_ceil_div(height, pool[0]) * pool[0], _ceil_div(width, pool[1]) * pool[1])
    top, left = (full[0] - height) // 2, (full[1] - width) // 2
    padded = np.full(full, NO_PATCH, np.int64)
    padded[top : top + height, left : left + width] = grid_HW
    return _group(padded, pool)


def _group(grid_HW: np.ndarray, pool: tuple[int, int]) -> np.ndarray:
    """Cuts a grid into groups of pool rows x pool columns: [groups, pool rows * pool columns]."""
    height, width = grid_HW.shape
    blocks = grid_HW.reshape(height // pool[0], pool[0], width // pool[1], pool[1])
    groups: np.ndarray = blocks.transpose(0, 2, 1, 3).reshape(-1, pool[0] * pool[1])
    return groups


def _token_cells(rows: int, cols: int, view: ImageView) -> tuple[np.ndarray, np.ndarray]:
    """Finds the high-resolution tokens in the crops, for pooling that stays inside crops.

    Pooled by the pool, an axis of patches is an axis of tokens with the same structure: margins and
    windows, each divided by the pool.

    Returns:
      Two int64 [R, C]: the crop of each token, from 1, and its cell of the crop's token grid.
    """
    left, right = view.margin_patches
    (pool_rows, pool_cols), window = view.pool, view.window_patches
    tile_R, y_R = _owners(rows, left // pool_rows, _ceil_div(window, pool_rows), right // pool_rows)
    tile_C, x_C = _owners(cols, left // pool_cols, _ceil_div(window, pool_cols), right // pool_cols)
    crop_RC = 1 + tile_R[:, None] * cols + tile_C
    return crop_RC, y_R[:, None] * view.crop_tokens[1] + x_C


def image_input_idx(width: int, height: int, view: ImageView, *, offset: int = 0) -> np.ndarray:
    """Places the pooled tokens of every crop in the text (the layout of the 2024 release).

    Args:
      width: Width of the upright source, in pixels, >= 1.
      height: Height of the upright source, in pixels, >= 1.
      view: Its pooling must stay inside crops: "per-crop", or a pool that divides both margins and
        the window, or no tiles at all.
      offset: Position of the block's first token in the input sequence.

    Returns:
      int32 [num_crops, tokens of a crop]: positions in the input sequence, row 0 for the overview;
      -100 (`EXCLUDED`) for tokens that lie in a neighbour's part of an overlap.

    Raises:
      ConfigError: `image_view`, for pooling across crops.
    """
    rows, cols = select_tiling(width, height, view)
    if rows and view.pooling == "global":
        parts = (*view.margin_patches, view.window_patches)
        inside = all(part % p == 0 for part in parts for p in view.pool)
        want = f'"per-crop" for image_input_idx, or a pool that divides {parts} patches'
        _require(view, "pooling", inside, want)
    token_rows, token_cols = view.crop_tokens
    idx = np.full((1 + rows * cols, token_rows * token_cols), EXCLUDED, np.int32)
    columns = view.overview_column_tokens
    idx[0] = _positions(token_rows, token_cols, columns, first=offset + 1).ravel()
    if rows:
        first = offset + _block_tokens(token_rows, token_cols, columns) + 1
        crop_RC, cell_RC = _token_cells(rows, cols, view)
        num_rows, num_cols = crop_RC.shape
        idx[crop_RC, cell_RC] = _positions(num_rows, num_cols, view.column_tokens, first=first)
    return idx


def _positions(rows: int, cols: int, column_tokens: bool, *, first: int) -> np.ndarray:
    """Numbers the `im_patch` tokens of one block: int64 [rows, cols], skipping column tokens."""
    starts = first + np.arange(rows)[:, None] * (cols + column_tokens)
    positions: np.ndarray = starts + np.arange(cols)
    return positions


def image_masks(width: int, height: int, view: ImageView) -> np.ndarray:
    """Computes the share of every patch that shows the picture and not padding.

    Returns:
      float32 [num_crops, patches of a crop] in [0, 1], the overview first; all ones unless fit is
      "pad".
    """
    rows, cols = select_tiling(width, height, view)
    masks = np.ones((1 + rows * cols, view.num_patches), np.float32)
    if view.fit != "pad":
        return masks
    size, side = view.size_px, view.patches_per_side
    columns, lines = (_covered(n, size, view) for n in overview_size(width, height, view))
    masks[0] = np.outer(lines, columns).ravel()
    if rows:
        frame = frame_size(width, height, view)
        canvas = _fit_into(width, height, frame, view.fit)
        columns, lines = (_covered(n, f, view) for n, f in zip(canvas, frame, strict=True))
        patch_P = np.arange(side)
        lines_RP = lines[np.arange(rows)[:, None] * view.window_patches + patch_P]
        columns_CP = columns[np.arange(cols)[:, None] * view.window_patches + patch_P]
        tiles_RCPP = lines_RP[:, None, :, None] * columns_CP[None, :, None, :]
        masks[1:] = tiles_RCPP.reshape(rows * cols, -1)
    # Whole counts until here: one division gives the float32 nearest to the share.
    masks /= np.float32(view.patch_px**2)
    return masks


def _covered(length: int, frame: int, view: ImageView) -> np.ndarray:
    """Counts the pixels of a picture centred on a frame that fall into each patch, on one axis."""
    borders = np.arange(0, frame + 1, view.patch_px)
    return np.diff(np.clip(borders - (frame - length) // 2, 0, length))


def _is_int(value: object, *, at_least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= at_least


def _require(view: ImageView, name: str, good: bool, want: str) -> None:
    if not good:
        raise ConfigError(
            "image_view.value",
            where=f"ImageView.{name}",
            name=name,
            got=repr(getattr(view, name)),
            want=want,
        )
