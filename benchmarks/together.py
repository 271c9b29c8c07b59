"""Train many networks at once on one GPU: a CUDA graph makes a step of all of them.

The networks of a table are small, and a step of one of them leaves most of a GPU idle. Here each network has a stream
of its own, and one graph records a step of all networks: batch, forward and backward pass, update, thresholds. The host
only replays the graph. The numbers that change from step to step (learning rates, numbers of zeros) are in tables on
the device. The graph reads them by a counter that it advances itself.

The training is that of `RunTraining`, except that the smaller last batch of an epoch is left out. On a CPU the same
operations run without a graph. `benchmarks.cifar100_table --together 12` makes its runs in this way.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from benchmarks.augmentation import augment
from benchmarks.cifar100_run import BATCH, Run, RunTraining, content
from benchmarks.methods import METHODS, mirror_factor
from examples.cifar100 import CLIP, MOMENTUM
from examples.data import Epoch, ImageData, TrainBatches
from feather_param.core.freezing import restore_zeros
from feather_param.ops.gpu_kernels import kernels
from feather_param.ops.kth_gpu import kth_by_bits, kth_by_digits

__all__ = ["Network", "execute", "possible", "train"]

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# (the thresholds are written as the controller does, but without the host; `torch._foreach_*` have no public names)


def possible(run: Run) -> bool:
    """Return whether the steps of a run need nothing from the host. Guards and a function theta do."""
    method = METHODS.get(run.method)
    return method is None or not (method.guard or callable(method.theta))


_WARM_UP = 3  # steps before the graph is recorded: they choose algorithms and compile kernels


class Batches:
    """The batches of one seed. The random numbers of an epoch are on the device, where the graph reads them."""

    def __init__(self, data: ImageData, epochs: int, seed: int) -> None:
        self.data = data
        self.steps = len(data.train) // BATCH  # in an epoch
        self._epochs = TrainBatches(data, BATCH, epochs, seed, least=BATCH)
        first = self._epochs.draw(0)
        self._drawn = Epoch(first.order.clone(), first.shifts.clone(), first.flips.clone())
        self._dtype = torch.bfloat16 if data.train.images.is_cuda else torch.float32

    def load(self, epoch: int) -> None:
        """Put the random numbers of an epoch in their place."""
        drawn = self._epochs.draw(epoch)
        self._drawn.order.copy_(drawn.order)
        self._drawn.shifts.copy_(drawn.shifts)
        self._drawn.flips.copy_(drawn.flips)

    def at(self, step: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels of a step of the epoch, given as int64 [1]."""
        images = augment(self.data, self._drawn, step, BATCH, self._dtype)
        chosen = self._drawn.order[: self.steps * BATCH].view(self.steps, BATCH).index_select(0, step)[0]
        return images, self.data.train.labels.index_select(0, chosen)


class Network(RunTraining):
    """A network whose steps need nothing from the host."""

    def __init__(self, run: Run, data: ImageData, device: torch.device) -> None:
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

    @property
    def freeze_step(self) -> int | None:
        """The number of steps after which the masks are fixed; None for never."""
        return next(
            (step for step in range(self.steps) if self.method and self.method.freezes_after(step, self.steps)), None
        )

    def step_on(self, images: Tensor, labels: Tensor, step: Tensor) -> None:
        """Make a step, whose number is given as int64 [1]."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=self.amp, cache_enabled=False):
            loss = F.cross_entropy(self.model(images), labels)
        gradients = [*torch.autograd.grad(loss, self.parameters)]
        with torch.no_grad():
            self.loss.copy_(loss)
            self._update(gradients, self.lr.index_select(0, step)[0], step)
            if self.controller is not None and self.controller._shared.frozen:
                restore_zeros(self.controller._shared)
            elif self.zeros is not None:
                self._write_thresholds(self.zeros.index_select(0, step)[0])

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
        thresholds = _kth(sets, zeros).expand(len(weights)).unbind()
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

    def finish(self) -> None:
        """End the training: replace the network by its moving average, where the method has one."""
        with torch.no_grad():
            if self.averages:
                torch._foreach_copy_(self.parameters, self.averages)
        self.tell(self.steps)


def execute(runs: Sequence[Run], data: ImageData, device: torch.device, folder: Path) -> None:
    """Make some runs at once, and write the JSON file of each, as `cifar100_run.execute` does for one.

    The seconds of a run are the time of all, divided by their number.
    """
    machine, start = timing.machine(), time.monotonic()
    networks = train(runs, data, device)
    seconds = (time.monotonic() - start) / len(networks)
    for network in networks:
        loss, accuracy = network.evaluate(network.model)
        if network.controller is not None:
            network.controller.desparsify()
        result = content(network.run, network.model, accuracy, loss, seconds, machine)
        timing.write_whole(folder / f"{network.run.name}.json", json.dumps(result, indent=1) + "\n")


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


def train(
    runs: Sequence[Run],
    data: ImageData,
    device: torch.device,
    progress: Callable[[int, int, float], None] = lambda step, steps, rate: None,
    most_steps: int | None = None,
) -> list[Network]:
    """Train the networks of some runs with the same number of epochs, and return them.

    Args:
        runs: the settings.
        data: the data set, on the device.
        device: where to train.
        progress: called after each epoch with the steps made, all steps, and the steps in a second.
        most_steps: stop after this many steps.
    """
    epochs, seeds = runs[0].epochs, sorted({run.seed for run in runs})
    batches = {seed: Batches(data, epochs, seed) for seed in seeds}
    networks = [Network(run, data, device) for run in runs]
    steps, an_epoch = networks[0].steps, batches[seeds[0]].steps
    freezes = {network.freeze_step for network in networks}
    done, within = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in networks] if device.type == "cuda" else []

    def step_all() -> None:
        inputs = {seed: batches[seed].at(within) for seed in seeds}
        if not streams:
            for network in networks:
                network.step_on(*inputs[network.run.seed], done)
        else:
            main = torch.cuda.current_stream(device)
            for network, stream in zip(networks, streams, strict=True):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    network.step_on(*inputs[network.run.seed], done)
            for stream in streams:
                main.wait_stream(stream)
        done.add_(1)
        within.add_(1)

    graph: torch.cuda.CUDAGraph | None = None
    start = time.monotonic()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing survives|fewer survivors")  # the results list the survivors
        for at in range(steps if most_steps is None else min(steps, most_steps)):
            if at % an_epoch == 0:
                for seed in seeds:
                    batches[seed].load(at // an_epoch)
                within.zero_()
                if at:
                    if streams:
                        torch.cuda.synchronize(device)
                    progress(at, steps, at / (time.monotonic() - start))
            if at in freezes:
                for network in networks:
                    if network.freeze_step == at:
                        network.tell(at)
                graph = None
            if not streams:
                step_all()
            elif at < _WARM_UP:
                side = torch.cuda.Stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    step_all()
                torch.cuda.current_stream(device).wait_stream(side)
            else:
                if graph is None:
                    torch.cuda.synchronize(device)
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        step_all()
                graph.replay()
        for network in networks:
            network.finish()
    if streams:
        torch.cuda.synchronize(device)
    progress(steps, steps, steps / (time.monotonic() - start))
    return networks
