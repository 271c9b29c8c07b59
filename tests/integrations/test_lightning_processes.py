"""FeatherCallback for Lightning in two processes, and strategies that it refuses."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is missing; it needs feather_param[integrations]")

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from feather_param.integrations.lightning import FeatherCallback
from tests.integrations.lightning_case import QUIET, RATE, ZEROS, Digits, assert_same, fit, zeros

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Checked(FeatherCallback):
    """Fails in both processes if their masks differ."""

    def on_train_end(self, trainer, pl_module):
        masks = torch.cat([mask.flatten() for mask in self.controller.masks().values()]).double()
        assert torch.equal(trainer.strategy.reduce(masks.clone(), reduce_op="sum"), 2 * masks)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*may lead to deadlocks in the child:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:It is recommended to use .self.log.* sync_dist=True")
def test_two_processes_have_the_same_zeros_and_resume_bit_for_bit(tmp_path):
    def run(callback, **options):
        saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        return fit(tmp_path, callback, saver, strategy="ddp_fork", devices=2, epochs=3, **options)[0]

    full = run(Checked(RATE))
    assert zeros(full) == ZEROS
    assert zeros(Digits.load_from_checkpoint(tmp_path / "epoch=2.ckpt")) == ZEROS
    resumed = run(Checked(RATE, desparsify=False), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(full, resumed)  # the process that called fit gets the plain, sparse module, with desparsify=False too


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(
        ValueError, match=f"got {strategy.__name__}, which shards them; with FSDP2, leave this callback out"
    ):
        FeatherCallback(RATE).setup(trainer, Digits(), "fit")
