"""Show the progress of a command on a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

_EVERY = 0.1  # seconds between two updates
_KNOWN = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left"
_UNKNOWN = "{desc} ..."


class Progress:
    """A line on stderr with the current task. It shows only on a terminal, and the end of the block removes it."""

    def __init__(self) -> None:
        self._task = ""
        self._bar: tqdm | None = None

    def __call__(self, task: str, fraction: float) -> None:
        """Show a task and the fraction of it that is done, from 0 to 1.

        If the first fraction of a task is 0, only its name is shown: the fraction is unknown.
        """
        if self._bar is None or self._task != task:
            self._close()
            self._task = task
            self._bar = tqdm(
                desc=task,
                total=100,
                unit="%",
                file=sys.stderr,
                disable=None,  # None: disabled unless stderr is a terminal
                leave=False,
                mininterval=_EVERY,
                miniters=0,
                dynamic_ncols=True,
                bar_format=_KNOWN if fraction else _UNKNOWN,
            )
        self._bar.update(100 * fraction - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
