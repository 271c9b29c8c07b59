"""A finished run of `cifar100.py`, and a fake ImageNet, which several tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import cifar100
from tests.examples.imagenet import draw
from tests.examples.runs import TINY


@pytest.fixture(scope="package")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cifar100.main([*TINY, "--sname", "whole"]) == 0
    return folder


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a fake ImageNet."""
    return draw(tmp_path_factory.mktemp("images"))
