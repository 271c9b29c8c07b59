"""The recipes of the ImageNet script, and its data: which images each process sees, in which order and form."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR, StepLR
from torchvision.models import get_model

from examples import sharding
from examples.imagenet_data import ImageNet
from examples.imagenet_recipe import RECIPES
from examples.processes import Processes
from tests.examples.imagenet import BATCH, CLASSES, MODEL, TRAIN, VAL

V1, V2 = RECIPES["v1"], RECIPES["v2"]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_all_processes_together_see_each_validation_image_once(images: Path, world: int) -> None:
    seen, batches = [], set()
    for rank in range(world):
        data = ImageNet(images, V1, 8, 2, 0, Processes(rank, world))
        loader = data.val_batches(0, False)
        batches.add(len(loader))
        seen += list(loader.sampler)[: data.val_count]
    assert sorted(seen) == list(range(VAL))
    assert len(batches) == 1  # with FSDP2, a process that evaluates more than the others waits for them forever


@pytest.mark.parametrize("world", [1, 2])
def test_processes_train_on_different_images_in_an_order_of_its_own_each_epoch(images: Path, world: int) -> None:
    steps = TRAIN // world // BATCH
    orders = []
    for epoch in range(2):
        loaders = [
            ImageNet(images, V1, 8, BATCH, 0, Processes(rank, world)).train_batches(epoch, 0, 0, False)
            for rank in range(world)
        ]
        orders.append([index for loader in loaders for batch in loader.batch_sampler for index in batch])
        assert len(set(orders[-1])) == len(orders[-1]) == steps * BATCH * world
    assert orders[0] != orders[1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_batches_depend_on_the_step_only(images: Path) -> None:
    data = ImageNet(images, V2, 16, BATCH, 0, Processes())
    whole = [image for image, _ in data.train_batches(0, 0, 0, False)]
    torch.manual_seed(1)
    for first, workers in ((0, 1), (2, 0)):
        rest = [image for image, _ in data.train_batches(0, first, workers, False)]
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[first:], strict=True))
    other = next(iter(data.train_batches(1, 0, 0, False)))[0]
    assert not torch.equal(other, whole[0])


def test_images_have_the_sizes_of_the_recipe(images: Path) -> None:
    for recipe, size, expected in ((V1, 28, (28, 32, 28)), (V2, 176, (176, 232, 224))):
        data = ImageNet(images, recipe, size, BATCH, 0, Processes())
        train, val = data.train[0][0], data.val[0][0]
        assert (train.shape[-1], recipe.val_sizes(size)[0], val.shape[-1]) == expected
        assert train.shape == (3, size, size)


def test_learning_rates_are_those_of_torchs_schedulers() -> None:
    def rates(scheduler, epochs: int) -> list[float]:
        found = []
        for _ in range(epochs):
            found.append(scheduler.optimizer.param_groups[0]["lr"])
            scheduler.optimizer.step()
            scheduler.step()
        return found

    def sgd() -> torch.optim.SGD:
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)

    for recipe in (V1, V2):
        ours, theirs = sgd(), sgd()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the SequentialLR of torch 2.6 warns of a call that it makes itself
            if recipe is V1:
                expected = rates(StepLR(theirs, step_size=30, gamma=0.1), 90)
            else:
                parts = [LinearLR(theirs, 0.01, total_iters=5), CosineAnnealingLR(theirs, T_max=595)]
                expected = rates(SequentialLR(theirs, parts, [5]), 600)
        found = rates(LambdaLR(ours, partial(recipe.lr_factor, epochs=recipe.epochs)), recipe.epochs)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert [V2.lr_factor(epoch, 1) for epoch in range(2)] == [1, 0]


def test_recipe_v2_decays_no_norms_and_averages_as_the_reference() -> None:
    model = get_model(MODEL, num_classes=CLASSES)
    others, norms = V2.optimizer(model, lr=0.5).param_groups
    assert (others["weight_decay"], norms["weight_decay"]) == (2e-5, 0)
    assert sum(len(group["params"]) for group in (others, norms)) == len(list(model.parameters()))
    assert all(parameter.ndim == 1 for parameter in norms["params"])
    assert {group["weight_decay"] for group in V1.optimizer(model, lr=0.1).param_groups} == {1e-4}
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = V2.average(layer, images_per_step=1024, epochs=600)
    assert average
    V2.update_average(average, layer, 32, epoch=4, epochs=600)
    for left in (40, 32, 8, 0):  # two updates, of which the first copies
        V2.update_average(average, layer, left, epoch=5, epochs=600)
        if left == 32:
            nn.init.ones_(layer.weight)
    assert average.module.weight.item() == pytest.approx(2e-5 * 1024 * 32 / 600, rel=1e-4)
    assert V1.average(layer, 1, 1) is None


def test_recipe_v2_mixes_images_and_labels() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(8, 3, 6, 6), torch.arange(8) % CLASSES
    assert V1.mix(x, y, CLASSES) == (x, y)
    for _ in range(4):
        mixed, labels = V2.mix(x, y, CLASSES)
        assert mixed.shape == x.shape
        torch.testing.assert_close(labels.sum(dim=1), torch.ones(8))


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("squeezenet1_1", 10), ("vit_b_32", 13)])
def test_blocks_to_shard_are_the_children_of_outermost_sequentials(name: str, count: int) -> None:
    with torch.device("meta"):
        blocks = list(sharding._blocks(get_model(name)))
    assert len([block for block in blocks if any(True for _ in block.parameters())]) == count
    parameters = [id(parameter) for block in blocks for parameter in block.parameters()]
    assert len(parameters) == len(set(parameters))
