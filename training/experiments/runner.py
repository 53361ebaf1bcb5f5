"""Runs the cells of an experiment side by side and keeps what is done.

A cell is one problem and seed; it stores its results in a file of its own, entry by entry, so that an interrupted
experiment goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from training.engine import checkpoint
from training.engine.side_by_side import processes
from training.settings.errors import InputError


class Cell(Protocol):
    """One problem and seed."""

    @property
    def path(self) -> Path:
        """The file of its results."""

    @property
    def about(self) -> dict[str, Any]:
        """The settings on which they rest."""


AnyCell = TypeVar("AnyCell", bound=Cell)


def read_cell(path: Path) -> dict[str, Any]:
    """The content of a cell's file.

    Raises:
        InputError: it is damaged.
    """
    try:
        content: dict[str, Any] = checkpoint.read_json(path)
    except InputError as error:
        raise InputError(f"{error}; without this file its results are computed again") from None
    entries = content.get("entries")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{path}: is damaged (no entries), expected the results of an experiment")
    return content


def changes(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """In which settings two cells differ; what only one of them has is not compared, as it may be newer."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys():
            yield from changes(before[key], now[key], f"{name}.{key}" if name else key)
    elif before != now:
        yield f"{name} {before}, now {now}"


class Notebook:
    """The results of one cell: a JSON file that is rewritten whole after each entry.

    Raises:
        InputError: the file is damaged, or its results are of other settings.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "entries": {}}
        if path.exists():
            self.content = read_cell(path)
            plain = json.loads(json.dumps(about))
            if changed := sorted(changes(self.content, plain)):
                raise InputError(
                    f"out: {path} holds results of other settings ({'; '.join(changed)}), give another folder"
                )

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry of this name, computed and stored where there is none yet; ``seconds`` is what it took."""
        entries: dict[str, dict[str, Any]] = self.content["entries"]
        if name not in entries:
            begin = time.perf_counter()
            entries[name] = {**compute(), "seconds": round(time.perf_counter() - begin, 2)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(self.path, self.content)
        return entries[name]


def run_cells(run: Callable[[AnyCell], None], cells: Sequence[AnyCell], jobs: int) -> None:
    """Call ``run`` on each cell, in ``jobs`` processes of one CPU thread each.

    Raises:
        InputError: the file of a cell is damaged or of other settings. Nothing has been run then.
        Interrupted: a signal came; every entry that was finished is kept.
    """
    for cell in cells:
        Notebook(cell.path, cell.about)
    with processes(jobs) as pool:
        futures = [pool.submit(run, cell) for cell in cells]
        for future in tqdm(as_completed(futures), total=len(futures), desc="cells", unit="cell"):
            future.result()
