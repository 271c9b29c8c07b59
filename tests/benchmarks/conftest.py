"""A data set of random images that is trained on in a moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.images import ImageData, Split


@pytest.fixture(scope="package")
def data() -> ImageData:
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        images = torch.from_numpy(generator.integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))
        return Split(images, torch.arange(count) % 4)

    return ImageData(split(300), split(50), 4, padding=1, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)
