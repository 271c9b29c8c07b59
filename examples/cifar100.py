"""Train a network on small images to an exact sparsity, with the recipe of the Feather paper.

    python examples/cifar100.py --model=resnet20 --ptarget=0.90 --epochs=160 --sname=first
    python examples/cifar100.py --dataset=digits --epochs=20            # needs no download and no GPU
    torchrun --nproc-per-node=2 examples/cifar100.py --dataset=digits   # each process trains on half of every batch

A run writes the folder runs/<datetime>_<sname>/ (TensorBoard events, settings, results, a picture, a checkpoint) and
the file models/<datetime>_<sname>.pt, the weights of the plain network with exactly the requested number of zeros.
Ctrl-C saves a checkpoint and stops. A second Ctrl-C ends the run at once, without another checkpoint. --resume
continues the run. On a CPU with the same number of threads, the weights are then the same bit for bit. After a kill -9
it continues from the last finished epoch. A run that is killed before its first epoch has finished has no checkpoint.
A run is not resumed while another process trains it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself is not installed

from feather_param.utils import signals

if __name__ == "__main__":
    signals.end_at_once()  # on Ctrl-C during the imports, which take seconds

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import archs
import feather_param
from examples import resumable, script
from examples.data import TrainBatches, batch_loader, load_data
from examples.processes import ALONE, Processes, choose_device
from examples.resumable import UserError
from examples.run_log import RunLog
from examples.script import TrainingFailed, measured, raised_as, run
from examples.stop import Stopped, StopRequest

PROGRAM = "cifar100.py"
NETWORKS = {"resnet20": archs.resnet20, "mobilenet_v1": archs.mobilenet_v1, "densenet": archs.densenet}
MOMENTUM = 0.9
CLIP = 3.0  # largest norm of the gradient of all parameters together
EVAL_BATCH = 500
LOGGED_STEPS = 500  # of a whole run: to log a step, the program waits for the GPU
FREE = ("gpu", "no_cuda", "workers", "data_dir")  # a resumed run may change them: they do not change the result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a run.

    Raises:
        UserError: an option is unknown, out of its range, or differs from the checkpoint to resume.
    """
    parser = resumable.Parser(FREE, PROGRAM, __doc__)
    option = parser.option
    option("--gpu", 0, "index of the GPU to train on", {"at least": 0})
    help = "processes that prepare batches; 8 if given without a number. With 0 the data set is kept on the training "
    option("--workers", 0, help + "device, which is usually faster", {"at least": 0}, nargs="?", const=8)
    option("--batch-size", 128, "images in a batch; batch norm needs at least 2", {"at least": 2})
    option("--lr", 0.1, "learning rate at the start; it decreases to 0 along a cosine", {"above": 0, "below": math.inf})
    option("--wd", 5e-4, "weight decay; biases and batch norm have none", {"at least": 0, "below": math.inf})
    option("--epochs", 160, "number of epochs", {"at least": 1})
    option("--model", "resnet20", "network", choices=NETWORKS)
    option("--pthres", 0.0, "accepted for old command lines; only 0 is supported")
    option("--t1", 0, "epoch at which pruning starts; the rate is final at half of the training", {"at least": 0})
    help = "data set; ten has the first ten classes of CIFAR-100, digits needs no download"
    option("--dataset", "cifar100", help, choices=("cifar100", "cifar10", "ten", "digits"))
    option("--data-dir", "data", "folder of the data sets; a missing one is downloaded to it")
    option("--train-size", None, "train on this many images, class-balanced (all)", {"at least": 2}, type=int)
    script.add_options(parser)
    options = script.parse_options(parser, argv)

    if options.pthres != 0:
        raise UserError(f"expected --pthres to be 0, got {options.pthres}: --ptarget determines the threshold")
    if options.ptarget and 2 * options.t1 > options.epochs:
        raise UserError(
            f"expected --t1 to be at most half of --epochs, got --t1 {options.t1} and --epochs {options.epochs}: "
            "the rate grows from epoch t1 on and is final at half of the training; make it --epochs "
            f"{2 * options.t1} or more, or --t1 {options.epochs // 2} or less"
        )
    return options


class Training:
    """A network, and everything that changes it: optimizer, learning rate and sparsity.

    Args:
        options: what `parse` returns.
        batches: the training batches. They determine the data set and the number of steps.
        device: where to train.
        processes: the processes that train together. Each trains on its part of every batch.
    """

    def __init__(
        self, options: argparse.Namespace, batches: TrainBatches, device: torch.device, processes: Processes = ALONE
    ) -> None:
        torch.manual_seed(options.seed)
        self.options, self.batches, self.device, self.processes = options, batches, device, processes
        self.amp: bool = device.type == "cuda" if options.amp is None else options.amp
        self.model = self.build()
        self.controller = self.sparsify()
        # Weights are matrices or kernels. Biases and batch norm are vectors, and have no weight decay.
        weights = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": weights, "weight_decay": options.wd}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=MOMENTUM)
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=len(batches))
        self.step_count = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)  # of the steps of this epoch
        wrapped = processes.wrap(self.model)
        self.forward: Callable[[Tensor], Tensor] = torch.compile(wrapped) if options.compile else wrapped

    def network(self) -> nn.Module:
        """Return a new network on the CPU. The global seed of PyTorch determines its initialisation."""
        data = self.batches.data
        return NETWORKS[self.options.model](num_classes=data.classes, in_channels=data.channels)

    def build(self) -> nn.Module:
        """Return a new network on the device. Channels last in memory is up to a half faster on a CPU (densenet)."""
        return self.network().to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def sparsify(self) -> feather_param.Controller | None:
        """Sparsify the model to --ptarget, from epoch --t1 on. Return None if it stays dense."""
        rate, kind = self.options.ptarget, getattr(feather_param.allocations, self.options.allocation)
        if rate == 0:
            return None
        total, start = len(self.batches), self.options.t1 * self.batches.steps_per_epoch
        with raised_as(UserError, f"--ptarget {rate} cannot be reached"):
            return feather_param.sparsify(
                self.model, final_rate=rate, total_steps=total, start_step=start, allocation=kind, p=self.options.p
            )

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""
        self.model.train()
        total = len(images)
        images, labels = self.processes.part(images), self.processes.part(labels)
        images = self.batches.data.normalise(images.to(self.device, non_blocking=True))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(self.forward(images), labels.to(self.device, non_blocking=True))
        self.optimizer.zero_grad()
        # The processes average their gradients. That is the mean over the batch if each part counts by its size.
        (loss * (len(images) * self.processes.count / total)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        if self.controller is not None:
            with raised_as(TrainingFailed, f"at step {self.step_count + 1}"):  # a weight is no longer finite
                self.controller.step()
        self.scheduler.step()
        if self.step_count % self.batches.steps_per_epoch == 0:
            self.loss_sum.zero_()
        self.loss_sum += loss.detach()
        self.step_count += 1

    def progress(self) -> dict[str, float]:
        """Return the step, the mean loss of the epoch up to it, and the current rate, threshold and learning rate."""
        loss = float(self.loss_sum) / ((self.step_count - 1) % self.batches.steps_per_epoch + 1)
        return script.progress(self.step_count, loss, self.controller, self.scheduler)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Return the mean loss and the accuracy of a model on the test images. Equal weights give equal results."""
        model.eval()
        data, device = self.batches.data, self.device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        # Algorithms chosen by a benchmark may differ from call to call, and with them the last bits.
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
        with torch.inference_mode(), exact, torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp):
            for images, labels in data.test.batches(EVAL_BATCH):
                labels = labels.to(device)
                logits = model(data.normalise(images.to(device)))
                loss += F.cross_entropy(logits, labels, reduction="sum")
                correct += (logits.argmax(dim=1) == labels).sum()
        return float(loss) / len(data.test), int(correct) / len(data.test)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to continue as if there had been no interruption."""
        states = {name: part.state_dict() for name, part in self._parts().items()}
        return {**states, "step": self.step_count, "loss_sum": float(self.loss_sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step_count = state["step"]
        self.loss_sum.fill_(state["loss_sum"])

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return parts if self.controller is None else {**parts, "controller": self.controller}

    def same_zeros(self) -> bool:
        """Return whether all processes would bake the same zeros."""
        state = feather_param.baked_state_dict(self.model) if self.controller else self.model.state_dict()
        return self.processes.same(torch.cat([value.flatten() == 0 for value in state.values()]).to(torch.uint8))


def bake(training: Training, path: Path) -> dict[str, Any]:
    """Bake the zeros into the model, save its weights, and return what a new network measures that loads them.

    Raises:
        TrainingFailed: the file gives another accuracy, or another number of zeros than requested.
    """
    _, expected = training.evaluate(training.model)
    if training.controller is not None:
        feather_param.desparsify(training.model)
    resumable.save(training.model.state_dict(), path)
    plain = training.build()
    plain.load_state_dict(torch.load(path, map_location=training.device, weights_only=True))
    loss, accuracy = training.evaluate(plain)
    if accuracy != expected:
        raise TrainingFailed(
            f"expected {path} to have the test accuracy of the model in training, {expected:.4%}, got {accuracy:.4%}"
        )
    return {"accuracy": accuracy, "test_loss": loss, **measured(path, plain, training.options.ptarget)}


def train(options: argparse.Namespace, parent: Path, stop: StopRequest, processes: Processes = ALONE) -> RunLog | None:
    """Train to the end and bake, in a new folder of the parent or in that of the run to resume.

    Returns:
        The log of the run, with its results; None in all processes but the first.

    Raises:
        Stopped: a stop was requested, and the checkpoint is saved.
        TrainingFailed: the training diverged, or the saved model is not what was requested.
        UserError: the device, the data set or the checkpoint does not fit.
    """
    device = choose_device(options.no_cuda, options.gpu, processes)
    data = load_data(options.dataset, Path(options.data_dir), options.train_size)
    if not options.workers:  # worker processes would need the images on the CPU
        data = data.to(device)
    batches = TrainBatches(data, options.batch_size, options.epochs, options.seed, least=2 * processes.count)
    training = Training(options, batches, device, processes)
    with script.run_log(training, parent, PROGRAM, options.dataset, stop) as log:
        fit(training, log, stop)
        if not training.same_zeros():
            raise TrainingFailed("the processes do not agree on which weights are zero")
        if log is not None:
            report = training.controller and training.controller.report()
            results = bake(training, Path("models") / f"{log.folder.name}.pt")
            log.finish(results, report, device)
    return log


def fit(training: Training, log: RunLog | None, stop: StopRequest) -> None:
    """Train to the end, and save a checkpoint after each epoch and when a stop is requested.

    Args:
        training: the training.
        log: where to write; None in all processes but the first.
        stop: the signal.

    Raises:
        Stopped: a stop was requested, and the checkpoint is saved.
        TrainingFailed: the training diverged.
    """
    options, batches = training.options, training.batches
    bar = tqdm(total=len(batches), initial=training.step_count, desc=options.sname, unit="step", disable=log is None)
    bar.mininterval = 0.2 if sys.stderr.isatty() else 30.0
    with bar:
        for images, labels in batch_loader(batches, training.step_count, options.workers, training.device):
            training.step(images, labels)
            epoch_ended = training.step_count % batches.steps_per_epoch == 0
            stopped = training.processes.any(stop.signal is not None)
            if log is not None:
                if training.step_count % max(1, len(batches) // LOGGED_STEPS) == 0:
                    now = training.progress()
                    log.add_step(now)
                    bar.set_postfix(loss=f"{now['train_loss']:.3f}", sparsity=f"{now['rate']:.2%}", refresh=False)
                bar.update()
                if epoch_ended:
                    bar.set_description(f"{options.sname}, evaluating", refresh=sys.stderr.isatty())
                    loss, accuracy = training.evaluate(training.model)
                    log.add_epoch({**training.progress(), "test_loss": loss, "accuracy": accuracy})
                    bar.set_description(options.sname, refresh=False)
                if epoch_ended or stopped:
                    log.save_checkpoint(training.state_dict())
            if stopped:
                raise Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status: 0, 1 (failed), 2 (wrong use) or 128 + the signal that stopped it."""
    return run(PROGRAM, lambda: parse(argv), lambda *run: train(run[0], Path("runs"), *run[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
