"""Texts whose coordinates follow the picture."""

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loader.assembly import Augment, MolmoPreprocessor, View
from loader.assembly.own_augment import OwnAugment
from preprocess.media import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy, load_tokenizer
from shardspec.errors import ConfigError
from shardspec.index import longest_sequence
from shardspec.sample import Geometry, point_lists
from shardspec.tiling import ImageView, num_image_tokens
from tests.digits import write_digit_tokenizer

VIEW = ImageView(size_px=28, patch_px=14, pool=(1, 1))
SIZES = ((20, 10), (26, 28))
"""Of pictures that are stored as they are."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A function that loads a tokenizer of digits for a message format."""
    folder = str(write_digit_tokenizer(tmp_path_factory.mktemp("digits")))
    return cache(
        lambda message_format: load_tokenizer(
            folder, policy=TextPolicy(message_format=message_format)
        )
    )


@pytest.fixture(scope="module")
def prepared(tokenizer):
    """A function that prepares messages about pictures of SIZES, in "FORMAT_OF_POINTS MARKUP"."""

    @cache
    def preparer(form):
        points, markup = form.split()
        text = TextPolicy(point_format=points, message_format=markup, num_variants=2, movable=True)
        image = ImagePolicy(views=(VIEW,), codec="raw")
        return Preparer(recipe=Recipe(text=text, image=image), tokenizer=tokenizer(markup))

    def prepare(*messages, form="xml role", num_images=1):
        pictures = [np.zeros((h, w, 3), np.uint8) for w, h in SIZES[:num_images]]
        given = {"image": pictures, "message_list": messages}
        return preparer(form)(given, key="k")

    return prepare


@pytest.fixture(scope="module")
def shown(tokenizer):
    """A function that gives the responses of a sample as training sees them, and its length."""

    def show(sample, augment=None, seed=0):
        view, ids = View(image=VIEW, augment=augment or Augment()), tokenizer("role").special_ids
        assemble = MolmoPreprocessor(lambda _: sample, special_ids=ids, view=view)
        made = assemble({}, np.random.RandomState(seed))
        labels = made["labels"]
        return tokenizer("role").decode(labels[labels >= 0].tolist()), len(labels)

    return show


class Affine:
    """Scales, flips and shifts points by a draw, and remembers what it gave; not the pictures."""

    def __init__(self, reach):
        self.reach = reach
        self.given = {}

    def __call__(self, image, rng):
        return image

    def points(self, points_N2, rng, *, width, height):
        size = np.array([width, height])
        scale, shift = rng.uniform(-1, 1, (2, 2)) * self.reach
        middle = size / 2
        moved = (points_N2 - middle) * scale + middle + shift * size / 4
        self.given[width, height] = moved
        return moved

    fingerprint = "affine"


def pairs(least=1):
    """Shares of a picture: multiples of 1/2000, where roundings are close, and any others."""
    share = st.one_of(st.integers(0, 2000).map(lambda i: i / 2000), st.floats(0, 1))
    return st.lists(st.tuples(share, share), min_size=least, max_size=6)


def scaled(points, size):
    return (np.array(points, np.float64).reshape(-1, 2) * size).tolist()


def boxes_between(points):
    """Boxes with an area, each between two neighbours in a list."""
    found = [
        [*np.minimum(a, b), *np.maximum(a, b)] for a, b in zip(points, points[1:], strict=False)
    ]
    return [box for box in found if box[0] + 1 < box[2] and box[1] + 1 < box[3]] or [[1, 1, 9, 4]]


def boxes_around(corners):
    edges = corners.reshape(-1, 4, 2)
    return np.concatenate([edges.min(axis=1), edges.max(axis=1)], axis=1)


def pointing(groups):
    return {"style": "pointing", "label": "a 10.0 dog", "points": groups[0]}


def counting(groups):
    return {"style": "point_then_count", "label": "x1", "points": groups[0]}


def grouped(groups):
    return {"style": "multi_image_pointing", "label": "dog", "points": groups}


def inline(groups):
    shares = (np.array(groups[0]) / SIZES[0]).tolist()
    mark = {"inline_text": "dog", "alt_text": "2.0", "points": shares}
    answer = {"answer": "<|POINT|> and <|POINT|>.", "answer_annotations": [mark, mark]}
    return {"style": "point_qa", "question": "Where?", "point_scale": 1.0, **answer}


def boxed(notation):
    def boxes(groups):
        named = [f"{i} dogs" for i in range(len(groups[0]))]
        shares = (np.array(groups[0]) / (SIZES[0] * 2)).tolist()
        given = {"label": named, "boxes": shares, "point_scale": 1.0}
        return {"style": "boxes", "notation": notation, **given}

    return boxes


KINDS = [
    pytest.param(pointing, "xml role", id="xml"),
    pytest.param(pointing, "coords role", id="coords"),
    pytest.param(pointing, "coords template", id="template"),
    pytest.param(counting, "coords chatml", id="counted"),
    pytest.param(grouped, "coords role", id="images"),
    pytest.param(inline, "xml role", id="inline"),
    *(pytest.param(boxed(name), "xml role", id=name) for name in ("json", "ref", "brackets")),
]


@pytest.mark.parametrize("make, form", KINDS)
@given(
    groups=st.tuples(pairs(), pairs(0)), reach=st.sampled_from([0.3, 1.0]), seed=st.integers(0, 9)
)
@example(groups=([(0, 0), (1, 1)], []), reach=0.3, seed=0)
@settings(max_examples=6)
def test_a_text_is_that_of_its_moved_points(make, form, groups, reach, seed, prepared, shown):
    sizes = SIZES if make is grouped else SIZES[:1]
    groups = [scaled(own, size) for own, size in zip(groups, sizes, strict=False)]
    boxed = make.__name__ == "boxes"
    if boxed:
        groups = [boxes_between(groups[0])]

    def sample_of(groups):
        return prepared(make(groups), form=form, num_images=len(sizes))

    sample, own = sample_of(groups), Affine(reach)
    text, length = shown(sample, OwnAugment(own), seed)
    for i, size in enumerate(sizes):
        given = own.given.get(size, np.zeros((0, 2)))  # one without points is not asked
        if np.all(given >= 0) and np.all(given <= size):  # else it was the last of all draws
            given = boxes_around(given) if boxed else given[: len(groups[i])]
            groups[i] = given.tolist()
    assert text == shown(sample_of(groups))[0]
    # Batches and packs are planned by the longest that a sample may be.
    visual = sum(num_image_tokens(*size, VIEW) for size in sizes)
    assert length <= longest_sequence(sample.tokens, sample.spans)[0] + visual


@pytest.mark.parametrize("make, form", KINDS)
def test_our_own_flips_move_the_points_too(make, form, prepared, shown):
    num_images = 2 if make is grouped else 1
    boxed = make.__name__ == "boxes"
    at, mirrored = ([[8, 4, 11, 6]], [[9, 4, 12, 6]]) if boxed else ([[8, 5]], [[12, 5]])
    sample, want = (
        prepared(make([points, []]), form=form, num_images=num_images) for points in (at, mirrored)
    )
    assert shown(sample, Augment(flip_probability=1.0))[0] == shown(want)[0]
    cut = Augment(crop_scale=(0.7, 0.7))
    assert shown(sample, cut)[0] != shown(sample)[0], "a crop that keeps all points is used"
    border = prepared(
        make([[[0, 0, 20, 10]] if boxed else [[0, 0], [20, 10]], []]),
        form=form,
        num_images=num_images,
    )
    assert shown(border, cut)[0] == shown(border)[0], "one that cuts any off is not"


def test_what_else_would_become_wrong_is_as_before(prepared):
    def allowed(*messages, num_images=1):
        lists = point_lists(prepared(*messages, num_images=num_images).spans)
        return {Geometry(each.geometry) for each in lists}

    at = pointing([[[2, 3]]])
    assert allowed(at) == {Geometry.ALL}
    assert allowed(at, {"style": "user_qa", "question": "Left?", "answer": "No."}) == {
        Geometry.CROP | Geometry.COLOR
    }
    counted = {"style": "user_qa", "question": "How many are there?", "answer": "2"}
    assert allowed(at, counted) == {Geometry.FLIP | Geometry.COLOR}
    # Nothing is there to move, and the picture may as well be like all others.
    assert allowed({**at, "points": []}) == {Geometry.ALL}
    # Of which image, at which place, or how many: nothing of it could be kept true.
    for wrong in (
        [at, {"style": "user_qa", "question": "What is at (10, 20)?", "answer": "x"}],
        [at, {"style": "count", "label": "dog", "points": [[2, 3]]}],
        [{"style": "cosyn_point", "question": "?", "points": [[2, 3]]}],
        [{**at, "points": [[-1, 3]]}],
        [boxed("json")([[[1, 1, 1 + 1e-9, 5]]])],
        [{"style": "user_qa", "question": "What?", "answer": "x"}],
    ):
        assert allowed(*wrong) == set()
    assert allowed(at, num_images=2) == set()


def test_a_function_without_points_leaves_them_alone(prepared, shown, caplog):
    sample = prepared(pointing([[[2, 3]]]))
    own = OwnAugment(lambda image, rng: image[:, ::-1])
    assert shown(sample, own) == shown(sample)
    assert "MOVABLE=1" in caplog.text
    outside = Affine(0.0)
    outside.points = lambda points, rng, *, width, height: points + width
    assert shown(sample, OwnAugment(outside)) == shown(sample)
    assert "out of the picture" in caplog.text
    outside.points = lambda points, rng, *, width, height: points * np.nan
    assert shown(sample, OwnAugment(outside)) == shown(sample)
    outside.points = lambda points, rng, *, width, height: points + np.random.random()  # noqa: NPY002
    with pytest.raises(ConfigError) as caught:
        shown(sample, OwnAugment(outside))
    assert caught.value.reason == "augment_function"


def test_pictures_without_points_are_not_asked_for_them(prepared, shown):
    sample = prepared(grouped([[[2, 3]], []]), form="coords role", num_images=2)
    own = Affine(0.5)
    text, _ = shown(sample, OwnAugment(own))
    assert text != shown(sample)[0]
    assert [*own.given] == [SIZES[0]]


def test_points_on_the_border_may_move_in_float32(prepared, shown):
    class Mirrored(Affine):
        def points(self, points_N2, rng, *, width, height):
            return (width, height) - points_N2 - np.float32(2e-6)  # as a matrix of float32 gives

    sample = prepared(pointing([[[20, 10], [2, 3]]]))
    want = prepared(pointing([[[0, 0], [18, 7]]]))
    assert shown(sample, OwnAugment(Mirrored(1))) == shown(want)


def test_equal_texts_about_other_points_move_apart(prepared, shown):
    close = [{**pointing([[[x, 3]]]), "label": "dog"} for x in (2.0, 2.004)]
    sample = prepared(*close)
    assert len(point_lists(sample.spans)) == 2
    text, _ = shown(sample, Augment(flip_probability=1.0))
    assert (
        text
        == shown(prepared(*({**one, "points": [[20 - one["points"][0][0], 3]]} for one in close)))[
            0
        ]
    )


def test_tokenizers_and_models_that_cannot_are_refused_by_name(tokenizer):
    recipe = Recipe(text=TextPolicy(movable=True))
    for preparer in (
        Preparer(recipe=recipe, tokenizer=load_tokenizer()),
        Preparer(recipe=recipe, tokenizer=tokenizer("role"), model=object()),
    ):
        with pytest.raises(ConfigError) as caught:
            _ = preparer.digits
        assert caught.value.reason == "movable"
    assert "movable" not in Recipe().to_dict()["text"]
