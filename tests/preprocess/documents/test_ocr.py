import json

import pytest

from preprocess.documents import parse_ocr
from preprocess.documents.markup import MAX_DEPTH, MAX_OCR_BYTES, parse_html
from shardspec.errors import SampleError
from tests.preprocess.documents import made

LAYOUTS = {
    "hocr": made.hocr(),
    "alto-pixel": made.alto(),
    "alto-mm10": made.alto(unit="mm10", scale=0.5),
    "page-xml": made.page_xml(),
    "azure": json.dumps(made.azure()).encode(),
    "azure-inch": made.azure(unit="inch", scale=0.01),
    "textract": made.textract(),
    "funsd": made.funsd(),
    "plain": {
        "width": 300,
        "height": 200,
        "words": [[text, *box, line] for text, box, line in made.WORDS],
    },
    "plain-records": {
        "pages": [
            {
                "width": 300,
                "height": 200,
                "words": [{"text": t, "box": b, "line": n} for t, b, n in made.WORDS],
            }
        ]
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_words_at_the_same_places(name):
    (page,) = parse_ocr(LAYOUTS[name], page_sizes=[(300, 200)])
    assert [word.text for word in page.words] == ["Total", "12.50", "EUR"]
    assert page.lines() == ["Total 12.50", "EUR"]
    for word, (_, box, _) in zip(page.words, made.WORDS, strict=True):
        shares = [v / full for v, full in zip(word.box, (page.width, page.height) * 2, strict=True)]
        want = [v / full for v, full in zip(box, (300, 200) * 2, strict=True)]
        assert shares == pytest.approx(want, abs=0.006)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_files_may_be_in_utf_16(encoding):
    bom = "\ufeff" if encoding == "utf-16-be" else ""
    xml = made.alto().decode().replace("UTF-8", "UTF-16")
    for text in (xml, made.hocr().decode(), json.dumps(made.azure())):
        (page,) = parse_ocr((bom + text).encode(encoding))
        assert [word.text for word in page.words] == ["Total", "12.50", "EUR"]
    with pytest.raises(SampleError):
        parse_ocr(b"\xff\xfe" + xml.encode("utf-16-le")[:-1])


def test_a_page_has_a_bounded_text():
    words = [["a" * 100, 0, 0, 1, 1]] * 2001
    with pytest.raises(SampleError) as caught:
        parse_ocr({"width": 9, "height": 9, "words": words})
    assert caught.value.reason == "document_text"


def test_forms_of_funsd_give_their_keys_and_values():
    (page,) = parse_ocr(made.funsd(), page_sizes=[(300, 200)])
    assert page.pairs == (("Total", "12.50"),)


def test_a_page_without_words_of_its_lines_has_the_lines():
    xml = made.page_xml().replace(b"<Word>", b"").replace(b"</Word>", b"")
    (page,) = parse_ocr(xml)
    assert len(page.words) == 2


def test_words_of_hocr_are_read_once_wherever_their_lines_are():
    def span(kind, text):
        return f'<span class="{kind}" title="bbox 1 1 20 20">{text}</span>'

    words = [span("ocrx_word", text) for text in "abcde"]
    inner = span("ocr_line", words[1])
    body = "".join(
        [words[0], span("ocr_textfloat", inner + words[2]), span("ocr_line", "L"), *words[3:]]
    )
    html = f'<html><div class="ocr_page" title="bbox 0 0 300 200">{body}</div></html>'
    (page,) = parse_ocr(html.encode())
    assert page.lines() == ["a", "b", "c", "L", "d e"]


def test_hyphens_of_alto_end_the_word_before_them():
    xml = made.alto([("Rech", (0, 0, 9, 9), 0)]).replace(b"<SP/>", b'<HYP CONTENT="-"/>')
    (page,) = parse_ocr(xml)
    assert page.words[0].text == "Rech-"


ENTITY = b'<!DOCTYPE alto [<!ENTITY a "aaaa">]><alto><Page WIDTH="9" HEIGHT="9">&a;</Page></alto>'
EXTERNAL = b'<!DOCTYPE alto [<!ENTITY a SYSTEM "file:///etc/passwd">]><alto>&a;</alto>'
PARAMETER = b'<!DOCTYPE alto [<!ENTITY % a "b">]><alto/>'
DEEP = b"<alto>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</alto>"
FORM = {"form": [{"id": 0, "text": "a", "box": [0, 0, 9, 9]}]}

BAD = {
    "entity": (ENTITY, "ocr_unsafe"),
    "external": (EXTERNAL, "ocr_unsafe"),
    "parameter": (PARAMETER, "ocr_unsafe"),
    "deep": (DEEP, "ocr_unsafe"),
    "long": (b"<alto>" + b" " * MAX_OCR_BYTES, "ocr_unsafe"),
    "cut": (made.alto()[:-20], "ocr_broken"),
    "no width": (made.alto().replace(b"WIDTH", b"W"), "ocr_broken"),
    "not a number": (made.alto().replace(b'HPOS="30"', b'HPOS="x"'), "ocr_broken"),
    "encoding": (b'<?xml version="1.0" encoding="klingon"?><alto/>', "ocr_broken"),
    "another XML": (b"<svg/>", "ocr_format"),
    "text": (b"Total 12.50", "ocr_format"),
    "binary": (b"\xff\xfe\x00\x01", "ocr_format"),
    "empty": (b"", "ocr_format"),
    "another JSON": (b'{"a": 1}', "ocr_format"),
    "cut JSON": (b'{"form": [', "ocr_broken"),
    "nested JSON": (b"[" * 100_000, "ocr_broken"),
    "wrong fields": ({"recognitionResults": [3]}, "ocr_broken"),
    "no size": (FORM, "ocr_boxes"),
    "NaN": ({"width": 9, "height": 9, "words": [["a", 0, 0, float("nan"), 1]]}, "ocr_boxes"),
    "three numbers": ({"width": 9, "height": 9, "words": [["a", 0, 0, 1]]}, "ocr_boxes"),
    "another unit": (made.alto(size=(30, 20)), "ocr_boxes"),
    "no text": ({"width": 9, "height": 9, "words": [[None, 0, 0, 1, 1]]}, "ocr_broken"),
    "Latin-1": (made.hocr().replace(b"Total", b"Tot\xe4l"), "ocr_broken"),
    # Its parser would look for each end to the end of the file.
    "no end of tags": (b"<html>" + b"<!" * 500_000, "ocr_broken"),
    "no page": (made.hocr().replace(b"bbox 0 0 300 200; ppageno", b"ppageno"), "ocr_boxes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_have_a_reason(name):
    source, reason = BAD[name]
    with pytest.raises(SampleError) as caught:
        parse_ocr(source)
    assert caught.value.reason == reason


def test_html_may_end_anywhere_and_nest_no_deeper_than_allowed():
    assert parse_html(b"<html><p>a<br>b</i>").find("html/p/br").tail == "b"
    with pytest.raises(SampleError, match="nested"):
        parse_html(b"<div>" * (MAX_DEPTH + 1))


def test_boxes_that_reach_a_little_beyond_the_page_are_cut():
    page = {"width": 100, "height": 100, "words": [["a", -1, 0, 101, 50], [" ", 0, 0, 1, 1]]}
    (found,) = parse_ocr(page)
    assert [word.box for word in found.words] == [(0.0, 0.0, 100.0, 50.0)]
