"""How changed weights are noticed: by the number of writes to a Parameter and by its identity."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from feather_param.core import registration, versions
from tests.core.models import linear_net, sparsify_at_once, zeros_in_pass


@pytest.mark.parametrize("call", [lambda model, _: model.eval(), lambda _, controller: controller.report()])
def test_a_replaced_parameter_gets_its_own_threshold(call):
    model = linear_net(outputs=16)
    controller = sparsify_at_once(model, 0.8)
    model[0].parametrizations.weight.original = nn.Parameter(0.2 * torch.randn(32, 16))
    call(model, controller)
    assert zeros_in_pass(model) == controller.report().zeros == 819


def test_a_write_to_the_parameter_of_an_earlier_parametrization_is_noticed():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, weight: Tensor) -> Tensor:
            return self.factor * weight

        def right_inverse(self, weight: Tensor) -> Tensor:
            return weight / self.factor

    model = linear_net(outputs=16)
    parametrize.register_parametrization(model[0], "weight", scaled := Scaled())
    controller = sparsify_at_once(model, 0.8)
    with torch.no_grad():
        scaled.factor.mul_(0.8)
    assert zeros_in_pass(model) == controller.report().zeros == 819


def test_a_pass_of_a_model_or_a_copy_counts_the_writes_to_each_weight_a_few_times(monkeypatch):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(60)))
    sparsify_at_once(model)
    calls = []

    def counting(tensors, writes_to=versions.writes_to):
        calls.append(1)
        return writes_to(tensors)

    for module in (registration, versions):
        monkeypatch.setattr(module, "writes_to", counting)
    counts = []
    for network in (model, copy.deepcopy(model)):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        for _ in range(2):
            calls.clear()
            network(torch.ones(1, 4))
            counts.append(len(calls))
    assert counts[1] == counts[3] <= 2 * 60  # the first layer's pass checks all weights, the others their own
    assert max(counts) <= 6 * 60  # of a pass that recomputes the thresholds


def test_a_parameter_with_the_id_of_a_deleted_one_is_another_parameter():
    """FSDP2 gathers weights into new tensors. A forward pass with such a tensor must not recompute the threshold."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    controller = sparsify_at_once(model)
    threshold = controller.threshold
    own = model[0].parametrizations.weight
    values, others, deleted = torch.ones(4, 4), [], id(own.original)
    del own.original
    while id(found := nn.Parameter(values)) != deleted:
        others.append(found)
        if len(others) > 10_000:
            pytest.skip("this allocator does not reuse addresses")
    own.register_parameter("original", found)
    with torch.no_grad():
        found.add_(1.0)
    model(torch.ones(1, 4))
    assert torch.equal(model[0].parametrizations.weight[0].threshold, threshold)
    assert not torch.equal(controller.threshold, threshold)


def test_a_conversion_may_swap_parameters():
    before = torch.__future__.get_swap_module_params_on_conversion()
    model = linear_net(outputs=16)
    controller = sparsify_at_once(model, 0.8)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double().float()  # torch refuses to swap a tensor that has a weak reference
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert zeros_in_pass(model) == controller.report().zeros == 819
