"""The README says what is true: its Python runs, its targets and variables exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def test_every_make_target_of_the_readme_exists():
    named = set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", README))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE))
    assert {"shards", "test", "plan", "verify"} <= named
    assert named <= targets


def test_every_variable_of_the_readme_is_known_to_the_makefile():
    named = set(re.findall(r"`([A-Z][A-Z_]+)=?`", README))
    assert "MAX_DEAD_LINKS" in named
    assert {name for name in named if not re.search(rf"\b{name}\b", MAKEFILE)} == set()


def test_every_makefile_flag_is_a_flag_of_the_command_line():
    from preprocess.__main__ import _parser

    flags = re.search(r"FLAGS := (.*?)\nGIVEN", MAKEFILE, flags=re.DOTALL)
    assert flags
    for pair in flags[1].replace("\\\n", " ").split():
        _, flag = pair.split("=")
        value = {"keep": "auto", "codec": "png", "prompts": "none", "message-format": "role"}
        value |= {"system-prompt": "none", "image-fit": "pad"}
        value |= {"point-format": "xml", "choices": "varied"}
        _parser().parse_args(["shards", "pixmo_cap", f"--{flag}", value.get(flag, "1")])


def test_every_makefile_flag_of_resharding_is_one_of_its_verbs():
    from preprocess.__main__ import _parser

    flags = re.search(r"RESHARD_FLAGS := (.*?)\nRESHARD =", MAKEFILE, flags=re.DOTALL)
    assert flags
    value = {"order": "keep", "through": "auto"}
    verbs = {"into": "split", "salt": "split", "where": "filter", "keys": "filter", "name": "merge"}
    for pair in flags[1].replace("\\\n", " ").split():
        _, flag = pair.split("=")
        verb = verbs.get(flag, "reshard")
        more = ["--into", "a=1"] if verb == "split" else []
        _parser().parse_args([verb, "old", "new", *more, f"--{flag}", value.get(flag, "1")])


def test_the_streaming_examples_of_the_readme_run(tiny_dataset):
    sources = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(sources) == 2
    for source in sources:
        code = source.replace('"shards/pixmo_cap"', repr(str(tiny_dataset)))
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["batch"]["images"].shape[2:] == (3, 336, 336)
        assert names.get("state", {"step": 1})["step"] >= 1


def test_every_file_that_the_architecture_names_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for package in ("shardspec", "preprocess", "loader"):
        table = text.split(f"| {package}/ | |")[1].split("\n\n")[0]
        for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", table):
            assert (ROOT / package / name).exists(), f"{package}/{name}"
        named = {"__init__.py", "toml.py", "files.py"}
        for path in (ROOT / package).rglob("*.py"):
            known = path.name in named or path.parent.name in ("datasets", "tokenizer")
            assert known or path.name in table, f"{path} is not in ARCHITECTURE.md"
