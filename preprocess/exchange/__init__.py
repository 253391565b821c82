"""Datasets of other tools: tars that somebody else wrote, and index files for other readers.

Decides what is a sample in a foreign tar. Never rewrites one.
"""

from preprocess.exchange.export import ExportFormat, export_index
from preprocess.exchange.foreign import ImportSettings, import_tars

__all__ = [
    "ExportFormat",
    "ImportSettings",
    "export_index",
    "import_tars",
]
