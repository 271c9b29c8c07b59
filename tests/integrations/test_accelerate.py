"""docs/trainers/accelerate.md, with accelerate itself."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_param
from feather_param.reports import History, scalars
from tests.integrations.digits import TOTAL, loader, network, outputs, run_page, zeros
from tests.training import same_state

accelerate = pytest.importorskip(
    "accelerate", reason="accelerate is missing: pip install 'feather_param[integrations]'"
)

RATE = 0.9
KEPT = round(RATE * TOTAL)
BATCHES = len(loader())


@pytest.fixture(autouse=True)
def _no_state():
    """Let each test choose its own precision: accelerate keeps the first one for the process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def built(how: str = "optimizer=", accumulate: int = 1, total: int = 8, register: bool = True, **settings):
    """Return all that a loop needs, with the controller advanced in one of the ways of the page."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    given = {"optimizer": optimizer} if how == "optimizer=" else {}
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=total, **given)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    model, optimizer, batches = accelerator.prepare(model, optimizer, loader())
    if how == "follow":
        controller.follow(optimizer)
    if register:
        accelerator.register_for_checkpointing(controller, ema)
    return SimpleNamespace(**{name: value for name, value in locals().items() if name != "given"})


def train(run, epochs: int = 1) -> None:
    run.model.train()
    for _ in range(epochs):
        for x, y in run.batches:
            with run.accelerator.accumulate(run.model):
                run.accelerator.backward(F.cross_entropy(run.model(x), y))
                run.optimizer.step()
                run.optimizer.zero_grad()
            if run.how == "step" and run.accelerator.sync_gradients:
                run.controller.step()
            run.ema.update_parameters(run.model)


def test_the_code_of_the_page_prunes_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"build": network, "loader": loader(), "epochs": 2, "torch": torch, "F": F}
    done = run_page("accelerate.md", scope, [0])
    assert done["controller"].step_count == BATCHES  # two epochs of half as many updates
    assert zeros(load_file("sparse.safetensors")) == KEPT
    again = built(accumulate=2, total=done["updates"], register=False)
    again.accelerator.register_for_checkpointing(again.controller)
    run_page("accelerate.md", {"accelerator": again.accelerator}, [1])
    assert again.controller.step_count == BATCHES // 2


@pytest.mark.parametrize("how", ["optimizer=", "follow", "step"])
@pytest.mark.parametrize(("accumulate", "updates"), [(1, BATCHES), (3, 2)])
def test_each_update_counts_once(how, accumulate, updates):
    run = built(how, accumulate)
    train(run)
    assert run.controller.step_count == updates


def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path):
    whole = built()
    train(whole)
    whole.accelerator.save_state(str(tmp_path))
    train(whole)
    resumed = built()
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.controller.step_count == BATCHES
    train(resumed)
    for one, other in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
        assert same_state(feather_param.baked_state_dict(one), feather_param.baked_state_dict(other))
    assert zeros(feather_param.baked_state_dict(resumed.model)) == KEPT


def test_a_training_whose_controller_is_not_registered_resumes_too(tmp_path):
    run = built(register=False)
    train(run)
    run.accelerator.save_state(str(tmp_path))
    resumed = built(register=False)
    resumed.accelerator.load_state(str(tmp_path))
    assert resumed.controller.step_count == BATCHES
    with pytest.raises(RuntimeError, match="does not match the number of registered objects"):
        built().accelerator.load_state(str(tmp_path))


def test_a_registered_controller_refuses_other_settings(tmp_path):
    built(total=8).accelerator.save_state(str(tmp_path))
    with pytest.raises(ValueError, match="total_steps"):
        built(total=80).accelerator.load_state(str(tmp_path))


def test_the_best_checkpoint_is_loaded_and_baked(tmp_path):
    run = built()
    train(run)
    before = outputs(run.model)
    run.accelerator.save_state(str(tmp_path))
    train(run)
    run.accelerator.load_state(str(tmp_path))
    assert run.controller.rate == RATE
    feather_param.desparsify(run.model)
    assert torch.equal(outputs(run.model), before)
    assert zeros(run.model) == KEPT


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_moving_average_is_baked_with_the_zeros_of_the_model(precision):
    run = built(mixed_precision=precision)
    train(run, epochs=2)
    before = outputs(run.ema)
    feather_param.desparsify(run.ema)
    assert torch.equal(outputs(run.ema), before)
    assert (
        zeros(run.ema.module) == zeros(feather_param.baked_state_dict(run.accelerator.unwrap_model(run.model))) == KEPT
    )


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """Return the state of a plain network that has loaded a file."""
    model = network()
    model.load_state_dict(load_file(path))
    return model.state_dict()


def test_save_model_saves_a_plain_file_after_desparsify(tmp_path):
    run = built()
    train(run)
    run.accelerator.save_model(run.model, str(tmp_path / "live"))
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded(tmp_path / "live" / "model.safetensors")
    sparse = feather_param.baked_state_dict(run.model)
    run.accelerator.save(sparse, str(tmp_path / "baked.safetensors"), safe_serialization=True)
    assert same_state(loaded(tmp_path / "baked.safetensors"), sparse)
    sparse = copy.deepcopy(sparse)
    feather_param.desparsify(run.model)
    run.accelerator.save_model(run.model, str(tmp_path / "plain"))
    assert same_state(loaded(tmp_path / "plain" / "model.safetensors"), sparse)


def test_the_trackers_of_accelerate_log_a_record(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = built(log_with="tensorboard", project_dir=str(tmp_path))
    run.accelerator.init_trackers("run")
    history = History(run.controller)
    train(run)
    accelerator = run.accelerator
    scalars.log_record(lambda name, value, step: accelerator.log({name: value}, step=step), history.record())
    accelerator.end_training()
    (file,) = Path(tmp_path).rglob("events.out*")
    events = event_accumulator.EventAccumulator(str(file))
    events.Reload()
    (event,) = events.Scalars("sparsity/rate")
    assert (event.step, event.value) == (BATCHES, pytest.approx(RATE))
