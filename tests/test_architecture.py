"""The import rules: three rooms, one arrow each, one door to storage, one owner of randomness."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("shardspec", "preprocess", "loader", "vlm_shards")

FORBIDDEN = {
    "shardspec": {
        "preprocess",
        "loader",
        "vlm_shards",
        "torch",
        "torchvision",
        "transformers",
        "tokenizers",
        "datasets",
        "webdataset",
    },
    "preprocess": {"loader", "torch", "torchvision", "webdataset", "vlm_shards"},
    "loader": {"preprocess", "transformers", "tokenizers", "datasets", "vlm_shards"},
    "vlm_shards": {"torchvision", "transformers", "tokenizers", "datasets", "webdataset"},
}
ADAPTERS = {
    "loader/integrations/hf.py",
    "loader/assembly/families/processor.py",
    "loader/features/backbone.py",
}
"""May import the library that they adapt to, in functions: the caller has
imported it, or the dataset was built for it."""

COMPOSITION_ROOTS = {"loader/cli/peek.py", "loader/cli/preview.py"}
"""May import both halves."""

CORE_NEEDS = {"numpy", "PIL", "fsspec", "simplejpeg", "isal", "av", "shardspec", "tomli"}
"""All that shardspec may import beside the standard library; simplejpeg, isal and av, if installed,
and tomli where Python has no tomllib yet."""

FUNCTIONS = (ast.FunctionDef, ast.ClassDef)

PURE = {
    "shardspec/actions.py",
    "shardspec/checksum.py",
    "shardspec/columns.py",
    "shardspec/errors.py",
    "shardspec/expression.py",
    "shardspec/families/__init__.py",
    "shardspec/families/anyres.py",
    "shardspec/families/configs.py",
    "shardspec/families/fixed.py",
    "shardspec/families/gemma3.py",
    "shardspec/families/idefics3.py",
    "shardspec/families/internvl.py",
    "shardspec/families/paligemma.py",
    "shardspec/families/pixtral.py",
    "shardspec/families/plan.py",
    "shardspec/coordinates.py",
    "shardspec/families/processor.py",
    "shardspec/families/qwen2_vl.py",
    "shardspec/families/stored.py",
    "shardspec/features.py",
    "shardspec/frames.py",
    "shardspec/image_file.py",
    "shardspec/keyed.py",
    "shardspec/sample.py",
    "shardspec/tar.py",
    "shardspec/tiling/__init__.py",
    "shardspec/tiling/boxes.py",
    "shardspec/tiling/counts.py",
    "shardspec/tiling/frames.py",
    "shardspec/tiling/grid.py",
    "shardspec/tiling/masks.py",
    "shardspec/tiling/pooling.py",
    "shardspec/tiling/sizes.py",
    "shardspec/tiling/tokens.py",
    "shardspec/tiling/view.py",
    "preprocess/formats/conversations.py",
    "preprocess/documents/markup.py",
    "preprocess/documents/ocr.py",
    "preprocess/documents/pages.py",
    "preprocess/documents/words.py",
    "preprocess/formats/detect.py",
    "preprocess/formats/documents.py",
    "preprocess/formats/images.py",
    "preprocess/formats/parse.py",
    "preprocess/formats/tasks.py",
    "preprocess/formats/video.py",
    "preprocess/annotate/join.py",
    "preprocess/episodes/windows.py",
    "preprocess/hash_table.py",
    "preprocess/job/keys.py",
    "preprocess/job/plan.py",
    "preprocess/reshard/assign.py",
    "preprocess/page/charts.py",
    "preprocess/page/html.py",
    "preprocess/page/parts.py",
    "preprocess/page/sheet.py",
    "preprocess/report/actions.py",
    "preprocess/report/marks.py",
    "preprocess/report/survey.py",
    "preprocess/sizes.py",
    "preprocess/text/interleaved.py",
    "preprocess/text/movable.py",
    "preprocess/text/ocr.py",
    "loader/reading/block_state.py",
    "loader/reading/blocks.py",
    "loader/reading/lookahead.py",
    "loader/reading/read_plan.py",
    "loader/reading/request_queue.py",
    "loader/assembly/frames.py",
    "loader/assembly/layout.py",
    "loader/assembly/moved.py",
    "loader/assembly/ocr_boxes.py",
    "loader/assembly/planner.py",
    "loader/assembly/questions.py",
    "loader/assembly/seen.py",
    "loader/evaluation/metrics.py",
    "loader/evaluation/pointing.py",
    "loader/evaluation/score.py",
    "loader/evaluation/texts.py",
    "loader/order/apportion.py",
    "loader/order/batch_sizes.py",
    "loader/order/config.py",
    "loader/order/interleave.py",
    "loader/order/line.py",
    "loader/order/mixture.py",
    "loader/order/mixture_config.py",
    "loader/order/order.py",
    "loader/order/pack_epochs.py",
    "loader/order/pack_streams.py",
    "loader/order/packing.py",
    "loader/order/pattern.py",
    "loader/order/permutation.py",
    "loader/order/quality.py",
    "loader/order/remainder.py",
    "loader/order/rows.py",
    "loader/order/slots.py",
    "loader/order/weights.py",
    "loader/delivery/stats.py",
}
OUTSIDE_WORLD = {
    "aiohttp",
    "fsspec",
    "multiprocessing",
    "os",
    "pathlib",
    "shardspec.storage",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "time",
    "torch",
}
"""What a pure module has no business with."""

CLOCKS = {
    "preprocess/cli/care.py",
    "preprocess/fetch/ledger.py",
    "preprocess/fetch/download.py",
    "preprocess/job/board.py",
    "preprocess/job/dry_run.py",
    "preprocess/job/engines/ray_cluster.py",
    "preprocess/job/events.py",
    "preprocess/job/lease.py",
    "preprocess/job/part_run.py",
    "preprocess/job/pipeline.py",
    "shardspec/storage/connections.py",
    "shardspec/storage/ranges.py",
    "shardspec/storage/retries.py",
    "shardspec/storage/signed_ranges.py",
    "shardspec/storage/transfers.py",
    "shardspec/child.py",
}
"""May look at the clock: for ledgers, timeouts, ages and run.json, never for what a shard holds."""

CALENDARS = {"preprocess/model/render.py", "preprocess/text/chat_template.py"}
"""Write a day that they are given."""

OF_CLIENTS = {"shardspec/storage/signing.py": {"botocore"}}
"""Parts of the contract that use what a store's client brings along, once that store is used."""

ENVIRONMENT = {"loader/topology.py", "shardspec/storage/stores.py"}
"""Read environment variables: those of the launcher, and those that name stores."""


FLOORS = {
    "shardspec": (
        {"documents", "keyed", "toml", "checksum"},
        {"messages", "program"},
        {"coordinates", "errors", "image_file"},
        {"actions", "child", "families"},
        {"expression", "sample", "tar", "tiling"},
        {"index", "foreign", "media", "storage"},
        {"columns", "features", "frames"},
        {"manifest", "video"},
        {"probe"},
    ),
    "preprocess": (
        {"sizes", "settings", "formats", "page", "hash_table"},
        {"media"},
        {"documents", "episodes", "fetch", "synthetic"},
        {"text", "tokenizer", "datasets"},
        {"model"},
        {"recipe"},
        {"job"},
        {"reshard"},
        {"exchange", "annotate", "report"},
        {"cli"},
        {"__main__"},
    ),
    "loader": (
        {"topology", "consumer", "buffers", "user_code"},
        {"order"},
        {"assembly"},
        {"reading"},
        {"state"},
        {"stream"},
        {"raw"},
        {"map_style"},
        {"mixture_stream"},
        {"delivery", "resume"},
        {"dataloader"},
        {"device", "evaluation", "features", "monitoring"},
        {"integrations"},
        {"cli"},
        {"__main__"},
    ),
    "vlm_shards": ({"config", "features", "preprocessors"}, {"__main__"}),
}
"""The rooms of each package from the ground up: an import goes down, or stays in its room."""


class Sources(Mapping):
    """Names of source files to their syntax trees, each parsed when it is first asked for."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> ast.Module:
        return parsed(self._names[name])


@functools.cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def sources() -> Sources:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return Sources(dict(zip(names, names, strict=True)))


SOURCES = sources()


@functools.cache
def nodes(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree: a dozen rules look through those of each source file."""
    return tuple(ast.walk(tree))


@functools.cache
def imported(tree: ast.AST) -> frozenset[str]:
    """Lists every dotted name that a module imports, wherever in it the import stands."""
    names = set()
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return frozenset(names)


def tops(tree: ast.AST) -> set[str]:
    return {name.split(".")[0] for name in imported(tree)}


def dotted(node: ast.AST) -> str:
    """Spells an attribute chain such as np.random.rand; "" where it hangs on something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return ""


@functools.cache
def chains(tree: ast.AST) -> frozenset[str]:
    return frozenset(dotted(node) for node in nodes(tree) if isinstance(node, ast.Attribute))


def room(name: str) -> str:
    return name.split("/")[0]


def test_the_rules_see_the_sources():
    assert {room(name) for name in SOURCES} == set(ROOMS)
    assert set(SOURCES) >= PURE | CLOCKS | ENVIRONMENT | COMPOSITION_ROOTS
    probe = ast.parse("import a.b\ndef f():\n    from c.d import e\n    np.random.rand(3)")
    assert imported(probe) == {"a.b", "c.d", "c.d.e"}
    assert "np.random.rand" in chains(probe)


def test_no_room_imports_what_it_must_live_without():
    wrong = {
        name: found
        for name, tree in SOURCES.items()
        if name not in COMPOSITION_ROOTS | ADAPTERS
        and (found := tops(tree) & FORBIDDEN[room(name)])
    }
    assert not wrong
    for name in ADAPTERS:
        at_import = ast.Module([n for n in SOURCES[name].body if not isinstance(n, FUNCTIONS)])
        assert not tops(at_import) & FORBIDDEN[room(name)]


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = Sources({module_name(path): path for path in SOURCES})


def own_imports(module: str) -> set[str]:
    """Lists the modules of the same package that a module imports (rooms count as modules)."""
    package = module.split(".")[0]
    found = set()
    for name in imported(MODULES[module]):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        if name.split(".")[0] == package and name not in (package, module):
            found.add(name)
    return found


def floor(module: str) -> int:
    package, *rest = module.split(".")
    floors = FLOORS[package]
    return next(i for i, rooms in enumerate(floors) if rest[0] in rooms)


def upward(module: str, imports: set[str]) -> set[str]:
    """Picks the imports of a module that do not go down, other than those of its own room."""
    mine = module.split(".")[:2]
    return {
        name for name in imports if name.split(".")[:2] != mine and floor(name) >= floor(module)
    }


def test_every_module_is_on_a_floor():
    tops_of = {package: set() for package in FLOORS}
    for module in MODULES:
        package, *rest = module.split(".")
        if rest:
            tops_of[package].add(rest[0])
    assert tops_of == {package: set().union(*floors) for package, floors in FLOORS.items()}


def test_imports_go_down_the_floors():
    wrong = {
        module: found
        for module in MODULES
        if "." in module and (found := upward(module, own_imports(module)))
    }
    assert not wrong
    assert upward("loader.order.packing", {"loader.reading.reader"}) == {"loader.reading.reader"}


def test_rooms_are_entered_by_their_door():
    """What another room may use is what the room's `__init__` exports."""
    rooms = {m for m, p in zip(MODULES, SOURCES, strict=True) if p.endswith("__init__.py")}
    wrong = {}
    for module, tree in MODULES.items():
        doors = {n.module for n in nodes(tree) if isinstance(n, ast.ImportFrom)}
        for name in doors & MODULES.keys():
            inside = ".".join(name.split(".")[:2])
            if inside in rooms and name != inside and not f"{module}.".startswith(f"{inside}."):
                wrong.setdefault(module, set()).add(name)
    assert not {m: found for m, found in wrong.items() if found - INNER_DOORS}


INNER_DOORS = {
    "preprocess.job.engines",
    "preprocess.job.engines.local",
    "preprocess.job.engines.ray_cluster",
}
"""Engines are modules of one function, chosen by name."""


def test_modules_import_in_no_circle():
    left = {module: own_imports(module) for module in MODULES}
    for module in left:  # a room's `__init__` collects its modules: only those count
        left[module] -= {module.rpartition(".")[0]}
    while free := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in free}
    assert not left


def test_contract_needs_numpy_pillow_and_fsspec_only():
    allowed = CORE_NEEDS | set(sys.stdlib_module_names)
    wrong = {
        name: found
        for name, tree in SOURCES.items()
        if room(name) == "shardspec"
        and (found := tops(tree) - allowed - OF_CLIENTS.get(name, set()))
    }
    assert not wrong


@pytest.mark.parametrize("name", OF_CLIENTS)
def test_what_comes_with_a_client_is_imported_only_where_it_is_used(name):
    functions = [n for n in nodes(SOURCES[name]) if isinstance(n, ast.FunctionDef)]
    inside = {node for function in functions for node in ast.walk(function)}
    imports = [n for n in nodes(SOURCES[name]) if isinstance(n, ast.Import | ast.ImportFrom)]
    outside = {top for node in imports if node not in inside for top in tops(ast.Module([node]))}
    assert not outside & OF_CLIENTS[name]
    assert tops(SOURCES[name]) >= OF_CLIENTS[name]


def test_storage_is_the_one_door_to_fsspec():
    assert [name for name, tree in SOURCES.items() if "fsspec" in tops(tree)] == [
        "shardspec/storage/files.py"
    ]


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_module_touches_nothing_outside(name):
    assert not imported(SOURCES[name]) & OUTSIDE_WORLD
    assert not tops(SOURCES[name]) & OUTSIDE_WORLD
    calls = {dotted(node.func) for node in nodes(SOURCES[name]) if isinstance(node, ast.Call)}
    assert "open" not in calls


BORDERS = {
    ("shardspec/errors.py", "_text"): "an error is being made",
    ("shardspec/storage/ranges.py", "connect"): "connects ahead: the first read fails again",
    ("shardspec/storage/signing.py", "_fetch"): "raised in the threads that wait",
    ("shardspec/storage/upload.py", "_abort_quietly"): "another exception is being raised",
    ("shardspec/storage/upload.py", "_put_chunks_gs"): "another exception is being raised",
    ("preprocess/job/engines/local.py", "value_of"): "a task's: it crosses processes",
    ("preprocess/job/lease.py", "_renew"): "a thread's: the lease stays, and is renewed again",
    ("loader/delivery/threads.py", "_make"): "a thread's: the consumer raises it",
    ("loader/delivery/workers.py", "_send"): "a process's: the consumer raises it",
    ("loader/delivery/workers.py", "_answered"): "a process's: the consumer raises it",
    ("loader/reading/fetcher.py", "_serve"): "a thread's: the future has it",
    ("loader/reading/locator.py", "_run"): "a thread's: the reader locates the step again",
}
"""Functions that may catch everything, and why."""


def caught_whole(node: ast.AST, function: str = "") -> Iterator[str]:
    """Names the functions that catch all errors, a lack of memory among them, and raise none."""
    broad = {"Exception", "BaseException"}

    def names(caught: ast.expr | None) -> set[str]:
        each = caught.elts if isinstance(caught, ast.Tuple) else [caught]
        return {"BaseException" if e is None else ast.unparse(e) for e in each}

    for child in ast.iter_child_nodes(node):
        name = child.name if isinstance(child, ast.FunctionDef) else function
        suppresses = isinstance(child, ast.Call) and ast.unparse(child.func).endswith("suppress")
        if suppresses and any(names(each) & broad for each in child.args):
            yield name
        passed: set[str] = set()
        for handler in child.handlers if isinstance(child, ast.Try) else ():
            raises = [n for n in ast.walk(handler) if isinstance(n, ast.Raise) and not n.exc]
            if names(handler.type) & broad and not raises and "MemoryError" not in passed:
                yield name
            passed |= names(handler.type)
        yield from caught_whole(child, name)


def test_a_lack_of_memory_is_caught_at_named_borders_only():
    """Whatever else is caught whole lets it through, or raises what it does not know."""
    assert set(caught_whole(ast.parse("def f():\n try: g()\n except Exception: pass"))) == {"f"}
    broad = re.compile(r"except\b.*Exception|except:|suppress\(.*Exception")
    found = {
        (name, each)
        for name in SOURCES
        if broad.search((ROOT / name).read_text())
        for each in caught_whole(SOURCES[name])
    }
    assert found == set(BORDERS)


def test_no_module_draws_from_a_global_generator():
    wrong = {}
    for name, tree in SOURCES.items():
        found = {
            chain
            for chain in chains(tree)
            if chain.startswith(("np.random.", "numpy.random.", "torch.rand", "torch.manual_seed"))
            and not chain.startswith(("np.random.RandomState", "numpy.random.RandomState"))
        }
        found |= {n for n in imported(tree) if n.startswith(("random", "secrets", "numpy.random"))}
        if found:
            wrong[name] = found
    assert not wrong


def test_only_named_modules_look_at_the_clock():
    found = {name for name, tree in SOURCES.items() if tops(tree) & {"time", "datetime"}}
    assert {name for name in found if room(name) != "loader"} <= CLOCKS | CALENDARS
    clocks = {"now", "today", "utcnow", "time"}
    for name in CALENDARS:
        assert not {chain for chain in chains(SOURCES[name]) if chain.split(".")[-1] in clocks}


def test_no_clock_says_what_day_it_is_to_the_loader():
    # Durations (perf_counter, monotonic) are for timings; wall clocks could leak into an order.
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now"}
    assert not {n for n, t in SOURCES.items() if room(n) != "preprocess" and chains(t) & wall}


def test_only_the_topology_and_the_named_stores_read_the_environment():
    wrong = {
        name
        for name, tree in SOURCES.items()
        if chains(tree) & {"os.environ", "os.getenv", "os.putenv"}
    }
    assert wrong <= ENVIRONMENT


def test_only_command_lines_print():
    wrong = {
        name
        for name, tree in SOURCES.items()
        if not name.endswith("__main__.py")
        for node in nodes(tree)
        if isinstance(node, ast.Call) and dotted(node.func) in ("print", "pprint.pprint")
    }
    assert not wrong


def is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_no_pickle_is_loaded():
    wrong = {}
    for name, tree in SOURCES.items():
        found = tops(tree) & {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
        for node in nodes(tree):
            if isinstance(node, ast.Call):
                found |= {dotted(node.func)} & {"eval", "exec"}
                # Without pickled objects torch.load makes tensors and plain values only.
                plain = any(k.arg == "weights_only" and is_true(k.value) for k in node.keywords)
                if dotted(node.func) == "torch.load" and not plain:
                    found.add("torch.load")
                found |= {
                    f"{k.arg}=True"
                    for k in node.keywords
                    if k.arg in ("allow_pickle", "trust_remote_code")
                    and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                }
        if found:
            wrong[name] = found
    assert not wrong


def test_no_module_is_a_drawer():
    assert not [
        n for n in SOURCES if Path(n).stem in ("utils", "util", "helpers", "misc", "common")
    ]


HEAVY = {"torch", "torchvision", "transformers", "datasets", "webdataset", "pandas", "ray"}
HEAVY |= {"vl_convert"}


CHAINS = (
    ("shardspec", "loader", "vlm_shards"),
    ("shardspec.storage",),
    ("preprocess.__main__", "preprocess.job.build"),
)
"""Modules that one process imports one after the other: a start costs as much as the import."""


@functools.cache
def loaded_by(chain: tuple[str, ...]) -> dict[str, set[str]]:
    """Imports modules in order, and gives for each the packages that are loaded then."""
    code = "import sys\n" + "\n".join(f"import {name}; print(*sys.modules)" for name in chain)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    return {
        module: {name.split(".")[0] for name in line.split()}
        for module, line in zip(chain, lines, strict=True)
    }


# What an import costs is paid by every worker of a job and at every start of a training run.
@pytest.mark.parametrize(
    "module, absent",
    [
        ("shardspec", HEAVY | {"tokenizers", "pyarrow", "s3fs", "gcsfs", "preprocess", "loader"}),
        pytest.param(
            *("shardspec.storage", HEAVY | {"s3fs", "gcsfs", "aiohttp"}), marks=pytest.mark.slow
        ),
        (
            "preprocess.__main__",
            HEAVY | {"aiohttp", "tokenizers", "pyarrow", "s3fs", "gcsfs", "loader"},
        ),
        ("preprocess.job.build", HEAVY | {"aiohttp", "loader"}),
        ("vlm_shards", (HEAVY - {"torch"}) | {"tokenizers", "pyarrow", "s3fs", "gcsfs"}),
        ("loader", (HEAVY - {"torch"}) | {"tokenizers", "pyarrow", "s3fs", "gcsfs", "preprocess"}),
    ],
)
def test_import_leaves_heavy_packages_unloaded(module, absent):
    (chain,) = (chain for chain in CHAINS if module in chain)
    loaded = loaded_by(chain)[module]
    assert module.split(".")[0] in loaded
    assert not loaded & absent
