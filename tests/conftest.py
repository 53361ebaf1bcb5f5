"""Random inputs: the same in every test run, so that its verdict is about the change; in a soak, new ones.

``make soak`` runs the tests that draw inputs, those of ``tests/soak`` with thousands of examples. One that is
interrupted goes on with the tests that had not passed yet; one that passes starts anew next time.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from hypothesis import settings

# A library in the place of the kernels, in any test: see ops/sanitized/build.py.
if KERNELS := os.environ.get("SCOREMATCH_KERNELS"):
    import torch

    import scorematch  # noqa: F401 (its kernels are loaded before those that replace them)

    torch.ops.load_library(KERNELS)

# Files that take longest, first: then no process is left with one of them while the others have nothing to do.
LONGEST = [
    f"tests/{file}.py"
    for file in (
        "ops/test_emulated_device",
        "ops/test_sanitizers",
        "training/test_distributed",
        "ops/test_build",
        "training/test_elsewhere",
        "training/test_experiments",
        "training/test_resume",
        "training/test_evaluate",
        "library/test_accuracy_curve",
        "training/test_scores",
        "training/test_run",
        "training/test_own_data",
        "library/test_autoattack",
        "test_docs",
        "test_devices",
        "training/test_generate",
        "test_examples",
        "training/test_posteriors",
        "training/test_compare",
        "library/test_autoattack_models",
        "library/test_autoattack_box",
        "training/test_plan",
        "training/test_loop",
        "training/test_command_line",
    )
]

ROOT = Path(__file__).resolve().parents[1]
SOAKING = "SCOREMATCH_SOAK" in os.environ
DONE = Path(os.environ.get("SCOREMATCH_SOAK_DONE", "build/soak-done.txt"))  # tests that have passed, a line each

settings.register_profile("scorematch", derandomize=not SOAKING, database=None, deadline=None, print_blob=True)
settings.load_profile("scorematch")


@pytest.fixture
def untouched_process() -> Iterator[None]:
    """For tests of programs, which set signal handlers, threads and determinism for their whole process."""
    import torch

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    threads = torch.get_num_threads()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Fresh processes that need not import torch again, nor what a run imports when it comes to need it."""
    context = multiprocessing.get_context("forkserver")
    later = ["torch._dynamo", "torch.utils.tensorboard", "typeguard"]
    later += [f"sklearn.{name}" for name in ("datasets", "metrics", "model_selection")]
    context.set_forkserver_preload(["training.run", "training.score", "killing", *later])
    return context


@pytest.hookimpl(trylast=True)  # after hypothesis has marked the tests that draw
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not SOAKING:
        place = {ROOT / file: number for number, file in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))
        return
    done = set(DONE.read_text().splitlines()) if DONE.exists() else set()
    draws = [item for item in items if any(map(item.get_closest_marker, ("hypothesis", "soak")))]
    left = [item for item in draws if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if SOAKING and report.when == "call" and report.passed:
        DONE.parent.mkdir(parents=True, exist_ok=True)
        with DONE.open("a") as file:
            file.write(f"{report.nodeid}\n")


def pytest_sessionfinish(exitstatus: int) -> None:
    if SOAKING and exitstatus == pytest.ExitCode.OK:
        DONE.unlink(missing_ok=True)
