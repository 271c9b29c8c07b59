"""docs/trainers/fastai.md, with fastai itself."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from tests.integrations.digits import TOTAL, digits, network, outputs, run_page, zeros
from tests.training import same_state

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"`torch.jit.script` is deprecated", FutureWarning)  # decorators of fastai
    warnings.filterwarnings("ignore", r"The 'mode.chained_assignment' option is deprecated")  # fastai sets it in pandas
    pytest.importorskip("fastai.learner", reason="fastai is missing: pip install 'feather_param[integrations]'")
    from fastai.callback.core import Callback
    from fastai.callback.schedule import Learner  # with fit_one_cycle and lr_find
    from fastai.callback.training import GradientAccumulation
    from fastai.data.core import DataLoaders
    from fastai.learner import load_learner

pytestmark = [
    pytest.mark.filterwarnings("ignore:numpy.core is deprecated:DeprecationWarning"),  # fastai's load_model
    pytest.mark.filterwarnings("ignore:load_learner. uses Python's insecure pickle module:UserWarning"),
]

RATE = 0.9
KEPT = round(RATE * TOTAL)
BATCHES = 4


class WithNewEmpty(torch.utils.data.TensorDataset):
    """Data that `Learner.export` can leave out, as fastai's own datasets."""

    def new_empty(self) -> WithNewEmpty:
        return WithNewEmpty(*(tensor[:0] for tensor in self.tensors))


def loaders() -> DataLoaders:
    data = WithNewEmpty(*digits(64 * BATCHES).tensors)
    return DataLoaders.from_dsets(data, data, bs=64, shuffle=False, device="cpu", num_workers=0)


class Step(Callback):
    """The callback of the page, with a moving average."""

    def __init__(self, controller, ema) -> None:
        self.controller, self.ema = controller, ema

    def after_step(self) -> None:
        self.controller.step()
        self.ema.update_parameters(self.model)


def built(tmp_path, total: int = 4 * BATCHES, callbacks=()):
    model = network()
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=total)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    steps = Step(controller, ema)
    learn = Learner(loaders(), model, F.cross_entropy, path=tmp_path, cbs=[steps, *callbacks])
    return SimpleNamespace(learn=learn, model=model, controller=controller, ema=ema)


def fit(run, epochs: int = 2) -> None:
    with run.learn.no_bar(), run.learn.no_logging():
        run.learn.fit(epochs, 3e-3)


def test_the_code_of_the_page_ships_the_best_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {"model": network(), "dls": loaders(), "epochs": 4, "torch": torch, "F": F}
    scope = run_page("fastai.md", scope)
    assert scope["controller"].step_count >= 2 * BATCHES  # that of the best network
    assert zeros(scope["model"]) == KEPT
    assert same_state(feather_param.load_sparse("sparse.safetensors"), scope["model"].state_dict())
    assert "sparse_accuracy value: 0.0" in capsys.readouterr().out  # in the first epoch, before the final rate


@pytest.mark.parametrize(("callbacks", "steps"), [([], BATCHES), ([GradientAccumulation(128)], BATCHES // 2)])
def test_each_step_of_the_optimizer_counts_once(callbacks, steps, tmp_path):
    run = built(tmp_path, callbacks=callbacks)
    fit(run, epochs=1)
    assert run.controller.step_count == steps


def test_fine_tune_makes_one_epoch_more(tmp_path):
    run = built(tmp_path)
    with run.learn.no_bar(), run.learn.no_logging():
        run.learn.fine_tune(1)
    assert run.controller.step_count == 2 * BATCHES


def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path):
    whole = built(tmp_path)
    fit(whole)
    whole.learn.save("first")
    fit(whole)
    resumed = built(tmp_path)
    resumed.learn.create_opt()
    resumed.learn.load("first")
    assert resumed.controller.step_count == 2 * BATCHES
    fit(resumed)
    states = [feather_param.baked_state_dict(run.model) for run in (whole, resumed)]
    assert same_state(*states)
    assert zeros(states[0]) == KEPT


def test_the_learning_rate_finder_restores_the_schedule(tmp_path):
    run = built(tmp_path)
    fit(run, epochs=1)
    before = outputs(run.model)
    with run.learn.no_bar(), run.learn.no_logging():
        run.learn.lr_find(num_it=12, show_plot=False)
    assert run.controller.step_count == BATCHES
    assert torch.equal(outputs(run.model), before)


def test_a_moving_average_is_baked_as_evaluated(tmp_path):
    run = built(tmp_path)
    fit(run)
    before = outputs(run.ema)
    feather_param.desparsify(run.ema)
    assert torch.equal(outputs(run.ema), before)
    assert zeros(run.ema.module) == KEPT


def test_a_learner_is_exported_after_desparsify(tmp_path):
    run = built(tmp_path)
    fit(run)
    before = outputs(run.model)
    run.learn.remove_cb(Step)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        run.learn.export("sparse.pkl")
    run.learn.dls = loaders()  # the failed export has emptied them
    feather_param.desparsify(run.model)
    run.learn.export("sparse.pkl")
    loaded = load_learner(tmp_path / "sparse.pkl")
    assert torch.equal(outputs(loaded.model), before)
    assert zeros(loaded.model) == KEPT


def test_after_batch_is_called_for_the_validation_too(tmp_path):
    calls = []

    class Count(Callback):
        def after_batch(self) -> None:
            calls.append(self.training)

    fit(built(tmp_path, callbacks=[Count()]), epochs=1)
    assert calls.count(True) == BATCHES
    assert calls.count(False) > 0


def test_sparsify_changes_the_order_of_the_parameters_in_an_optimizer():
    model = network()
    before = [id(parameter) for parameter in model.parameters()]
    feather_param.sparsify(model, final_rate=RATE, total_steps=1)
    after = [id(parameter) for parameter in model.parameters()]
    assert before != after
    assert sorted(before) == sorted(after)
