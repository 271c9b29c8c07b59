"""Write scalars for TensorBoard into a file, at once and without a thread."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from feather_param.files.errors import errors_name


class EventFile:
    """A new file of TensorBoard events.

    The `SummaryWriter` of torch writes in a thread, which prints the traceback of a full disk and may lose the error.
    Here an event is in the file when a call returns, and a failure is an OSError with the name of the file.

    A resumed run has a file of its own. It tells TensorBoard to drop all scalars from the last step before the
    checkpoint on, and repeats those of this step. Each scalar is then shown exactly once, whenever the process before
    was killed.

    Args:
        folder: folder of the run.
        resumed: the `state_dict` of the run to resume; None for a new run.
    """

    def __init__(self, folder: Path, resumed: Mapping[str, Any] | None = None) -> None:
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._step, self._scalars = 1, dict[str, float]()  # the settings have step 0, and are never dropped
        self._add(Event(file_version="brain.Event:2"))
        if resumed is not None:
            self._step = resumed["step"]
            self._add(Event(step=self._step, session_log=SessionLog(status=SessionLog.START)))
            for tag, value in resumed["scalars"].items():
                self.add_scalar(tag, value, self._step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write a scalar of a step, which is not before that of the last call."""
        if step > self._step:
            self._step, self._scalars = step, {}
        self._scalars[tag] = float(value)
        self.add_summary(scalar(tag, value), step)

    def add_summary(self, summary: Summary, step: int = 0) -> None:
        """Write a summary."""
        self._add(Event(step=step, summary=summary))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with errors_name(self.path), self.path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())

    def state_dict(self) -> dict[str, Any]:
        """Return the last step and its scalars, after which a resumed run continues."""
        return {"step": self._step, "scalars": dict(self._scalars)}
