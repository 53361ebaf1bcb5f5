"""Runs with each option of training, stopped in an epoch and resumed, end with the bits of a run in one piece."""

from pathlib import Path

import pytest
import torch

from training import data, models
from training.data import generated
from training.engine.loop import Trainer
from training.settings import config
from training.settings.errors import Interrupted

OPTIONS = "--epochs 4 --limit 60 --batch-size 25 --steps 2 --validation-steps 1 --model digits_cnn_bn --threads 1"


def trainer(out: Path, options: str) -> Trainer:
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    settings = config.parse([*OPTIONS.split(), "--device", "cpu", *options.split()])
    loaded = data.load(settings.data_settings)
    torch.manual_seed(settings.seed)
    return Trainer(settings, loaded, models.build(settings.model, loaded.input_shape, 10), None, out)


def stopped_at(run: Trainer, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and fail at the update number ``count`` of this process."""
    updates = iter(range(count))

    def update() -> None:
        if next(updates, None) is None:
            raise Interrupted
        Trainer._update(run)

    monkeypatch.setattr(run, "_update", update)
    with pytest.raises(Interrupted):
        run.fit()


@pytest.mark.parametrize(
    "options",
    [
        "--objective pgd_at --attack fgsm_rs",
        "--objective trades --attack n_fgsm --label-smoothing 0.1",
        "--objective pgd_at --free-replays 3",
        "--objective standard --cutmix 0.5 --shift 1 --flip",
        "--objective trades --cutmix 1 --label-smoothing 0.1 --accumulate 2",
        "--objective trades --divergence se --awp 0.01 --awp-warmup 1 --attack-mode frozen",
        "--objective pgd_at --optimizer sgd --fused --lr 0.05 --schedule-by epoch --cycle-momentum --weight-decay 0.01 "
        "--no-weight-decay-norms --averaging 0.9 --averaging-warmup 0.3 --averaging-ramp --averaging-buffers copy "
        "--batchnorm-momentum 0.05 --batchnorm-first",
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "whole", options)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    whole.fit()

    stopped_at(trainer(tmp_path / "parts", options), 20 if "free" in options else 7, monkeypatch)  # in the third epoch
    resumed = trainer(tmp_path / "parts", options)
    resumed.resume()
    assert resumed.epoch == 2
    resumed.fit()
    for network, expected in ((resumed.model, whole.model), (resumed.network, whole.network)):
        for name, value in expected.state_dict().items():
            assert torch.equal(value, network.state_dict()[name]), name
    assert not all(torch.equal(value, start[name]) for name, value in whole.model.state_dict().items())


def test_an_epoch_of_free_training_has_that_many_updates(tmp_path: Path) -> None:
    run = trainer(tmp_path, "--objective pgd_at --free-replays 3 --epochs 2 --schedule multistep --milestones 1")
    run.fit()
    assert int(run.model.state_dict()["1.num_batches_tracked"]) == 2 * 3 * 3
    assert run.schedule.get_last_lr() == pytest.approx([run.settings.lr * 0.1])
    assert run.free is not None
    assert run.free.perturbation is not None
    assert run.free.perturbation.shape == (25, 1, 8, 8)


def test_cutmix_mixes_smoothed_labels_and_generated_images(tmp_path: Path) -> None:
    generated.save(tmp_path / "more.npz", torch.zeros(20, 8, 8, 1, dtype=torch.uint8), torch.arange(20) % 10)
    options = f"--cutmix 1 --label-smoothing 0.2 --generated {tmp_path / 'more.npz'} --original-share 0.6"
    run = trainer(tmp_path / "run", f"--objective trades {options}")
    x, targets = run.batches.batch(next(run.batches.epoch()), 0)
    assert (x.shape, targets.shape) == ((25, 1, 8, 8), (25, 10))
    torch.testing.assert_close(targets.sum(1), torch.ones(25))
    assert targets.min() >= 0.2 / 10 - 1e-6, "smoothed, then mixed"
    plain = trainer(tmp_path / "plain", "--objective trades")
    assert plain.batches.batch(next(plain.batches.epoch()), 0)[1].dtype == torch.int64
