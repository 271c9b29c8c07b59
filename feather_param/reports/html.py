"""Write reports as one HTML page without scripts. The page loads no fonts or other files."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from html import escape

from feather_param.reports.figures import Accuracy, draw, records_to_show, svg
from feather_param.reports.history import History, Record
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.checks import instance
from feather_param.utils.text import listed, percent, printable, ratio, short

_STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 78rem; padding: 0 1rem; color: #2d3748; background: #fff;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; white-space: nowrap; position: sticky; top: 0; background: #fff; }
th, td { padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid #edf2f7; }
td.name { min-width: 9rem; overflow-wrap: anywhere; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.all td { font-weight: 600; border-top: 2px solid #a0aec0; } tr.starving td { color: #c05621; }
.figure svg { max-width: 100%; height: auto; }
footer { margin: 2.5rem 0 1rem; font-size: .8rem; color: #718096; }
"""


def page(
    report: Report,
    *,
    history: History | None = None,
    multiply_adds: MultiplyAdds | None = None,
    accuracy: Accuracy | None = None,
    sizes: Mapping[str, int] | None = None,
    title: str = "Sparsity",
) -> str:
    """Return an HTML page with the figure that `figures.draw` draws, and with tables of the layers.

    Args:
        report: the survivors of each layer, from `Controller.report`.
        history: adds rate, threshold and churn over the steps, if it has at least two records.
        multiply_adds: adds the remaining multiply-adds of each layer.
        accuracy: adds the test accuracy over the steps; see `figures.draw`.
        sizes: adds a table of file sizes: bytes by the name of a format. They are compared with the first.
        title: the title of the page.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an accuracy cannot be drawn; see `figures.draw`.
        ImportError: matplotlib is not installed: ``pip install feather_param[plot]``.

    Example:
        >>> controller = feather_param.sparsify(nn.Linear(4, 4), final_rate=0.75, total_steps=1, end_step=0)
        >>> html = page(controller.report(), title="a <small> layer")
        >>> html[:15], "a &lt;small&gt; layer" in html, "12 of 16 weights are zero" in html
        ('<!doctype html>', True, True)
    """
    instance(report, Report, "controller.report()")
    title = _text(title)
    figure = draw(report, history=history, multiply_adds=multiply_adds, accuracy=accuracy)
    parts = [f"<h1>{title}</h1>", f"<p>{_summary(report, multiply_adds)}</p>"]
    parts.append(f'<div class="figure">{svg(figure)}</div>')
    if sizes:
        parts += ["<h2>File size</h2>", _sizes(sizes)]
    if report.rows:
        parts += ["<h2>Layers</h2>", _layers(report, records_to_show(history), multiply_adds)]
    if multiply_adds is not None and multiply_adds.uncounted:
        parts += ["<h2>Multiply-adds not counted</h2>", _reasons(multiply_adds.uncounted)]
    if report.skipped:
        parts += ["<h2>Dense</h2>", _reasons(report.skipped)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        "<body>" + "\n".join(parts) + "\n<footer>feather_param</footer></body></html>\n"
    )


def _summary(report: Report, counted: MultiplyAdds | None) -> str:
    text = f"{report.zeros:,} of {report.total:,} weights are zero ({report.rate:.3%})."
    if counted is not None:
        remaining = percent(counted.remaining / max(1, counted.dense))
        text += f" Without the zeros, {remaining} of {short(counted.dense)} multiply-adds of a forward pass remain."
    if report.dead:
        text += f" Nothing survives in {listed(report.dead)}."
    if starving := [row.name for row in report.rows if 0 < row.survivors < row.outputs]:
        text += f" Fewer survivors than outputs in {listed(starving)}."
    return escape(text)


def _sizes(sizes: Mapping[str, int]) -> str:
    name, first = next(iter(sizes.items()))
    rows = [_name(name) + _right(f"{size:,} B") + _right(percent(size / max(1, first))) for name, size in sizes.items()]
    return _table(["format", ">size", f">of {name}"], rows)


def _layers(report: Report, records: Sequence[Record], counted: MultiplyAdds | None) -> str:
    """Return the table of all layers. `records` is empty or has at least two records."""
    heads = ["weight", "shape", ">weights", ">zeros", ">rate", ">survivors", ">per output"]
    heads += [">entered", ">left"] * bool(records) + [">multiply-adds", ">remaining"] * (counted is not None)
    last = {layer.name: layer for layer in records[-1].layers} if records else {}
    adds = {row.name: row for row in counted.rows} if counted is not None else {}
    rows: list[str] = []
    for row in report.rows:
        cells = [_name(row.name), _cell("x".join(map(str, row.shape)))]
        cells += [*_counts(row.total, row.zeros, row.survivors), _right(ratio(row.survivors_per_output))]
        if records:
            layer = last.get(row.name)
            cells += [_right(f"{layer.entered:,}"), _right(f"{layer.left:,}")] if layer else [_right("-")] * 2
        if counted is not None:
            add = adds.get(row.name)
            cells += [_right(f"{add.dense:,}"), _right(f"{add.remaining:,}")] if add else [_right("-")] * 2
        rows.append("".join(cells))
    mean = ratio(report.survivors_per_output)
    total = [_name("all"), _cell(""), *_counts(report.total, report.zeros, report.survivors), _right(mean)]
    if records:
        total += [_right(f"{records[-1].entered:,}"), _right(f"{records[-1].left:,}")]
    if counted is not None:
        total += [_right(f"{counted.dense:,}"), _right(f"{counted.remaining:,}")]
    starving = set(report.starving)
    classes = ["starving" if row.name in starving else "" for row in report.rows]
    table = _table(heads, [*rows, "".join(total)], [*classes, "all"])
    if not records:
        return table
    return f"<p>Entered and left: from step {records[-2].step:,} to {records[-1].step:,}.</p>{table}"


def _counts(total: int, zeros: int, survivors: int) -> list[str]:
    rate = f"{zeros / total:.3%}" if total else "-"
    return [*map(_right, (f"{total:,}", f"{zeros:,}", rate, f"{survivors:,}"))]


def _reasons(reasons: Mapping[str, str]) -> str:
    return _table(["weight", "reason"], [_name(name) + _cell(reason) for name, reason in reasons.items()])


def _table(heads: Sequence[str], rows: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Return a table. A head that begins with ``>`` is aligned to the right, above numbers."""
    head = "".join(
        f'<th class="n">{_text(text[1:])}</th>' if text.startswith(">") else f"<th>{_text(text)}</th>" for text in heads
    )
    kinds = list(classes) or [""] * len(rows)
    body = "\n".join(
        f'<tr class="{kind}">{row}</tr>' if kind else f"<tr>{row}</tr>" for kind, row in zip(kinds, rows, strict=True)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{_text(text)}</td>' if kind else f"<td>{_text(text)}</td>"


def _text(text: str) -> str:
    return escape(printable(text))


_name = functools.partial(_cell, kind="name")
_right = functools.partial(_cell, kind="n")
