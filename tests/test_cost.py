"""The cost of each call grows linearly with the number of layers. It is counted in lines of Python, not in seconds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import feather_param
from feather_param import allocations, patterns, reports
from feather_param.reports.scalars import log_report
from tests.lines import growth, is_linear

SIZE = 4  # layers of the smallest model
INPUT = torch.ones(2, 4)

Call = Callable[[], object]


class Layers(nn.Module):
    """A number of Linear layers, one after the other. Each group of four has the same weights."""

    def __init__(self, count: int, tied: bool = False, prefix: str = "layer") -> None:
        super().__init__()
        torch.manual_seed(0)
        four = [nn.Linear(4, 4) for _ in range(4)]
        self.names = [f"{prefix}{index:04}" for index in range(count)]
        for index, name in enumerate(self.names):
            self.add_module(name, copy.deepcopy(four[index % 4]))
            if tied:
                getattr(self, name).weight = getattr(self, self.names[0]).weight

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def sparsify(model: nn.Module, **settings) -> feather_param.Controller:
    return feather_param.sparsify(model, **{"final_rate": 0.5, "total_steps": 4, "end_step": 1, **settings})


def trained(model: nn.Module, **settings) -> tuple[nn.Module, feather_param.Controller]:
    controller = sparsify(model, **settings)
    controller.step()
    return model, controller


# -- settings: a whole training with each -----------------------------------------------------------------------------

SETTINGS: dict[str, Callable[[Layers], dict]] = {
    "uniform": lambda model: {"allocation": allocations.uniform},
    "erk": lambda model: {"allocation": allocations.erk},
    "square_root": lambda model: {"allocation": allocations.square_root},
    "lamp": lambda model: {"allocation": allocations.lamp},
    "normalised": lambda model: {"allocation": allocations.normalised},
    "in_proportion": lambda model: {"allocation": allocations.in_proportion(lambda name, weight: weight.shape[0])},
    "per_layer": lambda model: {"allocation": allocations.per_layer(dict.fromkeys(model.names, 0.5))},
    "per_layer, globs": lambda model: {"allocation": allocations.per_layer({f"{n}.*": 0.5 for n in model.names})},
    "from_plan": lambda model: {"allocation": allocations.from_plan({f"{name}.weight": 8 for name in model.names})},
    "min_nonzero_per_layer": lambda model: {"min_nonzero_per_layer": 6},
    "max_rate_per_layer": lambda model: {"max_rate_per_layer": 0.7},
    "n_m": lambda model: {"pattern": patterns.n_m(2, 4)},
    "blocks": lambda model: {"pattern": patterns.blocks(1, 4)},
    "blocks and erk": lambda model: {"pattern": patterns.blocks(1, 4), "allocation": allocations.erk},
    "blocks and a guard": lambda model: {"pattern": patterns.blocks(1, 4), "min_nonzero_per_layer": 4},
    "include names": lambda model: {"include": [f"{name}.weight" for name in model.names]},
    "include globs": lambda model: {"include": [f"{name}.*" for name in model.names]},
    "exclude names": lambda model: {"exclude": model.names[::4]},
    "theta": lambda model: {"theta": lambda rate: 1.0 - rate, "p": 1.0},
}


def training(count: int, name: str) -> Call:
    """Return a training of one step with some settings, its report and its end."""
    model = Layers(count)
    settings = SETTINGS[name](model)

    def call() -> None:
        of_plan = settings.keys() - {"theta", "p"}
        feather_param.plan(model, final_rate=0.5, **{key: settings[key] for key in of_plan})
        controller = sparsify(model, **settings)
        controller.step()
        model(INPUT)
        str(controller.report())
        feather_param.baked_state_dict(model)
        feather_param.baked_state_dict(model.state_dict())
        controller.freeze()
        controller.step()
        feather_param.desparsify(model)

    return call


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:fewer survivors", "ignore:nothing survives")
def test_a_training_with_any_settings_costs_the_same_for_each_layer(name):
    assert is_linear(*growth(functools.partial(training, name=name), SIZE))


# -- calls -----------------------------------------------------------------------------------------------------------


def moving_average(model: nn.Module, controller: feather_param.Controller) -> None:
    average = copy.deepcopy(model)
    average(INPUT)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(0.5)
    average(INPUT)


def follow(model: nn.Module, controller: feather_param.Controller) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    controller.follow(optimizer)
    model(INPUT).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


def save(model: nn.Module, controller: feather_param.Controller, path: str) -> None:
    feather_param.save_sparse(model, path)
    feather_param.load_sparse(path)


CALLS: dict[str, Callable[[nn.Module, feather_param.Controller], object]] = {
    "step": lambda model, controller: controller.step(),
    "refresh": lambda model, controller: controller.refresh(),
    "forward and backward": lambda model, controller: model(INPUT).sum().backward(),
    "train and eval": lambda model, controller: model.eval().train()(INPUT),
    "to": lambda model, controller: model.double(),
    "threshold": lambda model, controller: controller.threshold,
    "report": lambda model, controller: str(controller.report()),
    "masks": lambda model, controller: controller.masks(),
    "History": lambda model, controller: str(reports.History(controller).record()),
    "log": lambda model, controller: log_report(lambda *_: None, controller.report(), 0),
    "multiply_adds": lambda model, controller: str(reports.multiply_adds(model, INPUT)),
    "state_dict": lambda model, controller: model.state_dict(),
    "controller state": lambda model, controller: controller.load_state_dict(controller.state_dict()),
    "baked_state_dict": lambda model, controller: feather_param.baked_state_dict(model),
    "bake a state": lambda model, controller: feather_param.baked_state_dict(model.state_dict()),
    "bake a prefixed state": lambda model, controller: feather_param.baked_state_dict(
        {f"module.{name}": value for name, value in model.state_dict().items()}
    ),
    "deepcopy": lambda model, controller: copy.deepcopy((model, controller)),
    "moving average": moving_average,
    "follow": follow,
    "freeze": lambda model, controller: (controller.freeze(), controller.step(), model.state_dict()),
    "desparsify": lambda model, controller: feather_param.desparsify(model),
    "detach": lambda model, controller: controller.detach(),
}
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "layers": Layers,
    "one weight, tied": functools.partial(Layers, tied=True),
}


def prepared(count: int, model: str, call: Callable[..., object]) -> Call:
    return functools.partial(call, *trained(MODELS[model](count)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_costs_the_same_for_each_layer(call, model):
    assert is_linear(*growth(functools.partial(prepared, model=model, call=CALLS[call]), SIZE))


@pytest.mark.parametrize("model", MODELS)
def test_sparsify_costs_the_same_for_each_layer(model):
    assert is_linear(*growth(lambda count: functools.partial(sparsify, MODELS[model](count)), SIZE))


def test_long_names_cost_no_more_lines_than_short_ones():
    def prepare(length: int, call: str) -> Call:
        return functools.partial(CALLS[call], *trained(Layers(4, prefix=length * "x")))

    for call in CALLS:
        assert growth(functools.partial(prepare, call=call), 20) == (0, 0)


@pytest.mark.parametrize("model", MODELS)
def test_a_sparse_file_costs_the_same_for_each_layer(model, tmp_path):
    call = functools.partial(save, path=str(tmp_path / "model.safetensors"))
    assert is_linear(*growth(functools.partial(prepared, model=model, call=call), SIZE))


def test_parts_that_were_sparsified_by_themselves_cost_the_same_each():
    def prepare(count: int) -> Call:
        model = Layers(count)
        for layer in model.children():
            trained(layer)

        def call() -> None:
            feather_param.baked_state_dict(model)
            feather_param.baked_state_dict(model.state_dict())
            feather_param.desparsify(model)

        return call

    assert is_linear(*growth(prepare, SIZE))


# -- what torch itself computes in quadratic time ----------------------------------------------------------------------


def load(model: nn.Module, plain: nn.Module) -> None:
    model.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def test_a_load_adds_the_same_cost_for_each_layer_to_that_of_torch():
    ours = growth(lambda count: functools.partial(load, trained(Layers(count))[0], Layers(count)), SIZE)
    torchs = growth(lambda count: functools.partial(load, Layers(count), Layers(count)), SIZE)
    assert is_linear(ours[0], ours[1] - torchs[1])


def test_an_optimizer_with_many_groups_adds_the_same_cost_for_each_to_that_of_torch():
    def prepare(count: int, followed: bool) -> Call:
        model = Layers(count)
        optimizer = torch.optim.SGD([{"params": [each]} for each in model.parameters()], lr=0.1, momentum=0.9)
        if followed:
            trained(model)[1].follow(optimizer)

        def call() -> None:
            model(INPUT).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())

        return call

    ours, torchs = (growth(functools.partial(prepare, followed=followed), SIZE) for followed in (True, False))
    assert is_linear(ours[0], ours[1] - torchs[1])


def nested(depth: int) -> nn.Module:
    model: nn.Module = nn.Linear(4, 4)
    for _ in range(depth):
        model = nn.Sequential(model, nn.Linear(4, 4))
    return model


@pytest.fixture(scope="module")
def load_of_torch() -> float:
    """Return the quadratic coefficient of torch's own load of nested modules."""
    return growth(lambda depth: functools.partial(load, nested(depth), nested(depth)), SIZE)[1]


def test_in_nested_modules_sparsify_grows_no_faster_than_a_load_of_torch(load_of_torch):
    _, ours = growth(lambda depth: functools.partial(sparsify, nested(depth)), SIZE, "feather_param")
    assert ours <= load_of_torch


@pytest.mark.parametrize("call", CALLS)
def test_in_nested_modules_no_call_grows_faster_than_a_load_of_torch(call, load_of_torch):
    # Names grow with the depth, so the cost of all names is quadratic, in torch as well.
    _, ours = growth(lambda depth: functools.partial(CALLS[call], *trained(nested(depth))), SIZE, "feather_param")
    assert ours <= load_of_torch


# -- the measure -----------------------------------------------------------------------------------------------------


def quadratic_loop(names: list[str]) -> None:
    for _ in names:
        for _ in names:
            pass


@pytest.mark.parametrize(
    ("planted", "linear"),
    [
        (lambda names: None, True),
        (quadratic_loop, False),
        (lambda names: [one for one in names for _ in names], False),
        (lambda names: any(one is None for _ in names for one in names), False),
        (lambda names: [names.index(name) for name in names], True),  # a loop in C is not seen
    ],
    ids=["none", "loop", "comprehension", "generator", "in C"],
)
def test_a_planted_quadratic_loop_is_found(planted, linear):
    def prepare(count: int) -> Call:
        model, controller = trained(Layers(count))
        return lambda: (controller.report(), planted(model.names))

    assert is_linear(*growth(prepare, SIZE)) == linear
