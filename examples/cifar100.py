"""Train a network on small images to an exact sparsity, the paper's recipe.

    python examples/cifar100.py --model=resnet20 --ptarget=0.90 --epochs=160 --sname=first
    python examples/cifar100.py --dataset=digits --epochs=20            # needs no download and no GPU
    torchrun --nproc-per-node=2 examples/cifar100.py --dataset=digits   # each process learns from half of every batch

A run leaves runs/<datetime>_<sname>/ (TensorBoard events, settings, results, a picture, a checkpoint) and
models/<datetime>_<sname>.pt, the plain network's weights with exactly the promised zeros. Ctrl-C saves and stops;
--resume goes on, on a CPU with as many threads to bitwise the same weights. After a kill -9 it goes on from the last
epoch that has ended; before the first one has, there is no checkpoint and nothing to resume.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: it is not installed

from examples.checkpoints import StopRequest, load_checkpoint, make_checkpoint
from examples.datasets import Batch, ImageData, TrainBatches, load_data
from examples.pictures import draw_summary
from examples.processes import ALONE, Processes, joined
from examples.runlog import Row, RunLog, new_folder, table
from examples.settings import Settings, UserError, given_options, options, settle
from examples.training import Baked, Training, TrainingFailed, bake, save
from feather_param.reports.report import Report

__all__ = ["Outcome", "choose_device", "main", "train"]


@dataclass(frozen=True)
class Outcome:
    """A finished run: the baked model, the final state of each layer (None if dense), and how it went."""

    baked: Baked
    report: Report | None
    epochs: list[Row]
    trace: list[Row]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return its exit status."""
    parser = options(prog="cifar100.py", description=__doc__)
    try:
        given = given_options(parser, argv)
        resume = Path(given.pop("resume")) if "resume" in given else None
        if resume is not None and resume.is_dir():
            resume = resume / "checkpoint.pt"
        cuda = torch.cuda.is_available() and not given.get("no_cuda", False)
        with StopRequest() as stop, joined(cuda) as processes:
            checkpoint = None if resume is None else load_checkpoint(resume)
            settings = settle(given, checkpoint and checkpoint["settings"])
            device, note = choose_device(settings, processes)
            if note and processes.first:
                print(note, file=sys.stderr)
            data = load_data(settings.dataset, Path(settings.data_dir), settings.train_size)
            if not processes.first:
                return follow(settings, data, device, stop, checkpoint, processes)
            folder = new_folder(Path("runs"), settings.sname) if resume is None else resume.parent
            outcome = train(settings, data, device, folder, stop, checkpoint, processes)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # it is the same in all processes
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except (TrainingFailed, OSError) as error:
        print(f"{parser.prog}: failed: {error}", file=sys.stderr)
        return 1
    if outcome is None:
        launcher = "python" if processes.count == 1 else f"torchrun --nproc-per-node={processes.count}"
        print(f"stopped; to go on: {launcher} {sys.argv[0]} --resume '{folder / 'checkpoint.pt'}'")
        return 128 + (stop.signal or signal.SIGINT)
    print(table(outcome.baked, outcome.report, outcome.seconds))
    print(f"run folder     {folder}")
    return 0


def choose_device(settings: Settings, processes: Processes = ALONE) -> tuple[torch.device, str | None]:
    """Return the device to train on, and what to tell the user about it; processes take the GPUs from --gpu on."""
    if settings.no_cuda:
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        return torch.device("cpu"), "there is no CUDA on this machine: training on the CPU"
    gpu = settings.gpu + processes.local_rank
    if gpu >= torch.cuda.device_count():
        raise UserError(f"expected --gpu to be below {torch.cuda.device_count()}, the number of GPUs, got {gpu}")
    torch.cuda.set_device(gpu)
    return torch.device("cuda", gpu), None


def train(
    settings: Settings,
    data: ImageData,
    device: torch.device,
    folder: Path,
    stop: StopRequest,
    checkpoint: dict[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Outcome | None:
    """Train from the beginning or from a checkpoint to the end, and bake.

    Args:
        settings: the run's settings.
        data: its data set.
        device: where to train.
        folder: the run's folder; the model goes to ``models/`` under the same name.
        stop: asked after each step.
        checkpoint: the checkpoint to go on from.
        processes: this one, the first, and those that `follow`.

    Returns:
        What came out; None if a stop was requested, and then the folder's checkpoint is of the last step.

    Raises:
        UserError: the checkpoint does not fit.
        TrainingFailed: the training diverged, or the model is not what was promised.
    """
    batches, training = _start(settings, data, device, checkpoint, processes)
    resumed = None if checkpoint is None else (checkpoint["log"], training.step_count)

    with closing(RunLog(folder, settings, training.total_steps, resumed, processes.count)) as log:

        def save_checkpoint() -> None:
            content = make_checkpoint(asdict(settings), training.state_dict(), log.state_dict())
            save(content, folder / "checkpoint.pt")

        with _progress_bar(settings, training) as bar:
            for images, labels in _loader(batches, training, settings):
                loss = training.step(images, labels)
                if log.add_step(training, loss):
                    rate = 0.0 if training.controller is None else training.controller.rate
                    bar.set_postfix(loss=f"{log.loss:.3f}", sparsity=f"{rate:.2%}", refresh=False)
                bar.update()
                if training.step_count % batches.steps_per_epoch == 0:
                    bar.set_description(f"{settings.sname}, evaluating", refresh=sys.stderr.isatty())
                    log.add_epoch(training, training.evaluate(batches.data.test))
                    save_checkpoint()
                    bar.set_description(settings.sname, refresh=False)
                if processes.any(stop.signal is not None):
                    save_checkpoint()
                    return None

        if not training.agrees():
            raise TrainingFailed("the processes do not agree on which weights are zero")
        report = None if training.controller is None else training.controller.report()
        baked = bake(training, settings, batches.data, Path("models") / f"{folder.name}.pt")
        seconds = log.write_results(baked, report, device)
        title = f"{settings.sname}: {settings.model} on {settings.dataset}, {baked.score.accuracy:.2%} right"
        title += " (dense)" if report is None else f" with {baked.zeros / baked.total:.1%} zeros"
        draw_summary(folder / "summary.png", title, log.epochs, log.trace, report)
        return Outcome(baked, report, log.epochs, log.trace, seconds)


def follow(
    settings: Settings,
    data: ImageData,
    device: torch.device,
    stop: StopRequest,
    checkpoint: dict[str, Any] | None,
    processes: Processes,
) -> int:
    """Train along with the first process, which runs `train`; return the exit status."""
    batches, training = _start(settings, data, device, checkpoint, processes)
    for images, labels in _loader(batches, training, settings):
        training.step(images, labels)
        if processes.any(stop.signal is not None):
            return 128 + (stop.signal or signal.SIGINT)
    training.agrees()
    return 0


def _start(
    settings: Settings,
    data: ImageData,
    device: torch.device,
    checkpoint: dict[str, Any] | None,
    processes: Processes,
) -> tuple[TrainBatches, Training]:
    """Return the batches and the training, where the checkpoint left it."""
    if not settings.workers:  # nobody else has to reach the images: keep them where they are needed
        data = replace(data, train=data.train.to(device), test=data.test.to(device))
    batches = TrainBatches(data, settings.batch_size, settings.epochs, settings.seed, least=2 * processes.count)
    training = Training(settings, data, device, batches.steps_per_epoch, processes)
    if checkpoint is not None:
        try:
            training.load_state_dict(checkpoint["training"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            what = str(error).partition("\n")[0]  # a wrong network names all its tensors, on lines of their own
            raise UserError(f"expected a checkpoint of this network and data set, got another: {what}") from error
    return batches, training


def _loader(batches: TrainBatches, training: Training, settings: Settings) -> DataLoader[Batch]:
    """Return the batches that are still to come, made by worker processes where the settings ask for them."""
    return DataLoader(
        batches,
        batch_size=None,  # an item is a batch
        sampler=range(training.step_count, training.total_steps),
        num_workers=settings.workers,
        pin_memory=settings.workers > 0 and training.device.type == "cuda",
        worker_init_fn=_leave_interrupts_to_the_trainer,
        generator=torch.Generator(),  # else the loader would draw from the global one
    )


def _leave_interrupts_to_the_trainer(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, but the trainer still needs its workers for a moment.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _progress_bar(settings: Settings, training: Training) -> tqdm:
    """Return one bar over all steps of the run; a log file gets a line every half a minute."""
    return tqdm(
        total=training.total_steps,
        initial=training.step_count,
        desc=settings.sname,
        unit="step",
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30.0,
    )


if __name__ == "__main__":
    raise SystemExit(main())
