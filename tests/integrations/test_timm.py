"""docs/trainers/timm.md, with timm itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import feather_param
from tests.integrations.digits import digits, run_page
from tests.training import same_state

timm = pytest.importorskip("timm", reason="timm is missing: pip install 'feather_param[integrations]'")

from timm.models import load_checkpoint, resume_checkpoint  # noqa: E402 # needs timm
from timm.optim import Lookahead, create_optimizer_v2  # noqa: E402
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3  # noqa: E402

RATE = 0.8
SMALL = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 1, "num_heads": 2}
DATA = digits(128)
BATCHES = 4


def build(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL, **options)


PRUNABLE = feather_param.plan(build(), final_rate=RATE)
KEPT = PRUNABLE.zeros


def zeros(model: nn.Module) -> int:
    state = model.state_dict()
    return sum(int((state[row.name] == 0).sum()) for row in PRUNABLE.rows)


def images(count: int = len(DATA)) -> torch.Tensor:
    return DATA.tensors[0][:count].view(-1, 1, 8, 8)


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images(50))


def accuracy(model: nn.Module) -> float:
    return float((outputs(model).argmax(1) == DATA.tensors[1][:50]).float().mean())


def train_one_epoch(model, loader, optimizer, ema=None) -> None:
    model.train()
    x, y = images(), DATA.tensors[1]
    for i in range(BATCHES):
        batch = slice(32 * i, 32 * (i + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
        if ema is not None:
            ema.update(model)


def built(opt: str = "adamw", total: int = 2 * BATCHES, average=ModelEmaV3):
    model = build()
    optimizer = create_optimizer_v2(model, opt=opt, lr=2e-3, weight_decay=0.05)
    controller = feather_param.sparsify(model, final_rate=RATE, total_steps=total, optimizer=optimizer)
    ema = average(model, decay=0.5)
    return SimpleNamespace(model=model, optimizer=optimizer, controller=controller, ema=ema)


def saver(run, folder) -> CheckpointSaver:
    return CheckpointSaver(
        run.model, run.optimizer, model_ema=run.ema, checkpoint_dir=str(folder), recovery_dir=str(folder)
    )


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    """A folder with the checkpoints of the page's code, which was resumed after its first epoch."""
    folder = tmp_path_factory.mktemp("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "run").mkdir()
        run = built(total=4 * BATCHES)
        train_one_epoch(run.model, None, run.optimizer, run.ema)
        saver(run, folder / "run").save_checkpoint(0, metric=0.0)
        scope = {"train_one_epoch": train_one_epoch, "accuracy": accuracy, "loader": range(BATCHES)}
        scope = run_page("timm.md", {**scope, "build": build, "epochs": 4, "resume": True})
    assert scope["first"] == 1
    return folder, scope["model"]


def test_the_code_of_the_page_resumes_and_ships_the_best_average(folder):
    path, model = folder
    assert zeros(model) == KEPT
    assert same_state(feather_param.load_sparse(path / "sparse.safetensors"), model.state_dict())
    metadata = torch.load(path / "run" / "model_best.pth.tar", weights_only=True)
    assert metadata["metric"] > 0
    assert metadata["epoch"] >= 1  # the first one is not at the final rate


def test_a_checkpoint_loads_into_a_sparsified_model_only(folder):
    path = str(folder[0] / "run" / "model_best.pth.tar")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_checkpoint(build(), path)
    load_checkpoint(built(total=4 * BATCHES).model, path, use_ema=True)


def test_create_model_takes_a_plain_file(folder, tmp_path):
    path = str(tmp_path / "plain.pth")
    torch.save(folder[1].state_dict(), path)
    assert same_state(build(checkpoint_path=path).state_dict(), folder[1].state_dict())


def test_a_state_as_pretrained_weights_loses_a_classifier_of_another_size(folder):
    state = {name: value.clone() for name, value in folder[1].state_dict().items()}
    overlay = {"state_dict": state, "input_size": (1, 8, 8)}
    model = build(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.blocks[0].attn.qkv.weight, folder[1].blocks[0].attn.qkv.weight)
    assert not torch.equal(model.head.weight, folder[1].head.weight)


def test_a_pretrained_network_is_pruned():
    dense = {name: torch.randn_like(value) for name, value in build().state_dict().items()}
    overlay = {"state_dict": dense, "num_classes": 10, "input_size": (1, 8, 8)}
    model = build(pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.head.weight, dense["head.weight"])
    feather_param.sparsify(model, final_rate=RATE, total_steps=1, end_step=0)
    feather_param.desparsify(model)
    assert zeros(model) == KEPT


@pytest.mark.parametrize("opt", ["adamw", "lookahead_adamw", "sgd"])
def test_a_resumed_training_ends_like_an_uninterrupted_one(opt, tmp_path):
    whole = built(opt)
    train_one_epoch(whole.model, None, whole.optimizer, whole.ema)
    saver(whole, tmp_path).save_checkpoint(0)
    train_one_epoch(whole.model, None, whole.optimizer, whole.ema)
    resumed, path = built(opt), str(tmp_path / "last.pth.tar")
    assert resume_checkpoint(resumed.model, path, resumed.optimizer) == 1
    load_checkpoint(resumed.ema.module, path, use_ema=True)
    assert resumed.controller.step_count == BATCHES
    train_one_epoch(resumed.model, None, resumed.optimizer, resumed.ema)
    for one, other in ((whole.model, resumed.model), (whole.ema.module, resumed.ema.module)):
        assert same_state(feather_param.baked_state_dict(one), feather_param.baked_state_dict(other))


def test_lookahead_counts_each_step_once_and_is_baked_as_evaluated():
    run = built("lookahead_adamw")
    assert isinstance(run.optimizer, Lookahead)
    for _ in range(2):
        train_one_epoch(run.model, None, run.optimizer)
    assert run.controller.step_count == 2 * BATCHES
    before = outputs(run.model)
    feather_param.desparsify(run.model)
    assert torch.equal(outputs(run.model), before)
    assert zeros(run.model) == KEPT


@pytest.mark.parametrize("average", [ModelEmaV2, ModelEmaV3])
def test_a_moving_average_is_baked_as_evaluated_and_the_model_stays(average):
    run = built(average=average)
    for _ in range(2):
        train_one_epoch(run.model, None, run.optimizer, run.ema)
    before, trained = outputs(run.ema.module), outputs(run.model)
    feather_param.desparsify(run.ema.module)
    assert torch.equal(outputs(run.ema.module), before)
    assert zeros(run.ema.module) == KEPT
    assert torch.equal(outputs(run.model), trained)


def test_a_moving_average_from_before_sparsify_fails():
    model = build()
    ema = ModelEmaV3(model)
    feather_param.sparsify(model, final_rate=RATE, total_steps=2)
    with pytest.raises(RuntimeError):
        ema.update(model)


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=str)
def test_the_parameter_groups_are_the_same_after_sparsify(options):
    model = build()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def groups():
        made = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, **options).param_groups
        return {
            (group.get("lr_scale"), group["weight_decay"]): sorted(names[id(p)] for p in group["params"])
            for group in made
        }

    before = groups()
    feather_param.sparsify(model, final_rate=RATE, total_steps=2)
    assert groups() == before
