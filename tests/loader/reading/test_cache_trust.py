"""A cache folder that somebody else had a hand in: nothing is believed, no link is followed."""

import os
import stat

import pytest

from loader.reading.cache import MARKER, BlockCache, CacheWriter
from shardspec.errors import ConfigError

OTHER = 12345
"""Some other user."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may make another user's files")

NAME = f"{1:032x}-0-100.block"
FORGED = b"f" * 100
PRECIOUS = b"years of work"


def opened(folder):
    return BlockCache(str(folder), max_bytes=1000)


def refused(folder):
    with pytest.raises(ConfigError) as caught:
        opened(folder)
    assert caught.value.reason == "cache_foreign"
    assert caught.value.where == str(folder)
    return caught.value


def as_user(uid, work):
    """Runs work in a child process of another user."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setgid(uid)
            os.setuid(uid)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fill(cache, payload=b"o" * 100):
    writer = cache.begin(NAME, 100, step=0, now=0)
    assert isinstance(writer, CacheWriter)
    writer.commit(bytearray(payload), step=0)


def plant(folder, *, name, link, target):
    """Puts a link to a file of the victim's where a file of the cache is expected."""
    place = folder / name
    place.unlink(missing_ok=True)
    (os.symlink if link == "symbolic" else os.link)(target, place)


def test_a_new_cache_is_its_users_alone(tmp_path):
    cache = opened(tmp_path / "parent" / "cache")
    fill(cache)
    for folder in (cache.folder, cache.blocks):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in (cache.folder / MARKER, cache.blocks / NAME, cache.folder / "usage"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_cache_that_others_could_read_is_closed_to_them(tmp_path):
    cache = opened(tmp_path / "cache")
    fill(cache)
    for folder in (cache.folder, cache.blocks):
        folder.chmod(0o755)
    again = opened(tmp_path / "cache")
    assert again.find(NAME, 100).read(0, 100) == b"o" * 100
    for folder in (cache.folder, cache.blocks):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
@pytest.mark.parametrize("level", ["cache", "cache/blocks"])
def test_a_cache_that_others_could_write_to_is_refused(tmp_path, mode, level):
    fill(opened(tmp_path / "cache"))
    (tmp_path / level).chmod(mode)
    assert "writable" in str(refused(tmp_path / "cache"))


@as_root
@pytest.mark.parametrize("level", ["cache", "cache/blocks", f"cache/{MARKER}"])
def test_a_cache_of_another_user_is_refused_at_each_level(tmp_path, level):
    fill(opened(tmp_path / "cache"))
    os.chown(tmp_path / level, OTHER, OTHER)
    refused(tmp_path / "cache")


@as_root
def test_a_cache_that_another_user_prepared_for_us_is_refused(tmp_path):
    tmp_path.chmod(0o777)

    def prepare():
        folder = tmp_path / "cache"
        (folder / "blocks").mkdir(parents=True)
        (folder / MARKER).write_text('{"version": 1, "owner": 0}')
        (folder / "blocks" / NAME).write_bytes(FORGED)
        for path in (folder, folder / "blocks"):
            path.chmod(0o777)

    for parent in (*tmp_path.parents,):
        if parent.stat().st_uid == 0 and parent != parent.parent:
            parent.chmod(parent.stat().st_mode | 0o011)
    as_user(OTHER, prepare)
    refused(tmp_path / "cache")


@as_root
def test_an_empty_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", OTHER, OTHER)
    refused(tmp_path / "cache")


@as_root
@pytest.mark.parametrize("kind", ["block", "index"])
def test_a_block_of_another_user_is_not_believed(tmp_path, kind):
    cache = opened(tmp_path / "cache")
    name = f"{1:032x}-0-100.{kind}"
    (cache.blocks / name).write_bytes(FORGED)
    os.chown(cache.blocks / name, OTHER, OTHER)
    assert cache.find(name, 100) is None
    assert isinstance(cache.begin(name, 100, step=0, now=0), CacheWriter)


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("name", [f"blocks/{NAME}", f"blocks/{NAME}.part", "usage", MARKER])
def test_no_link_is_followed(tmp_path, link, name):
    victim = tmp_path / "thesis.tex"
    victim.write_bytes(PRECIOUS)
    os.utime(victim, (1, 1))
    folder = tmp_path / "cache"
    cache = opened(folder)
    if name == MARKER:
        victim.write_bytes((folder / MARKER).read_bytes())
    before = victim.read_bytes()
    plant(folder, name=name, link=link, target=victim)
    if name == MARKER:
        refused(folder)
    else:
        cache = opened(folder)
    for one in range(1, 14):
        block = f"{one:032x}-0-100.block"
        try:
            cache.plan(block, step=3)
            cache.used_up(block, passes=1)
            found = cache.find(block, 100)
            assert found is None or found.read(0, 100) == b"o" * 100
            writer = cache.begin(block, 100, step=one, now=one)
            if isinstance(writer, CacheWriter):
                writer.commit(bytearray(b"o" * 100), step=one)
        except OSError:
            pass  # the use of the cache ends with a warning
    assert victim.read_bytes() == before
    if name != MARKER:
        assert victim.stat().st_mtime == 1


@pytest.mark.parametrize("level", ["cache", "cache/blocks"])
def test_a_folder_that_is_a_link_leads_to_no_files_of_others(tmp_path, level):
    real = tmp_path / "real"
    real.mkdir()
    (real / NAME).write_bytes(PRECIOUS)
    if level == "cache":
        os.symlink(real, tmp_path / "cache")
    else:
        opened(tmp_path / "cache").blocks.rmdir()
        os.symlink(real, tmp_path / "cache" / "blocks")
    refused(tmp_path / "cache")
    assert (real / NAME).read_bytes() == PRECIOUS


def test_a_link_of_our_own_to_a_cache_is_a_name_of_it(tmp_path):
    fill(opened(tmp_path / "cache"))
    os.symlink(tmp_path / "cache", tmp_path / "short")
    assert opened(tmp_path / "short").find(NAME, 100).read(0, 100) == b"o" * 100


@as_root
def test_a_link_of_another_user_is_refused(tmp_path):
    fill(opened(tmp_path / "cache"))
    os.symlink(tmp_path / "cache", tmp_path / "short")
    os.chown(tmp_path / "short", OTHER, OTHER, follow_symlinks=False)
    refused(tmp_path / "short")


def test_a_folder_that_is_exchanged_after_it_was_opened_is_not_used(tmp_path):
    """In a parent that others may write to, a folder may become another one at any time."""
    cache = opened(tmp_path / "cache")
    fill(cache)
    (tmp_path / "cache").rename(tmp_path / "moved")
    (tmp_path / "cache" / "blocks").mkdir(parents=True)
    (tmp_path / "cache" / "blocks" / NAME).write_bytes(FORGED)
    assert cache.find(NAME, 100).read(0, 100) == b"o" * 100
    other = f"{2:032x}-0-100.block"
    cache.begin(other, 100, step=0, now=0).commit(bytearray(b"o" * 100), step=0)
    assert not (tmp_path / "cache" / "blocks" / other).exists()
    assert (tmp_path / "moved" / "blocks" / other).exists()


def test_other_kinds_of_file_in_the_place_of_a_block_are_not_a_block(tmp_path):
    cache = opened(tmp_path / "cache")
    os.mkfifo(cache.blocks / NAME)
    assert cache.find(NAME, 100) is None  # and waits for nobody
    assert isinstance(cache.begin(NAME, 100, step=0, now=0), CacheWriter)
