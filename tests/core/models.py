"""Models of several tests of the core, and short functions that sparsify, train and change them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import feather_param
from tests.training import dense_weights, zeros_in

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))  # inputs of `tests.network.net`


def image_loss(model: nn.Module, step: int) -> Tensor:
    """Return a loss of `tests.network.net` on random images, which depend on the step only."""
    return model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))).square().mean()


def linear_net(seed: int = 0, outputs: int = 4) -> nn.Sequential:
    """Return a network with prunable weights in layers 0 and 2, of 16 * 32 and 32 * `outputs` elements."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, outputs))


def weights_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the Linear and Conv weights that a forward pass uses."""
    kinds = (nn.Linear, nn.Conv2d)
    return {f"{name}.weight": module.weight for name, module in model.named_modules() if isinstance(module, kinds)}


def sparsify_at_once(model: nn.Module, rate: float = 0.5, **arguments) -> feather_param.Controller:
    """Sparsify a model with a schedule that begins at the final rate."""
    return feather_param.sparsify(model, final_rate=rate, total_steps=2, end_step=0, **arguments)


def train_on_noise(
    model: nn.Module, controller: feather_param.Controller, steps: int, after_step: Callable[[], object] = lambda: None
) -> None:
    """Make SGD steps on random inputs of 16 features, each followed by a step of the controller."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        controller.step()
        after_step()


def zeros_in_pass(model: nn.Module) -> int:
    """Make a forward pass of a model with 16 input features, and return the number of zeros in its weights."""
    model(torch.ones(3, 16))
    return zeros_in(model)


@torch.no_grad()
def scale_weights(model: nn.Module, factor: float) -> None:
    """Multiply the dense weights of a sparsified model in place."""
    for weight in dense_weights(model):
        weight.mul_(factor)


@torch.no_grad()
def average_parameters(average: nn.Module, model: nn.Module, fraction: float = 0.5) -> None:
    """Move the Parameters of a moving average a fraction of the distance to those of a model."""
    for parameter, target in zip(average.parameters(), model.parameters(), strict=True):
        parameter.lerp_(target, fraction)


class Doubled(nn.Module):
    """A parametrization of another library: the tensor is twice its Parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2
