"""A page holds the figure and all numbers, loads nothing, and shows any name as text."""

from __future__ import annotations

import copy
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feather_param.reports import MultiplyAdds, Report, Row, page
from tests.reports.models import many
from tests.reports.pages import checked


def test_pages_are_well_formed_and_fetch_nothing(reports):
    report, history, counted = reports
    found = checked(page(report, history=history, multiply_adds=counted, sizes={"dense": 4000, "sparse": 900}))
    text = " ".join(found.text)
    assert f"{report.zeros:,} of {report.total:,} weights are zero" in text
    assert "900 B" in text
    assert "22.5%" in text
    assert "from step 9 to 12" in text
    assert {"rate (zeros)", "threshold", "churn (of survivors)", "optimizer step", "entered", "left"} <= set(found.text)
    assert found.tags.count("svg") == 1
    assert found.cells[-4:] == [11] * 4  # head, two layers, all
    last = {layer.name: layer for layer in history.records[-1].layers}
    for row, add in zip(report.rows, counted.rows, strict=True):
        layer = last[row.name]
        numbers = (row.total, row.zeros, row.survivors, layer.entered, layer.left, add.dense, add.remaining)
        assert row.name in found.text
        assert {f"{number:,}" for number in numbers} <= set(found.text)


def test_pages_need_no_history_and_no_layers(reports):
    _, history, _ = reports
    assert "optimizer step" not in " ".join(checked(page(many(3))).text)
    assert "optimizer step" in " ".join(checked(page(many(3), history=history)).text)
    assert "sparse: 73.21%" in checked(page(many(3), accuracy={"sparse": [(1, 0.7321)]})).text
    young = copy.copy(history)
    young.records = history.records[:1]
    assert "optimizer step" not in " ".join(checked(page(many(3), history=young)).text)
    empty = checked(page(Report(()), sizes={"dense": 0, "sparse": 200}))
    assert "table" in empty.tags
    dead = checked(page(Report((Row("fc.weight", (10, 10), 100, 100, 0.0, 10),))))
    assert "Nothing survives in fc.weight." in " ".join(dead.text)
    starving = checked(page(Report((Row("fc.weight", (10, 10), 100, 97, 1.0, 10),))))
    assert "Fewer survivors than outputs in fc.weight." in " ".join(starving.text)
    assert "0.30" in starving.text
    assert "a weight of Embedding: name it in include to prune it" in checked(page(many(3))).text


@settings(max_examples=30)
@given(st.text(), st.text())
def test_names_are_only_text_in_a_page(name, title):
    report = Report((Row(name, (2, 2), 4, 2, 1.0, 2),), {name: title})
    checked(page(report, title=title, sizes={name: 3}))


def test_a_hostile_name_is_shown_as_it_is():
    name = "<script src='http://x'>alert(1)</script>&\"'"
    html = page(many(2, name), title=name, multiply_adds=MultiplyAdds((), {name: name}))
    assert "<script" not in html
    assert checked(html).text.count(name) >= 4


def test_pages_are_deterministic(reports):
    report, history, counted = reports
    first, second = (page(report, history=history, multiply_adds=counted) for _ in range(2))
    assert first == second


def test_pages_without_matplotlib_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"expected matplotlib to be installed: pip install 'feather_param\[plot\]'"):
        page(many(2))


def test_pages_list_hundreds_of_layers_with_their_names():
    report = many(300)
    found = checked(page(report))
    assert {row.name for row in report.rows} <= set(found.text)
    assert len(found.cells) == 302 + 2  # head, layers and all; the head and the one dense weight
