"""The benchmark of inference: its cases, its table, and what it does without a rival."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import inference, inference_networks, rivals, timing
from benchmarks.inference_networks import CASES, Case


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Keep the results in an empty folder, and let the only networks be small."""
    small = (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), inference_networks.images(64))
    monkeypatch.setitem(inference_networks.NETWORKS, "mlp", small)
    monkeypatch.setattr(inference, "CASES", [Case("mlp", 0.9, 1), Case("mlp", 0.9, 4)])
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    timing.set_commit("abc1234")
    yield tmp_path
    timing.set_commit("")
    torch.set_num_threads(1)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[str]]]:
    """Record the batch size, the threads and the methods of each measurement instead of measuring."""
    calls = []

    def measure(work: rivals.Work, methods: list[str], n: int, say: object) -> dict[str, Any]:
        calls.append((len(work.x), work.threads, list(methods)))
        return result(dict.fromkeys(methods, 0.001))

    monkeypatch.setattr(inference, "measure", measure)
    return calls


def result(seconds: dict[str, float], **changes: Any) -> dict[str, Any]:
    """Return figures of a network as `measure` does, for methods whose times do not vary."""
    times = {method: value / seconds["ours"] for method, value in seconds.items()}
    return {"seconds": seconds, "shortest seconds": seconds, "times of ours": times, "failed": {}, **changes}


def names(*words: str) -> list[str]:
    return list(inference.selected(inference.parse(words)))


def test_all_cases_are_the_default():
    assert names() == [str(case) for case in CASES]


def test_networks_rates_and_batch_sizes_select_cases():
    assert names("--networks", "resnet50", "--rates", "0.95", "0.99", "--batch", "1") == [
        "resnet50, 95%, batch 1",
        "resnet50, 99%, batch 1",
    ]


def test_a_selection_without_cases_is_refused(capsys):
    with pytest.raises(SystemExit):
        inference.parse(["--networks", "bert", "--rates", "0.5"])
    assert "expected a case of these networks" in capsys.readouterr().err


def test_checkpoints_are_measured_instead_of_the_networks():
    assert names("--checkpoint", "a.pt", "--size", "8", "32", "--batch", "1", "128") == [
        "resnet20 of a.pt, 8 px, batch 1",
        "resnet20 of a.pt, 8 px, batch 128",
        "resnet20 of a.pt, 32 px, batch 1",
        "resnet20 of a.pt, 32 px, batch 128",
    ]


def test_a_network_has_the_same_rate_in_each_layer_and_activations_that_do_not_vanish():
    model, x = inference_networks.pruned(Case("resnet20", 0.95, 2))
    layers = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    for weight in layers:  # each is a whole number of zeros
        assert float((weight == 0).float().mean()) == pytest.approx(0.95, abs=1 / weight.numel())
    assert inference_networks.rate_of(model) == pytest.approx(0.95, abs=1e-4)
    with torch.inference_mode():
        assert model(x).std() > 1e-3


def test_the_table_names_the_best_other_method_and_what_is_missing_or_failed():
    seconds = {"dense": 0.008, "ONNX Runtime": 0.006, "DeepSparse": 0.002, "ours": 0.004}
    figures = {
        "bert": result(seconds),
        "mlp": result({"ours": 0.001, "dense": 0.003}, failed={"DeepSparse": "crashed"}),
    }
    methods = ["dense", "ONNX Runtime", "OpenVINO", "DeepSparse", "ours"]
    text = inference.table(figures, methods, {"OpenVINO": "not installed"})
    assert "| bert | 8.00 / 8.00 | 6.00 / 6.00 | - | 2.00 / 2.00 | 4.00 / 4.00 | 0.50 (DeepSparse) | 1.50 |" in text
    assert "| mlp | 3.00 / 3.00 | - | - | - | 1.00 / 1.00 | 3.00 (dense) | - |" in text
    assert "OpenVINO is missing: not installed" in text
    assert "DeepSparse failed on mlp: crashed" in text


def test_without_rivals_dense_and_ours_are_measured_on_each_number_of_threads(results, measured):
    inference.main(["--threads", "1", "2", "--batch", "4"])
    assert measured == [(4, 1, ["dense", "ours"]), (4, 2, ["dense", "ours"])]
    written = json.loads((results / "inference.json").read_text(encoding="utf-8"))
    assert list(written["figures"]) == ["mlp, 90%, batch 4, 1 thread", "mlp, 90%, batch 4, 2 threads"]
    assert written["machine"]["threads"] == [1, 2]


def test_a_case_with_a_result_is_measured_again_only_on_demand_or_at_another_commit(results, measured, capsys):
    inference.main(["--batch", "1"])
    inference.main([])
    assert [batch for batch, _, _ in measured] == [1, 4]
    assert "mlp, 90%, batch 1, 1 thread | 1.00 / 1.00" in capsys.readouterr().out
    inference.main(["--batch", "4", "--again"])
    timing.set_commit("def5678")
    inference.main(["--batch", "4"])
    assert [batch for batch, _, _ in measured] == [1, 4, 4, 4]


def test_a_case_is_measured_again_when_a_rival_was_installed(results, measured, monkeypatch):
    lacking = dict.fromkeys(["compiled", "ONNX Runtime", "OpenVINO", "DeepSparse"], "not installed")
    monkeypatch.setattr(inference, "absent", lambda python: dict(lacking))
    inference.main(["--rivals", "--batch", "1"])
    del lacking["OpenVINO"]
    inference.main(["--rivals", "--batch", "1"])
    assert [methods for _, _, methods in measured] == [["dense", "ours"], ["dense", "OpenVINO", "ours"]]


def test_a_missing_rival_is_named_with_its_reason(results, measured, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setitem(rivals.PACKAGES, "OpenVINO", "no_such_package")
    inference.main(["--rivals", "--batch", "1", "--deepsparse", "no-such-python"])
    out = capsys.readouterr().out
    assert "compiled is missing: torch.compile needs a C++ compiler, and there is no no-such-compiler" in out
    assert "OpenVINO is missing: not installed: pip install no_such_package" in out
    assert "DeepSparse is missing: no-such-python: No such file or directory" in out
    assert (results / "inference_rivals.json").exists()


def test_an_environment_without_deepsparse_is_named():
    assert rivals.absent(sys.executable)["DeepSparse"] == "ModuleNotFoundError: No module named 'deepsparse'"
    assert rivals.absent("")["DeepSparse"] == "--deepsparse does not give the Python of its environment"


def test_a_method_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    def fail(work: rivals.Work) -> rivals.Running:
        raise RuntimeError("cannot read it\nat line 1")

    monkeypatch.setitem(rivals.METHODS, "OpenVINO", fail)
    work = rivals.Work(nn.Linear(8, 8).eval(), torch.ones(1, 8), 1, tmp_path)
    row = inference.measure(work, ["dense", "OpenVINO"], 2, print)
    assert row["failed"] == {"OpenVINO": "RuntimeError: cannot read it"}
    assert list(row["seconds"]) == ["dense"]
    assert row["largest difference over largest output"] == {"dense": 0.0}


def test_a_worker_that_dies_says_why(tmp_path):
    work = rivals.Work(nn.Linear(8, 8).eval(), torch.ones(1, 8), 1, tmp_path, sys.executable)
    with pytest.raises(RuntimeError, match="ended with code 1: ModuleNotFoundError: No module named 'deepsparse'"):
        rivals.deepsparse(work)


def test_a_call_may_measure_itself():
    seconds = timing.rounds({"here": lambda: 7.0, "elsewhere": lambda: timing.Elapsed(7.0)}, 2)
    assert seconds["elsewhere"] == [7.0, 7.0]
    assert max(seconds["here"]) < 7.0


def test_untimed_calls_come_right_before_each_timed_one():
    calls = []
    timing.rounds({name: lambda name=name: calls.append(name) for name in "ab"}, 1, warmup=1, untimed=1)
    assert calls == [*"aabb"] * 2


def test_the_distance_of_the_quartiles_is_relative_to_the_median():
    assert timing.spreads({"a": [1.0, 2.0, 3.0, 4.0, 5.0]}) == {"a": pytest.approx(2 / 3)}
