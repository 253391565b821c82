"""What happens to a cache while a run uses it changes no batch."""

# ruff: noqa: F401, F811 - fixtures

import contextlib
import shutil

import pytest

from tests.loader.reading.test_remote import (  # noqa: F241 - fixtures
    assert_same,
    batches_of,
    loader_of,
    local,
    s3,
    s3_url,
)

pytestmark = pytest.mark.usefixtures("in_this_process")


def names(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def removed(folder):
    shutil.rmtree(folder, ignore_errors=True)  # the loader's threads write to it


def moved(folder):
    folder.rename(folder.with_name("elsewhere"))


def moved_and_made_again(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


def without_blocks(folder):
    shutil.rmtree(folder / "blocks", ignore_errors=True)


def emptied(folder):
    for path in names(folder):
        path.unlink(missing_ok=True)


def replaced_by_a_file(folder):
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("x")


def zeroed(folder):
    for path in names(folder / "blocks"):
        with contextlib.suppress(FileNotFoundError):
            path.write_bytes(bytes(path.stat().st_size))


def swapped(folder):
    blocks = names(folder / "blocks")
    for one, other in zip(blocks[::2], blocks[1::2], strict=False):
        with contextlib.suppress(FileNotFoundError):
            one.rename(folder / "x")
            other.rename(one)
            (folder / "x").rename(other)


def overwritten(folder):
    for path in names(folder):
        path.write_bytes(b"\xff" * 37)


MISHAPS = [removed, without_blocks, zeroed, overwritten]
FURTHER = [moved, moved_and_made_again, emptied, replaced_by_a_file, swapped]


@pytest.mark.parametrize(
    "mishap",
    [*MISHAPS, *(pytest.param(mishap, marks=pytest.mark.slow) for mishap in FURTHER)],
    ids=lambda mishap: mishap.__name__,
)
def test_a_cache_that_is_changed_during_a_pass_changes_no_batch(s3, local, tmp_path, mishap):
    url, _ = s3
    folder = tmp_path / "cache"
    loader = loader_of(url, cache=str(folder))
    batches = []
    for batch in loader:
        batches.append(dict(batch))
        if len(batches) == 4:
            mishap(folder)
    assert len(batches) > 20
    assert_same(batches, batches_of(local, len(batches)))
