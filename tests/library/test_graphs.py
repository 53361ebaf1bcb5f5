"""Attacks as CUDA graphs: the same training; on the CPU with a recording that replays the recorded call."""

import copy
from collections.abc import Callable

import pytest
import torch
from library_models import Replayed, replays_on_the_cpu, small_cnn
from torch import Tensor, nn

from scorematch import ThreatModel, objectives
from scorematch.folding import Folding
from scorematch.graphs import AttackGraphs, key_of
from scorematch.posteriors import KernelDensity

SIZES = (8, 8, 5, 8, 8, 8, 5, 8)  # batches of two shapes: 8 is recorded at its fourth, 5 never

WITH_POSTERIOR = {"mixed": ("target_mix", 0.5), "noise": ("data_gradient", "noise"), "transported": ("transport", 0.5)}
NAMES = ["pgd_at", "trades", "score_direct", "score_direct mixed", "score_direct noise", "trades transported"]


def train(name: str, attack_graphs: AttackGraphs | None, device: str, attack_mode: str) -> tuple[list, dict]:
    """Losses, attacked points and metrics of some steps, and the weights after them."""
    model = small_cnn(batch_norm=True).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator(device).manual_seed(0)
    settings: dict = {"threat_model": ThreatModel("linf", 0.1), "steps": 3, "attack_mode": attack_mode}
    name, *options = name.split()
    settings |= dict(WITH_POSTERIOR[option] for option in options)
    if name == "score_direct" or options:
        points = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        settings["posterior"] = KernelDensity(points, torch.arange(10), num_classes=10, sigma=1.0).to(device)
    data, seen = torch.Generator().manual_seed(1), []
    for size in SIZES:
        x = torch.rand(size, 1, 8, 8, generator=data).to(device)
        y = torch.randint(10, (size,), generator=data).to(device)
        model.train()
        optimizer.zero_grad()
        outcome = objectives.OBJECTIVES[name](model, x, y, graphs=attack_graphs, generator=generator, **settings)
        outcome.loss.mean().backward()
        optimizer.step()
        seen.append((outcome.loss.detach(), outcome.x_adv, outcome.metrics))
    return seen, model.state_dict()


@pytest.mark.parametrize("attack_mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_attack_reads_nothing_but_its_inputs_and_the_model(
    name: str, attack_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels, clean logits, the path of a posterior: whatever the first call had closed over would show."""
    expected = train(name, None, "cpu", attack_mode)
    replays_on_the_cpu(monkeypatch)
    actual = train(name, AttackGraphs(), "cpu", attack_mode)
    assert Replayed.made == 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attack_mode", ["eval", "train", "frozen"])
@pytest.mark.parametrize("name", NAMES)
def test_a_graph_trains_as_without_one(name: str, attack_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # rounding decides signs of gradients
    expected = train(name, None, "cuda", attack_mode)
    actual = train(name, AttackGraphs(), "cuda", attack_mode)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_folds_by_itself() -> None:
    """Weights that change after the recording are those that a replay uses."""
    model = small_cnn(batch_norm=True).cuda().eval().requires_grad_(False)
    folding = Folding(model)

    def attack(x: Tensor) -> dict[str, Tensor]:
        with folding.applied(), torch.no_grad():
            return {"logits": model(x)}

    attack_graphs, x = AttackGraphs(warmup=1), torch.rand(4, 1, 8, 8, device="cuda")
    for _ in range(4):
        model[0].weight.mul_(1.5)
        torch.testing.assert_close(attack_graphs(attack, x)["logits"], model(x), rtol=1e-4, atol=1e-4)


def test_folding_while_a_graph_is_recorded_does_not_reuse_what_was_folded_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = small_cnn(batch_norm=True).eval()
    folding = Folding(model)
    kept: list[nn.Parameter] = []
    for recording in (0, 0, 1, 1, 2, 0):  # streams
        monkeypatch.setattr("scorematch.folding._recording", lambda tensors, recording=recording: recording)
        with folding.applied():
            kept.append(model[0].weight)
    assert kept[0] is kept[1], "unchanged weights are folded once"
    assert kept[1] is not kept[2], "a recording folds by itself"
    assert kept[2] is kept[3], "once"
    assert kept[3] is not kept[4], "the memory of one recording is filled when that one is replayed"
    assert kept[4] is not kept[5], "what was folded in a recording has no values until it is replayed"


def recorded(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, Tensor]]:
    """An attack on a model that is replayed from its second call on."""
    replays_on_the_cpu(monkeypatch)
    attack_graphs, x = AttackGraphs(warmup=1), torch.rand(4, 1, 8, 8)

    def call() -> dict[str, Tensor]:
        return attack_graphs(lambda x: {"logits": model(x).detach()}, x, modules=[model, "no module"])

    call()
    return call


@pytest.mark.parametrize("attack_mode", ["eval", "train"])
def test_what_training_does_in_place_is_allowed(attack_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_cnn(batch_norm=True).train(attack_mode == "train")
    call = recorded(model, monkeypatch)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        before = call()["logits"]
        model(torch.rand(4, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        assert not torch.equal(call()["logits"], before)
    assert Replayed.made == 1


def replaced_parameter(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replaced_by_loading(model: nn.Module) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def replaced_buffer(model: nn.Module) -> None:
    norm = next(module for module in model if isinstance(module, nn.BatchNorm2d))
    norm.running_mean = norm.running_mean.clone()


def other_momentum(model: nn.Module) -> None:
    next(module for module in model if isinstance(module, nn.BatchNorm2d)).momentum = 0.5


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (replaced_parameter, "0.weight"),
        (replaced_by_loading, "0.weight"),
        (replaced_buffer, "running_mean"),
        (other_momentum, "momentum"),
        (lambda model: model.to(torch.float64), "0.weight"),
    ],
)
def test_what_a_replay_would_not_see_is_an_error(
    change: Callable[[nn.Module], object], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_cnn(batch_norm=True)
    call = recorded(model, monkeypatch)
    call()
    change(model)
    with pytest.raises(RuntimeError, match=rf"module 0: \S*{name} .*since an attack on it was recorded"):
        call()


def test_casts_that_autocast_keeps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_cnn(batch_norm=True)
    call = recorded(model, monkeypatch)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="cache_enabled=False"):
        call()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        for _ in range(AttackGraphs().warmup + 1):
            call()
    assert Replayed.made == 1


def captured_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Recordings call the attack and nothing else; what torch is told of each is in the list that is returned."""
    told: list[dict[str, object]] = []

    class Capture:
        def __init__(self, graph: object, **options: object) -> None:
            told.append(options)

        def __enter__(self) -> None: ...

        def __exit__(self, *exception: object) -> None: ...

    class Graph:
        def replay(self) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"a stream of {device}")
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(AttackGraphs, "_check", staticmethod(lambda inputs: None))
    return told


def test_a_recording_is_made_on_the_device_of_its_inputs_and_leaves_other_threads_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which need not be the current device; other threads read generated images and write checkpoints."""
    told = captured_on_the_cpu(monkeypatch)
    attack_graphs = AttackGraphs(warmup=1)
    for _ in range(3):
        attack_graphs(lambda x: {"x": x + 1}, torch.zeros(1))
    assert told == [{"stream": "a stream of cpu", "capture_error_mode": "thread_local"}]


def test_a_recording_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    captured_on_the_cpu(monkeypatch)

    def reads(x: Tensor) -> dict[str, Tensor]:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    attack_graphs = AttackGraphs(warmup=1)
    attack_graphs(lambda x: {"x": x}, torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"cannot be recorded as a CUDA graph \(CUDA error: operation not permitted"):
        attack_graphs(reads, torch.zeros(1))


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (RuntimeError("operation not permitted"), RuntimeError, r"cannot be recorded as a CUDA graph \(operation not"),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "^CUDA out of memory$"),
        (ValueError("x has another shape"), ValueError, "^x has another shape$"),
    ],
)
def test_what_fails_in_a_recording_is_told_even_if_its_end_fails_too(
    failure: Exception, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch ends a recording in any case. A lack of memory stays one, so that programs can say what needs less."""
    captured_on_the_cpu(monkeypatch)

    def end(self: object, *exception: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda.graph, "__exit__", end)

    def fails(x: Tensor) -> dict[str, Tensor]:
        raise failure

    attack_graphs = AttackGraphs(warmup=1)
    attack_graphs(lambda x: {"x": x}, torch.zeros(1))
    with pytest.raises(kind, match=message) as raised:
        attack_graphs(fails, torch.zeros(1))
    assert type(raised.value) is kind


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="warmup must be at least 1, got 0"):
        AttackGraphs(warmup=0)
    with pytest.raises(ValueError, match="AttackGraphs records CUDA kernels, got an input on cpu"):
        AttackGraphs()(copy.copy, torch.zeros(1))


def test_what_a_recording_is_for() -> None:
    """A replay knows nothing of the modes of modules, nor of autocast."""
    model, x = small_cnn(batch_norm=True).train(), torch.rand(2, 1, 8, 8)
    keys = [key_of([x], [model, None]), key_of([x + 1], [model, None])]
    assert keys[0] == keys[1]
    with torch.autocast("cpu", torch.bfloat16):
        keys.append(key_of([x], [model, None]))
    with torch.autocast("cpu", torch.float16):
        keys.append(key_of([x], [model, None]))
    next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    keys += [key_of([x], [model, None]), key_of([x.double()], [model, None]), key_of([x[:1]], [model, None])]
    assert len(set(keys[1:])) == 6
