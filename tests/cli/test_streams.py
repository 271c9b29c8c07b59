"""The command ends with its status where stdout or stderr is full, closed or a pipe that nobody reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.commands import KINDS, ROOT

# A child for each case: (buffered, arguments, stdout, stderr). When the interpreter exits, it flushes both streams, and
# its status is 120 if that fails. Its other work would take seconds here.
CHILDREN = """
import io, json, os, sys
from feather_param.cli.main import main

def connect(number, target, buffered):
    if target == "closed":
        os.close(number)
        return None
    if target == "unread":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open(target, os.O_WRONLY | os.O_CREAT)
    os.dup2(writing, number)
    os.close(writing)
    raw = io.FileIO(number, "w", closefd=False)
    if not buffered:  # as PYTHONUNBUFFERED=1 makes it
        return io.TextIOWrapper(raw, write_through=True)
    return io.TextIOWrapper(io.BufferedWriter(raw), line_buffering=number == 2)

statuses = []
for i, (buffered, argv, out, err) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        sys.stdout = connect(1, out or f"{i}.out", buffered)
        sys.stderr = connect(2, err or f"{i}.err", buffered)
        status = main(argv)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            status = 120
        os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(statuses))
"""
FULL, CLOSED, UNREAD = "/dev/full", "closed", "unread"
REPORT = ["report", "file", "--no-sizes"]
NOTED = ["report", "negative", "--no-sizes"]  # with a note on stderr
ERROR = "feather-param: error: stdout: No space left on device\n"
# Arguments, stdout and stderr (None: a file), the status, and the text in stderr.
CASES = [
    (REPORT, None, None, 0, ""),
    *(
        (argv, FULL, None, 1, ERROR)
        for argv in (REPORT, [*REPORT, "--json"], ["--help"], ["bench", "-h"], ["--version"])
    ),
    *((argv, UNREAD, None, 141, "") for argv in (REPORT, ["--help"], ["--version"])),
    (REPORT, CLOSED, None, 0, ""),
    *((REPORT, FULL, stderr, 1, None) for stderr in (FULL, CLOSED, UNREAD)),
    *((REPORT, None, stderr, 0, None) for stderr in (FULL, CLOSED, UNREAD)),
    *((["report", "nowhere"], None, stderr, 1, None) for stderr in (FULL, CLOSED, UNREAD)),
    *((["wrong"], None, stderr, 2, None) for stderr in (FULL, CLOSED, UNREAD)),
    *((NOTED, None, stderr, 0, None) for stderr in (FULL, CLOSED, UNREAD)),
    (["report", "nowhere"], CLOSED, CLOSED, 1, None),
]


@pytest.mark.skipif(not Path(FULL).exists(), reason="only Linux has /dev/full")
def test_a_stream_that_cannot_be_written():
    KINDS["torch"](Path("file"))
    torch.save({"w": -torch.zeros(3)}, "negative")
    cases = [(True, *case) for case in CASES] + [(False, *case) for case in CASES if case[1]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILDREN, json.dumps([case[:4] for case in cases])]
    ended = subprocess.run(command, env=env, text=True, stdout=subprocess.PIPE, check=True)
    statuses = json.loads(ended.stdout)
    for i, (*case, status, said) in enumerate(cases):
        _, _, out, err = case
        assert statuses[i] == status, case
        assert err or Path(f"{i}.err").read_text() == said, case
        assert out or bool(Path(f"{i}.out").read_text()) == (status == 0), case
