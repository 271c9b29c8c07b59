"""Give hostile files to the command line, in a process of its own: ``python -m tests.cli.hostile_run SEED CASES``.

It prints the number of each case before it starts, and at the end how many files were refused. It ends with a
traceback at the first case that breaks a promise. The file of this case is in the working directory.
"""

from __future__ import annotations

import contextlib
import io
import random
import resource
import sys
import time
import warnings
from pathlib import Path

import torch

from feather_param.cli import main as cli
from tests.cli.hostile import damaged, originals

IN = Path("in")
COMMANDS = [
    *[["report", "in", "--no-sizes"]] * 4,
    *[["compress", "in", "out.safetensors"]] * 3,
    *[["bake", "in", "out.pt"]] * 2,
    *[["bake", "in", "out.safetensors"], ["report", "in", "--json"], ["expand", "in", "out.pt"]],
]
MEMORY = 2**26  # bytes; 2048 times the size of the largest file are less
SECONDS = 1.0


def peak() -> int:
    """Return the largest memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ends_well(argv: list[str]) -> int:
    """Run a command on the file, check what it promises for any content, and return its exit status."""
    content = IN.read_bytes()
    memory, start = peak(), time.process_time()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(argv)
    seconds, memory = time.process_time() - start, peak() - memory
    lines = err.getvalue().splitlines()
    assert status in (0, 1), err.getvalue()
    assert all(line.startswith("feather-param: ") for line in lines), err.getvalue()
    assert status == 0 or (len(lines) == 1 and out.getvalue() == ""), err.getvalue()
    assert memory < MEMORY, f"{memory} bytes"
    assert seconds < SECONDS, f"{seconds} s"
    assert IN.read_bytes() == content
    left = [path for path in Path().iterdir() if path != IN]
    assert len(left) == (status == 0 and argv[0] != "report"), left
    for path in left:
        path.unlink()
    return status


def main(seed: int, cases: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("always")  # a warning would be a line on stderr
    generator = random.Random(seed)
    files = originals()
    for content, _ in files:  # what the first use loads counts for no case
        IN.write_bytes(content)
        for argv in COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                cli.main(argv)
            for path in (Path("out.safetensors"), Path("out.pt")):
                path.unlink(missing_ok=True)
    now = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, -1))
    refused = 0
    for case in range(cases):
        print(case, flush=True)
        content, change = generator.choice(files)
        IN.unlink(missing_ok=True)
        IN.write_bytes((damaged if generator.random() < 0.2 else change)(content, generator))
        refused += ends_well(generator.choice(COMMANDS))
    print(f"{refused} of {cases} refused")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
