"""A wheel of ours, installed into an environment of its own, works from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from shardspec.toml import load_toml

ROOT = Path(__file__).parents[2]
PACKAGES = ("loader", "preprocess", "shardspec", "vlm_shards")


def files_of(package):
    """Lists all files of a package, as the wheel names them."""
    files = (path for path in (ROOT / package).rglob("*") if path.is_file())
    return {
        path.relative_to(ROOT).as_posix()
        for path in files
        if path.parent.name != "__pycache__" and not path.name.startswith(".")
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_files_beside_the_code_are_package_data(package):
    patterns = load_toml(ROOT / "pyproject.toml")["tool"]["setuptools"]["package-data"][package]
    named = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
    named = {path.relative_to(ROOT).as_posix() for path in named}
    assert named == {name for name in files_of(package) if not name.endswith(".py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources: setuptools writes beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", folder / "source", "--no-build-isolation", "--wheel-dir", folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel and with what it needs, which is this one's."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip("--python", python, "install", wheel, "--no-index")
    (site,) = folder.glob("lib/python*/site-packages")
    needed = [path for path in sys.path if Path(path).name == "site-packages"]
    (site / "needed.pth").write_text("\n".join([*needed, ""]))
    return folder


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run([*command, "--no-deps"], check=True, timeout=200)


@pytest.fixture
def installed(environment, tmp_path):
    """A function that runs a command of the environment in an empty folder and gives its output."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(program, *arguments):
        done = subprocess.run(
            [environment / "bin" / program, *map(str, arguments)],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_wheel_has_the_files_of_the_packages_and_no_others(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == set().union(*map(files_of, PACKAGES))


@pytest.mark.slow
def test_programs_of_an_installed_wheel_run_from_an_empty_folder(installed, environment, tmp_path):
    for package in PACKAGES:
        found = f"from importlib.util import find_spec as find; print(find({package!r}).origin)"
        assert installed("python", "-c", found).startswith(str(environment))
    told = installed("vlm-shards", "--help")
    assert told.startswith("usage: ")
    assert told == installed("python", "-m", "preprocess", "--help")
    assert installed("python", "-m", "vlm_shards", "--help").startswith("usage: ")
    assert list(tmp_path.iterdir()) == []

    source = ("--source", "sample", "--limit", 2, "--workers", 1)
    installed("vlm-shards", "shards", "pixmo_cap", *source, "--out", "shards")
    assert "input_ids" in installed("python", "-m", "loader", "peek", "shards")
    pages = [tmp_path / f"{name}.html" for name in "ab"]
    for page in pages:
        installed("vlm-shards", "report", "shards", "--to", page)
    assert "bar chart of" in pages[0].read_text()
    assert pages[0].read_bytes() == pages[1].read_bytes()
