"""What is refused before a document is read: settings, sources, sizes, a missing package."""

import sys

import pytest

from preprocess.datasets import Documents, dataset_class
from preprocess.documents import files, pdf
from preprocess.formats import DocumentPolicy
from shardspec.errors import ConfigError, SampleError
from tests.preprocess.documents import made


@pytest.mark.parametrize(
    "table",
    [
        {"max_pages": -1},
        {"max_pages": 1.5},
        {"dpi": 9},
        {"dpi": "high"},
        {"ocr": "words"},
        {"ocr_tokens": 0},
        {"text_layer": 1},
        {"tasks": []},
        {"tasks": "qa"},
        {"tasks": ["qa", "sing"]},
        {"grounding": "circle"},
        {"box_unit": "mile"},
        {"max_page": 3},
    ],
    ids=str,
)
def test_setting_of_documents_is_refused_by_its_name(table):
    with pytest.raises(ConfigError) as caught:
        DocumentPolicy.from_table(table)
    assert caught.value.reason == "document_policy"
    assert next(iter(table)) in str(caught.value)


def test_table_of_documents_in_a_spec_of_another_format_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg", "text": "a"}\n')
    spec = tmp_path / "spec.toml"
    spec.write_text(
        'source = "rows.jsonl"\nformat = "captions"\nname = "x"\n[documents]\ndpi = 100\n'
    )
    with pytest.raises(ConfigError) as caught:
        dataset_class(str(spec))
    assert caught.value.reason == "document_policy"


def test_hub_is_not_a_source_of_documents():
    with pytest.raises(ConfigError) as caught:
        Documents(split="train", source="hub").load()
    assert caught.value.reason == "document_source"


def test_file_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_DOCUMENT_BYTES", 9)
    path = tmp_path / "large.pdf"
    path.write_bytes(b"%PDF-1.7 and more")
    with pytest.raises(SampleError) as caught:
        files.read_file(path)
    assert caught.value.reason == "document_bytes"


def test_page_with_too_many_characters_is_refused(monkeypatch):
    monkeypatch.setattr(pdf, "MAX_CHARS", 4)
    payload = made.pdf([[("Hello world", 100, 600)]])
    with pytest.raises(SampleError) as caught, pdf.open_pdf(payload) as opened:
        pdf.page_words(opened, 1)
    assert caught.value.reason == "document_text"


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ConfigError) as caught:
        pdf.pdfium.__wrapped__()
    assert caught.value.reason == "documents_extra"
    assert "vlm-shards[documents]" in str(caught.value)
