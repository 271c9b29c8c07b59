"""A batch from one kernel equals a batch of one pixel at a time, and one of torch's operations."""

from __future__ import annotations

import doctest
import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import augmentation, together
from benchmarks.cifar100_run import BATCH as OF_A_RUN
from examples.data import Epoch, TrainBatches, crop_and_flip
from examples.images import ImageData, Split
from tests.interpreter import interpret
from tests.test_gpu import no_waiting

DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((1, 1), (5, 7), (32, 32), (19, 27))  # 3 x 32 x 32 and 3 x 19 x 27 need several programs an image
CASES = list(itertools.product((1, 3), SIZES, (0, 1, 4), DTYPES))
FEW = [(1, (5, 7), 0), (1, (8, 8), 1), (3, (19, 27), 2), (3, (32, 32), 4)]  # each is compiled twice, or interpreted
NUMBER, BATCH = 11, 3  # the last two images are in no whole batch
ULP = 2.0**-7  # of bfloat16, relative
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def made_up(channels: int, size: tuple[int, int], padding: int) -> ImageData:
    pixels = np.random.default_rng(channels).integers(0, 256, (NUMBER, channels, *size), dtype=np.uint8)
    train = Split(torch.from_numpy(pixels), torch.arange(NUMBER))
    mean, std = (0.5071, 0.4865, 0.4409)[:channels], (0.2673, 0.2564, 0.2762)[:channels]
    return ImageData(train, train, NUMBER, padding, flip=True, mean=mean, std=std)


def drawn_for(data: ImageData) -> Epoch:
    return TrainBatches(data, BATCH, epochs=1, seed=0).draw(0)


def one_pixel_at_a_time(data: ImageData, drawn: Epoch, step: int) -> Tensor:
    """Return a batch in float32, from its definition."""
    images = data.train.images
    height, width = images.shape[2:]
    out = torch.empty(BATCH, *images.shape[1:])
    for own in range(BATCH):
        place = step * BATCH + own
        image, (top, left) = images[drawn.order[place]], drawn.shifts[:, place].tolist()
        for channel, y, x in itertools.product(*map(range, image.shape)):
            row = y + top - data.padding
            column = (width - 1 - x if drawn.flips[place] else x) + left - data.padding
            inside = 0 <= row < height and 0 <= column < width
            value = np.float32(image[channel, row, column].item() if inside else 0)
            mean, std = np.float32(data.mean[channel]), np.float32(data.std[channel])
            out[own, channel, y, x] = float((value / np.float32(255) - mean) / std)
    return out


def with_torch(data: ImageData, drawn: Epoch, step: int) -> Tensor:
    """Return a batch in float32, as a run of `examples/cifar100.py` makes it."""
    part = slice(step * BATCH, (step + 1) * BATCH)
    images = data.train.images[drawn.order[part]]
    return data.normalise(crop_and_flip(images, data.padding, drawn.shifts[:, part], drawn.flips[part]))


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected)
    assert got.dtype == expected.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_torchs_operations_equal_one_pixel_at_a_time(channels, padding):
    for size in ((1, 1), (5, 7)):
        data = made_up(channels, size, padding)
        for step in range(NUMBER // BATCH):
            got = augmentation.augment(data, drawn_for(data), torch.tensor([step]), BATCH, torch.float32)
            assert_same(got, one_pixel_at_a_time(data, drawn_for(data), step))


@pytest.mark.parametrize(("channels", "size", "padding", "dtype"), CASES)
def test_on_a_cpu_a_batch_equals_that_of_a_run(channels, size, padding, dtype):
    data = made_up(channels, size, padding)
    for step in range(NUMBER // BATCH):
        got = augmentation.augment(data, drawn_for(data), torch.tensor([step]), BATCH, dtype)
        assert_same(got, with_torch(data, drawn_for(data), step).to(dtype))


def test_networks_that_train_together_see_the_batches_of_a_run(data):
    several = 2 * OF_A_RUN + 3
    train = Split(data.train.images[:several], data.train.labels[:several])
    data = ImageData(train, data.test, data.classes, data.padding, data.flip, data.mean, data.std)
    batches, alone = together.Batches(data, 3, seed=1), TrainBatches(data, OF_A_RUN, 3, seed=1, least=OF_A_RUN)
    assert batches.steps == alone.steps_per_epoch == 2
    for epoch, step in itertools.product((0, 2, 1), range(2)):  # in any order
        batches.load(epoch)
        images, labels = batches.at(torch.tensor([step]))
        expected, expected_labels = alone[epoch * 2 + step]
        assert_same(images, data.normalise(expected))
        assert torch.equal(labels, expected_labels)


def check_kernel() -> None:
    from benchmarks.augmentation_triton import augment

    for (channels, size, padding), dtype in itertools.product(FEW, DTYPES):
        data = made_up(channels, size, padding)
        for step in (0, NUMBER // BATCH - 1):
            got = augment(data, drawn_for(data), torch.tensor([step]), BATCH, dtype)
            expected = with_torch(data, drawn_for(data), step)
            if dtype == torch.float32:
                assert_same(got, expected)
            else:  # the interpreter rounds towards 0, a GPU to the nearest
                assert ((got - expected).abs() <= ULP * expected.abs()).all()
                assert got.is_contiguous(memory_format=torch.channels_last)
    for step in (-1, NUMBER // BATCH):  # no memory outside of the epoch is read
        data = made_up(3, (5, 7), 1)
        assert augment(data, drawn_for(data), torch.tensor([step]), BATCH, torch.float32)[-1].isnan().all()


def test_in_the_interpreter_the_kernel_equals_torchs_operations():
    interpret(check_kernel)


def test_the_example_of_the_docstring_runs():
    assert doctest.testmod(augmentation, extraglobs={"torch": torch}).failed == 0


def test_without_triton_a_step_beyond_the_epoch_is_an_error():
    data = made_up(3, (8, 8), 1)
    with pytest.raises(IndexError):
        augmentation.augment(data, drawn_for(data), torch.tensor([NUMBER // BATCH]), BATCH, torch.float32)


def test_images_that_the_kernel_cannot_read_are_refused():
    data = made_up(3, (8, 8), 1)
    drawn, step = drawn_for(data), torch.tensor([0])
    last = Split(data.train.images.to(memory_format=torch.channels_last), data.train.labels)
    with pytest.raises(ValueError, match=r"expected contiguous images, got strides .*; call contiguous\(\)"):
        augmentation.augment(ImageData(last, last, 4, 1, True, data.mean, data.std), drawn, step, 2, torch.float32)
    for size in (0, NUMBER + 1):
        with pytest.raises(ValueError, match=f"expected a batch of 1 to {NUMBER} images, got {size}; choose"):
            augmentation.augment(data, drawn, step, size, torch.float32)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "size", "padding"), FEW)
def test_on_a_gpu_the_kernel_equals_torchs_operations_on_a_cpu(channels, size, padding, dtype):
    data = made_up(channels, size, padding)
    on_gpu = data.to(torch.device("cuda"))
    for step in range(NUMBER // BATCH):
        expected = with_torch(data, drawn_for(data), step)
        at = torch.tensor([step], device="cuda")
        got = augmentation.augment(on_gpu, drawn_for(on_gpu), at, BATCH, dtype).cpu()
        assert_same(got, expected.to(dtype))
        # On a GPU, torch divides by 255 with a product, which rounds twice. With u = 2^-24 and values of at most 1, the
        # quotients differ by at most 3 u, the differences from the mean by 5 u, and the results by 7 u / std. In
        # bfloat16 they may then be rounded to neighbours.
        on_torch = with_torch(on_gpu, drawn_for(on_gpu), step).to(dtype).cpu().float()
        bound = 7 * 2.0**-24 / min(data.std) + (0 if dtype == torch.float32 else ULP * expected.abs())
        assert ((got.float() - on_torch).abs() <= bound).all()


@needs_gpu
def test_a_batch_needs_no_waiting_and_a_graph_reads_the_step_and_the_epoch():
    data = made_up(3, (32, 32), 4).to(torch.device("cuda"))
    batches = TrainBatches(data, BATCH, epochs=2, seed=0)
    first, second = batches.draw(0), batches.draw(1)
    drawn = Epoch(first.order.clone(), first.shifts.clone(), first.flips.clone())
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    eager = {
        (number, at): augmentation.augment(data, epoch, step + at, BATCH, torch.bfloat16)
        for number, epoch in enumerate((first, second))
        for at in range(NUMBER // BATCH)
    }
    with no_waiting():
        augmentation.augment(data, drawn, step, BATCH, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = augmentation.augment(data, drawn, step, BATCH, torch.bfloat16)
    for (number, at), expected in eager.items():
        epoch = (first, second)[number]
        drawn.order.copy_(epoch.order)
        drawn.shifts.copy_(epoch.shifts)
        drawn.flips.copy_(epoch.flips)
        step.fill_(at)
        graph.replay()
        assert torch.equal(out, expected)
