"""Train a LightningModule on scikit-learn's digits to 95 % zeros: `python examples/lightning_digits.py`.

The training stops after half of its epochs. A second one resumes it and tests its best checkpoint.
The files are in runs/lightning.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import feather_param
from feather_param.integrations.lightning import FeatherCallback

FOLDER, EPOCHS, BATCH = Path("runs") / "lightning", 12, 64


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def trainer(epochs: int) -> Trainer:
    # end_step: the best checkpoint of the second half has the full rate
    sparse = FeatherCallback(0.95, total_steps=EPOCHS * steps, end_step=EPOCHS * steps // 2)  # added
    best = ModelCheckpoint(FOLDER, monitor="accuracy", mode="max", save_last=True, enable_version_counter=False)
    return Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[sparse, best], logger=False, enable_progress_bar=False
    )


argparse.ArgumentParser(description=__doc__).parse_args()  # there are no options but --help
seed_everything(0)
pixels, digits = load_digits(return_X_y=True)
arrays = train_test_split(pixels.astype("float32") / 16, digits, random_state=0)
train_x, test_x, train_y, test_y = map(torch.as_tensor, arrays)
train = DataLoader(TensorDataset(train_x, train_y), BATCH, shuffle=True)
test = DataLoader(TensorDataset(test_x, test_y), 450)
steps = len(train)

trainer(EPOCHS // 2).fit(Digits(), train, test)
model, second = Digits(), trainer(EPOCHS)
second.fit(model, train, test, ckpt_path=FOLDER / "last.ckpt")
second.test(model, test, ckpt_path="best")

accuracy = (model.net(test_x).argmax(dim=1) == test_y).float().mean()
weights = [layer.weight for layer in model.net if isinstance(layer, nn.Linear)]
zeros, total = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
feather_param.save_sparse(model, FOLDER / "sparse.safetensors")
size = (FOLDER / "sparse.safetensors").stat().st_size / 1e3
print(f"test accuracy {accuracy:.1%}, {zeros:,} of {total:,} weights are zero, file {size:.1f} kB")
