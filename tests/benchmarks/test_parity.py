"""The paper's code beside the library."""

from __future__ import annotations

import pytest
import torch

import feather_param
from benchmarks import parity
from benchmarks.cifar100_run import Run, RunTraining, build
from benchmarks.papers_code import papers_threshold
from benchmarks.together import Together
from examples.data import load_data

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:nothing survives")


def test_the_threshold_of_the_papers_code_is_interpolated():
    weights = [torch.tensor([3.0, -1.0]), torch.tensor([[0.0, -4.0]])]
    assert papers_threshold(weights, 0.5) == 2.0
    assert papers_threshold(weights, 0.0) == 0.0
    assert papers_threshold(weights, 1.0) == 4.0


@pytest.mark.parametrize("rate", [0.5, 0.98])
def test_the_papers_code_trains_the_same_network(rate, tmp_path):
    run = Run("mobilenet_v1", 0.25, "feather", rate, 0, 1, 256)
    data = load_data("digits", tmp_path, 256)
    papers, ours = parity.PapersTraining(run, data, CPU), RunTraining(run, data, CPU)
    for training in (papers, ours):
        while training.step_count < len(training.batches):
            training.next_step()
    weights = [torch.cat([p.detach().flatten() for p in training.model.parameters()]) for training in (papers, ours)]
    # Their thresholds differ by the interpolation, so one weight may be pruned by one of them only, and float32 rounds
    # differently. Two steps with a learning rate of 0.1 enlarge that.
    assert (weights[0] - weights[1]).norm() <= 1e-2 * weights[1].norm()
    assert ours.controller is not None
    assert abs(papers.papers.zeros() - ours.controller.report().zeros) <= 1


def test_the_default_initialisation_is_that_of_torch(tmp_path):
    run = Run("mobilenet_v1", 0.25, "feather", 0.5, 0, 1, 256)
    model = parity.DefaultInit(run, load_data("digits", tmp_path, 256), CPU).model
    weight = model.layers[0].depthwise.parametrizations.weight.original
    # Uniform with a variance of 1 / (3 * fan-in) for a fan-in of 9. That of `archs` is 2 / fan-out, normal.
    assert weight.abs().max() <= 1 / 3
    assert weight.std() > 0.1


def test_only_missing_runs_are_made_and_the_table_has_them_all(tmp_path, monkeypatch, capsys):
    trained = []

    def train(code, runs, data, device):
        for run in runs:
            trained.append((code, run.seed, run.rate))
            yield run, {"accuracy": 0.5 + run.seed / 100}

    monkeypatch.setattr(parity, "train", train)
    monkeypatch.setattr(parity, "load_data", lambda *_: load_data("digits", tmp_path))
    command = ["--results", str(tmp_path), "--codes", "papers", "--seeds"]
    assert parity.main([*command, "1"]) == 0
    assert trained == [("papers", 0, rate) for rate in parity.RATES]
    capsys.readouterr()
    assert parity.main([*command, "2"]) == 0
    assert len(trained) == 6
    out = capsys.readouterr().out
    assert "| the paper's code | 50.5 ± 0.7 (n = 2) | 50.5 ± 0.7 (n = 2) | 50.5 ± 0.7 (n = 2) |" in out
    assert "| feather_param | not run | not run | not run |" in out


@pytest.mark.parametrize("code", parity.CODES)
def test_each_code_trains_all_its_runs(code, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "Together", lambda *arguments, backend: Together(*arguments))
    runs = [Run("mobilenet_v1", 0.25, "feather", rate, 0, 1, 256) for rate in (0.5, 0.98)]
    found = list(parity.train(code, runs, load_data("digits", tmp_path, 256), CPU))
    assert [run for run, _ in found] == runs
    for run, result in found:
        total = sum(row.total for row in feather_param.plan(build(run, 10, 1), final_rate=0.5).rows)
        assert abs(result["zeros"] - round(run.rate * total)) <= (code == "papers")


def test_missing_data_are_reported_in_one_sentence(tmp_path, monkeypatch, capsys):
    import torchvision

    def no_network(*args: object, **keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    assert parity.main(["--results", str(tmp_path), "--data-dir", str(tmp_path / "none")]) == 2
    assert "parity: error: expected CIFAR100 in" in capsys.readouterr().err
