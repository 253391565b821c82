"""Documents from their files to batches: words are where their boxes say, and pages in order."""

import functools
import http.server
import json
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from loader import (
    Augment,
    DeterministicDataset,
    MolmoPreprocessor,
    StreamingDataset,
    View,
    make_dataloader,
)
from loader.assembly import ocr_boxes
from preprocess.datasets import dataset_class
from preprocess.fetch import FetchPolicy
from preprocess.job.job import JobSettings
from preprocess.job.pipeline import run_job
from preprocess.media.image import ImagePolicy
from preprocess.recipe import Preparer, Recipe
from preprocess.text import TextPolicy
from preprocess.text.tokens import load_tokenizer
from shardspec.keyed import dataset_seed
from shardspec.sample import Geometry
from shardspec.tiling import ImageView
from tests import inline
from tests.preprocess.documents import made

SEED = 7
CROPS = ImageView(
    crop_mode="overlap-and-resize-c2", size_px=336, patch_px=14, max_crops=24, margin_patches=(4, 4)
)
PAGES = [
    [(f"Invoice{number}", 72, 700), (f"Total: {number}.50", 72, 640), ("EUR", 400, 640)]
    for number in range(1, 13)
]
KEPT = [1, 2, 3, 7, 11]
"""Of 12 pages with a budget of 5 and evidence on pages 7 and 11."""

SPEC = """
format = "documents"
source = "rows.jsonl"
[documents]
max_pages = 5
dpi = 144
ocr = "text"
ocr_tokens = 400
tasks = ["qa", "transcription", "table", "grounded", "region", "key_value"]
"""


@dataclass(frozen=True, kw_only=True)
class Built:
    dataset: str
    stream: StreamingDataset
    recipe: Recipe
    outcome: object


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    (folder / "twelve.pdf").write_bytes(made.pdf(PAGES))
    (folder / "broken.pdf").write_bytes(made.pdf(PAGES)[:400])
    (folder / "long.pdf").write_bytes(made.many_pages(10_000))
    (folder / "large.pdf").write_bytes(made.pdf([[]], width=30_000, height=30_000))
    (folder / "locked.pdf").write_bytes(made.encrypted())
    (folder / "scans.tif").write_bytes(made.tiff([(300, 200), (320, 240)]))
    (folder / "scan.png").write_bytes(made.page_picture())
    (folder / "scan.hocr").write_bytes(made.hocr())
    (folder / "bomb.xml").write_bytes(BOMB)
    asked = {"question": "What is the total?", "answer": "11.50"}
    rows = [
        {"document": "twelve.pdf", **asked, "evidence_pages": [11, 7]},
        {"document": "scans.tif", **asked, "tables": [{"page": 2, "rows": [["a"], ["1"]]}]},
        {
            "image": "scan.png",
            "ocr": "scan.hocr",
            "questions": [{**asked, "boxes": [{"box": [0.1, 0.2, 0.3, 0.3]}]}],
            "regions": [{"box": [0.0, 0.3, 1.0, 0.5]}],
            "fields": {"Total": "12.50"},
        },
        *({"document": f"{name}.pdf", **asked} for name in ("broken", "long", "large", "locked")),
        {"image": "scan.png", "ocr": "bomb.xml", **asked},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "docs.toml").write_text(SPEC)
    recipe = Recipe(
        text=TextPolicy(system_prompt="none", num_variants=2),
        image=ImagePolicy(views=(CROPS,), codec="lossless"),
        seed=3,
    )
    settings = JobSettings(
        dataset=str(folder / "docs.toml"),
        out=str(folder / "shards"),
        source=str(folder / "rows.jsonl"),
        recipe=recipe,
        num_shards=1,
        max_lost_rows=0.9,
        cache=str(folder / "cache"),
    )
    with inline.jobs():
        outcome = run_job(settings, inline.Quiet())
    view = View(image=CROPS, augment=Augment.standard(), sequence_length=32_768)
    stream = StreamingDataset(settings.out, seed=SEED, view=view)
    return Built(dataset=settings.dataset, stream=stream, recipe=recipe, outcome=outcome)


BOMB = b"""<?xml version="1.0"?><!DOCTYPE alto [<!ENTITY a "aaaaaaaaaa">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><alto><Page>&b;</Page></alto>"""


def batches(stream, **options):
    loader = make_dataloader(
        stream,
        global_batch_size=1,
        sequence_length=32_768,
        decode_threads=1,
        metadata=("pages", "ocr", "ocr_boxes", "message_list"),
        **options,
    )
    loader = iter(loader)
    return [next(loader) for _ in range(stream.num_samples)]


def test_bad_documents_are_counted_by_their_reasons(built):
    lost = built.outcome.result.split.quarantined
    assert lost == {
        "document_broken": 1,
        "document_encrypted": 1,
        "document_page_size": 1,
        "document_pages": 1,
        "ocr_unsafe": 1,
    }


def test_words_of_a_streamed_page_are_where_their_boxes_say(built):
    """Ink is inside of the boxes, all of it, on the overview and on the tiles of every page."""
    (batch,) = (b for b in batches(built.stream) if b["metadata"][0]["record"]["pages"] == KEPT)
    (described,) = batch["metadata"]
    found = described["record"]["ocr_boxes"]
    want = [word for page in KEPT for text, _, _ in PAGES[page - 1] for word in text.split()]
    assert found["texts"] == want
    images = batch["images"][0].permute(0, 2, 3, 1).numpy()
    counts = [image["crops"] for image in described["images"]]
    assert all(count > 20 for count in counts)
    assert len(images) >= sum(counts)
    check_ink(images[: sum(counts)], found["crop"], found["corners"])


def check_ink(images, crops, corners):
    side = images.shape[1]
    shown = np.zeros((len(images), side, side), bool)
    for crop, (x0, y0, x1, y1) in zip(crops, corners, strict=True):
        # A pixel and a half around: a box is of outlines, ink is of blurred pixels.
        rows = slice(max(0, int(y0 - 1.5)), int(np.ceil(y1 + 1.5)))
        columns = slice(max(0, int(x0 - 1.5)), int(np.ceil(x1 + 1.5)))
        shown[crop, rows, columns] = True
        if min(x1 - x0, y1 - y0) > 3:
            part = images[crop, rows, columns]
            assert part.min() < part.max() - 60, "a box without ink"
    for crop in range(len(images)):
        paper = np.median(images[crop])
        dark = images[crop].min(axis=-1) < paper - 100
        assert not (dark & ~shown[crop]).any()


def test_a_page_on_36_crops(tmp_path):
    """A4 at 150 dpi is seven by five tiles; its pixels, and those of a batch, are bounded."""
    view = replace(CROPS, max_crops=36)
    (tmp_path / "a.pdf").write_bytes(made.pdf(PAGES[:1], width=595, height=842))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"document": "a.pdf", **QA}))
    (tmp_path / "docs.toml").write_text(SPEC.replace("dpi = 144", "dpi = 150"))
    example = dataset_class(str(tmp_path / "docs.toml"))()[0]
    recipe = Recipe(image=ImagePolicy(views=(view,), codec="raw"))
    prepared = Preparer(recipe=recipe, tokenizer=load_tokenizer())(example)
    special_ids = load_tokenizer().special_ids
    preprocess = MolmoPreprocessor(
        lambda sample: sample, special_ids=special_ids, view=View(image=view)
    )
    images = preprocess(prepared, np.random.RandomState(0))["images"]
    assert images.shape == (1 + 7 * 5, 3, 336, 336)
    sizes = [(image.source_width, image.source_height) for image in prepared.images]
    found = ocr_boxes(prepared.record["metadata"]["ocr"], sizes=sizes, view=view)
    assert set(found["word"]) == set(range(4))
    check_ink(images.transpose(0, 2, 3, 1), found["crop"], found["corners"])


@pytest.mark.slow
def test_boxes_are_tensors_on_request_padded_to_the_longest_row(built):
    view = View(image=CROPS)
    stream = StreamingDataset(str(Path(built.dataset).parent / "shards"), seed=SEED, view=view)
    options = {"global_batch_size": 3, "sequence_length": 32_768, "decode_threads": 1}
    loader = make_dataloader(stream, arrays=("ocr_boxes",), metadata=("ocr_boxes",), **options)
    batch = next(iter(loader))
    told = [row["record"]["ocr_boxes"] for row in batch["metadata"]]
    most = max(len(each["word"]) for each in told if each)
    assert batch["boxes"].shape == (3, most, 4)
    assert batch["boxes"].dtype == torch.float32
    assert any(each is None for each in told)
    for row, each in enumerate(told):
        real = batch["box_crop"][row] >= 0
        assert int(real.sum()) == (len(each["word"]) if each else 0)
        if each:
            assert np.allclose(batch["boxes"][row][real], each["corners"])
            assert batch["box_crop"][row][real].tolist() == each["crop"].tolist()
            assert batch["box_word"][row][real].tolist() == each["word"].tolist()
            assert int(batch["box_crop"].max()) < batch["images"].shape[1]


def test_pages_within_the_budget_are_the_stated_ones_in_order(built):
    (record,) = (
        built.stream.reader.record(number)
        for number in range(built.stream.num_samples)
        if built.stream.reader.record(number)["metadata"].get("num_pages") == 12
    )
    assert record["metadata"]["pages"] == KEPT
    texts = {
        message["question"]: message["answer"]
        for message in record["message_list"]
        if message["style"] == "doc_transcription"
    }
    assert texts == {
        f"Transcribe the text of page {page}.": f"Invoice{page}\nTotal: {page}.50 EUR"
        for page in KEPT
    }


def test_text_of_pages_is_in_the_prompt_with_their_numbers(built):
    tokenizer = load_tokenizer()
    (prompt,) = {
        tokenizer.decode(batch["input_ids"][0][batch["input_ids"][0] >= 0].tolist())
        for batch in batches(built.stream)
        if batch["metadata"][0]["record"]["pages"] == KEPT
    }
    pages = [f"Page {page}:\nInvoice{page}\nTotal: {page}.50 EUR" for page in KEPT]
    assert "\n\n".join(pages) + "\n\nWhat is the total?" in prompt
    assert re.findall(r"Page (\d+)(?!:)\b", prompt)[: len(KEPT)] == [str(page) for page in KEPT]


def test_tasks_of_a_scan_with_ocr(built):
    (record,) = (
        built.stream.reader.record(number)
        for number in range(built.stream.num_samples)
        if "num_pages" not in built.stream.reader.record(number)["metadata"]
    )
    said = {m["style"]: m.get("answer", m.get("points")) for m in record["message_list"]}
    assert said == {
        "doc_qa": "11.50",
        "pointing": [[0.2, 0.25]],
        "doc_transcription": "Total 12.50\nEUR",
        "doc_region": "EUR",
        "doc_key_value": '{"Total": "12.50"}',
    }


def test_examples_of_documents_from_shards_equal_the_unsharded_ones(built):
    rows = dataset_class(built.dataset)()
    tokenizer = load_tokenizer()
    prepare = Preparer(recipe=built.recipe, tokenizer=tokenizer)
    item_of = {prepare(rows.get(item)).key: item for item in range(3)}
    stream = built.stream
    items = [item_of[stream.reader.read(number).key] for number in range(stream.num_samples)]
    assert sorted(items) == [0, 1, 2]

    class InStoredOrder:
        def __len__(self):
            return len(items)

        def get(self, item, rng):
            return rows.get(items[item], rng)

    unsharded = DeterministicDataset(
        InStoredOrder(),
        MolmoPreprocessor(prepare, special_ids=tokenizer.special_ids, view=stream.view),
        seed=dataset_seed(SEED, rows.name),
    )
    for number in range(stream.num_samples):
        for epoch in (0, 1):
            want, got = unsharded.get(number, epoch=epoch), stream.example(number, epoch=epoch)
            for name in got.keys() - {"metadata"}:
                assert got[name].tobytes() == want[name].tobytes(), name
        assert all(image.geometry == Geometry.COLOR for image in stream.reader.read(number).images)


OCR_FILES = {
    "hocr": made.hocr(),
    "alto": made.alto().partition(b"?>")[2],
    "page": made.page_xml(),
    "azure": json.dumps(made.azure()).encode(),
    "textract": json.dumps(made.textract()).encode(),
    "funsd": b"\xef\xbb\xbf" + json.dumps(made.funsd()).encode(),
}


@pytest.fixture(scope="module")
def of_the_web(tmp_path_factory):
    """Metadata and losses of documents whose files are at a local server, which is the web."""
    folder = tmp_path_factory.mktemp("web")
    files = {
        "a.pdf": made.pdf(PAGES[:3]),
        "b.tif": made.tiff([(300, 200), (320, 240)]),
        "a.png": made.page_picture(),
        "error": b"<!doctype html><html><body>No such file.</body></html>",
        **OCR_FILES,
    }
    (folder / "web").mkdir()
    for name, payload in files.items():
        (folder / "web" / name).write_bytes(payload)
    serve = functools.partial(SilentFiles, directory=folder / "web")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        rows = [{"document": f"{base}/{name}", **QA} for name in ("a.pdf", "b.tif", "gone.pdf")]
        for name in (*OCR_FILES, "error", "gone"):
            asked = {"ocr": f"{base}/{name}", "question": f"{name}?", "answer": name}
            # Pages are at the server, too, or files.
            rows.append({"image": f"{base}/a.png", **asked})
            rows.append({"image": str(folder / "web" / "a.png"), **asked, "answer": "here"})
        rows[3]["ocr"] = [rows[3]["ocr"]]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / "docs.toml").write_text(SPEC)
        settings = JobSettings(
            dataset=str(folder / "docs.toml"),
            out=str(folder / "shards"),
            source=str(folder / "rows.jsonl"),
            recipe=Recipe(image=ImagePolicy(views=(ImageView(size_px=56),), codec="png")),
            num_shards=1,
            max_dead_links=0.9,
            cache=str(folder / "cache"),
            fetch=FetchPolicy(allow_hosts=frozenset({"127.0.0.1"})),
        )
        with inline.jobs():
            outcome = run_job(settings, inline.Quiet())
        server.shutdown()
        thread.join()
    reader = StreamingDataset(settings.out).reader
    found = [reader.record(i)["metadata"] for i in range(len(reader))]
    return found, outcome.result.split.quarantined


def test_documents_of_the_web_are_fetched_with_the_pictures(of_the_web):
    found, _ = of_the_web
    found = [record for record in found if "pages" in record]
    assert sorted(record["pages"] for record in found) == [[1, 2], [1, 2, 3]]
    words = next(record["ocr"] for record in found if "ocr" in record)
    assert words[2]["words"][0][0] == "Invoice3"


def test_files_of_ocr_are_fetched_beside_their_pages(of_the_web):
    """Also those of FUNSD, which name no size: that of a page at a URL is taken."""
    found, lost = of_the_web
    assert lost == {"http_404": 3, "not_image": 2}
    found = [record for record in found if "pages" not in record]
    assert len(found) == 2 * len(OCR_FILES)
    for record in found:
        (page,) = record["ocr"]
        assert sorted(word[0] for word in page["words"]) == ["12.50", "EUR", "Total"]
        assert page["width"] in (300, 1000)


QA = {"question": "What is the total?", "answer": "11.50"}


class SilentFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
