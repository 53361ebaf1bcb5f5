"""Under torchrun, several runs one after the other in the same processes: in_turn.py FILE, a JSON list of options."""

import json
import os
import sys
from pathlib import Path

from training import run
from training.settings.errors import run_program

if __name__ == "__main__":
    failed = []
    for number, options in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        # The processes meet under this number, and those of the run before have left their addresses under its own.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        if run_program(run.main, options):
            failed.append(number)
    sys.exit(f"failed: {failed}" if failed else 0)
