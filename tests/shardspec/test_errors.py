import ast
import functools
import inspect
import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardspec import errors
from shardspec.errors import ConfigError, ShardError, ShardsError, StorageError, nearest
from shardspec.messages import messages

ROOT = Path(__file__).parents[2]
TREE = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ShardsError)
]


@pytest.mark.parametrize("kind", TREE)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling(kind, protocol):
    error = kind("shard_size.file", where="s3://bucket/a.tar", got_bytes=1, want_bytes=2)
    copy = pickle.loads(pickle.dumps(error, protocol))
    assert type(copy) is kind
    assert vars(copy) == vars(error)
    assert (str(copy), copy.args) == (str(error), error.args)


def test_error_tells_what_where_facts_and_fix_on_a_line_each():
    error = ShardError("shard_size.file", where="s3://bucket/a.tar", got_bytes=1, want_bytes=2)
    assert str(error).splitlines() == [
        "file has the wrong length",
        "  where: s3://bucket/a.tar",
        "  facts: got_bytes=1, want_bytes=2",
        f"  fix:   {messages()['shard_size.file'].fix}",
    ]
    assert error.reason == "shard_size"


def test_facts_that_a_text_names_are_not_listed_again():
    error = ConfigError("order_tail.unknown", field="tail", name="wrp", known="wrap, pad", got=1)
    assert str(error).splitlines() == [
        "unknown tail 'wrp'",
        "  facts: got=1",
        "  fix:   choose tail from wrap, pad",
    ]
    assert error.facts == {"field": "tail", "name": "wrp", "known": "wrap, pad", "got": 1}


def test_a_fact_that_is_missing_does_not_hide_the_error():
    assert str(ConfigError("mixture_weights.by")).startswith("unknown weighting {by!r}")


def test_an_error_outside_the_project_brings_its_own_texts():
    error = errors.SampleError("my_reason", what="row {7} is odd", fix="look at it", row=7)
    assert (error.reason, error.facts) == ("my_reason", {"row": 7})
    assert str(error) == "row {7} is odd\n  facts: row=7\n  fix:   look at it"


def test_error_leaves_out_the_lines_that_it_has_nothing_for():
    assert str(ShardError("x", what="it is wrong")) == "it is wrong"


def test_facts_are_a_copy_of_the_callers_mapping():
    facts = {"got": 1}
    error = ShardError("x", what="wrong", facts=facts)
    facts["got"] = 2
    assert error.facts == {"got": 1}


def test_passwords_and_signatures_of_urls_are_not_shown():
    signed = "https://h/a.tar?X-Amz-Credential=AKIA&X-Amz-Signature=f00d&part=1"
    error = StorageError(
        "storage_failed",
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


# Codes that a function completes, and the functions that get the other part.
COMPLETED = {
    "preprocess/job/verify.py": ".verify",
    "preprocess/reshard/plan.py": ".source",
    "loader/order/order.py": ".unknown",
}
OF_CHILDREN = (".died", ".failed", ".memory", ".time")
"""What `shardspec.child` appends to the reason that its caller gives."""
PASSED_ON = re.compile(
    r'(?:code = |_require\(.*, |_broken\(where, |_wrong\(|reason=)"([a-z0-9_.]+)"'
)


@functools.cache
def calls_of_errors(path: Path) -> list[ast.Call]:
    kinds = {kind.__name__ for kind in TREE}
    found = ast.walk(ast.parse(path.read_text()))
    calls = (node for node in found if isinstance(node, ast.Call))
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in kinds]


def sources() -> list[Path]:
    rooms = ("shardspec", "preprocess", "loader", "vlm_shards")
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def own_code(call: ast.Call) -> str | None:
    """The code of an error whose entry is in the table; None where it is known at run time only."""
    if any(keyword.arg == "what" for keyword in call.keywords):
        return None
    first = call.args[0] if call.args else None
    return first.value if isinstance(first, ast.Constant) else None


def test_every_error_has_an_entry_that_fits_its_class_and_its_facts():
    wrong = []
    for path in sources():
        for call in calls_of_errors(path):
            code = own_code(call)
            if code is None:
                continue
            entry = messages().get(code)
            given = {keyword.arg for keyword in call.keywords}
            if entry is None or entry.error != call.func.id:
                wrong.append(f"{path.name}:{call.lineno}: {code} has no entry of this class")
            elif "facts" not in given and entry.fields - given:
                wrong.append(f"{path.name}:{call.lineno}: {code} lacks {entry.fields - given}")
    assert not wrong


def test_every_entry_is_used():
    text = "\n".join(path.read_text() for path in sources())
    used = {
        code for path in sources() for call in calls_of_errors(path) if (code := own_code(call))
    }
    quoted = set(re.findall(r'"([a-z0-9_.]+)"', text))
    ends = (*COMPLETED.values(), *OF_CHILDREN)
    left = {
        code
        for code in messages().keys() - used
        if not code.startswith(("mixture_", "order_"))
        and not (code in quoted or (code.endswith(ends) and code.rpartition(".")[0] in quoted))
    }
    assert not left


@pytest.mark.parametrize("code", sorted(messages()))
def test_texts_are_written_alike(code):
    entry = messages()[code]
    assert entry.error in {kind.__name__ for kind in TREE}
    assert entry.what
    assert not entry.what.endswith(".")
    assert not entry.fix.endswith(".")
    assert re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)?", code)


REASONS = sorted({code.partition(".")[0] for code in messages()})
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_provoked_by_a_test(reason):
    assert f'"{reason}"' in TESTS
