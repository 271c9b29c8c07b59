"""A figure has a panel for each argument, clips no text and needs no window."""

from __future__ import annotations

import io
import sys

import pytest

from feather_param.reports import LayerMultiplyAdds, MultiplyAdds, Report, Row, figures
from tests.reports.models import many

CURVES = {"dense": [(10, 0.5), (20, 0.75)], "sparse": [(10, 0.4), (20, 0.7321)]}


def figure_cases(reports):
    report, history, counted = reports
    names = [row.name for row in many(54).rows]
    adds = MultiplyAdds(tuple(LayerMultiplyAdds(name, (64, 64, 3, 3), 3136, 40 * i) for i, name in enumerate(names)))
    thousands = MultiplyAdds(tuple(LayerMultiplyAdds(f"{i}", (9, 9), 5, i % 80) for i in range(3000)))
    return {
        "all": figures.draw(report, history=history, multiply_adds=counted, accuracy=CURVES, title="digits"),
        "survivors": figures.draw(report),
        "many": figures.draw(many(54), history=history, multiply_adds=adds, title="many"),
        "one": figures.draw(many(1), multiply_adds=counted),
        "dead": figures.draw(Report((Row("fc.weight", (10, 10), 100, 100, 0.0, 10),)), title="dead"),
        "none": figures.draw(Report(()), multiply_adds=MultiplyAdds(())),
        "accuracy": figures.draw(accuracy={"": [(1, 0.5)]}, title="dense"),
        "long": figures.draw(many(3, "a" * 200), multiply_adds=counted, accuracy=CURVES, title="a long title " * 20),
        "odd": figures.draw(many(3, "_$a$\n\0"), accuracy={"_$a$\0": [(1, 0.5)], "$": [(1, 1.0)]}, title="$\\"),
        "thousands": figures.draw(many(300), multiply_adds=thousands),
    }


def test_figures_clip_nothing_and_nothing_overlaps(reports):
    import matplotlib.pyplot

    open_figures = matplotlib.pyplot.get_fignums()
    for name, figure in figure_cases(reports).items():
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert file.getvalue().startswith(b"\x89PNG"), name
        width, height = figure.canvas.get_width_height()
        xlabels = []
        for axes in figure.axes:
            legend = axes.get_legend().get_texts() if axes.get_legend() else []
            low, high = sorted(axes.get_ylim())
            ticks = [label for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
            texts = [*axes.texts, *legend, *ticks, axes.xaxis.label, axes.yaxis.label]
            boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
            for text, box in boxes:
                assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -1, (name, text)
            bars = [box for _, box in boxes[: len(axes.texts)]]
            assert not any(a.overlaps(b) for i, a in enumerate(bars) for b in bars[i + 1 :]), name
            if axes.xaxis.label.get_text():
                xlabels.append(axes.xaxis.label.get_window_extent())
        assert not any(a.overlaps(b) for i, a in enumerate(xlabels) for b in xlabels[i + 1 :]), name
    assert matplotlib.pyplot.get_fignums() == open_figures  # no global state


def test_figures_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"expected matplotlib to be installed: pip install 'feather_param\[plot\]'"):
        figures.draw(many(2))


def labels(figure) -> list[str]:
    return [axes.get_ylabel() or axes.get_xlabel() for axes in figure.axes]


def test_figures_have_a_panel_for_each_argument(reports):
    report, history, counted = reports
    total = f"{counted.remaining / counted.dense:.1%}"
    accuracy, survivors = "test accuracy", "survivors of each layer (dashed: all layers, 20.0%)"
    steps = ["rate (zeros)", "threshold", "churn (of survivors)"]
    adds = f"multiply-adds of each layer (dark: remaining, {total} of 5.10k)"
    assert labels(figures.draw(report)) == [survivors]
    assert labels(figures.draw(accuracy=CURVES)) == [accuracy]
    assert labels(figures.draw(accuracy=CURVES, history=history)) == [accuracy, *steps]
    assert labels(figures.draw(report, accuracy=CURVES)) == [accuracy, survivors]
    everything = figures.draw(report, history=history, multiply_adds=counted, accuracy=CURVES)
    assert labels(everything) == [accuracy, *steps, survivors, adds]


def test_curves_show_their_points_and_name_their_last_value():
    (axes,) = figures.draw(accuracy=CURVES).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense: 75.00%", "sparse: 73.21%"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[10, 20], [10, 20]]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 0.75], [0.4, 0.7321]]


def test_bars_and_numbers_are_those_of_the_layers(reports):
    report, _, counted = reports
    survivors, adds = figures.draw(report, multiply_adds=counted).axes
    assert [bar.get_width() for bar in survivors.patches] == [row.survivors / row.total for row in report.rows]
    widths = [row.dense for row in counted.rows] + [row.remaining for row in counted.rows]
    assert [bar.get_width() for bar in adds.patches] == widths
    for text, row in zip(survivors.texts, report.rows, strict=True):
        assert f"({row.survivors:,} of {row.total:,})" in text.get_text()
    assert [label.get_text() for label in survivors.get_yticklabels()] == ["0", "4"]


def test_svg_is_deterministic_and_its_words_are_text(reports):
    report, history, counted = reports
    first, second = (
        figures.svg(figures.draw(report, history=history, multiply_adds=counted, accuracy=CURVES)) for _ in range(2)
    )
    assert first == second
    assert first.startswith("<svg")
    for word in ("test accuracy", "optimizer step", "sparse: 73.21%", "churn (of survivors)"):
        assert f">{word}</text>" in first


def test_figures_refuse_what_they_cannot_draw(reports):
    report, history, _ = reports
    for arguments, error, message in [
        ({}, ValueError, "expected a report or an accuracy to draw, got neither"),
        ({"history": history}, ValueError, "expected a report or an accuracy to draw, got neither"),
        ({"accuracy": [0.5]}, TypeError, "expected accuracy to map names to .* pairs, got list"),
        ({"report": report, "accuracy": {"a": []}}, ValueError, "pairs for a, got none"),
        ({"accuracy": {"a": [(1, 93.2)]}}, ValueError, "accuracy of a as a fraction from 0 to 1, got 93.2 at 1"),
        ({"accuracy": {"a": [(1, "x")]}}, TypeError, "expected the accuracy of a to be a number, got 'x'"),
    ]:
        with pytest.raises(error, match=message):
            figures.draw(**arguments)
