"""The networks of torchvision, timm and `archs` are fused as far as they can be."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

import archs
from tests.inference.graphs import fused_layers, graph_of, measured_norms

# batch norms of the network, those left in the graph, additions and activations in layers, size of the image
NETWORKS = {
    "resnet18": (20, 0, 8, {"relu": 17}, 64),
    "resnet50": (53, 0, 16, {"relu": 49}, 64),
    "mobilenet_v2": (52, 0, 10, {"relu6": 35}, 64),
    "mobilenet_v3_small": (34, 0, 6, {"relu": 14, "hardswish": 19}, 64),
    "efficientnet_b0": (49, 0, 9, {"silu": 49}, 64),
    "densenet121": (121, 62, 0, {"relu": 59}, 64),
    "inception_v3": (96, 0, 0, {"relu": 94}, 96),
    "googlenet": (59, 0, 0, {"relu": 57}, 64),
    "regnet_y_400mf": (53, 0, 16, {"relu": 65}, 64),
    "convnext_tiny": (0, 0, 0, {"gelu": 18}, 64),
    "swin_t": (0, 0, 12, {"gelu": 12}, 64),
    "vit_b_16": (0, 0, 12, {"gelu": 12}, 32),
    "vgg11_bn": (8, 0, 0, {"relu": 10}, 64),
    "shufflenet_v2_x0_5": (56, 0, 0, {"relu": 37}, 64),
    "mnasnet0_5": (52, 0, 10, {"relu": 35}, 64),
}
TIMM = {
    "resnet50": (53, 0, 16, {"relu": 49}, 64),
    "efficientnet_b0": (49, 0, 9, {"silu": 49}, 64),
    "mobilenetv3_small_100": (34, 0, 6, {"relu": 14, "hardswish": 19}, 64),
    "vit_tiny_patch16_224": (0, 0, 24, {"gelu": 12}, 224),
}


def check(model, size, norms, left, additions, activations):
    """Compare a network with its graph, which takes in so many batch norms, additions and activations."""
    model = measured_norms(model)
    for parameter in model.parameters():
        if not parameter.any():  # heads that begin at zero
            nn.init.normal_(parameter, std=0.02)
    graph = graph_of(model, torch.randn(1, 3, size, size))
    counts = [sum(isinstance(m, nn.BatchNorm2d) for m in module.modules()) for module in (model, graph)]
    calls = [node for node in graph.graph.nodes if node.target in fused_layers(graph)]
    batch_norms = sum(node.target is nn.functional.batch_norm for node in graph.graph.nodes)
    found = Counter(layer.activation for layer in fused_layers(graph).values())
    del found["identity"]
    assert (counts[0], counts[1] + batch_norms) == (norms, left)
    assert sum(len(node.args) == 2 for node in calls) == additions
    assert found == activations
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        wanted, got = model(x), graph(x)
    assert wanted.std() > 0
    # Each of up to 200 layers rounds to a relative 2^-24 of its largest values, which are below 64 standard deviations.
    assert torch.allclose(got, wanted, rtol=0, atol=200 * 64 * 2**-24 * float(wanted.std()))


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    *expected, size = NETWORKS[name]
    options = {
        "googlenet": {"init_weights": True},
        "inception_v3": {"init_weights": True},
        "vit_b_16": {"image_size": size},
    }
    check(getattr(models, name)(weights=None, **options.get(name, {})), size, *expected)


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    *expected, size = TIMM[name]
    check(timm.create_model(name), size, *expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", (21, 0, 9, {"relu": 19})),
        ("mobilenet_v1", (27, 0, 0, {"relu": 27})),
        ("densenet", (39, 21, 0, {"relu": 18})),
    ],
)
def test_networks_of_archs(name, expected):
    torch.manual_seed(0)
    check(getattr(archs, name)(num_classes=10), 32, *expected)
