"""`save_sparse` of models and state_dicts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_param
from feather_param import load_sparse, save_sparse, schedules
from feather_param.files import safetensors
from tests.files.tensors import identical


def test_a_sparsified_model_is_saved_as_its_baked_one(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    feather_param.sparsify(model, final_rate=0.95, total_steps=1, schedule=schedules.constant)
    save_sparse(model, tmp_path / "sparsified")
    feather_param.desparsify(model)
    save_sparse(model, tmp_path / "baked")
    assert (tmp_path / "baked").read_bytes() == (tmp_path / "sparsified").read_bytes()
    plain = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100), nn.Linear(100, 10))
    plain.load_state_dict(load_sparse(tmp_path / "baked"))
    assert all(identical(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert (tmp_path / "baked").stat().st_size < 0.25 * 4 * 11_110


class Wrapper(torch.Tensor):
    """A tensor subclass without memory of its own, as those of torchao."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(cls, (3,), dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"epoch": 3}, "expected dense tensors of plain dtypes, got int at epoch; leave it out"),
        ({"w": torch.eye(3).to_sparse()}, "plain dtypes, got a torch.sparse_coo tensor of torch.float32 at w; leave"),
        ({"w": torch.empty(3, device="meta")}, "expected tensors with content, got one without memory on meta at w"),
        ({"w": Wrapper()}, "expected tensors with content, got one without memory on cpu at w"),
        (
            {"w": nn.LazyLinear(3).weight},
            "expected tensors with content, got a lazy parameter at w; run the model once",
        ),
        ({3: torch.eye(3)}, "expected names to be strings, got 3; rename it"),
    ],
)
def test_entries_that_cannot_be_stored_are_refused(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        save_sparse(state, tmp_path / "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a\ud800b": torch.eye(3)},
            r"expected names of Unicode characters, got the lone surrogate in a\\ud800b; rename",
        ),
        ({"w": torch.ones([1] * 65)}, "expected at most 64 dimensions, got 65 at w; reshape it"),
        ({"w" * 500: torch.eye(3)}, "expected a header of at most 1,000 bytes, got 2,.*; shorten the tensors' names"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, monkeypatch, state, message):
    monkeypatch.setattr(safetensors, "_LONGEST_HEADER", 1000)
    (tmp_path / "t").write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        save_sparse({"first": torch.eye(3), **state}, tmp_path / "t")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_tensors_are_refused(tmp_path):
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match=r"plain dtypes, got a torch.strided tensor of torch.quint8 at w; leave it out"):
        save_sparse({"w": quantised}, tmp_path / "t")


@pytest.mark.filterwarnings("ignore:DTensor random operators")  # torch 2.6
def test_sharded_tensors_are_refused(tmp_path):
    distributed = pytest.importorskip("torch.distributed.tensor")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = distributed.distribute_tensor(torch.eye(4), mesh, [distributed.Shard(0)])
        with pytest.raises(
            TypeError, match=r"expected whole tensors, got one sharded over processes at w; call full_ten"
        ):
            save_sparse({"w": sharded}, tmp_path / "t")
        save_sparse({"w": sharded.full_tensor()}, tmp_path / "t")
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(load_sparse(tmp_path / "t")["w"], torch.eye(4))


@pytest.mark.parametrize("source", ["model.pt", [torch.ones(2)], None])
def test_other_sources_are_refused(tmp_path, source):
    with pytest.raises(TypeError, match=f"expected a model or a state_dict, got {type(source).__name__}"):
        save_sparse(source, tmp_path / "t")


def test_the_state_of_a_sparsified_model_is_saved_with_a_warning(tmp_path):
    model = nn.Linear(8, 8)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    state = model.state_dict()
    with pytest.warns(UserWarning, match=r"saved dense; to save the zeros, pass the model, or baked_state_dict"):
        save_sparse(state, tmp_path / "t")
    assert load_sparse(tmp_path / "t").keys() == state.keys()
    save_sparse(model, tmp_path / "t")  # a warning would be an error
    assert load_sparse(tmp_path / "t").keys() == {"weight", "bias"}


def test_a_refused_state_of_a_sparsified_model_causes_no_warning(tmp_path):
    model = nn.Linear(4, 4)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    with pytest.raises(TypeError, match="at epoch"):
        save_sparse({**model.state_dict(), "epoch": 3}, tmp_path / "t")
