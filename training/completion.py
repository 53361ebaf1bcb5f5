"""Completion of ``scorematch`` in a shell: ``scorematch completion bash`` prints the script, made by tyro."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from training.compare import CompareSettings
from training.demo import DemoSettings
from training.evaluate import EvaluateSettings
from training.experiments.__main__ import ExperimentSettings
from training.figures.__main__ import FigureSettings
from training.generate import GenerateSettings
from training.plan import PlanSettings
from training.score import ScoreSettings
from training.settings import command_line
from training.settings.config import RunSettings
from training.settings.errors import run_program


@dataclass(frozen=True)
class CompletionSettings:
    """For which shell."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]


SETTINGS: dict[str, Any] = {
    "demo": DemoSettings,
    "run": RunSettings,
    "compare": CompareSettings,
    "evaluate": EvaluateSettings,
    "score": ScoreSettings,
    "generate": GenerateSettings,
    "plan": PlanSettings,
    "figures": FigureSettings,
    "experiments": ExperimentSettings,
    "completion": CompletionSettings,
}


def main(arguments: list[str]) -> None:
    settings = command_line.parse(
        CompletionSettings,
        arguments,
        program="scorematch completion",
        description="Print the script that completes scorematch's programs and options in a shell: "
        'eval "$(scorematch completion bash)" in ~/.bashrc.',
    )
    print(script(settings.shell), end="")


def script(shell: str) -> str:
    """The script for one shell."""
    programs = [Annotated[settings, tyro.conf.subcommand(name)] for name, settings in SETTINGS.items()]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(Union[tuple(programs)], prog="scorematch", args=["--tyro-print-completion", shell])  # type: ignore[call-overload]  # noqa: UP007
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(run_program(main))
