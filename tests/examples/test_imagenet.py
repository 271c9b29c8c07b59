"""The ImageNet script: its runs, its help and its errors, on 64 pictures of noise."""

from __future__ import annotations

import json
import re
import signal
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from examples import imagenet
from examples.imagenet import Training, parse
from examples.imagenet_data import ImageNet
from examples.imagenet_recipe import RECIPES
from examples.imagenet_training import require_fit
from examples.processes import Processes, choose_device
from examples.resumable import UserError
from tests.examples.imagenet import (
    BATCH,
    RATE,
    STEPS,
    TINY,
    VAL,
    agree_after_an_epoch,
    draw,
    end_with_exact_zeros,
    results_of,
    resumed_equals_uninterrupted,
    zeros_in,
)
from tests.examples.runs import only, scalars
from tests.processes.launch import run
from tests.training import same_state

ROOT = Path(imagenet.__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder of an uninterrupted run of recipe v2."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert imagenet.main([*TINY, str(images), "--recipe", "v2"]) == 0
    return folder


def models(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the saved weights of the network and of its average."""
    return {path.stem[20:]: torch.load(path, weights_only=True) for path in folder.glob("models/*")}


def test_a_run_writes_a_network_and_its_average_with_exact_zeros(finished: Path) -> None:
    saved = models(finished)
    assert saved.keys() == {"run", "run_ema"}
    for state in saved.values():
        zeros, total = zeros_in(state)
        assert zeros == round(RATE * total)
    results = results_of(finished)
    assert (results["zeros"], results["ema"]["zeros"]) == (zeros, zeros)
    assert [(row["step"], row["images"]) for row in results["epochs"]] == [(STEPS // 2, VAL), (STEPS, VAL)]
    assert [row["lr"] for row in results["epochs"]] == [0.01, 0]  # after the warm-up of one epoch, and after the cosine
    checkpoint = torch.load(only(finished, "runs/*") / "checkpoint.pt", weights_only=True)
    assert checkpoint["training"]["scheduler"]["last_epoch"] == 2  # the rate changes once an epoch
    assert results["accuracy"] == results["epochs"][-1]["accuracy"]
    assert results["ema"]["accuracy"] == results["epochs"][-1]["ema_accuracy"]
    files = {path.name.partition(".")[0] for path in only(finished, "runs/*").iterdir()}
    assert files == {"config", "results", "summary", "checkpoint", "events"}


def test_the_network_trains_on_mixed_images(images: Path) -> None:
    options, recipe = parse([*TINY, str(images), "--recipe", "v2"]), RECIPES["v2"]
    training = Training(options, ImageNet(images, recipe, 32, BATCH, 0, Processes()), torch.device("cpu"))
    batch, seen = next(iter(training.batches())), []
    training.forward = lambda images: seen.append(images) or training.model(images)
    training.step(batch)
    assert not torch.equal(seen[0], batch[0])


@pytest.mark.parametrize("at", [3, STEPS // 2])
def test_a_resumed_run_ends_like_an_uninterrupted_one(
    at: int, finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Training.step

    def interrupted(self: Training, batch: tuple[Tensor, Tensor]) -> None:
        if self.step_count == at - 1:
            signal.raise_signal(signal.SIGINT)
        step(self, batch)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        assert imagenet.main([*TINY, str(images), "--recipe", "v2"]) == 130
    folder = only(tmp_path, "runs/*")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["training"]["step"] == at
    assert imagenet.main(["--resume", str(folder)]) == 0
    ours, theirs = models(tmp_path), models(finished)
    assert all(same_state(ours[name], state) for name, state in theirs.items())
    assert results_of(tmp_path)["epochs"] == results_of(finished)["epochs"]


@pytest.mark.parametrize("name", ["end_epoch", "batches"])
def test_a_run_that_is_killed_in_or_after_an_evaluation_has_saved_its_epoch(
    name: str, finished: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = getattr(Training, name)

    def killed(self: Training) -> object:
        if self.step_count:
            raise KeyboardInterrupt
        return method(self)

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Training, name, killed)
        with pytest.raises(KeyboardInterrupt):
            imagenet.main([*TINY, str(images), "--recipe", "v2"])
    folder = only(tmp_path, "runs/*")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["training"]
    assert (state["step"], state["epoch"]) == (STEPS // 2, 0)
    assert imagenet.main(["--resume", str(folder)]) == 0
    assert results_of(tmp_path)["epochs"] == results_of(finished)["epochs"]
    assert scalars(folder) == scalars(only(finished, "runs/*"))  # the evaluation is shown once


def test_a_dense_run_of_a_real_network_compiled(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    # This network checks the version of a state that it loads.
    options = ["--model", "mnasnet0_5", "--ptarget", "0", "--recipe", "v2", "--epochs", "1", "--amp", "--compile"]
    assert imagenet.main([*TINY, str(images), *options]) == 0
    assert len(compiled) == 1
    assert results_of(tmp_path)["layers"] == []
    assert models(tmp_path).keys() == {"run", "run_ema"}
    assert "(0.000%)" in capsys.readouterr().out


FSDP = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # that of torch 2.6 does not run on a CPU


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_end_with_exact_zeros_also_if_interrupted(images: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(images)
    ddp, fsdp = ((), "ddp"), (("--recipe", "v2", "--parallel", "fsdp"), "fsdp")
    checks = [
        partial(end_with_exact_zeros, arguments=arguments, name=f"{name}_{interrupted}", interrupted=interrupted)
        for (arguments, name), interrupted in ((ddp, True), (fsdp, False), (fsdp, True))
    ]
    checks.append(partial(resumed_equals_uninterrupted, names=("fsdp_False", "fsdp_True")))
    checks.append(partial(agree_after_an_epoch, parallel="fsdp"))
    if not FSDP:
        del checks[1:]
    checks.append(partial(agree_after_an_epoch, parallel="ddp"))
    assert not run(checks, 2, tmp_path)


def test_the_help_says_what_90_epochs_cost() -> None:
    path = ROOT / "benchmarks" / "results" / "training_step_gpu.json"
    seconds = json.loads(path.read_text())["figures"]["resnet50"]["seconds"]
    steps = 90 * 1_281_167 / (8 * 16)  # of 8 GPUs with a batch of 16 images each
    sparse, dense = (steps * seconds[kind] / 3600 for kind in ("sparse", "dense"))
    assert imagenet.__doc__
    text = " ".join(imagenet.__doc__.split())
    assert f"at most {sparse:.1f} hours of 8 NVIDIA H200" in text
    assert f"or {dense:.1f} hours dense" in text
    assert f"{round(steps):,} steps with batch 16 a GPU" in text
    assert f"takes {seconds['sparse']:.4f} s (dense {seconds['dense']:.4f} s)" in text


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (
            ["--model", "resnet5"],
            "expected --model to be a network of torchvision, got 'resnet5'; do you mean resnet50",
        ),
        (["--ptarget", "1"], "expected --ptarget to be at least 0 and below 1"),
        (["--ptarget", "0.9999999"], "--ptarget 0.9999999 cannot be reached"),
        (["--batch-size", "1"], "expected --batch-size to be at least 2"),
        (["--batch-size", "48"], "expected a batch of 48 images for each of 1 processes, got 47 images in"),
        (["--parallel", "fsdp"], "expected several processes for --parallel fsdp, got one: start it with torchrun"),
        (["--parallel", "fsdp", "--compile"], "expected --compile without --parallel fsdp"),
        (["--parallel", "fsdp", "--allocation", "lamp"], "expected whole weights for --allocation lamp"),
        (["--sname", "../up"], "expected --sname to be a file name"),
        (["--recipe", "v3"], "argument --recipe: invalid choice"),
        (
            ["--data-dir", "nowhere"],
            "in nowhere/train .* got a folder which does not exist: ImageNet may not be passed",
        ),
        (["--data-dir", "empty"], "in empty/train .* got a folder which has none for some or all classes: .*unpacks"),
        (["--data-dir", "single"], "expected folders of two classes or more in single/train, got one class"),
        (["--data-dir", "differ"], "expected the same class folders in .* got 4 and 3, for example n00000003 in one"),
        (["--resume", "missing.pt"], "expected --resume to name a checkpoint file or the folder of a run"),
    ],
)
def test_wrong_options_get_one_sentence(
    argv: list[str],
    sentence: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty/train").mkdir(parents=True)
    for split in ("train", "val"):
        Path("single", split).mkdir(parents=True)
        Path("single", split, "n00000000").symlink_to(images / split / "n00000000")
    Path("differ/val").mkdir(parents=True)
    Path("differ/train").symlink_to(images / "train")
    for name in range(3):
        Path(f"differ/val/n0000000{name}").symlink_to(images / "val" / f"n0000000{name}")
    assert imagenet.main([*TINY, str(images), *argv]) == 2
    out, err = capsys.readouterr()
    assert re.search(sentence, err)
    assert (out, err.count("\n")) == ("", 1)
    assert not Path("runs").exists()


def test_resume_refuses_other_checkpoints(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = torch.load(only(finished, "runs/*") / "checkpoint.pt", weights_only=True)
    path, training, settings = tmp_path / "checkpoint.pt", checkpoint["training"], checkpoint["settings"]
    for changed, sentence in (
        ({"format": "feather_param/examples/cifar100"}, "a file of another program"),
        ({"training": {**training, "processes": 8}}, "expected 8 processes as in the run to resume, got 1"),
        (
            {"settings": {**settings, "ptarget": 0.25}},
            "expected a checkpoint of this network and data set, got another",
        ),
    ):
        torch.save({**checkpoint, **changed}, path)
        assert imagenet.main(["--resume", str(path)]) == 2
        assert sentence in capsys.readouterr().err


def test_networks_that_do_not_fit_are_refused() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == 224, "Wrong image height!"
            return x

    require_fit(Fixed(), "vit", 224, 224)
    with pytest.raises(
        UserError, match=r"expected --model vit to take images of 176 pixels, got 'Wrong image height!'"
    ):
        require_fit(Fixed(), "vit", 176, 224)

    class Auxiliary(nn.Module):
        def forward(self, x: Tensor) -> object:
            return types.SimpleNamespace(logits=x) if self.training else x

    with pytest.raises(UserError, match="expected --model to be a network with one output, got googlenet"):
        require_fit(Auxiliary(), "googlenet", 224, 224)


@pytest.mark.parametrize("rank", [0, 3])
def test_more_processes_than_gpus_are_refused_by_all_of_them(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="expected a GPU for each of 4 processes on this machine, got 2: lower --nproc"):
        choose_device(False, 0, Processes(rank, 4, rank))


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_damaged_image_is_named_in_one_line(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = draw(tmp_path / "images") / "train" / "n00000001" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    assert imagenet.main([*TINY, "images", "--workers", workers]) == 1
    error = capsys.readouterr().err
    assert re.search(r"failed: .*the image .*n00000001/1\.JPEG cannot be read: ", error)
    assert "Traceback" not in error
