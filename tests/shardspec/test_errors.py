import inspect
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec import errors
from shardspec.errors import ConfigError, ShardError, ShardsError, StorageError, nearest

ROOT = Path(__file__).parents[2]
TREE = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ShardsError)
]


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(kind, protocol):
    error = kind(
        "shard is shorter than its manifest says",
        reason="shard_size",
        where="s3://bucket/a.tar",
        facts={"got_bytes": 1, "want_bytes": 2},
        fix="run `make verify`",
    )
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert (str(copy), copy.args) == (str(error), error.args)


def test_error_tells_what_where_facts_and_fix_on_a_line_each():
    error = ShardError(
        "shard is shorter than its manifest says",
        reason="shard_size",
        where="s3://bucket/a.tar",
        facts={"got_bytes": 1, "want_bytes": 2},
        fix="run `make verify`",
    )
    assert str(error).splitlines() == [
        "shard is shorter than its manifest says",
        "  where: s3://bucket/a.tar",
        "  facts: got_bytes=1, want_bytes=2",
        "  fix:   run `make verify`",
    ]


def test_error_leaves_out_the_lines_that_it_has_nothing_for():
    assert str(StorageError("the storage failed", reason="storage_failed")) == "the storage failed"


def test_facts_are_a_copy_of_the_callers_mapping():
    facts = {"got": 1}
    error = ShardError("wrong", reason="x", facts=facts)
    facts["got"] = 2
    assert error.facts == {"got": 1}


def test_passwords_and_signatures_of_urls_are_not_shown():
    signed = "https://h/a.tar?X-Amz-Credential=AKIA&X-Amz-Signature=f00d&part=1"
    error = StorageError(
        "the storage failed",
        reason="storage_failed",
        where="s3://me:hunter2@bucket/a.tar",
        facts={"error": OSError(f"cannot open {signed}"), "url": signed},
    )
    assert error.where == "s3://***@bucket/a.tar"
    assert not re.search("hunter2|AKIA|f00d", str(error) + repr(error) + repr(error.where))
    assert str(error).count("part=1") == 2


@given(st.from_regex(r"(s3|gs|https?)://[a-z0-9./-]{1,20}", fullmatch=True))
def test_urls_without_secrets_are_shown_as_they_are(url):
    assert errors.redacted(url) == url


def test_tree_in_the_docstring_is_the_tree_in_the_code():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert sorted(drawn) == sorted(kind.__name__ for kind in TREE if kind is not ShardsError)
    assert all(kind.__bases__[0] is ShardsError for kind in TREE if kind is not ShardsError)


def test_exit_codes_that_scripts_tell_apart():
    codes = {kind.__name__: kind.exit_code for kind in TREE if kind.exit_code != 1}
    assert codes == {"BudgetError": 2, "ConflictError": 3, "ShardError": 4}


def test_bad_arguments_are_value_errors_too():
    assert issubclass(ConfigError, ValueError)


@given(known=st.sets(st.text(min_size=1), min_size=1), data=st.data())
def test_nearest_finds_a_name_that_is_known_itself(known, data):
    name = data.draw(st.sampled_from(sorted(known)))
    assert nearest(name, known) == f"did you mean {name!r}?"


def test_nearest_lists_what_is_known_when_nothing_is_like_it():
    assert nearest("zzz", ["b", "a"]) == "known: a, b"


def raised_reasons() -> list[tuple[str, str]]:
    raising = re.compile(r'(?:reason=|reason, what, fix = |_broken\(path, )"(\w+)"')
    return [
        (path.stem, reason)
        for path in sorted((ROOT / "shardspec").glob("*.py"))
        for reason in sorted(set(raising.findall(path.read_text())))
    ]


@pytest.mark.parametrize("module, reason", raised_reasons())
def test_every_reason_code_of_the_contract_is_provoked_by_a_test(module, reason):
    tests = (ROOT / "tests").rglob("test_*.py")
    assert any(f'"{reason}"' in path.read_text() for path in tests), f"shardspec/{module}.py"
