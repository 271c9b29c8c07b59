"""The library reproduces the numbers of the paper's own code; see golden/README.md."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feather_param
from feather_param.parametrizations import feather_threshold
from tests import twins

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("t", ["0.0", "0.01", "0.05", "0.12"])
@pytest.mark.parametrize("theta", ["1.0", "0.5"])
def test_the_operator_and_its_gradient_equal_the_papers(t, theta):
    data = np.load(GOLDEN / "operator.npz")
    weight = torch.tensor(data["w"], requires_grad=True)
    out = feather_threshold(weight, torch.tensor(float(t)), float(theta), 3.0)
    out.backward(torch.tensor(data["g"]))
    # The paper's code takes the cube root of a difference of cubes, whose error is about 4 eps w^3 (eps = 2^-24). The
    # error of the root P is 4 eps w^3 / (3 P^2), plus the rounding of both results.
    w, golden = weight.detach().double().abs(), torch.tensor(data[f"out/{t}/{theta}"]).double()
    bound = 4 * 2.0**-24 * w**3 / golden.abs().clamp(min=1e-30) ** 2 + 4 * 2.0**-24 * w
    assert ((out.detach().double() - golden).abs() <= bound)[golden != 0].all()
    assert torch.equal(out == 0, golden == 0)
    assert torch.equal(weight.grad, torch.tensor(data[f"grad/{t}/{theta}"]))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize("i", range(3))
def test_a_training_has_the_rates_losses_and_zeros_of_the_papers(i):
    data = np.load(GOLDEN / f"trajectory_{i}.npz")
    cfg = json.loads(str(data["cfg"]))
    model = network()
    model.load_state_dict({key[5:]: torch.tensor(data[key]) for key in data.files if key.startswith("init/")})
    optimizer = torch.optim.SGD(
        model.parameters(), lr=cfg["lr"], momentum=cfg["momentum"], weight_decay=cfg["weight_decay"]
    )
    batches = cfg["batches_per_epoch"]
    controller = feather_param.sparsify(
        model,
        final_rate=cfg["final_rate"],
        total_steps=cfg["epochs"] * batches,
        start_step=cfg["start_epoch"] * batches,
        min_params=cfg["min_params"],
    )
    total = controller.report().total
    losses, rates = [], []
    for step in range(cfg["epochs"] * batches):
        rates.append(controller.rate)
        x, y = torch.tensor(data["X"][step % batches]), torch.tensor(data["Y"][step % batches])
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg["clip"])
        optimizer.step()
        controller.step()
        losses.append(loss.item())
    # The paper's code computes f - f (1 - x)^3, ours f (1 - (1 - x)^3). They differ by two roundings.
    assert np.abs(np.array(rates) - data["rates"]).max() <= 2 * 2.0**-53
    assert [round(rate * total) for rate in rates] == [round(rate * total) for rate in data["rates"]]
    assert np.abs(np.array(losses) - data["losses"])[:20].max() < 5e-3
    feather_param.desparsify(model)
    final = {key[6:]: data[key] for key in data.files if key.startswith("final/")}
    assert list(final) == list(model.state_dict())
    pruned = [
        name for name, value in model.state_dict().items() if value.dim() > 1 and value.numel() >= cfg["min_params"]
    ]
    ours = twins.count_zeros(model.state_dict()[name] for name in pruned)
    assert ours == sum(int((final[name] == 0).sum()) for name in pruned)
    assert ours == round(cfg["final_rate"] * total)
