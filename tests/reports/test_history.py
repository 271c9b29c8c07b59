"""Reports that people look at: history and churn, multiply-adds, TensorBoard, figures, pages."""

from __future__ import annotations

import copy
import io
import itertools
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param.reports import figures, tensorboard
from feather_param.reports.history import History
from feather_param.reports.html import page
from feather_param.reports.multiply_adds import LayerMultiplyAdds, MultiplyAdds, multiply_adds
from feather_param.reports.report import Report, Row
from feather_param.utils import text as tables
from tests.training import train

RATE = 0.8


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 25, 7)]
    return nn.Sequential(*layers).to(dtype)


def loss(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, 5, 5, generator=generator).to(next(model.parameters()).dtype)
    return nn.functional.cross_entropy(model(x).float(), torch.arange(8) % 7)


def started(seed: int = 0, dtype: torch.dtype = torch.float32):
    model = network(seed, dtype)
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=12)
    return model, torch.optim.AdamW(model.parameters(), lr=0.03), controller


def alive(model: nn.Module) -> dict[str, set[int]]:
    """The positions that desparsify leaves, one by one."""
    plain = copy.deepcopy(model)
    feather_param.desparsify(plain)
    weights = {"0.weight": plain[0].weight, "4.weight": plain[4].weight}
    return {name: {i for i, v in enumerate(weight.flatten().tolist()) if v != 0} for name, weight in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [None, 0, 3, 7])
def test_history_equals_a_slow_twin_also_when_resumed(dtype, stop):
    model, optimizer, controller = started(dtype=dtype)
    history = History(controller)
    before = alive(model)
    expected = [(0, 0.0, before, before)]
    for step in range(12):
        if step == stop:
            file = io.BytesIO()
            torch.save([thing.state_dict() for thing in (model, optimizer, controller, history)], file)
            file.seek(0)
            model, optimizer, controller = started(seed=9, dtype=dtype)
            history = History(controller)
            for thing, state in zip((model, optimizer, controller, history), torch.load(file), strict=True):
                thing.load_state_dict(state)
        train(model, loss, controller, [step], optimizer)
        if step % 2:
            look, now = history.look(), alive(model)
            assert look is history.looks[-1]
            expected.append((step + 1, controller.rate, before, now))
            before = now
    total = 6 * 3 * 9 + 7 * 150
    assert len(history.looks) == len(expected)
    for look, (step, rate, before, now) in zip(history.looks, expected, strict=True):
        assert (look.step, look.rate, look.total) == (step, rate, total)
        assert look.survivors == total - round(rate * total)
        assert [(layer.name, layer.survivors, layer.entered, layer.left, layer.total) for layer in look.layers] == [
            (name, len(now[name]), len(now[name] - before[name]), len(before[name] - now[name]), size)
            for name, size in (("0.weight", 162), ("4.weight", 1050))
        ]
        assert look.entered - look.left == sum(len(now[name]) - len(before[name]) for name in now)
    assert any(look.entered for look in history.looks)  # else nothing was compared
    assert history.looks[-1].threshold == float(controller.threshold)


def test_frozen_masks_have_no_churn():
    model, optimizer, controller = started()
    history = History(controller)
    train(model, loss, controller, range(8), optimizer)
    controller.freeze()
    assert history.look().left
    train(model, loss, controller, range(8, 12), optimizer)
    assert (history.look().entered, history.looks[-1].left) == (0, 0)


def test_history_takes_one_bit_a_weight():
    controller = feather_param.sparsify(nn.Linear(1000, 101), final_rate=0.5, total_steps=4)
    masks = History(controller).state_dict()["masks"]
    assert sum(mask.nbytes for mask in masks.values()) == -(-101_000 // 8)


def test_history_counts_a_tied_weight_once():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    history = History(feather_param.sparsify(model, final_rate=0.5, total_steps=4, end_step=0))
    assert [(layer.name, layer.total, layer.survivors) for layer in history.looks[0].layers] == [("0.weight", 64, 32)]


def test_history_refuses_what_is_not_its_own():
    history = History(feather_param.sparsify(nn.Linear(4, 4), final_rate=0.5, total_steps=4))
    other = History(feather_param.sparsify(nn.Linear(4, 5), final_rate=0.5, total_steps=4))
    before = history.state_dict()
    for state, message in [
        ({}, "expected the state_dict of a History, got something else"),
        ([1], "expected the state_dict of a History, got something else"),
        ({**before, "version": 9}, "expected a history state of version 1, got 9"),
        (other.state_dict(), r"got another's: weight has shape \[4, 4\] here and \[5, 4\] there"),
    ]:
        with pytest.raises(ValueError, match=message):
            history.load_state_dict(state)
    assert str(history.state_dict()) == str(before)


def test_history_wants_a_controller():
    with pytest.raises(TypeError, match="expected the controller that sparsify returns, got Linear"):
        History(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_history_ends_with_desparsify():
    model, optimizer, controller = started()
    history = History(controller)
    train(model, loss, controller, range(12), optimizer)
    feather_param.desparsify(model)
    with pytest.raises(RuntimeError, match=r"expected masks\(\) before desparsify"):
        history.look()
    assert len(history.looks) == 1


# Multiply-adds. Each line: a layer, the shape of its input, and by hand the applications of each weight element.
LAYERS = [
    (nn.Linear(5, 3), (2, 5), 2),
    (nn.Linear(5, 3), (2, 7, 5), 14),
    (nn.Linear(5, 3), (5,), 1),
    (nn.Conv2d(3, 8, 3), (1, 3, 6, 6), 16),  # 4 x 4 positions of the output
    (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 6, 6), 36),
    (nn.Conv2d(3, 8, 3, padding=1, stride=2), (1, 3, 6, 6), 9),
    (nn.Conv2d(3, 8, 3, dilation=2), (1, 3, 6, 6), 4),
    (nn.Conv2d(4, 8, 3, groups=2), (5, 4, 6, 6), 80),
    (nn.Conv2d(6, 6, (3, 1), groups=6), (1, 6, 6, 6), 24),  # depthwise, 4 x 6
    (nn.Conv1d(2, 3, 4), (1, 2, 10), 7),
    (nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 5), 48),  # 2 x (2 x 3 x 4)
    (nn.ConvTranspose2d(3, 8, 3), (1, 3, 4, 4), 16),  # 4 x 4 positions of the input
    (nn.ConvTranspose2d(3, 8, 3, stride=2, padding=1), (2, 3, 4, 4), 32),
    (nn.ConvTranspose2d(4, 8, 3, groups=2), (1, 4, 4, 4), 16),
    (nn.ConvTranspose1d(2, 3, 4, stride=3), (1, 2, 10), 10),
    (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 4, 5), 60),
]


@pytest.mark.parametrize(("layer", "shape", "uses"), LAYERS, ids=lambda value: str(value)[:40])
def test_multiply_adds_of_a_layer(layer, shape, uses):
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight.flatten()[::3] = 0.0
    kept = layer.weight.numel() - -(-layer.weight.numel() // 3)
    found = multiply_adds(layer, torch.randn(shape))
    assert found.rows == (LayerMultiplyAdds("weight", tuple(layer.weight.shape), uses, kept),)
    assert (found.dense, found.left) == (uses * layer.weight.numel(), uses * kept)


def test_multiply_adds_of_known_networks():
    torchvision = pytest.importorskip("torchvision")
    for builder, published in ((torchvision.models.resnet18, 1.814e9), (torchvision.models.mobilenet_v3_small, 56.5e6)):
        weights = next(iter(torchvision.models.get_model_weights(builder)))
        with torch.device("meta"):
            model = builder()
        found = multiply_adds(model.to_empty(device="cpu"), torch.zeros(1, 3, 224, 224))
        assert found.dense == pytest.approx(published, rel=1e-2)
        assert weights.meta["_ops"] == pytest.approx(found.dense / 1e9, rel=1e-2)  # torchvision's own count


def test_multiply_adds_of_a_sparsified_model_are_those_of_the_baked_one():
    model, optimizer, controller = started()
    train(model, loss, controller, range(7), optimizer)
    x = torch.zeros(2, 3, 5, 5)
    sparse = multiply_adds(model, x)
    feather_param.desparsify(model)
    assert sparse == multiply_adds(model, x)
    assert sparse.dense == 2 * 25 * 162 + 2 * 1050
    assert sparse.left < 0.5 * sparse.dense


def test_multiply_adds_leave_the_model_as_it_was():
    model = network()
    model[1].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    multiply_adds(model, torch.randn(4, 3, 5, 5))
    with pytest.raises(RuntimeError):
        multiply_adds(model, torch.randn(4, 1))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, got int"):
        multiply_adds(3, torch.randn(4))  # type: ignore[arg-type]


def test_multiply_adds_name_what_they_do_not_count():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 4), "out": nn.Linear(4, 2)})
    model["unused"] = nn.Linear(2, 2)

    def forward(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return model["out"](input=model["lstm"](model["attention"](query, value, value)[0])[0])

    model.forward = forward
    for sparse in (False, True):
        if sparse:
            feather_param.sparsify(model, final_rate=0.5, total_steps=1, include=["*", "attention.in_proj_weight"])
        x = torch.randn(3, 1, 8)
        for example in ((x, x), {"query": x, "value": x}):
            found = multiply_adds(model, example)
            assert [(row.name, row.uses) for row in found.rows] == [("out.weight", 3)]
            assert found.uncounted == {
                "attention.in_proj_weight": "a weight of MultiheadAttention",
                "attention.out_proj.weight": "its layer is not called in this pass",
                "lstm.weight_ih_l0": "a weight of LSTM",
                "lstm.weight_hh_l0": "a weight of LSTM",
                "unused.weight": "its layer is not called in this pass",
            }
    assert "not counted: lstm.weight_ih_l0 (a weight of LSTM)" in str(found)


def test_a_layer_called_twice_counts_twice():
    layer = nn.Linear(3, 3)
    assert multiply_adds(nn.Sequential(layer, layer), torch.zeros(2, 3)).dense == 2 * 2 * 9


# Looked at


def trained():
    model, optimizer, controller = started()
    history = History(controller)
    for step in range(12):
        train(model, loss, controller, [step], optimizer)
        if step % 3 == 2:
            history.look()
    return controller.report(), history, multiply_adds(model, torch.zeros(1, 3, 5, 5))


def many(count: int, name: str = "features.denseblock1.denselayer{}.conv1.weight") -> Report:
    rows = [Row(name.format(i), (64, 64, 3, 3), 36_864, 36_864 - 40 * i, 1 / count) for i in range(count)]
    return Report(tuple(rows), {"embedding.weight": "a weight of Embedding: name it in include to prune it"})


@pytest.fixture(scope="module", name="reports")
def _reports():
    return trained()


def test_tensorboard_scalars_arrive(tmp_path, reports):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard.writer import SummaryWriter

    report, history, counted = reports
    with SummaryWriter(str(tmp_path)) as writer:
        tensorboard.add_report(writer, report, 99)
        for look in history.looks:
            tensorboard.add_look(writer, look)
        tensorboard.add_multiply_adds(writer, counted, 12)
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()

    def read(tag: str) -> list[tuple[int, float]]:
        return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in events.Scalars(tag)]

    assert read("sparsity/rate") == [(look.step, look.rate) for look in history.looks]
    assert read("sparsity/threshold") == [(look.step, look.threshold) for look in history.looks]
    assert read("churn/left") == [(look.step, look.left / look.survivors) for look in history.looks]
    assert read("churn/entered") == [(look.step, look.entered / look.survivors) for look in history.looks]
    kept = [(look.step, look.layers[1].survivors / 1050) for look in history.looks]
    assert sorted(read("survivors/4.weight"), key=lambda item: item[0]) == [*kept, (99, 1 - report.rows[1].rate)]
    assert read("multiply_adds/left") == [(12, counted.left / counted.dense)]
    assert read("multiply_adds/0.weight") == [(12, counted.rows[0].left / counted.rows[0].dense)]


def figure_cases():
    report, history, counted = trained()
    names = [row.name for row in many(54).rows]
    adds = MultiplyAdds(tuple(LayerMultiplyAdds(name, (64, 64, 3, 3), 3136, 40 * i) for i, name in enumerate(names)))
    return {
        "all": figures.draw(report, history=history, multiply_adds=counted, title="digits"),
        "survivors": figures.draw(report),
        "many": figures.draw(many(54), history=history, multiply_adds=adds, title="many"),
        "one": figures.draw(many(1), multiply_adds=counted),
        "dead": figures.draw(Report((Row("fc.weight", (10, 10), 100, 100, 0.0),)), title="dead"),
        "none": figures.draw(Report(()), multiply_adds=MultiplyAdds(())),
    }


def test_figures_show_everything_and_clip_nothing():
    import matplotlib.pyplot

    open_figures = matplotlib.pyplot.get_fignums()
    for name, figure in figure_cases().items():
        file = io.BytesIO()
        figure.savefig(file, format="png")
        assert file.getvalue().startswith(b"\x89PNG"), name
        width, height = figure.canvas.get_width_height()
        xlabels = []
        for axes in figure.axes:
            texts = [*axes.texts, *axes.get_yticklabels(), axes.xaxis.label, axes.yaxis.label]
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


class Checker(HTMLParser):
    """Refuses what is not well-formed, and anything a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self.cells: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "a", "foreignobject"), tag
        for name, value in attrs:
            assert name not in ("src", "href", "action", "srcset"), name
            assert name != "xlink:href" or (value or "").startswith("#"), value  # a part of the same page
            assert not name.startswith("on"), name
            if not name.startswith("xmlns"):
                assert not any(text in (value or "").replace("url(#", "") for text in ("url(", "http")), value
        self.tags.append(tag)
        if tag == "tr":
            self.cells.append(0)
        if tag in ("td", "th"):
            self.cells[-1] += 1
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            assert not any(text in data for text in ("url(", "@import"))
        else:
            self.text.append(data)


def checked(html: str) -> Checker:
    assert html.startswith("<!doctype html>\n")
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert {"html", "head", "body", "title", "h1"} <= set(checker.tags)
    return checker


def test_pages_are_well_formed_and_fetch_nothing(reports):
    report, history, counted = reports
    found = checked(page(report, history=history, multiply_adds=counted, sizes={"dense": 4000, "sparse": 900}))
    text = " ".join(found.text)
    assert f"{report.zeros:,} of {report.total:,} weights are zero" in text
    assert "900 B" in text
    assert "22.5%" in text
    assert "from step 9 to 12" in text
    assert {"rate (zeros)", "threshold", "churn (of survivors)", "optimizer step", "entered", "left"} <= set(found.text)
    assert found.tags.count("polyline") == len(report.rows)
    assert found.cells[-4:] == [11] * 4  # head, two layers, all
    for row in report.rows:
        assert row.name in found.text
        assert f"{row.zeros:,}" in found.text


def test_swapped_arguments_are_told(reports):
    report, history, counted = reports
    for call, message in [
        (lambda: page(history), r"expected a Report from controller\.report\(\), got History"),
        (lambda: figures.draw(history), r"expected a Report from controller\.report\(\), got History"),
        (lambda: figures.draw_survivors(report, None), r"expected a Report from .*, got NoneType"),
        (lambda: page(report, history=counted), r"expected a History from History\(controller\), got MultiplyAdds"),
        (lambda: figures.draw(report, multiply_adds=history), r"expected a MultiplyAdds from .*, got History"),
        (lambda: tensorboard.add_report(report, None, 1), r"expected a Report from .*, got NoneType"),
        (lambda: tensorboard.add_look(None, history), r"expected a Look from history\.looks, got History"),
        (lambda: tensorboard.add_multiply_adds(None, report, 1), r"expected a MultiplyAdds from .*, got Report"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_pages_without_history_or_layers(reports):
    _, history, _ = reports
    assert "Over the training" not in " ".join(checked(page(many(3))).text)
    young = copy.copy(history)
    young.looks = history.looks[:1]
    assert "Over the training" not in " ".join(checked(page(many(3), history=young)).text)
    empty = checked(page(Report(()), sizes={"dense": 0, "sparse": 200}))
    assert "table" in empty.tags
    dead = checked(page(Report((Row("fc.weight", (10, 10), 100, 100, 0.0),))))
    assert "Nothing survives in fc.weight." in " ".join(dead.text)
    assert "a weight of Embedding: name it in include to prune it" in checked(page(many(3))).text


@settings(max_examples=30)
@given(st.text(), st.text())
def test_names_are_only_text_in_a_page(name, title):
    report = Report((Row(name, (2, 2), 4, 2, 1.0),), {name: title})
    checked(page(report, title=title, sizes={name: 3}))


def test_a_hostile_name_is_shown_as_it_is():
    name = "<script src='http://x'>alert(1)</script>&\"'"
    html = page(many(2, name), title=name, multiply_adds=MultiplyAdds((), {name: name}))
    assert "<script" not in html
    assert checked(html).text.count(name) >= 4


@given(st.integers(0, 10**18))
def test_short_numbers_are_right_to_three_digits(count):
    text = tables.short(count)
    unit = " kMGTP".find(text[-1]) if not text[-1].isdigit() else 0
    value = float(text.rstrip("kMGTP")) * 1000**unit
    assert value == pytest.approx(count, rel=0.005)
    assert len(text) <= 5 or count >= 10**17


@pytest.mark.filterwarnings("ignore:nothing survives")  # of so small a network, at the documented rate
def test_the_documented_snippet_runs(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    text = (Path(__file__).resolve().parents[2] / "docs" / "reports.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    steps = itertools.count()

    def train_one_epoch(model, loader, controller):
        train(model, loss, controller, [next(steps) for _ in loader])

    scope = {"model": network(), "loader": range(3), "epochs": 4, "example_input": torch.zeros(1, 3, 5, 5)}
    exec(
        compile(block, "reports.md", "exec"),
        {**scope, "feather_param": feather_param, "train_one_epoch": train_one_epoch},
    )
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")
    assert "from step 9 to 12" in " ".join(checked(Path("report.html").read_text(encoding="utf-8")).text)
    assert list(Path("runs/first").iterdir())
    for name in re.findall(r"tensorboard\.(add_\w+)", text):
        assert callable(getattr(tensorboard, name))
