"""Dataclasses as command lines, by tyro, with every error as one line."""

import contextlib
import difflib
import io
import os
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from training.settings import help_page
from training.settings.errors import InputError
from training.settings.help_page import Layout

Settings = TypeVar("Settings")


def parse(
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    default: Settings | None = None,
    layout: Layout | None = None,
) -> Settings:
    """The settings that ``arguments`` describe, over ``default``; ``--help`` prints the options and exits 0.

    With a ``layout`` that help is arranged in groups, and ``-h`` prints the most important options alone.

    Raises:
        InputError: an option is unknown, or a value is not what it must be.
    """
    asked = help_page.wanted(arguments)
    if layout is not None and asked is not None:
        boxes = _help(settings, default)
        print(help_page.page(boxes, layout, program=program, description=description, short=asked == "-h"))
        raise SystemExit(0)
    parsed, unknown = parse_known(settings, arguments, program=program, description=description, default=default)
    if unknown:
        raise InputError(_unknown_option(unknown[0], program, settings))
    return parsed


def parse_known(
    settings: type[Settings],
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    default: Settings | None = None,
) -> tuple[Settings, list[str]]:
    """As :func:`parse`, with the arguments that are not among these settings, in order."""
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            parsed, unknown = tyro.cli(
                settings,
                prog=program,
                description=description,
                args=list(arguments),
                default=tyro.MISSING_NONPROP if default is None else default,
                return_unknown_args=True,
            )
    except SystemExit as end:
        if not end.code:
            raise
        message = _plain(_one_line(messages.getvalue()))
        if message.startswith("Missing"):
            # A required option that is missing may be there, misspelt.
            known = _options(settings)
            for option in (a.split("=")[0].replace("_", "-") for a in arguments if a.startswith("--")):
                if option not in known and option != "--":
                    message = _unknown_option(option, program, settings)
                    break
        raise InputError(message) from None
    return parsed, list(unknown)


def as_argument(path: Path) -> str:
    """A path as an option takes it: one that starts with a dash would be an option itself."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def command(*words: str | Path) -> str:
    """A command that can be copied into a shell."""
    return shlex.join(as_argument(word) if isinstance(word, Path) else word for word in words)


def value_of(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``, looked up before the other options are known."""
    value = None
    for position, argument in enumerate(arguments):
        option, equals, rest = argument.partition("=")
        if option.replace("_", "-") != f"--{name}":
            continue
        if equals:
            value = rest
        elif position + 1 < len(arguments):
            value = arguments[position + 1]
    return value


def names(arguments: Sequence[str]) -> list[str]:
    """The names of the options, as fields: ``--no-`` of a switch is taken off, once each, in order."""
    found = []
    for argument in arguments:
        if argument.startswith("--"):
            *groups, last = argument[2:].partition("=")[0].replace("-", "_").split(".")
            found.append(".".join([*groups, last.removeprefix("no_")]))
    return list(dict.fromkeys(found))


def _one_line(box: str) -> str:
    """The message inside tyro's box: its lines between the title and the first rule."""
    body = re.split(r"│ ─+", box.split("╮", 1)[-1])[0]
    text = re.sub(r"[╭╮╰╯│─]+", " ", body)
    return " ".join(text.split())


def _plain(message: str) -> str:
    """A message of tyro without the types that it tried; of the first fraction in it, such as 8/255, the value."""
    message = re.sub(r"no type matching .*<class '\w+'>: ", "", message)
    fraction = re.search(r"'(\d*\.?\d+)/(\d*\.?\d+)'", message)
    if fraction is None or not float(fraction[2]):
        return message
    return f"{message}; {fraction[1]}/{fraction[2]} is {float(fraction[1]) / float(fraction[2]):.4g}"


def _unknown_option(option: str, program: str, settings: Callable) -> str:
    if not option.startswith("-"):
        return f"{option!r}: no option takes it; a switch takes no value (--x or --no-x); {program} --help lists all"
    known = _options(settings)
    close = difflib.get_close_matches(option.split("=")[0], known, n=1)
    return f"{option}: unknown option{f', did you mean {close[0]}' if close else ''}; {program} --help lists all"


def _options(settings: Callable) -> list[str]:
    return sorted(set(re.findall(r"--[a-z0-9.-]+", _help(settings))))


def _help(settings: Callable, default: Any = None) -> str:
    """tyro's own help, as wide as it can be without being set in columns side by side, from 130 on."""
    text = io.StringIO()
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "129"
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            tyro.cli(settings, args=["--help"], default=tyro.MISSING_NONPROP if default is None else default)
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return text.getvalue()
