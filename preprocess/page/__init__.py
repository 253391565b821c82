"""Pages: HTML in one file without requests and scripts, or a PNG; equal content gives equal bytes.

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
    thumbnail,
)
from preprocess.page.sheet import (
    Block,
    Figure,
    draw_sheet,
    fact_blocks,
    figure_blocks,
    fill_block,
    space_block,
    table_blocks,
    text_blocks,
    token_blocks,
)

__all__ = [
    "PICTURE_PX",
    "BarChart",
    "Block",
    "Child",
    "Counts",
    "Figure",
    "Markup",
    "Piece",
    "Shape",
    "bar_chart",
    "card",
    "draw_sheet",
    "drawing",
    "element",
    "fact_blocks",
    "figure",
    "figure_blocks",
    "fill_block",
    "histogram_chart",
    "join",
    "loss_text",
    "page",
    "picture_uri",
    "section",
    "space_block",
    "table",
    "table_blocks",
    "text_blocks",
    "thumbnail",
    "token_blocks",
]
