"""Fine-tune a network of timm on scikit-learn's digits to 90 % zeros, with EMA: `python examples/timm_finetune.py`.

A short dense training stands in for `pretrained=True`, which downloads. Run the script again to go on from the last
checkpoint in runs/timm. `--epochs N` stops after N epochs of this run.
"""
# pyright: reportPrivateImportUsage=false

import argparse
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

import feather_param

FOLDER = Path("runs") / "timm"
RATE, EPOCHS, DENSE_EPOCHS = 0.9, 10, 5


def train(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, after: Callable) -> None:
    model.train()
    for batch in torch.randperm(len(x)).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()  # advances the controller
        after(model)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model.eval()(x).argmax(dim=1) == y).float().mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="stop after this number of epochs")
    stop_after = parser.parse_args(arguments).epochs
    if stop_after < 1:
        parser.error(f"expected --epochs to be at least 1, got {stop_after}")
    torch.manual_seed(0)
    pixels, digits = load_digits(return_X_y=True)
    arrays = train_test_split(pixels.reshape(-1, 1, 8, 8).astype("float32") / 16, digits, random_state=0)
    train_x, val_x, train_y, val_y = map(torch.as_tensor, arrays)
    model = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    FOLDER.mkdir(parents=True, exist_ok=True)
    last = FOLDER / "last.pth.tar"
    for _ in range(0 if last.exists() else DENSE_EPOCHS):
        train(model, train_x, train_y, create_optimizer_v2(model, opt="adamw", lr=2e-3), lambda model: None)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05)
    total = -(-len(train_x) // 64) * EPOCHS
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=total, optimizer=optimizer)  # added
    ema = ModelEmaV3(model, decay=0.9)  # after sparsify
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(FOLDER), max_history=3)
    first = (resume_checkpoint(model, str(last), optimizer) or 0) if last.exists() else 0
    if first:
        load_checkpoint(ema.module, str(last), use_ema=True)
        saver.load_state_dict_from_checkpoint(str(last))  # the best so far
    for epoch in range(first, min(first + stop_after, EPOCHS)):
        torch.manual_seed(epoch)  # so that an interruption does not change the order of the data
        train(model, train_x, train_y, optimizer, ema.update)
        found = accuracy(ema.module, val_x, val_y)
        saver.save_checkpoint(epoch, metric=found if controller.rate == RATE else 0.0)  # the best at the final rate
        print(f"epoch {epoch + 1}: {controller.rate:.1%} zeros, accuracy {found:.1%}")
    if controller.step_count == total:
        load_checkpoint(model, str(FOLDER / "model_best.pth.tar"), use_ema=True)
        report = controller.report()
        feather_param.desparsify(model)  # added
        feather_param.save_sparse(model, FOLDER / "sparse.safetensors")
        print(f"accuracy {accuracy(model, val_x, val_y):.1%}, {report.zeros:,} zeros of {report.total:,} weights")


if __name__ == "__main__":
    main()
