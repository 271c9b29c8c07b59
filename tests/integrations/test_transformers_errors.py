"""The callback for the Trainer of transformers: what it refuses, and its warnings."""

from __future__ import annotations

import pytest
import torch

import feather_param
from tests.integrations.bert import DATA, FeatherCallback, Trainer, arguments, build, sparsified, trainer_of


def test_a_model_is_no_controller():
    with pytest.raises(TypeError, match="expected a feather_param Controller, got BertForSequenceClassification; pass"):
        FeatherCallback(build())  # type: ignore[arg-type]


def test_a_controller_of_another_model_is_refused_when_the_trainer_is_made(tmp_path):
    callback = FeatherCallback(sparsified())
    with pytest.raises(ValueError, match="expected the model that the controller was made for"):
        Trainer(build(), arguments(tmp_path), train_dataset=DATA, callbacks=[callback])


def test_a_callback_that_is_added_later_is_checked_when_the_training_begins(tmp_path):
    trainer = Trainer(build(), arguments(tmp_path), train_dataset=DATA)
    trainer.add_callback(FeatherCallback(sparsified()))
    with pytest.raises(ValueError, match="expected the model that the controller was made for"):
        trainer.train()


def test_model_init_is_refused(tmp_path):
    controller = sparsified()
    with pytest.raises(ValueError, match="with model= and not with model_init="):
        Trainer(model_init=build, args=arguments(tmp_path), callbacks=[FeatherCallback(controller)])


def test_a_controller_that_follows_an_optimizer_is_refused_at_the_first_update(tmp_path):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = feather_param.sparsify(model, final_rate=0.8, total_steps=4, optimizer=optimizer)
    trainer = trainer_of(controller, tmp_path)
    trainer.optimizer = optimizer
    with pytest.raises(RuntimeError, match="each step of that optimizer already advances this controller"):
        trainer.train()


def test_a_second_training_after_desparsify_is_refused(tmp_path):
    trainer = trainer_of(sparsified(), tmp_path)
    trainer.train()
    with pytest.raises(RuntimeError, match=r"expected a sparsified model, got a plain one: .* pass desparsify=False"):
        trainer.train()


@pytest.mark.parametrize("option", ["fsdp", "deepspeed"])
def test_a_sharded_model_is_refused(tmp_path, option):
    controller = sparsified()
    trainer = trainer_of(controller, tmp_path)
    callback = trainer.pop_callback(FeatherCallback)
    setattr(trainer.args, option, ["full_shard"])
    with pytest.raises(ValueError, match="expected a model that is not sharded, got fsdp"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=controller.model)


def test_a_wrong_number_of_steps_is_named_with_the_right_one(tmp_path):
    trainer = trainer_of(sparsified(6), tmp_path)
    message = r"sparsify\(total_steps=4\), .* got total_steps=6: the full rate is reached at step 3"
    with pytest.warns(UserWarning, match=message):
        trainer.train()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of transformers to peft
def test_a_model_with_adapters_is_refused_unless_save_sparse_is_off(tmp_path):
    peft = pytest.importorskip("peft", reason="peft needs feather_param[integrations]")
    controller = sparsified()
    model = peft.get_peft_model(controller.model, peft.LoraConfig(r=2, target_modules=["query"]))
    trainer = Trainer(model, arguments(tmp_path), train_dataset=DATA, callbacks=[FeatherCallback(controller)])
    with pytest.raises(ValueError, match=r"got one with adapters of peft, .* pass save_sparse=False"):
        trainer.train()
