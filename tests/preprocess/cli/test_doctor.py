from collections import namedtuple
from importlib import metadata
from pathlib import Path

import pytest

from preprocess.cli import doctor


def lines(findings):
    return [(finding.grade, finding.line()) for finding in findings]


def grades(findings):
    return [finding.grade for finding in findings]


def test_a_missing_package_is_a_fault_and_one_of_an_extra_a_note():
    def version(name):
        if name in ("torch", "av"):
            raise metadata.PackageNotFoundError(name)
        return "1"

    found = lines(doctor.packages(version))
    assert [grade for grade, _ in found] == ["ok", "FAULT", "note"]
    assert "fix: pip install torch" in found[1][1]
    assert "vlm-shards[video]" in found[2][1]


@pytest.mark.parametrize("other", [None, "/elsewhere/loader/__init__.py"])
def test_another_package_of_our_name_is_a_fault(other):
    home = Path(doctor.__file__).parents[2]
    find = {name: str(home / name / "__init__.py") for name in doctor._ROOMS}
    assert grades(doctor.rooms(find.get, home)) == ["ok"]
    ((grade, line),) = lines(doctor.rooms({**find, "loader": other}.get, home))
    assert grade == "FAULT"
    assert (other or "not found") in line


def test_a_file_beside_the_users_script_is_found_by_each_program(tmp_path, monkeypatch):
    """Also by `vlm-shards`, which has the folder of the program in Python's path, not this one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shardspec").mkdir()  # without code: Python finds ours all the same
    assert grades(doctor.rooms()) == ["ok"]
    (tmp_path / "loader.py").write_text("")
    ((grade, line),) = lines(doctor.rooms())
    assert grade == "FAULT"
    assert str(tmp_path / "loader.py") in line


def test_small_shared_memory_and_few_open_files_are_noted(monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(64 << 20))
    assert grades(doctor.shared_memory()) == ["note"]
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 2048))
    ((grade, line),) = lines(doctor.open_files())
    assert grade == "note"
    assert "ulimit -n 2048" in line


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 1.5), ("", None)]
)
def test_limit_of_a_container_is_read(text, cores, tmp_path):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor._cpu_quota(tmp_path / "cpu.max") == cores
    assert doctor._cpu_quota(tmp_path / "none") is None


@pytest.mark.parametrize("command", [("doctor",), ("make", "doctor")])
def test_doctor_needs_no_store(command, inline_cli):
    done = inline_cli.good(*command)
    assert "open files" in done.out
    assert "store" not in done.out


def test_doctor_reads_a_dataset_and_writes_where_it_is_told(tiny_dataset, tmp_path, inline_cli):
    done = inline_cli.good("doctor", tiny_dataset)
    assert "samples: 24 train" in done.out
    done = inline_cli.good("doctor", tmp_path, "--write")
    assert "wrote, read and deleted" in done.out
    assert not list(tmp_path.iterdir())


def test_doctor_reaches_a_store_and_says_what_it_refuses(s3_server):
    with s3_server.entered():
        good = list(doctor.store(f"{s3_server.bucket}/doctor", write=True))
        bad = list(doctor.store("s3://a-bucket-that-is-not-there/x", write=True))
    assert grades(good) == ["ok", "ok"]
    assert "wrote, read and deleted" in good[1].text
    assert not s3_server.objects(f"{s3_server.bucket}/doctor")
    assert grades(bad) == ["ok", "FAULT"]
