import fcntl
import os
import resource
import signal
import threading

import numpy as np
import pytest

from preprocess.documents import PageImage, files, keep_pages
from preprocess.documents.files import PdfLimits, count_pages, pdf_texts
from preprocess.documents.pdf import MAX_PAGES
from preprocess.media import ImagePolicy, ImagePreprocessor
from shardspec import child
from shardspec.child import ChildProcess
from shardspec.errors import SampleError
from tests.preprocess.documents import made

WORDS = [("Hello world", 100, 600), ("Total: 12", 100, 500)]


@pytest.mark.parametrize("crop", [None, (50, 100, 500, 700)])
@pytest.mark.parametrize("rotate", [0, 90, 180, 270])
def test_words_of_a_pdf_are_where_its_ink_is(rotate, crop):
    payload = made.pdf([WORDS], rotate=rotate, crop=crop)
    (page,) = pdf_texts(payload, [1], dpi=144, words=True)
    pixels = PageImage(document=payload, page=1, dpi=144).read()
    assert pixels.shape[:2] == (round(2 * page.height), round(2 * page.width))
    assert sorted(word.text for word in page.words) == ["12", "Hello", "Total:", "world"]
    ink = pixels.min(axis=-1) < 128
    for word in page.words:
        x0, y0, x1, y1 = (2 * value for value in word.box)
        around = np.zeros_like(ink)
        around[int(y0) - 3 : int(y1) + 4, int(x0) - 3 : int(x1) + 4] = True
        rows, columns = np.nonzero(ink & around)
        got = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert got == pytest.approx([x0, y0, x1, y1], abs=1.5)


@pytest.mark.parametrize("rotate", [0, 90])
def test_words_beside_a_page_are_not_on_it(rotate):
    """Programs leave words outside of the box that is shown; the page itself is sound."""
    beside = [("left", 10, 300), ("below", 100, 40), ("far", -900, 5000)]
    payload = made.pdf(
        [[*WORDS, *beside, ("across", 480, 200)]], rotate=rotate, crop=(60, 100, 520, 700)
    )
    (page,) = pdf_texts(payload, [1], dpi=72, words=True)
    found = {word.text: word.box for word in page.words}
    assert found.keys() == {"Hello", "world", "Total:", "12", "across"}
    x0, y0, x1, y1 = found["across"]
    assert 0 <= x0 < x1 <= page.width
    assert 0 <= y0 < y1 <= page.height
    assert x1 == page.width if rotate == 0 else y1 == page.height


def test_lines_of_a_pdf_are_told_apart():
    (page,) = pdf_texts(made.pdf([WORDS]), [1], dpi=72, words=True)
    assert page.lines() == ["Hello world", "Total: 12"]
    assert (page.width, page.height, page.unit) == (612, 792, "point")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (made.encrypted(), "document_encrypted"),
        (made.many_pages(10_000), "document_pages"),
        (made.pdf([WORDS])[:300], "document_broken"),
        (b"%PDF-1.7 and then nothing", "document_broken"),
        (made.tiff([(30, 20)] * 3)[:700], "document_broken"),
        (b"II*\0" + b"\0" * 8, "document_broken"),
        (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "document_pages"),
    ],
    ids=["encrypted", "10,000 pages", "cut", "garbage", "cut TIFF", "no page", "loop"],
)
def test_bad_files_have_a_reason(payload, reason):
    with pytest.raises(SampleError) as caught:
        count_pages(payload)
    assert caught.value.reason == reason


@pytest.mark.parametrize("size", [(30_000, 30_000), (9000, 2), (14_400, 14_400)])
def test_pages_that_are_too_large_are_refused_before_they_are_drawn(size):
    payload = made.pdf([[]], width=size[0], height=size[1])
    for read in (
        lambda: pdf_texts(payload, [1], dpi=150, words=True),
        lambda: PageImage(document=payload, page=1, dpi=150).read(),
    ):
        with pytest.raises(SampleError) as caught:
            read()
        assert caught.value.reason == "document_page_size"


def test_pages_of_a_tiff_have_their_own_sizes():
    payload = made.tiff([(30, 20), (40, 50), (20, 20)])
    assert count_pages(payload) == 3
    prepare = ImagePreprocessor(ImagePolicy(codec="png"))
    for number, size in enumerate([(30, 20), (40, 50), (20, 20)]):
        page = PageImage(document=payload, page=number + 1, dpi=150)
        image = prepare(page.read(), frame=page.frame)
        assert (image.source_width, image.source_height) == size
        assert (image.pixels == 40 * (number + 1)).all()
    with pytest.raises(SampleError) as caught:
        prepare(payload, frame=3)
    assert caught.value.reason == "image_decode"


def read_all(payload):
    prepare = ImagePreprocessor(ImagePolicy(codec="png"))
    return [prepare(payload, frame=number).pixels for number in range(count_pages(payload))]


def test_a_cut_tiff_is_never_read_as_a_shorter_one():
    payload = made.tiff([(30, 20)] * 3)
    assert len(read_all(payload)) == 3
    for stop in range(0, len(payload) - 1, 97):
        with pytest.raises(SampleError):
            read_all(payload[:stop])


def test_threads_take_turns_in_pdfium_and_a_forked_child_can_draw():
    page = PageImage(document=made.pdf([WORDS]), page=1, dpi=72)
    want = page.read()
    got = []
    threads = [threading.Thread(target=lambda: got.append(page.read())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(each, want) for each in got)
    assert len(got) == 4
    child = os.fork()
    if not child:
        os._exit(0 if np.array_equal(page.read(), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_pdf_that_hangs_or_takes_too_much_memory_costs_itself_alone(monkeypatch):
    page = PageImage(document=made.pdf([WORDS]), page=1, dpi=72)
    want = page.read()
    process = files._pdfium_of(os.getpid()).process
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(files._pdfium_of(os.getpid()), "limits", PdfLimits(time_limit_s=1.0))
        patch.setattr(child, "_GRACE_S", -0.9)
        with pytest.raises(SampleError, match="takes too long") as caught:
            page.read()
    assert caught.value.reason == "document_process"
    assert process.returncode == -signal.SIGKILL
    small = ChildProcess(
        "preprocess.documents.worker", reason="document_process", limits=PdfLimits(memory_bytes=9)
    )
    with monkeypatch.context() as patch:
        patch.setattr(files, "_pdfium_of", lambda pid: small)
        with pytest.raises(SampleError) as caught:
            page.read()
    assert caught.value.reason == "document_process"
    small.close()
    assert np.array_equal(page.read(), want)


def test_a_process_that_reads_nothing_has_a_limit_and_large_numbers_of_files_are_waited_for(
    monkeypatch,
):
    page = PageImage(document=made.pdf([WORDS]), page=1, dpi=72)
    want = page.read()
    process = files._pdfium_of(os.getpid()).process
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    try:
        large = fcntl.fcntl(process.stdout, fcntl.F_DUPFD_CLOEXEC, 1024)
        with os.fdopen(large, "rb", buffering=0) as stream, monkeypatch.context() as patch:
            patch.setattr(process, "stdout", stream)
            assert np.array_equal(page.read(), want)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.kill(process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(files._pdfium_of(os.getpid()), "limits", PdfLimits(time_limit_s=1.0))
        patch.setattr(child, "_GRACE_S", -0.9)
        longer = made.pdf([WORDS]) + bytes(1 << 20)  # than a pipe
        with pytest.raises(SampleError, match="takes too long"):
            PageImage(document=longer, page=1, dpi=72).read()
    assert process.returncode == -signal.SIGKILL


def test_keeping_pages_is_evidence_first_then_in_order():
    for budget in range(1, 13):
        kept = keep_pages(range(1, 13), budget=budget, evidence=[11, 7, 99])
        assert len(kept) == budget
        assert kept == sorted(kept)
        assert {7, 11} <= set(kept) or kept == [7]
        others = [page for page in kept if page not in (7, 11)]
        assert others == [p for p in range(1, 13) if p not in (7, 11)][: len(others)]
    assert keep_pages([3, 4], budget=0) == [3, 4]
    assert MAX_PAGES < 10_000
