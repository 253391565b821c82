"""The command line: help as golden files, exit codes, errors as one block, sizes."""

import re
import signal
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.__main__ import main, run_program
from preprocess.sizes import parse_age_s, parse_bytes
from shardspec.errors import ConfigError

SAMPLE = ("shards", "pixmo_cap", "--source", "sample")


def check_one_block(err):
    """An error is told once, without a traceback, and says what is wanted or what to do."""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1
    block = lines[starts[0] + 1 :]
    assert all(line.startswith("  ") for line in block)
    assert any(line.startswith("  fix:   ") or "want" in line for line in block)


@pytest.fixture
def call(capsys):
    """Runs the program in this process, where its heavy imports cost once: code, out, err."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*args):
        code = main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, handler)


# --- help


@pytest.mark.parametrize(
    "verb",
    [
        "",
        "shards",
        "plan",
        "verify",
        "report",
        "gc",
        "datasets",
        "reshard",
        "merge",
        "split",
        "filter",
    ]
    + ["annotate", "import", "export-index"],
)
def test_help_is_the_golden_file(monkeypatch, capsys, golden, verb):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as caught:
        main([*([verb] if verb else []), "--help"])
    assert caught.value.code == 0
    golden(f"help-{verb or 'program'}.txt", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [("vlm-shards resh", "reshard"), ("vlm-shards shards pixmo_cap --image-s", "--image-size")],
)
def test_bash_completes_verbs_and_flags(typed, completed, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "bash"])
    assert caught.value.code == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    script = (
        f"source completion; COMP_WORDS=({typed}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        '_shtab_vlm_shards; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [completed]


def test_fish_has_a_completion_with_verbs_and_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", "fish"])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert "complete -c vlm-shards" in script
    for name in ("reshard", "image-size"):
        assert re.search(rf"^complete .*\b{name}\b", script, re.MULTILINE), name


def test_completion_of_an_unknown_shell_is_refused(cli, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", "powershell"])
    assert "choose from" in capsys.readouterr().err


def test_datasets_are_listed(cli):
    finished = cli.good("datasets")
    assert "pixmo_cap" in finished.out.splitlines()
    assert finished.err == ""


# --- exit code 1: the request cannot be honoured


@pytest.mark.parametrize(
    "args, text",
    [
        (("shards", "pixmo_cpa"), "did you mean 'pixmo_cap'?"),
        ((*SAMPLE, "--mode", "caption"), "has no mode 'caption'"),
        ((*SAMPLE, "--tokenizer", "nobody/nothing"), "cannot be loaded"),
        ((*SAMPLE, "--message-format", "chatml", "--pad-vocab", "7"), "got_pad_to=7"),
        (("shards", "pixmo_cap", "--source", "/no/such/folder"), "source folder does not exist"),
    ],
)
def test_request_that_cannot_be_honoured_is_code_1(call, tmp_path, args, text):
    code, out, err = call(*args, "--out", tmp_path / "out", "--cache", tmp_path / "cache")
    assert (code, out) == (1, "")
    assert text in err
    check_one_block(err)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    "flag, value, text",
    [
        ("--shard-size", "big", "got=big"),
        ("--shard-size", "5 parsecs", "got=5 parsecs"),
        ("--image-bound", "wide", "got=wide"),
        ("--image-bound", "canvas*wide", "got=wide"),
        ("--image-bound", "nan", "got=nan"),
        ("--image-bound", "inf", "got=inf"),
        ("--image-bound", "canvas*0.5", "headroom"),
        ("--image-size", "335", "--patch-size 14"),
        ("--variants", "0", "got=0"),
        ("--quality", "101", "quality"),
        ("--limit", "0", "limit=0"),
        ("--workers", "-1", "num_workers=-1"),
        ("--num-shards", "0", "num_shards=0"),
        ("--max-dead-links", "1.5", "max_dead_links=1.5"),
    ],
)
def test_value_out_of_range_is_code_1(call, flag, value, text):
    code, out, err = call(*SAMPLE, flag, value)
    assert (code, out) == (1, "")
    assert text in err
    check_one_block(err)


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("build",),
        ("shards",),
        (*SAMPLE, "--colour", "red"),
        (*SAMPLE, "--codec", "tiff"),
        (*SAMPLE, "--limit", "many"),
        ("verify",),
    ],
)
def test_bad_flag_is_code_1_with_usage_and_a_remedy(capsys, args):
    # argparse's own 2 would read as a spent error budget.
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("usage: ")
    check_one_block(printed.err)


def test_a_suite_that_is_ended_inside_a_command_ends(inline_cli, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "preprocess.__main__.with_files", lambda *_: signal.raise_signal(signal.SIGTERM)
    )
    with pytest.raises(KeyboardInterrupt, match="interrupted"):
        inline_cli.run("verify", tmp_path)


@pytest.mark.parametrize("told", ["", "Unable to allocate 32.0 GiB"])
def test_lack_of_memory_is_code_1_with_a_remedy(monkeypatch, told):
    failed = []

    def run(console):
        monkeypatch.setattr(console, "fail", failed.append)
        raise MemoryError(told)

    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run_program(run) == 1
    (error,) = failed
    assert error.reason == "no_memory"
    assert error.facts == {"error": told}
    assert error.fix.startswith("lower WORKERS=, IMAGE_MEMORY= or DECODE_MEMORY=")


def test_verify_without_a_dataset_is_code_1(inline_cli, tmp_path):
    finished = inline_cli.run("verify", tmp_path / "none")
    assert (finished.code, finished.out) == (1, "")
    check_one_block(finished.err)


def test_output_below_a_file_is_code_1(call, tmp_path):
    (tmp_path / "file").write_text("in the way")
    place = ("--out", tmp_path / "file" / "out", "--cache", tmp_path / "cache")
    code, _, err = call(*SAMPLE, "--limit", 2, *place)
    assert code == 1
    check_one_block(err)


# --- exit code 3: the output holds the result of another job


@pytest.fixture
def dataset(tiny_copy):
    """A copy of a finished dataset, to be damaged."""
    return tiny_copy


def test_output_of_another_job_is_code_3_with_the_difference(inline_cli, dataset):
    before = (dataset / "manifest.json").read_bytes()
    asked = (*SAMPLE, "--limit", 24, "--num-shards", 3, "--seed", 1, "--out", dataset)
    finished = inline_cli.run(*asked)
    assert (finished.code, finished.out) == (3, "")
    assert "  SEED     0              1\n" in finished.err
    check_one_block(finished.err)
    assert (dataset / "manifest.json").read_bytes() == before


def test_same_command_again_has_nothing_to_do(call, dataset, tmp_path):
    place = ("--out", dataset, "--cache", tmp_path / "cache")
    code, out, _ = call(*SAMPLE, "--limit", 24, "--num-shards", 3, *place)
    assert code == 0
    assert "nothing to do" in out


# --- exit code 4: stored data is damaged


@pytest.mark.parametrize("flags", [(), ("--deep",)])
def test_verify_of_a_whole_dataset_is_code_0(inline_cli, dataset, flags):
    finished = inline_cli.good("verify", dataset, *flags)
    assert finished.out == f"{dataset}: every shard matches the manifest\n"


def flip_byte(path):
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)


def cut(path):
    path.write_bytes(path.read_bytes()[:-512])


@pytest.mark.parametrize("suffix", [".tar", ".index.npy"])
@pytest.mark.parametrize("damage", [flip_byte, cut, lambda path: path.unlink()])
def test_verify_of_a_damaged_shard_is_code_4_and_names_it(inline_cli, dataset, suffix, damage):
    path = dataset / "train" / f"pixmo_cap-train-00001-of-00003{suffix}"
    damage(path)
    finished = inline_cli.run("verify", dataset)
    assert (finished.code, finished.out) == (4, "")
    assert f"  where: {path}" in finished.err
    check_one_block(finished.err)


# --- sizes


@pytest.mark.parametrize(
    "text, num_bytes",
    [
        ("0", 0),
        ("1048576", 2**20),
        ("256MiB", 256 * 2**20),
        ("1GiB", 2**30),
        ("64KiB", 2**16),
        ("512MB", 512_000_000),
        ("2GB", 2_000_000_000),
        ("1.5MiB", 3 * 2**19),
        (" 256 mib ", 2**28),
    ],
)
def test_sizes_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text, age_s", [("90s", 90), ("1.5m", 90), ("24h", 86400), ("7d", 604800)])
def test_ages_are_read(text, age_s):
    assert parse_age_s(text) == age_s


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1 h", "1w"])
def test_other_ages_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_age_s(text)
    assert (caught.value.reason, caught.value.facts) == ("age_text", {"got": text})


@given(st.integers(0, 2**50))
def test_plain_numbers_of_bytes_are_read(count):
    assert parse_bytes(str(count)) == count


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e6", "1 MiB 2", "12QiB", "0x10", "1,000"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError) as caught:
        parse_bytes(text)
    assert caught.value.reason == "size_text"
    assert caught.value.facts == {"got": text}
