"""The options of the training script: what they are, what they may be, and where they come from on a resume."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

__all__ = ["FREE", "Settings", "UserError", "given_options", "options", "settle"]


class UserError(Exception):
    """Something that the user can put right; the message is one sentence that says how."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


@dataclass(frozen=True)
class Settings:
    """One training run. The options of the same names are described in `options`."""

    gpu: int = 0
    no_cuda: bool = False
    workers: int = 0
    batch_size: int = 128
    lr: float = 0.1
    wd: float = 5e-4
    epochs: int = 160
    model: str = "resnet20"
    ptarget: float = 0.95
    pthres: float = 0.0
    t1: int = 0
    sname: str = "run"
    dataset: str = "cifar100"
    data_dir: str = "data"
    train_size: int | None = None
    seed: int = 0
    amp: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        """Refuse what no training could be made of."""
        _expect(self.gpu >= 0, "--gpu", "a number of a GPU from 0 on", self.gpu)
        _expect(self.workers >= 0, "--workers", "at least 0", self.workers)
        _expect(
            self.batch_size >= 2, "--batch-size", "at least 2, batch norm needs more than one image", self.batch_size
        )
        _expect(0 < self.lr < math.inf, "--lr", "above 0", self.lr)
        _expect(0 <= self.wd < math.inf, "--wd", "at least 0", self.wd)
        _expect(self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        _expect(0 <= self.ptarget < 1, "--ptarget", "a fraction of zeros in [0, 1), where 0 trains dense", self.ptarget)
        if self.pthres != 0:
            raise UserError(
                f"expected --pthres to be 0, got {self.pthres}: a threshold set by hand is not supported, "
                "because the rate given by --ptarget decides it"
            )
        _expect(self.t1 >= 0, "--t1", "at least 0", self.t1)
        if self.ptarget and 2 * self.t1 > self.epochs:
            raise UserError(
                f"expected --t1 to be at most half of --epochs, got --t1 {self.t1} and --epochs {self.epochs}: "
                "the rate grows from epoch t1 on and is final at half of the training; make it --epochs "
                f"{2 * self.t1} or more, or --t1 {self.epochs // 2} or less"
            )
        if not self.sname or any(character in self.sname for character in "/\\\0"):
            raise UserError(f"expected --sname to be a file name without slashes, got {self.sname!r}")
        _expect(self.train_size is None or self.train_size >= 2, "--train-size", "at least 2 images", self.train_size)
        _expect(0 <= self.seed < 2**63, "--seed", "a non-negative 64-bit number", self.seed)


def _expect(right: bool, option: str, what: str, got: Any) -> None:
    if not right:
        raise UserError(f"expected {option} to be {what}, got {got}")


# What a resumed run may change: where the work is done, not what is computed.
FREE = ("gpu", "no_cuda", "workers", "data_dir")


def options(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the options, the fields of `Settings` and ``--resume``."""
    parser = _Parser(prog=prog, description=description, formatter_class=_Formatter)
    default = Settings()

    def add(name: str, help: str, **keywords: Any) -> None:
        value = getattr(default, name.removeprefix("--").replace("-", "_"))
        parser.add_argument(name, default=argparse.SUPPRESS if value is None else value, help=help, **keywords)

    add("--gpu", "number of the GPU to train on", type=int, metavar="N")
    add("--no-cuda", "train on the CPU", action="store_true")
    add(
        "--workers",
        "processes that prepare batches; 8 if given without a number. With 0 the data set lives on the training "
        "device, which is usually faster",
        type=int,
        nargs="?",
        const=8,
        metavar="N",
    )
    add("--batch-size", "images in a batch", type=int, metavar="N")
    add("--lr", "learning rate at the start; it falls to 0 along a cosine", type=float, metavar="X")
    add("--wd", "weight decay, of the weights only: not of biases and batch norm", type=float, metavar="X")
    add("--epochs", "number of epochs", type=int, metavar="N")
    add("--model", "network", choices=("resnet20", "mobilenet_v1", "densenet"))
    add(
        "--ptarget", "final rate: fraction of zeros among all prunable weights; 0 trains dense", type=float, metavar="X"
    )
    add("--pthres", "kept for old command lines; only 0 is supported", type=float, metavar="X")
    add("--t1", "epoch at which pruning starts", type=int, metavar="N")
    add("--sname", "name of the run", metavar="NAME")
    add("--dataset", "data set; digits needs no download", choices=("cifar100", "cifar10", "digits"))
    add("--data-dir", "folder in which the data sets lie, or to which they are downloaded", metavar="DIR")
    add(
        "--train-size",
        "train on this many images, a fixed class-balanced subset; all unless given",
        type=int,
        metavar="N",
    )
    add("--seed", "seed of the initialisation, the order of the images and their augmentation", type=int, metavar="N")
    add(
        "--amp",
        "compute in bfloat16 where that is safe (autocast); done on a GPU unless told otherwise",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--compile",
        "train through torch.compile, which first takes minutes on a CPU: for long runs",
        action="store_true",
    )
    free = ", ".join("--" + name.replace("_", "-") for name in FREE)
    parser.add_argument(
        "--resume",
        metavar="CHECKPOINT",
        default=argparse.SUPPRESS,
        help="go on from runs/.../checkpoint.pt (or just runs/...), in the same folder. The settings come from the "
        f"checkpoint and need not be repeated; one that is given and differs is refused, except {free}",
    )
    return parser


def settle(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings of a run.

    Args:
        given: what the command line names.
        saved: the settings of the checkpoint to resume.

    Raises:
        UserError: a value is out of its range, or contradicts the checkpoint.
    """
    if saved is None:
        return Settings(**given)
    names = {field.name for field in fields(Settings)}
    if saved.keys() != names:
        raise UserError("expected the settings of this script in the checkpoint, got those of another version")
    for name, value in given.items():
        if name not in FREE and value != saved[name]:
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"expected {option} to be {saved[name]} as in the run to resume, got {value}: leave the option out, "
                "or start a new run"
            )
    return Settings(**{**saved, **given})


def given_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line and return the options that it names, without the defaults.

    Raises:
        UserError: an option is unknown, or its value is none of the allowed.
    """
    absent = object()
    names = [*asdict(Settings()), "resume"]
    # argparse fills in a default only where the attribute is missing.
    namespace = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    return {name: value for name, value in vars(namespace).items() if value is not absent}
