"""Training in several processes with DDP and FSDP2 of torch, on a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from feather_param import allocations
from tests.processes import ddp, fsdp
from tests.processes.launch import name_of, passed, run

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")

GUARDS = {"max_rate_per_layer": 0.93, "min_nonzero_per_layer": 9}
AGAINST_ONE_PROCESS = [
    partial(fsdp.equals_one_process, guards={}),
    partial(fsdp.equals_one_process, guards=GUARDS),
    partial(fsdp.equals_one_process, guards={}, allocation=allocations.uniform),
    partial(fsdp.equals_one_process, guards=GUARDS, allocation=allocations.erk),
    partial(fsdp.equals_one_process, guards=GUARDS, allocation=allocations.normalised),
]
# By number of processes. Their start takes longer than most checks, so they run several checks each.
GROUPS = {
    1: [ddp.is_refused_by_sparsify, fsdp.is_refused_by_sparsify, *AGAINST_ONE_PROCESS],
    2: [
        partial(ddp.keeps_all_ranks_equal, static_graph=False, compiled=False),
        partial(ddp.keeps_all_ranks_equal, static_graph=True, compiled=False),
        partial(ddp.keeps_all_ranks_equal, static_graph=False, compiled=True),
        partial(ddp.keeps_all_ranks_equal, static_graph=False, compiled=False, allocation=allocations.lamp),
        ddp.prunes_the_same_units_on_all_ranks,
        ddp.may_accumulate_gradients,
        ddp.refuses_nan_on_all_ranks,
        *AGAINST_ONE_PROCESS,
        fsdp.trains_in_mixed_precision,
        fsdp.keeps_the_masks_of_a_frozen_model,
        fsdp.refuses_nan_on_all_ranks,
        fsdp.refuses_an_allocation_that_sorts,
        fsdp.refuses_a_pattern,
        fsdp.refuses_weights_on_two_meshes,
        fsdp.may_shard_a_part_of_the_model,
        fsdp.may_be_moved_after_sharding,
        fsdp.saves_a_checkpoint,
    ],
    3: [*AGAINST_ONE_PROCESS, fsdp.resumes_in_another_number_of_processes],  # of the checkpoint of two processes
    4: [fsdp.counts_a_replicated_weight_once],
}


if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):  # FSDP2 of torch 2.6 does not run on a CPU
    GROUPS = {
        world: [check for check in checks if name_of(check).startswith("ddp.")] for world, checks in GROUPS.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """Run all checks. Return the folder in which they have left their marks, and the first error of each group."""
    folder = tmp_path_factory.mktemp("processes")
    return folder, {world: run(checks, world, folder) for world, checks in GROUPS.items()}


@pytest.mark.parametrize(
    ("world", "check"),
    [
        pytest.param(world, check, id=f"{name_of(check)}-{world}")
        for world, checks in GROUPS.items()
        for check in checks
    ],
)
def test_in_several_processes(finished, world, check):
    folder, errors = finished
    assert passed(check, world, folder), errors[world]


def test_the_other_ranks_raise_an_error_if_one_rank_ends(tmp_path):
    error = run([fsdp.one_rank_ends], 2, tmp_path)
    assert not error
    assert (tmp_path / "raised").exists()
