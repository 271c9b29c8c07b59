"""The one sentence: the network that is evaluated is the network that is reported, baked, saved and resumed.

Random operations on a small random model and its copies, in random order. After each of them some of the networks are
looked at, and compared with what a slow oracle makes of their dense weights. ``python -m tests.test_contract 3000``
tries as many sequences, by another seed each time.
"""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import feather_param
from feather_param import schedules
from tests import twins

VALUES = [0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Tied(nn.Module):
    """Two layers that share a weight, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.attention(x[None], x[None], x[None])[0][0])


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)
    )


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    "tied": Tied,
    "convolutional": convolutional,
    "attention": Attention,
}


@dataclass
class Expected:
    """What the oracle knows of a network: not its weights, which it reads, but how they are cut."""

    zeros: int = 0
    step: int = 0
    masks: dict[str, Tensor] | None = None  # once frozen
    frozen_step: int | None = None

    def clone(self) -> Expected:
        return copy.deepcopy(self)

    def follow(self, source: Expected) -> None:
        if self.masks is None:
            self.zeros = source.zeros
            self.step = source.step if source.masks is None else source.frozen_step


@dataclass
class Network:
    model: nn.Module
    expected: Expected
    source: Expected | None = None  # of a copy

    def __post_init__(self) -> None:
        self.looked_at()

    def looked_at(self) -> None:
        self.base = self.bits()

    def bits(self) -> list[Tensor]:
        return [weight.clone().view(torch.uint8) for weight in self.weights().values()]

    @property
    def moved(self) -> bool:
        """Whether the weights are others than when somebody looked."""
        return not all(map(torch.equal, self.base, self.bits()))

    def __repr__(self) -> str:
        return f"Network({self.expected})"

    def weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if name.endswith(".original"):
                found[name.replace("parametrizations.", "").removesuffix(".original")] = parameter.detach()
        return dict(sorted(found.items(), key=lambda item: order_of(self.model).index(item[0])))

    def settled(self) -> Expected:
        """A copy that has moved takes the number of zeros of its source, and its step."""
        self.expected = self.now()
        self.looked_at()
        return self.expected

    def now(self) -> Expected:
        expected = self.expected
        if self.moved and self.source is not None:
            expected = expected.clone()
            expected.follow(self.source)
        return expected


def order_of(model: nn.Module) -> list[str]:
    names: list[str] = []
    for prefix, module in model.named_modules():
        if "parametrizations" in prefix.split("."):
            continue
        if "parametrizations" in module._modules:
            names += [f"{prefix}.{tensor}" for tensor in module.parametrizations]  # type: ignore[union-attr]
    return names


def evaluated(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in order_of(model):
        prefix, _, tensor = name.rpartition(".")
        found[name] = getattr(model.get_submodule(prefix), tensor).detach()
    return found


def cut(weights: dict[str, Tensor], zeros: int, guards: dict[str, int]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The threshold of each weight and what is left of it, by sorting."""
    natural = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    counts = natural if sum(natural.values()) > zeros else twins.greedy(weights, zeros, guards)
    free, rest, thresholds = dict(weights), zeros, {}
    while True:  # a weight that would lose more than its guard has a threshold of its own
        t = twins.threshold(free.values(), rest)
        pruned = iter(twins.zeros(free.values(), rest))
        taken = {name: sum(next(pruned) for _ in range(weight.numel())) for name, weight in free.items()}
        over = {name for name in free if t and taken[name] > max(guards.get(name, taken[name]), natural[name])}
        if not over:
            break
        for name in over:
            thresholds[name] = twins.threshold([free.pop(name)], counts[name])
            rest -= counts[name]
    thresholds |= dict.fromkeys(free, t)
    left: dict[str, Tensor] = {}
    for name, weight in weights.items():
        values = twins.magnitudes([weight])
        ranked = sorted(range(len(values)), key=lambda i: values[i])
        mask = torch.ones(len(values), dtype=torch.bool)
        mask[ranked[: counts[name]]] = False
        left[name] = mask.view(weight.shape)
    return thresholds, left


class Machine(RuleBasedStateMachine):
    @initialize(
        kind=st.sampled_from(sorted(MODELS)),
        dtype=st.sampled_from(DTYPES),
        ties=st.booleans(),
        rate=st.sampled_from([0.3, 0.6, 0.9]),
        p=st.sampled_from([1.0, 2.5, 3.0, float("inf")]),
        theta=st.sampled_from([None, 0.5, lambda rate: 1.0 - rate]),
        schedule=st.sampled_from([schedules.cubic, schedules.linear, schedules.constant]),
        guarded=st.booleans(),
        follow=st.booleans(),
        steps=st.sampled_from([0, 0, 2, 4, 6]),
        copied=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def start(self, kind, dtype, ties, rate, p, theta, schedule, guarded, follow, steps, copied, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.make, self.rate, self.p, self.schedule, self.follow = MODELS[kind], rate, p, schedule, follow
        self.arguments = {"final_rate": rate, "total_steps": 8, "start_step": 1, "end_step": 5, "p": p, "theta": theta}
        self.arguments["schedule"] = schedule
        if guarded:
            self.arguments |= {"max_rate_per_layer": 0.95}
        model = self.make().to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(self.random(parameter.shape, ties))
        self.saved: list[tuple[dict, Expected]] = []
        self.copies: list[Network] = []
        self.sparsify(model)
        if copied:
            self.copies.append(Network(copy.deepcopy(model), self.live.expected.clone(), self.live.expected))
        for _ in range(steps):
            self.train(True)

    def random(self, shape, ties=False) -> Tensor:
        if ties:
            index = torch.randint(len(VALUES), tuple(shape), generator=self.generator)
            return torch.tensor(VALUES)[index]
        return torch.randn(tuple(shape), generator=self.generator)

    def sparsify(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.controller = feather_param.sparsify(
                model, **self.arguments, optimizer=self.optimizer if self.follow else None
            )
        self.live = Network(model, Expected())
        sizes = {name: weight.numel() for name, weight in self.live.weights().items()}
        self.total = sum(sizes.values())
        if "max_rate_per_layer" in self.arguments:
            self.guards = {name: int(0.95 * size + 1e-9) for name, size in sizes.items()}
        else:
            self.guards = {}
        self.aim(self.live.expected)

    def rate_at(self, step: int) -> float:
        return 0.0 if step < 1 else self.rate if step >= 5 else self.rate * self.schedule((step - 1) / 4)

    def aim(self, expected: Expected) -> None:
        expected.zeros = round(self.rate_at(expected.step) * self.total)

    # -- what people do ---------------------------------------------------------------------------------------------

    @rule(controller=st.booleans())
    def train(self, controller):
        for parameter in self.live.model.parameters():
            parameter.grad = self.random(parameter.shape).to(parameter.dtype)
        self.quietly(self.optimizer.step)
        if self.follow:
            self.stepped()
        elif controller:
            self.quietly(self.controller.step)
            self.stepped()

    def stepped(self) -> None:
        self.live.expected.step += 1
        if self.live.expected.masks is None:
            self.aim(self.live.expected)

    @rule(
        which=st.integers(0, 3),
        factor=st.sampled_from([0.5, 2.0, -1.5]),
        way=st.sampled_from(["mul_", ".data", "detach"]),
    )
    def scale_the_first_weight(self, which, factor, way):
        network = self.some(which)
        parameter = next(p for name, p in network.model.named_parameters() if name.endswith(".original"))
        self.write(network, way, [(parameter, parameter.detach() * factor)])

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3), way=st.sampled_from(["mul_", ".data", "detach"]), buffers=st.booleans())
    def swap_a_copy_in(self, which, way, buffers):
        other = self.copies[which % len(self.copies)]
        pairs = list(zip(self.live.model.parameters(), other.model.parameters(), strict=True))
        if buffers:
            pairs += list(zip(self.live.model.buffers(), other.model.buffers(), strict=True))
        self.write(self.live, way, [(mine, theirs.detach().clone()) for mine, theirs in pairs])

    def write(self, network: Network, way: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for parameter, value in pairs:
                target = {"mul_": parameter, ".data": parameter.data, "detach": parameter.detach()}[way]
                target.copy_(value)
        if way == ".data":  # shows in the values alone, and to those who are told to look for it
            network.model.train().eval()

    @precondition(lambda self: len(self.copies) < 3)
    @rule(which=st.integers(0, 3))
    def copy(self, which):
        network = self.some(which)
        expected = network.now().clone()
        source = self.live.expected if network.source is None else network.source
        self.copies.append(Network(copy.deepcopy(network.model), expected, source))

    @precondition(lambda self: self.copies)
    @rule(
        which=st.integers(0, 3),
        weight=st.sampled_from([0.0, 0.3]),
        way=st.sampled_from(["lerp", "state", "data", "buffers"]),
    )
    def average(self, which, weight, way):
        network = self.copies[which % len(self.copies)]
        models = network.model, self.live.model
        pairs = list(zip(*(m.state_dict().values() if way == "state" else m.parameters() for m in models), strict=True))
        if way == "buffers":
            pairs += list(zip(*(m.buffers() for m in models), strict=True))
        with torch.no_grad():
            for mine, theirs in pairs:
                average = (mine.double() * weight + theirs.double() * (1 - weight)).to(mine.dtype)
                (mine.data if way == "data" else mine).copy_(average)
        if way == "data":
            network.model.train().eval()

    @rule(which=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
    def cast(self, which, dtype):
        network = self.some(which)
        network.settled()
        network.model.to(dtype)
        network.looked_at()

    @rule(which=st.integers(0, 3), train=st.booleans())
    def switch_modes(self, which, train):
        self.some(which).model.train(train)

    @rule()
    def freeze(self):
        self.quietly(self.controller.freeze)
        expected = self.live.expected
        if expected.masks is None:
            zeros, expected.frozen_step = expected.zeros, expected.step
            expected.masks = {n: (w != 0) | (zeros == 0) for n, w in self.live.weights().items()}

    @rule(which=st.integers(0, 3))
    def save(self, which):
        network = self.some(which)
        state = copy.deepcopy(network.model.state_dict())
        expected = network.now().clone()
        self.saved = [*self.saved[-2:], (state, expected)]

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 3), assign=st.booleans())
    def load(self, which, assign):
        network = self.some(which)
        state, expected = self.saved[which % len(self.saved)]
        assign = assign and self.make is not Tied and network is not self.live
        network.model.load_state_dict(copy.deepcopy(state), assign=assign)
        vars(network.expected).update(vars(expected.clone()))
        if expected.masks is not None and expected.zeros:  # what is kept may have become zero by a cast
            network.expected.masks = {name: weight != 0 for name, weight in network.weights().items()}
        network.looked_at()

    @rule(which=st.integers(0, 3), ties=st.booleans())
    def load_a_plain_model(self, which, ties):
        network = self.some(which)
        plain = self.make()
        state = plain.state_dict()
        state = {k: self.random(v.shape, ties) if v.is_floating_point() else v for k, v in state.items()}
        if self.make is Tied:
            state["b.weight"] = state["a.weight"]
        network.model.load_state_dict(state)
        network.looked_at()

    @precondition(lambda self: self.live.expected.masks is None)
    @rule()
    def start_again(self):
        self.quietly(feather_param.desparsify, self.live.model)
        self.saved = []
        self.sparsify(self.live.model)

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3))
    def bake_a_copy(self, which):
        network = self.copies.pop(which % len(self.copies))
        before = self.quietly(feather_param.baked_state_dict, network.model)
        self.quietly(feather_param.desparsify, network.model)
        after = network.model.state_dict()
        assert list(before) == list(after) == list(self.make().state_dict())
        assert all(torch.equal(value, after[key]) for key, value in before.items())

    # -- what must be true ------------------------------------------------------------------------------------------

    @invariant()
    def compare_some(self):
        for network in [self.live, *self.copies]:
            look = int(torch.randint(4, (), generator=self.generator))
            if look < 2:
                self.compare(network, baked_first=bool(look))

    def compare(self, network: Network, baked_first: bool) -> None:
        expected = network.settled()
        if baked_first:
            baked = self.quietly(feather_param.baked_state_dict, network.model)
        seen = evaluated(network.model)
        if not baked_first:
            baked = self.quietly(feather_param.baked_state_dict, network.model)
        weights = network.weights()
        least = {name: torch.finfo(value.dtype).smallest_normal for name, value in seen.items()}
        if expected.masks is not None:
            left = expected.masks
            for name, weight in weights.items():
                assert (seen[name][~left[name]] == 0).all(), name
                assert ((seen[name] - weight)[left[name]].abs() <= least[name]).all(), name
        else:
            thresholds, left = cut(weights, expected.zeros, self.guards)
            for name, weight in weights.items():
                twin = twins.operator(weight, thresholds[name], self.p)
                assert torch.equal(seen[name] == 0, twin == 0), name
                rounding = 16 * torch.finfo(torch.float32 if weight.dtype == torch.float64 else weight.dtype).eps
                assert ((seen[name].double() - twin).abs() <= rounding * twin.abs() + least[name]).all(), name
        for name, mask in left.items():
            assert torch.equal(baked[name] != 0, mask), name
            assert ((baked[name] - seen[name]).abs() <= least[name]).all(), name
        if network is self.live:
            report = self.quietly(self.controller.report)
            assert self.controller.step_count == expected.step
            assert [row.zeros for row in report.rows] == [int((~mask).sum()) for mask in left.values()]
            survivors = [row.total - row.zeros - row.ties for row in report.rows]
            if expected.masks is None:
                assert survivors == [int((seen[name] != 0).sum()) for name in left]
            assert all(torch.equal(mask, left[name]) for name, mask in self.controller.masks().items())
        # A fresh model that loads the state computes the same.
        state = copy.deepcopy(network.model.state_dict())
        fresh = self.make().to(next(network.model.parameters()).dtype)
        controller = self.quietly(feather_param.sparsify, fresh, **self.arguments)
        fresh.load_state_dict(state)
        assert controller.step_count == expected.step
        for model in (network.model, fresh):
            if model is not network.model or network is self.live:  # a copy with gradients would warn when it moves
                self.compare_gradients(model, expected)
        again = evaluated(fresh)
        for name, value in seen.items():
            assert ((again[name] - value).abs() <= least[name]).all(), name

    def compare_gradients(self, model: nn.Module, expected: Expected) -> None:
        theta = self.arguments["theta"]
        theta = 1.0 if theta is None else theta(self.rate_at(expected.step)) if callable(theta) else theta
        for name in dict.fromkeys(expected.masks or order_of(model)):
            prefix, _, tensor = name.rpartition(".")
            layer = model.get_submodule(prefix)
            seen = getattr(layer, tensor)
            (grad,) = torch.autograd.grad(seen.sum(), layer.parametrizations[tensor].original)  # type: ignore[index]
            pruned = seen == 0 if expected.masks is None else ~expected.masks[name]
            scale = theta if expected.masks is None else 0.0
            rounding = torch.finfo(torch.float32 if grad.dtype == torch.float64 else grad.dtype).eps
            assert torch.equal(grad[~pruned], torch.ones_like(grad)[~pruned]), name
            assert ((grad[pruned] - scale).abs() <= rounding * scale).all(), name

    def some(self, which: int) -> Network:
        networks = [self.live, *self.copies]
        return networks[which % len(networks)]

    @staticmethod
    def quietly(call, *args, **kwargs):
        with warnings.catch_warnings():  # of layers that die, of freezing nothing: not looked at here
            warnings.simplefilter("ignore")
            return call(*args, **kwargs)


def _settings(sequences: int) -> settings:
    return settings(
        max_examples=sequences,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


TestContract = Machine.TestCase
TestContract.settings = _settings(150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_state_machine_as_test(Machine, settings=_settings(int(sys.argv[1])))
