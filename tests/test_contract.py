"""The network that is evaluated is the network that is reported, baked, saved and resumed.

A random model, with its copies, undergoes random operations in random order. After each operation, some of the networks
are compared with a slow reference, which computes the pruned weights from the dense ones.
``python -m tests.test_contract 3000`` runs that number of sequences, with another seed each time.
"""

from __future__ import annotations

import copy
import sys
import warnings

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
from feather_param import allocations, schedules
from tests import pattern_twins, twins
from tests.contract_model import MODELS, PATTERNS, Expected, Network, Tied, prune, used_weights, weight_names

VALUES = [0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -2.0]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ALLOCATIONS = {"global_magnitude": None, "erk": twins.erk, "uniform": twins.uniform}


class Contract(RuleBasedStateMachine):
    """A sparsified model, its optimizer and its controller, copies of the model, and saved states."""

    @initialize(
        kind=st.sampled_from(sorted(MODELS)),
        dtype=st.sampled_from(DTYPES),
        ties=st.booleans(),
        pattern=st.integers(0, 4),
        rate=st.sampled_from([0.3, 0.6, 0.9]),
        p=st.sampled_from([1.0, 2.5, 3.0, float("inf")]),
        theta=st.sampled_from([None, 0.5, lambda rate: 1.0 - rate]),
        schedule=st.sampled_from([schedules.cubic, schedules.linear, schedules.constant]),
        guarded=st.booleans(),
        allocation=st.sampled_from(sorted(ALLOCATIONS)),
        follow=st.booleans(),
        steps=st.sampled_from([0, 0, 2, 4, 6]),
        copied=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def start(
        self, kind, dtype, ties, pattern, rate, p, theta, schedule, guarded, allocation, follow, steps, copied, seed
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.pattern = PATTERNS[kind][pattern]
        units, self.twin = pattern_twins.TWINS[self.pattern]
        rate, self.size = rate * units.largest_rate, units.size
        self.make, self.rate, self.p, self.schedule, self.follow = MODELS[kind], rate, p, schedule, follow
        self.arguments = {"final_rate": rate, "total_steps": 8, "start_step": 1, "end_step": 5, "p": p, "theta": theta}
        allocation = allocation if self.pattern == "elements" else "global_magnitude"
        self.arguments |= {"schedule": schedule, "allocation": getattr(allocations, allocation), "pattern": units}
        self.allocation = ALLOCATIONS[allocation]
        if guarded and self.pattern == "elements":
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
        """Return random values: normally distributed ones, or few different ones so that there are ties."""
        if ties:
            index = torch.randint(len(VALUES), tuple(shape), generator=self.generator)
            return torch.tensor(VALUES)[index]
        return torch.randn(tuple(shape), generator=self.generator)

    def sparsify(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
        followed = self.optimizer if self.follow else None
        self.controller = self.without_warnings(feather_param.sparsify, model, **self.arguments, optimizer=followed)
        self.live = Network(model, Expected())
        sizes = {name: weight.numel() for name, weight in self.live.weights().items()}
        self.total = sum(sizes.values())
        if "max_rate_per_layer" in self.arguments:
            self.guards = {name: int(0.95 * size + 1e-9) for name, size in sizes.items()}
        else:
            self.guards = {}
        self.set_zeros(self.live.expected)

    def rate_at(self, step: int) -> float:
        return 0.0 if step < 1 else self.rate if step >= 5 else self.rate * self.schedule((step - 1) / 4)

    def set_zeros(self, expected: Expected) -> None:
        expected.zeros = round(self.rate_at(expected.step) * self.total) // self.size * self.size

    # -- operations -------------------------------------------------------------------------------------------------

    @rule(controller=st.booleans())
    def train(self, controller):
        for parameter in self.live.model.parameters():
            parameter.grad = self.random(parameter.shape).to(parameter.dtype)
        self.without_warnings(self.optimizer.step)
        if self.follow:
            self.note_step()
        elif controller:
            self.without_warnings(self.controller.step)
            self.note_step()

    def note_step(self) -> None:
        self.live.expected.step += 1
        if self.live.expected.masks is None:
            self.set_zeros(self.live.expected)

    @rule(
        which=st.integers(0, 3),
        factor=st.sampled_from([0.5, 2.0, -1.5]),
        method=st.sampled_from(["mul_", ".data", "detach"]),
    )
    def scale_the_first_weight(self, which, factor, method):
        network = self.choose(which)
        parameter = next(p for name, p in network.model.named_parameters() if name.endswith(".original"))
        self.write(network, method, [(parameter, parameter.detach() * factor)])

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3), method=st.sampled_from(["mul_", ".data", "detach"]), buffers=st.booleans())
    def copy_the_weights_of_a_copy(self, which, method, buffers):
        other = self.copies[which % len(self.copies)]
        pairs = list(zip(self.live.model.parameters(), other.model.parameters(), strict=True))
        if buffers:
            pairs += list(zip(self.live.model.buffers(), other.model.buffers(), strict=True))
        self.write(self.live, method, [(target, value.detach().clone()) for target, value in pairs])

    def write(self, network: Network, method: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for parameter, value in pairs:
                target = {"mul_": parameter, ".data": parameter.data, "detach": parameter.detach()}[method]
                target.copy_(value)
        if method == ".data":  # torch does not count this write; `train` and `eval` tell the library of it
            network.model.train().eval()

    @precondition(lambda self: len(self.copies) < 3)
    @rule(which=st.integers(0, 3))
    def copy(self, which):
        network = self.choose(which)
        expected = network.current().clone()
        source = self.live.expected if network.source is None else network.source
        self.copies.append(Network(copy.deepcopy(network.model), expected, source))

    @precondition(lambda self: self.copies)
    @rule(
        which=st.integers(0, 3),
        weight=st.sampled_from([0.0, 0.3]),
        method=st.sampled_from(["lerp", "state", "data", "buffers"]),
    )
    def average(self, which, weight, method):
        network = self.copies[which % len(self.copies)]
        models = network.model, self.live.model
        tensors = (m.state_dict().values() if method == "state" else m.parameters() for m in models)
        pairs = list(zip(*tensors, strict=True))
        if method == "buffers":
            pairs += list(zip(*(m.buffers() for m in models), strict=True))
        with torch.no_grad():
            for averaged, new in pairs:
                value = (averaged.double() * weight + new.double() * (1 - weight)).to(averaged.dtype)
                (averaged.data if method == "data" else averaged).copy_(value)
        if method == "data":
            network.model.train().eval()

    @rule(which=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
    def cast(self, which, dtype):
        network = self.choose(which)
        network.update()
        network.model.to(dtype)
        network.note_weights()

    @rule(which=st.integers(0, 3), train=st.booleans())
    def switch_modes(self, which, train):
        self.choose(which).model.train(train)

    @rule()
    def freeze(self):
        self.without_warnings(self.controller.freeze)
        expected = self.live.expected
        if expected.masks is None:
            zeros, expected.frozen_step = expected.zeros, expected.step
            expected.masks = {n: (w != 0) | (zeros == 0) for n, w in self.live.weights().items()}

    @rule(which=st.integers(0, 3))
    def save(self, which):
        network = self.choose(which)
        state = copy.deepcopy(network.model.state_dict())
        expected = network.current().clone()
        self.saved = [*self.saved[-2:], (state, expected)]

    @precondition(lambda self: self.saved)
    @rule(which=st.integers(0, 3), assign=st.booleans())
    def load(self, which, assign):
        network = self.choose(which)
        state, expected = self.saved[which % len(self.saved)]
        assign = assign and self.make is not Tied and network is not self.live
        network.model.load_state_dict(copy.deepcopy(state), assign=assign)
        vars(network.expected).update(vars(expected.clone()))
        if expected.masks is not None and expected.zeros:  # a cast may have made kept elements zero
            network.expected.masks = {name: weight != 0 for name, weight in network.weights().items()}
        network.note_weights()

    @rule(which=st.integers(0, 3), ties=st.booleans())
    def load_a_plain_model(self, which, ties):
        network = self.choose(which)
        plain = self.make()
        state = plain.state_dict()
        state = {k: self.random(v.shape, ties) if v.is_floating_point() else v for k, v in state.items()}
        if self.make is Tied:
            state["b.weight"] = state["a.weight"]
        network.model.load_state_dict(state)
        network.note_weights()

    @precondition(lambda self: self.live.expected.masks is None)
    @rule()
    def bake_and_sparsify_again(self):
        self.without_warnings(feather_param.desparsify, self.live.model)
        self.saved = []
        self.sparsify(self.live.model)

    @precondition(lambda self: self.copies)
    @rule(which=st.integers(0, 3))
    def bake_a_copy(self, which):
        network = self.copies.pop(which % len(self.copies))
        before = self.without_warnings(feather_param.baked_state_dict, network.model)
        self.without_warnings(feather_param.desparsify, network.model)
        after = network.model.state_dict()
        assert list(before) == list(after) == list(self.make().state_dict())
        assert all(torch.equal(value, after[key]) for key, value in before.items())

    # -- checks -----------------------------------------------------------------------------------------------------

    @invariant()
    def check_some(self):
        for network in [self.live, *self.copies]:
            choice = int(torch.randint(4, (), generator=self.generator))
            if choice < 2:
                self.check(network, baked_first=bool(choice))

    def check(self, network: Network, baked_first: bool) -> None:
        """Compare the evaluated, reported, baked and saved network with the reference."""
        expected = network.update()
        if baked_first:
            baked = self.without_warnings(feather_param.baked_state_dict, network.model)
        used = used_weights(network.model)
        if not baked_first:
            baked = self.without_warnings(feather_param.baked_state_dict, network.model)
        weights = network.weights()
        pruned: dict[str, Tensor] = {}
        least = {name: torch.finfo(value.dtype).smallest_normal for name, value in used.items()}
        if expected.masks is not None:
            masks = expected.masks
            for name, weight in weights.items():
                assert (used[name][~masks[name]] == 0).all(), name
                assert ((used[name] - weight)[masks[name]].abs() <= least[name]).all(), name
        else:
            thresholds, masks = prune(weights, expected.zeros, self.guards, self.pattern, self.allocation)
            for name, weight in weights.items():
                args = thresholds[name], self.p, self.arguments["pattern"], self.twin
                reference, pruned[name] = pattern_twins.used(weight, *args)
                assert torch.equal(used[name] == 0, reference == 0), name
                rounding = 16 * torch.finfo(torch.float32 if weight.dtype == torch.float64 else weight.dtype).eps
                error = (used[name].double() - reference).abs()
                assert (error <= rounding * reference.abs() + least[name]).all(), name
        for name, mask in masks.items():
            assert torch.equal(baked[name] != 0, mask), name
            assert ((baked[name] - used[name]).abs() <= least[name]).all(), name
        if network is self.live:
            report = self.without_warnings(self.controller.report)
            assert self.controller.step_count == expected.step
            assert [row.zeros for row in report.rows] == [int((~mask).sum()) for mask in masks.values()]
            if expected.masks is None:
                assert [row.survivors for row in report.rows] == [int((used[name] != 0).sum()) for name in masks]
            assert all(torch.equal(mask, masks[name]) for name, mask in self.controller.masks().items())
        resumed = self.resumed(network, expected.step)
        for model in (network.model, resumed):
            if model is not network.model or network is self.live:  # a trained copy would warn when its weights change
                self.check_gradients(model, expected, pruned)
        again = used_weights(resumed)
        for name, value in used.items():
            assert ((again[name] - value).abs() <= least[name]).all(), name

    def resumed(self, network: Network, step: int) -> nn.Module:
        """Return a new model that has loaded the state_dict of a network, and check that it is at the same step."""
        state = copy.deepcopy(network.model.state_dict())
        model = self.make().to(next(network.model.parameters()).dtype)
        controller = self.without_warnings(feather_param.sparsify, model, **self.arguments)
        model.load_state_dict(state)
        assert controller.step_count == step
        return model

    def check_gradients(self, model: nn.Module, expected: Expected, pruned: dict[str, Tensor]) -> None:
        theta = self.arguments["theta"]
        theta = 1.0 if theta is None else theta(self.rate_at(expected.step)) if callable(theta) else theta
        for name in expected.masks or weight_names(model):
            prefix, _, tensor = name.rpartition(".")
            layer = model.get_submodule(prefix)
            used = getattr(layer, tensor)
            (grad,) = torch.autograd.grad(used.sum(), layer.parametrizations[tensor].original)  # type: ignore[index]
            first = "a.weight" if name == "b.weight" else name  # these two are tied
            gone = pruned[first] if expected.masks is None else ~expected.masks[name]
            scale = theta if expected.masks is None else 0.0
            rounding = torch.finfo(torch.float32 if grad.dtype == torch.float64 else grad.dtype).eps
            assert torch.equal(grad[~gone], torch.ones_like(grad)[~gone]), name
            assert ((grad[gone] - scale).abs() <= rounding * scale).all(), name

    # -- helpers ----------------------------------------------------------------------------------------------------

    def choose(self, which: int) -> Network:
        networks = [self.live, *self.copies]
        return networks[which % len(networks)]

    @staticmethod
    def without_warnings(call, *args, **kwargs):
        with warnings.catch_warnings():  # about weights with no survivors and early calls, which other tests check
            warnings.simplefilter("ignore")
            return call(*args, **kwargs)


def _settings(sequences: int) -> settings:
    return settings(max_examples=sequences, stateful_step_count=20, suppress_health_check=list(HealthCheck))


TestContract = Contract.TestCase
TestContract.settings = _settings(150)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_state_machine_as_test(Contract, settings=_settings(int(sys.argv[1])))
