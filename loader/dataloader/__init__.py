"""The loader of a rank: its arguments, what makes its batches, and its state.

Decides which arguments fit together, which batch is delivered next, and what a state says. Never
decides which samples are in a row (`order/`), nor how a row becomes a batch (`delivery/`).
"""

from loader.dataloader.make import make_dataloader
from loader.dataloader.stream_loader import StreamLoader

__all__ = ["StreamLoader", "make_dataloader"]
