"""What a checkpoint holds of the data: the fingerprint of a dataset, and the position of a run.

Decides whether a saved state fits a dataset and its settings. Never reads samples.
"""

from loader.state.cursor import (
    STATE_VERSION,
    Allowed,
    Cursor,
    require_allowed,
    require_plain_state,
    require_state,
)
from loader.state.fingerprint import keys_fingerprint, split_fingerprint, view_fingerprint
from loader.state.members import member_differences, with_members
from loader.state.read_up import describe_backlog, describe_read_up, stored_backlog

__all__ = [
    "STATE_VERSION",
    "Allowed",
    "Cursor",
    "describe_backlog",
    "describe_read_up",
    "keys_fingerprint",
    "member_differences",
    "require_plain_state",
    "require_allowed",
    "require_state",
    "split_fingerprint",
    "stored_backlog",
    "view_fingerprint",
    "with_members",
]
