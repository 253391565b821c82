"""Rows of documents: what they become, and which are refused."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocess.datasets import DocumentDataset
from preprocess.documents import read_document
from preprocess.formats import DOCUMENT_TASKS, DocumentPolicy, Spec, document_request
from preprocess.text import TextPolicy, add_ocr
from preprocess.text.ocr import fit_pieces
from preprocess.text.styles import STYLES, Draw
from shardspec.errors import ConfigError, SampleError
from tests.examples import examples
from tests.preprocess.documents import made

ASKED = {"question": "What is the total?", "answer": "12.50"}
PAGE = np.full((200, 300, 3), 255, np.uint8)
PDF = made.pdf([[(f"Page{number}", 72, 700)] for number in range(1, 5)])
TWO_PAGES = made.tiff([(30, 20), (20, 30)])


def example(row, **policy):
    kind = type(
        "Papers", (DocumentDataset,), {"policy": DocumentPolicy(**policy), "load": lambda _: [row]}
    )
    return kind().get(0)


def reason(row, **policy):
    with pytest.raises(SampleError) as caught:
        example(row, **policy)
    return caught.value.reason


def test_questions_whose_evidence_is_not_kept_are_left_out():
    questions = [{**ASKED, "evidence_pages": [page]} for page in (2, 4)]
    got = example({"document": PDF, "questions": questions}, max_pages=1)
    assert got["metadata"]["pages"] == [2]
    assert len(got["message_list"]) == 1
    assert got["leads"] == ["Page 2"]
    assert got["metadata"]["questions_left_out"] == 1
    of_row = {"document": PDF, "questions": [ASKED], "evidence_pages": [2, 4]}
    got = example(of_row, max_pages=1)
    assert (got["message_list"], got["metadata"]["questions_left_out"]) == ([], 1)
    assert "questions_left_out" not in example(of_row, max_pages=2)["metadata"]
    assert reason({**of_row, "evidence_pages": [5]}) == "document_page_number"


def test_the_pages_of_boxes_are_evidence():
    asked = {**ASKED, "boxes": [{"page": 4, "box": [0.2, 0.4, 0.4, 0.6]}]}
    got = example({"document": PDF, "questions": [asked, {**ASKED, "evidence_pages": [3]}]})
    assert got["metadata"]["pages"] == [1, 2, 3, 4]
    got = example({"document": PDF, "questions": [asked]}, max_pages=2)
    assert got["metadata"]["pages"] == [1, 4]
    got = example({"document": PDF, "questions": [asked], "page_numbers": [1]})
    assert got["metadata"]["questions_left_out"] == 1


def test_a_box_without_a_page_is_on_the_only_page_that_is_possible():
    asked = {**ASKED, "boxes": [{"box": [0.2, 0.4, 0.4, 0.6]}]}
    row = {"document": PDF, "questions": [{**asked, "evidence_pages": [3]}]}
    (message,) = example(row, tasks=("grounded",))["message_list"]
    assert [len(points) for points in message["points"]] == [0, 0, 1, 0]
    (message,) = example(
        {"document": PDF, "questions": [asked], "page_numbers": [2]}, tasks=("grounded",)
    )["message_list"]
    assert message["points"][0]
    assert reason({"document": PDF, "questions": [asked]}) == "row_fields"


@pytest.mark.parametrize(
    ("page", "want"),
    [({}, "row_fields"), ({"page": 0}, "row_fields"), ({"page": 5}, "document_page_number")],
)
@pytest.mark.parametrize("name", ["regions", "tables"])
def test_parts_of_pages_that_are_not_there_cost_the_row(name, page, want):
    part = {"box": [0, 0, 1, 1], "text": "a", "rows": [["a"]], **page}
    row = {"document": PDF, **ASKED, name: [part]}
    assert reason(row, tasks=("region", "table")) == want


def test_pages_may_be_chosen_and_keep_their_numbers():
    got = example({"document": PDF, "page_numbers": [4, 2], **ASKED})
    assert got["metadata"]["pages"] == [2, 4]
    assert [page["page"] for page in got["metadata"]["ocr"]] == [2, 4]
    assert reason({"document": PDF, "page_numbers": [5], **ASKED}) == "document_page_number"


def test_mp_docvqa_counts_its_pages_from_0():
    row = {"pages": [PAGE] * 3, "answer_page_idx": 2, **ASKED}
    assert example(row, max_pages=1)["metadata"]["pages"] == [3]


def test_a_page_alone_has_no_number():
    got = example({"image": PAGE, **ASKED})
    assert "leads" not in got
    assert got["metadata"] == {}


def test_ocr_may_come_for_the_document_or_for_each_page():
    ocr = {"width": 300, "height": 200, "words": [["a", 0, 0, 9, 9, 0]]}
    pages = {"pages": [PAGE, PAGE], **ASKED}
    for source in ([ocr, ocr], {"pages": [ocr, ocr]}, json.dumps([ocr, ocr]).encode()):
        found = example({**pages, "ocr": source})["metadata"]["ocr"]
        assert [page["page"] for page in found] == [1, 2]
    assert reason({**pages, "ocr": [ocr] * 3}) == "ocr_pages"


@pytest.mark.parametrize(
    ("sides", "picture", "fits"),
    [
        ((600, 400), (30, 20), True),
        ((600, 400), (20, 30), False),
        ((400, 600), (30, 20), False),
        ((600, 400), (28, 30), False),
        ((600, 400), (20, 20), True),
        ((600, 600), (20, 30), True),
        ((600, 590), (20, 30), True),
        ((600, 400), (90, 20), True),  # stretched: boxes are shares
    ],
)
def test_ocr_of_a_page_that_is_turned_is_a_reason(sides, picture, fits):
    sources = {each.__name__: each(size=sides) for each in (made.hocr, made.alto, made.page_xml)}
    sources["azure"] = made.azure(size=sides)
    sources["plain"] = {"width": sides[0], "height": sides[1], "words": [["a", 0, 0, 9, 9]]}
    shares = {"textract": made.textract(size=sides)}
    row = {"image": np.zeros((*picture[::-1], 3), np.uint8), **ASKED}
    for name, source in {**sources, **shares}.items():
        if fits or name in shares:
            assert example({**row, "ocr": source})["metadata"]["ocr"][0]["words"], name
        else:
            assert reason({**row, "ocr": source}) == "ocr_turned", name


def test_a_picture_that_its_orientation_turns_has_the_ocr_of_what_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 30)).save(tmp_path / "turned.jpg", exif=exif)
    ocr = {"width": 300, "height": 200, "words": [["a", 0, 0, 9, 9]]}
    row = {"image": str(tmp_path / "turned.jpg"), **ASKED}
    assert example({**row, "ocr": ocr})["metadata"]["ocr"]
    assert reason({**row, "ocr": {**ocr, "width": 200, "height": 300}}) == "ocr_turned"


def test_text_layers_can_be_left_alone():
    assert "ocr" not in example({"document": PDF, **ASKED}, text_layer=False)["metadata"]
    assert example({"document": PDF, **ASKED})["metadata"]["ocr"][0]["words"][0][0] == "Page1"


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({**ASKED}, "row_image"),
        ({"image": PAGE, "answer": "12.50"}, "row_fields"),
        ({"image": PAGE, "question": "What?"}, "row_fields"),
        ({"image": PAGE, "questions": [3]}, "row_fields"),
        ({"image": PAGE, **ASKED, "evidence_pages": [0]}, "row_fields"),
        ({"image": PAGE, **ASKED, "page_numbers": ["a"]}, "row_fields"),
        ({"pages": ["https://a.b/c.pdf"] * 2, **ASKED}, "document_url"),
        ({"pages": [PAGE, TWO_PAGES], **ASKED}, "document_files"),
        ({"document": "/nowhere/a.pdf", **ASKED}, "image_missing"),
        ({"image": PAGE, "questions": [{**ASKED, "boxes": [{"box": [0, 0, 9, 9]}]}]}, "ocr_boxes"),
        ({"image": PAGE, "questions": [{**ASKED, "boxes": [{"box": "a"}]}]}, "ocr_boxes"),
        ({"image": PAGE, "questions": [{**ASKED, "boxes": 3}]}, "row_fields"),
        ({"image": PAGE, **ASKED, "fields": [3]}, "row_fields"),
        ({"image": PAGE, **ASKED, "tables": [{"rows": [[1], [1, 2]]}]}, "row_fields"),
        ({"image": PAGE, **ASKED, "tables": [{"rows": 3}]}, "row_fields"),
        ({"image": PAGE, **ASKED, "regions": 3}, "row_fields"),
    ],
)
def test_rows_that_mean_nothing_have_a_reason(row, want):
    assert reason(row, tasks=("qa", "grounded", "key_value", "table", "region")) == want


def test_grounded_answers_on_several_pages_point_at_each():
    boxes = [{"page": 2, "box": [0.2, 0.4, 0.4, 0.6]}, {"page": 1, "box": [0, 0, 0.5, 1]}]
    row = {"pages": [PAGE, PAGE], "questions": [{**ASKED, "boxes": boxes}]}
    (message,) = example(row, tasks=("grounded",))["message_list"]
    assert message["style"] == "multi_image_pointing"
    assert message["points"][0] == [[0.25, 0.5]]
    assert message["points"][1][0] == pytest.approx([0.3, 0.5])


def test_grounded_answers_may_be_boxes_on_each_page():
    boxes = [{"page": 2, "box": [0.2, 0.4, 0.4, 0.6]}, {"page": 1, "box": [0, 0, 0.5, 1]}]
    row = {"pages": [PAGE, PAGE, PAGE], "questions": [{**ASKED, "boxes": boxes}]}
    first, second = example(row, tasks=("grounded",), grounding="box")["message_list"]
    assert first["question"].endswith("Give the boxes of the answer on page 1.")
    assert second["boxes"] == [[0.2, 0.4, 0.4, 0.6]]
    style = STYLES["boxes"]
    draw = Draw(style=style, policy=TextPolicy(), rng=np.random.RandomState(0))
    want = '[{"bbox_2d": [200, 400, 400, 600], "label": "12.50"}]'
    assert style.draw(second, draw)[1] == want


def test_a_transcription_has_no_ocr_in_front_of_it():
    got = example({"document": PDF, **ASKED}, ocr="text", tasks=("qa", "transcription"))
    assert ["ocr" in message for message in got["message_list"]] == [True] + [False] * 4


SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.sampled_from(["qa", "<a/>", "[1]", b"<alto/>", {"form": []}]),
)
NAMES = ["page", "box", "text", "rows", "words", "width", "height", "question", "answer", "boxes"]
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=8,
)
COLUMNS = ["questions", "ocr", "ocr_text", "regions", "fields", "tables", "evidence_pages"]
COLUMNS += ["page_numbers", "question", "answer", "answers", "boxes", "answer_page_idx", "texts"]


@given(row=st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5), good=st.booleans())
@settings(max_examples=examples(200))
def test_a_row_of_any_shape_is_an_example_or_one_bad_row(row, good):
    """Whatever else a row has: an error of another kind would name no field."""
    given = {"pages": [PAGE, PAGE], **row, **(ASKED if good else {})}
    policy = DocumentPolicy(tasks=DOCUMENT_TASKS, box_unit="page", max_pages=1)
    with contextlib.suppress(SampleError):
        found = read_document(
            {**document_request(given, Spec(name="own", format="documents")), "metadata": {}},
            policy=policy,
        )
        assert json.loads(json.dumps(found["metadata"], allow_nan=False)) == found["metadata"]
        json.dumps(found["message_list"], allow_nan=False)
        assert len(found["image"]) == 1


def words(number):
    return [[f"word{n}", n, 0, n + 1, 1, n // 3] for n in range(number)]


@pytest.mark.parametrize("mode", ["text", "words_with_boxes"])
@pytest.mark.parametrize("budget", [1, 2, 5, 17, 1000])
def test_the_text_of_a_document_keeps_to_its_budget(mode, budget):
    page = {"page": 1, "width": 40, "height": 10, "words": words(30)}
    message = {"style": "doc_qa", **ASKED, "ocr": mode, "ocr_tokens": budget}
    given = {"message_list": [message], "metadata": {"ocr": [page]}}
    (ready,) = add_ocr(given, encode=str.split)["message_list"]
    text, _, question = ready["question"].rpartition("\n\n")
    assert question == ASKED["question"]
    assert len(text.split()) <= budget
    assert "ocr" not in ready
    if budget == 1000:
        lines = {"text": "word0 word1 word2\nword3", "words_with_boxes": "word0 [0, 0, 25, 100]\n"}
        assert text.startswith(lines[mode])
        assert text.count("word") == 30


def test_as_many_pieces_as_fit_are_kept():
    pieces = [f" {'x' * n}" for n in range(1, 40)]
    for budget in range(1, 800, 7):
        text = fit_pieces(pieces, budget=budget, encode=list)
        more = len(text.split()) + 1
        assert len(text) <= budget
        assert more > len(pieces) or len("".join(pieces[:more]).strip()) > budget


@pytest.mark.parametrize(
    "table",
    [
        {"max_pages": -1},
        {"dpi": 5},
        {"dpi": "150"},
        {"ocr": "all"},
        {"ocr_tokens": 0},
        {"tasks": []},
        {"tasks": ["sing"]},
        {"box_unit": "mile"},
        {"grounding": "line"},
        {"text_layer": 1},
        {"colour": 1},
    ],
)
def test_policies_that_mean_nothing_are_refused(table):
    with pytest.raises(ConfigError, match="documents"):
        DocumentPolicy.from_table(table)
