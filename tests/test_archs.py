"""The networks have the published sizes, and are plain modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import archs

CASES = [
    (archs.resnet20, 1_096_196, 1_092_960),
    (archs.mobilenet_v1, 3_315_428, 3_287_488),
    (archs.densenet, 714_196, 703_920),
]
BUILDERS = [case[0] for case in CASES]


@pytest.mark.parametrize(("build", "total", "prunable"), CASES)
def test_parameter_counts(build: Callable[..., nn.Module], total: int, prunable: int) -> None:
    model = build()
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert sum(layer.weight.numel() for layer in layers) == prunable


def test_a_mobilenet_of_half_the_width_has_half_the_channels() -> None:
    model = archs.mobilenet_v1(num_classes=10, width=0.5)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    whole = [module for module in archs.mobilenet_v1().modules() if isinstance(module, nn.Conv2d)]
    assert [2 * layer.weight.shape[0] for layer in layers[:-1]] == [layer.weight.shape[0] for layer in whole]
    assert round(0.995 * sum(layer.weight.numel() for layer in layers)) == 808_704  # counted with the paper's code
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_a_mobilenet_without_channels_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"expected width \* 32 channels to be 1 or more, got width=0.01; take a larger"
    ):
        archs.mobilenet_v1(width=0.01)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(("classes", "shape"), [(100, (2, 3, 32, 32)), (10, (2, 1, 8, 8))])
def test_output_shape_and_gradients(build: Callable[..., nn.Module], classes: int, shape: tuple[int, ...]) -> None:
    model = build(num_classes=classes, in_channels=shape[1])
    logits = model(torch.randn(shape))
    assert logits.shape == (2, classes)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_convolutions_are_initialised_by_fan_out(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    for module in build().modules():
        if isinstance(module, nn.Conv2d):
            n = module.weight.numel()
            std = (2 / (module.out_channels * module.kernel_size[0] * module.kernel_size[1])) ** 0.5
            # The sample deviation of n normal numbers has a relative standard error of 1 / sqrt(2n); five are allowed.
            assert module.weight.std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5)
            assert module.bias is None or not module.bias.any()
