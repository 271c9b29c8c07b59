"""Train a network of torchvision on an ImageNet folder to an exact sparsity, with torchvision's reference recipe.

    torchrun --nproc-per-node=8 examples/imagenet.py --data-dir=IMAGENET --ptarget=0.90
    torchrun --nproc-per-node=8 examples/imagenet.py --data-dir=IMAGENET --recipe=v2 --parallel=fsdp
    python examples/imagenet.py --data-dir=IMAGENET --model=resnet18     # one process, for example with one GPU

IMAGENET holds train/<class>/*.JPEG and val/<class>/*.JPEG. Nothing is downloaded.

A run writes the folder runs/<datetime>_<sname>/ (TensorBoard events, settings, results, a picture, a checkpoint) and
the file models/<datetime>_<sname>.pt, the weights of the plain network with exactly the requested number of zeros. With
--recipe=v2, models/<datetime>_<sname>_ema.pt has those of the moving average, with as many zeros.
Ctrl-C saves a checkpoint and stops. --resume continues the run, with the same number of processes. On a CPU with the
same number of threads, the weights are then the same bit for bit. A kill -9 loses the running epoch, and so does a
second Ctrl-C. Under torchrun, there is no second one, and Ctrl-C has 30 seconds to save, after which torchrun ends the
processes: a run that prints no "stopped" also resumes.

What 90 epochs of ResNet-50 (v1) cost: at most 11.9 hours of 8 NVIDIA H200, or 6.5 hours dense (--ptarget=0), for the
steps alone. This is computed, not measured: 900,821 steps with batch 16 a GPU, and a step of one GPU takes 0.0476 s
(dense 0.0260 s), not compiled, in bfloat16. Such a step waits for the host, which launches the kernels, so larger
batches should cost less. Batch 32 (the default), larger ones and --compile were not measured. The time to load images,
to exchange gradients and to validate was not measured either, and comes on top.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository itself is not installed

from feather_param.utils import signals

if __name__ == "__main__":
    signals.end_at_once()  # on Ctrl-C during the imports, which take seconds

import argparse
import difflib
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from tqdm import tqdm

from examples import resumable, script
from examples.imagenet_data import ImageNet
from examples.imagenet_recipe import RECIPES
from examples.imagenet_training import Training
from examples.processes import ALONE, Processes, choose_device
from examples.resumable import UserError
from examples.run_log import RunLog
from examples.script import TrainingFailed, measured, run
from examples.stop import Stopped, StopRequest
from feather_param.reports.history import History

PROGRAM = "imagenet.py"
LOGGED_STEPS = 2000  # of a whole run: to log a step, the program waits for the GPU
FREE = ("no_cuda", "workers", "data_dir")  # a resumed run may change them: they do not change the result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a run.

    Raises:
        UserError: an option is unknown, out of its range, or differs from the checkpoint to resume.
    """
    parser = resumable.Parser(FREE, PROGRAM, __doc__)
    option = parser.option
    option("--data-dir", "imagenet", "folder that holds train and val")
    option("--model", "resnet50", "network: any name of torchvision.models.list_models(torchvision.models)")
    help = "v1: SGD with steps of the learning rate, crops and flips; v2 adds a cosine with warm-up, label smoothing, "
    help += "mixup, cutmix, TrivialAugment, random erasing, norms without weight decay, and a moving average (EMA)"
    option("--recipe", "v1", help, choices=RECIPES)
    option("--epochs", None, "number of epochs (v1: 90, v2: 600)", {"at least": 1}, type=int)
    help = "number of training images in a batch of each process (v1: 32, v2: 128); batch norm needs at least 2"
    option("--batch-size", None, help, {"at least": 2}, type=int)
    help = "learning rate (v1: 0.1, v2: 0.5, both for 8 processes; scale it with the images of all batches together)"
    option("--lr", None, help, {"above": 0, "below": math.inf}, type=float)
    help = "width of a training image (v1: 224, v2: 176); "
    help += "validation images are as wide (v1) or 224/176 times as wide (v2)"
    option("--image-size", None, help, {"at least": 8}, type=int)
    help = "how several processes train: ddp, or fsdp (fully_shard) with weights divided over them"
    option("--parallel", "ddp", help, choices=("ddp", "fsdp"))
    help = "processes that read images, for each process that trains"
    option("--workers", min(8, os.cpu_count() or 1), help, {"at least": 0})
    script.add_options(parser)
    return checked(script.parse_options(parser, argv))


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options with the values of the recipe where none are given.

    Raises:
        UserError: two options do not fit together, or the network is unknown.
    """
    recipe = RECIPES[options.recipe]
    values = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "lr": recipe.lr}
    for name, value in {**values, "image_size": recipe.train_crop_size}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    names = torchvision.models.list_models(module=torchvision.models)
    if options.model not in names:
        close = difflib.get_close_matches(options.model, names) or ["resnet50"]
        raise UserError(
            f"expected --model to be a network of torchvision, got {options.model!r}; do you mean {close[0]}?"
        )
    if options.parallel == "fsdp" and options.compile:
        raise UserError("expected --compile without --parallel fsdp, got both, which has not been tried: drop one")
    if options.parallel == "fsdp" and options.allocation == "lamp":
        raise UserError("expected whole weights for --allocation lamp, got --parallel fsdp: use --parallel ddp")
    return options


def start(options: argparse.Namespace, processes: Processes) -> Training:
    """Return the training at its start.

    Raises:
        UserError: the device, the folder or the network does not fit.
    """
    if options.parallel == "fsdp" and processes.count == 1:
        raise UserError("expected several processes for --parallel fsdp, got one: start it with torchrun, or use ddp")
    device = choose_device(options.no_cuda, 0, processes)
    folder, recipe = Path(options.data_dir), RECIPES[options.recipe]
    data = ImageNet(folder, recipe, options.image_size, options.batch_size, options.seed, processes)
    return Training(options, data, device, processes)


def train(options: argparse.Namespace, parent: Path, stop: StopRequest, processes: Processes = ALONE) -> str | None:
    """Train to the end and bake, in a new folder of the parent or in that of the run to resume.

    Returns:
        The results as text; None in all processes but the first.

    Raises:
        Stopped: a stop was requested, and the checkpoint is saved.
        TrainingFailed: the training diverged, or a saved model is not what was requested.
        UserError: the device, the folder, the network or the checkpoint does not fit.
    """
    training = start(options, processes)
    with script.run_log(training, parent, PROGRAM, "ImageNet", stop) as log:
        fit(training, stop, log)
        report = training.controller and training.controller.report()
        results = bake(training, "" if log is None else log.folder.name)
        if log is None:
            return None
        log.finish(results, report, training.device)
        ema = results.get("ema")
        return f"{log}" + (f"\nEMA            {ema['accuracy']:.2%} test accuracy: {ema['model']}" if ema else "")


def fit(training: Training, stop: StopRequest, log: RunLog | None) -> None:
    """Train and evaluate all epochs that are left. Arguments and errors are those of `train_epoch`."""
    options, controller, images = training.options, training.controller, training.data.images_per_step
    # The log reads masks. If the weights are divided over the processes, all of them must take part.
    history = History(controller) if controller is not None and training.sharded and log is None else None
    done, total = training.step_count * images, training.steps * images
    bar = tqdm(total=total, initial=done, desc=options.sname, unit="img", unit_scale=True, disable=log is None)
    bar.mininterval = 0.2 if sys.stderr.isatty() else 30.0
    with bar:
        while training.epoch < options.epochs:
            train_epoch(training, stop, log, bar)
            evaluate_epoch(training, log, history, bar)


def train_epoch(training: Training, stop: StopRequest, log: RunLog | None, bar: tqdm[Any]) -> None:
    """Train to the end of the epoch, or until one process has received a signal, and save a checkpoint.

    The checkpoint is saved before the evaluation: `torchrun` ends a process 30 seconds after a Ctrl-C, and an
    evaluation may take longer. A run that is ended in an evaluation evaluates again when it is resumed.

    Args:
        training: the training.
        stop: the signal.
        log: where to write; None in all processes but the first.
        bar: the progress bar.

    Raises:
        Stopped: a stop was requested, and the checkpoint is saved.
        TrainingFailed: the training diverged.
    """
    stopped = False
    for batch in training.batches():
        training.step(batch)
        bar.update(training.data.images_per_step)
        if training.step_count % max(1, training.steps // LOGGED_STEPS) == 0:
            now = training.progress()
            bar.set_postfix(loss=f"{now['train_loss']:.3f}", sparsity=f"{now['rate']:.2%}", refresh=False)
            if log is not None:
                log.add_step(now)
        stopped = training.processes.any(stop.signal is not None)
        if stopped:
            break
    state = training.state_dict()
    if log is not None:
        log.save_checkpoint(state)
    if stopped:
        raise Stopped


def evaluate_epoch(training: Training, log: RunLog | None, history: History | None, bar: tqdm[Any]) -> None:
    """Evaluate at the end of an epoch, and record the masks.

    Args:
        training: the training.
        log: where to write; None in all processes but the first.
        history: one that is not written, in a process that only takes part in gathering the masks.
        bar: the progress bar.
    """
    bar.set_description(f"{training.options.sname}, evaluating", refresh=sys.stderr.isatty())
    row = training.end_epoch()
    if log is not None:
        log.add_epoch(row)
    elif history is not None:
        history.record()
    bar.set_description(training.options.sname, refresh=False)


def bake(training: Training, name: str) -> dict[str, Any]:
    """Save the plain network, and that of the moving average, and return what they measure once they are loaded again.

    Call this in all processes. The first one writes the files.

    Raises:
        TrainingFailed: a file gives another accuracy, or another number of zeros than requested, or the processes do
            not agree on the zeros.
    """
    expected = training.evaluate(training.model)["accuracy"]
    results = saved(training, training.model, Path("models") / f"{name}.pt")
    if results["accuracy"] != expected:
        raise TrainingFailed(
            f"expected {results['model']} to have the test accuracy of the model in training, {expected:.4%}, got "
            f"{results['accuracy']:.4%}"
        )
    if training.ema is not None:
        results["ema"] = saved(training, training.ema.module, Path("models") / f"{name}_ema.pt")
    return results


def saved(training: Training, model: torch.nn.Module, path: Path) -> dict[str, Any]:
    """Save a model without its parametrizations, and return what a new network measures that loads the file."""
    state = training.plain_state(model)
    zeros = torch.cat([value.flatten() == 0 for value in state.values()]).to(torch.uint8)
    if not training.processes.same(zeros):
        raise TrainingFailed("the processes do not agree on which weights are zero")
    if training.processes.first:
        resumable.save(state, path)
        state = torch.load(path, weights_only=True)
    plain = training.plain(state)
    results = training.evaluate(plain)
    return {**results, **measured(path, plain, training.options.ptarget)} if training.processes.first else results


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status: 0, 1 (failed), 2 (wrong use) or 128 + the signal that stopped it."""
    torch.backends.cudnn.benchmark = True  # as the reference script; an evaluation switches it off
    return run(PROGRAM, lambda: parse(argv), lambda *run: train(run[0], Path("runs"), *run[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
