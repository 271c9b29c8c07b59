"""The sizes of all measurements: the real ones, and those of a rehearsal on one core of a CPU."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cifar100_run import Run

__all__ = ["REAL", "REHEARSAL", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the measurements.

    Attributes:
        pace: factor of all expected times.
        tests: the test files of part a, each with its further arguments and the seconds it is expected to take.
        weights: number of weights of the threshold and the operator.
        rounds: number of rounds of each timing.
        step_network: the network of the whole steps, a name of `training_step.NETWORKS`.
        step_shape: the shape of its batch.
        step_count: number of steps in which synchronisations are counted.
        backend: the backend of `torch.compile`.
        networks: the networks of part c, each with its width.
        image: height and width of the images of part c.
        images: number of its training images.
        warm_up: number of steps before the timing starts.
        steps: number of timed steps.
        together: largest number of networks that train together.
        dataset: the data set of parts d and e.
        rehearsed: the runs of part d and of part e in a rehearsal; None for the real ones.
    """

    pace: float
    tests: tuple[tuple[str, tuple[str, ...], float], ...]
    weights: int
    rounds: int
    step_network: str
    step_shape: tuple[int, ...]
    step_count: int
    backend: str
    networks: tuple[tuple[str, float], ...]
    image: int
    images: int
    warm_up: int
    steps: int
    together: int
    dataset: str
    rehearsed: tuple[tuple[Run, ...], tuple[Run, ...]] | None = None


REAL = Sizes(
    pace=1.0,
    tests=(
        ("tests/test_gpu.py", (), 35.0),  # half a minute on an H200, most of it to compile kernels
        ("tests/benchmarks/test_together.py", ("-k", "cuda_graph"), 52.0),  # parts c and d train so; one compilation
        ("tests/benchmarks/test_augmentation.py", ("-k", "on_a_gpu or graph"), 9.0),  # nine kernels
        ("tests/inference/test_semi_structured.py", (), 17.0),  # 5 s on a CPU, and 13 short tests of cuSPARSELt
    ),
    weights=25_000_000,
    rounds=15,
    step_network="resnet50",
    step_shape=(128, 3, 224, 224),
    step_count=10,
    backend="inductor",
    networks=(("mobilenet_v1", 0), ("resnet20", 0)),
    image=32,
    images=50_000,
    warm_up=10,
    steps=60,
    together=8,
    dataset="cifar100",
)


def _run(network: str, width: float, method: str, rate: float) -> Run:
    return Run(network, width, method, rate, 0, 2, None)


REHEARSAL = Sizes(
    pace=0.1,
    tests=(  # two kernels in triton's interpreter
        ("tests/benchmarks/test_augmentation.py", ("-k", "on_a_gpu or interpreter"), 60.0),
        ("tests/ops/test_triton.py", ("-k", "check_shrink"), 60.0),
    ),
    weights=100_000,
    rounds=2,
    step_network="resnet20",
    step_shape=(2, 3, 8, 8),
    step_count=2,
    backend="eager",
    networks=(("resnet20", 2),),
    image=8,
    images=256,
    warm_up=1,
    steps=1,
    together=2,
    dataset="digits",
    rehearsed=(
        (_run("resnet20", 2, "feather", 0.9), _run("resnet20", 2, "soft", 0.9), _run("resnet20", 2, "dense", 0.0)),
        (_run("mobilenet_v1", 0.25, "feather", 0.9),),
    ),
)
