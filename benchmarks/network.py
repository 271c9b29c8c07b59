"""A network whose training steps need nothing from the host, so that a CUDA graph can record them.

The numbers that change from step to step (learning rates, numbers of zeros) are in tables on the device, which a step
reads by a counter. `benchmarks.together` trains several of these networks at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.cifar100_run import BATCH, Run, RunTraining, build
from benchmarks.methods import METHODS, mirror_factor
from examples.cifar100 import CLIP, MOMENTUM
from examples.data import ImageData
from feather_param.core.freezing import restore_zeros
from feather_param.ops.gpu_kernels import kernels
from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits

__all__ = ["Network", "possible"]

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# (the thresholds are written as the controller does, but without the host; `torch._foreach_*` have no public names)


def possible(run: Run) -> bool:
    """Return whether the steps of a run need nothing from the host. Guards and a function theta do."""
    method = METHODS.get(run.method)
    return method is None or not (method.guard or callable(method.theta))


class Network(RunTraining):
    """A network whose steps need nothing from the host.

    Args:
        run: the settings.
        data: the data set, on the device.
        device: where to train.
        backend: a backend of `torch.compile`, which compiles the forward and the backward pass once for all networks
            of a kind; None for torch's own operations.
    """

    def __init__(self, run: Run, data: ImageData, device: torch.device, backend: str | None = None) -> None:
        super().__init__(run, data, device, least=BATCH)
        self.average = None  # see `averages`
        self.model.train()
        self.steps = len(self.batches)
        self.parameters: list[Tensor] = [*self.model.parameters()]
        self.matrices = [i for i, parameter in enumerate(self.parameters) if parameter.ndim > 1]
        self.momenta = [torch.zeros_like(parameter) for parameter in self.parameters]
        averaged = self.method is not None and self.method.average is not None
        self.averages = [parameter.detach().clone() for parameter in self.parameters] if averaged else []
        self.loss = torch.zeros((), device=device)
        lr = [0.5 * self.options.lr * (1 + math.cos(math.pi * step / self.steps)) for step in range(self.steps)]
        self.lr = torch.tensor(lr, device=device)
        self.zeros = None if self.controller is None else torch.tensor(self._zeros_of_each_step(), device=device)
        self.freeze_step = self.method and self.method.freeze_step(self.steps)
        self._compiled = None
        if backend is not None:
            kind = _Kind(run.network, run.width, data.classes, data.channels)
            names, self._compiled = _compile(kind, backend)
            self._places = {name: self._place(name) for name in names}

    def step_on(self, images: Tensor, labels: Tensor, step: Tensor) -> None:
        """Make a step, whose number is given as int64 [1]."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.amp, cache_enabled=False):
            loss = self._loss(images, labels)
        gradients = [*torch.autograd.grad(loss, self.parameters)]
        with torch.no_grad():
            self.loss.copy_(loss)
            self._update(gradients, self.lr.index_select(0, step)[0], step)
            if self.controller is not None and self.controller._shared.frozen:
                restore_zeros(self.controller._shared)
            elif self.zeros is not None:
                self._write_thresholds(self.zeros.index_select(0, step)[0])

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._compiled is None:
            return F.cross_entropy(self.model(images), labels)
        # A thresholded weight takes the place of the dense one.
        tensors = {name: getattr(module, attribute) for name, (module, attribute) in self._places.items()}
        # A graph for tensors does not accept Parameters, so a dense network would be compiled by itself.
        tensors = {name: each[...] if isinstance(each, nn.Parameter) else each for name, each in tensors.items()}
        return self._compiled(tensors, images, labels)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """Return the module of a tensor and the name of its attribute there."""
        module, _, attribute = name.rpartition(".")
        return self.model.get_submodule(module), attribute

    def _update(self, gradients: list[Tensor], lr: Tensor, step: Tensor) -> None:
        """Clip the gradients, and make a step of SGD with momentum and weight decay, as `Training` does."""
        norm = torch.stack(torch._foreach_norm(gradients)).norm()
        torch._foreach_mul_(gradients, (CLIP / (norm + 1e-6)).clamp(max=1.0))
        clipped = torch._foreach_add(gradients, 0.0) if self.method and self.method.mirror else gradients
        decayed = [gradients[i] for i in self.matrices]
        torch._foreach_add_(decayed, [self.parameters[i] for i in self.matrices], alpha=self.options.wd)
        torch._foreach_mul_(self.momenta, MOMENTUM)
        torch._foreach_add_(self.momenta, gradients)
        torch._foreach_sub_(self.parameters, torch._foreach_mul(self.momenta, lr))
        if self.method and self.method.mirror:
            for i in self.matrices:
                self.parameters[i].mul_(mirror_factor(self.parameters[i], clipped[i], lr))
        if self.averages:
            assert self.method is not None
            assert self.method.average is not None
            # The first update of a moving average copies the weights.
            weight = torch.where(step[0] == 0, 1.0, 1.0 - self.method.average)
            torch._foreach_add_(
                self.averages, torch._foreach_mul(torch._foreach_sub(self.parameters, self.averages), weight)
            )

    def _zeros_of_each_step(self) -> list[list[int]]:
        """Return the zeros after each step: of all weights together, or of each weight if the shapes determine them."""
        assert self.controller is not None
        shared = self.controller._shared
        totals = [shared.budget.zeros(shared.config.rate(step + 1)) for step in range(self.steps)]
        if self.method is None or self.method.allocation in (None, "lamp", "normalised"):
            return [[total] for total in totals]
        shapes = {name: weight.detach().to("meta") for name, weight in shared.weights().items()}
        found = {
            total: {group.names[0]: group.zeros for group in shared.config.allocation(shapes, total, {})}
            for total in set(totals)
        }
        return [[found[total][name] for name in shapes] for total in totals]

    def _write_thresholds(self, zeros: Tensor) -> None:
        """Compute the thresholds for a number of zeros, int64 [1] or one for each weight, and write them."""
        assert self.controller is not None
        registrations = [*self.controller._shared.registrations.values()]
        weights = [each.originals[0].detach() for each in registrations]
        allocation = self.method and self.method.allocation
        if allocation in ("lamp", "normalised"):
            scores = [_SCORES[allocation](weight) for weight in weights]
            limit = _kth([scores], zeros)[0]
            zeros = torch.stack([(score <= limit).sum() for score in scores])
        sets = [weights] if len(zeros) == 1 else [[weight] for weight in weights]
        self._set_thresholds(_kth(sets, zeros).expand(len(weights)).unbind())

    def _set_thresholds(self, thresholds: tuple[Tensor, ...] | list[Tensor]) -> None:
        assert self.controller is not None
        registrations = [*self.controller._shared.registrations.values()]
        torch._foreach_copy_([each.reader.threshold for each in registrations], thresholds)
        for each in registrations:
            each.note_written()
            each.note_computed()

    def tell(self, steps: int) -> None:
        """Tell the controller how many steps were made, and freeze the masks if they are to be fixed now."""
        if self.controller is not None:
            self.controller.load_state_dict({**self.controller.state_dict(), "step_count": steps})
            if steps == self.freeze_step:
                self.controller.freeze()

    def state_after(self, steps: int) -> dict[str, Any]:
        """Return everything needed to continue, after this number of steps."""
        registrations = () if self.controller is None else self.controller._shared.registrations.values()
        thresholds = [each.reader.threshold.clone() for each in registrations]
        self.tell(steps)  # computes the thresholds with other operations, which may round differently
        model = self.model.state_dict()
        return {"model": model, "thresholds": thresholds, "momenta": self.momenta, "averages": self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_after`."""
        self.model.load_state_dict(state["model"])
        if thresholds := state["thresholds"]:
            self._set_thresholds(thresholds)
        for own, saved in ((self.momenta, state["momenta"]), (self.averages, state["averages"])):
            for tensor, value in zip(own, saved, strict=True):
                tensor.copy_(value)

    def finish(self) -> None:
        """End the training: replace the network by its moving average, where the method has one."""
        with torch.no_grad():
            if self.averages:
                torch._foreach_copy_(self.parameters, self.averages)
        self.tell(self.steps)


class _Kind(NamedTuple):
    """What determines the code of a network."""

    network: str
    width: float
    classes: int
    channels: int


@cache
def _compile(kind: _Kind, backend: str) -> tuple[list[str], Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]]:
    """Return the names of the tensors of a plain network, and the compiled loss as a function of these tensors.

    The networks of a kind differ in their tensors only, so that all use one compiled graph. Compiled one by one, each
    would take as long as the first.
    """
    run = Run(kind.network, kind.width, "dense", 0.0, 0, 1, None)
    with torch.device("meta"):
        plain = build(run, kind.classes, kind.channels).train()

    def loss(tensors: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(plain, tensors, (images,)), labels)

    names = [name for named in (plain.named_parameters(), plain.named_buffers()) for name, _ in named]
    return names, torch.compile(loss, backend=backend, fullgraph=True)


def _kth(sets: list[list[Tensor]], ks: Tensor) -> Tensor:
    device = ks.device
    found = kernels(device) if device.type == "cuda" else None
    return kth_by_digits(sets, ks, lambda n: n, found.kth) if found else kth_by_bits(sets, ks, lambda n: n)


def _lamp(weight: Tensor) -> Tensor:
    """Return the scores of `lamp_scores` without the host."""
    squares = weight.flatten().abs().sort().values.double().square()
    return (squares / squares.flip(0).cumsum(0).flip(0)).nan_to_num(0.0).float()


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "lamp": _lamp,
    "normalised": lambda weight: weight.abs() / weight.square().mean().sqrt(),
}
