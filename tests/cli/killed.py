"""Run commands in forks of one process and send each a signal while it writes OUT. Prints one JSON line for each case.

    python -m tests.cli.killed FOLDER

A fork costs milliseconds, where a process of its own would import torch.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import matplotlib.figure  # noqa: F401  once, and not in each fork
import torch
from torch import nn

import feather_param
from feather_param.cli.main import main

COMMANDS = {
    "report": ["report", "in.pt", "--no-sizes", "--html", "OUT.html"],
    "bake": ["bake", "training.pt", "OUT.pt"],
    "compress": ["compress", "in.pt", "OUT.st"],
    "expand to torch": ["expand", "in.st", "OUT.pt"],
    "expand to safetensors": ["expand", "in.st", "OUT.safetensors"],
}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGKILL")
OLD = b"the old file"


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield a command, a signal, and when it comes.

    write: while the content is written. For files of torch.save that is inside C++.
    fsync: once all of it is written.
    again: as fsync, and more signals come while the command removes its temporary file.
    killed: as write, and the same command runs once more.
    ignored: as fsync, but the command was started with this signal ignored, as nohup does.
    """
    for command in COMMANDS:
        for name in SIGNALS:
            yield command, name, "write"
            yield command, name, "fsync"
        yield command, "SIGTERM", "again"
        yield command, "SIGKILL", "killed"
    yield "compress", "SIGHUP", "ignored"
    yield "compress", "SIGINT", "ignored"


def prepare() -> None:
    """Write the files that the commands read."""
    tensors = {name: torch.randn(64, 64) * (torch.rand(64, 64) < 0.1) for name in ("a.weight", "b.weight")}
    torch.save(tensors, "in.pt")
    feather_param.save_sparse(tensors, "in.st")
    layer = nn.Linear(8, 8)
    feather_param.sparsify(layer, final_rate=0.5, total_steps=1, end_step=0)
    torch.save(layer.state_dict(), "training.pt")


def block_at(moment: str, ready: int, go_on: int) -> None:
    """Let this process stop when it writes its file, say so on one pipe, and wait for a byte of another."""

    first = iter([True])

    def block() -> None:
        if next(first, False):  # torch.save writes again after an error
            os.write(ready, b".")
            os.read(go_on, 1)

    if moment in ("write", "killed"):
        real_open = builtins.open

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> IO[Any]:
            result = real_open(file, mode, *rest, **options)
            if "b" not in mode or not set(mode) & set("wx"):
                return result
            write = result.write

            class Blocking:
                def __getattr__(self, name: str) -> Any:
                    return getattr(result, name)

                def __enter__(self) -> Blocking:
                    return self

                def __exit__(self, *_: object) -> None:
                    result.close()

                def write(self, content: bytes) -> int:
                    count = write(content)
                    block()
                    return count

            return Blocking()  # type: ignore[return-value]

        builtins.open = opened
    else:
        os.fsync = lambda _: block()
    if moment == "again":
        unlink = Path.unlink

        def disturbed(self: Path, missing_ok: bool = False) -> None:
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                signal.raise_signal(signal.Signals[name])
            unlink(self, missing_ok)

        Path.unlink = disturbed  # type: ignore[method-assign]


def write_to(name: str) -> None:
    """Send the output of this process to a file."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def run(command: str, name: str, moment: str) -> dict[str, object]:
    """Return how a command ended, and the files that it left in the folder of OUT."""
    folder = Path("out") / f"{command} {name} {moment}".replace(" ", "_")
    folder.mkdir(parents=True)
    argv = [word.replace("OUT", str(folder / "file")) for word in COMMANDS[command]]
    Path(argv[-1]).write_bytes(OLD)
    number, (is_ready, ready), (go_on, going) = signal.Signals[name], os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        write_to("said")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in a background process
        if moment == "ignored":
            signal.signal(number, signal.SIG_IGN)
        block_at(moment, ready, go_on)
        os._exit(main(argv))
    os.close(ready)
    assert os.read(is_ready, 1) == b".", Path("said").read_text(encoding="utf-8")
    os.kill(child, number)
    if moment == "ignored":
        os.write(going, b".")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for end in (is_ready, go_on, going):
        os.close(end)
    if moment == "killed":  # the same command, once more
        child = os.fork()
        if not child:
            write_to("said_then")
            os._exit(main(argv))
        os.waitpid(child, 0)
    left = {path.name: path.read_bytes() == OLD for path in folder.iterdir()}
    return {
        "case": [command, name, moment],
        "status": status,
        "said": Path("said").read_text(encoding="utf-8"),
        "old": left.pop(Path(argv[-1]).name),
        "left": list(left),
    }


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    torch.set_num_threads(1)
    prepare()
    for case in cases():
        print(json.dumps(run(*case)), flush=True)
