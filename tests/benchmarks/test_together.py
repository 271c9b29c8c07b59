"""Networks that train at once have the results of networks that train one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import together
from benchmarks.cifar100_run import BATCH, Run, RunTraining
from benchmarks.cifar100_table import main
from benchmarks.methods import METHODS
from examples.data import load_data
from examples.images import ImageData, Split

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:nothing survives")
ONE_BY_ONE = [name for name in METHODS if not together.possible(Run("resnet20", 2, name, 0.5, 0, 1, None))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    """Return two batches of digits, so that no batch is smaller."""
    digits = load_data("digits", tmp_path_factory.mktemp("none"))
    return replace(digits, train=Split(digits.train.images[: 2 * BATCH], digits.train.labels[: 2 * BATCH]))


def weights_of(training: RunTraining) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])


@pytest.mark.parametrize("method", ["dense", *(name for name in METHODS if name not in ONE_BY_ONE)])
def test_a_network_among_others_trains_as_it_does_alone(method, data):
    run = Run("mobilenet_v1", 0.25, method, 0.0 if method == "dense" else 0.5, 0, 2, None)  # float32 on a CPU
    network, _ = together.train([run, replace(run, seed=1, method="soft", rate=0.5)], data, CPU)
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


def test_methods_that_need_the_host_are_known():
    assert ONE_BY_ONE == ["theta_falling", "theta_vanishing", "theta_late", "guard"]


def test_the_table_makes_its_runs_together(tmp_path, capsys):
    command = "--protocol=digits --methods feather guard --rates 0.9 --seeds=1 --epochs=1 --device=cpu --together=3"
    assert main([*command.split(), f"--results={tmp_path}"]) == 0
    found = sorted(path.name for path in (tmp_path / "digits_1_epochs").glob("*.json"))
    assert found == ["resnet20_dense_0.0_seed0.json", "resnet20_feather_0.9_seed0.json"]
    assert "left out 1 runs that need the host" in capsys.readouterr().err
