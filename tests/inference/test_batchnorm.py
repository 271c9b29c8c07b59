"""`recalibrate_batchnorm` recomputes the statistics and changes nothing else."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import feather_param
from feather_param.inference import recalibrate_batchnorm

EPS = torch.finfo(torch.float32).eps


def net(norm: type[nn.Module] = nn.BatchNorm2d, **options) -> nn.Sequential:
    """Return a model with dropout, different modes and two momenta."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        norm(4, **options),
        nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(4, 4, 3), norm(4, momentum=0.3, **options)),
    )
    model[3].eval()
    return model


def batches(count: int = 5, size: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [1 + 2 * torch.randn(size, 2, 6, 6, generator=generator) for _ in range(count)]


def snapshot(model: nn.Module) -> tuple:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momenta = [module.momentum for module in model.modules() if hasattr(module, "momentum")]
    return state, [module.training for module in model.modules()], momenta


def equal(a: tuple, b: tuple, *, but: str = "nothing") -> bool:
    """Return whether two snapshots are equal, except for entries with ``but`` in their names."""
    names = [name for name in a[0] if but not in name]
    return a[0].keys() == b[0].keys() and a[1:] == b[1:] and all(torch.equal(a[0][n], b[0][n]) for n in names)


# Results


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_layer_equals_a_slow_twin(dims):
    torch.manual_seed(0)
    layer = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](3)
    layer.running_mean.fill_(100.0)  # the old statistics do not count
    loader = [torch.randn(size, 3, *[2] * (dims if dims > 1 else 0)) for size in (4, 7, 2)]
    recalibrate_batchnorm(layer, loader)
    for channel in range(3):
        values = [batch.transpose(0, 1)[channel].flatten().double().tolist() for batch in loader]
        mean = statistics.fmean(statistics.fmean(batch) for batch in values)
        variance = statistics.fmean(statistics.variance(batch) for batch in values)
        # One rounding for each of 56 terms of at most 4 (squared: 16), and three for each of three updates.
        assert layer.running_mean[channel].item() == pytest.approx(mean, abs=65 * EPS * 4)
        assert layer.running_var[channel].item() == pytest.approx(variance, abs=65 * EPS * 16)
    assert layer.num_batches_tracked == 3


def test_the_model_runs_without_dropout():
    model = net()
    twin = copy.deepcopy(model)
    recalibrate_batchnorm(model, batches())
    seen = [twin[3][0](F.batch_norm(twin[0](x), None, None, training=True)) for x in batches()]
    mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in seen]).mean(dim=0)
    variance = torch.stack([y.var(dim=(0, 2, 3)) for y in seen]).mean(dim=0)
    torch.testing.assert_close(model[3][1].running_mean, mean)
    torch.testing.assert_close(model[3][1].running_var, variance)


def test_a_second_time_changes_nothing_but_rounding():
    model = net()
    recalibrate_batchnorm(model, batches())
    before = snapshot(model)
    recalibrate_batchnorm(model, iter(batches()))  # an iterator works too
    assert equal(before, snapshot(model))  # on a CPU not even rounding
    recalibrate_batchnorm(model, reversed(batches()))
    after = model.state_dict()
    for name, old in before[0].items():  # another order of five batches: a few roundings of numbers below 8
        assert torch.allclose(after[name].double(), old.double(), rtol=0.0, atol=10 * 8 * EPS), name


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_synchronised_layers_give_the_same_result(norm):
    model, other = net(norm), net()
    recalibrate_batchnorm(model, batches())
    recalibrate_batchnorm(other, batches())
    assert equal(snapshot(model), snapshot(other))


@pytest.mark.parametrize("wrap", [list, tuple], ids=["list", "tuple"])
def test_the_first_element_of_a_batch_is_the_input(wrap):
    model, other = net(), net()
    recalibrate_batchnorm(model, batches())
    recalibrate_batchnorm(other, [wrap((x, torch.zeros(6))) for x in batches()])
    assert equal(snapshot(model), snapshot(other))


def test_inputs_are_moved_to_the_device_of_the_model():
    class OnMeta(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))
            self.norm = nn.BatchNorm1d(2)
            self.seen: list[torch.device] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.device)
            return self.norm(torch.ones(3, 2))

    model = OnMeta()
    recalibrate_batchnorm(model, [torch.ones(3, 2)])
    assert model.seen == [torch.device("meta")]


# What stays the same


def test_parameters_modes_momenta_and_gradients_stay():
    model = net()
    model(batches()[0]).sum().backward()
    before = snapshot(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    recalibrate_batchnorm(model, batches())
    assert equal(before, snapshot(model), but="1.")  # the norms are the modules 1 and 3.1
    assert all(torch.equal(model.state_dict()[name], before[0][name]) for name in ("1.weight", "1.bias", "3.1.weight"))
    assert not torch.equal(model[1].running_mean, before[0]["1.running_mean"])
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # no random numbers were used


def test_a_layer_that_is_not_called_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.unused.running_mean.fill_(7.0)
            self.unused.num_batches_tracked.fill_(3)
            self.untracked = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.untracked(self.used(x))

    model = Unused()
    recalibrate_batchnorm(model, [torch.randn(4, 2)])
    assert model.unused.running_mean.tolist() == [7.0, 7.0]
    assert model.unused.num_batches_tracked == 3
    assert model.used.num_batches_tracked == 1


def test_a_sparsified_model_gives_the_statistics_of_its_baked_one():
    model, twin = net(), net()
    for each in (model, twin):
        controller = feather_param.sparsify(each, final_rate=0.8, total_steps=1)
        controller.step()
    before = controller.state_dict()
    feather_param.desparsify(twin)
    recalibrate_batchnorm(model, batches())
    recalibrate_batchnorm(twin, batches())
    assert controller.state_dict() == before
    feather_param.desparsify(model)
    for name, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


# Refusals, after which the model is unchanged


def failing(after: int, error: BaseException):
    yield from batches(after)
    raise error


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (list, ValueError, "expected a loader with at least one batch, got none"),
        (lambda: [{"image": torch.ones(2)}], TypeError, r"got dict; pick the model's input yourself"),
        (lambda: [[]], TypeError, "tuples or lists that begin with one, got list"),
        (lambda: [*batches(2), ("label", 1)], TypeError, "got tuple"),
        (lambda: [*batches(2), torch.full((2, 2, 6, 6), torch.nan)], ValueError, "got NaN or infinity in 1;"),
        (lambda: [*batches(2), torch.ones(2, 3, 6, 6)], RuntimeError, "channels"),  # raised by torch
        (lambda: failing(2, OSError("disk")), OSError, "disk"),
        (lambda: failing(2, KeyboardInterrupt("stop")), KeyboardInterrupt, "stop"),
        (lambda: 3, TypeError, "expected a loader of batches, an iterable, got int"),
        (lambda: batches()[0], TypeError, r"an iterable, got Tensor; wrap it in a list: \[x\]"),
    ],
    ids=["empty", "dict", "empty_list", "no_tensor", "nan", "shape", "loader", "interrupt", "number", "tensor"],
)
def test_an_error_leaves_the_model_as_it_was(loader, error, message):
    model = net()
    model(batches()[0])
    before = snapshot(model)
    with pytest.raises(error, match=message):
        recalibrate_batchnorm(model, loader())
    assert equal(before, snapshot(model))


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.LayerNorm(2), nn.InstanceNorm1d(2, track_running_stats=True), net(track_running_stats=False)],
    ids=["linear", "layer_norm", "instance_norm", "no_statistics"],
)
def test_a_model_without_statistics_is_refused(model):
    with pytest.raises(ValueError, match=f"keep running statistics, got {type(model).__name__} without"):
        recalibrate_batchnorm(model, batches())


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, got list"):
        recalibrate_batchnorm([nn.BatchNorm1d(2)], batches())


# Its use


def trained_on_digits() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Return a small network trained on scikit-learn's digits, its training batches, and a test set of 360."""
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, test = order[360:], order[:360]
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 10)),
    )
    loader = [(x[part], y[part]) for part in train.split(128)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model, loader, (x[test], y[test])


def test_loss_and_accuracy_improve_after_pruning_in_one_step():
    model, loader, (x, y) = trained_on_digits()
    feather_param.sparsify(model, final_rate=0.9, total_steps=1).step()
    feather_param.desparsify(model)
    model.eval()

    def test() -> tuple[float, float]:
        with torch.no_grad():
            scores = model(x)
        return F.cross_entropy(scores, y).item(), (scores.argmax(dim=1) == y).float().mean().item()

    loss, accuracy = test()
    recalibrate_batchnorm(model, loader)
    better_loss, better_accuracy = test()
    assert better_loss < loss
    assert better_accuracy > accuracy
