"""The data set is packed into two parts that each fit into a transfer, or not at all."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import pack

MIB = 2**20
SIZES = {
    "unpack_cifar100.py": 100,
    "cifar-100/labels.npz": 700,
    "cifar-100/fine_label_names.txt": 20,
    "cifar-100/coarse_label_names.txt": 10,
    "cifar-100/test/test-000.webp": 3000,
    "cifar-100/train-a/train-000.webp": 5000,
    "cifar-100/train-a/train-001.webp": 5001,
    "cifar-100/train-b/train-002.webp": 5002,
}
FIRST = sum(size for name, size in SIZES.items() if "train-b" not in name)
SECOND = 5002
REPOSITORY = 1000 + len("ignored/\n")  # a tracked file, and .gitignore, which is not tracked


def write(folder: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes([size % 251]) * size)


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "source", SIZES)
    return tmp_path / "source"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a repository with a tracked file, one that git ignores, and a tracked one that was deleted."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "repository"
    write(root, {"tracked.py": 1000, "deleted.py": 10**6, "ignored/old": 10**6})
    for command in (["init", "-q"], ["add", "tracked.py", "deleted.py"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / ".gitignore").write_text("ignored/\n")
    (root / "deleted.py").unlink()
    return root


def test_the_parts_have_all_files_between_them(source, root):
    folder = root / "ignored" / "parts"
    repository, parts = pack.pack(source, folder, root=root)
    assert repository == REPOSITORY
    assert [part.size for part in parts] == [FIRST, SECOND]
    first, second = files_in(folder / "first"), files_in(folder / "second")
    assert first == {name: content for name, content in files_in(source).items() if "train-b" not in name}
    assert second == {"train-b/train-002.webp": bytes([5002 % 251]) * 5002}


def test_a_folder_outside_of_the_repository_needs_no_git(source, root, tmp_path):
    pack.pack(source, tmp_path / "elsewhere", root=root)
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["first", "second"]


@pytest.mark.parametrize("more", [0, -1])
def test_a_transfer_may_have_as_many_bytes_as_the_limit(source, root, more):
    limit = (REPOSITORY + FIRST + more) / MIB
    folder = root / "ignored" / "parts"
    if more == 0:
        pack.pack(source, folder, limit, root)
    else:
        with pytest.raises(ValueError, match=r"expected at most 0.0141.* MiB in the first transfer, got .* more"):
            pack.pack(source, folder, limit, root)
        assert not folder.exists()


def test_a_second_part_beyond_the_limit_is_named_before_anything_is_copied(source, root):
    write(source, {"cifar-100/train-b/train-003.webp": 3 * MIB})
    message = r"expected at most 2 MiB in the second transfer, got 1\.006 MiB more \(0\.00 of the repository and 3\.00 "
    with pytest.raises(ValueError, match=message + r"of data\); remove large files from the repository, or let git"):
        pack.pack(source, root / "ignored" / "parts", 2, root)
    assert not (root / "ignored" / "parts").exists()


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_a_limit_that_is_no_size_fits_nothing(source, root, limit):
    with pytest.raises(ValueError, match="expected at most"):
        pack.pack(source, root / "ignored" / "parts", limit, root)


@pytest.mark.parametrize("name", ["parts", "ignored/../parts", "."])
def test_a_folder_that_git_does_not_ignore_is_refused(source, root, name):
    lines = "/first/ and /second/" if name == "." else "/parts/first/ and /parts/second/"
    with pytest.raises(ValueError, match=rf"git ignores, got {lines}; add these two lines to .*info/exclude, or give"):
        pack.pack(source, root / name, root=root)
    assert not (root / "parts").exists()


def test_the_lines_that_the_message_names_make_the_folders_ignored(source, root):
    (root / ".git" / "info" / "exclude").write_text("/parts/first/\n/parts/second/\n")
    assert pack.pack(source, root / "parts", root=root)[0] == REPOSITORY
    assert pack.repository_size(root) == REPOSITORY  # the transfers carry no part that they should not


def test_a_folder_with_a_part_is_refused(source, root):
    pack.pack(source, root / "ignored" / "parts", root=root)
    with pytest.raises(ValueError, match=r"expected no .*first, got one; remove it or give another folder"):
        pack.pack(source, root / "ignored" / "parts", root=root)


@pytest.mark.parametrize("name", ["unpack_cifar100.py", "cifar-100/labels.npz", "cifar-100/test/test-000.webp"])
def test_a_missing_file_is_named(source, root, name):
    (source / name).unlink()
    missing = name.replace("test-000", r"\*")
    with pytest.raises(ValueError, match=f"expected a data set in .*, got none of .*{missing}; give the folder"):
        pack.pack(source, root / "ignored" / "parts", root=root)


def test_a_folder_without_git_is_refused(source, root, tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(ValueError, match=r"expected a git repository in .*plain, got .*; pack in a clone"):
        pack.pack(source, tmp_path / "parts", root=tmp_path / "plain")


def test_the_steps_name_sizes_folders_and_commands(source, root):
    folder = root / "ignored" / "the parts"
    found = pack.steps(folder, *pack.pack(source, folder, 0.25, root), 0.25, root)
    assert (
        "first transfer: 0.01 of 0.25 MiB (0.00 of the repository, 0.01 in 7 files of ignored/the parts/first)" in found
    )
    assert "cp -r 'ignored/the parts/second' KEPT/second" in found
    assert "python3 KEPT/first/unpack_cifar100.py DATA KEPT/second" in found


def test_the_steps_are_followed_to_the_end(source, root, tmp_path):
    """The script stands in for the real one: it lists the strips that it finds where the real one looks."""
    (source / "unpack_cifar100.py").write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "for source in [Path(__file__).parent / 'cifar-100', *map(Path, sys.argv[2:])]:\n"
        "    print(*sorted(path.name for path in source.glob('t*/*.webp')))\n"
    )
    folder, kept = tmp_path / "parts", tmp_path / "kept"
    text = pack.steps(folder, *pack.pack(source, folder, root=root), 64, root)
    commands = [line.split("here: ")[1] for line in text.splitlines() if "here: " in line]
    assert len(commands) == 3
    for command in commands:
        command = command.replace("KEPT", str(kept)).replace("DATA", str(tmp_path / "data"))
        command = command.replace("python3", sys.executable)
        done = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    assert done.stdout.split() == [f"{n}.webp" for n in ("test-000", "train-000", "train-001", "train-002")]


def test_the_command_prints_the_steps_or_one_line_and_2(source, root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack, "ROOT", root)
    assert pack.main([str(source), str(tmp_path / "parts"), "--limit", "1"]) == 0
    assert "3. " in capsys.readouterr().out
    assert pack.main([str(source), str(tmp_path / "more"), "--limit", "0.001"]) == 2
    error = capsys.readouterr().err
    assert "expected at most 0.001 MiB in the first transfer" in error
    assert error.count("\n") == 1
