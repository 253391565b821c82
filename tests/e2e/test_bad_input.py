"""What cannot work is refused in one block that says what to do; nothing half-made stays behind."""

import os
import shutil
import subprocess

import pytest

from shardspec.manifest import load_manifest


def sample_job(out, *more):
    return (
        *("shards", "pixmo_cap", "--source", "sample", "--limit", 4, "--workers", 1),
        *("--image-size", 112, "--out", out, "--cache", out.parent / "cache", *more),
    )


def check_refused(finished, *, code=1, says=()):
    """One block: `error: what`, indented lines behind it, one of them `fix:`, and no traceback."""
    assert finished.code == code, finished.err
    assert "Traceback" not in finished.err
    assert finished.err.count("error: ") == 1
    block = finished.err[finished.err.index("error: ") :].rstrip("\n").split("\n")
    assert block[0].removeprefix("error: ")
    assert all(line.startswith("  ") for line in block[1:]), block
    assert any(line.startswith("  fix:   ") and line.strip() != "fix:" for line in block), block
    for text in says:
        assert text in finished.err
    assert finished.out == ""


def check_nothing_made(out):
    assert not (out / "manifest.json").exists()
    assert not [*out.rglob("*.tar")] if out.is_dir() else True


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--limit", 0), ("limit=0",)),
        (("--shard-size", "10potatoes"), ("10potatoes", "256MiB")),
        (("--image-bound", "huge"), ("got=huge", "canvas*1.5")),
        (("--quality", 900), ("got=900",)),
        (("--attempts", 0), ("attempts=0",)),
        (("--limit", "many"), ("invalid int value",)),
        (("--limit", -3), ("limit=-3",)),
        (("--shard-size", "1KB"), ("shard_bytes=1000",)),
        (("--num-shards", 0), ("num_shards=0",)),
        (("--workers", -1), ("num_workers=-1",)),
        (("--image-size", 100), ("--image-size", "--patch-size 14")),
        (("--variants", 0), ("got=0",)),
        (("--max-dead-links", 1.5), ("max_dead_links=1.5",)),
        (("--mode", "haiku"), ("captions",)),
        (("--no-such-flag",), ("--no-such-flag",)),
    ],
)
def test_setting_that_cannot_be_honoured_is_refused_by_name(inline_cli, tmp_path, more, says):
    check_refused(inline_cli.run(*sample_job(tmp_path / "out", *more)), says=says)
    assert not (tmp_path / "out").exists()


def test_misspelt_dataset_is_answered_with_the_nearest_name(cli, tmp_path):
    finished = cli.run("shards", "pixmo_cpa", "--source", "sample", "--out", tmp_path / "out")
    check_refused(finished, says=("'pixmo_cpa'", "did you mean 'pixmo_cap'?"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ("no-such-team/no-such-tokenizer", "folder"))
def test_tokenizer_that_does_not_exist_is_refused(inline_cli, tmp_path, name):
    if name == "folder":
        name = tmp_path / "empty"
        name.mkdir()
    finished = inline_cli.run(*sample_job(tmp_path / "out", "--tokenizer", name))
    check_refused(finished, says=(str(name), "TOKENIZER"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def sources(tmp_path, write_parquet, captioned_rows):
    """Folders that are no source, by what is wrong with them."""
    rows = captioned_rows(2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "part.parquet").write_bytes(b"PAR1 is how it starts, and that is all")
    write_parquet(tmp_path / "cut", rows)
    part = tmp_path / "cut" / "part.parquet"
    os.truncate(part, part.stat().st_size - 100)
    write_parquet(tmp_path / "schema", [{"image": b"", "question": "what?", "answer": "that"}])
    write_parquet(tmp_path / "none", rows)
    (tmp_path / "arrow").mkdir()
    (tmp_path / "arrow" / "part.arrow").write_bytes(b"ARROW1 no more")
    (tmp_path / "other_split").mkdir()
    shutil.copy(tmp_path / "none" / "part.parquet", tmp_path / "other_split" / "test-0.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", ("file", "SOURCE=sample")),
        ("empty", ("no Parquet or Arrow files",)),
        ("garbage", ("part.parquet",)),
        ("absent", ("absent", "SOURCE=sample")),
        ("cut", ("part.parquet",)),
        ("arrow", ("part.arrow",)),
        ("schema", ("caption", "question")),
        ("other_split", ("splits=['test']", "SPLIT=")),
    ],
)
def test_source_that_is_none_is_refused_with_what_is_wrong(inline_cli, sources, name, says):
    out = sources / "out"
    arguments = ("shards", "pixmo_cap", "--source", sources / name, "--out", out)
    check_refused(inline_cli.run(*arguments, "--cache", sources / "cache"), says=says)
    check_nothing_made(out)


def test_folder_without_rights_is_refused(inline_cli, sources):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (sources / "none" / "part.parquet").chmod(0)
    arguments = ("shards", "pixmo_cap", "--source", sources / "none", "--out", sources / "out")
    check_refused(inline_cli.run(*arguments), says=("permissions",))


@pytest.mark.parametrize("inside", ("", "deeper/still"))
def test_output_that_is_a_file_is_refused_and_left_alone(inline_cli, tmp_path, inside):
    (tmp_path / "taken").write_text("mine")
    out = tmp_path / "taken" / inside
    check_refused(inline_cli.run(*sample_job(out), "--cache", tmp_path / "cache"), says=("taken",))
    assert (tmp_path / "taken").read_text() == "mine"


def test_output_of_an_unknown_kind_is_refused(inline_cli, tmp_path):
    finished = inline_cli.run(*sample_job(tmp_path / "x"), "--out", "nosuch://bucket/x")
    check_refused(finished, says=("nosuch://bucket/x", "s3://"))


@pytest.mark.parametrize(
    "payload",
    (
        b"{",
        b'{"format_version": 1}',
        b"",
        b"[]",
        b"\xff\xfe",
        b'{"format_version": 99}',
    ),
)
def test_output_with_a_manifest_that_is_none_is_refused_and_left_alone(
    inline_cli, tmp_path, payload
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_bytes(payload)
    check_refused(inline_cli.run(*sample_job(out)), says=("manifest.json",))
    assert (out / "manifest.json").read_bytes() == payload
    check_refused(inline_cli.run("verify", out), says=("manifest.json",))


@pytest.mark.parametrize("name", ("absent", "file"))
def test_verify_of_what_is_not_a_dataset_is_refused(inline_cli, tmp_path, name):
    (tmp_path / "file").write_text("no dataset")
    check_refused(inline_cli.run("verify", tmp_path / name), says=(name,))


@pytest.fixture(scope="module")
def small_dataset(inline_cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    inline_cli.good(*sample_job(folder / "out", "--num-shards", 2))
    return folder / "out"


@pytest.mark.parametrize("damage", ("shard cut", "bytes swapped", "index cut", "shard gone"))
def test_verify_names_the_damaged_file_and_exits_with_4(
    inline_cli, small_dataset, tmp_path, damage
):
    out = shutil.copytree(small_dataset, tmp_path / "out")
    shard = load_manifest(str(out)).shards[1]
    path = out / (shard.index_url if damage == "index cut" else shard.url)
    if damage == "shard gone":
        path.unlink()
    elif damage == "bytes swapped":
        payload = path.read_bytes()
        path.write_bytes(payload[:900] + payload[901:902] + payload[900:901] + payload[902:])
        assert path.read_bytes() != payload
    else:
        os.truncate(path, path.stat().st_size - 1)
    finished = inline_cli.run("verify", out)
    check_refused(finished, code=4, says=(path.name,))


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of a few KiB, and one that gives it more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib, *, again=False):
        options = f"size={kib}k" + (",remount" if again else "")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no right to mount a small file system: {done.stderr.strip()}")
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root may mount a small file system")
    yield mount
    subprocess.run(["umount", folder], check=False, capture_output=True)


def test_shards_that_will_not_fit_are_refused_before_the_build(inline_cli, small_disk, tmp_path):
    disk = small_disk(100)
    arguments = sample_job(disk / "out", "--cache", tmp_path / "cache", "--image-size", 336)
    check_refused(inline_cli.run(*arguments), says=("free_bytes=", "LIMIT="))
    check_nothing_made(disk / "out")


@pytest.mark.slow
def test_disk_that_fills_up_leaves_no_dataset_and_the_same_command_finishes_with_more_space(
    cli, small_disk, write_parquet, captioned_rows, tmp_path
):
    source = write_parquet(tmp_path / "source", captioned_rows(40))

    def arguments(out):
        return (
            *("shards", "pixmo_cap", "--source", source, "--out", out, "--num-shards", 8),
            *("--cache", tmp_path / "cache", "--workers", 1, "--image-size", 112),
        )

    cli.good(*arguments(tmp_path / "whole"))
    kib = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*")) // 1024
    # Enough for the tars, so that the check before the build passes; too little for all the rest.
    tars = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*.tar")) // 1024
    assert tars + 60 < kib
    disk = small_disk(tars + 40)
    finished = cli.run(*arguments(disk / "out"))
    check_refused(finished, says=("no space left on the device", "run the same command again"))
    assert not (disk / "out" / "manifest.json").exists()

    small_disk(4 * kib, again=True)
    cli.good(*arguments(disk / "out"))
    manifests = [folder / "manifest.json" for folder in (disk / "out", tmp_path / "whole")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    cli.good("verify", disk / "out", "--deep")
