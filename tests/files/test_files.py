"""Sparse files: bit for bit the same comes back, they are small, and a damaged one is told."""

from __future__ import annotations

import io
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import feather_param
from feather_param import load_sparse, save_sparse, schedules
from feather_param.files import sparse as files
from tests.files.sparse_files import parts_of, read

DTYPES = list(files._DTYPES.values())


def bits(tensor: torch.Tensor) -> bytes:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    same_size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().view(same_size).contiguous().reshape(-1).numpy().tobytes()


def identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], density: float, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    size, n = dtype.itemsize, int(np.prod(shape))
    content = generator.integers(0, 2 if dtype == torch.bool else 256, (n, size), np.uint8)  # NaN payloads too
    content[generator.random(n) >= density] = 0
    return torch.from_numpy(content.reshape(-1)).view(dtype).reshape(shape)


def example(path: Path, zstd: bool) -> bytes:
    torch.manual_seed(0)
    state = {
        "sparse": torch.where(torch.rand(20, 30) < 0.2, torch.randint(1, 9, (20, 30)) / 8, 0.0),
        "dense": torch.randn(8, dtype=torch.complex64),
        "thin": torch.zeros(900, dtype=torch.bfloat16).index_fill(0, torch.tensor([7, 300]), 1.0),
        "n": torch.tensor(3),
        "none": torch.zeros(0, 4),
    }
    save_sparse({**state, "tied": state["sparse"]}, path, zstd=zstd)
    assert (b'\\"zstd\\":true' in path.read_bytes()) == zstd
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore:B?Complex(32|Half) support is experimental")
@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
@settings(max_examples=300, deadline=None)
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


def test_the_example_of_the_page(tmp_path):
    save_sparse({"t": torch.cat([torch.zeros(300), torch.ones(1), torch.zeros(600)])}, tmp_path / "t")
    _, data = parts_of((tmp_path / "t").read_bytes())
    assert data == {"gaps:t": bytes([255, 45, 255, 255]), "values:t": bytes([0, 0, 128, 63])}


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_safetensors_reads_theparts_of(tmp_path, zstd):
    safetensors = pytest.importorskip("safetensors")
    content = example(tmp_path / "t", zstd)
    with safetensors.safe_open(tmp_path / "t", "numpy") as file:
        _, data = parts_of(content)
        assert {name: file.get_tensor(name).tobytes() for name in file.keys()} == data  # noqa: SIM118


@pytest.mark.parametrize("run", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765, 65_535, 65_536, 65_537, 200_000])
def test_long_gaps(tmp_path, run):
    for before, behind in [(run, 0), (0, run), (run, run)]:
        tensor = torch.cat([torch.zeros(before), torch.tensor([float("nan")]), torch.zeros(behind)])
        save_sparse({"t": tensor}, tmp_path / "t")
        assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    save_sparse({"t": torch.zeros(run)}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], torch.zeros(run))


@pytest.mark.parametrize("density", [1e-5, 1e-3, 0.1, 0.79, 0.81])
def test_tensors_of_many_blocks(tmp_path, density):
    tensor = random_tensor(torch.float32, (700, 1000), density, seed=0)
    save_sparse({"t": tensor}, tmp_path / "t")
    assert identical(load_sparse(tmp_path / "t")["t"], tensor)
    assert read((tmp_path / "t").read_bytes())["t"][2] == bits(tensor)


def test_negative_zero_is_not_zero(tmp_path):
    tensor = torch.zeros(1000)
    tensor[7] = -0.0
    save_sparse({"t": tensor}, tmp_path / "t")
    assert load_sparse(tmp_path / "t")["t"][7].signbit()


def test_tied_tensors_and_views(tmp_path):
    weight, number = torch.randn(20, 30), torch.randn(5, dtype=torch.complex64)
    state = {
        "a": weight,
        "between": torch.randn(3),
        "b": weight,
        "transposed": weight.t(),
        "part": weight[3:5],
        "other dtype": weight.view(torch.int32),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(7),
        "parameter": nn.Parameter(torch.randn(3)),
        "conj": number.conj(),  # lies where number does, and is another one
        "number": number,
        "neg": number.conj().imag,
        "ranks": torch.ones([1] * 100),
    }
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert list(loaded) == list(state)
    assert loaded["a"] is loaded["b"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert (tmp_path / "t").stat().st_size < 4096 + sum(t.nbytes for t in state.values()) - weight.nbytes


def test_a_mapping_that_makes_its_tensors_is_not_taken_for_tied(tmp_path):
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
def test_any_name(tmp_path, name):
    state = {"a": torch.eye(30), name: torch.eye(40), name + "'": torch.zeros(0, 3)}
    save_sparse(state, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    assert list(loaded) == list(state)
    assert all(identical(loaded[name], tensor) for name, tensor in state.items())
    assert list(read((tmp_path / "t").read_bytes())) == list(state)


def test_loaded_tensors_are_their_own(tmp_path):
    save_sparse({"a": torch.ones(3), "b": torch.eye(30), "none": torch.zeros(0)}, tmp_path / "t")
    loaded = load_sparse(tmp_path / "t")
    loaded["a"].fill_(2)
    assert loaded["b"].sum() == 30
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values() if tensor.numel())
    stream = io.BytesIO()
    torch.save(loaded["a"], stream)
    assert len(stream.getvalue()) < 3000  # not the whole block
    save_sparse({}, tmp_path / "t")
    assert load_sparse(tmp_path / "t") == {}


def test_models(tmp_path):
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


@pytest.mark.parametrize(
    ("rate", "plain", "zstd"), [(0.9, 1.33, 1.1), (0.95, 0.69, 0.59), (0.98, 0.31, 0.27), (0.99, 0.18, 0.16)]
)
def test_a_tenth_of_resnet50(tmp_path, rate, plain, zstd):
    """A tenth of the sizes promised for ResNet-50, with weights that are normal and pruned everywhere alike."""
    torch.manual_seed(0)
    n = 2_550_000
    weight = torch.randn(n)
    weight = torch.where(weight.abs() > weight.abs().kthvalue(round(rate * n)).values, weight, 0)
    state = {"weight": weight, "norms and biases": torch.randn(10_724)}
    for limit, compress in ((plain, False), (zstd, True)):
        save_sparse(state, tmp_path / "t", zstd=compress)
        assert (tmp_path / "t").stat().st_size < limit * 1e6


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


def test_a_missing_folder_is_named_as_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder that is there, to write a file into: 'nowhere'"):
        save_sparse({"t": torch.zeros(3)}, "nowhere/t")
    (tmp_path / "link").symlink_to("gone/t")
    with pytest.raises(FileNotFoundError, match=r"write a file into: '.*gone'"):
        save_sparse({"t": torch.zeros(3)}, "link")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with a name and links are POSIX's")
def test_what_is_no_file_is_not_written_over(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ValueError, match=rf"expected a file or a new name, got .*{name}, a device or pipe"):
            save_sparse({"t": torch.zeros(3)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"expected a file or a new name, got .*, a folder"):
        save_sparse({"t": torch.zeros(3)}, tmp_path)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions and links are POSIX's")
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
    """Whoever comes last: the file is one of theirs, whole, at any moment."""
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


def test_memory(tmp_path):
    """Saving takes what is written and little more, loading what comes out and little more; torch's own not counted."""
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


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as torchao's and many others are."""

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
        ({"w": torch.empty(3, device="meta")}, "expected tensors with content, got one on meta without at w; load it"),
        ({"w": Wrapper()}, "expected tensors with content, got one on cpu without at w; load it first"),
        (
            {"w": nn.LazyLinear(3).weight},
            "expected tensors with content, got a lazy parameter at w; run the model once",
        ),
        ({3: torch.eye(3)}, "expected names to be strings of Unicode, got 3; rename it"),
        ({"\ud800": torch.eye(3)}, r"expected names to be strings of Unicode, got .*ud800'; rename it"),
    ],
)
def test_what_cannot_be_stored(tmp_path, state, message):
    with pytest.raises(TypeError, match=message):
        save_sparse(state, tmp_path / "t")
    assert not list(tmp_path.iterdir())


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


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ImportError, match=r"expected zstandard to be installed: pip install 'feather_param\[files\]'"):
        save_sparse({"w": torch.zeros(100)}, tmp_path / "t", zstd=True)
    assert not list(tmp_path.iterdir())
    save_sparse({"w": torch.zeros(100)}, tmp_path / "t")  # which needs nothing
    assert load_sparse(tmp_path / "t")["w"].shape == (100,)


@pytest.mark.parametrize("source", ["model.pt", [torch.ones(2)], None])
def test_what_is_neither_model_nor_state_dict(tmp_path, source):
    with pytest.raises(TypeError, match=f"expected a model or a state_dict, got {type(source).__name__}"):
        save_sparse(source, tmp_path / "t")


def test_the_state_of_a_sparsified_model_is_saved_with_a_warning(tmp_path):
    model = nn.Linear(8, 8)
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    state = model.state_dict()
    with pytest.warns(UserWarning, match=r"saved dense; to save the zeros, pass the model, or baked_state_dict"):
        save_sparse(state, tmp_path / "t")
    assert load_sparse(tmp_path / "t").keys() == state.keys()
    save_sparse(model, tmp_path / "t")  # without a warning, as warnings are errors here
    assert load_sparse(tmp_path / "t").keys() == {"weight", "bias"}
