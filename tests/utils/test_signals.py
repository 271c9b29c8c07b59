"""A signal ends a block by an exception that no code on the way can lose."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from feather_param.utils import signals
from feather_param.utils.signals import EndOnSignal, Signalled, exit_status

STATUS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
STATUS = {name: status for name, status in STATUS.items() if hasattr(signal, name)}
ROOT = Path(__file__).resolve().parents[2]


def send(name: str = "SIGTERM") -> None:
    signal.raise_signal(signal.Signals[name])


def never_done() -> None:
    raise AssertionError("the signal did not end this block")


def handlers() -> list[object]:
    return [signal.getsignal(signal.Signals[name]) for name in STATUS]


@contextlib.contextmanager
def after(first: Callable[[], object]) -> Iterator[None]:
    first()
    yield


@contextlib.contextmanager
def replaced(clean_up: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Raise another error at the end of a block, as torch.save does."""
    try:
        yield
    finally:
        clean_up()
        raise RuntimeError("another error")


@pytest.fixture(autouse=True)
def _signals_have_their_usual_effect():
    """SIGINT is ignored if the tests run in the background."""
    before = dict(zip(STATUS, handlers(), strict=True))
    for name in STATUS:
        signal.signal(signal.Signals[name], signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", STATUS)
def test_a_signal_raises_and_the_handlers_come_back(name):
    before = handlers()
    with pytest.raises(Signalled) as raised, EndOnSignal(), after(lambda: send(name)):
        never_done()
    assert raised.value.status == STATUS[name]
    assert handlers() == before
    assert not isinstance(raised.value, Exception)  # code that goes on after any Exception does not catch it


def test_a_block_without_a_signal_changes_nothing():
    before = handlers()
    with EndOnSignal():
        assert handlers() != before
    with pytest.raises(ValueError, match="own"), EndOnSignal():
        raise ValueError("own")
    assert handlers() == before


@pytest.mark.parametrize("name", STATUS)
def test_an_ignored_signal_stays_ignored(name):
    signal.signal(signal.Signals[name], signal.SIG_IGN)
    with EndOnSignal():
        send(name)
    assert signal.getsignal(signal.Signals[name]) == signal.SIG_IGN


def test_code_on_the_way_cannot_replace_or_lose_the_exception():
    with pytest.raises(Signalled, match="terminated"), EndOnSignal(), replaced():
        send()
    with pytest.raises(Signalled, match="terminated"), EndOnSignal(), contextlib.suppress(BaseException):
        send()


def test_further_signals_do_not_disturb_a_clean_up():
    done = []

    def clean_up() -> None:
        for name in STATUS:
            send(name)
            done.append(name)

    with pytest.raises(Signalled, match="terminated"), EndOnSignal(), replaced(clean_up), replaced(clean_up):
        send()
    assert done == [*STATUS, *STATUS]


def test_further_signals_do_not_disturb_a_destructor():
    done = []

    class Loader(Iterator[None]):
        def __next__(self) -> None: ...

        def __del__(self) -> None:  # runs when the exception leaves the loop
            for name in STATUS:
                send(name)
                done.append(name)

    def loop() -> None:
        for _ in Loader():
            send()

    with pytest.raises(Signalled, match="terminated"), EndOnSignal():
        loop()
    assert done == [*STATUS]


def test_a_signal_after_a_lost_one_raises_again(monkeypatch):
    monkeypatch.setattr(signals, "_PATIENCE", 0.0)

    def lost() -> None:
        with contextlib.suppress(BaseException):
            send("SIGTERM")

    with pytest.raises(Signalled, match="interrupted"), EndOnSignal(), after(lost), after(lambda: send("SIGINT")):
        never_done()


def test_a_signal_ends_the_process_if_the_clean_up_hangs(monkeypatch):
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(signals, "_PATIENCE", 0.0)
    with pytest.raises(Signalled), EndOnSignal(), replaced(lambda: send("SIGINT")):
        send("SIGTERM")
    assert ends == [130]


def test_another_thread_sets_no_handlers():
    seen = []

    def work() -> None:
        with EndOnSignal():
            seen.append(handlers())

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
    assert handlers() == before


@pytest.mark.parametrize("name", STATUS)
def test_a_program_returns_the_status_of_its_signal(name, capsys):
    assert exit_status("program", lambda: 3) == 3
    assert exit_status("program", lambda: send(name) or 0) == STATUS[name]
    assert capsys.readouterr().err.startswith("program: ")


@pytest.mark.skipif(os.name == "nt", reason="POSIX terminals")
def test_the_status_is_right_also_if_the_terminal_is_gone():
    code = "import sys\nfrom feather_param.utils.signals import Signalled, exit_status\n"
    code += "def main():\n    sys.stdin.read(1)\n    raise Signalled(1)\nsys.exit(exit_status('program', main))"
    terminal, inside = os.openpty()
    reading, writing = os.pipe()
    program = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=reading,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    for end in (inside, reading, terminal):
        os.close(end)
    os.close(writing)  # lets it go on
    assert program.wait(timeout=60) == 129


def test_a_program_that_starts_with_ctrl_c_ignored_goes_on_ignoring_it():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.end_at_once()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
