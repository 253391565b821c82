"""The blob cache and the ledger: what a crash may leave, and what is never trusted."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.fetch import BlobCache, FetchResult, Ledger, read_ledger, redact
from shardspec.errors import ConfigError, StorageError

A = FetchResult(url="http://h/a", status="ok", sha256="0" * 64, num_bytes=3, attempts=1)
B = FetchResult(url="http://h/b", status="failed", reason="http_404", http_status=404, attempts=1)


def write_ledger(path, *results):
    with Ledger(path) as ledger:
        for result in results:
            ledger.append(result)


@pytest.mark.parametrize("name", ["", "../" * 21 + "x", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_blob_name_that_is_not_a_sha256_is_refused(tmp_path, name):
    with pytest.raises(ConfigError) as caught:
        BlobCache(tmp_path).has(name)
    assert caught.value.reason == "bad_sha256"


def test_ledger_keeps_the_last_result_of_each_url(tmp_path):
    again = FetchResult(url=B.url, status="ok", sha256="1" * 64, num_bytes=5, attempts=2)
    path = tmp_path / "deep" / "ledger.jsonl"
    write_ledger(path, A, B)
    write_ledger(path, again)
    assert read_ledger(path) == {A.url: A, again.url: again}
    assert len(path.read_text().splitlines()) == 3
    with Ledger(path) as ledger:
        assert list(ledger) == [A, again]
        assert len(ledger) == 2
        assert ledger.get(B.url) == again
        assert ledger.get("http://h/never") is None


@given(cut=st.integers(1, 10_000))
def test_torn_last_line_is_dropped_wherever_it_is_cut(cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    write_ledger(path, A, B)
    whole = path.read_bytes()
    last = len(whole) - whole.index(b"\n") - 1
    path.write_bytes(whole[: -(cut % last + 1)])
    assert set(read_ledger(path)) == {A.url}
    write_ledger(path, B)  # goes where the torn line began, not behind it
    assert path.read_bytes() == whole


def test_damaged_line_before_the_last_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, A, B)
    path.write_bytes(b"\0" * 20 + path.read_bytes()[20:])
    for read in (read_ledger, Ledger):
        with pytest.raises(StorageError) as caught:
            read(path)
        assert caught.value.reason == "ledger_corrupt"
        assert caught.value.where == f"{path}:1"


def test_line_with_unknown_fields_is_an_error(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({"url": "http://h/", "status": "ok", "color": "red"}) + "\n")
    with pytest.raises(StorageError) as caught:
        read_ledger(path)
    assert (caught.value.reason, caught.value.where) == ("ledger_corrupt", f"{path}:1")


def test_second_writer_is_refused_while_the_first_is_open(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path):
        with pytest.raises(StorageError) as caught:
            Ledger(path)
        assert caught.value.reason == "ledger_locked"
        assert read_ledger(path) == {}
    Ledger(path).close()


def test_lines_survive_a_killed_process(tmp_path):
    path = tmp_path / "ledger.jsonl"
    program = (
        "import os, signal, sys\n"
        "from preprocess.fetch import FetchResult, Ledger\n"
        "ledger = Ledger(sys.argv[1])\n"
        "ledger.append(FetchResult(url='http://h/a', status='ok'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], timeout=60)
    assert done.returncode == -9
    assert set(read_ledger(path)) == {"http://h/a"}


def test_full_disk_is_a_storage_error(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    ledger = Ledger(tmp_path / "ledger.jsonl")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, ledger._fd)
    os.close(full)
    with pytest.raises(StorageError) as caught:
        ledger.append(A)
    assert caught.value.reason == "ledger_io"
    assert ledger.get(A.url) is None
    os.close(ledger._fd)


def test_ledger_where_no_file_can_be_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        Ledger(tmp_path / "file" / "ledger.jsonl")
    assert caught.value.reason == "ledger_io"


@pytest.mark.parametrize(
    "url, want",
    [
        ("http://h/a@b", "http://h/a@b"),
        ("http://h?q=u:p@x", "http://h?q=u:p@x"),
        ("http://u:p@h/", "http://***@h/"),
        (" HTTPS://u:p@q@h:8080/x", " HTTPS://***@h:8080/x"),
        ("//u:p@h/", "//***@h/"),
        ("u:p@h/", "u:***@h/"),
        ("http:\\\\u:p@h/", "http:\\\\***@h/"),
        ("", ""),
    ],
)
def test_credentials_are_redacted(url, want):
    assert redact(url) == want
    assert redact(want) == want


@given(
    user=st.text(st.characters(exclude_characters="/?#\\", codec="utf-8")),
    rest=st.text(st.characters(exclude_characters="@", codec="utf-8")),
)
def test_whatever_stands_before_the_at_sign_of_the_host_is_gone(user, rest):
    assert redact(f"http://{user}@{rest}") == f"http://***@{rest}"
