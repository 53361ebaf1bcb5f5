from pathlib import Path

import pytest
import tomli_w

from training.settings import config
from training.settings.errors import InputError

STANDARD = ["--objective", "standard"]


def recipe(path: Path, **values: object) -> str:
    file = path / "recipe.toml"
    file.write_text(tomli_w.dumps(values))
    return str(file)


def test_command_line_goes_before_recipe_before_the_data_sets_recipe_before_defaults(tmp_path: Path) -> None:
    given = recipe(tmp_path, data="toy", lr=0.5, epochs=7)
    settings = config.parse([*STANDARD, "--recipe", given, "--epochs", "9"])
    assert settings.epochs == 9  # command line
    assert settings.lr == 0.5  # recipe
    assert settings.model == "toy_mlp"  # recipes/toy.toml
    assert settings.eval_steps == 40  # default


def test_every_recipe_that_comes_with_the_package_is_valid() -> None:
    for path in config.RECIPES.glob("*.toml"):
        config.parse([*STANDARD, "--recipe", path.stem, "--originals-only"])


def test_unknown_key_of_a_recipe_names_it_and_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown key 'epoch', allowed: objective, .*epochs"):
        config.parse([*STANDARD, "--recipe", recipe(tmp_path, epoch=3)])


def test_unknown_key_of_the_posterior_in_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="posterior_settings: unknown key 'sigmas'"):
        config.parse([*STANDARD, "--recipe", recipe(tmp_path, posterior_settings={"sigmas": 1.0})])


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [("epochs", 2.5, "int"), ("norm", "l3", "linf, l2"), ("deterministic", "yes", "bool"), ("milestones", 3, "tuple")],
)
def test_wrong_type_in_a_recipe(tmp_path: Path, key: str, value: object, allowed: str) -> None:
    with pytest.raises(InputError, match=f"{key}: {value!r}.*{allowed}"):
        config.parse([*STANDARD, "--recipe", recipe(tmp_path, **{key: value})])


def test_an_integer_is_a_fine_float(tmp_path: Path) -> None:
    assert config.parse([*STANDARD, "--recipe", recipe(tmp_path, eps=1)]).eps == 1.0


@pytest.mark.parametrize(
    "option",
    [
        "divergence=chi2",
        "limit=-1",
        "shift=9",
        "eps=0",
        "eps=inf",
        "eps=nan",
        "step_size=0",
        "steps=0",
        "beta=-1",
        "clip=1",
        "sigma=0",
        "gamma=1",
        "gamma=inf",
        "alignment=0",
        "final_sigma=0",
        "epochs=0",
        "batch_size=0",
        "lr=0",
        "momentum=1",
        "weight_decay=-1",
        "warmup=0",
        "milestones=0",
        "lr_decay=0",
        "averaging=1",
        "validate_every=0",
        "validation_steps=0",
        "eval_steps=0",
        "eval_restarts=0",
        "eval_losses=hinge",
        "curve_points=3",
        "autoattack_samples=-1",
        "seed=-1",
        "threads=-1",
        "device=abacus",
        "schedule=multistep",  # without milestones
        "posterior=oracle",  # on the digits
    ],
)
def test_value_out_of_range_is_named_with_what_is_allowed(option: str) -> None:
    name, value = option.split("=")
    with pytest.raises(InputError) as caught:
        config.parse([*STANDARD, f"--{name.replace('_', '-')}", value])
    message = str(caught.value)
    assert message.startswith(f"{name}: " if name != "schedule" else "milestones: ")
    assert "allowed" in message or "needs" in message


def test_saved_settings_are_a_recipe_for_the_same_run(tmp_path: Path) -> None:
    arguments = [*STANDARD, "--data", "toy", "--eps", "0.7", "--eval-losses", "ce", "--step-size", "0.1"]
    settings = config.parse(arguments)
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config.as_table(settings)))
    again = config.parse(["--recipe", str(path)])
    assert config.as_table(again) == config.as_table(settings)


def test_settings_from_before_autoattack_are_without_it(tmp_path: Path) -> None:
    for data in ("digits", "toy"):
        table = config.as_table(config.parse([*STANDARD, "--data", data]))
        assert table.pop("autoattack") == ("standard" if data == "digits" else "none")
        assert config.from_table(table, "config.toml").autoattack == "none"


def test_a_run_from_before_named_a_posterior_that_it_did_not_ask(tmp_path: Path) -> None:
    """Resumed, or taken as a recipe, it stays TRADES itself."""
    table = config.as_table(config.parse(["--objective", "trades"]))
    before = {**table, "posterior": "score_network"}
    for name in ("soft_targets", "target_mix", "data_gradient"):
        del before[name]
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(before))
    for settings in (config.from_table(before, "config.toml"), config.parse(["--recipe", str(path)])):
        assert settings.posterior is None
        assert config.as_table(settings) == table
    direct = config.as_table(config.parse(["--objective", "score_direct"]))
    del direct["soft_targets"]
    assert config.from_table(direct, "config.toml").posterior == "score_network"


@pytest.mark.parametrize(
    ("options", "posterior", "transported"),
    [
        ("trades", None, 0.0),
        ("score_direct", "score_network", 0.0),
        ("trades --posterior kernel_density", "kernel_density", 1.0),
        ("trades --posterior kernel_density --transport 0.5", "kernel_density", 0.5),
        ("trades --posterior kernel_density --soft-targets", "kernel_density", 0.0),
        ("trades --posterior kernel_density --soft-targets --transport 2", "kernel_density", 2.0),
        ("pgd_at --posterior score_network --soft-targets", "score_network", 0.0),
    ],
)
def test_what_asks_a_posterior(options: str, posterior: str | None, transported: float) -> None:
    settings = config.parse(["--objective", *options.split()])
    assert (settings.posterior, settings.transported) == (posterior, transported)
    again = config.from_table(config.as_table(settings), "config.toml")
    assert (again.posterior, again.transported) == (posterior, transported)


def test_posterior_name_reaches_its_settings() -> None:
    settings = config.parse(["--objective", "score_direct", "--posterior", "kernel_density"])
    assert settings.posterior_settings.name == "kernel_density"
