"""The recipes of the paper's tables: what they resolve to, and the commands that docs/recipes.md prints."""

import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from training import models
from training.data.batches import originals_of_batch, steps_of_epoch
from training.engine.optimisation import averaging_decay, build_optimizer, build_schedule
from training.figures import tables
from training.settings import config
from training.settings.config import RunSettings

BASIC = ("table1", "table2", "basic-l2")
GENERATED = ("table3", "table3-cifar100", "table4-l2", "wang2023", "wang2023-cifar100")
TABLES = (*BASIC, *GENERATED)
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "recipes.md"
STEPS = 3  # an epoch here


def recipe(name: str, *options: str) -> RunSettings:
    objective = ("--objective", "pgd_at") if name in ("table2", "basic-l2") else ()
    files = () if name in BASIC else ("--generated", "1m.npz")
    return config.parse(["--recipe", name, *objective, *files, "--device", "cpu", "--dry-run", *options])


def rates(settings: RunSettings) -> list[tuple[float, float]]:
    """Rate and momentum of each epoch, constant in it."""
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(settings, model)
    schedule = build_schedule(settings, optimizer, STEPS)
    seen = []
    for _ in range(settings.epochs):
        within = set()
        for _ in range(STEPS):
            group = optimizer.param_groups[0]
            within.add((group["lr"], group["momentum"]))
            optimizer.step()
            schedule.step()
        assert len(within) == 1
        seen.append(within.pop())
    return seen


def commands(section: str) -> list[list[str]]:
    """What the bash blocks of a section of the page would run."""
    text = PAGE.read_text().split(f"\n## {section}")[1].split("\n## ")[0]
    blocks = [part.split("```")[0] for part in text.split("```bash\n")[1:]]
    script = "\n".join(['python() { echo "$@"; }', *blocks])
    lines = subprocess.run(["bash", "-eu", "-c", script], check=True, capture_output=True, text=True).stdout
    return [shlex.split(line) for line in lines.splitlines()]


@pytest.mark.parametrize("name", TABLES)
def test_models_build(name: str) -> None:
    settings = recipe(name)
    with torch.device("meta"):
        model = models.build(settings.model, (3, 32, 32), 100 if settings.data == "cifar100" else 10)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert parameters == pytest.approx(11.17 if name in BASIC else 36.5, abs=0.1)
    assert len(build_optimizer(settings, model).param_groups) == (1 if name in BASIC else 2)


@pytest.mark.parametrize("name", BASIC)
def test_basic_setting(name: str) -> None:
    settings = recipe(name, "--lr", "0.05")
    found = rates(settings)
    assert [rate for rate, _ in found] == pytest.approx([0.05] * 100 + [0.005] * 5 + [0.0005] * 5)
    assert {momentum for _, momentum in found} == {0.9}
    assert (settings.batch_size, settings.steps, settings.weight_decay) == (128, 10, 5e-4)
    assert settings.norm == ("l2" if name == "basic-l2" else "linf")
    assert settings.eps == pytest.approx((128 if name == "basic-l2" else 8) / 255)
    assert settings.step_size == pytest.approx((16 if name == "basic-l2" else 2) / 255)
    assert not settings.nesterov
    assert settings.averaging == 0.0


@pytest.mark.parametrize("name", GENERATED)
def test_generated_data_setting(name: str) -> None:
    settings = recipe(name)
    found = rates(settings)
    assert len(found) == 400
    assert found[0] == pytest.approx((0.2 / 25, 0.95))
    assert found[9] == pytest.approx((0.2, 0.85))  # 2.5 % of 400 epochs
    assert found[-1] == pytest.approx((0.2 / 25e4, 0.95))
    assert originals_of_batch(settings) == (205 if name == "table3-cifar100" else 154)
    total = 400 * 98
    decays = [averaging_decay(settings, step, total) for step in (1, 979, 980, 989, total)]
    assert decays == pytest.approx([0.0, 0.0, 0.1, 10 / 19, 0.995])
    edm = name.startswith("wang2023")
    assert (settings.objective, settings.divergence, settings.clip) == ("trades", "kl" if edm else "se", 0.0)
    assert (settings.attack_mode, settings.label_smoothing) == ("frozen", 0.1 if edm else 0.0)
    assert (settings.beta, settings.label_smoothing_over) == (5.0 if edm else 4.0, "all")
    assert (settings.batch_size, settings.weight_decay, settings.nesterov) == (512, 5e-4, True)


def test_l2_setting() -> None:
    settings = recipe("table4-l2")
    assert (settings.norm, settings.attack_start) == ("l2", "gaussian")
    assert settings.eps == pytest.approx(128 / 255)
    assert settings.step_size == pytest.approx(settings.eps / 5)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("Table 1", {"table1": 8 * 3}),
        ("Table 2", {"table2": 6 * 5}),
        ("Table 3", {"table3": 5, "table3-cifar100": 2}),
        ("Table 4", {"table3": 4 + 1, "table3-cifar100": 4, "table4-l2": 2}),  # and the KL baseline
        ("The basic setting under L2", {"basic-l2": 4}),
        ("Images of EDM", {"wang2023": 4, "wang2023-cifar100": 2}),
        ("Cheaper", {"cifar10": 3, "table2": 1}),
    ],
)
def test_the_commands_of_the_page_are_valid_and_different(section: str, expected: dict[str, int]) -> None:
    found = commands(section)
    resolved = []
    for words in found:
        assert words[:2] == ["-m", "training.run"]
        resolved.append(config.parse([*words[2:], "--device", "cpu", "--dry-run"]))
    assert Counter(settings.recipe for settings in resolved) == expected
    for settings in resolved:
        assert bool(settings.generated) == (settings.recipe in GENERATED)
    assert len({str(config.as_table(settings)) for settings in resolved}) == len(found)


@pytest.mark.parametrize("table", [1, 2, 3, 4])
def test_runs_of_the_commands_fill_their_table(table: int) -> None:
    runs = []
    for words in commands(f"Table {table}"):
        if "kl" not in words or table != 4:  # the KL baseline is no row
            settings = config.parse([*words[2:], "--device", "cpu", "--threads", "1", "--out", "x"])
            runs.append(tables.Run(Path(str(len(runs))), config.as_table(settings), {}))
    counted: list[Path] = []
    for row in (row for row in tables.rows() if row.table == table):
        wanted = tables.settings_of(row)
        found = [run for run in runs if tables.belongs(run, row, wanted) and not tables.differences(run, row, wanted)]
        assert len(found) == (5 if table == 2 else 1), (row.title, [tables.differences(r, row, wanted) for r in runs])
        counted += [run.folder for run in found]
    assert sorted(counted) == sorted(run.folder for run in runs), "each is of one row"


def test_the_kl_baseline_is_the_published_command() -> None:
    (words,) = [words for words in commands("Table 4") if "kl" in words]
    settings = config.parse([*words[2:], "--device", "cpu", "--dry-run"])
    assert (settings.divergence, settings.beta, settings.label_smoothing) == ("kl", 5.0, 0.1)
    assert settings.label_smoothing_over == "all"


@pytest.mark.parametrize("name", GENERATED)
def test_an_epoch_has_the_published_number_of_steps(name: str) -> None:
    assert steps_of_epoch(recipe(name), 48_976) == steps_of_epoch(recipe(name), 50_000) == 98


def test_the_l2_command_of_edm_is_the_setting_of_table_4() -> None:
    (words,) = [words for words in commands("Images of EDM") if "l2" in words]
    settings, table4 = config.parse([*words[2:], "--device", "cpu", "--dry-run"]), recipe("table4-l2")
    assert (settings.norm, settings.attack_start) == (table4.norm, table4.attack_start)
    assert settings.eps == pytest.approx(table4.eps, abs=1e-5)
    assert settings.step_size == pytest.approx(table4.step_size, abs=1e-5)


def test_a_larger_batch_has_the_published_number_of_steps() -> None:
    (words,) = [words for words in commands("Images of EDM") if "2048" in words]
    settings = config.parse([*words[2:], "--device", "cpu", "--dry-run"])
    assert steps_of_epoch(settings, 48_976) == 50_000 // 2048 + 1
    assert len(settings.generated) == 4
