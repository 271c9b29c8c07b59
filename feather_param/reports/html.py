"""Reports as one page of HTML that needs nothing but itself: no scripts, no fonts, no pictures from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from html import escape

from feather_param.reports.figures import check_arguments, history_svg
from feather_param.reports.history import History, Look
from feather_param.reports.multiply_adds import MultiplyAdds
from feather_param.reports.report import Report
from feather_param.utils.text import percent, short

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #2d3748; background: #fff;
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; white-space: nowrap; }
th, td { padding: .15rem .7rem .15rem 0; border-bottom: 1px solid #edf2f7; }
td.name { white-space: nowrap; min-width: 9rem; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.all td { font-weight: 600; border-top: 2px solid #a0aec0; } tr.dead td { color: #c05621; }
.scroll { overflow-x: auto; }
.bar { position: relative; display: block; width: 11rem; height: .9rem; background: #edf2f7; }
.bar b { position: absolute; inset: 0 auto 0 0; background: #2b6cb0; }
.bar i { position: absolute; top: -.3rem; bottom: -.3rem; border-left: 1px dashed #718096; }
.chart svg { max-width: 100%; height: auto; } .spark { width: 6rem; height: 1.1rem; vertical-align: middle; }
footer { margin: 2.5rem 0 1rem; font-size: .8rem; color: #718096; }
"""


def page(
    report: Report,
    *,
    history: History | None = None,
    multiply_adds: MultiplyAdds | None = None,
    sizes: Mapping[str, int] | None = None,
    title: str = "Sparsity",
) -> str:
    """Return a page that shows which weights survive, and, where given, how it came about and what it saves.

    Args:
        report: what `Controller.report` returned.
        history: adds rate, threshold and churn over the steps, and the survivors of each layer over time; it needs
            matplotlib (``pip install feather_param[plot]``).
        multiply_adds: adds the multiply-adds left in each layer.
        sizes: adds bytes by the name of a file format; the first one is compared with.
        title: headline.

    Raises:
        TypeError: an argument is of another class.

    Example:
        >>> controller = feather_param.sparsify(nn.Linear(4, 4), final_rate=0.75, total_steps=1, end_step=0)
        >>> html = page(controller.report(), title="a <small> layer")
        >>> html[:15], "a &lt;small&gt; layer" in html, "12 of 16 weights are zero" in html
        ('<!doctype html>', True, True)
    """
    check_arguments(report, history, multiply_adds)
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{_summary(report, multiply_adds)}</p>"]
    if sizes:
        parts += ["<h2>File size</h2>", _sizes(sizes)]
    looks = history.looks if history is not None and len(history.looks) > 1 else []
    if history is not None and looks:
        parts += ["<h2>Over the training</h2>", f'<div class="chart">{history_svg(history)}</div>']
    if report.rows:
        parts += ["<h2>Layers</h2>", _layers(report, looks, multiply_adds)]
    if multiply_adds is not None and multiply_adds.uncounted:
        parts += ["<h2>Multiply-adds not counted</h2>", _reasons(multiply_adds.uncounted)]
    if report.skipped:
        parts += ["<h2>Dense</h2>", _reasons(report.skipped)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        "<body>" + "\n".join(parts) + "\n<footer>feather_param</footer></body></html>\n"
    )


def _summary(report: Report, counted: MultiplyAdds | None) -> str:
    text = f"{report.zeros:,} of {report.total:,} weights are zero ({report.rate:.3%})."
    if counted is not None:
        left = percent(counted.left / max(1, counted.dense))
        text += f" Of {short(counted.dense)} multiply-adds of a forward pass {left} are left, if every zero is skipped."
    if report.dead:
        text += f" Nothing survives in {', '.join(report.dead)}."
    return escape(text)


def _sizes(sizes: Mapping[str, int]) -> str:
    largest = max(1, *sizes.values())
    first = max(1, next(iter(sizes.values())))
    rows = [
        f'<td>{escape(name)}</td><td class="n">{size:,} B</td><td class="n">{percent(size / first)}</td>'
        f"<td>{_bar(size / largest)}</td>"
        for name, size in sizes.items()
    ]
    return _table(["format", ">size", f">of {next(iter(sizes))}", ""], rows)


def _layers(report: Report, looks: Sequence[Look], counted: MultiplyAdds | None) -> str:
    kept = [row.survivors / max(1, row.total) for row in report.rows]
    overall = report.survivors / max(1, report.total)
    longest = max(*kept, overall, 1e-9)
    trails: dict[str, list[float]] = {row.name: [] for row in report.rows}
    for look in looks:
        for layer in look.layers:
            trails.setdefault(layer.name, []).append(layer.survivors / max(1, layer.total))
    latest = {layer.name: layer for layer in looks[-1].layers} if looks else {}
    adds = {row.name: row for row in counted.rows} if counted is not None else {}
    heads = ["weight", "shape", ">weights", ">zeros", ">survive", f"dashed: all, {percent(overall)}"]
    heads += ["over time", ">entered", ">left"] * bool(looks) + [">multiply-adds", ">without zeros"] * bool(counted)
    rows: list[str] = []
    for row, part in zip(report.rows, kept, strict=True):
        cells = [_name(row.name), _cell("x".join(map(str, row.shape))), _right(f"{row.total:,}")]
        cells += [
            _right(f"{row.zeros:,}"),
            _right(percent(part)),
            f"<td>{_bar(part / longest, overall / longest)}</td>",
        ]
        if looks:
            layer = latest.get(row.name)
            trail = trails[row.name]
            cells.append(f"<td>{_sparkline(trail)}</td>" if trail else _cell(""))
            cells += [_right(f"{layer.entered:,}" if layer else ""), _right(f"{layer.left:,}" if layer else "")]
        if counted is not None:
            add = adds.get(row.name)
            cells += [_right(short(add.dense) if add else "-"), _right(short(add.left) if add else "-")]
        rows.append("".join(cells))
    total = [_name("all"), _cell(""), _right(f"{report.total:,}"), _right(f"{report.zeros:,}")]
    total += [_right(percent(overall)), _cell("")]
    if looks:
        total += [_cell(""), _right(f"{looks[-1].entered:,}"), _right(f"{looks[-1].left:,}")]
    if counted is not None:
        total += [_right(short(counted.dense)), _right(short(counted.left))]
    classes = ["dead" if row.name in report.dead else "" for row in report.rows]
    table = _table(heads, [*rows, "".join(total)], [*classes, "all"])
    if not looks:
        return table
    return f"<p>Entered and left: from step {looks[-2].step:,} to {looks[-1].step:,}.</p>{table}"


def _reasons(reasons: Mapping[str, str]) -> str:
    return _table(["weight", "reason"], [_name(name) + _cell(reason) for name, reason in reasons.items()])


def _table(heads: Sequence[str], rows: Sequence[str], classes: Sequence[str] = ()) -> str:
    """Return a table; a head that begins with > stands over numbers."""
    head = "".join(
        f'<th class="n">{escape(text[1:])}</th>' if text.startswith(">") else f"<th>{escape(text)}</th>"
        for text in heads
    )
    kinds = list(classes) or [""] * len(rows)
    body = "\n".join(
        f'<tr class="{kind}">{row}</tr>' if kind else f"<tr>{row}</tr>" for kind, row in zip(kinds, rows, strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _bar(part: float, mark: float | None = None) -> str:
    dashed = "" if mark is None else f'<i style="left:{100 * mark:.2f}%"></i>'
    return f'<span class="bar"><b style="width:{100 * part:.2f}%"></b>{dashed}</span>'


def _sparkline(ys: Sequence[float]) -> str:
    """Return a line as small as a word, from 0 to 1."""
    points = " ".join(f"{100.0 * i / max(1, len(ys) - 1):.1f},{19.0 - 18.0 * y:.1f}" for i, y in enumerate(ys))
    style = 'fill="none" stroke="#2b6cb0" stroke-width="1.6" vector-effect="non-scaling-stroke"'
    line = f'<polyline {style} points="{points}"/>'
    return f'<svg class="spark" viewBox="0 0 100 20" preserveAspectRatio="none">{line}</svg>'


def _cell(text: str, kind: str = "") -> str:
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"


_name = functools.partial(_cell, kind="name")
_right = functools.partial(_cell, kind="n")
