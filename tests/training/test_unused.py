"""Options that a run does not read are named; those that it reads are not."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from training import compare
from training.settings import config
from training.settings.posterior import PosteriorSettings
from training.settings.unused import OF_ASKING, READERS, READERS_OF_POSTERIORS, unused

TRADES, DIRECT = "--objective trades", "--objective score_direct"
POSTERIOR = "--posterior-settings"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ("--objective pgd_at --beta 3", {"beta": "with objective trades"}),
        (f"{TRADES} --gamma=2 --antithetic", dict.fromkeys(("gamma", "antithetic"), "with objective gaussian")),
        ("--objective standard --steps 5", {"steps": "with attack pgd in training"}),
        (f"{TRADES} --attack fgsm_rs --steps 5", {"steps": "with attack pgd in training"}),
        (f"{TRADES} --clip_form robust", {"clip_form": "with clip above 0"}),
        (f"{TRADES} --no-nesterov", {"nesterov": "with optimizer sgd and a momentum"}),
        (f"{TRADES} {POSTERIOR}.width 8", {"posterior_settings.width": "with a posterior"}),
        (
            f"{DIRECT} --posterior kernel_density {POSTERIOR}.width 8 {POSTERIOR}.sigma 0.2",
            {"posterior_settings.width": "with a posterior that is a network"},
        ),
        (
            f"{DIRECT} --posterior joint_energies {POSTERIOR}.anchor label {POSTERIOR}.no-temperature",
            {"posterior_settings.anchor": "with posterior score_network"},
        ),
        (f"{TRADES} --beta 2 --clip 0.1 --clip-form robust --steps 3 --optimizer sgd --momentum 0.8 --nesterov", {}),
        (f"{TRADES} --posterior kernel_density {POSTERIOR}.max-points 50", {}),
        (
            f"{TRADES} --posterior kernel_density --transport 0 {POSTERIOR}.sigma 0.3",
            dict.fromkeys(("posterior", "posterior_settings.sigma"), OF_ASKING),
        ),
        (f"{TRADES} --posterior kernel_density --transport 0 --soft-targets {POSTERIOR}.sigma 0.3", {}),
        (f"{TRADES} --posterior kernel_density --transport 0.5", {}),
        (
            "--objective pgd_at --recipe table2 --epochs 30 --device cpu",
            {"milestones 100 105": "with more epochs than 30"},
        ),
        (f"{TRADES} --schedule multistep --milestones 3 5 --epochs 5", {"milestones 5": "with more epochs than 5"}),
        ("--objective pgd_at --recipe table2 --device cpu", {}),
        (f"{TRADES} --fold --precision float32", {}),
        ("--objective pgd_at --fold --precision bfloat16", {}),  # in the search of a validation
        (
            "--objective pgd_at --fold --precision float32",
            {"fold": "with an attack in eval mode, such as that of trades, and without compile"},
        ),
        (
            f"{TRADES} --fold --compile on",
            {"fold": "with an attack in eval mode, such as that of trades, and without compile"},
        ),
        (
            "--objective pgd_at --data-root somewhere --download",  # a newcomer may think that this is CIFAR
            {
                "data_root": "with --data cifar10, cifar100, svhn, folder",
                "download": "with --data cifar10, cifar100, svhn",
            },
        ),
        ("--objective pgd_at --data cifar10 --data-root somewhere --download", {}),
        (
            f"{DIRECT} {POSTERIOR}.anchor classifier {POSTERIOR}.smoothing 0.2",
            {"posterior_settings.smoothing": "with anchor label"},
        ),
        (f"{DIRECT} {POSTERIOR}.anchor label {POSTERIOR}.smoothing 0.2 {POSTERIOR}.averaging 0.9", {}),
        (
            f"{DIRECT} {POSTERIOR}.half-life 500 {POSTERIOR}.averaging 0.9",
            {"posterior_settings.averaging": "with half_life 0"},
        ),
        ("--objective gaussian --sigma 0.1 0.2 --antithetic --schedule multistep --milestones 3 --lr-decay 0.2", {}),
    ],
)
def test_what_is_named(options: str, where: dict[str, str]) -> None:
    arguments = options.split()
    assert unused(config.parse(arguments), arguments) == where


def test_a_fit_names_what_its_data_do_not_read(call: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "posterior.pt").touch()  # ends it
    ending = call("score", "--data-root", "somewhere", "--out", "here")
    where = "with --data cifar10, cifar100, svhn, folder"
    assert ending.err.splitlines()[0] == f"note: --data-root changes nothing here, it counts {where}"


def test_every_option_in_the_list_exists() -> None:
    for settings, readers in ((config.RunSettings, READERS), (PosteriorSettings, READERS_OF_POSTERIORS)):
        fields = {field.name for field in dataclasses.fields(settings)}
        assert {name for names, *_ in readers for name in names} <= fields


@pytest.mark.parametrize(
    ("options", "extra"),
    [
        ("--objective pgd_at", "--beta 9 --gamma 3 --clip-form threshold --warmup 0.5"),
        ("--objective standard", "--steps 3 --clip 0.2 --attack n_fgsm --attack-mode train"),
        ("--objective pgd_at --attack fgsm_rs", "--steps 3"),
        (f"{DIRECT} --posterior kernel_density", f"{POSTERIOR}.width 8 {POSTERIOR}.energy-weight 3 {POSTERIOR}.lr 1"),
    ],
)
def test_what_is_named_changes_no_weight(options: str, extra: str, call: Any, tiny: list[str], tmp_path: Path) -> None:
    def trained(folder: str, *more: str) -> tuple[dict[str, torch.Tensor], list[str]]:
        out = tmp_path / folder
        ending = call(
            "run", *tiny, "--schedule", "cosine", "--selection", "last", "--out", out, *options.split(), *more
        )
        assert ending.status == 0, ending.err
        notes = [line.split()[1] for line in ending.err.splitlines() if line.startswith("note:")]
        return torch.load(out / "checkpoint.pt", weights_only=True)["network"], notes

    plain, before = trained("plain")  # "tiny" itself has --steps
    other, named = trained("extra", *extra.split())
    torch.testing.assert_close(other, plain, rtol=0, atol=0)
    assert set(before) <= {"--steps"}
    assert set(named) == {word for word in extra.split() if word.startswith("--")} | set(before)


def test_a_comparison_names_what_none_of_its_runs_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compare, "run", lambda *_: None)
    arguments = ["--objectives", "pgd_at:kl", "trades:kl", "--out", str(tmp_path / "out"), "--"]
    compare.main([*arguments, "--beta", "2", "--gamma", "3"])
    told: Any = capsys.readouterr().err.splitlines()
    assert told == ["note: --gamma changes nothing here, it counts with objective gaussian"]
