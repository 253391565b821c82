"""From the predictions of all ranks to one table, and from that to scores.

Decides which predictions make up a result, and what a score is. Never decides which rows a rank
gets, and runs no model.
"""

from loader.evaluation.gather import gather_results, load_results, results_of, save_results
from loader.evaluation.metrics import METRICS, Metric, metric_of
from loader.evaluation.references import questions_of, references
from loader.evaluation.score import Score, score_results
from loader.evaluation.table import read_table, result_table, write_table

__all__ = [
    "METRICS",
    "Metric",
    "Score",
    "gather_results",
    "load_results",
    "metric_of",
    "questions_of",
    "read_table",
    "references",
    "result_table",
    "results_of",
    "save_results",
    "score_results",
    "write_table",
]
