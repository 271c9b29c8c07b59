"""docs/trainers/ignite.md, with ignite itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import feather_param
from feather_param.reports import History, scalars
from tests.integrations.digits import TOTAL, loader, network, outputs, run_page, zeros
from tests.training import same_state

pytest.importorskip("ignite", reason="ignite is missing: pip install 'feather_param[integrations]'")

from ignite.engine import Events, create_supervised_trainer  # needs ignite
from ignite.handlers import Checkpoint, DiskSaver, EMAHandler
from ignite.handlers.tensorboard_logger import TensorboardLogger

RATE = 0.9
KEPT = round(RATE * TOTAL)
BATCHES = len(loader())
PAGE = {"build": network, "loader": loader(), "epochs": 4, "torch": torch, "F": F}


def built(how: str = "optimizer=", accumulate: int = 1, total: int = 2 * BATCHES, **average):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    given = {"optimizer": optimizer} if how == "optimizer=" else {}
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=total, **given)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy, gradient_accumulation_steps=accumulate)
    if how == "handler":
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=accumulate), controller.step)
    ema = EMAHandler(model, momentum=0.5, **average)
    ema.attach(trainer, event=Events.ITERATION_COMPLETED)
    return SimpleNamespace(model=model, controller=controller, trainer=trainer, ema=ema.ema_model, optimizer=optimizer)


def saved(run, *, without: tuple[str, ...] = ()) -> dict:
    names = ("model", "optimizer", "controller", "ema", "trainer")
    return {name: getattr(run, name) for name in names if name not in without}


def test_the_code_of_the_page_resumes_and_ships_the_best_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = built(total=4 * BATCHES)
    last = Checkpoint(saved(first), DiskSaver("run"), filename_prefix="last")
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED, last)
    first.trainer.run(loader(), max_epochs=1)
    scope = run_page("ignite.md", {**PAGE, "resume": "run/last_checkpoint_4.pt"})
    assert scope["trainer"].state.iteration == 4 * BATCHES
    assert zeros(scope["model"]) == KEPT
    assert same_state(feather_param.load_sparse("sparse.safetensors"), scope["model"].state_dict())
    assert not (tmp_path / "run" / "best_model_0.0000.pt").exists()  # of the epochs before the final rate


@pytest.mark.parametrize("how", ["optimizer=", "handler"])
@pytest.mark.parametrize(("accumulate", "updates"), [(1, BATCHES), (2, BATCHES // 2)])
def test_each_update_counts_once(how, accumulate, updates):
    run = built(how, accumulate)
    run.trainer.run(loader(), max_epochs=1)
    assert run.controller.step_count == updates


def test_a_handler_in_addition_to_a_followed_optimizer_is_refused():
    run = built()
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, run.controller.step)
    with pytest.raises(RuntimeError, match=r"expected step\(\) not to be called"):
        run.trainer.run(loader(), max_epochs=1)


@pytest.mark.parametrize("without", [(), ("controller",)], ids=["all", "without the controller"])
def test_a_resumed_training_ends_like_an_uninterrupted_one(without, tmp_path):
    whole = built()
    last = Checkpoint(saved(whole, without=without), DiskSaver(str(tmp_path)), n_saved=None)
    whole.trainer.add_event_handler(Events.EPOCH_COMPLETED, last)
    whole.trainer.run(loader(), max_epochs=2)
    resumed = built()
    Checkpoint.load_objects(saved(resumed, without=without), tmp_path / f"checkpoint_{BATCHES}.pt")
    assert resumed.controller.step_count == BATCHES
    resumed.trainer.run(loader(), max_epochs=2)
    for one, other in ((whole.model, resumed.model), (whole.ema, resumed.ema)):
        assert same_state(feather_param.baked_state_dict(one), feather_param.baked_state_dict(other))
    assert zeros(feather_param.baked_state_dict(resumed.model)) == KEPT


@pytest.mark.parametrize("kept", [True, False])
def test_a_resumed_run_knows_the_best_score_if_it_was_saved(kept, tmp_path):
    def run(resume: bool, score: float) -> Checkpoint:
        each = built()
        folder = DiskSaver(str(tmp_path), require_empty=False)
        score_function = lambda engine: score  # noqa: E731
        best = Checkpoint({"model": each.ema}, folder, filename_prefix="best", score_function=score_function)
        to_save = saved(each) | ({"best": best} if kept else {})
        last = Checkpoint(to_save, folder, filename_prefix="last")
        each.trainer.add_event_handler(Events.EPOCH_COMPLETED, best)
        each.trainer.add_event_handler(Events.EPOCH_COMPLETED, last)
        if resume:
            Checkpoint.load_objects(to_save, tmp_path / f"last_checkpoint_{BATCHES}.pt")
        each.trainer.run(loader(), max_epochs=2 if resume else 1)
        return best

    run(resume=False, score=0.9)
    best = run(resume=True, score=0.5)
    assert str(best.last_checkpoint).endswith("best_model_0.9000.pt" if kept else "best_model_0.5000.pt")


@pytest.mark.parametrize("buffers", ["copy", "update", "ema_train"])
def test_a_moving_average_is_baked_as_evaluated(buffers):
    run = built(handle_buffers=buffers)
    run.trainer.run(loader(), max_epochs=2)
    before = outputs(run.ema)
    feather_param.desparsify(run.ema)
    assert torch.equal(outputs(run.ema), before)
    assert zeros(run.ema) == KEPT


def test_a_moving_average_from_before_sparsify_fails():
    model = network()
    ema = EMAHandler(model, momentum=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    feather_param.sparsify(model, final_rate=RATE, total_steps=4, optimizer=optimizer)
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy)
    ema.attach(trainer, event=Events.ITERATION_COMPLETED)
    with pytest.raises(RuntimeError):
        trainer.run(loader(), max_epochs=1)


def test_a_checkpoint_loads_into_a_sparsified_model_only(tmp_path):
    run = built()
    run.trainer.run(loader(), max_epochs=1)
    torch.save(run.model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        Checkpoint.load_objects({"model": network()}, tmp_path / "model.pt")
    Checkpoint.load_objects({"model": built().model}, tmp_path / "model.pt")


def test_a_training_that_stops_early_warns_of_fewer_zeros():
    run = built(total=100)
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), run.trainer.terminate)
    run.trainer.run(loader(), max_epochs=1)
    with pytest.warns(UserWarning, match="of final_rate are reached, got it at"):
        feather_param.desparsify(run.model)


def test_the_tensorboard_logger_of_ignite_logs_a_record(tmp_path):
    pytest.importorskip("tensorboard")
    run, logger = built(), TensorboardLogger(log_dir=str(tmp_path))
    history = History(run.controller)
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda: scalars.log_record(logger.writer.add_scalar, history.record())
    )
    run.trainer.run(loader(), max_epochs=1)
    logger.close()
    (file,) = tmp_path.glob("events.out*")
    assert b"sparsity/threshold" in file.read_bytes()
