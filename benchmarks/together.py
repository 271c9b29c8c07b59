"""Train many networks at once on one GPU: a CUDA graph makes a step of all of them.

The networks of a table are small, and a step of one of them leaves most of a GPU idle. Here each network has a stream
of its own, and one graph records a step of all networks: batch, forward and backward pass, update, thresholds. The host
only replays the graph. The graph reads what changes from step to step by a counter that it advances itself.

The training is that of `RunTraining`, except that the smaller last batch of an epoch is left out. On a CPU the same
operations run without a graph. `benchmarks.cifar100_table --together 8` uses it.
"""

from __future__ import annotations

import json
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.augmentation import augment
from benchmarks.cifar100_run import BATCH, Run, content
from benchmarks.network import Network, possible
from examples.data import Epoch, ImageData, TrainBatches
from examples.lock import locked
from examples.resumable import save

__all__ = ["Together", "execute", "load", "unfinished"]

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


class Together:
    """Some networks that train at once.

    Args:
        runs: their settings, with the same number of epochs.
        data: the data set, on the device.
        device: where to train.
        backend: a backend of `torch.compile` for the forward and backward passes; None for torch's own operations.
        captured: whether a CUDA graph makes the steps; without effect on a CPU.

    Attributes:
        networks: the networks, in the order of the runs.
        steps: number of steps of the training.
        steps_per_epoch: number of steps of an epoch.
        step_count: number of steps made.

    Raises:
        ValueError: there are no runs, they have different numbers of epochs, or one needs the host in its steps.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        data: ImageData,
        device: torch.device,
        *,
        backend: str | None = None,
        captured: bool = True,
    ) -> None:
        epochs = {run.epochs for run in runs}
        if len(epochs) != 1:
            raise ValueError(f"expected runs with one number of epochs, got {sorted(epochs)}; train them in groups")
        if others := [run.name for run in runs if not possible(run)]:
            raise ValueError(f"expected runs whose steps need nothing from the host, got {', '.join(others)}")
        seeds = sorted({run.seed for run in runs})
        self._batches = {seed: Batches(data, runs[0].epochs, seed) for seed in seeds}
        self.networks = [Network(run, data, device, backend) for run in runs]
        self.steps = self.networks[0].steps
        self.steps_per_epoch = self._batches[seeds[0]].steps
        self.step_count = 0
        self._device, self._captured = device, captured and device.type == "cuda"
        self._done, self._within = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
        self._streams = [torch.cuda.Stream(device) for _ in runs] if device.type == "cuda" else []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = 0  # number of steps made since the operations of a step changed

    def advance(self, count: int) -> None:
        """Make a number of steps. On a GPU the call returns before they are finished."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "nothing survives|fewer survivors")  # the results list the survivors
            warnings.filterwarnings("ignore", "The .grad attribute")  # torch.compile asks every tensor for it
            for _ in range(count):
                self._advance()

    def _advance(self) -> None:
        epoch, within = divmod(self.step_count, self.steps_per_epoch)
        if within == 0:
            for batches in self._batches.values():
                batches.load(epoch)
            self._within.zero_()
        freezing = [network for network in self.networks if network.freeze_step == self.step_count]
        for network in freezing:
            network.tell(self.step_count)
        if freezing:  # a step has other operations from now on
            self._graph, self._warm = None, 0
        if not self._captured:
            self._step()
        elif self._warm < _WARM_UP:
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                self._step()
            torch.cuda.current_stream(self._device).wait_stream(side)
        else:
            self._replay()
        self._warm += 1
        self.step_count += 1

    def _replay(self) -> None:
        if self._graph is None:
            torch.cuda.synchronize(self._device)
            graph = torch.cuda.CUDAGraph()
            # The outer context restores the stream if the recording fails. torch's context leaves its own stream then.
            with torch.cuda.stream(torch.cuda.current_stream(self._device)), torch.cuda.graph(graph):
                self._step()
            self._graph = graph
        self._graph.replay()

    def _step(self) -> None:
        """Make a step of each network, in its own stream on a GPU."""
        inputs = {seed: batches.at(self._within) for seed, batches in self._batches.items()}
        if not self._streams:
            for network in self.networks:
                network.step_on(*inputs[network.run.seed], self._done)
        else:
            main = torch.cuda.current_stream(self._device)
            for stream in self._streams:  # before any network: `main` may be one of them, as torch has 32 streams only
                stream.wait_stream(main)
            for network, stream in zip(self.networks, self._streams, strict=True):
                with torch.cuda.stream(stream):
                    network.step_on(*inputs[network.run.seed], self._done)
            for stream in self._streams:
                main.wait_stream(stream)
        self._done.add_(1)
        self._within.add_(1)

    def finish(self) -> None:
        """End the training: the controllers know the number of steps, and averages replace their networks."""
        for network in self.networks:
            network.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue at the end of an epoch."""
        return {
            "step": self.step_count,
            "networks": [network.state_after(self.step_count) for network in self.networks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for network, own in zip(self.networks, state["networks"], strict=True):
            network.load_state_dict(own)
        self.step_count = state["step"]
        self._done.fill_(self.step_count)
        self._graph, self._warm = None, 0


def execute(
    runs: Sequence[Run],
    data: ImageData,
    device: torch.device,
    folder: Path,
    *,
    backend: str | None = None,
    captured: bool = True,
    advance: Callable[[int], object] = lambda steps: None,
    stopped: Callable[[], bool] = lambda: False,
) -> bool:
    """Make some runs at once, and write the JSON file of each, as `cifar100_run.execute` does for one.

    Runs that another process has finished are not made again.

    The seconds of a run are the time of all, divided by their number.

    Args:
        runs, data, device, backend, captured: see `Together`.
        folder: folder of the JSON files and of the checkpoint.
        advance: called after each epoch with the number of steps made, of all networks together.
        stopped: called after each epoch. If it returns True, a checkpoint is saved.

    Returns:
        True if the runs are finished. False if they were stopped; the same call then continues at that epoch.

    Raises:
        BusyError: another process makes these runs.
        ValueError: the weights of a network are not finite. The other runs have their files.
    """
    with locked(_checkpoint(runs, folder)):
        if all(run.done(folder) is not None for run in runs):  # by another process in the meantime
            return True
        machine, start = timing.machine(), time.monotonic()
        group = Together(runs, data, device, backend=backend, captured=captured)
        start -= load(group, folder)
        if group.step_count:
            advance(group.step_count * len(runs))
        while group.step_count < group.steps:
            group.advance(group.steps_per_epoch)
            timing.synchronise()
            advance(group.steps_per_epoch * len(runs))
            if group.step_count < group.steps and stopped():
                seconds = time.monotonic() - start
                settings = [asdict(run) for run in runs]
                save({"runs": settings, "training": group.state_dict(), "seconds": seconds}, _checkpoint(runs, folder))
                return False
        group.finish()
        seconds = (time.monotonic() - start) / len(runs)
        errors = []
        for network in group.networks:
            try:
                result = _result(network, seconds, machine)
            except ValueError as error:
                errors.append(error)
            else:
                timing.write_whole(folder / f"{network.run.name}.json", json.dumps(result, indent=1) + "\n")
        _checkpoint(runs, folder).unlink(missing_ok=True)
        if errors:
            raise errors[0]
        return True


def load(group: Together, folder: Path) -> float:
    """Continue from the checkpoint of a group in a folder, if there is one. Return the seconds that it took so far."""
    runs = [network.run for network in group.networks]
    checkpoint = _checkpoint(runs, folder)
    if not checkpoint.is_file():
        return 0.0
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if state["runs"] != [asdict(run) for run in runs]:
        return 0.0
    group.load_state_dict(state["training"])
    return state["seconds"]


def _result(network: Network, seconds: float, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate a network after its training, bake its zeros, and return the content of its JSON file."""
    loss, accuracy = network.evaluate(network.model)
    if network.controller is not None:
        network.controller.desparsify()
    return content(network.run, network.model, accuracy, loss, seconds, machine)


def unfinished(folder: Path) -> list[list[Run]]:
    """Return the groups of runs that `execute` stopped in a folder."""
    paths = folder.glob(f"{_PREFIX}*")
    states = (torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in paths)  # reads no weights
    return [[Run(**settings) for settings in state["runs"]] for state in states]


_PREFIX = "together_"


def _checkpoint(runs: Sequence[Run], folder: Path) -> Path:
    """Return the path of the checkpoint of a group. Another group has another path."""
    return folder / f"{_PREFIX}{zlib.crc32(repr(list(runs)).encode()):08x}.checkpoint.pt"
