"""The command ``feather-param``: report, bake, compress, expand and time checkpoint files."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

import feather_param
from feather_param.cli.architecture import build, load
from feather_param.cli.bake import baked_tensors
from feather_param.cli.file_report import as_json, as_text, counted, in_training, notes, zeros
from feather_param.cli.progress import Progress
from feather_param.cli.streams import open_closed_streams, print_result
from feather_param.core.state_dict import dense_beside_pruned
from feather_param.files.atomic import atomic_write
from feather_param.files.checkpoint import Checkpoint, read
from feather_param.files.errors import errors_name, errors_of_memory
from feather_param.files.sizes import file_sizes
from feather_param.files.tied import first_names, untied
from feather_param.reports import page
from feather_param.utils.extras import extra
from feather_param.utils.signals import EndOnSignal, Signalled, discard_unwritten, last_words
from feather_param.utils.text import LONGEST_MESSAGE, listed, percent, printable

_PROGRAM = "feather-param"
_TORCH = (".pt", ".pth", ".bin")
_SAFETENSORS = ".safetensors"
_EPILOG = """\
exit status: 0 done, 1 a file cannot be processed, 2 wrong usage, 129 hung up, 130 interrupted, 141 nobody reads the
output, 143 terminated.
The result goes to stdout, everything else to stderr. IN and FILE are files of torch.save, safetensors files or
sparse files. The content of a file tells its format, not its name. Files of torch.save are read with
weights_only=True: no code in them is run.
"""


class _Usage(Exception):
    """The command line is wrong. The message says why."""


class _Failed(Exception):
    """A file cannot be processed. The message says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Usage(f"{message}; see {self.prog} --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the text of --help or --version. The method of argparse ignores errors."""
        print_result(message, end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Example:
        >>> import contextlib, io
        >>> with contextlib.redirect_stderr(io.StringIO()) as said:
        ...     main(["report", "nowhere.pt"])
        1
        >>> said.getvalue()
        'feather-param: error: nowhere.pt: No such file or directory\\n'
    """
    open_closed_streams()
    try:
        with EndOnSignal(), errors_of_memory():
            arguments = _parser().parse_args(argv)
            print_result(arguments.run(arguments))
            return 0
    except SystemExit as done:  # after --help and --version
        return int(done.code or 0)
    except _Usage as error:
        return _fail(error, 2)
    except BrokenPipeError:
        discard_unwritten()
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error, 1)
    except MemoryError:
        return _fail("out of memory", 1)
    except (_Failed, ValueError, TypeError, ImportError) as error:
        return _fail(error, 1)
    except Signalled as error:
        return _fail(error, error.status)


def _fail(message: object, status: int) -> int:
    last_words(f"{_PROGRAM}: error: {printable(message, LONGEST_MESSAGE)}")
    return status


def _note(message: str) -> None:
    last_words(f"{_PROGRAM}: note: {printable(message, LONGEST_MESSAGE)}")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROGRAM,
        description="Report the zeros of checkpoint files, bake them, and store them without the zeros.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {feather_param.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="zeros of each weight, and the file's size in other formats")
    report.add_argument("file", metavar="FILE", type=Path)
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    report.add_argument("--html", metavar="OUT", type=Path, help="also write an HTML page (needs feather_param[plot])")
    report.add_argument(
        "--no-sizes",
        action="store_true",
        help="do not measure the size in other formats, which takes seconds for a large file",
    )
    report.set_defaults(run=_report)

    bake = commands.add_parser("bake", help="write the plain, sparse weights of a checkpoint of a model in training")
    bake.add_argument("file", metavar="IN", type=Path)
    bake.add_argument("out", metavar="OUT", type=Path, help=f"ends in {', '.join(_TORCH)} or {_SAFETENSORS}")
    bake.set_defaults(run=_bake)

    compress = commands.add_parser("compress", help="write a checkpoint as a sparse file")
    compress.add_argument("file", metavar="IN", type=Path)
    compress.add_argument("out", metavar="OUT", type=Path, help="the sparse file, *.safetensors for example")
    compress.add_argument(
        "--zstd", action="store_true", help="also compress with zstandard (needs feather_param[files])"
    )
    compress.set_defaults(run=_compress)

    expand = commands.add_parser("expand", help="write a sparse file as a dense checkpoint")
    expand.add_argument("file", metavar="IN", type=Path)
    expand.add_argument("out", metavar="OUT", type=Path, help=f"ends in {', '.join(_TORCH)} or {_SAFETENSORS}")
    expand.set_defaults(run=_expand)

    bench = commands.add_parser("bench", help="time a network dense and sparse on this CPU")
    bench.add_argument("file", metavar="IN", type=Path)
    bench.add_argument(
        "--arch",
        metavar=("MODULE:FUNCTION", "NAME=VALUE"),
        nargs="+",
        required=True,
        help="the function that builds the network, and its arguments: torchvision.models:resnet50 num_classes=10",
    )
    bench.add_argument(
        "--input", metavar="SHAPE", type=_shape, required=True, help="the shape of the input: 1x3x224x224"
    )
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(run=_bench)

    for command in (report, bake, compress, bench):
        command.add_argument("--key", help="the key of the state_dict in a torch file: training.model")
    return parser


def _report(arguments: argparse.Namespace) -> str:
    path: Path = arguments.file
    if arguments.html:
        _check_out(path, arguments.html)
        extra("matplotlib.figure")  # an ImportError now, and not after the sizes are measured
    checkpoint = _read(path, arguments.key)
    report, remarks = zeros(checkpoint), notes(checkpoint)
    with Progress() as progress:
        sizes = {} if arguments.no_sizes else file_sizes(counted(checkpoint), progress)
    if arguments.html:
        with atomic_write(arguments.html) as file:
            file.write(page(report, sizes=sizes, title=path.name).encode())
    nbytes = path.stat().st_size
    for remark in remarks:
        _note(remark)
    if arguments.json:
        return as_json(path, nbytes, checkpoint, report, sizes, remarks)
    return as_text(path, nbytes, checkpoint, report, sizes)


def _bake(arguments: argparse.Namespace) -> str:
    path, out = arguments.file, arguments.out
    _check_dense_out(path, out)
    checkpoint = _read(path, arguments.key)
    with Progress() as progress:
        progress("baking", 0.0)
        tensors, remarks = baked_tensors(path, checkpoint)
        progress("writing", 0.0)
        _write_dense(tensors, out, "bake")
    for remark in remarks:
        _note(remark)
    return _sizes(path, out)


def _compress(arguments: argparse.Namespace) -> str:
    path, out = arguments.file, arguments.out
    _check_out(path, out)
    if out.suffix in _TORCH:
        raise _Usage(
            f"expected OUT not to end in {out.suffix}, got {out}; a sparse file is a safetensors file: "
            f"call it {out.stem}.safetensors"
        )
    checkpoint = _read(path, arguments.key)
    if checkpoint.kind == "sparse":
        raise _Failed(f"{path} is a sparse file already; expand it first to compress it differently")
    if checkpoint.beside and arguments.key is None:
        raise _Failed(
            f"{path} also holds {listed(checkpoint.beside)}, which a sparse file cannot; "
            f"to store only the weights, pass --key {checkpoint.key}"
        )
    for name, kind in checkpoint.others.items():
        raise _Failed(
            f"expected tensors alone, got {kind} at {name}, which a sparse file cannot hold; save it elsewhere"
        )
    if twice := dense_beside_pruned(checkpoint.tensors):
        raise _Failed(
            f"expected each weight once, got {len(twice)} of {path} twice, pruned and dense (*.original); "
            "run feather-param bake, and compress its output"
        )
    with Progress() as progress:
        progress("compressing", 0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the notes say the same
            feather_param.save_sparse(checkpoint.tensors, out, zstd=arguments.zstd)
    for remark in notes(checkpoint):
        _note(remark)
    return f"{_sizes(path, out)} ({percent(out.stat().st_size / path.stat().st_size)})"


def _expand(arguments: argparse.Namespace) -> str:
    path, out = arguments.file, arguments.out
    _check_dense_out(path, out)
    checkpoint = _read(path, None)
    if checkpoint.kind != "sparse":
        raise _Failed(f"{path} is no sparse file: its tensors are dense already")
    with Progress() as progress:
        progress("writing", 0.0)
        _write_dense(checkpoint.tensors, out, "expand")
    return _sizes(path, out)


def _bench(arguments: argparse.Namespace) -> str:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the modules of the user are in the working directory, as for python -m
    function, *settings = arguments.arch
    try:
        model = build(function, settings)
    except ValueError as error:
        raise _Usage(f"argument --arch: {error}") from error
    checkpoint = _read(arguments.file, arguments.key)
    if sentence := in_training(checkpoint):
        raise _Failed(f"{arguments.file}: {sentence}")
    load(model, checkpoint.tensors)
    with Progress() as progress:
        progress("timing", 0.0)
        try:
            _, report = feather_param.to_sparse_inference(model.eval(), torch.randn(arguments.input))
        except RuntimeError as error:
            raise _Failed(f"{function} with an input of {arguments.input}: {error}") from error
    return json.dumps(asdict(report), indent=2) if arguments.json else str(report)


def _shape(text: str) -> tuple[int, ...]:
    """Return the shape in a text like 1x3x224x224."""
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"expected sizes of 1 or more like 1x3x224x224, got {text}")
    return tuple(map(int, sizes))


def _write_dense(tensors: Mapping[str, Tensor], out: Path, command: str) -> None:
    """Write a dense checkpoint in the format that the suffix tells."""
    if out.suffix == _SAFETENSORS:
        if "__metadata__" in tensors:  # it means something else in the header of the file
            raise _Failed(f"{out}: safetensors cannot hold a tensor named __metadata__; {command} to a .pt file")
        # The format has no tied tensors. They are written twice, and the model that loads them ties them again.
        separate = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        try:
            content = safetensors.torch.save(separate, {"format": "pt"})
        except KeyError as error:
            raise _Failed(f"{out}: safetensors cannot hold {error.args[0]}; {command} to a .pt file") from error
        with atomic_write(out) as file:
            file.write(content)
    else:
        copies = _apart(tensors)
        with atomic_write(out) as file:
            torch.save(copies, file)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors, each with its own memory. Tied tensors stay tied.

    The tensors of a sparse file lie in one block of memory, and torch.save would write all of it for each of them.
    """
    copies = {name: tensor.clone() for name, tensor in untied(tensors).items()}
    return {name: copies[first] for name, first in first_names(tensors).items()}


def _read(path: Path, key: str | None) -> Checkpoint:
    with Progress() as progress, errors_name(path):
        progress("reading", 0.0)
        return read(path, key)


def _check_out(path: Path, out: Path) -> None:
    if out.is_dir():
        raise _Usage(f"expected OUT to be a file, got the folder {out}")
    if out.exists() and not out.is_file():  # root may replace /dev/null
        raise _Usage(f"expected OUT to be a file, got {out}, a device or pipe, which a file would replace")
    folder = Path(os.path.realpath(out)).parent  # out may be a link
    if not out.parent.is_dir() or not folder.is_dir():
        raise _Usage(f"expected OUT in an existing folder, got {out}")
    if not os.access(folder, os.W_OK):
        raise _Usage(f"expected OUT in a folder that you may write to, got {out}")
    if out.exists() and path.exists() and out.samefile(path):
        raise _Usage(f"expected two files, got {out} twice: it would be overwritten")


def _check_dense_out(path: Path, out: Path) -> None:
    _check_out(path, out)
    if out.suffix not in (*_TORCH, _SAFETENSORS):
        raise _Usage(f"expected OUT to end in {', '.join(_TORCH)} or {_SAFETENSORS}, got {out}")


def _sizes(path: Path, out: Path) -> str:
    return "\n".join(f"{printable(file)}: {file.stat().st_size:,} bytes" for file in (path, out))
