"""Networks that train at once have the results of networks that train one by one."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks import cifar100_table, stopped, together
from benchmarks.cifar100_run import BATCH, Run, RunTraining
from benchmarks.cifar100_table import main
from benchmarks.methods import METHODS
from benchmarks.network import Network, possible
from benchmarks.together import Together
from examples.data import load_data
from examples.images import ImageData, Split

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:nothing survives")
ONE_BY_ONE = [name for name in METHODS if not possible(Run("resnet20", 2, name, 0.5, 0, 1, None))]
TOGETHER = ["dense", *(name for name in METHODS if name not in ONE_BY_ONE)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Return two batches of digits, so that no batch is smaller."""
    digits = load_data("digits", tmp_path_factory.mktemp("none"))
    return replace(digits, train=Split(digits.train.images[: 2 * BATCH], digits.train.labels[: 2 * BATCH]))


def a_run(method: str, network: str = "mobilenet_v1", epochs: int = 2) -> Run:
    """Return a run whose network computes in float32 on a CPU if it is a MobileNetV1."""
    return Run(network, 0.25 if network == "mobilenet_v1" else 2, method, 0.5 * (method != "dense"), 0, epochs, None)


def weights_of(training: RunTraining) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])


def trained(runs: list[Run], data: ImageData, backend: str | None = None) -> Together:
    group = Together(runs, data, CPU, backend=backend)
    group.advance(group.steps)
    group.finish()
    return group


@pytest.fixture(scope="module")
def group(data: ImageData) -> Together:
    """Return a network of each method, with two seeds, after their training."""
    return trained([replace(a_run(method), seed=i % 2) for i, method in enumerate(TOGETHER)], data)


@pytest.mark.parametrize("method", TOGETHER)
def test_a_network_among_others_trains_as_it_does_alone(method, group, data):
    network = group.networks[TOGETHER.index(method)]
    run = network.run
    alone = RunTraining(run, data, CPU, least=BATCH)
    while alone.step_count < len(alone.batches):
        alone.next_step()
    alone.finish()
    ours, expected = weights_of(network), weights_of(alone)
    # float32 arithmetic in another order rounds differently, by 2^-24 or 6e-8. A step with a learning rate of 0.1
    # through 28 new layers enlarges a difference up to a hundred times: 3e-5 after two steps, 3e-3 after four.
    assert (ours - expected).norm() <= 1e-2 * expected.norm()
    if alone.controller is not None:
        assert network.controller is not None
        assert network.controller.step_count == alone.controller.step_count
        assert network.controller.report().zeros == alone.controller.report().zeros


def test_all_networks_of_a_kind_use_one_compiled_graph_and_train_as_without_it(data):
    # one_shot fixes its masks after half of the steps
    runs = [a_run(method, "resnet20") for method in ("dense", "feather", "one_shot")]
    before = counters["stats"]["unique_graphs"]
    compiled = trained(runs, data, "aot_eager")
    assert counters["stats"]["unique_graphs"] == before + 1
    for ours, plain in zip(compiled.networks, trained(runs, data).networks, strict=True):
        assert torch.equal(weights_of(ours), weights_of(plain))
        for name, buffer in plain.model.named_buffers():
            assert torch.equal(ours.model.get_buffer(name), buffer)


def test_a_group_that_was_stopped_continues_to_the_same_result(data, tmp_path):
    # One threshold, one from scores, one for each weight, fixed masks, an average, and none.
    methods = ("feather", "lamp", "erk", "one_shot", "ema", "dense")
    runs = [replace(a_run(method, "resnet20", epochs=4), seed=i % 2) for i, method in enumerate(methods)]

    def results(folder: Path) -> list[dict[str, object]]:
        contents = [run.done(folder) for run in runs]
        return [{k: v for k, v in found.items() if k not in ("seconds", "machine")} for found in contents if found]

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert together.execute(runs, data, CPU, tmp_path / "whole")
    steps: list[int] = []
    for expected in ([12], [12, 12], [24, 12]):  # of six networks
        assert not together.execute(runs, data, CPU, tmp_path / "parts", advance=steps.append, stopped=lambda: True)
        assert steps == expected
        assert together.unfinished(tmp_path / "parts") == [runs]
        steps.clear()
    assert together.execute(runs, data, CPU, tmp_path / "parts")
    assert together.unfinished(tmp_path / "parts") == []
    assert len(results(tmp_path / "whole")) == 6
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_the_host_does_as_much_in_a_step_of_a_long_training_as_in_one_of_a_short_one(data):
    def calls(epochs: int) -> int:
        group = Together([a_run("late_freeze", "resnet20", epochs)], data, CPU)
        group._step = lambda: None  # that of the device
        count = 0

        def counted(frame, event, argument):
            nonlocal count
            count += 1

        sys.setprofile(counted)
        try:
            group.advance(1)
        finally:
            sys.setprofile(None)
        return count

    assert calls(200) == calls(2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of faster arithmetic on some GPUs
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_networks_in_a_cuda_graph_train_as_without_it_and_as_one_by_one(backend, data):
    device = torch.device("cuda")
    on_gpu = data.to(device)
    runs = [replace(a_run(method, "resnet20", epochs=6), width=8) for method in ("dense", "feather", "one_shot", "ema")]
    runs[1] = replace(runs[1], seed=1)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        groups = [Together(runs, on_gpu, device, backend=backend, captured=captured) for captured in (True, False)]
        for group in groups:  # three steps before a graph, three with it, and as many once one_shot has fixed its masks
            group.advance(group.steps)
            group.finish()
        for run, network, twin in zip(runs, groups[0].networks, groups[1].networks, strict=True):
            ours, expected = weights_of(network), weights_of(twin)
            assert (ours - expected).norm() == 0  # the same operations
            alone = RunTraining(run, on_gpu, device, least=BATCH)
            while alone.step_count < len(alone.batches):
                alone.next_step()
            alone.finish()
            # bfloat16 rounds by 2^-9. On a CPU, a training in float32 differs from one in bfloat16 by up to 8 % after
            # as many steps. So two orders of the roundings may differ by twice as much.
            assert (ours - weights_of(alone)).norm() <= 0.16 * expected.norm()
            if alone.controller is not None:
                assert network.controller is not None
                assert network.controller.report().zeros == alone.controller.report().zeros


def test_a_network_that_diverges_does_not_take_the_results_of_the_others(data, tmp_path, monkeypatch):
    runs = [a_run(method, "resnet20", epochs=1) for method in ("soft", "feather", "dense")]
    finish = Network.finish

    def diverge(network: Network) -> None:
        finish(network)
        if network.run == runs[0]:
            with torch.no_grad():
                network.parameters[0].fill_(torch.nan)

    monkeypatch.setattr(Network, "finish", diverge)
    with pytest.raises(ValueError, match="expected finite weights"):
        together.execute(runs, data, CPU, tmp_path)
    assert [run.done(tmp_path) is not None for run in runs] == [False, True, True]


def test_a_stopped_group_and_another_one_keep_their_checkpoints(data, tmp_path):
    groups = [[a_run("dense")], [a_run("soft")]]
    for group in groups:
        assert not together.execute(group, data, CPU, tmp_path, stopped=lambda: True)
    assert sorted(together.unfinished(tmp_path), key=str) == groups


def test_finished_runs_are_not_made_again(data, tmp_path):
    runs = [a_run("dense", epochs=1)]
    assert together.execute(runs, data, CPU, tmp_path)
    assert together.execute(runs, data, CPU, tmp_path, advance=pytest.fail)


def test_stopped_runs_are_evaluated_as_they_are(data, tmp_path, capsys):
    runs = [a_run("dense"), a_run("feather")]
    assert not together.execute(runs, data, CPU, tmp_path, stopped=lambda: True)
    dense, sparse = stopped.evaluate(tmp_path, data, CPU)
    group = Together(runs, data, CPU)
    group.advance(group.steps_per_epoch)
    for found, network in zip((dense, sparse), group.networks, strict=True):
        network.tell(group.step_count)
        assert (found["epochs"], found["accuracy"]) == (1, network.evaluate(network.model)[1])
    assert dense["zeros"] == 0
    assert sparse["zeros"] == group.networks[1].controller.report().zeros > 0
    assert together.unfinished(tmp_path) == [runs]
    assert stopped.main([str(tmp_path / "none"), "--dataset=digits"]) == 2
    assert "expected a checkpoint" in capsys.readouterr().err
    assert stopped.main([str(tmp_path), "--data-dir=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_runs_that_cannot_train_at_once_are_refused(data):
    run = a_run("feather")
    with pytest.raises(
        ValueError, match=r"expected runs with one number of epochs, got \[2, 3\]; train them in groups"
    ):
        Together([run, replace(run, epochs=3)], data, CPU)
    with pytest.raises(ValueError, match=r"expected runs with one number of epochs, got \[\]"):
        Together([], data, CPU)
    with pytest.raises(ValueError, match=r"need nothing from the host, got mobilenet_v1_guard_0\.5_seed0"):
        Together([run, replace(run, method="guard")], data, CPU)


def test_methods_that_need_the_host_are_known():
    assert ONE_BY_ONE == ["theta_falling", "theta_vanishing", "theta_late", "guard"]


COMMAND = "--protocol=digits --methods feather guard --rates 0.9 --seeds=1 --device=cpu --together=3"


def test_the_table_makes_its_runs_together_and_continues_them_after_ctrl_c(tmp_path, capsys, monkeypatch):
    command = [*COMMAND.split(), "--epochs=2", f"--results={tmp_path}"]
    update = cifar100_table.tqdm.update

    def interrupt(bar, n=1):
        os.kill(os.getpid(), signal.SIGINT)
        return update(bar, n)

    monkeypatch.setattr(cifar100_table.tqdm, "update", interrupt)
    assert main(command) == 130
    assert "the same command continues" in capsys.readouterr().err
    folder = tmp_path / "digits_2_epochs"
    assert [path.suffix for path in folder.iterdir()] == [".pt"]
    monkeypatch.setattr(cifar100_table.tqdm, "update", update)
    assert main(command) == 0
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["resnet20_dense_0.0_seed0.json", "resnet20_feather_0.9_seed0.json"]
    assert "left out 1 runs that need the host" in capsys.readouterr().err
