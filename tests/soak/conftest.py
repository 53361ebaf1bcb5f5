"""Random inputs by the thousand: a few examples of each kind in every test run, all of them under ``make soak``.

A soak that is interrupted goes on with the tests that had not passed yet; one that passes starts anew next time.
"""

import os
from pathlib import Path

import pytest

DONE = Path(os.environ.get("SCOREMATCH_SOAK_DONE", "build/soak-done.txt"))  # tests that have passed, a line each
SOAKING = "SCOREMATCH_SOAK" in os.environ


def _done() -> set[str]:
    return set(DONE.read_text().splitlines()) if SOAKING and DONE.exists() else set()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid in _done():
            item.add_marker(pytest.mark.skip(reason="passed before the interruption"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if SOAKING and report.when == "call" and report.passed:
        DONE.parent.mkdir(parents=True, exist_ok=True)
        with DONE.open("a") as file:
            file.write(f"{report.nodeid}\n")


def pytest_sessionfinish(exitstatus: int) -> None:
    if SOAKING and exitstatus == 0:
        DONE.unlink(missing_ok=True)
