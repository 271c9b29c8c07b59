"""The callback for the Trainer of transformers: checkpoints, other models, and what is pushed to the Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import feather_param
from tests.integrations.bert import (
    DATA,
    ZEROS,
    FeatherCallback,
    Trainer,
    arguments,
    build,
    configuration,
    same,
    sparsified,
    trainer_of,
    transformers,
    zeros,
)

SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Return the folder of a training and its model."""
    folder = tmp_path_factory.mktemp("finished")
    controller = sparsified()
    trainer_of(controller, folder, **SAVING).train()
    return folder, controller.model


class Words(logging.Handler):
    """Collects the warnings that transformers logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage()


@pytest.fixture
def logged():
    words, logger = Words(), logging.getLogger("transformers")
    logger.addHandler(words)
    yield words
    logger.removeHandler(words)


def complaints(logged: Words) -> set[str]:
    """Return what transformers 4 or 5 says about weights that are missing in a file, or that a model does not have."""
    return {word for word in ("MISSING", "UNEXPECTED", "newly initialized", "not used") if word in logged.text}


def test_the_sparse_folder_loads_as_any_model(finished, logged):
    folder, model = finished
    loaded = type(model).from_pretrained(folder / "checkpoint-4" / "sparse")
    assert not complaints(logged)
    assert zeros(loaded) == ZEROS
    assert same(loaded, model)
    assert same(type(model).from_pretrained(folder / "checkpoint-4", subfolder="sparse"), model)


def test_a_sparse_file_of_the_final_model_loads_into_a_plain_one(finished, tmp_path):
    _, model = finished
    feather_param.save_sparse(model, tmp_path / "sparse.safetensors")
    loaded = build()
    loaded.load_state_dict(feather_param.load_sparse(tmp_path / "sparse.safetensors"))
    assert same(loaded, model)
    fast, _ = feather_param.to_sparse_inference(loaded.eval(), DATA[0]["input_ids"][None])
    assert fast(DATA[0]["input_ids"][None]).logits.shape == (1, loaded.config.num_labels)


def test_the_checkpoint_itself_loads_the_same_model(finished, logged):
    folder, model = finished
    loaded = type(model).from_pretrained(folder / "checkpoint-4")
    assert same(loaded, model)
    assert complaints(logged) <= {"UNEXPECTED", "not used"}  # the dense weights, which a resume needs
    assert "parametrizations.weight.original" in logged.text


def test_a_checkpoint_from_before_the_full_rate_has_the_zeros_of_its_step(finished):
    folder, model = finished
    early = sparsified(8)
    trainer = trainer_of(early, folder / "early", max_steps=2, desparsify=False, **SAVING)
    with pytest.warns(UserWarning, match="expected sparsify"):
        trainer.train()
    loaded = type(model).from_pretrained(folder / "early/checkpoint-2/sparse")
    assert zeros(loaded) == early.report().zeros < ZEROS


def test_a_checkpoint_in_several_files_becomes_one(tmp_path, logged):
    """A file of the Trainer's own would be read instead of ours."""
    controller = sparsified()
    model, save = controller.model, controller.model.save_pretrained
    model.save_pretrained = lambda folder, **options: save(folder, **{"max_shard_size": "4KB", **options})
    for left in ("checkpoint-1/sparse.unfinished", "checkpoint-4/weights.unfinished"):  # by a training that was killed
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "left.txt").touch()
    trainer_of(controller, tmp_path, **SAVING, desparsify=False).train()
    plain = feather_param.baked_state_dict(model)
    assert [path.name for path in (tmp_path / "checkpoint-4").glob("model*")] == ["model.safetensors"]
    assert len(list((tmp_path / "checkpoint-4/sparse").glob("model-*"))) > 1
    assert not [path for path in tmp_path.glob("checkpoint-*/*") if path.is_dir() and path.name != "sparse"]
    for folder in ("checkpoint-4", "checkpoint-4/sparse"):
        loaded = type(model).from_pretrained(tmp_path / folder).state_dict()
        assert not complaints(logged) & {"MISSING", "newly initialized"}
        assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    again = sparsified()
    trainer_of(again, tmp_path, **SAVING, desparsify=False).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(again.model, model)


def test_without_save_sparse_the_checkpoint_holds_what_a_resume_needs_only(tmp_path, logged):
    trainer_of(sparsified(2), tmp_path, max_steps=2, **SAVING, save_sparse=False).train()
    assert not (tmp_path / "checkpoint-2/sparse").exists()
    assert load_file(tmp_path / "checkpoint-2/model.safetensors").keys() == sparsified().model.state_dict().keys()
    type(build()).from_pretrained(tmp_path / "checkpoint-2")
    assert complaints(logged) & {"MISSING", "newly initialized"}


def test_the_checkpoint_loads_strictly_into_a_sparsified_model(finished):
    folder, model = finished
    controller = sparsified()
    controller.model.load_state_dict(load_file(folder / "checkpoint-4/model.safetensors"))
    assert controller.step_count == 4
    feather_param.desparsify(controller.model)
    assert same(controller.model, model)


def test_the_model_card_names_the_zeros(finished):
    folder, _ = finished
    card = (folder / "checkpoint-4/sparse/README.md").read_text(encoding="utf-8")
    assert f"{ZEROS:,} of the {ZEROS / 0.8:,.0f} prunable weights are exactly zero (79.992%)" in card
    assert "after 4 updates" in card
    assert "bert.encoder.layer.0.output.dense.weight" in card
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(card).data.tags == ["feather_param", "sparse"]


def test_save_model_after_the_training_saves_the_plain_model(finished, tmp_path, logged):
    controller = sparsified()
    trainer = trainer_of(controller, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = type(controller.model).from_pretrained(tmp_path / "final")
    assert not complaints(logged)
    assert zeros(loaded) == ZEROS


def test_during_the_training_baked_weights_are_saved_with_save_pretrained(tmp_path, logged):
    controller = sparsified()
    model = controller.model
    trainer = trainer_of(controller, tmp_path, desparsify=False)
    trainer.train()
    model.save_pretrained(tmp_path / "now", state_dict=feather_param.baked_state_dict(model))  # the line of the page
    assert zeros(type(model).from_pretrained(tmp_path / "now")) == ZEROS
    assert not complaints(logged)
    trainer.save_model(str(tmp_path / "dense"))
    type(model).from_pretrained(tmp_path / "dense")
    assert complaints(logged) & {"MISSING", "newly initialized"}


def test_old_checkpoints_are_deleted(tmp_path):
    options = {"save_steps": 1, "save_total_limit": 2, "save_only_model": True}
    trainer_of(sparsified(), tmp_path, save_strategy="steps", **options).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert all((path / "sparse/model.safetensors").exists() for path in tmp_path.iterdir())


def test_the_tokenizer_is_saved_with_the_sparse_model(tmp_path):
    class Tokenizer(transformers.FeatureExtractionMixin):
        pass

    controller = sparsified()
    trainer = trainer_of(controller, tmp_path, **SAVING)
    trainer.processing_class = trainer.callback_handler.processing_class = Tokenizer()
    trainer.train()
    assert (tmp_path / "checkpoint-4/sparse/preprocessor_config.json").exists()


class Ids(torch.utils.data.Dataset):
    """Rows of tokens that are their own labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = DATA[index]["input_ids"]
        return {"input_ids": row, "labels": row}


def language_model(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForMaskedLM(configuration()), None
    config = transformers.GPT2Config(
        vocab_size=17, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), ["*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight"]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_tied_embeddings_stay_tied_and_dense(tmp_path, kind, logged):
    model, include = language_model(kind)
    controller = sparsified(2, model, include=include)
    names, asked = list(controller.masks()), controller.report().total
    args = arguments(tmp_path, max_steps=2, **SAVING)
    trainer = Trainer(model, args, train_dataset=Ids(), callbacks=[FeatherCallback(controller)])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2/sparse")
    assert not complaints(logged)
    assert same(loaded, model)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert sum(int((loaded.get_parameter(name) == 0).sum()) for name in names) == round(0.8 * asked)
    assert not (loaded.get_output_embeddings().weight == 0).any()
    resumed, include = language_model(kind)
    again = sparsified(2, resumed, include=include)
    trainer = Trainer(resumed, args, train_dataset=Ids(), callbacks=[FeatherCallback(again)])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=True)  # it is at its end already
    assert "unexpected keys" not in logged.text
    assert same(resumed, model)


class Net(nn.Module):
    """A model that is no PreTrainedModel."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.body(input_ids.float()), labels)}


def test_a_model_of_torch_is_saved_as_one_file(tmp_path):
    torch.manual_seed(0)
    model = Net()
    controller = sparsified(4, model.body, max_rate_per_layer=0.9)  # a part of the model
    trainer = Trainer(model, arguments(tmp_path, **SAVING), train_dataset=DATA, callbacks=[FeatherCallback(controller)])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    loaded = Net()
    loaded.load_state_dict(load_file(tmp_path / "checkpoint-4/sparse/model.safetensors"))
    assert same(loaded, model)
    assert zeros(loaded) == round(0.8 * (8 * 32 + 32 * 10))


def test_a_layer_with_weight_norm_is_saved_sparse_and_resumed(tmp_path):
    def train(folder: Path, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        model = Net()
        parametrizations.weight_norm(model.body[0])
        controller = sparsified(4, model, max_rate_per_layer=0.9)
        args = arguments(folder, **SAVING)
        trainer = Trainer(model, args, train_dataset=DATA, callbacks=[FeatherCallback(controller)])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(**options)
        return model

    model = train(tmp_path)
    loaded = load_file(tmp_path / "checkpoint-4/sparse/model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    assert same(train(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "checkpoint-2")), model)


def test_what_is_pushed_to_the_hub_loads_as_a_sparse_model(tmp_path, monkeypatch):
    """The network is replaced by a list of what would be uploaded."""
    pushed: list[tuple[str, int]] = []

    class Job:
        def done(self) -> bool:
            return True

        is_done = done

        def result(self) -> None: ...

    class Api:
        def create_repo(self, name: str, **_: Any) -> Any:
            return type("Url", (), {"repo_id": name})

        def upload_folder(self, *, folder_path: str, **_: Any) -> Job:
            loaded = type(build()).from_pretrained(folder_path)
            pushed.append((Path(folder_path).name, zeros(loaded)))
            return Job()

    if not hasattr(transformers.trainer, "hf_api"):
        pytest.skip("this test replaces a name of transformers 5")
    monkeypatch.setattr(transformers.trainer, "hf_api", Api)
    controller = sparsified()
    options = {"push_to_hub": True, "hub_strategy": "all_checkpoints", "hub_model_id": "somebody/sparse"}
    trainer = trainer_of(controller, tmp_path / "out", **SAVING, **options)
    trainer.train()
    trainer.push_to_hub()
    assert pushed == [("out", ZEROS), ("checkpoint-2", ZEROS), ("out", ZEROS), ("checkpoint-4", ZEROS), ("out", ZEROS)]
    assert (tmp_path / "out/checkpoint-4/sparse/README.md").exists()
