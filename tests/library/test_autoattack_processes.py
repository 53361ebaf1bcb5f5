"""Seeds of AutoAttack under torch.distributed, where each process has a state file of its own."""

from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from library_autoattack import alone, data
from torch.multiprocessing import start_processes

from scorematch.attacks import EvaluationState


def _resume_with_files_that_differ(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(minutes=1)
    )
    model, x, y = data()
    mine = Path(folder) / f"state.pt.rank{rank}of2"

    def outcome() -> tuple[int, float] | str:
        adversary = alone(model, "apgd-ce", seed=None, share_samples=True)
        try:
            adversary.run_standard_evaluation(x, y, state_path=Path(folder) / "state.pt")
        except ValueError as error:
            return str(error)
        return adversary.report["seed"], adversary.report["robust_accuracy"]

    outcomes = {"both new": outcome()}
    for without in (0, 1):
        if rank == without:
            mine.unlink()
        outcomes[f"rank {without} new"] = outcome()
    if rank == 1:
        state = EvaluationState.load(mine, {}, x)
        state.settings["seed"] = 5
        state.save(mine)
    outcomes["two seeds"] = outcome()
    torch.save(outcomes, f"{folder}/result{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_process_without_a_file_takes_the_seed_of_the_others(processes: ForkServerContext, tmp_path: Path) -> None:
    start_processes(_resume_with_files_that_differ, (str(tmp_path),), nprocs=2, start_method="forkserver")
    outcomes = [torch.load(tmp_path / f"result{rank}.pt") for rank in range(2)]
    assert outcomes[0] == outcomes[1]
    assert outcomes[0]["rank 0 new"] == outcomes[0]["rank 1 new"] == outcomes[0]["both new"]
    seed = outcomes[0]["both new"][0]
    told = f"state_path: the files of the processes have different seeds: {seed} (rank 0), 5 (rank 1)"
    assert outcomes[0]["two seeds"] == told
