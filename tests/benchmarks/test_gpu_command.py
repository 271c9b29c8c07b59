"""`python -m benchmarks.gpu`: the rehearsal of all parts, its page, and what a user may do wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import checks, page, tables
from benchmarks.gpu.budget import Call, Part
from benchmarks.gpu.kernels import synchronisations
from benchmarks.gpu.sizes import REAL, REHEARSAL

CPU = torch.device("cpu")
REHEARSE = ["--device", "cpu", "--rehearse", "--minutes", "5", "--out"]
pytestmark = [  # torch warns of itself
    pytest.mark.filterwarnings("ignore:.*grad attribute of a Tensor that is not a leaf:UserWarning"),
]
ALL = {"page.md", *page.FILES.values()}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a rehearsal of all parts."""
    folder = tmp_path_factory.mktemp("gpu") / "out"
    assert command.main([*REHEARSE, str(folder), "--commit", "abc1234"]) == 0
    return folder


def pieces(folder: Path, letter: str) -> dict[str, Any]:
    return json.loads((folder / page.FILES[letter]).read_text())["pieces"]


def test_a_rehearsal_makes_all_parts(rehearsed):
    assert {path.name for path in rehearsed.iterdir()} == ALL
    for letter in page.FILES:
        for name, record in pieces(rehearsed, letter).items():
            assert record.keys() == {"expected", "machine", "figures", "seconds"}, name
            assert record["machine"]["commit"] == "abc1234"
            assert record["machine"].keys() >= {"gpu", "driver", "cuda", "torch", "triton", "torchvision"}
    tests = [record["figures"] for record in pieces(rehearsed, "a").values()]
    assert [figures["failed"] for figures in tests] == [0, 0]
    if not torch.cuda.is_available():
        assert [(figures["passed"], figures["skipped"]) for figures in tests] == [(1, 8), (1, 0)]
    assert len(pieces(rehearsed, "b")) == 4
    assert len(pieces(rehearsed, "c")) == 6
    runs = [result["run"]["method"] for result in tables.contents(pieces(rehearsed, "d"))]
    assert runs == ["feather", "soft", "dense"]
    assert [result["zeros"] == result["promised"] for result in tables.contents(pieces(rehearsed, "e"))] == [True]


def test_the_page_shows_all_parts(rehearsed):
    text = (rehearsed / "page.md").read_text()
    assert "**This is a rehearsal: the sizes are tiny and the numbers mean nothing.**" in text
    assert re.search(r"\| 1 \| .* \| abc1234 \| ", text)
    for title in ("a. Tests that need a GPU", "b. Kernels and whole", "c. Seconds of an epoch", "d. A smaller p"):
        assert f"\n## {title}" in text
    for row in (
        "tests/benchmarks/test_augmentation.py",
        "Controller.step(), captured",
        "operator, one tensor, p = 0.5, captured",
    ):
        assert f"\n| {row} | " in text
    for row in ("resnet20, compiled and captured", "resnet20 x 2, captured", "resnet20 x 1, plain loop"):
        assert f"\n| {row} | " in text
    assert "\n### mobilenet_v1, width 0.25\n" in text
    assert "exactly the promised one in each of the 4 runs" in text


def test_the_next_call_makes_nothing_again(rehearsed, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(rehearsed, folder)
    before = {name: (folder / name).read_text() for name in ALL}
    assert command.main([*REHEARSE, str(folder)]) == 0
    assert {name: (folder / name).read_text() for name in ALL} == before
    (folder / "page.md").unlink()
    assert command.main(["--only-page", "--out", str(folder)]) == 0
    assert (folder / "page.md").read_text() == before["page.md"]
    assert [line for line in capsys.readouterr().err.splitlines() if ": done" in line] == []


def test_the_plan_starts_nothing(tmp_path, capsys):
    assert command.main(["--plan", "--data", "nowhere", "--out", str(tmp_path / "none")]) == 0
    shown = capsys.readouterr().out
    for letter, least in (("a", "113"), ("b", "181"), ("c", "186")):
        assert re.search(rf"\| {letter} \| \*\*sum of .*\*\* \| \*\*{least}\*\* \|", shown)
    assert "| d | mobilenet_v1_feather_0.995_seed0 and 7 more | 759 | 8 at once, 62400 steps of 12.0 ms" in shown
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--minutes", "soon"], "expected a number of minutes above 0.25, got soon"),
        (["--minutes", "0.2"], "expected a number of minutes above 0.25, got 0.2"),
        (["--device", "cpu"], "expected --rehearse with cpu, got none"),
        (["--parts", "f"], "invalid choice: 'f'"),
        (["--out", __file__, "--rehearse", "--device", "cpu"], "expected a folder, got the file"),
        (["--only-page", "--out", "nowhere"], "expected the folder of results, got nowhere, which does not exist"),
        (["--publish", "--out", "nowhere"], "expected the folder of results, got nowhere, which does not exist"),
    ],
)
def test_wrong_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--parts", "a", "d"], "expected the folder of CIFAR-100 for part d, got none"),
        (["--data", "nowhere"], "expected a folder with cifar-100-python or cifar-100-binary, got nowhere"),
    ],
)
def test_a_missing_data_set_is_named_before_the_time_runs(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda", *arguments])
    assert sentence in capsys.readouterr().err


def test_a_gpu_is_asked_for_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "expected a GPU for cuda, got none; use --device cpu --rehearse" in capsys.readouterr().err


def test_a_rehearsal_and_results_do_not_share_a_folder(tmp_path, capsys):
    (tmp_path / page.FILES["a"]).write_text('{"rehearsed": false, "pieces": {}}')
    assert command.main([*REHEARSE, str(tmp_path), "--parts", "a"]) == 2
    assert "expected a rehearsal in" in capsys.readouterr().err


def test_the_status_is_1_if_something_raised_and_the_others_go_on(tmp_path, monkeypatch):
    def bad(*arguments: Any) -> Any:
        raise OSError("no data")

    monkeypatch.setattr("benchmarks.gpu.parts.load_data", bad)
    monkeypatch.setattr("benchmarks.gpu.kernels.kernels.threshold", bad)
    monkeypatch.setattr("benchmarks.gpu.kernels._steps", bad)
    assert command.main([*REHEARSE, str(tmp_path), "--parts", "d", "b"]) == 1
    assert "operator" in pieces(tmp_path, "b")
    text = (tmp_path / "page.md").read_text()
    assert "`threshold` raised OSError:\n\n```\nno data\n" in text
    assert "The part raised OSError:\n\n```\nno data\n" in text


def test_a_fault_of_the_page_keeps_no_part_from_its_time(tmp_path, monkeypatch, capsys):
    def bad(folder: Path) -> str:
        raise KeyError("gone")

    monkeypatch.setattr(page, "write", bad)
    monkeypatch.setattr(command, "REHEARSAL", replace(REHEARSAL, tests=(), networks=()))
    assert command.main([*REHEARSE, str(tmp_path), "--parts", "a", "c"]) == 1
    assert (tmp_path / page.FILES["c"]).is_file()
    assert "the page raised KeyError: 'gone'" in capsys.readouterr().err


def test_a_signal_ends_the_call_with_its_files_whole(tmp_path, monkeypatch, capsys):
    def part(sizes: Any) -> Part:
        def make(call: Call) -> dict[str, Any]:
            signal.raise_signal(signal.SIGTERM)
            return {"passed": 1, "failed": 0, "skipped": 0, "failures": []}

        made = [checks.Piece(name, 1.0, "made up", make) for name in ("one", "two")]
        return Part("a", "Tests", page.FILES["a"], lambda records, room: made)

    monkeypatch.setattr(checks, "part", part)
    assert command.main([*REHEARSE, str(tmp_path), "--parts", "a", "c"]) == 128 + signal.SIGTERM
    assert pieces(tmp_path, "a").keys() == {"one", "two"}
    assert "left" in pieces(tmp_path, "a")["two"]
    assert not (tmp_path / page.FILES["c"]).exists()
    assert "stopped; the same command continues" in capsys.readouterr().err


def test_a_new_process_makes_the_later_parts_once_the_gpu_does_not_answer(tmp_path, monkeypatch):
    def bad(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def execv(path: str, arguments: list[str]) -> None:
        raise SystemExit(arguments[1:])

    monkeypatch.setattr("benchmarks.gpu.epochs._measure", bad)
    monkeypatch.setattr(torch, "ones", bad)
    monkeypatch.setattr("os.execv", execv)
    monkeypatch.setattr(command, "_tidy", lambda: None)  # it takes half a second
    given = [*REHEARSE, str(tmp_path), "--parts", "c", "d", "e"]
    clock = iter([0.0, *[100.0] * 1000]).__next__
    with pytest.raises(SystemExit) as ended:
        command.main(given, clock)
    assert ended.value.code == ["-m", "benchmarks.gpu", *given, "--parts", "d", "e", "--minutes", "3.333"]
    assert "illegal memory" in (tmp_path / "page.md").read_text()
    assert command.main([*given, "--parts", "c"]) == 1  # no part is left


def test_a_failing_a_hanging_and_a_crashing_test_file(tmp_path):
    code = "import os, time\ndef test_a(): assert 1 == 2, 'one is not two'\ndef test_b(): pass\n"
    (tmp_path / "test_bad.py").write_text(code)
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow(): time.sleep(60)\n")
    (tmp_path / "test_crash.py").write_text("import os\ndef test_crash(): os._exit(3)\n")

    def check(name: str, seconds: float, later: float = 0.0) -> dict[str, Any]:
        options = ("-p", "no:hypothesispytest", f"--rootdir={tmp_path}", "-c", "/dev/null")
        return checks._check(str(tmp_path / name), options, later, Call(seconds))

    figures = check("test_bad.py", 60.0)
    assert [figures[key] for key in ("passed", "failed", "skipped")] == [1, 1, 0]
    (failed,) = figures["failures"]
    assert failed["test"].endswith("test_bad::test_a")
    assert "one is not two" in failed["message"]
    with pytest.raises(RuntimeError, match=r"(?s)test_crash\.py ended with status 3 .*test_crash"):
        check("test_crash.py", 60.0)
    with pytest.raises(RuntimeError, match=r"test_slow\.py did not end in time"):
        check("test_slow.py", 61.0, later=60.0)


def test_synchronisations_are_not_counted_on_a_cpu():
    assert synchronisations(lambda: None, 3, CPU) is None


def test_the_real_sizes_are_those_of_the_task():
    assert REAL.step_network == "resnet50"
    assert REAL.step_shape == (128, 3, 224, 224)
    assert REAL.weights == 25_000_000
    root = Path(command.__file__).parents[2]
    assert all((root / file).is_file() for sizes in (REAL, REHEARSAL) for file, _, _ in sizes.tests)


def test_all_test_files_with_tests_for_a_gpu_are_run():
    root = Path(command.__file__).parents[2]
    found = {
        path.relative_to(root).as_posix()
        for path in (root / "tests").rglob("test_*.py")
        if "skipif(not torch.cuda.is_available()" in path.read_text(encoding="utf-8") and path != Path(__file__)
    }
    assert {"tests/test_gpu.py"} <= found <= {file for file, _, _ in REAL.tests}
