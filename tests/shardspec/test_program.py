"""A program whose output goes to a pipe that nobody reads any more ends quietly, with code 141."""

import argparse
import os
import sys

import pytest

import loader.__main__
import preprocess.__main__
import vlm_shards.__main__
from shardspec.program import READER_GONE, exit_code


def says(*texts, stream="stdout"):
    def run():
        for text in texts:
            print(text, file=getattr(sys, stream))
        return 3

    return run


@pytest.fixture
def into_closed_pipe(monkeypatch):
    """Gives what runs a program with standard output or error, or both, into a closed pipe."""

    def call(run, *streams, buffered=True):
        reading, writing = os.pipe()
        os.close(reading)
        raw = os.fdopen(writing, "wb", -1 if buffered else 0)
        text = os.fdopen(os.dup(writing), "w") if buffered else UnbufferedText(raw)
        for name in streams:
            monkeypatch.setattr(sys, name, text)
        try:
            return exit_code(run)
        finally:
            monkeypatch.undo()
            text.close()  # what the interpreter does at its end: fails where a text is left
            raw.close()

    return call


class UnbufferedText:
    """Text as PYTHONUNBUFFERED has it: nothing is left to write after a write that failed."""

    def __init__(self, raw):
        self._raw, self.fileno = raw, raw.fileno

    def write(self, text):
        self._raw.write(text.encode())

    def flush(self):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("texts", [("short",), ("x" * 100_000,), ("a", "b" * 10_000, "c")])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_ends_a_program(into_closed_pipe, stream, texts, buffered):
    assert into_closed_pipe(says(*texts, stream=stream), stream, buffered=buffered) == READER_GONE


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (preprocess, ["--help"]),
        (preprocess, ["shards", "--help"]),
        (preprocess, ["doctor"]),
        (preprocess, ["--print-completion", "bash"]),
        (preprocess, ["verify", "memory://nothing"]),
        (loader, ["--help"]),
        (loader, ["peek", "memory://nothing"]),
        (vlm_shards, ["features", "--help"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__name__,
)
def test_every_program_ends_so(into_closed_pipe, program, flags):
    def run():
        return program.__main__.main(flags)

    assert into_closed_pipe(run, "stdout", "stderr") == READER_GONE


@pytest.mark.parametrize("size", [10, 100_000])
def test_help_ends_so_too(into_closed_pipe, size):
    parser = argparse.ArgumentParser(epilog="x" * size)
    assert into_closed_pipe(lambda: parser.parse_args(["--help"]), "stdout") == READER_GONE


def test_a_wrong_command_line_keeps_its_code(into_closed_pipe):
    with pytest.raises(SystemExit) as ended:
        into_closed_pipe(lambda: argparse.ArgumentParser().parse_args(["x"]), "stdout")
    assert ended.value.code == 2


def test_other_pipes_that_break_are_errors():
    def upload():
        raise BrokenPipeError("the store has closed the connection")

    with pytest.raises(BrokenPipeError, match="the store"):
        exit_code(upload)


def test_codes_and_exits_pass(capsys, monkeypatch):
    assert exit_code(says("read")) == 3
    assert capsys.readouterr().out == "read\n"
    with pytest.raises(SystemExit) as ended:
        exit_code(lambda: sys.exit(4))
    assert ended.value.code == 4
    # `program >&-`
    monkeypatch.setattr(sys, "stdout", None)
    assert exit_code(says("nowhere")) == 3
