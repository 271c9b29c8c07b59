"""Reports of a sparsified model: text, figures, pages and scalars.

`Report` counts the zeros of each weight, `Plan` predicts them, `History` records the masks in training, and
`MultiplyAdds` counts the multiply-adds of a forward pass. `figures.draw` draws these, `page` writes them as an HTML
page, and the functions of `scalars` give them to a logger. Only `figures.draw` and `page` need matplotlib. They
import it when they are called.
"""

from feather_param.reports import figures, scalars
from feather_param.reports.history import History, LayerRecord, Record
from feather_param.reports.html import page
from feather_param.reports.multiply_adds import LayerMultiplyAdds, MultiplyAdds, multiply_adds
from feather_param.reports.plan import Plan, PlannedWeight
from feather_param.reports.report import Report, Row

__all__ = [
    "History",
    "LayerMultiplyAdds",
    "LayerRecord",
    "MultiplyAdds",
    "Plan",
    "PlannedWeight",
    "Record",
    "Report",
    "Row",
    "figures",
    "multiply_adds",
    "page",
    "scalars",
]
