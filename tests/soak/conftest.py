"""Random inputs by the thousand: a few examples of each kind in every test run, all of them under ``make soak``.

A soak that is interrupted goes on with the tests that had not passed yet; one that passes starts anew next time.
"""

import os
from pathlib import Path

import pytest

from .drawing import SOAKING

DONE = Path(os.environ.get("SCOREMATCH_SOAK_DONE", "build/soak-done.txt"))  # tests that have passed, a line each


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (SOAKING and DONE.exists()):
        return
    done = set(DONE.read_text().splitlines())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if SOAKING and report.when == "call" and report.passed:
        DONE.parent.mkdir(parents=True, exist_ok=True)
        with DONE.open("a") as file:
            file.write(f"{report.nodeid}\n")


def pytest_sessionfinish(exitstatus: int) -> None:
    if SOAKING and exitstatus == pytest.ExitCode.OK:
        DONE.unlink(missing_ok=True)
