"""The pruned networks whose inference `benchmarks.inference` measures.

The weights are random and pruned in one step by magnitude, at the same rate in each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import archs
import feather_param
from feather_param import allocations
from feather_param.inference import recalibrate_batchnorm
from feather_param.patterns import Pattern

__all__ = ["CASES", "NETWORKS", "Case", "pruned", "rate_of", "trained"]

TOKENS = 1024  # of the encoder: its embedding is only a table to look up


class Case(NamedTuple):
    """A network of random weights, its rate, and the number of images, rows or sequences at once."""

    network: str
    rate: float
    batch: int

    def __str__(self) -> str:
        return f"{self.network}, {self.rate:.0%}, batch {self.batch}"


class Encoder(nn.Module):
    """An encoder like BERT: 4 layers, 512 wide, 8 heads. Its inputs are tokens, its outputs the last states."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=TOKENS, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=2048
        )
        self.bert = BertModel(config, add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state


def mlp() -> nn.Module:
    """Return four Linear layers with ReLUs between them."""
    return nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(4096, 4096), nn.ReLU())][:-1])


def torchvision_network(name: str) -> nn.Module:
    """Return a network of torchvision with random weights."""
    from torchvision import models

    return models.get_model(name, weights=None)


def images(*shape: int) -> Callable[[int], Tensor]:
    """Return a function that makes a batch of random inputs of a shape."""
    return lambda batch: torch.randn(batch, *shape)


def sentences(batch: int) -> Tensor:
    """Return random tokens, 128 in each sequence."""
    return torch.randint(TOKENS, (batch, 128))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "resnet50": (lambda: torchvision_network("resnet50"), images(3, 224, 224)),
    "mobilenet_v2": (lambda: torchvision_network("mobilenet_v2"), images(3, 224, 224)),
    "efficientnet_b0": (lambda: torchvision_network("efficientnet_b0"), images(3, 224, 224)),
    "bert": (Encoder, sentences),
    "mlp": (mlp, images(4096)),
    "resnet20": (archs.resnet20, images(3, 32, 32)),
}
CASES = [
    Case("resnet50", 0.7, 1),
    Case("resnet50", 0.85, 1),
    Case("resnet50", 0.95, 1),
    Case("resnet50", 0.99, 1),
    Case("resnet50", 0.95, 8),
    Case("mobilenet_v2", 0.9, 1),
    Case("efficientnet_b0", 0.9, 1),
    Case("bert", 0.9, 1),
    Case("mlp", 0.95, 1),
    Case("mlp", 0.95, 32),
    Case("mlp", 0.95, 256),
    Case("resnet20", 0.95, 1),
    Case("resnet20", 0.95, 128),
]


def pruned(
    case: Case, pattern: Pattern | None = None, fits: Callable[[Any], bool] = lambda layer: True
) -> tuple[nn.Module, Tensor]:
    """Return a network of random weights whose layers have the same rate, and an input.

    Args:
        case: the network.
        pattern: of the zeros.
        fits: whether a Linear or Conv layer is pruned; the others stay dense.
    """
    build, inputs = NETWORKS[case.network]
    torch.manual_seed(0)
    model = build().eval()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    dense = [f"{name}.weight" for name, layer in layers.items() if not fits(layer)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives|fewer survivors")
        settings: dict[str, Any] = {"final_rate": case.rate, "total_steps": 1, "allocation": allocations.uniform}
        feather_param.sparsify(model, pattern=pattern, exclude=dense or None, **settings).step()
        feather_param.desparsify(model)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        # Otherwise the activations vanish, and computing with subnormal numbers is slow.
        recalibrate_batchnorm(model, [inputs(4)])
    return model, inputs(case.batch)


def trained(path: Path, arch: str, size: int, batch: int) -> tuple[nn.Module, Tensor]:
    """Return a network of `archs` with the weights of a file, and an input."""
    state = feather_param.load_sparse(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    weights = [tensor for tensor in state.values() if tensor.dim() > 1]
    model = getattr(archs, arch)(num_classes=len(weights[-1]), in_channels=weights[0].shape[1])
    model.load_state_dict(state)
    torch.manual_seed(0)
    return model.eval(), torch.randn(batch, weights[0].shape[1], size, size)


def rate_of(model: nn.Module) -> float:
    """Return the fraction of zeros among the weights of the Linear and Conv layers."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
