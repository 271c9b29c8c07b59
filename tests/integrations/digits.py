"""A small network, the digits of scikit-learn, and the code of the pages on trainers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DOCS = Path(__file__).resolve().parents[2] / "docs" / "trainers"
TOTAL = 64 * 32 + 32 * 10  # elements of the network's two weights


class Network(nn.Module):
    """A perceptron with a normalisation, so that it has buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.body(x))))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def digits(count: int = 256) -> TensorDataset:
    """Return the first digits, as vectors, with their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.as_tensor(pixels[:count] / 16, dtype=torch.float32), torch.as_tensor(labels[:count]))


def loader(count: int = 256, batch: int = 64) -> DataLoader:
    """Return batches of the digits, always in the same order."""
    return DataLoader(digits(count), batch_size=batch)


def zeros(state: nn.Module | Mapping[str, Tensor]) -> int:
    """Return the number of zeros of the weights of a plain network, or of its state_dict."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return sum(int((state[name] == 0).sum()) for name in ("body.weight", "head.weight"))


def outputs(model: nn.Module) -> Tensor:
    """Return the outputs of a model for some digits, in evaluation mode."""
    with torch.no_grad():
        return model.eval()(digits(100).tensors[0])


def blocks_of(page: str) -> list[str]:
    """Return the blocks of Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def run_page(page: str, scope: dict[str, Any], only: Sequence[int] | None = None) -> dict[str, Any]:
    """Run the blocks of Python code of a page, all or some, one after the other, and return their variables."""
    for i, block in enumerate(blocks_of(page)):
        if only is None or i in only:
            exec(compile(block, f"{page}, block {i}", "exec"), scope)
    return scope
