"""The offline job: FETCH, PLAN, BUILD, COMMIT, and the verbs that look after its output.

Decides what a job's identity is, which sample goes to which shard, and when a dataset counts as
complete. Never decides what a sample contains: that is the recipe's.
"""

from preprocess.job.build import (
    is_in_place,
    scratch_folder,
    scratch_root,
    stored_sizes,
    valid_receipts,
)
from preprocess.job.columns import publish_columns, read_columns
from preprocess.job.conflicts import (
    Difference,
    action_quantiles,
    find_differences,
    require_same_result,
    table,
)
from preprocess.job.divided import (
    DividedJob,
    OthersMissing,
    check_unfinished,
    read_notes,
)
from preprocess.job.dry_run import Downloads, DryRun, dry_run
from preprocess.job.engines.engine import Engine, NodeProof, node_proof
from preprocess.job.gc import find_strays, remove_strays
from preprocess.job.job import (
    EngineOption,
    JobSettings,
    OwnDiskOption,
    PartOption,
    RayAddressOption,
    Reporter,
)
from preprocess.job.lease import output_lock
from preprocess.job.part_run import PartOutcome, run_part
from preprocess.job.pipeline import Outcome, commit_job, run_job
from preprocess.job.plan import (
    Part,
    ShardCount,
    count_shards,
    cut_groups,
    is_name,
    plan_order,
    require_name,
    shard_borders,
    shard_name,
)
from preprocess.job.planner import read_json, require_space
from preprocess.job.retry import Retried, retry_job
from preprocess.job.rows import RowCounts, count_rows
from preprocess.job.status import State, read_status, status_text
from preprocess.job.verify import verify

__all__ = [
    "DividedJob",
    "Engine",
    "EngineOption",
    "JobSettings",
    "NodeProof",
    "OthersMissing",
    "OwnDiskOption",
    "PartOption",
    "RayAddressOption",
    "action_quantiles",
    "check_unfinished",
    "node_proof",
    "read_notes",
    "Outcome",
    "Part",
    "PartOutcome",
    "Reporter",
    "Retried",
    "RowCounts",
    "ShardCount",
    "State",
    "Difference",
    "require_same_result",
    "Downloads",
    "DryRun",
    "commit_job",
    "count_rows",
    "count_shards",
    "find_differences",
    "find_strays",
    "output_lock",
    "is_in_place",
    "is_name",
    "plan_order",
    "publish_columns",
    "read_columns",
    "read_json",
    "read_status",
    "remove_strays",
    "require_name",
    "require_space",
    "retry_job",
    "run_job",
    "run_part",
    "scratch_folder",
    "scratch_root",
    "cut_groups",
    "shard_borders",
    "shard_name",
    "status_text",
    "stored_sizes",
    "dry_run",
    "table",
    "valid_receipts",
    "verify",
]
