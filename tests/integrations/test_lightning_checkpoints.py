"""Checkpoints of Lightning with FeatherCallback: plain and sparse, and resumed bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("lightning", reason="lightning is missing; it needs feather_param[integrations]")

from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from feather_param.integrations.lightning import FeatherCallback
from feather_param.parametrizations import FeatherParametrization
from tests.integrations.lightning_case import QUIET, RATE, STEPS, ZEROS, Digits, assert_same, batches, fit, quiet, zeros

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class FreezeAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            next(each for each in trainer.callbacks if isinstance(each, FeatherCallback)).controller.freeze()


def sparsified(module: nn.Module) -> bool:
    return any(isinstance(each, FeatherParametrization) for each in module.modules())


def state_in(path, **options):
    return torch.load(path, weights_only=True, **options)["state_dict"]


def zeros_in(path) -> int:
    return sum(int((each == 0).sum()) for each in state_in(path).values() if each.dim() > 1)


@pytest.mark.parametrize("desparsify", [True, False])
@pytest.mark.parametrize("weights_only", [True, False])
def test_the_state_dict_of_a_checkpoint_is_plain_and_sparse(tmp_path, weights_only, desparsify):
    saver = ModelCheckpoint(tmp_path, monitor="loss", save_last=True, save_weights_only=weights_only)
    module, trainer = fit(tmp_path, FeatherCallback(RATE, desparsify=desparsify, end_step=1), saver)
    assert zeros_in(tmp_path / "last.ckpt") == ZEROS
    assert state_in(tmp_path / "last.ckpt").keys() == Digits().state_dict().keys()
    assert sparsified(module) != desparsify

    plain = Digits.load_from_checkpoint(saver.best_model_path, weights_only=True)
    expected = quiet(tmp_path).test(plain, batches(), verbose=False)
    for run in (trainer.test, trainer.validate):
        assert run(module, batches(), ckpt_path="best", verbose=False) == expected
    predicted = trainer.predict(module, batches(), ckpt_path="best")
    assert torch.equal(torch.cat(predicted), plain.eval().net(torch.cat([x for x, _ in batches()])))


def test_the_best_checkpoint_is_evaluated_with_its_own_zeros(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="loss", mode="max")  # the first
    callback = FeatherCallback(RATE, desparsify=False)
    with pytest.warns(UserWarning, match="expected the best checkpoint to have the rate 0.75, got .*epoch=0.*fewer"):
        module, trainer = fit(tmp_path, callback, saver)
    plain = Digits.load_from_checkpoint(saver.best_model_path)
    assert 0 < zeros(plain) < ZEROS
    expected = quiet(tmp_path).test(plain, batches(), verbose=False)
    assert trainer.test(module, batches(), ckpt_path="best", verbose=False) == expected


@pytest.mark.parametrize("frozen", [5, 20])
def test_a_training_resumes_bit_for_bit(tmp_path, frozen):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    full, _ = fit(tmp_path, FeatherCallback(RATE), FreezeAt(frozen), saver)
    for step in (3, 8, 10):  # the second is at the end of an epoch
        resumed, _ = fit(tmp_path, FeatherCallback(RATE), FreezeAt(frozen), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same(full, resumed)
    assert frozen < 20 or zeros(full) == ZEROS


def test_a_finished_training_is_made_longer(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    full, _ = fit(tmp_path, FeatherCallback(RATE, total_steps=2 * STEPS), epochs=4)
    module, trainer = fit(tmp_path, FeatherCallback(RATE), saver, epochs=2)
    assert zeros(module) == ZEROS
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, batches(), batches(), ckpt_path=tmp_path / "last.ckpt")  # the same Trainer
    assert_same(full, module)
    with pytest.raises(ValueError, match=r"got 8 .*FeatherCallback\(..., total_steps=8\)"):
        fit(tmp_path, FeatherCallback(RATE), ckpt_path=tmp_path / "last.ckpt", epochs=5)


def test_a_second_fit_keeps_the_zeros(tmp_path):
    module, trainer = fit(tmp_path, FeatherCallback(RATE), epochs=2)
    before = {name: each.clone() for name, each in module.state_dict().items()}
    trainer.fit(module, batches(), batches())  # all epochs are done
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, batches(), batches())
    assert not torch.equal(module.net[0].weight, before["net.0.weight"])
    assert zeros(module) == ZEROS


def test_a_second_fit_of_a_model_that_stays_sparsified_goes_on(tmp_path):
    full, _ = fit(tmp_path, FeatherCallback(RATE, total_steps=4 * STEPS), epochs=4)
    callback = FeatherCallback(RATE, total_steps=4 * STEPS, desparsify=False)
    with pytest.warns(UserWarning, match="expected the training to reach step 8"):
        module, trainer = fit(tmp_path, callback, epochs=1)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, batches(), batches())
    assert callback.controller.step_count == 4 * STEPS
    assert callback.controller.report().zeros == ZEROS == zeros(full)


def test_a_checkpoint_that_is_saved_after_fit_is_resumed_at_its_step(tmp_path):
    module, trainer = fit(tmp_path, FeatherCallback(RATE), epochs=2)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert zeros_in(tmp_path / "end.ckpt") == ZEROS
    resumed, _ = fit(
        tmp_path,
        callback := FeatherCallback(RATE, total_steps=8, desparsify=False),
        epochs=2,
        ckpt_path=tmp_path / "end.ckpt",
    )
    assert callback.controller.step_count == 8
    assert callback.controller.report().zeros == ZEROS
    x = torch.cat([x for x, _ in batches()])
    assert torch.equal(resumed.eval().net(x), module.eval().net(x))


def test_a_dense_checkpoint_is_refused_with_the_way_to_use_it(tmp_path):
    fit(tmp_path, ModelCheckpoint(tmp_path, save_last=True), epochs=2)
    with pytest.raises(
        ValueError, match="got a dense one; to start from its weights, pass the path to load_from_check"
    ):
        fit(tmp_path, FeatherCallback(RATE), ckpt_path=tmp_path / "last.ckpt")
    module = Digits.load_from_checkpoint(tmp_path / "last.ckpt")
    fit(tmp_path, FeatherCallback(RATE), module=module)
    assert zeros(module) == ZEROS


def test_a_checkpoint_of_another_module_is_refused(tmp_path):
    fit(tmp_path, FeatherCallback(RATE), ModelCheckpoint(tmp_path, save_last=True))
    with pytest.raises(ValueError, match=r"FeatherCallback\(module='net'\) saved, got one of module None"):
        fit(tmp_path, FeatherCallback(RATE, module="net"), ckpt_path=tmp_path / "last.ckpt")


def test_without_the_callback_a_checkpoint_resumes_with_sparse_weights(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(tmp_path, FeatherCallback(RATE, end_step=1), saver)
    with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):
        module, _ = fit(tmp_path, ckpt_path=tmp_path / "epoch=3.ckpt", epochs=4)
    assert zeros(module) == ZEROS


def test_several_modules_have_callbacks_of_their_own(tmp_path):
    callbacks = lambda: (FeatherCallback(0.9, module="net.0"), FeatherCallback(0.5, module="net.3"))  # noqa: E731
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    full, _ = fit(tmp_path, *callbacks(), saver)
    assert [int((full.net[i].weight == 0).sum()) for i in (0, 3)] == [round(0.9 * 1024), 80]
    assert state_in(tmp_path / "step=10.ckpt").keys() == full.state_dict().keys()
    assert_same(full, fit(tmp_path, *callbacks(), ckpt_path=tmp_path / "step=6.ckpt")[0])


def test_a_layer_with_weight_norm_is_saved_sparse_and_resumed(tmp_path):
    def normed() -> Digits:
        module = Digits()
        parametrizations.weight_norm(module.net[0])
        return module

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    full, _ = fit(tmp_path, FeatherCallback(RATE), saver, module=normed())
    assert_same(full, fit(tmp_path, FeatherCallback(RATE), module=normed(), ckpt_path=tmp_path / "step=10.ckpt")[0])
    loaded = normed()
    loaded.load_state_dict(state_in(tmp_path / "step=12.ckpt"))
    assert sum(int((loaded.net[i].weight == 0).sum()) for i in (0, 3)) == ZEROS


def test_checkpoints_may_be_written_in_the_background(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    full, _ = fit(tmp_path, FeatherCallback(RATE), saver, plugins=[AsyncCheckpointIO()])
    assert_same(full, fit(tmp_path, FeatherCallback(RATE), ckpt_path=tmp_path / "step=6.ckpt")[0])


@pytest.mark.parametrize("same_trainer", [True, False])
def test_an_interrupted_training_is_resumed_by_the_same_callback(tmp_path, same_trainer):
    class Stop(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 10:
                raise ConnectionError

    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    full, _ = fit(tmp_path, FeatherCallback(RATE))
    callback, module = FeatherCallback(RATE), Digits()
    trainer = quiet(tmp_path, callback, saver, Stop())
    with pytest.raises(ConnectionError):
        trainer.fit(module, batches(), batches())
    trainer.callbacks = [each for each in trainer.callbacks if not isinstance(each, Stop)]
    if not same_trainer:
        trainer = quiet(tmp_path, callback, saver)
    trainer.fit(module, batches(), batches(), ckpt_path=tmp_path / "step=6.ckpt")
    assert_same(full, module)
    assert state_in(tmp_path / "step=12.ckpt").keys() == full.state_dict().keys()
