"""Pages: HTML in one file that loads nothing and needs no script; equal content gives equal bytes.

Decides how what is shown to people looks: elements, charts, pictures, cards. Never decides what is
shown, and reads nothing.
"""

from preprocess.page.charts import BarChart, Counts, bar_chart, histogram_chart
from preprocess.page.html import Child, Markup, element, join, page, section, table
from preprocess.page.parts import (
    PICTURE_PX,
    Piece,
    Shape,
    card,
    drawing,
    figure,
    loss_text,
    picture_uri,
)

__all__ = [
    "PICTURE_PX",
    "BarChart",
    "Child",
    "Counts",
    "Markup",
    "Piece",
    "Shape",
    "bar_chart",
    "card",
    "drawing",
    "element",
    "figure",
    "histogram_chart",
    "join",
    "loss_text",
    "page",
    "picture_uri",
    "section",
    "table",
]
