"""FeatherCallback for Lightning: training, and errors."""

from __future__ import annotations

import copy
import pickle
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("lightning", reason="lightning is missing; it needs feather_param[integrations]")

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner.tuning import Tuner

import feather_param
from feather_param.integrations.lightning import FeatherCallback
from tests.integrations.lightning_case import QUIET, RATE, STEPS, ZEROS, Digits, assert_same, batches, fit, quiet, zeros

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    class Headed(Digits):
        def __init__(self):
            super().__init__()
            self.net, self.head = self.net[:3], self.net[3]

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    page = (Path(__file__).parents[2] / "docs/trainers/lightning.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    trainer = partial(Trainer, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    scope = {"Trainer": trainer, "model": Headed(), "loader": batches()}
    first, ship = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(first, scope)
    assert int((scope["model"].net[0].weight == 0).sum()) == round(0.95 * 64 * 16)
    exec(ship, scope | {"Digits": Headed}, shipped := {})
    assert torch.equal(shipped["loaded"].net[0].weight, scope["model"].net[0].weight)
    fast, _ = feather_param.to_sparse_inference(shipped["loaded"].eval().net, torch.rand(1, 64))
    assert fast(torch.rand(1, 64)).shape == (1, 16)
    assert isinstance(eval(re.search(r"^\+(FeatherCallback.*)$", page, re.MULTILINE)[1], scope), FeatherCallback)


def test_the_callback_can_be_pickled_and_copied():
    for twin in (pickle.loads(pickle.dumps(FeatherCallback(RATE))), copy.deepcopy(FeatherCallback(RATE))):
        assert isinstance(twin, FeatherCallback)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.5},
        {"max_steps": 6},
        {"fast_dev_run": True},
        {"barebones": True, "enable_model_summary": False},
        {"limit_train_batches": 2, "epochs": 3},
    ],
    ids=str,
)
def test_the_trainer_may_have_any_option(tmp_path, options):
    module, _ = fit(tmp_path, callback := FeatherCallback(RATE), **options)
    assert zeros(module) == ZEROS
    assert callback.controller is None
    assert type(module.net[0]) is nn.Linear


def test_the_number_of_steps_is_that_of_the_optimizer(tmp_path):
    class Look(FeatherCallback):
        def on_train_end(self, trainer, pl_module):
            self.seen = self.controller.state_dict()

    fit(tmp_path, look := Look(RATE), accumulate_grad_batches=3, epochs=3)
    assert (look.seen["total_steps"], look.seen["step_count"]) == (6, 6)


def test_rate_and_threshold_are_logged(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, FeatherCallback(RATE), logger=logger, log_every_n_steps=3)
    lines = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rates = [float(rate) for line in lines[1:] if (rate := line.split(",")[columns.index("feather/rate")])]
    assert len(rates) == 5
    assert rates == sorted(rates)
    assert rates[-1] == RATE
    assert "feather/threshold" in columns


def test_nothing_is_logged_if_log_is_false(tmp_path):
    _, trainer = fit(tmp_path, FeatherCallback(RATE, log=False))
    assert not any(name.startswith("feather/") for name in trainer.callback_metrics)
    _, trainer = fit(tmp_path, FeatherCallback(RATE, module="net"))
    assert trainer.callback_metrics["feather/net/rate"] == RATE


class Gan(Digits):
    """Two networks with two optimizers, which the module steps itself."""

    def __init__(self, critic_steps=1):
        super().__init__()
        self.automatic_optimization = False
        self.critic, self.critic_steps = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 1)), critic_steps

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(self.critic_steps):
            second.zero_grad()
            self.manual_backward(-self.critic(self.net(batch[0]).detach()).tanh().mean())
            second.step()
        first.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]) + self.critic(self.net(batch[0])).mean())
        first.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(each.parameters(), lr=1e-2) for each in (self.net, self.critic)]


@pytest.mark.parametrize(("choice", "steps"), [({"module": "net"}, 16), ({"module": "critic"}, 32)])
def test_of_several_optimizers_the_one_of_the_module_is_followed(tmp_path, choice, steps):
    callback = FeatherCallback(RATE, desparsify=False, **choice)
    fit(tmp_path, callback, module=Gan(critic_steps=2))
    assert callback.controller.step_count == steps
    assert callback.controller.rate == RATE


def test_of_several_optimizers_of_the_module_the_last_is_followed(tmp_path):
    callback = FeatherCallback(RATE, desparsify=False)
    with pytest.warns(UserWarning, match="this optimizer does not train net.0.weight, net.3.weight"):
        fit(tmp_path, callback, module=Gan(critic_steps=2))
    assert callback.controller.step_count == 2 * 4 * STEPS


def test_layers_of_configure_model_are_pruned(tmp_path):
    class Late(Digits):
        def __init__(self):
            super().__init__()
            self.net = None

        def configure_model(self):
            if self.net is None:
                self.net = Digits().net

    module, _ = fit(tmp_path, FeatherCallback(RATE), module=Late())
    assert_same(module, fit(tmp_path, FeatherCallback(RATE))[0])


def test_layers_of_setup_come_too_late(tmp_path):
    class Late(Digits):
        def setup(self, stage):
            self.net[3] = nn.Sequential(nn.Linear(16, 10))

    with pytest.warns(
        UserWarning, match=r"got net.3.0.weight later: they stay dense; build layers in __init__ or conf"
    ):
        fit(tmp_path, FeatherCallback(RATE, exclude="net.3"), module=Late())


def test_a_submodule_may_be_compiled(tmp_path):
    module = Digits()
    module.net = torch.compile(module.net, backend="eager")
    fit(tmp_path, FeatherCallback(RATE, module="net"), module=module)
    assert zeros(module) == ZEROS


def test_early_stopping_before_the_full_rate_is_named(tmp_path):
    def stop():
        return EarlyStopping("loss", patience=1, mode="max")  # after the second epoch

    with pytest.warns(
        UserWarning, match=r"step 32, where the rate is 0.75, got step 8 .*pass total_steps= to FeatherC"
    ):
        module, _ = fit(tmp_path, FeatherCallback(RATE), stop(), epochs=16)
    assert 0 < zeros(module) < ZEROS
    module, _ = fit(tmp_path, FeatherCallback(RATE, total_steps=8), stop(), epochs=16)
    assert zeros(module) == ZEROS


@pytest.mark.parametrize("mine_first", [True, False])
def test_a_learning_rate_finder_leaves_no_trace(tmp_path, mine_first):
    class Tuned(Digits):
        lr = 1e-2

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=20, update_attr=False)
    callbacks = [FeatherCallback(RATE), finder] if mine_first else [finder, FeatherCallback(RATE)]
    found, _ = fit(tmp_path, *callbacks, module=Tuned())
    assert_same(found, fit(tmp_path, FeatherCallback(RATE), module=Tuned())[0])

    module, trainer = Tuned(), quiet(tmp_path, FeatherCallback(RATE, end_step=0))
    before = {name: each.clone() for name, each in module.state_dict().items()}
    Tuner(trainer).lr_find(module, batches(), num_training=20, update_attr=False)
    assert all(torch.equal(each, before[name]) for name, each in module.state_dict().items())
    trainer.fit(module, batches())
    assert zeros(module) == ZEROS


class Sized(Digits):
    batch_size = 4

    def train_dataloader(self):
        return batches(batch_size=self.batch_size)

    val_dataloader = train_dataloader


def test_a_tuner_of_the_batch_size_changes_the_number_of_steps(tmp_path):
    module, trainer = Sized(), quiet(tmp_path, callback := FeatherCallback(RATE, desparsify=False))
    Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=1, init_val=4)
    assert module.batch_size > 4
    trainer.fit(module)
    assert callback.controller.state_dict()["total_steps"] == trainer.global_step == callback.controller.step_count


def test_a_batch_size_finder_in_fit_is_refused(tmp_path):
    trainer = quiet(tmp_path, FeatherCallback(RATE), BatchSizeFinder(max_trials=1, steps_per_trial=1, init_val=8))
    with pytest.raises(RuntimeError, match=r"expected 8 batches in an epoch as in setup, got [24]: another callback"):
        trainer.fit(Sized())


class Setup(Digits):
    def setup(self, stage):
        self.data = batches()

    def train_dataloader(self):
        return self.data


def test_an_unknown_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"got inf \(max_epochs=-1, .*pass total_steps= to FeatherCallback"):
        fit(tmp_path, FeatherCallback(RATE), epochs=-1)
    with pytest.raises(ValueError, match=r"got -1 \(max_epochs=-1, or a loader without"):
        quiet(tmp_path, FeatherCallback(RATE)).fit(Digits(), iter_only())
    with pytest.raises(RuntimeError, match=r"got AttributeError: .*build the data before LightningModule.setup"):
        quiet(tmp_path, FeatherCallback(RATE)).fit(Setup())
    module = Setup()
    quiet(tmp_path, FeatherCallback(RATE, total_steps=16)).fit(module)
    assert zeros(module) == ZEROS


def test_the_data_may_come_from_a_datamodule(tmp_path):
    class Data(LightningDataModule):
        def setup(self, stage):
            self.data = batches()

        def train_dataloader(self):
            return self.data

    module = Digits()
    quiet(tmp_path, FeatherCallback(RATE)).fit(module, datamodule=Data())
    assert_same(module, fit(tmp_path, FeatherCallback(RATE))[0])


def iter_only():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches().dataset)

    return torch.utils.data.DataLoader(Stream(), batch_size=8)


def test_wrong_arguments_are_refused_at_construction():
    for arguments, error, text in [
        ({"module": 3}, TypeError, "expected module to be the name of a submodule or None, got 3"),
        ({"module": ""}, TypeError, "expected module to be the name"),
        ({"total_steps": 2.5}, TypeError, "expected total_steps to be an int, got 2.5"),
        ({"total_steps": 0}, ValueError, "expected total_steps to be at least 1, got 0"),
        ({"desparsify": 1}, TypeError, "expected desparsify to be True or False, got 1"),
        ({"log": "yes"}, TypeError, "expected log to be True or False, got 'yes'"),
        ({"optimizer": None}, TypeError, "expected no optimizer=: the callback follows the optimizer of configure_opt"),
        (
            {"model": nn.Linear(1, 1)},
            TypeError,
            "expected no model=: the callback prunes the LightningModule; pass mod",
        ),
        ({"exlude": "head"}, TypeError, "got exlude=; the closest is exclude="),
    ]:
        with pytest.raises(error, match=text.replace("(", r"\(")):
            FeatherCallback(RATE, **arguments)


def test_wrong_arguments_are_refused_in_setup(tmp_path):
    for callback, error, text in [
        (FeatherCallback(90), ValueError, "90 % is 0.9"),
        (
            FeatherCallback(RATE, module="nett"),
            ValueError,
            "submodule of Digits, got 'nett'; the closest names are net",
        ),
        (FeatherCallback(RATE, exclude="head"), ValueError, "head"),
        (FeatherCallback("0.9"), TypeError, "expected final_rate to be a number, got '0.9'"),
    ]:
        with pytest.raises(error, match=text):
            fit(tmp_path, callback)


def test_a_module_that_is_sparsified_already_is_refused(tmp_path):
    module = Digits()
    feather_param.sparsify(module.net, final_rate=0.5, total_steps=1)
    with pytest.raises(ValueError, match="expected a plain model, got one that is already sparsified"):
        fit(tmp_path, FeatherCallback(RATE), module=module)


def test_optimizers_without_weights_are_refused(tmp_path):
    class None_(Digits):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[1].parameters(), lr=0.1)

    with pytest.raises(ValueError, match="got one that holds none of them"):
        fit(tmp_path, FeatherCallback(RATE), module=None_())
