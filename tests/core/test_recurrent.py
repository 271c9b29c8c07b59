"""LSTM layers, which keep a list of their weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import feather_param
from tests.core.models import sparsify_at_once


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


ACTIONS = {
    "nothing": lambda model: None,
    "to": lambda model: model.to("cpu"),
    "double": lambda model: model.double().float(),
    "flatten_parameters": lambda model: model.rnn.flatten_parameters(),
    "to, then a pass": lambda model: model.to("cpu")(torch.randn(3, 1, 4)),
}


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
def test_an_lstm_can_be_copied_and_baked(act):
    model = Recurrent()
    controller = sparsify_at_once(model, include=["*.weight_[ih]h_l*", "*"])
    act(model)
    assert not any(weight is not None and weight.grad_fn for weight in model.rnn._flat_weights)  # no graph is kept
    x = torch.randn(3, 1, 4)
    output = model(x)
    copies = [copy.deepcopy(model), AveragedModel(model).module, copy.deepcopy(controller)._model]
    assert all(torch.equal(copied(x), output) for copied in copies)
    feather_param.desparsify(model)
    assert torch.equal(model(x), output)
    assert all(weight is not None for weight in model.rnn._flat_weights)
