"""Monitoring: what `loader.watch` reports, written where people and tools look at it.

Decides in which form the statistics of a run are written. Never measures anything, and never ends
a run: what cannot be written is logged once.
"""

from loader.monitoring.hooks import Fanout, JsonLines, Prometheus, TensorBoard, WandB

__all__ = ["Fanout", "JsonLines", "Prometheus", "TensorBoard", "WandB"]
