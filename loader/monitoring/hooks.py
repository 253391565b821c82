"""Hooks for `loader.watch`: JSON lines, TensorBoard, Weights & Biases, Prometheus.

    loader.watch(JsonLines("loader.jsonl"), every_steps=100)

Each is called with the step and the `Stats` of the last steps. A hook that fails would end the
pass, so one that cannot write logs a warning, once, and tries again at the next call.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loader.delivery import SAMPLES_OF, SHARE_OF, Stats
from shardspec.errors import ConfigError

logger = logging.getLogger(__name__)

Hook = Callable[[int, Stats], None]

_GAUGES = frozenset(
    ("wait_share", "busy_share", "padding_share", "mean_ready")
    + ("samples_per_s", "tokens_per_s", "loss_tokens_per_s")
)
"""Of the last steps, as shares of a mixture are; all other numbers are sums."""

_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")

_DATASET = "dataset"
"""Label of the numbers of each dataset of a mixture: as part of a metric's name, two names of
datasets could become one."""


class _Writer:
    """Writes what a hook is told, and survives what prevents it."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, step: int, stats: Stats) -> None:
        """Writes the statistics of the last steps."""
        try:
            self._write(step, stats)
        except OSError as error:
            if not self._warned:
                logger.warning("statistics of step %d were not written: %s", step, error)
            self._warned = True

    def _write(self, step: int, stats: Stats) -> None:
        raise NotImplementedError


class JsonLines(_Writer):
    """Appends one JSON object per call to a file: `step`, and the numbers of `Stats.to_dict`."""

    def __init__(self, path: str | Path) -> None:
        """Opens nothing yet; each rank needs a file of its own."""
        super().__init__()
        self._path = Path(path)

    def _write(self, step: int, stats: Stats) -> None:
        line = json.dumps({"step": step, **stats.to_dict()}) + "\n"
        # Opened anew: the file may be rotated, and what was written is there if the run is killed.
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line)


class TensorBoard(_Writer):
    """Adds scalars `loader/...` to a SummaryWriter."""

    def __init__(self, writer: Any, *, prefix: str = "loader/") -> None:
        """Takes a writer.

        Args:
          writer: A `torch.utils.tensorboard.SummaryWriter`, or another object with its
            `add_scalar(name, value, step)`.
          prefix: In front of each name.
        """
        super().__init__()
        self._writer, self._prefix = writer, prefix

    def _write(self, step: int, stats: Stats) -> None:
        for name, value in stats.to_dict().items():
            self._writer.add_scalar(f"{self._prefix}{name}", value, step)


class WandB(_Writer):
    """Logs numbers `loader/...` to a run of Weights & Biases.

    They have the loader's step as a number of their own, `loader/step`: a run refuses numbers of an
    earlier step than the last one, whoever logged that. `run.define_metric("loader/*",
    step_metric="loader/step")` puts it on the axis.
    """

    def __init__(self, run: Any, *, prefix: str = "loader/") -> None:
        """Takes a run.

        Args:
          run: What `wandb.init` returns, or another object with its `log(numbers)`.
          prefix: In front of each name.
        """
        super().__init__()
        self._run, self._prefix = run, prefix

    def _write(self, step: int, stats: Stats) -> None:
        numbers = {"step": step, **stats.to_dict()}
        self._run.log({f"{self._prefix}{name}": value for name, value in numbers.items()})


class Prometheus(_Writer):
    """Keeps a text file for Prometheus' node exporter (`--collector.textfile.directory`).

    The file is OpenMetrics, which collectors of Prometheus' own text format read too, and is
    replaced as a whole. Sums are counters since this object was made, all other numbers gauges of
    the last steps.
    """

    def __init__(self, path: str | Path, *, labels: Mapping[str, str] | None = None) -> None:
        """Writes nothing yet.

        Args:
          path: Of the file, named `*.prom` for the node exporter; each rank needs its own.
          labels: Of each number, for example `{"rank": "0"}`. Those of a dataset of a mixture have
            `dataset` beside them.

        Raises:
          ConfigError: `metric_label`.
        """
        super().__init__()
        self._path = Path(path)
        self._totals: Counter[str] = Counter()
        taken = [
            name
            for name in labels or {}
            if not _LABEL.fullmatch(name) or name[:2] == "__" or name == _DATASET
        ]
        if taken:
            raise ConfigError("metric_label", got=taken)
        self._labels = {name: str(value) for name, value in (labels or {}).items()}

    def _write(self, step: int, stats: Stats) -> None:
        numbers = stats.to_dict()
        # First, so that no sum is lost where the file cannot be written.
        gauges = [name for name in numbers if name in _GAUGES or name.startswith(SHARE_OF)]
        self._totals.update({n: v for n, v in numbers.items() if n not in gauges})
        families: dict[str, list[str]] = {}
        self._add(families, "step", step, kind="gauge")
        for name in gauges:
            self._add(families, name, numbers[name], kind="gauge")
        for name, value in self._totals.items():
            self._add(families, name, value, kind="counter")
        text = "\n".join([*(line for lines in families.values() for line in lines), "# EOF", ""])
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self._path)

    def _add(self, families: dict[str, list[str]], name: str, value: float, *, kind: str) -> None:
        labels = self._labels
        for start, metric in ((SAMPLES_OF, "dataset_samples"), (SHARE_OF, "dataset_share")):
            if name.startswith(start):
                labels, name = {**labels, _DATASET: name.removeprefix(start)}, metric
        for short, long in (("_per_s", "_per_second"), ("_s", "_seconds")):
            if name.endswith(short):
                name = name.removesuffix(short) + long
        full = "vlm_shards_loader_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        sample = f"{full}_total" if kind == "counter" else full
        pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        # The samples of a family must follow one another.
        family = families.setdefault(full, [f"# TYPE {full} {kind}"])
        family.append(f"{sample}{f'{{{pairs}}}' if pairs else ''} {value!r}")


class Fanout:
    """Calls several hooks in turn."""

    def __init__(self, *hooks: Hook) -> None:
        """Takes hooks in the order in which they are called."""
        self._hooks = hooks

    def __call__(self, step: int, stats: Stats) -> None:
        """Reports to each."""
        for hook in self._hooks:
            hook(step, stats)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
