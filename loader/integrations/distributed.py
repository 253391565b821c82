"""DistributedState: a loader's state as PyTorch's Distributed Checkpoint can keep it.

`torch.distributed.checkpoint` takes states apart into their leaves, and looks at loading for the
leaves that a fresh loader has. The state of a run that has changed its batch has others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loader.dataloader import StreamLoader
from loader.device import DevicePrefetcher
from loader.integrations.steady import SteadyPasses


class DistributedState:
    """A loader's state as one text; `Stateful` for `dcp.save`, `dcp.load` and torchtitan.

    All ranks have the same state, so any number of them resumes from it, on any mesh.
    """

    def __init__(self, loader: StreamLoader | DevicePrefetcher | SteadyPasses) -> None:
        """Refers to the loader."""
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Describes how far the run is; see `StreamLoader.state_dict`."""
        return {"state": json.dumps(self._loader.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state; see `StreamLoader.load_state_dict`."""
        self._loader.load_state_dict(json.loads(state["state"]))
