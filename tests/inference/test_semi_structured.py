"""2:4 sparsity: the check against a slow twin and torch's converter, and the conversion."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

import feather_param
from feather_param.inference import is_semi_structured, semi_structured, to_semi_structured

HALVES = [torch.float16, torch.bfloat16]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def two_of_four(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Return a random 2:4 matrix: each group of 4 has two elements that are not zero, at random positions."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, columns // 4, 4, generator=generator).topk(2, dim=-1).indices
    mask = torch.zeros(rows, columns // 4, 4).scatter_(-1, kept, 1.0)
    return torch.randn(rows, columns, generator=generator) * mask.reshape(rows, columns)


def net(dtype: torch.dtype = torch.float16) -> nn.Sequential:
    """Return a model with tied layers, a convolution and a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 64, bias=False), nn.Linear(64, 128))
    model.append(nn.Conv1d(128, 64, 1))
    model[3].weight = model[0].weight
    with torch.no_grad():
        for index in (0, 2):
            model[index].weight.copy_(two_of_four(*model[index].weight.shape, seed=index))
    return model.to(dtype)


def untouched(model: nn.Module, before: dict[str, Tensor], parameters: list[nn.Parameter]) -> bool:
    after = model.state_dict()
    same = all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    return same and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def snapshot(model: nn.Module) -> tuple[dict[str, Tensor], list[nn.Parameter]]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, list(model.parameters())


def on_cpu(weight: Tensor) -> Tensor:
    """Convert a weight with torch's CUTLASS backend. Its own constructor requires a GPU."""
    packed, meta = sparse_semi_structured_from_dense_cutlass(weight.detach())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor is in prototype", UserWarning)
        return SparseSemiStructuredTensorCUTLASS(weight.shape, packed, meta, None, None, None)


def to_dense(weight: Tensor) -> Tensor:
    return sparse_semi_structured_to_dense_cutlass(weight.packed, weight.meta)


def twin(tensor: Tensor) -> bool:
    def good(row: list) -> bool:
        groups = [row[i : i + 4] for i in range(0, len(row), 4)]
        return all(len(group) == 4 and sum(value != 0 for value in group) <= 2 for group in groups)

    return all(good(row) for row in tensor.reshape(-1, tensor.shape[-1]).tolist())


VALUES = st.sampled_from([0.0, 0.0, 0.0, 0.0, -0.0, 1.0, -2.0, float("nan"), float("inf")])


@settings(max_examples=300)
@given(
    data=st.data(),
    lead=st.lists(st.integers(1, 3), max_size=2),
    columns=st.integers(1, 13),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_check_equals_a_slow_twin(data, lead, columns, dtype):
    shape = [*lead, columns]
    size = int(torch.tensor(shape).prod())
    tensor = torch.tensor(data.draw(st.lists(VALUES, min_size=size, max_size=size)), dtype=dtype).view(shape)
    assert is_semi_structured(tensor) is twin(tensor)
    flipped = tensor.flip(-1).transpose(0, -1).contiguous().transpose(0, -1)  # not contiguous
    assert is_semi_structured(flipped) is twin(flipped)


@settings(max_examples=100)
@given(
    data=st.data(),
    dtype=st.sampled_from([*HALVES, torch.int8]),
    rows=st.sampled_from([32, 64]),
    columns=st.sampled_from([128, 256]),
    seed=st.integers(0, 1000),
)
def test_the_check_is_true_if_torchs_converter_loses_nothing(data, dtype, rows, columns, seed):
    weight = (two_of_four(rows, columns, seed) * 4).to(dtype)
    row, group = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns // 4 - 1))
    weight[row, 4 * group : 4 * group + 4] = torch.tensor(
        data.draw(st.lists(st.sampled_from([0, 1, -3]), min_size=4, max_size=4))
    )
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert is_semi_structured(weight) is torch.equal(back, weight)


@pytest.mark.parametrize(
    ("shape", "answer"), [((), False), ((3,), False), ((4, 0), True), ((0, 4), True), ((2, 6), False)]
)
def test_the_check_of_empty_and_small_tensors(shape, answer):
    assert is_semi_structured(torch.zeros(shape)) is answer


def test_the_check_of_a_model_includes_all_linear_layers():
    model = net()
    assert is_semi_structured(model)
    assert not is_semi_structured(nn.Conv1d(4, 4, 1))
    with torch.no_grad():
        model[2].weight[5, 4:7] = 1.0
    assert not is_semi_structured(model)
    assert is_semi_structured(nn.ModuleList([model[0], model[3]]))


def test_the_check_of_a_sparsified_model_uses_the_thresholded_weights():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    controller = feather_param.sparsify(model, final_rate=0.5, total_steps=2)
    assert not is_semi_structured(model)
    controller.step()
    assert is_semi_structured(model)


def test_the_check_takes_tensors_and_models():
    with pytest.raises(TypeError, match=r"expected a tensor or an nn\.Module, got list"):
        is_semi_structured([0.0, 0.0, 1.0, 1.0])


# Refusals. The device is checked last, so that these tests run on a CPU


def test_both_backends_of_torch_take_the_sizes():
    for backend in (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT):
        for dtype in semi_structured._DTYPES:
            needs = backend._DTYPE_SHAPE_CONSTRAINTS[dtype]
            assert semi_structured._ROWS % needs.sparse_min_rows == 0
            assert semi_structured._COLUMNS % needs.sparse_min_cols == 0


def overfull(model: nn.Sequential) -> nn.Module:
    with torch.no_grad():
        model[2].weight[3, 8:11] = 1.0
        model[2].weight[4, 0:4] = 1.0
    return model


def with_head(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(model, nn.Linear(64, 10).half())


def seven_dense_layers(_: nn.Sequential) -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64).half() for _ in range(7)))


def sparsified(model: nn.Sequential) -> nn.Module:
    feather_param.sparsify(model.float(), final_rate=0.5, total_steps=1)
    return model


def normed(model: nn.Sequential) -> nn.Module:
    parametrizations.weight_norm(model[2].float())
    return model


def normed_by_a_hook(model: nn.Sequential) -> nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm", FutureWarning)
        weight_norm(model[2].float())
    return model


def encoder(_: nn.Sequential) -> nn.Module:
    return nn.TransformerEncoderLayer(64, 4, 64).half()


def attention(_: nn.Sequential) -> nn.Module:
    return nn.ModuleDict({"attend": nn.MultiheadAttention(64, 4).half()})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: model, ValueError, r"on a GPU, got 0 on cpu; .* call model\.cuda\(\) first"),
        (lambda model: model[0], ValueError, "on a GPU, got the model on cpu"),
        (overfull, ValueError, "got: 2: 2 of 2048 groups of 4 hold more than 2 non-zeros: prune it 2:4"),
        (with_head, ValueError, "got: 1: its weight is 10 x 64, not multiples of 32 x 64: it has to stay dense"),
        (nn.Module.float, ValueError, r"0: its weight is float32: cast it with \.half\(\) or \.bfloat16\(\)"),
        (nn.Module.double, ValueError, "0: its weight is float64"),
        (
            seven_dense_layers,
            ValueError,
            "; 4: 1024 of 1024 groups .* drop the others; and 2 more layers; or convert only",
        ),
        (sparsified, RuntimeError, r"recomputed at each use at 0; call feather_param\.desparsify"),
        (normed, RuntimeError, "recomputed at each use at 2; .* remove the other parametrization"),
        (normed_by_a_hook, RuntimeError, "recomputed at each use at 2;"),
        (
            encoder,
            ValueError,
            r"got linear1: .* TransformerEncoderLayer passes it .* call torch.*set_fastpath_enabled\(False\)",
        ),
        (attention, ValueError, r"got attend\.out_proj: .* MultiheadAttention passes it to a fused kernel"),
        (lambda model: model[4], ValueError, "with dense Linear layers, got Conv1d without"),
    ],
    ids=[
        *("cpu", "layer", "overfull", "head", "float32", "float64", "many", "sparsified", "weight_norm", "hook"),
        *("encoder", "attention", "convolution"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused_and_untouched(change, error, message):
    model = change(net())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        to_semi_structured(model)
    assert untouched(model, *before)


def test_only_modules_are_converted():
    with pytest.raises(TypeError, match=r"expected model to be an nn\.Module, got Tensor"):
        to_semi_structured(two_of_four(32, 64))


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"8\.0 \(Ampere\) or newer, got 7\.5 for fc; older ones"):
        semi_structured._refuse_device("fc", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    semi_structured._refuse_device("fc", torch.device("cuda"))


def test_the_fast_path_of_attention_takes_no_converted_weights():
    """The reason for the refusal of these layers. If this test fails, torch supports them and the refusal can go."""
    layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True).half().eval()
    layer.linear1.weight = nn.Parameter(on_cpu(two_of_four(64, 64).half()), requires_grad=False)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="_transformer_encoder_layer_fwd"):
        layer(torch.zeros(1, 2, 64, dtype=torch.float16))


# The conversion, with torch's CPU routine instead of the one that needs a GPU


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(semi_structured, "_refuse_device", lambda name, device: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", on_cpu)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_only_linear_weights_are_converted(without_gpu, dtype):
    model = net(dtype)
    (state, _), dense_bytes = snapshot(model), model[0].weight.nbytes

    def others() -> list[nn.Parameter]:
        return [model[0].bias, *model[1].parameters(), *model[4].parameters()]

    before = others()
    assert to_semi_structured(model) == ["0", "2", "3"]
    for index in (0, 2, 3):
        weight = model[index].weight
        assert isinstance(weight, SparseSemiStructuredTensorCUTLASS)
        assert torch.equal(to_dense(weight), state[f"{index}.weight"])
        assert not weight.requires_grad
    assert model[0].weight is model[3].weight
    assert model[0].weight.packed.nbytes + model[0].weight.meta.nbytes == dense_bytes * 9 // 16
    assert all(a is b for a, b in zip(before, others(), strict=True))
    assert is_semi_structured(model)


def test_submodules_can_be_converted_one_by_one(without_gpu):
    model = with_head(net())
    to_semi_structured(model[0][0])
    assert to_semi_structured(model[0]) == ["2", "3"]  # 0 is converted already, and no longer tied to 3
    assert type(model[1].weight) is nn.Parameter
    with pytest.raises(ValueError, match="with dense Linear layers, got Sequential without"):
        to_semi_structured(model[0])


def test_attention_is_converted_if_its_fast_path_is_off(without_gpu):
    layer = nn.TransformerEncoderLayer(64, 4, 64).half()
    with torch.no_grad():
        for linear in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
            linear.weight.copy_(two_of_four(64, 64))
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert to_semi_structured(layer) == ["self_attn.out_proj", "linear1", "linear2"]
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_torch_failing_on_a_later_layer_leaves_the_model_untouched(without_gpu, monkeypatch):
    def fail_on_the_second(weight: Tensor) -> Tensor:
        if weight.shape == (64, 128):
            raise RuntimeError("no kernel")
        return on_cpu(weight)

    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", fail_on_the_second)
    model = net()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no kernel"):
        to_semi_structured(model)
    assert untouched(model, *before)


@needs_gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_a_converted_layer_computes_the_same_on_a_gpu(dtype, bias, batch):
    torch.manual_seed(0)
    layer = nn.Linear(128, 64, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(two_of_four(64, 128))
    layer.to("cuda", dtype)
    x = torch.randn(batch, 128, device="cuda", dtype=dtype)
    with torch.inference_mode():
        dense = layer(x)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*SparseSemiStructuredTensor is in prototype", UserWarning)
            to_semi_structured(layer)
        sparse = layer(x)
    # Both sum in float32 and round to the dtype once, or twice with the bias.
    bound = 4 * torch.finfo(dtype).eps * dense.abs().max().item()
    assert torch.allclose(sparse.float(), dense.float(), rtol=0.0, atol=bound)


@needs_gpu
def test_a_dense_weight_is_refused_on_a_gpu():
    model = nn.Linear(64, 64).half().cuda()
    with pytest.raises(ValueError, match="groups of 4 hold more than 2 non-zeros"):
        to_semi_structured(model)
