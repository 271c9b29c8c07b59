"""Names with control characters, newlines or a megabyte: each place that shows a name shows it escaped and short."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import feather_param
from feather_param import allocations, reports, schedules
from feather_param.cli import main as cli
from feather_param.core import baked_state
from feather_param.inference import Choices, to_semi_structured
from feather_param.inference.report import InferenceReport, InferenceRow
from feather_param.ops.groups import Group
from feather_param.reports import LayerMultiplyAdds, MultiplyAdds, Report, Row, figures
from feather_param.utils.text import grouped, listed
from tests.reports.pages import checked
from tests.times import is_linear

NAMES = {
    "a terminal's title": "begin\x1b]0;owned\x07end",
    "a cleared screen": "begin\x9b2Jend",
    "a forged row": "begin\nall  1x1  1  1  100%\nend",
    "a forged note": "begin\rfeather-param: note: all is well\nend",
    "other line ends": "begin\v\f\x1c\x85\u2028\u2029end",
    "text that is reversed": "begin\u202egnp\u2066end",
    "invisible characters": "begin\u200b\u00ad\ufeff\U000e0001end",
    "a lone surrogate": "begin\udcffend",
    "mathematics": r"begin$\frac$_^{end",
    "a format": "begin{0!r}%s%(x)d\\x1bend",
    "HTML": "begin<script>&amp;\"'end",
    "a megabyte": "begin" + "x" * 10**6 + "end",
    "a megabyte of newlines": "begin" + "\n" * 10**6 + "end",
    "numbers": "begin" + "1_" * 10_000 + "end",
    "a long number": "begin" + "7" * 5000 + "end",
    "another script": "begin_層_ä_٣_end",
}
HARMLESS = "begin_end"


def network(name: str) -> nn.Sequential:
    """Return a network with a layer and an embedding of a name. The weights of its other layer are larger."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(name, nn.Linear(8, 8))
    model.add_module("large", nn.Linear(8, 8))
    model.add_module(f"{name} embedding", nn.Embedding(2, 2))
    with torch.no_grad():
        model.large.weight.copy_(1 + torch.rand(8, 8))
    return model


def sparsified(name: str, **settings: object) -> tuple[nn.Module, feather_param.Controller]:
    model = network(name)
    settings = {"final_rate": 0.25, "total_steps": 1, "schedule": schedules.constant, **settings}
    return model, feather_param.sparsify(model, **settings)


def error_of(function: Callable[..., object], *args: object, **kwargs: object) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def warning_of(function: Callable[[], object]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return "\n".join(str(each.message) for each in caught)


def report_of(name: str) -> Report:
    return Report(
        (Row(name, (4, 4), 16, 12, 1.0, 4, ties=1), Row("dead", (2, 2), 4, 4, 0.0, 2)), {name: f"tied to {name}"}
    )


def figure_of(name: str) -> str:
    adds = MultiplyAdds((LayerMultiplyAdds(name, (2, 2), 4, 2),))
    figure = figures.draw(report_of(name), multiply_adds=adds, accuracy={name: [(1, 0.5)]}, title=name)
    texts = [
        *(label for axes in figure.axes for label in axes.get_yticklabels()),
        *figure.axes[0].get_legend().get_texts(),
    ]
    return "\n".join(text.get_text() for text in texts)


def page_of(name: str) -> str:
    adds = MultiplyAdds((LayerMultiplyAdds(name, (2, 2), 4, 2),), {name: name})
    html = reports.page(report_of(name), multiply_adds=adds, sizes={name: 3})
    assert html.encode().decode() == html
    return "\n".join(each for each in checked(html).text if each.strip())


def nan_in(name: str) -> nn.Module:
    model = network(name)
    nn.init.constant_(model[0].weight, torch.nan)
    return model


def other_state(name: str) -> str:
    return error_of(sparsified(name)[1].load_state_dict, sparsified("other")[1].state_dict())


def parametrized(name: str) -> str:
    model = network(name)
    nn.utils.parametrizations.spectral_norm(model[0])
    return error_of(feather_param.sparsify, model, final_rate=0.5, total_steps=1)


def state_without_position(name: str) -> str:
    return error_of(feather_param.baked_state_dict, {f"{name}.parametrizations.weight.original": torch.eye(2)})


def state_without_weight(name: str) -> str:
    state = sparsified(name)[0].state_dict()
    del state[f"{name}.parametrizations.weight.original"]
    return error_of(feather_param.baked_state_dict, state)


def sparse_file(name: str) -> str:
    text = json.dumps({"version": 1, "tensors": {name: {"dtype": name, "shape": [], "zstd": False, "crc32": 0}}})
    header = {"__metadata__": {"feather_param sparse": text, "feather_param crc32": str(zlib.crc32(text.encode()))}}
    content = json.dumps(header).encode()
    Path("forged").write_bytes(struct.pack("<Q", len(content)) + content)
    return error_of(feather_param.load_sparse, "forged")


def command(*argv: str) -> str:
    """Return what a command prints, without the path of the file."""
    old, sys.stdout, sys.stderr = (sys.stdout, sys.stderr), io.StringIO(), io.StringIO()
    try:
        cli.main(argv)
        return sys.stdout.getvalue() + sys.stderr.getvalue()
    finally:
        sys.stdout, sys.stderr = old


def command_on(content: Callable[[str], object], *argv: str) -> Callable[[str], str]:
    def run(name: str) -> str:
        torch.save(content(name), "in.pt")
        return command(argv[0], "in.pt", *(word.replace("NAME", name) for word in argv[1:]))

    return run


def weights(name: str) -> dict[str, object]:
    return {name: torch.eye(4)}


PLACES: dict[str, Callable[[str], str]] = {
    "a list": lambda name: listed([name, "b"]),
    "a group": lambda name: "\n".join(grouped({name: name, f"{name}1": "excluded"})),
    "a report": lambda name: str(report_of(name)),
    "the report of a controller": lambda name: str(sparsified(name)[1].report()),
    "a plan": lambda name: str(feather_param.plan(network(name), final_rate=0.5)),
    "multiply-adds": lambda name: str(MultiplyAdds((LayerMultiplyAdds(name, (2, 2), 4, 2),), {name: name})),
    "an inference report": lambda name: str(
        InferenceReport(
            (InferenceRow(name, (8, 4), 0.7, "dense", 1.0, None, 0.4, None, name),),
            *(1.0, 1.0, 1.0, 1.0),
            Choices(name, 1, "sparse", (name,)),
        )
    ),
    "a page": page_of,
    "a figure": figure_of,
    "an error of an accuracy": lambda name: error_of(figures.draw, accuracy={name: [(1, 2.0)]}),
    "NaN": lambda name: error_of(feather_param.sparsify, nan_in(name), final_rate=0.5, total_steps=1),
    "a model that is sparsified": lambda name: error_of(
        feather_param.sparsify, sparsified(name)[0], final_rate=0.5, total_steps=1
    ),
    "names beside a glob": lambda name: error_of(feather_param.plan, network(name), final_rate=0.5, exclude="missing"),
    "a dtype": lambda name: error_of(feather_param.plan, network(name).to(torch.float8_e5m2), final_rate=0.5),
    "a rate of each layer": lambda name: error_of(
        feather_param.plan, network(name), final_rate=0.5, allocation=allocations.per_layer({"large.weight": 0.5})
    ),
    "a plan of another model": lambda name: error_of(
        feather_param.plan, network("other"), final_rate=0.5, allocation=allocations.from_plan({name: 3})
    ),
    "a pattern that does not fit": lambda name: error_of(
        feather_param.plan, network(name), final_rate=0.5, pattern=feather_param.patterns.n_m(2, 16)
    ),
    "a parametrization that cannot hold zeros": parametrized,
    "a model without weights to prune": lambda name: error_of(
        feather_param.plan, nn.Sequential(OrderedDict({name: nn.Embedding(4, 4)})), final_rate=0.5
    ),
    "an allocation that returns no tuple": lambda name: error_of(
        feather_param.plan, network(name), final_rate=0.5, allocation=lambda *_: [Group([name], 3, torch.ones(()))]
    ),
    "the state of another controller": other_state,
    "the settings of another controller": lambda name: error_of(
        (controller := sparsified("fc")[1]).load_state_dict, {**controller.state_dict(), "allocation": name}
    ),
    "a state without its position": state_without_position,
    "a state without a weight": state_without_weight,
    "2:4 weights": lambda name: error_of(to_semi_structured, network(name)),
    "a warning of a dead layer": lambda name: warning_of(
        lambda: feather_param.desparsify(sparsified(name, final_rate=0.5)[0])
    ),
    "a warning of an optimizer": lambda name: warning_of(
        lambda: feather_param.sparsify(
            model := network(name), final_rate=0.5, total_steps=9, optimizer=torch.optim.SGD(model.large.parameters())
        )
    ),
    "save_sparse": lambda name: error_of(feather_param.save_sparse, {name: torch.eye(2).to_sparse()}, "out"),
    "load_sparse": sparse_file,
    "the command's table": command_on(weights, "report", "--no-sizes"),
    "the command's key": command_on(
        lambda name: {name: weights("w"), f"{name} beside": 3}, "report", "--no-sizes", "--key", "NAME"
    ),
    "the command's notes": command_on(lambda name: {"w": torch.eye(4), name: 3}, "report", "--no-sizes"),
    "a wrong key": command_on(weights, "report", "--key", "missing"),
    "an entry that is no tensor": command_on(lambda name: {"w": torch.eye(4), name: 3}, "compress", "out"),
    "an entry that bake refuses": command_on(lambda name: {"w": torch.eye(4), name: 3}, "bake", "out.pt"),
    "a missing file": lambda name: command("report", name),
    "a wrong argument": command_on(weights, "report", "NAME"),
    "an architecture": command_on(weights, "bench", "--arch", "NAME", "--input", "1"),
    "a setting": command_on(weights, "bench", "--arch", "torch.nn:Linear", "NAME", "--input", "1"),
    "the value of a setting": command_on(weights, "bench", "--arch", "torch.nn:Linear", "NAME=1", "--input", "1"),
}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:.*(fewer survivors|nothing survives).*")
@pytest.mark.parametrize("place", PLACES)
def test_names_are_shown_escaped_and_short(place):
    show = PLACES[place]
    lines = show(HARMLESS).split("\n")
    for kind, name in NAMES.items():
        shown = show(name)
        assert all(map(str.isprintable, shown.split("\n"))), (kind, shown[:300])
        assert len(shown.split("\n")) == len(lines), (kind, shown[:300])
        assert re.search("begin.*end", shown), (kind, shown[:300])
        assert len(shown) < 30 * 400 * len(lines), kind
        if name.isprintable() and len(name) < 48 and place != "a group":
            assert name in shown.replace("\\\\", "\\").replace("\\'", "'"), (kind, shown[:300])


def test_a_figure_draws_all_names():
    rows = tuple(Row(name, (4, 4), 16, 12, 1.0, 4) for name in NAMES.values())
    figure = figures.draw(
        Report(rows), accuracy={name: [(1, 0.5)] for name in NAMES.values()}, title=NAMES["mathematics"]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib's font has no Chinese
        figure.savefig(io.BytesIO(), format="png")
    assert r"begin$\frac$_^{end" in figures.svg(figure)


@pytest.mark.filterwarnings("ignore:.*nothing survives.*")
def test_files_and_json_keep_the_names():
    names = [name for name in NAMES.values() if name.isascii() or "層" in name]
    feather_param.save_sparse({name: torch.eye(3) for name in names}, "in.safetensors")
    assert list(feather_param.load_sparse("in.safetensors")) == names
    text = command("report", "in.safetensors", "--json", "--no-sizes")
    assert [tensor["name"] for tensor in json.loads(text)["tensors"]] == names
    assert text.isascii()
    for name in (NAMES["a forged row"], NAMES["other line ends"]):
        model, _ = sparsified(name, final_rate=0.5)
        for key, value in feather_param.baked_state_dict(model).items():
            assert torch.equal(feather_param.baked_state_dict(model.state_dict())[key], value)


def test_stdout_without_a_character_gets_its_escape(monkeypatch):
    torch.save({"layer_層": torch.eye(3)}, "ä.pt")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert cli.main(["report", "ä.pt", "--no-sizes"]) == 0
    text = stdout.buffer.getvalue().decode("ascii")
    assert r"\xe4.pt: torch" in text
    assert r"layer_\u5c64  3x3" in text


def many(n: int) -> Report:
    rows = [Row(f"layers.{i}.weight", (4, 4), 16, 16 - i % 3, 1 / n, 4) for i in range(n)]
    return Report(tuple(rows), {f"{i * 7919 % n}.{i}": "excluded" for i in range(n)})


LINEAR: dict[str, tuple[Callable[[int], object], int]] = {
    "running numbers": (lambda n: grouped({f"{i // 100}.{i % 100}.weight": "excluded" for i in range(n)}), 1000),
    "other numbers": (lambda n: grouped({f"{i * 7919 % n}.weight": "excluded" for i in range(n)}), 1000),
    "a name of many numbers": (
        lambda n: grouped({"1." * n: "excluded", **dict.fromkeys(map(str, range(n)), "")}),
        2000,
    ),
    "a long number": (lambda n: grouped({"1" * n: "a", "1" * (n - 1) + "2": "a", "1" * (n - 1) + "3": "a"}), 25_000),
    "a report": (lambda n: str(many(n)), 500),
    "a page": (lambda n: reports.page(many(n)), 250),
}


@pytest.mark.parametrize("case", LINEAR)
def test_the_time_is_linear_in_the_names(case):
    function, n = LINEAR[case]
    assert is_linear(function, n)


@pytest.mark.parametrize("argv", [("report", "NAME.st"), ("compress", "NAME.pt", "out.st")])
def test_the_time_of_a_command_is_linear_in_the_tensors(argv):
    for n in (100, 800):
        state = {f"layers.{i}.weight": torch.eye(4) for i in range(n)}
        torch.save(state, f"{n}.pt")
        feather_param.save_sparse(state, f"{n}.st")
    assert is_linear(lambda n: command(*(word.replace("NAME", str(n)) for word in argv)), 100)


def test_a_forged_state_with_many_names_of_a_weight_is_refused_without_comparing_all(monkeypatch):
    """The prefix of the names is unknown, and each name could tell it."""
    model = nn.Linear(4, 4, bias=False)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    state = model.state_dict()
    (entry,) = (key for key in state if key.endswith("_extra_state"))
    numbers = state[entry].tolist()
    settings = json.loads(bytes(numbers[6 : 6 + numbers[5]]))
    settings["weights"] = {"w": [f"p{i}.other" for i in range(300)]}
    text = list(json.dumps(settings).encode())
    state[entry] = torch.tensor([*numbers[:5], len(text), *text])
    compared = []
    renamed = baked_state._renamed
    monkeypatch.setattr(baked_state, "_renamed", lambda names, *rest: compared.extend(names) or renamed(names, *rest))
    monkeypatch.setattr(baked_state, "_MOST_COMPARED", 10_000)
    with pytest.raises(ValueError, match="got a state without w"):
        feather_param.baked_state_dict(state)
    assert len(compared) < 12_000
