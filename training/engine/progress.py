"""Progress bars of long work."""

import sys
from typing import Any

from tqdm import tqdm

from training.engine import distributed


def progress_bar(**options: Any) -> tqdm:
    """A bar of the first process, drawn often on a terminal, twice a minute where a log keeps every line."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 30.0, disable=distributed.rank() > 0, **options)
