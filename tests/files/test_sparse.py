"""Sparse files: the same bits come back, also of tied tensors, views and unusual names."""

from __future__ import annotations

import io
import sys
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from feather_param import load_sparse, save_sparse
from feather_param.files import sparse
from tests.files.sparse_files import parts_of, read
from tests.files.tensors import bits, example, identical, random_tensor

DTYPES = list(sparse._DTYPES.values())


@pytest.mark.filterwarnings("ignore:B?Complex(32|Half) support is experimental")
@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@settings(max_examples=300)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_the_same_bits_come_back(tmp_path_factory, zstd, dtype, shape, density, seed):
    path = tmp_path_factory.getbasetemp() / "round.safetensors"
    tensors = {"a": random_tensor(dtype, shape, density, seed), "b.c": random_tensor(dtype, (1500,), density, seed)}
    save_sparse(tensors, path, zstd=zstd)
    loaded = load_sparse(path)
    assert list(loaded) == list(tensors)
    assert all(identical(loaded[name], tensor) for name, tensor in tensors.items())
    for name, (kind, sizes, content) in read(path.read_bytes()).items():
        assert (kind, sizes) == (str(dtype).removeprefix("torch."), list(tensors[name].shape))
        assert content == bits(tensors[name])


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_safetensors_reads_the_parts(tmp_path, zstd):
    safetensors = pytest.importorskip("safetensors")
    content = example(tmp_path / "t", zstd)
    with safetensors.safe_open(tmp_path / "t", "numpy") as file:
        _, data = parts_of(content)
        assert {name: file.get_tensor(name).tobytes() for name in file.keys()} == data  # noqa: SIM118


def test_tied_tensors_are_stored_once_and_views_come_back(tmp_path):
    weight, number = torch.randn(20, 30), torch.randn(5, dtype=torch.complex64)
    state = {
        "a": weight,
        "between": torch.randn(3),
        "b": weight,
        "transposed": weight.t(),
        "slice": weight[3:5],
        "other dtype": weight.view(torch.int32),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(7),
        "parameter": nn.Parameter(torch.randn(3)),
        "conj": number.conj(),  # shares the memory of number, but has other values
        "number": number,
        "neg": number.conj().imag,
        "ranks": torch.ones([1] * 64),
    }
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert list(loaded) == list(state)
    assert loaded["a"] is loaded["b"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert (tmp_path / "t").stat().st_size < 4096 + sum(t.nbytes for t in state.values()) - weight.nbytes


def test_tensors_that_a_mapping_creates_on_access_are_not_tied(tmp_path):
    class Lazy(dict):
        def __getitem__(self, name):
            return torch.full((1000,), super().__getitem__(name))

        def items(self):
            return ((name, self[name]) for name in self)

    save_sparse(Lazy(a=1.0, b=2.0), tmp_path / "t")
    assert {name: int(tensor[0]) for name, tensor in load_sparse(tmp_path / "t").items()} == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "name", ["", ":", "gaps:a", "values:a", "__metadata__", "a b\n\0\\\"'/", "é\u0301 重み \U0001f600", "x" * 5000]
)
def test_any_name_comes_back(tmp_path, name):
    state = {"a": torch.eye(30), name: torch.eye(40), name + "'": torch.zeros(0, 3)}
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert list(loaded) == list(state)
    assert all(identical(loaded[name], tensor) for name, tensor in state.items())
    assert list(read((tmp_path / "t").read_bytes())) == list(state)


def test_loaded_tensors_do_not_overlap(tmp_path):
    save_sparse({"a": torch.ones(3), "b": torch.eye(30), "none": torch.zeros(0)}, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    loaded["a"].fill_(2)
    assert loaded["b"].sum() == 30
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values() if tensor.numel())
    stream = io.BytesIO()
    torch.save(loaded["a"], stream)
    assert len(stream.getvalue()) < 3000  # not the memory of all tensors
    save_sparse({}, tmp_path / "t")
    assert load_sparse(tmp_path / "t") == {}


def test_saving_and_loading_take_little_memory(tmp_path):
    """Saving and loading allocate little more than the file and the tensors. Memory of torch itself is not counted."""
    weight = random_tensor(torch.float32, (4_000_000,), 0.1, seed=0)
    dense = random_tensor(torch.float32, (4_000_000,), 1.0, seed=0)
    for state, saving, loading in (({"t": weight}, 0.5, 1.3), ({"t": dense}, 0.1, 2.1)):
        tracemalloc.start()
        try:
            save_sparse(state, tmp_path / "t")
            assert tracemalloc.get_traced_memory()[1] < saving * weight.nbytes
            tracemalloc.reset_peak()
            loaded = load_sparse(tmp_path / "t")
            assert tracemalloc.get_traced_memory()[1] < loading * weight.nbytes
        finally:
            tracemalloc.stop()
        assert identical(loaded["t"], state["t"])


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"expected zstandard to be installed: pip install 'feather_param\[files\]'"):
        save_sparse({"w": torch.zeros(100)}, tmp_path / "t", zstd=True)
    assert not list(tmp_path.iterdir())
    save_sparse({"w": torch.zeros(100)}, tmp_path / "t")  # without zstd no library is needed
    assert load_sparse(tmp_path / "t")["w"].shape == (100,)
