"""Controller.detach: undo `sparsify`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param


def test_detach_leaves_the_dense_weights_and_no_zeros():
    layer = nn.Linear(4, 4)
    before = {name: each.clone() for name, each in layer.state_dict().items()}
    controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
    controller.detach()
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == list(before)
    assert all(torch.equal(each, before[name]) for name, each in layer.state_dict().items())
    with pytest.raises(RuntimeError, match=r"expected detach\(\) before desparsify, got it after"):
        controller.detach()


def test_detach_stops_following_the_optimizer():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    keys = optimizer.state_dict().keys()
    controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=4, optimizer=optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.ones(1, 4)).sum().backward()
        optimizer.step()  # the second time without a warning, and with the state of the first
        if controller.step_count == 1 and type(layer) is not nn.Linear:
            controller.detach()
    assert controller.step_count == 1
    assert [int(each["step"]) for each in optimizer.state.values()] == [2, 2]
    assert optimizer.state_dict().keys() == keys


def test_detach_leaves_the_zeros_of_a_frozen_model():
    layer = nn.Linear(4, 4)
    controller = feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
    controller.freeze()
    controller.detach()
    assert int((layer.weight == 0).sum()) == 8
