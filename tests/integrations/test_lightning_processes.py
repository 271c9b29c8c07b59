"""FeatherCallback for Lightning in two processes, and strategies that it refuses."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
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
def test_two_processes_have_the_same_zeros_and_resume_bit_for_bit(tmp_path):
    # In a new process: torch refuses a backward pass in a fork of one that has made some in other threads.
    process = multiprocessing.get_context("spawn").Process(target=train_in_two_processes, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0


def train_in_two_processes(folder: Path) -> None:
    def run(callback, **options):
        saver = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}", enable_version_counter=False)
        return fit(folder, callback, saver, strategy="ddp_fork", devices=2, epochs=3, **options)[0]

    full = run(Checked(RATE))
    assert zeros(full) == ZEROS
    assert zeros(Digits.load_from_checkpoint(folder / "epoch=2.ckpt")) == ZEROS
    resumed = run(Checked(RATE, desparsify=False), ckpt_path=folder / "epoch=0.ckpt")
    assert_same(full, resumed)  # the process that called fit gets the plain, sparse module, with desparsify=False too


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_are_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(
        ValueError, match=f"got {strategy.__name__}, which shards them; with FSDP2, leave this callback out"
    ):
        FeatherCallback(RATE).setup(trainer, Digits(), "fit")
