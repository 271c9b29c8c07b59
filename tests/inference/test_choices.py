"""The choices of a conversion are stored beside the weights, and spare the timing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import feather_param
from feather_param import to_sparse_inference
from feather_param.files.sparse import write_sparse
from feather_param.inference import choices as choices_module
from feather_param.inference import convert, load_choices, timing
from feather_param.inference.choices import Choices
from feather_param.inference.fusing import tracing
from feather_param.inference.layers import SparseLayer
from tests.inference.pruned import X, network, pruned

KEY = "feather_param inference"
GOOD = {"machine": "m", "threads": 1, "network": "sparse", "sparse": ["0"], "untraced": ""}


def test_choices_survive_a_file(tmp_path, clock):
    model = network()
    _, report = to_sparse_inference(model, X)
    path = tmp_path / "model.safetensors"
    feather_param.save_sparse(model, path, choices=report.choices)
    assert load_choices(path) == report.choices
    assert load_choices(str(path)) == report.choices
    model.load_state_dict(feather_param.load_sparse(path))


def test_a_file_without_choices_has_none(tmp_path):
    path = tmp_path / "model.safetensors"
    feather_param.save_sparse(network(), path)
    assert load_choices(path) is None
    save_file({"w": torch.zeros(2)}, path)
    assert load_choices(path) is None


def test_choices_of_another_type_are_refused(tmp_path):
    with pytest.raises(TypeError, match="expected choices of an inference report, got dict"):
        feather_param.save_sparse(network(), tmp_path / "x", choices={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected choices of a report or of load_choices, got str"):
        to_sparse_inference(network(), X, choices="sparse")  # type: ignore[arg-type]


def refuse(*_, **__):
    raise AssertionError("nothing may be timed or compared")


@pytest.mark.parametrize(
    "times", [{}, {"sparse": 0.99}, {"sparse": 0.99, "fused": 1.0}], ids=["sparse", "fused", "dense"]
)
def test_given_choices_spare_timing_and_comparing_and_give_the_same_bits(times, clock, monkeypatch):
    clock.update({"dense": 1.0, "fused": 0.94, "sparse": 0.5, **times})
    model = network()
    fast, first = to_sparse_inference(model, X)
    for module, name in ((timing, "seconds_of"), (timing, "run_trials"), (tracing, "_require_equal")):
        monkeypatch.setattr(module, name, refuse)
    again, second = to_sparse_inference(model, X, choices=first.choices)
    assert torch.equal(again(X), fast(X))
    assert [type(layer) for layer in again.modules()][1:] == [type(layer) for layer in fast.modules()][1:]
    assert second.choices == first.choices
    assert second.swapped == first.swapped
    assert second.sparse_mb == first.sparse_mb
    assert (second.dense_ms, second.sparse_ms) == (None, None)
    assert [(row.dense_ms, row.sparse_ms) for row in second.rows] == [(None, None)] * 2
    reason = "" if first.swapped else "by the given choices"
    assert [row.reason for row in second.rows] == [reason] * 2


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = pruned(nn.Linear(6, 6))
        self.eval()

    def forward(self, x):
        return self.a(x) * len(x)


def test_choices_of_a_model_that_could_not_be_fused_do_not_fuse_it(clock, monkeypatch):
    """Without comparing outputs, a wrong graph would be taken for a right one."""
    model, x = Untraceable(), torch.randn(2, 6)
    fast, first = to_sparse_inference(model, x)
    assert first.choices.untraced.startswith("it cannot be traced: 'len' is not supported")
    monkeypatch.setattr(convert, "fused", refuse)
    again, second = to_sparse_inference(model, x, choices=first.choices)
    assert second.notes == first.notes == (f"not fused: {first.choices.untraced}",)
    assert second.swapped == ("a",)
    assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize("what", ["machine", "threads", "torch"])
def test_choices_for_another_machine_are_ignored(what, clock, monkeypatch):
    _, report = to_sparse_inference(network(), X)
    assert report.choices.hold_here
    if what == "machine":
        monkeypatch.setattr("llvmlite.binding.get_host_cpu_name", lambda: "other")
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert not report.choices.hold_here
    clock["sparse"] = 0.99
    _, again = to_sparse_inference(network(), X, choices=report.choices)
    note = f"timed again: the choices are for {report.choices.machine}, {report.choices.threads} threads"
    assert again.notes == (note,)
    assert again.dense_ms == 1000.0
    assert again.choices.hold_here
    assert again.choices.network == "fused"


def test_the_machine_is_the_processor_and_the_version_of_torch():
    assert choices_module.machine().endswith(f", torch {torch.__version__}")


def test_unknown_layers_are_refused(clock):
    _, report = to_sparse_inference(network(), X)
    here = report.choices
    for names in (("0", "9"), ("2",), ("",), ("a\x1b[2J",)):
        bad = Choices(here.machine, here.threads, "sparse", names)
        with pytest.raises(ValueError, match="expected choices for this model, got choices that name") as caught:
            to_sparse_inference(network(), X, choices=bad)
        assert str(caught.value).isprintable()


def test_choices_of_a_layer_that_cannot_be_sparse_are_refused(clock):
    _, report = to_sparse_inference(network(), X)
    model = network()
    model.get_submodule(report.choices.sparse[0]).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="which it lacks or which cannot be sparse"):
        to_sparse_inference(model, X, choices=report.choices)


DAMAGED = {
    "no json": "{",
    "empty": "",
    "a list": "[]",
    "a number": "7",
    "null": "null",
    "no keys": "{}",
    "a key too few": json.dumps({k: v for k, v in GOOD.items() if k != "threads"}),
    "a key too many": json.dumps({**GOOD, "more": 1}),
    "a key twice": json.dumps(GOOD)[:-1] + ', "threads": 2}',
    "nested": "[" * 10**6,
    "nested names": json.dumps({**GOOD, "sparse": [[["0"]]]}),
    "deeply nested names": json.dumps(GOOD).replace('["0"]', "[" * 10**5 + "]" * 10**5),
    "a long number": json.dumps(GOOD).replace("1", "1" * 10**6),
    "a float": json.dumps({**GOOD, "threads": 1.0}),
    "a bool": json.dumps({**GOOD, "threads": True}),
    "a null": json.dumps({**GOOD, "machine": None}),
    "a name that is a number": json.dumps({**GOOD, "sparse": [0]}),
    "names in a string": json.dumps({**GOOD, "sparse": "0"}),
    "another network": json.dumps({**GOOD, "network": "\x1b[31mfaster\n"}),
    "sparse layers of a dense network": json.dumps({**GOOD, "network": "dense"}),
    "a long text": "x" * 10**6,
    "control characters": "\x1b[2J\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_choices_are_one_error(name, tmp_path):
    path = tmp_path / "model\x1b.safetensors"
    write_sparse({"w": torch.zeros(2)}, path, metadata={KEY: DAMAGED[name]})
    with pytest.raises(ValueError, match=r"^expected choices of save_sparse, got damaged ones in ") as caught:
        load_choices(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 2000
    assert message.endswith("; convert without them")


def test_names_in_a_file_are_shown_as_printable_text(tmp_path):
    path = tmp_path / "model.safetensors"
    untraced, machine = "no\x1b[2Jreason\n", "m\x1b[31m\u202e"
    write_sparse({}, path, metadata=Choices(machine, 1, "sparse", ("a\n\x07",), untraced).metadata)
    found = load_choices(path)
    assert found is not None
    assert found.sparse == ("a\n\x07",)
    _, report = to_sparse_inference(pruned(nn.Linear(6, 6)), torch.zeros(1, 6), choices=found)
    assert all(line.isprintable() for line in str(report).splitlines())
    here = Choices(choices_module.machine(), torch.get_num_threads(), "dense", (), untraced)
    _, report = to_sparse_inference(pruned(nn.Linear(6, 6)), torch.zeros(1, 6), choices=here)
    assert all(line.isprintable() for line in str(report).splitlines())


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"], ids=["empty", "text", "huge header"])
def test_files_of_other_kinds_are_refused(content, tmp_path):
    path = tmp_path / "model\n.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^expected a safetensors file, got .*, which is damaged or another one"
    ) as caught:
        load_choices(path)
    assert str(caught.value).isprintable()


def test_paths_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_choices(tmp_path / "missing")
    for path in (7, None, b"model"):
        with pytest.raises(TypeError, match="expected a path, got"):
            load_choices(path)  # type: ignore[arg-type]


def test_a_layer_that_the_first_conversion_left_dense_stays_dense(clock):
    _, report = to_sparse_inference(network(), X)
    some = Choices(report.choices.machine, report.choices.threads, "sparse", ("4",))
    fast, again = to_sparse_inference(network(), X, choices=some)
    assert [name for name, module in fast.named_modules() if isinstance(module, SparseLayer)] == ["4"]
    assert [(row.method, row.reason) for row in again.rows] == [("dense", "by the given choices"), ("sparse", "")]
