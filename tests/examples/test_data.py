"""The data sets are read from every layout, and batches depend only on the seed and the step."""

from __future__ import annotations

import os
import pickle
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from examples.data import TrainBatches, batch_loader, crop_and_flip, load_data
from examples.images import ImageData, Split, balanced_subset
from examples.resumable import UserError

# data set: classes, label bytes, folder and files of the binary version, folder and files of torchvision's, key
LAYOUTS = {
    "cifar100": (100, 2, "cifar-100-binary", ["train.bin"], "test.bin", "cifar-100-python", ["train"], "test"),
    "cifar10": (
        *(10, 1, "cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], "test_batch.bin"),
        *("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    ),
}


def pixels_and_labels(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 3072), dtype=np.uint8), random.integers(0, classes, count, dtype=np.uint8)


def write_binary(path: Path, pixels: np.ndarray, labels: np.ndarray, label_bytes: int) -> None:
    path.parent.mkdir(exist_ok=True)
    coarse = np.full((len(labels), label_bytes - 1), 19, dtype=np.uint8)
    np.concatenate([coarse, labels[:, None], pixels], axis=1).tofile(path)


def write_python(path: Path, pixels: np.ndarray, labels: np.ndarray, key: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"data": pixels, key: labels.tolist(), "coarse_labels": [0] * len(labels)}))


@pytest.mark.parametrize("layout", ["binary", "python"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_folder_layout_is_read(name: str, layout: str, tmp_path: Path) -> None:
    classes, label_bytes, binary, binary_train, binary_test, python, python_train, python_test = LAYOUTS[name]
    key = "fine_labels" if name == "cifar100" else "labels"
    written = []
    train_files, test_file = (binary_train, binary_test) if layout == "binary" else (python_train, python_test)
    for seed, file in enumerate([*train_files, test_file]):
        pixels, labels = pixels_and_labels(7 + seed, classes, seed)
        written.append((pixels, labels))
        if layout == "binary":
            write_binary(tmp_path / binary / file, pixels, labels, label_bytes)
        else:
            write_python(tmp_path / python / file, pixels, labels, key)
    data = load_data(name, tmp_path)
    for split, parts in ((data.train, written[:-1]), (data.test, written[-1:])):
        assert split.images.dtype == torch.uint8
        assert split.images.flatten(1).tolist() == np.concatenate([pixels for pixels, _ in parts]).tolist()
        assert split.images.shape[1:] == (3, 32, 32)
        assert split.labels.tolist() == np.concatenate([labels for _, labels in parts]).tolist()
    assert (data.classes, data.channels, data.padding, data.flip) == (classes, 3, 4, True)


@pytest.mark.parametrize("layout", ["binary", "python"])
def test_ten_has_the_first_ten_classes_of_cifar100_and_its_normalisation(layout: str, tmp_path: Path) -> None:
    written = {}
    for seed, name in enumerate(("train", "test")):
        pixels, labels = pixels_and_labels(500, 100, seed)
        written[name] = pixels[labels < 10].tolist(), labels[labels < 10].tolist()
        if layout == "binary":
            write_binary(tmp_path / "cifar-100-binary" / f"{name}.bin", pixels, labels, 2)
        else:
            write_python(tmp_path / "cifar-100-python" / name, pixels, labels, "fine_labels")
    data, whole = load_data("ten", tmp_path), load_data("cifar100", tmp_path)
    for split, (pixels, labels) in zip((data.train, data.test), written.values(), strict=True):
        assert split.images.flatten(1).tolist() == pixels
        assert split.labels.tolist() == labels
    assert data.classes == 10
    assert (data.mean, data.std, data.padding, data.flip) == (whole.mean, whole.std, whole.padding, whole.flip)


def test_the_python_folder_is_preferred_to_the_binary_one(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_python(tmp_path / "cifar-100-python" / name, *pixels_and_labels(3, 100, 0), "fine_labels")
        write_binary(tmp_path / "cifar-100-binary" / f"{name}.bin", *pixels_and_labels(4, 100, 0), 2)
    assert len(load_data("cifar100", tmp_path).train) == 3


@pytest.mark.parametrize("dataset", ["cifar100", "ten"])
@pytest.mark.parametrize("content", [b"", b"12345", bytes([0, 100]) + bytes(3072)])
def test_a_damaged_file_is_named(content: bytes, dataset: str, tmp_path: Path) -> None:
    for name in ("train", "test"):
        path = tmp_path / "cifar-100-binary" / f"{name}.bin"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"expected CIFAR100 in .*train\.bin"):
        load_data(dataset, tmp_path)


@pytest.mark.parametrize(("dataset", "name"), [("cifar100", "cifar100"), ("cifar10", "cifar10"), ("ten", "cifar100")])
def test_a_failing_download_says_what_would_help(
    dataset: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    def no_network(*args: object, **keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, name.upper(), no_network)
    with pytest.raises(UserError) as caught:
        load_data(dataset, tmp_path)
    for help in ("no network", f"{LAYOUTS[name][5]} there", f"{LAYOUTS[name][2]} there", "--dataset digits"):
        assert help in str(caught.value)


def test_a_failing_download_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def no_network(folder: str, download: bool) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    for folder in (tmp_path / "new" / "data", tmp_path):
        with pytest.raises(UserError, match="no network"):
            load_data("cifar100", folder)
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no network"):
        load_data("cifar100", Path("data"))
    assert not list(tmp_path.iterdir())


def test_the_error_of_an_incomplete_folder_says_to_replace_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def no_network(*args: object, **keywords: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", no_network)
    write_python(tmp_path / "cifar-100-python" / "train", *pixels_and_labels(3, 100, 0), "fine_labels")
    with pytest.raises(UserError, match=r"replace the folder cifar-100-python, which lacks files, put the official"):
        load_data("cifar100", tmp_path)
    assert (tmp_path / "cifar-100-python" / "train").exists()


@pytest.mark.parametrize("name", ["cifar-100-python", "cifar-100-binary"])
def test_the_error_of_a_truncated_file_says_to_fetch_it_again(name: str, tmp_path: Path) -> None:
    for part in ("train", "test"):
        path = tmp_path / name / (part if name.endswith("python") else f"{part}.bin")
        if name.endswith("python"):
            write_python(path, *pixels_and_labels(3, 100, 0), "fine_labels")
        else:
            write_binary(path, *pixels_and_labels(3, 100, 0), 2)
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"the file is damaged or incomplete, fetch {name} again"):
        load_data("cifar100", tmp_path)


def test_digits_split_is_fixed() -> None:
    data, again = load_data("digits", Path("nowhere")), load_data("digits", Path("nowhere"))
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert torch.equal(data.test.images, again.test.images)
    assert data.train.images.max() == 255
    normal = data.normalise(data.train.images)
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01


@pytest.mark.parametrize("size", [10, 55, 1000])
def test_subset_is_class_balanced_and_fixed(size: int) -> None:
    train = load_data("digits", Path("nowhere")).train
    subset = balanced_subset(train, size)
    counts = subset.labels.bincount(minlength=10)
    assert len(subset) == size
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(subset.images, balanced_subset(train, size).images)
    # A larger subset holds the smaller ones.
    larger = {image.numpy().tobytes() for image in balanced_subset(train, size + 100).images}
    assert all(image.numpy().tobytes() in larger for image in subset.images)


def test_subset_larger_than_the_set_is_refused() -> None:
    with pytest.raises(UserError, match="--train-size to be at most the 1437 images"):
        load_data("digits", Path("nowhere"), 1438)


@pytest.fixture
def coloured() -> ImageData:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(1, 256, (50, 3, 32, 32), dtype=np.uint8))
    split = Split(images, torch.arange(50))  # the label is the index of the image
    return ImageData(split, split, 50, padding=4, flip=True, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_for_any_number_of_workers(coloured: ImageData, workers: int) -> None:
    batches = TrainBatches(coloured, batch_size=16, epochs=2, seed=1)
    # A resumed run starts in the middle.
    loader = DataLoader(batches, batch_size=None, sampler=range(2, len(batches)), num_workers=workers)
    seen = list(loader)
    assert len(seen) == len(batches) - 2
    for step, (images, labels) in enumerate(seen, start=2):
        expected = TrainBatches(coloured, batch_size=16, epochs=2, seed=1)[step]
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_worker_leaves_signals_to_the_program(coloured: ImageData) -> None:
    batches = TrainBatches(coloured, batch_size=16, epochs=2, seed=1)
    loading = iter(batch_loader(batches, 0, 1, torch.device("cpu")))
    next(loading)
    (worker,) = loading._workers  # type: ignore[attr-defined]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):  # a terminal or a batch system sends it to all
        os.kill(worker.pid, number)
    assert len(list(loading)) == len(batches) - 1


def test_an_epoch_visits_every_image_once_and_differs_from_the_next(coloured: ImageData) -> None:
    batches = TrainBatches(coloured, batch_size=16, epochs=2, seed=1)
    assert batches.steps_per_epoch == 4
    assert [len(batches[step][1]) for step in range(4)] == [16, 16, 16, 2]
    first, second = (torch.cat([batches[step][1] for step in range(i, i + 4)]).tolist() for i in (0, 4))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    other = TrainBatches(coloured, batch_size=16, epochs=2, seed=2)
    assert not torch.equal(batches[0][0], other[0][0])


def test_a_last_batch_of_one_image_is_left_out(coloured: ImageData) -> None:
    batches = TrainBatches(coloured, batch_size=7, epochs=1, seed=0)
    assert [len(batches[step][1]) for step in range(len(batches))] == [7] * 7


def test_crop_and_flip_against_a_loop(coloured: ImageData) -> None:
    random = np.random.default_rng(3)
    images = coloured.train.images[:20]
    shifts = torch.from_numpy(random.integers(0, 9, (2, 20)))
    flips = torch.from_numpy(random.integers(0, 2, 20).astype(bool))
    result = crop_and_flip(images, 4, shifts, flips)
    for i, image in enumerate(images):
        padded = np.zeros((3, 40, 40), dtype=np.uint8)
        padded[:, 4:36, 4:36] = image.numpy()
        crop = padded[:, shifts[0, i] : shifts[0, i] + 32, shifts[1, i] : shifts[1, i] + 32]
        assert np.array_equal(result[i].numpy(), crop[:, :, ::-1] if flips[i] else crop)


def test_digits_are_never_mirrored() -> None:
    data = load_data("digits", Path("nowhere"))
    data = replace(data, padding=0)  # no crop changes an image
    images, _ = TrainBatches(data, batch_size=64, epochs=1, seed=0)[0]
    originals = {image.numpy().tobytes() for image in data.train.images}
    assert all(image.numpy().tobytes() in originals for image in images)


def test_crops_and_mirrors_are_drawn_as_torchvisions_transforms_draw_them() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = torch.arange(1, 17, dtype=torch.uint8).view(
        1, 1, 4, 4
    )  # all pixels differ, and none is black like the padding
    count, padding = 9_000, 1
    split = Split(image.expand(count, 1, 4, 4), torch.zeros(count, dtype=torch.int64))
    data = ImageData(split, split, 1, padding=padding, flip=True, mean=(0.5,), std=(0.25,))
    ours = TrainBatches(data, batch_size=count, epochs=1, seed=0)[0][0]
    torch.manual_seed(0)
    transform = transforms.Compose([transforms.RandomCrop(4, padding=padding), transforms.RandomHorizontalFlip()])
    theirs = torch.stack([transform(image[0]) for _ in range(count)])
    found = [Counter(one.numpy().tobytes() for one in images) for images in (ours, theirs)]
    outcomes = (2 * padding + 1) ** 2 * 2
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == outcomes
    # All outcomes are equally likely: Pearson's statistic (17 degrees) exceeds 68 once in ten million draws.
    expected = count / outcomes
    assert all(sum((n - expected) ** 2 / expected for n in counts.values()) < 68.0 for counts in found)
