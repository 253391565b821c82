"""What a user's class may replace: each fault has a name, and none is a bare traceback."""

import pytest

from preprocess.__main__ import command_line
from preprocess.cli import with_files
from preprocess.cli.build import job_settings
from preprocess.job import JobSettings, dry_run, run_job
from preprocess.job.job import Job
from preprocess.job.planner import make_plan
from shardspec.errors import BudgetError, ConfigError, SampleError, ShardsError

HEAD = """
import sys
from pathlib import Path
from preprocess.datasets import DatasetBase

class Mine(DatasetBase):
    def load(self):
        return [{"message_list": [{"style": "text_sft", "messages": ["a", f"b{i}"]}]}
                for i in range(12)]
"""


class Quiet:
    """A reporter that says nothing."""

    stage = step = sent = note = lambda *_: None


@pytest.fixture
def settings(tmp_path):
    """Makes the settings of a job whose class has some more lines."""

    def make(*lines, **others):
        code = tmp_path / "mine.py"
        code.write_text(HEAD + "\n".join(f"    {line}" for line in lines) + "\n")
        return JobSettings(
            dataset=f"{code}:Mine",
            **{
                "out": str(tmp_path / "out"),
                "cache": str(tmp_path / "cache"),
                "num_workers": 1,
                **others,
            },
        )

    return make


def plan_job(settings, report):
    """Everything up to the first shard."""
    job = Job(settings)
    job.compare_files()
    make_plan(job, report)


KIND, SELF = "@classmethod", ""
SIGNATURES = {
    "describe": (KIND, "def describe(cls):"),
    "code_files": (KIND, "def code_files(cls):"),
    "source_files": (KIND, "def source_files(cls, source, split, *, unmatched):"),
    "resolve_mode": (KIND, "def resolve_mode(cls, mode):"),
    "notes": (SELF, "def notes(self):"),
    "row_numbers": (SELF, "def row_numbers(self, item):"),
    "left_out_rows": (SELF, "def left_out_rows(self):"),
    "__len__": (SELF, "def __len__(self):"),
    "__init__": (SELF, "def __init__(self, *args, **kwargs):"),
}
FAULTS = {
    "KeyError": "raise KeyError('boom')",
    "SystemExit": "sys.exit('boom')",
    "generator": "yield missing_name",
    "None": "return None",
    "object": "return object()",
    "numbers": "return [1.5]",
    "too many": "return 99",
    "negative": "return -1",
    "clash": "return {'image': 1}",
    "not JSON": "return {'a': {1, 2}}",
    "not a number": "return {'a': float('nan')}",
    "no such file": "return ['/no/such/file.py']",
}


@pytest.mark.parametrize("hook", SIGNATURES)
def test_every_fault_of_a_hook_is_named(settings, hook):
    kind, signature = SIGNATURES[hook]
    for name, fault in FAULTS.items():
        given = settings(*filter(None, [kind, signature, f"    {fault}"]))
        for run in (plan_job, dry_run) if name == "KeyError" else (plan_job,):
            error = refusal(run, given)
            assert error is None or error.reason in ("dataset_code", "source_empty"), (name, error)
            if name in ("KeyError", "SystemExit") and (error or run is plan_job):
                assert "boom" in str(error)
                assert error.where.endswith(f"mine.py:{10 + bool(kind) + 1}")
                assert error.facts["hook"] == hook


def refusal(run, settings):
    """Runs a job: its error, None where there is none."""
    try:
        run(settings, Quiet())
    except ShardsError as error:
        return error
    return None


@pytest.mark.parametrize(
    "lines",
    [
        ("def describe(self):", "    return {}"),
        ("@staticmethod", "def describe(cls):", "    return {}"),
        ("@classmethod", "def source_files(cls, source):", "    return []"),
        ("describe = {'a': 1}",),
        ("source_files = None",),
        ("modes = 'captions'",),
        ("validation_share = 1.5",),
        ("several_images = 'yes'",),
        ("leaves_out = 'row_fields'",),
        ("sample_rows_per_example = 0",),
        ("split_salt = None",),
        ("grouped = 2",),
        ("__len__ = 3",),
        ("@property", "def notes(self):", "    raise KeyError"),
    ],
    ids=str,
)
def test_hooks_and_attributes_of_another_kind_are_refused(settings, lines):
    with pytest.raises(ConfigError) as caught:
        plan_job(settings(*lines), Quiet())
    assert caught.value.reason == "dataset_code"


@pytest.mark.parametrize(
    "fault", ["raise KeyError('boom')", "return None", "return 3", "return {'a': 1}", "yield 1"]
)
@pytest.mark.parametrize("method", ["get(self, item, rng=None)", "to_example(self, row)"])
def test_faults_of_single_rows_are_counted(settings, method, fault):
    given = settings(f"def {method}:", f"    {fault}")
    with pytest.raises(BudgetError) as caught:
        run_job(given, Quiet())
    assert caught.value.reason in ("nothing_left", "lost_rows")
    with pytest.raises(SampleError):
        Job(given).dataset[0]
    dry_run(given, Quiet())


def test_a_class_without_its_own_hooks_still_works(settings):
    given = settings(
        "@classmethod",
        "def describe(cls):",
        "    return {**super().describe(), 'mine': [1, None, 'x']}",
        "@classmethod",
        "def source_files(cls, source, split, *, unmatched):",
        "    yield from [__file__, Path(__file__)]",
    )
    job = Job(given)
    assert job.recipe["mine"] == [1, None, "x"]
    assert {path.name for path in job.source_files()} == {"mine.py"}
    assert run_job(given, Quiet()).result.split.num_samples == 12


def test_users_data_has_no_prefix_however_it_is_given(tmp_path, monkeypatch):
    info = tmp_path / "offering-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vlm_shards.datasets]\noffered = mine_offered:Mine\n")
    (tmp_path / "mine_offered.py").write_text(HEAD)
    monkeypatch.syspath_prepend(str(tmp_path))
    parser, verbs = command_line()
    for dataset in ("offered", "mine_offered:Mine", f"{tmp_path}/mine_offered.py:Mine", "vqa2"):
        given = with_files(["shards", dataset], parser, verbs)
        policy = job_settings(parser.parse_args(given)).recipe.text
        assert (policy.system_prompt == "none") == (dataset != "vqa2")
