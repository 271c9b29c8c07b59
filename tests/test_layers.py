"""Any layer: each trains, reports, and bakes exactly; what cannot is refused in a clear sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from feather_param import schedules
from tests.training import dense_weights, keys, pruned_places, train, zeros_after_baking


class Conv1D(nn.Module):
    """As in GPT-2: a linear layer with its weight transposed."""

    def __init__(self, out: int, inp: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inp, out) * 0.1)
        self.bias = nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Apply(nn.Module):
    """A module called in its own way."""

    def __init__(self, module: nn.Module, call) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out = self.call(self.module, x)
        return out[0] if isinstance(out, tuple) else out


class Shared(nn.Module):
    """One module standing in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.first(x)))


class Tied(nn.Module):
    """A language model's head: the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x.argmax(-1) % 20)))


def attention(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, x, x)


def other_sizes() -> nn.Module:
    return nn.MultiheadAttention(16, 4, kdim=12, vdim=8, batch_first=True)


CASES = {
    "MultiheadAttention": (
        lambda: Apply(nn.MultiheadAttention(16, 4, batch_first=True), attention),
        ["*.in_proj_weight", "*.out_proj"],
    ),
    "MultiheadAttention, own sizes": (
        lambda: Apply(other_sizes(), lambda module, x: module(x, x[..., :12], x[..., :8])),
        ["*.q_proj_weight", "*.k_proj_weight", "*.v_proj_weight", "*.out_proj"],
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2),
        ["*.in_proj_weight", "*.linear1", "*.linear2", "*.out_proj"],
    ),
    "TransformerDecoder": (
        lambda: Apply(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), 2),
            lambda module, x: module(x, x),
        ),
        ["*.in_proj_weight", "*.linear?", "*.out_proj"],
    ),
    "LSTM": (lambda: Apply(nn.LSTM(16, 8, 2, bidirectional=True), nn.Module.__call__), "*.weight_[ih]h_l*"),
    "GRU": (lambda: Apply(nn.GRU(16, 8), nn.Module.__call__), ["*.weight_ih_l0", "*.weight_hh_l0"]),
    "RNN": (lambda: Apply(nn.RNN(16, 8), nn.Module.__call__), ["*.weight_ih_l0", "*.weight_hh_l0"]),
    "Bilinear": (lambda: Apply(nn.Bilinear(16, 16, 4), lambda module, x: module(x, x)), "module.weight"),
    "Embedding": (lambda: Apply(nn.Embedding(20, 16), lambda module, x: module(x.argmax(-1) % 20)), "module.weight"),
    "Conv1D of GPT-2": (lambda: nn.Sequential(Conv1D(8, 16), nn.Linear(8, 4)), ["0.weight", "1.weight"]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, groups=1), None),
    "ConvTranspose2d": (
        lambda: Apply(nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), lambda module, x: module(x[..., None])),
        None,
    ),
    "a module in two places": (Shared, None),
    "a tied head": (Tied, ["embedding.weight", "head.weight", "body"]),
    "a tied head stays dense": (Tied, None),
    "weight_norm": (lambda: torch_parametrizations.weight_norm(nn.Linear(16, 8)), None),
}


@pytest.mark.filterwarnings("ignore:nothing survives", "ignore:sparsify takes")
@pytest.mark.parametrize("rate", [0.5, 0.95])
@pytest.mark.parametrize(("make", "include"), CASES.values(), ids=CASES)
def test_it_trains_reports_and_bakes_exactly(make, include, rate):
    torch.manual_seed(0)
    model = make()
    before = keys(model)
    controller = feather_param.sparsify(model, final_rate=rate, total_steps=5, include=include)
    dense = [weight.clone() for weight in dense_weights(model)]
    x = torch.randn(3, 4, 16)
    train(model, lambda model, step: model(x).square().mean(), controller)
    total = sum(weight.numel() for weight in dense)
    assert all(not torch.equal(old, new) for old, new in zip(dense, dense_weights(model), strict=True)), (
        "something was not trained"
    )
    report = controller.report()
    assert (report.zeros, report.total) == (round(rate * total), total)
    x = torch.randn(3, 4, 16)
    out = model.eval()(x).detach()
    state = copy.deepcopy(model)
    assert zeros_after_baking(model) == (round(rate * total), total)
    assert keys(model) == before
    # Rounding: another library's norm is undone and redone, and the layers that follow amplify little.
    torch.testing.assert_close(model(x).detach(), out, rtol=1e-4, atol=1e-5)
    assert zeros_after_baking(state) == (round(rate * total), total)


RATE = 0.8


def sparse(make, include, **arguments) -> tuple[nn.Module, feather_param.Controller]:
    model = make()
    arguments = {"final_rate": RATE, "total_steps": 4, "include": include, **arguments}
    return model, feather_param.sparsify(model, **arguments)


def loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(step))
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def exact(model: nn.Module) -> None:
    zeros, total = zeros_after_baking(model)
    assert zeros == round(RATE * total)


def moving_average(make, include) -> None:
    model, controller = sparse(make, include)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for step in range(4):
        train(model, loss, controller, [step])
        ema.update_parameters(model)
    ema.eval()
    loss(ema, 9)
    exact(ema.module)
    exact(model)


def dense_checkpoint(make, include) -> None:
    torch.manual_seed(7)
    pretrained = make()
    model, controller = sparse(make, include, schedule=schedules.constant)
    model.load_state_dict(pretrained.state_dict())
    reference, judge = sparse(lambda: copy.deepcopy(pretrained), include, schedule=schedules.constant)
    assert torch.equal(controller.threshold, judge.threshold)
    assert torch.equal(loss(model.eval(), 0), loss(reference.eval(), 0))
    exact(model)


def resuming(make, include) -> None:
    runs = []
    for stop in (4, 2):
        model, controller = sparse(make, include)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        torch.manual_seed(1)
        train(model, loss, controller, range(stop), optimizer)
        runs.append((model, optimizer, controller))
    whole, first = runs
    torch.manual_seed(9)
    model, controller = sparse(make, include)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for mine, theirs in zip((model, optimizer, controller), first, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))  # an optimizer would share it otherwise
    train(model.eval(), loss, controller, range(2, 4), optimizer)
    train(first[0].eval(), loss, first[2], range(2, 4), first[1])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), first[0].parameters(), strict=True))
    assert controller.state_dict() == whole[2].state_dict()
    exact(model)


def freezing(make, include) -> None:
    model, controller = sparse(make, include, schedule=schedules.constant)
    controller.freeze()
    zeros = [place.dense() == 0 for place in pruned_places(model)]
    train(model, loss, controller, range(3))
    after = [place.dense() == 0 for place in pruned_places(model)]
    assert all(torch.equal(a, b) for a, b in zip(zeros, after, strict=True))
    exact(model)


def guarding(make, include) -> None:
    model, controller = sparse(make, include, min_nonzero_per_layer=5, max_rate_per_layer=0.9)
    train(model, loss, controller, range(4))
    assert all(row.total - row.zeros >= 5 and row.rate <= 0.9 for row in controller.report().rows)
    exact(model)


def bfloat16(make, include) -> None:
    model, controller = sparse(lambda: make().to(torch.bfloat16), include)
    train(model, loss, controller, range(4))
    exact(model)


def autocast(make, include) -> None:
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss(make(), 0)
    except RuntimeError as error:
        pytest.skip(f"torch itself cannot: {error}")
    model, controller = sparse(make, include)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, loss, controller, range(4))
    exact(model)


def optimizer_hook(make, include) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=4, include=include, optimizer=optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    assert controller.step_count == 4
    exact(model)


FEATURES = [
    moving_average,
    dense_checkpoint,
    resuming,
    freezing,
    guarding,
    bfloat16,
    autocast,
    optimizer_hook,
]


@pytest.mark.filterwarnings("ignore:nothing survives", "ignore:sparsify takes")
@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.__name__)
@pytest.mark.parametrize(("make", "include"), CASES.values(), ids=CASES)
def test_each_feature_with_each_layer(make, include, feature):
    torch.manual_seed(0)
    feature(make, include)


@pytest.mark.filterwarnings("ignore:nothing survives")
@pytest.mark.parametrize("arch", ["resnet50", "mobilenet_v3_small", "vit_b_16", "convnext_tiny"])
def test_torchvision(arch):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    size = {"vit_b_16": {"image_size": 32}}.get(arch, {})
    model = getattr(models, arch)(weights=None, num_classes=10, **size)
    before = keys(model)
    include = ["*.in_proj_weight", "*"] if arch == "vit_b_16" else None
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=5, include=include)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train(model, lambda model, step: nn.functional.cross_entropy(model(x), y), controller, optimizer=sgd)
    total = controller.report().total
    assert zeros_after_baking(model) == (round(0.9 * total), total)
    assert keys(model) == before


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), ["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"]


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertForMaskedLM(config), None


@pytest.mark.filterwarnings("ignore:sparsify takes")  # BERT's embeddings are large where the rest is small
@pytest.mark.parametrize("make", [gpt2, bert])
def test_language_models(make, tmp_path):
    torch.manual_seed(0)
    model, include = make()
    before = keys(model)
    controller = feather_param.sparsify(model, final_rate=0.9, total_steps=5, include=include)
    tokens = torch.randint(64, (2, 12))
    train(model, lambda model, step: model(input_ids=tokens, labels=tokens).loss, controller)
    total = controller.report().total
    out = model.eval()(input_ids=tokens).logits
    model.save_pretrained(tmp_path, state_dict=feather_param.baked_state_dict(model))
    assert zeros_after_baking(model) == (round(0.9 * total), total)
    assert keys(model) == before
    # The smallest numbers stand in for ties, so what is left is summation in another order at most.
    torch.testing.assert_close(model(input_ids=tokens).logits, out)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, out)


def test_a_language_models_head_is_named_as_dense():
    model = Tied()
    with pytest.warns(UserWarning, match="takes 256 of the 576 elements"):
        controller = feather_param.sparsify(model, final_rate=0.9, total_steps=5)
    assert controller.report().skipped == {
        "embedding.weight": "a weight of Embedding: name it in include to prune it",
        "head.weight": "tied to embedding.weight, which is not selected",
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:nothing survives")
def test_the_fast_path_of_attention_sees_the_pruned_weights():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    feather_param.sparsify(
        model,
        final_rate=0.8,
        total_steps=1,
        end_step=0,
        schedule=schedules.constant,
        include=["*.in_proj_weight", "*.linear?", "*.out_proj"],
    )
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    slow = model(x, src_key_padding_mask=padding)  # gradients are on: no fast path
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
        feather_param.desparsify(model)
        baked = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast, baked)
    torch.testing.assert_close(fast[~padding], slow.detach()[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"sparse": True}, "sparse=True at 0.weight"), ({"max_norm": 1.0}, "max_norm=1.0 at 0.weight")],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_write_past_the_parametrization_are_refused(kind, option, message):
    model = nn.Sequential(kind(4, 8, **option))
    with pytest.raises(ValueError, match=f"expected an embedding without .*, got {message}: it writes .*exclude="):
        feather_param.sparsify(model, final_rate=0.5, total_steps=1, include="0.weight")
    assert list(model.state_dict()) == ["0.weight"]


@pytest.mark.parametrize("norm", [torch_parametrizations.spectral_norm, torch_parametrizations.orthogonal])
def test_norms_that_cannot_hold_zeros_are_refused_at_once(norm):
    model = nn.Sequential(nn.Linear(16, 16), norm(nn.Linear(16, 16)))
    before = keys(model)
    with pytest.raises(ValueError, match=r"other parametrizations of 1.weight \(_\w+\) to be .*exclude='1.weight'"):
        feather_param.sparsify(model, final_rate=0.5, total_steps=1)
    assert keys(model) == before
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, exclude="1.weight")


def test_baked_state_dict_of_a_module_in_two_places():
    model = Shared()
    feather_param.sparsify(model, final_rate=0.5, total_steps=1, end_step=0)
    state = feather_param.baked_state_dict(model)
    feather_param.desparsify(model)
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_lstm_whose_pass_failed_can_be_copied():
    model = nn.LSTM(4, 4)
    feather_param.sparsify(model, final_rate=0.5, total_steps=2, include="weight_*")
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 1, 5))
    copy.deepcopy(model)
