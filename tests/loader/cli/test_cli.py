import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loader import __main__ as program
from loader import cli
from loader.__main__ import main
from loader.reading.reader import ShardReader
from shardspec.manifest import require_manifest

ROOT = Path(__file__).parents[3]


def run_python(*args):
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def shards(inline_cli, tmp_path_factory):
    """A dataset that the offline half made of generated scenes."""
    folder = tmp_path_factory.mktemp("cli") / "shards"
    inline_cli.good("shards", "pixmo_cap", "--source", "sample", "--limit", 6, "--out", folder)
    return str(folder)


def peek(capsys, *args):
    code = main(["peek", *map(str, args)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def records(shards):
    manifest = require_manifest(shards)
    reader = ShardReader(shards, manifest, split="train")
    documents = [reader.record(i) for i in range(len(reader))]
    return {document["key"]: document for document in documents}


def responses(document):
    """Lists every text that a sample may be asked to answer."""
    texts = []
    for message in document["message_list"]:
        texts += [message["text"]] if "text" in message else message["alternatives"]
    return texts


def test_peek_shows_captions_as_learned_text_after_the_picture(shards, capsys):
    out = peek(capsys, shards, "--batch-size", 6, "--sequence-length", 4096)
    assert out.startswith("pixmo_cap train: 6 samples, 1 step of 6 per epoch\n")
    known = records(shards)
    shown = dict(re.findall(r"^--- (\w+)\n(.*?)(?=^--- |\Z)", out, re.MULTILINE | re.DOTALL))
    assert shown.keys() == known.keys()
    for key, text in shown.items():
        assert len(re.findall(r"<image \d+×\d+, 1 crop>", text)) == 1
        learned = [part.strip() for part in re.findall("⟦(.*?)⟧", text, re.DOTALL)]
        possible = [response.strip() for response in responses(known[key])]
        assert set(learned) <= set(possible)
        assert possible[0] in learned  # the caption; which transcript stands beside it is drawn


def test_peek_tabulates_the_tensors_of_the_batch(shards, capsys):
    out = peek(capsys, shards, "--batch-size", 2)
    table = {line.split()[0]: line for line in out.splitlines() if re.match(r"\w+ +\w+ +\[", line)}
    assert re.search(r"uint8 +\[2, 1, 3, 336, 336\] +\d+ to 255", table["images"])
    assert re.search(r"float32 +\[2, 1, 576\] +1 to 1", table["image_masks"])
    assert re.search(r"int64 +\[2, 1\] +2 to 2", table["image_input_idx"])
    assert "metadata" not in table


@pytest.mark.slow
def test_one_of_a_kind_is_counted_in_the_singular(inline_cli, capsys, tmp_path):
    out = tmp_path / "one"
    source = ("--source", "sample", "--limit", 1, "--cache", tmp_path / "cache")
    told = [inline_cli.good("shards", "pixmo_cap", *source, "--out", out)]
    told += [inline_cli.good(verb, out) for verb in ("status", "verify", "gc", "report")]
    text = "".join(each.out + each.err for each in told) + (out / "report.html").read_text()
    for verb in (["peek", "--batch-size", 1], ["plan", "--ranks", 1, "--global-batch", 1]):
        assert main([verb[0], str(out), *map(str, verb[1:])]) == 0
        text += capsys.readouterr().out
    assert "1 sample in 1 shard, " in text
    assert re.findall(r"(?<![\d.,/-])1 [a-z]+s\b.{,30}", text) == []


AS_LONG_AS_ASKED = {("bench", "--steps"), ("bench", "--threads"), ("bench", "--processes")}


def numbers():
    """Lists the flags of all verbs that take a number."""
    (verbs,) = (action for action in program._parser()._actions if action.choices)
    found = [
        (verb, action.option_strings[0])
        for verb, parser in verbs.choices.items()
        for action in parser._actions
        if action.type in (int, float)
    ]
    return [each for each in found if each not in AS_LONG_AS_ASKED]


def test_numbers_that_are_too_large_are_refused_with_the_largest(shards, capsys, tmp_path):
    assert len(numbers()) > 20
    more = {"get": ["key"], "which": ["--step", "1"], "preview": ["--out", str(tmp_path / "a.png")]}
    for verb, flag in numbers():
        value = "nan" if flag == "--model-step" else str(10**20)
        code = main([verb, shards, *more.get(verb, []), flag, value])
        text = capsys.readouterr().err
        assert code in (0, 1), (verb, flag)
        assert text[:7] == "error: "[: 7 * code]
        assert "of at least" not in text


def test_lack_of_memory_is_one_block_on_standard_error(shards, capsys, monkeypatch):
    def run(options):
        raise MemoryError("Unable to allocate 32.0 GiB")

    monkeypatch.setattr(program, "VERBS", [dataclasses.replace(v, run=run) for v in cli.VERBS])
    for verb, more in {"peek": [], "bench": ["--batch-size", "9"], "get": ["key"]}.items():
        assert main([verb, shards, *more]) == 1
        text = capsys.readouterr().err
        assert text.startswith("error: not enough memory for what was asked\n  facts: error=Unable")
        assert "fix:   ask for smaller batches" in text


def test_peek_shows_the_same_batch_each_time_and_another_for_another_seed(shards, capsys):
    first, again, other = (peek(capsys, shards, "--seed", seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_peek_can_augment(shards, capsys):
    plain, augmented = peek(capsys, shards), peek(capsys, shards, "--augment")
    head = plain.splitlines()[0]
    assert augmented.splitlines()[0] == head
    # Text is drawn before pictures, so it stays as it was.
    assert plain.split("tokens under loss")[1] == augmented.split("tokens under loss")[1]


@pytest.mark.parametrize(
    "args, what",
    [
        (["nothing/here"], "folder has no manifest"),
        (["{shards}", "--split", "tets"], "has no split 'tets'"),
        (["{shards}", "--sequence-length", "100"], "images of a sample"),
    ],
    ids=["missing", "split", "short"],
)
def test_request_that_cannot_be_honoured_is_one_block_on_standard_error(args, what, shards, capsys):
    code = main(["peek", *(arg.format(shards=shards) for arg in args)])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert what in captured.err.splitlines()[0]
    assert "Traceback" not in captured.err
    fields = [line.split(":")[0].strip() for line in captured.err.splitlines()[1:]]
    assert set(fields) <= {"where", "facts", "fix"}
    assert "fix" in fields


def test_short_shard_ends_the_command_with_its_own_exit_code(shards, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    for path in (copy / "train").glob("*.tar"):
        path.write_bytes(path.read_bytes()[:-512])
    assert main(["peek", str(copy)]) == 4
    assert "file has the wrong length" in capsys.readouterr().err


@pytest.mark.slow
def test_command_runs_as_a_module_and_fails_with_a_code():
    finished = run_python("-m", "loader", "peek", "nothing/here")
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: folder has no manifest, so it is not a dataset\n")
    assert finished.stderr.count("\n") == 3


@pytest.mark.slow
def test_importing_the_loader_loads_nothing_of_the_offline_half():
    heavy = ("transformers", "tokenizers", "datasets", "preprocess", "webdataset", "aiohttp")
    code = f"import sys, loader; print([name for name in {heavy} if name in sys.modules])"
    finished = run_python("-c", code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "[]\n"


def test_ctrl_c_ends_a_verb_in_a_word(monkeypatch, capsys):
    def run(_options):
        raise KeyboardInterrupt

    stopped = [dataclasses.replace(verb, run=run) for verb in cli.VERBS]
    monkeypatch.setattr("loader.__main__.VERBS", stopped)
    assert main(["peek", "nowhere"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
