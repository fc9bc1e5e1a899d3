"""Self-contained HTML reports: one file without scripts or network, with tables and inline SVG charts.

Text is escaped unless it is `Html`, so samples of a model and records from the web can be shown as they are.
"""

from lightning_lm.html_report.bars import Bar, bar_chart
from lightning_lm.html_report.charts import Series, histogram, line_chart, ticks
from lightning_lm.html_report.markup import Html, code, element, figures, prose, readable, section, table, tiles
from lightning_lm.html_report.page import page

__all__ = [
    "Bar",
    "Html",
    "Series",
    "bar_chart",
    "code",
    "element",
    "figures",
    "histogram",
    "line_chart",
    "page",
    "prose",
    "readable",
    "section",
    "table",
    "ticks",
    "tiles",
]
