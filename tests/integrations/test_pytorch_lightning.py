"""FeatherCallback for the package pytorch_lightning, whose Trainer refuses the callback for lightning."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is missing; it needs feather_param[integrations]")

import pytorch_lightning as pl

from feather_param.integrations.pytorch_lightning import FeatherCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .*dataloader.* does not have many workers"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def fit(tmp_path, *callbacks, ckpt_path=None):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    module = Net()
    trainer = pl.Trainer(max_epochs=4, default_root_dir=tmp_path, callbacks=[*callbacks], **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8), ckpt_path=ckpt_path)
    return module


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_it_trains_saves_and_resumes(tmp_path):
    def saver():
        return pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")

    full = fit(tmp_path, FeatherCallback(0.5), saver())
    assert sum(int((full.net[i].weight == 0).sum()) for i in (0, 2)) == 80
    resumed = fit(tmp_path, FeatherCallback(0.5), saver(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), resumed.parameters(), strict=True))
    assert Net.load_from_checkpoint(tmp_path / "epoch=3.ckpt", weights_only=True).net[0].weight.count_nonzero() < 128


def test_it_is_another_class_that_can_be_pickled():
    lightning = pytest.importorskip("lightning", reason="lightning is missing; it needs feather_param[integrations]")
    from feather_param.integrations.lightning import FeatherCallback as Other

    callback = pickle.loads(pickle.dumps(FeatherCallback(0.5)))
    assert isinstance(callback, pl.Callback)
    assert not isinstance(callback, lightning.Callback)
    assert isinstance(Other(0.5), lightning.Callback)
