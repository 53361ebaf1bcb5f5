"""Runs the cells of an experiment side by side and keeps what is done.

A cell is one problem and seed; it stores its results in a file of its own, entry by entry, so that an interrupted
experiment goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from training.engine import checkpoint
from training.engine.side_by_side import processes

Cell = TypeVar("Cell")


class Notebook:
    """The results of one cell: a JSON file that is rewritten whole after each entry."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**about, "entries": {}}
        if path.exists():
            self.content = json.loads(path.read_text())

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The entry of this name, computed and stored where there is none yet; ``seconds`` is what it took."""
        entries: dict[str, dict[str, Any]] = self.content["entries"]
        if name not in entries:
            begin = time.perf_counter()
            entries[name] = {**compute(), "seconds": round(time.perf_counter() - begin, 2)}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(self.path, self.content)
        return entries[name]


def run_cells(run: Callable[[Cell], None], cells: Sequence[Cell], jobs: int) -> None:
    """Call ``run`` on each cell, in ``jobs`` processes of one CPU thread each.

    Raises:
        Interrupted: a signal came; every entry that was finished is kept.
    """
    with processes(jobs) as pool:
        futures = [pool.submit(run, cell) for cell in cells]
        for future in tqdm(as_completed(futures), total=len(futures), desc="cells", unit="cell"):
            future.result()
