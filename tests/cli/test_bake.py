"""The command bake: it writes what `baked_state_dict` of the model returns."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import feather_param
from feather_param import allocations, patterns
from tests.cli.commands import KINDS, done, fails
from tests.core.saved_states import ENTRY, bits, linear, require_same, tied, used_twice
from tests.network import net


def trained(build=net, **settings) -> nn.Module:
    """Return a sparsified model at its final rate."""
    torch.manual_seed(0)
    model = build()
    feather_param.sparsify(model, **{"final_rate": 0.5, "total_steps": 2, "end_step": 0, **settings})
    return model


def contents(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}  # transformers asks for it
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def lightning(state: dict[str, Tensor]) -> dict[str, object]:
    """Return a checkpoint with the entries that Lightning writes."""
    return {"epoch": 1, "global_step": 4, "state_dict": state, "optimizer_states": [{"state": {}, "param_groups": []}]}


# How a state is written, and the arguments with which it is found.
WRITERS = {
    "torch": (lambda state, path: torch.save(state, path), []),
    "legacy": (lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False), []),
    "safetensors": (lambda state, path: safetensors.torch.save_file(clones(state), path), []),
    "sparse": (lambda state, path: feather_param.save_sparse(state, path), []),
    "model": (lambda state, path: torch.save({"model": state}, path), []),
    "deeper": (lambda state, path: torch.save({"run": {"net": state}}, path), ["--key", "run.net"]),
}
MODELS = {
    "convolutions": (net, {"p": math.inf}),
    "channels last": (lambda: net().to(memory_format=torch.channels_last), {"allocation": allocations.lamp}),
    "pattern": (linear, {"pattern": patterns.n_m(2, 4), "final_rate": 0.4}),
    "own allocation": (linear, {"allocation": allocations.per_layer({"2": 0.3, "*": 0.6})}),
    "tied": (tied, {"p": 1.0}),
    "bfloat16": (lambda: linear(torch.bfloat16), {"max_rate_per_layer": 0.6}),
}


@pytest.mark.filterwarnings("ignore:expected baked weights")  # of save_sparse
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("build", "settings"), MODELS.values(), ids=MODELS)
def test_a_file_is_baked_like_its_model(build, settings, kind, suffix, run):
    model = trained(build, **settings)
    expected = feather_param.baked_state_dict(model)
    write, arguments = WRITERS[kind]
    write(model.state_dict(), Path("in"))
    before = Path("in").read_bytes()
    out = Path(f"out{suffix}")
    printed = done(run("bake", "in", out, *arguments))
    assert printed == f"in: {len(before):,} bytes\n{out}: {out.stat().st_size:,} bytes\n"
    found = contents(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(bits(found[name]), bits(tensor)), name
    plain = build()
    plain.load_state_dict(found)
    if kind in ("torch", "sparse") and suffix == ".pt" and build is tied:
        assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    assert Path("in").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == sorted(["in", out.name])


@pytest.mark.parametrize("build", [tied, used_twice])
def test_a_file_of_save_model_is_baked_for_load_model(build, run):
    model = trained(build)
    safetensors.torch.save_model(model, "in.safetensors")  # it leaves out one of two tied tensors
    done(run("bake", "in.safetensors", "out.safetensors"))
    plain = build()
    safetensors.torch.load_model(plain, "out.safetensors")
    assert all(
        torch.equal(value, plain.state_dict()[name]) for name, value in feather_param.baked_state_dict(model).items()
    )


def test_the_weights_of_a_checkpoint_with_other_values_are_baked_with_a_note(run):
    model = trained()
    torch.save(lightning(model.state_dict()), "epoch=1.ckpt")
    result = run("bake", "epoch=1.ckpt", "out.pt")
    assert result.status == 0
    assert result.err == (
        "feather-param: note: OUT holds the weights only; "
        "epoch=1.ckpt also holds epoch, global_step, optimizer_states\n"
    )
    assert list(contents(Path("out.pt"))) == list(feather_param.baked_state_dict(model))


def test_one_of_several_models_in_a_file_is_chosen_by_its_key(run):
    model = trained()
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(torch.rand_like(parameter))
    torch.save({"state_dict": model.state_dict(), "state_dict_ema": average.state_dict()}, "run.pt")
    torch.save({"generator": model.state_dict(), "other": {"critic": average.state_dict()}}, "pair.pt")
    for file, key, source in (
        ("run.pt", "state_dict", model),
        ("run.pt", "state_dict_ema", average),
        ("pair.pt", "other.critic", average),
    ):
        assert run("bake", file, "out.pt", "--key", key).status == 0
        found = contents(Path("out.pt"))
        assert all(torch.equal(found[name], value) for name, value in feather_param.baked_state_dict(source).items())
    fails(run("bake", "pair.pt", "no.pt"), 1, "choose one of these with --key: generator (")
    assert not Path("no.pt").exists()


def test_a_checkpoint_from_before_the_full_rate_is_baked_with_a_note(run):
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=4)
    controller.step()
    torch.save(model.state_dict(), "early.pt")
    result = run("bake", "early.pt", "out.pt")
    assert result.status == 0
    assert result.err.startswith(
        "feather-param: note: expected the bake of a state after the 2,095 zeros of final_rate"
    )
    assert result.err.count("\n") == 1
    found = contents(Path("out.pt"))
    assert all(torch.equal(found[name], value) for name, value in feather_param.baked_state_dict(model).items())


def test_a_frozen_checkpoint_is_baked(run):
    model = net()
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=8, end_step=4)
    controller.step()
    controller.freeze()
    torch.save(model.state_dict(), "in.pt")
    done(run("bake", "in.pt", "out.pt"))
    found = contents(Path("out.pt"))
    assert all(torch.equal(found[name], value) for name, value in feather_param.baked_state_dict(model).items())


@pytest.mark.filterwarnings("ignore:torch.distributed is .*unavailable or uninitialized")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # by the torch.distributed.checkpoint of torch 2.6
def test_a_distributed_checkpoint_is_baked_after_it_was_made_one_file(run):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    model = trained(linear, allocation=allocations.per_layer({"*": 0.5}))
    dcp.save({"model": model.state_dict()}, checkpoint_id="folder")
    dcp_to_torch_save("folder", "one.pt")
    done(run("bake", "one.pt", "out.pt"))
    found = contents(Path("out.pt"))
    assert all(torch.equal(found[name], value) for name, value in feather_param.baked_state_dict(model).items())
    other = linear(seed=1)
    controller = feather_param.sparsify(
        other, final_rate=0.5, total_steps=9, allocation=allocations.per_layer({"*": 0.5})
    )
    target = {"model": other.state_dict()}  # at another step: the entry has the same size
    dcp.load(target, checkpoint_id="folder")
    other.load_state_dict(target["model"])
    assert controller.report().zeros == round(0.5 * 1088)
    require_same(other)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_baked_are_named_in_one_sentence(run):
    state = trained().state_dict()
    without = {name: value for name, value in state.items() if name != ENTRY}
    for content, message in (
        (net().state_dict(), "expected the state of a sparsified model, got a plain one: there is nothing to bake"),
        (without, "expected an entry *.shared._extra_state beside 0.parametrizations.weight.original, got none"),
        ({**state, ENTRY: state[ENTRY].float()}, f"expected the position of a sparsified model ({ENTRY}) to be a row"),
        ({**state, ENTRY: state[ENTRY][:-1]}, f"expected {ENTRY} as feather_param saves it, got a damaged one"),
        (
            {**state, ENTRY: torch.tensor([1, 9, 9, -1])},
            "expected a state with the settings of its training, got one of an older",
        ),
        ({**state, "epoch": 3}, "expected tensors alone, got int at epoch, which cannot be written; remove it"),
    ):
        torch.save(content, "in.pt")
        fails(run("bake", "in.pt", "out.pt"), 1, f"in.pt: {message}")
    assert not Path("out.pt").exists()


def test_a_plain_or_baked_file_needs_no_bake(run):
    for kind in ("torch", "safetensors", "sparse"):
        KINDS[kind](Path("in"))
        fails(run("bake", "in", "out.pt"), 1, "in: expected the state of a sparsified model, got a plain one")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bake", "in.pt"], "the following arguments are required: OUT; see feather-param bake --help"),
        (["bake", "in.pt", "in.pt"], "expected two files, got in.pt twice"),
        (["bake", "in.pt", "out.ckpt"], "expected OUT to end in .pt, .pth, .bin or .safetensors, got out.ckpt"),
        (["bake", "in.pt", "nowhere/out.pt"], "expected OUT in an existing folder, got nowhere/out.pt"),
        (["bake", "in.pt", "."], "expected OUT to be a file, got the folder ."),
    ],
)
def test_wrong_usage_ends_with_2_and_one_sentence(argv, message, run):
    torch.save(trained().state_dict(), "in.pt")
    before = Path("in.pt").read_bytes()
    fails(run(*argv), 2, message)
    assert [path.name for path in Path().iterdir()] == ["in.pt"]
    assert Path("in.pt").read_bytes() == before
