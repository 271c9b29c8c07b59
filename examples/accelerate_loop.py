"""Train on scikit-learn's digits to 95 % zeros with accelerate: `python examples/accelerate_loop.py`.

Run it again to go on from the last checkpoint in runs/accelerate. `--epochs N` stops after N epochs of this run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import feather_param

FOLDER = Path("runs") / "accelerate"
RATE, EPOCHS = 0.95, 20


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="stop after this number of epochs")
    stop_after = parser.parse_args(arguments).epochs
    if stop_after < 1:
        parser.error(f"expected --epochs to be at least 1, got {stop_after}")

    set_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    arrays = train_test_split(pixels.astype("float32") / 16, digits, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.as_tensor, arrays)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(DataLoader(TensorDataset(train_x, train_y), batch_size=32, shuffle=True))
    updates = -(-len(loader) // accelerator.gradient_accumulation_steps) * EPOCHS
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=updates, optimizer=optimizer)  # added
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(controller)  # added

    first = max((int(path.name.split("-")[1]) for path in FOLDER.glob("epoch-*")), default=0)
    if first:
        accelerator.load_state(str(FOLDER / f"epoch-{first}"))
    for epoch in range(first, min(first + stop_after, EPOCHS)):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                optimizer.step()  # advances the controller
                optimizer.zero_grad()
        accelerator.save_state(str(FOLDER / "unfinished"))  # so that no folder epoch-N is written only in part
        (FOLDER / "unfinished").rename(FOLDER / f"epoch-{epoch + 1}")
        accelerator.print(f"epoch {epoch + 1}: {controller.rate:.1%} zeros")
    if controller.step_count < updates:
        return

    report = controller.report()
    model = accelerator.unwrap_model(model)
    feather_param.desparsify(model)  # added
    feather_param.save_sparse(model, FOLDER / "sparse.safetensors")
    accuracy = (model(test_x).argmax(dim=1) == test_y).float().mean()
    accelerator.print(f"test accuracy {accuracy:.1%}, {report.zeros:,} zeros of {report.total:,} weights")


if __name__ == "__main__":
    main()
