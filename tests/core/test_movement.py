"""The warning for a training that does not change the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from tests.core.models import image_loss
from tests.network import net
from tests.training import train


def test_an_optimizer_without_the_dense_weights_gives_one_warning_after_ten_steps():
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=40)
    found = [m.weight for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    found += [m.bias for m in model.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    optimizer = torch.optim.SGD(found, lr=0.1)
    train(model, image_loss, controller, range(10), optimizer)
    with pytest.warns(
        UserWarning, match=r"none of the 3 prunable weights has changed in 10 steps: .*named_parameters\(\)"
    ):
        train(model, image_loss, controller, range(10, 11), optimizer)
    train(model, image_loss, controller, range(11, 31), optimizer)


@pytest.mark.parametrize("case", ["fused", ".data", "frozen weights", "one of the weights"])
def test_training_that_changes_a_weight_or_has_no_weight_to_change_gives_no_warning(case):
    model = net()
    if case == "frozen weights":
        for layer in (model[0], model[3], model[4]):
            layer.weight.requires_grad_(False)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=40)
    parameters = list(model[4].parameters()) if case == "one of the weights" else list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=case == "fused")
    if case == ".data":
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.register_step_post_hook(lambda *_: [p.data.sub_(p.grad, alpha=0.1) for p in parameters])
    train(model, image_loss, controller, range(25), optimizer)
