"""A file is written completely or not at all."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from feather_param import load_sparse, save_sparse


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "t"
    save_sparse({"t": torch.ones(3)}, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="disk full"):
            save_sparse({"t": torch.zeros(3)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_error_names_a_missing_folder_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected an existing folder to write a file into: 'nowhere'"):
        save_sparse({"t": torch.zeros(3)}, "nowhere/t")
    (tmp_path / "link").symlink_to("gone/t")
    with pytest.raises(FileNotFoundError, match=r"write a file into: '.*gone'"):
        save_sparse({"t": torch.zeros(3)}, "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX has named pipes and links")
def test_folders_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=rf"expected a file or a new name, got .*{name}, a device or pipe"):
            save_sparse({"t": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a file or a new name, got .*, a folder"):
        save_sparse({"t": torch.zeros(3)}, tmp_path)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.skipif(sys.platform == "win32", reason="only POSIX has permissions and links")
def test_permissions_and_links_stay(tmp_path):
    old = os.umask(0o027)
    try:
        save_sparse({"t": torch.ones(3)}, tmp_path / "t")
    finally:
        os.umask(old)
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o640
    (tmp_path / "t").chmod(0o604)
    (tmp_path / "link").symlink_to("t")
    save_sparse({"t": torch.zeros(3)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o604
    assert not load_sparse(tmp_path / "t")["t"].any()


def test_many_writers_of_one_file(tmp_path):
    """The file is complete at any moment, whichever process writes last."""
    states = [{"t": torch.full((10_000,), float(i + 1))} for i in range(4)]
    save_sparse(states[0], tmp_path / "t")
    failed: list[BaseException] = []

    def write(state):
        try:
            for _ in range(25):
                save_sparse(state, tmp_path / "t")
                assert load_sparse(tmp_path / "t")["t"].unique().numel() == 1
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=write, args=(state,)) for state in states]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
