"""Help in two lengths: ``-h`` prints the options that matter first, ``--help`` those and then all others, in groups."""

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

LEAST_WIDTH, WIDTH = 20, 110  # columns
BOLD, PLAIN = "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Layout:
    """How the options of a program are arranged, named as the fields of its settings are.

    ``first`` are the most important ones. ``groups`` maps the title of a group to its first field; the fields after it
    belong to the group, up to the first field of the next one.
    """

    first: tuple[str, ...]
    groups: dict[str, str]


@dataclass(frozen=True)
class Option:
    signature: str  # --eps FLOAT
    text: str

    @property
    def name(self) -> str:
        return self.signature.split()[0].rstrip(",")

    def lines(self, width: int, bold: bool) -> list[str]:
        signature = textwrap.wrap(self.signature, width - 2, subsequent_indent="    ", break_on_hyphens=False)
        if bold:
            signature[0] = signature[0].replace(self.name, f"{BOLD}{self.name}{PLAIN}", 1)
        text = textwrap.wrap(self.text, width - 8, break_on_hyphens=False)
        return [f"  {line}" for line in signature] + [f"        {line}" for line in text]


def wanted(arguments: Iterable[str]) -> str | None:
    """``-h`` or ``--help`` where it is among ``arguments``; the long one wins."""
    given = [argument for argument in arguments if argument in ("-h", "--help")]
    return max(given, key=len, default=None)


def option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def page(boxes: str, layout: Layout, *, program: str, description: str, short: bool) -> str:
    """The help of ``program``, from tyro's own (``boxes``), so wide that no signature is broken."""
    options = {entry.name: entry for entry in _options(boxes)}
    first = [options.pop(option(field)) for field in layout.first]
    sections = {"The options that matter first": first}
    starts = {option(field): title for title, field in layout.groups.items()}
    title = "Others"
    if not short:
        # A group keeps its title where its first option has moved to the top.
        for name in [entry.name for entry in _options(boxes)]:
            title = starts.get(name, title)
            if name in options:
                sections.setdefault(title, []).append(options[name])
    width = max(LEAST_WIDTH, min(WIDTH, shutil.get_terminal_size().columns))
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    lines = [f"usage: {program} [OPTIONS]", "", *textwrap.wrap(description, width)]
    for title, entries in sections.items():
        lines += ["", f"{BOLD}{title}{PLAIN}" if bold else title]
        lines += [line for entry in entries for line in entry.lines(width, bold)]
    if short:
        lines += ["", f"{program} --help explains all {len(options) + len(first)} options."]
    return "\n".join(lines)


def _options(boxes: str) -> list[Option]:
    """The options in tyro's help, without ``--help`` itself."""
    found: list[Option] = []
    for line in boxes.splitlines():
        body = line.rstrip("│ ")
        if start := re.match(r"[│ ] (--?[a-z].*?)(?:\s{2,}(.*))?$", body):  # deeper lines explain the option above
            found.append(Option(start.group(1).replace("{None}|", ""), start.group(2) or ""))
        elif found and re.match(r"[│ ]  +\S", body):
            last = found.pop()
            found.append(Option(last.signature, f"{last.text} {body.strip('│ ')}".strip()))
    return [entry for entry in found if entry.name != "-h"]
