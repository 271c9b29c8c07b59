"""FeatherCallback beside the averaging callbacks of Lightning, before and after them in the list."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lightning", "2.6", reason="lightning 2.6 is missing; it needs feather_param[integrations]")

from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

import feather_param
from feather_param.integrations.lightning import FeatherCallback
from tests.integrations.lightning_case import QUIET, RATE, ZEROS, Digits, assert_same, batches, fit, quiet, zeros

pytestmark = [
    *(pytest.mark.filterwarnings(text) for text in QUIET),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading a checkpoint"),
]


def pair(average, order):
    """Return our callback and another one, in an order."""
    return [average, FeatherCallback(RATE)] if order == "after" else [FeatherCallback(RATE), average]


AVERAGES = {
    "mean": lambda: WeightAveraging(),
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema of parameters": lambda: EMAWeightAveraging(decay=0.9, use_buffers=False),
}


@pytest.mark.parametrize(
    ("kind", "order", "compiled"),
    [
        ("mean", "before", False),
        ("ema", "after", False),
        ("ema of parameters", "before", False),
        ("ema", "before", True),
    ],
)
def test_the_average_is_validated_saved_and_kept(tmp_path, kind, order, compiled):
    class Look(Digits):
        def on_validation_end(self):
            if self.trainer.state.fn == "fit":
                self.seen = feather_param.baked_state_dict(self)  # the weights are swapped back here
                self.loss = float(self.trainer.callback_metrics["loss"])

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, monitor="loss", save_last=True, filename="{epoch}-{loss:.9f}")
    module, trainer = Look(), quiet(tmp_path, *pair(AVERAGES[kind](), order), saver, num_sanity_val_steps=0)
    trainer.fit(torch.compile(module, backend="eager") if compiled else module, batches(), batches())
    assert zeros(module) == ZEROS
    saved = Digits.load_from_checkpoint(tmp_path / "last.ckpt")
    assert zeros(saved) == ZEROS
    (found,) = quiet(tmp_path).test(saved, batches(), verbose=False)
    assert found["loss"] == pytest.approx(module.loss, rel=1e-6)  # the validated network is the saved one
    assert any(not torch.equal(a, b) for a, b in zip(module.seen.values(), saved.state_dict().values(), strict=True))

    before = {name: each.clone() for name, each in module.state_dict().items()}
    trainer.validate(module, batches(), verbose=False)  # swaps
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    trainer.test(module, batches(), ckpt_path="best", verbose=False)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_training_with_an_average_resumes_bit_for_bit(tmp_path, order):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    full, _ = fit(tmp_path, *pair(EMAWeightAveraging(decay=0.9), order), saver)
    other = "before" if order == "after" else "after"
    for step in (6, 12):
        path = tmp_path / f"step={step}.ckpt"
        assert_same(full, fit(tmp_path, *pair(EMAWeightAveraging(decay=0.9), other), ckpt_path=path)[0])
        assert torch.load(path, weights_only=True)["state_dict"].keys() == full.state_dict().keys()


@pytest.mark.parametrize("order", ["before", "after"])
def test_the_average_of_stochastic_weight_averaging_is_sparse_and_resumes_bit_for_bit(tmp_path, order):
    def callbacks():
        return pair(StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2), order)

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    full, _ = fit(tmp_path, *callbacks(), saver)
    assert zeros(full) == ZEROS
    resumed, _ = fit(tmp_path, *callbacks(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(full, resumed)
