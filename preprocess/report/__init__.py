"""Pages to look at: `report.html` of a dataset, and the parts that other pages are made of.

Decides what a person is shown of a dataset, and how. Pages are single files that load nothing and
need no script; the same dataset gives the same bytes. Never changes stored samples.
"""

from preprocess.report.cards import Piece, Shape, card, drawing, figure, loss_text, picture_uri
from preprocess.report.charts import BarChart, Counts, bar_chart, histogram_chart
from preprocess.report.html import Markup, element, join, page, section, table
from preprocess.report.report import REPORT_NAME, ReportSettings, make_report

__all__ = [
    "REPORT_NAME",
    "BarChart",
    "Counts",
    "Markup",
    "Piece",
    "ReportSettings",
    "Shape",
    "bar_chart",
    "card",
    "drawing",
    "element",
    "figure",
    "histogram_chart",
    "join",
    "loss_text",
    "make_report",
    "page",
    "picture_uri",
    "section",
    "table",
]
