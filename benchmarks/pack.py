"""Pack CIFAR-100 for a machine that takes 64 MiB a transfer: `python -m benchmarks.pack SOURCE FOLDER`.

SOURCE holds `unpack_cifar100.py` and the folder `cifar-100` with its strips, labels and names. Each transfer carries
the files of the repository, tracked or not ignored, and one part of the data. FOLDER gets the parts: `first` (script,
labels, names, test images, half of the training images) and `second` (the other half). FOLDER must be ignored by git
or lie outside the repository, since each transfer would carry both parts otherwise. Nothing is copied if a transfer
exceeds the limit.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Part", "main", "pack", "parts_of", "steps"]

ROOT = Path(__file__).resolve().parent.parent
_MIB = 2**20
_SCRIPT = "unpack_cifar100.py"
_FOLDER = "cifar-100"
_FILES = ("labels.npz", "fine_label_names.txt", "coarse_label_names.txt")


@dataclass(frozen=True)
class Part:
    """What one transfer carries of the data.

    Attributes:
        name: folder of the part, in FOLDER.
        files: the files, by their path in the folder of the part.
    """

    name: str
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Number of bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def parts_of(source: Path) -> tuple[Part, Part]:
    """Return the two parts of a data set.

    The first has the layout of the source. The second has its strips in the place where the script looks for them in a
    further folder.

    Raises:
        ValueError: a file is missing.
    """
    files = {_SCRIPT: source / _SCRIPT, **{f"{_FOLDER}/{name}": source / _FOLDER / name for name in _FILES}}
    missing = [str(path) for path in files.values() if not path.is_file()]
    strips = {name: sorted((source / _FOLDER / name).glob("*.webp")) for name in ("test", "train-a", "train-b")}
    missing += [str(source / _FOLDER / name / "*.webp") for name, paths in strips.items() if not paths]
    if missing:
        raise ValueError(
            f"expected a data set in {source}, got none of {', '.join(missing)}; "
            f"give the folder that holds {_SCRIPT} and {_FOLDER}"
        )
    for name in ("test", "train-a"):
        files |= {f"{_FOLDER}/{name}/{path.name}": path for path in strips[name]}
    return Part("first", files), Part("second", {f"train-b/{path.name}": path for path in strips["train-b"]})


def repository_size(root: Path) -> int:
    """Return the number of bytes of the files that git tracks or does not ignore.

    Raises:
        ValueError: the folder is not in a git repository.
    """
    done = _git(root, "ls-files", "-co", "--exclude-standard", "-z")
    if done.returncode:
        raise ValueError(f"expected a git repository in {root}, got {done.stderr.strip()!r}; pack in a clone")
    paths = [root / name for name in set(done.stdout.split("\0")) - {""}]
    return sum(path.lstat().st_size for path in paths if path.is_symlink() or path.is_file())  # others were deleted


def pack(source: Path, folder: Path, limit: float = 64, root: Path = ROOT) -> tuple[int, tuple[Part, Part]]:
    """Copy the parts of a data set to a folder.

    Args:
        source: the data set, as in `parts_of`.
        folder: where to write the folders of the parts. It is made if it is missing.
        limit: MiB that one transfer takes, the repository included.
        root: folder of the repository.

    Returns:
        The number of bytes of the repository, and the parts.

    Raises:
        ValueError: a transfer exceeds the limit, the data set lacks a file, git does not ignore the folder, or there is
            a part in it. Nothing was copied.
    """
    parts, repository = parts_of(source), repository_size(root)
    _check_ignored([folder / part.name for part in parts], root)
    for part in parts:
        if (folder / part.name).exists():
            raise ValueError(f"expected no {folder / part.name}, got one; remove it or give another folder")
        over = repository + part.size - limit * _MIB
        if not over <= 0:  # also for a limit of NaN
            raise ValueError(
                f"expected at most {limit:g} MiB in the {part.name} transfer, got {over / _MIB:.3f} MiB more "
                f"({repository / _MIB:.2f} of the repository and {part.size / _MIB:.2f} of data); "
                "remove large files from the repository, or let git ignore them"
            )
    for part in parts:
        for name, path in part.files.items():
            target = folder / part.name / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return repository, parts


def _check_ignored(folders: Sequence[Path], root: Path) -> None:
    """Raise a ValueError if a folder is in the repository and git does not ignore the files in it."""
    root = root.resolve()
    inside = [folder.resolve() for folder in folders if folder.resolve().is_relative_to(root)]
    if any(_git(root, "check-ignore", "-q", str(folder / "file")).returncode for folder in inside):
        lines = " and ".join(f"/{folder.relative_to(root).as_posix()}/" for folder in inside)
        exclude = _git(root, "rev-parse", "--git-path", "info/exclude").stdout.strip()
        raise ValueError(
            f"expected folders that git ignores, got {lines}; add these two lines to {exclude}, "
            "or give a folder that is ignored (data/parts) or outside the repository"
        )


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, errors="surrogateescape")


def steps(folder: Path, repository: int, parts: Sequence[Part], limit: float, root: Path = ROOT) -> str:
    """Return the sizes of the transfers, and what to do with them."""
    inside = folder.resolve().is_relative_to(root.resolve())
    carried = folder.resolve().relative_to(root.resolve()) if inside else folder
    first, second = (shlex.quote(str(carried / part.name)) for part in parts)
    sizes = [
        f"{part.name} transfer: {(repository + part.size) / _MIB:.2f} of {limit:g} MiB ({repository / _MIB:.2f} of the "
        f"repository, {part.size / _MIB:.2f} in {len(part.files)} files of {carried / part.name})"
        for part in parts
    ]
    return "\n".join(
        [
            *sizes,
            "",
            "KEPT and DATA are folders on the other machine that a transfer does not replace.",
            f"1. Carry the repository and {first}, without {second}. There: mkdir -p KEPT && cp -r {first} KEPT/first",
            f"2. Carry the repository and {second}, without {first}. There: cp -r {second} KEPT/second",
            f"3. In the same transfer or later, there: python3 KEPT/first/{_SCRIPT} DATA KEPT/second",
            "   It checks the SHA-1 of the files in DATA/cifar-100-binary. Give DATA to the benchmarks as --data-dir,",
            "   and to benchmarks.gpu as --data.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder with the script and the data")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to write the parts, for example data/parts")
    parser.add_argument("--limit", type=float, default=64, help="MiB of a transfer, the repository included")
    given = parser.parse_args(arguments)
    try:
        repository, parts = pack(given.source, given.folder, given.limit, ROOT)
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(steps(given.folder, repository, parts, given.limit, ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
