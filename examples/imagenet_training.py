"""The training of `imagenet.py`: the network, its moving average, and everything that changes them."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import feather_param
from examples import sharding
from examples.imagenet_data import Batch, ImageNet, mixed_seed
from examples.imagenet_recipe import RECIPES
from examples.processes import ALONE, Processes
from examples.resumable import UserError
from examples.script import TrainingFailed, progress, raised_as


class Training:
    """A network, its moving average, and everything that changes them: optimizer, learning rate and sparsity.

    Args:
        options: what `parse` returns.
        data: the images.
        device: where to train.
        processes: the processes that train together.
    """

    def __init__(
        self, options: argparse.Namespace, data: ImageNet, device: torch.device, processes: Processes = ALONE
    ) -> None:
        torch.manual_seed(options.seed)
        self.options, self.data, self.device, self.processes = options, data, device, processes
        self.recipe = RECIPES[options.recipe]
        self.amp: bool = device.type == "cuda" if options.amp is None else options.amp
        self.sharded: bool = options.parallel == "fsdp"
        self.steps: int = options.epochs * data.steps_per_epoch
        self.model = self.build()
        require_fit(self.model, options.model, options.image_size, self.recipe.val_sizes(options.image_size)[1])
        self.controller = self.sparsify()
        self.ema = self.recipe.average(self.model, data.images_per_step, options.epochs)
        if self.sharded:
            for module in (self.model, *([self.ema.module] if self.ema else [])):
                sharding.shard(module, device, processes)
        self.optimizer = self.recipe.optimizer(self.model, options.lr)
        self.scheduler = LambdaLR(self.optimizer, lambda epoch: self.recipe.lr_factor(epoch, options.epochs))
        self.step_count = 0
        self.epoch = 0  # number of epochs that are trained and evaluated
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of the steps of this epoch
        wrapped = self.model if self.sharded else processes.wrap(self.model)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(wrapped) if options.compile else wrapped

    def build(self) -> nn.Module:
        """Return a new network on the device. ``fully_shard`` takes only contiguous weights, not channels last."""
        network = torchvision.models.get_model(self.options.model, weights=None, num_classes=self.data.classes)
        layout = torch.contiguous_format if self.sharded else torch.channels_last
        return network.to(device=self.device, memory_format=layout)  # type: ignore[call-overload]

    def sparsify(self) -> feather_param.Controller | None:
        """Sparsify the model to --ptarget until half of the steps. Return None if it stays dense."""
        rate, kind = self.options.ptarget, getattr(feather_param.allocations, self.options.allocation)
        if rate == 0:
            return None
        with raised_as(UserError, f"--ptarget {rate} cannot be reached"):
            return feather_param.sparsify(
                self.model, final_rate=rate, total_steps=self.steps, allocation=kind, p=self.options.p
            )

    def batches(self) -> DataLoader[Batch]:
        """Return the batches of this process that are left in this epoch."""
        trained = self.step_count - self.epoch * self.data.steps_per_epoch
        return self.data.train_batches(self.epoch, trained, self.options.workers, self.device.type == "cuda")

    def on_device(self, batch: Batch) -> Batch:
        """Return a batch on the device, with its channels last."""
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        return images.contiguous(memory_format=torch.channels_last), labels

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        epoch, in_epoch = divmod(self.step_count, self.data.steps_per_epoch)
        torch.manual_seed(mixed_seed(self.options.seed, self.step_count, self.processes.rank))  # of mixup and dropout
        self.model.train()
        images, labels = self.recipe.mix(*self.on_device(batch), self.data.classes)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.forward(images), labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.controller is not None:
            with raised_as(TrainingFailed, f"at step {self.step_count + 1}"):  # a weight is no longer finite
                self.controller.step()
        if self.ema is not None:
            left = self.data.steps_per_epoch - 1 - in_epoch
            self.recipe.update_average(self.ema, self.model, left, epoch, self.options.epochs)
        if in_epoch == 0:
            self.loss_sum.zero_()
        self.loss_sum += loss.detach()
        self.step_count += 1
        if self.step_count % self.data.steps_per_epoch == 0:
            self.scheduler.step()

    def progress(self) -> dict[str, float]:
        """Return the step, the mean loss of the epoch up to it, and the current rate, threshold and learning rate.

        Call this in all processes: the loss is the mean over them.
        """
        steps = (self.step_count - 1) % self.data.steps_per_epoch + 1
        loss = float(self.processes.sum(self.loss_sum)) / self.processes.count / steps
        return progress(self.step_count, loss, self.controller, self.scheduler)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss and the accuracies of a model on the validation images, each of them counted once.

        Call this in all processes: each evaluates a part. Equal weights give equal results.
        """
        model.eval()
        left = self.data.val_count
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # loss, correct, correct in five, images
        sums[3] = left
        # Algorithms chosen by a benchmark may differ from call to call, and with them the last bits.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with torch.no_grad(), exact, torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            for batch in self.data.val_batches(self.options.workers, self.device.type == "cuda"):
                images, labels = self.on_device(batch)
                logits, labels = model(images)[:left], labels[:left]  # without the repetitions at the end
                hits = logits.topk(min(5, self.data.classes)).indices == labels[:, None]
                sums[0] += F.cross_entropy(logits, labels, reduction="sum")
                sums[1] += hits[:, 0].sum()
                sums[2] += hits.sum()
                left -= len(labels)
        loss, top1, top5, count = self.processes.sum(sums).tolist()
        return {"test_loss": loss / count, "accuracy": top1 / count, "top5": top5 / count, "images": int(count)}

    def end_epoch(self) -> dict[str, float]:
        """Evaluate, and return `progress` and what the model and its average measure. Call this in all processes."""
        self.processes.copy_statistics(self.model)
        row = {**self.progress(), **self.evaluate(self.model)}
        if self.ema is not None:
            self.processes.copy_statistics(self.ema)
            measured = self.evaluate(self.plain(self.plain_state(self.ema.module)))
            row |= {f"ema_{name}": measured[name] for name in ("test_loss", "accuracy", "top5")}
        self.epoch += 1
        return row

    def plain_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the whole state of the plain model, with its zeros, on the CPU. Call this in all processes."""
        state = model.state_dict() if self.controller is None else feather_param.baked_state_dict(model)
        return sharding.whole(state)

    def plain(self, state: dict[str, Tensor]) -> nn.Module:
        """Return a new network with this state."""
        network = self.build()
        network.load_state_dict(state)
        return network

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue as if there had been no interruption. Call this in all processes."""
        for model in (self.model, self.ema):
            if model is not None:
                self.processes.copy_statistics(model)
        states = {name: part.state_dict() for name, part in self._parts().items()}
        if self.sharded:
            states |= {name: sharding.whole(states[name]) for name in ("model", "ema") if name in states}
            states["optimizer"] = sharding.optimizer_state(self.model, self.optimizer)
        loss = float(self.processes.sum(self.loss_sum)) / self.processes.count
        counts = {"step": self.step_count, "epoch": self.epoch, "processes": self.processes.count}
        return {**states, **counts, "loss_sum": loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`, with as many processes.

        Raises:
            UserError: the run had another number of processes.
        """
        if state["processes"] != self.processes.count:
            raise UserError(
                f"expected {state['processes']} processes as in the run to resume, got {self.processes.count}: start "
                "them with torchrun --nproc-per-node"
            )
        parts = self._parts()
        if self.sharded:
            for name in ("model", "ema"):
                if name in parts:
                    sharding.load(parts.pop(name), state[name])
            sharding.load_optimizer(self.model, parts.pop("optimizer"), state["optimizer"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        if self.controller is not None:
            self.controller.refresh()  # sharded weights do not notice a load
        self.step_count, self.epoch = state["step"], state["epoch"]
        self.loss_sum.fill_(state["loss_sum"])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "ema": self.ema, "scheduler": self.scheduler}
        return {name: part for name, part in {**parts, "controller": self.controller}.items() if part is not None}


def require_fit(network: nn.Module, name: str, train_size: int, val_size: int) -> None:
    """Raise a `UserError` unless a network takes training and validation images of these sizes, and has one output.

    It is tried on the meta device, which computes shapes only.
    """
    network = copy.deepcopy(network).to("meta")
    for training, size in ((True, train_size), (False, val_size)):
        try:
            output = network.train(training)(torch.empty(2, 3, size, size, device="meta"))
        except Exception as error:  # networks raise any error
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"expected --model {name} to take images of {size} pixels, got {reason!r}: choose another "
                "--image-size, or --recipe v1, whose training and validation images have one size"
            ) from error
        if not isinstance(output, Tensor):
            raise UserError(
                f"expected --model to be a network with one output, got {name}, which has auxiliary ones in training: "
                "choose another, for example resnet50"
            )
