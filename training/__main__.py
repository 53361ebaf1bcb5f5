"""One command for all programs: ``scorematch run`` is ``python -m training.run``, or ``python -m training run``."""

import difflib
import importlib
import sys

from training.settings.errors import InputError, run_program

PROGRAMS = {
    "demo": "watch PGD-AT and direct SCORE learn a toy: a first look, in a minute",
    "run": "train one classifier and measure its robustness",
    "compare": "direct SCORE beside its surrogates, over seeds, with a report",
    "evaluate": "accuracy of a classifier: clean, under PGD or AutoAttack, certified",
    "score": "fit a posterior, a score network or another; sample from it, audit it",
    "generate": "make training images with a score network",
    "plan": "count what a run costs before it starts",
    "figures": "the paper's figures and tables, with a verdict on each claim",
    "experiments": "direct SCORE where the truth is known",
    "completion": "print the script that completes these commands in a shell",
}
USAGE = "\n".join(
    [
        "usage: scorematch PROGRAM [OPTIONS]",
        "",
        *(f"  {name:12} {purpose}" for name, purpose in PROGRAMS.items()),
        "",
        "scorematch PROGRAM -h shows the most important options of a program, --help all of them.",
        "python -m training.PROGRAM is the same.",
    ]
)


def main() -> None:
    """Run the program that the first argument names, with the others as its arguments."""
    name, *arguments = sys.argv[1:] or ["--help"]

    def program(arguments: list[str]) -> None:
        if name in ("-h", "--help"):
            print(USAGE)
            return
        if name not in PROGRAMS:
            close = difflib.get_close_matches(name, PROGRAMS, n=1)
            guess = f"did you mean {close[0]}" if close else f"allowed: {', '.join(PROGRAMS)}"
            raise InputError(f"{name!r} is not a program, {guess}; scorematch --help lists them")
        module = importlib.import_module(f"training.{name}")  # here, where an interruption is a line
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"training.{name}.__main__")
        module.main(arguments)

    sys.exit(run_program(program, arguments))


if __name__ == "__main__":
    main()
