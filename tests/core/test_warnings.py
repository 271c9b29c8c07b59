"""Warnings about weights with no survivors."""

from __future__ import annotations

import pytest
import torch

import feather_param
from tests.core.models import linear_net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_clipped_to_one_magnitude_give_one_warning_and_are_reported_as_dead(dtype):
    model = linear_net().to(dtype)
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=8, end_step=6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(100).clamp_(-0.01, 0.01)

    def make_steps():
        for _ in range(4):
            controller.step()

    with pytest.warns(UserWarning, match=r"nothing survives in 0\.weight, 2\.weight.* equal the threshold") as caught:
        make_steps()
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="nothing survives"):
        report = controller.report()
    assert (report.survivors, report.dead) == (0, ("0.weight", "2.weight"))
    assert (model[0].weight == 0).all()
    assert f"ties: {report.rows[0].ties} elements of 0.weight equal the threshold and compute as zero" in str(report)
