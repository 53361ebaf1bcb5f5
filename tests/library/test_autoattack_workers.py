"""AutoAttack on several threads: the same verdicts, points, counts and states with any number of workers."""

import copy
import functools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from library_autoattack import COUNT, EPS, alone, attack, data
from library_models import small_cnn
from torch import Tensor, nn

from scorematch import Normalised
from scorematch.attacks import AutoAttackWarning
from scorematch.attacks.schedule import batch_size, dealt_out
from scorematch.attacks.workers import MOST, Team, automatic, can_be_shared


class Watched(nn.Module):
    """Calls ``each`` with the number of the call, from 1, before the model; counts calls of all threads."""

    def __init__(self, model: nn.Module, each: Callable[[int], None] = lambda call: None) -> None:
        super().__init__()
        self.model, self.each = model, each
        self.lock, self.calls, self.threads = threading.Lock(), 0, set()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            self.calls += 1
            call = self.calls
            self.threads.add(threading.current_thread())
        self.each(call)
        return self.model(x)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def counts(report: dict) -> dict:
    """What a report says, but for seconds."""
    attacks = {n: {k: v for k, v in a.items() if k != "seconds"} for n, a in report["attacks"].items()}
    return {**report, "attacks": attacks, "seconds": None}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_the_number_of_workers_does_not_matter(norm: str) -> None:
    model, x, y = data(batch_norm=True)
    results = []
    for workers in (1, 2, 3):
        adversary = attack(model, norm, workers=workers)
        results.append((*adversary.run_standard_evaluation(x, y, return_labels=True), counts(adversary.report)))
    points, labels, report = results[0]
    assert 0 < report["robust_accuracy"] < report["clean_accuracy"]
    for other_points, other_labels, other_report in results[1:]:
        # A matrix product rounds in its own way for each size of a batch; which ones differ depends on the processor.
        torch.testing.assert_close(other_points, points, rtol=0, atol=1e-9)
        assert torch.equal(other_labels, labels)
        assert other_report.pop("nearest") == pytest.approx(report["nearest"], abs=1e-9, nan_ok=True)
        # Rounding also decides whether Square moves to a point that is no better, and so what it does not ask again.
        asked, others_asked = (one["attacks"]["square"]["forwards"] for one in (report, other_report))
        assert others_asked == pytest.approx(asked, rel=0.05)
        other_report["attacks"]["square"]["forwards"] = asked
        assert other_report == {name: value for name, value in report.items() if name != "nearest"}


@pytest.mark.parametrize("version", ["plus", "fast"])
def test_explicit_workers_share_the_official_stream(version: str) -> None:
    model, x, y = data()
    one, two = (attack(model, version=version, rng="reference", workers=workers) for workers in (1, 2))
    assert torch.equal(two.run_standard_evaluation(x, y, bs=16), one.run_standard_evaluation(x, y, bs=16))
    assert counts(two.report) == counts(one.report)


def test_each_worker_has_its_share_of_the_threads_and_all_are_given_back() -> None:
    model, x, y = data()
    seen = set()
    main = threading.current_thread()

    def each(call: int) -> None:
        if threading.current_thread() is not main:
            seen.add(torch.get_num_threads())

    watched = Watched(model, each)
    with torch_threads(6):
        before = threading.active_count()
        attack(watched, workers=3).run_standard_evaluation(x, y)
        assert torch.get_num_threads() == 6
        assert threading.active_count() == before
        others: list[int] = []
        later = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
        later.start()
        later.join()
    assert others == [6], "threads that begin later compute as before"
    assert 2 in seen
    assert seen <= {2, 3, 6}, "a stage with fewer batches has fewer workers"
    assert len(watched.threads) > 3


def test_workers_compute_under_the_autocast_of_the_caller() -> None:
    model, x, y = data()
    seen = set()
    watched = Watched(
        model.float(), lambda call: seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    )
    with torch.autocast("cpu", torch.float16):
        alone(watched, "apgd-ce", workers=2).run_standard_evaluation(x.float(), y)
    assert seen == {(True, torch.float16)}
    seen.clear()
    alone(watched, "apgd-ce", workers=2).run_standard_evaluation(x.float(), y)
    assert {enabled for enabled, _ in seen} == {False}


def test_workers_have_the_autocast_of_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    seen = []

    def work(worker: int, job: int) -> None:
        seen.append((torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")))

    with torch.autocast("cuda", torch.float16):
        Team(2, ["cuda"]).run(range(4), work)
    assert seen == [(True, torch.float16)] * 4
    Team(2, ["cuda"]).run(range(4), work)
    assert [enabled for enabled, _ in seen[4:]] == [False] * 4


class Killed(BaseException):
    pass


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_an_evaluation_goes_on_with_another_number_of_workers(norm: str, tmp_path: Path) -> None:
    """Killed every 300 calls, each time with another number of workers and another batch size."""
    model, x, y = data()
    path, queries = tmp_path / "state.pt", set()

    def made(model: nn.Module, workers: int):
        adversary = attack(model, norm, eps=0.5 * EPS[norm], workers=workers, save_every=0)
        adversary.attacks_to_run = ["apgd-ce", "fab-t", "square"]
        adversary.square.n_queries = 400
        return adversary

    def dies(call: int) -> None:
        if call == 300:
            raise Killed

    expected = made(model, 1).run_standard_evaluation(x, y)
    for kills in range(40):
        adversary = made(Watched(model, dies), [1, 3, 2, 1, 2, 3][kills % 6])
        try:
            actual = adversary.run_standard_evaluation(x, y, bs=[40, 16, 11][kills % 3], state_path=path)
            break
        except Killed:
            search = torch.load(path, weights_only=True)["search"]
            queries |= set(search["queries"].tolist()) if search is not None else set()
    assert kills >= 3
    assert len(queries) > 1, "kills within Square, after different numbers of queries"
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_paused_search_is_that_of_its_query(norm: str, tmp_path: Path) -> None:
    """The run goes on to write to its tensors after it has paused, and falls some queries later."""
    model, x, y = data()
    path = tmp_path / "state.pt"
    square = alone(Watched(model), "square", norm, eps=0.01)
    expected = square.run_standard_evaluation(x, y)
    for later in (0, 8):  # queries after the pause at 64; at 72 the samples that fell have left the batch
        path.unlink(missing_ok=True)
        paused = None

        def dies(call: int, later: int = later) -> None:
            nonlocal paused
            if paused is None and path.exists() and torch.load(path, weights_only=True)["search"] is not None:
                paused = call
            if paused is not None and call == paused + later:
                raise Killed

        with pytest.raises(Killed):
            alone(Watched(model, dies), "square", norm, eps=0.01, save_every=0).run_standard_evaluation(
                x, y, state_path=path
            )
        assert set(torch.load(path, weights_only=True)["search"]["queries"].tolist()) == {64}
        again = alone(model, "square", norm, eps=0.01).run_standard_evaluation(x, y, state_path=path)
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-12)


def test_square_with_the_official_stream_begins_its_batch_again(tmp_path: Path) -> None:
    """Its numbers are drawn one after the other, so a search cannot go on in the middle."""
    model, x, y = data()
    path = tmp_path / "state.pt"
    square = {"rng": "reference", "eps": 0.01}
    expected = alone(model, "square", **square).run_standard_evaluation(x, y, bs=16)
    begun = None

    def dies(call: int) -> None:
        nonlocal begun
        if begun is None and path.exists() and int(torch.load(path, weights_only=True)["finished"].max()) == 1:
            begun = call  # the second batch
        if begun is not None and call == begun + 100:
            raise Killed

    with pytest.raises(Killed):
        alone(Watched(model, dies), "square", **square, save_every=0).run_standard_evaluation(
            x, y, bs=16, state_path=path
        )
    again = alone(model, "square", **square).run_standard_evaluation(x, y, bs=16, state_path=path)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("failure", [ValueError, Killed, KeyboardInterrupt])
def test_a_failing_worker_ends_all_and_keeps_what_was_found(failure: type, tmp_path: Path) -> None:
    model, x, y = data()
    expected = attack(model, workers=1).run_standard_evaluation(x, y)
    path, main = tmp_path / "state.pt", threading.current_thread()
    failed: list[threading.Thread] = []
    after = 0

    def each(call: int) -> None:
        nonlocal after
        thread = threading.current_thread()
        if thread is main or call < 150:
            return
        if not failed:
            failed.append(thread)
            raise failure("the model fails")
        failed[0].join()  # the other worker is in the model until the failure is known
        after += 1

    before = threading.active_count()
    watched = Watched(model, each)
    with pytest.raises(failure, match="the model fails"):
        attack(watched, workers=2, save_every=0).run_standard_evaluation(x, y, state_path=path)
    assert threading.active_count() == before
    assert after <= 1, "a worker makes no further pass"
    assert int((torch.load(path, weights_only=True)["finished"] > 0).sum()) > 0
    actual = attack(model, workers=3).run_standard_evaluation(x, y, state_path=path)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_an_interrupt_ends_all_workers_and_keeps_what_was_found(tmp_path: Path) -> None:
    model, x, y = data()
    expected = attack(model, workers=1).run_standard_evaluation(x, y)
    path, before = tmp_path / "state.pt", threading.active_count()

    def each(call: int) -> None:
        if call == 200:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a runner of tests may have taken away
    try:
        with pytest.raises(KeyboardInterrupt):
            attack(Watched(model, each), workers=2).run_standard_evaluation(x, y, state_path=path)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert threading.active_count() == before
    state = torch.load(path, weights_only=True)
    assert int((state["finished"] > 0).sum()) > 0
    actual = attack(model, workers=2).run_standard_evaluation(x, y, state_path=path)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_the_first_failure_is_the_one_that_is_raised() -> None:
    meet = threading.Barrier(2)

    def work(worker: int, job: int) -> None:
        meet.wait()
        raise ValueError(f"job {job}")

    with pytest.raises(ValueError, match=r"job [01]"):
        Team(2).run(range(2), work)


@pytest.mark.parametrize(("threads", "share"), [(2, 1), (4, 1), (5, 1), (12, 2)])
def test_more_workers_than_threads_have_one_each(threads: int, share: int) -> None:
    seen: set[int] = set()
    with torch_threads(threads):
        Team(5).run(range(10), lambda worker, job: seen.add(torch.get_num_threads()))
    assert seen == {share}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_job_is_done_once(workers: int) -> None:
    done: list[int] = []
    Team(workers).run(range(50), lambda worker, job: done.append(job))
    assert sorted(done) == list(range(50))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 20, 249, 250, 251, 500, 1001])
@pytest.mark.parametrize("most", [1, 3, 16, 250])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_samples_are_dealt_out_evenly(count: int, most: int, workers: int) -> None:
    size = batch_size(count, most, workers)
    batches = dealt_out(count, size)
    assert torch.equal(torch.cat([torch.zeros(0, dtype=torch.int64), *batches]).sort().values, torch.arange(count))
    sizes = [len(batch) for batch in batches]
    assert max(sizes, default=1) <= most
    assert max(sizes, default=0) - min(sizes, default=0) <= 1
    rounds = math.ceil(len(batches) / workers)
    if min(sizes, default=0) > 8:
        assert rounds * max(sizes) <= count / workers + rounds, "workers wait for others for less than a batch"


class Remembers(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.model, self.how = small_cnn().double(), how
        self.last, self.log, self.table, self.unregistered = None, [], {}, [nn.Identity()]
        if how == "an object":
            self.kept = SimpleNamespace(last=None)
        if how == "an object in a container":
            self.kept = {"kept": [SimpleNamespace(last=None)]}
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "attribute":
            self.last = x
        if self.how == "list":
            self.log.append(len(x))
        if self.how == "entry":
            self.table["features"] = x
        if self.how == "buffer":
            self.calls += 1
        if self.how == "set and reset":
            self.last = x
            self.last = None
        if self.how == "deleted":
            self.passing = x
            del self.passing
        if self.how == "deep entry":
            self.table.setdefault("features", [[]])[0].append(x)
        if self.how == "module in a list":
            self.unregistered[0].last = x
            self.unregistered[0].last = None
        return self.model(x)


KEPT: dict[str, Tensor] = {}
LATEST: Tensor | None = None


def keep(x: Tensor) -> None:
    global LATEST  # noqa: PLW0603 (a module that does so is what is looked for)
    LATEST = x


def keeping() -> Callable[[Tensor], Tensor]:
    last = None

    def features(x: Tensor) -> Tensor:
        nonlocal last
        last = x
        return last

    return features


class RemembersElsewhere(nn.Module):
    """Keeps its input outside of itself."""

    features: Tensor | None = None

    def __init__(self, how: str) -> None:
        super().__init__()
        self.model, self.how = small_cnn().double(), how
        self.around = keeping() if how == "closure" else torch.relu

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "class":
            type(self).features = x
        if self.how == "dictionary of the file":
            KEPT["features"] = x
        if self.how == "variable of the file":
            keep(x)
        return self.model(self.around(x))


@pytest.mark.parametrize("how", ["class", "dictionary of the file", "variable of the file", "closure"])
def test_models_that_keep_something_elsewhere_are_not_shared(how: str) -> None:
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    assert can_be_shared(RemembersElsewhere("nothing").eval(), x)
    assert not can_be_shared(RemembersElsewhere(how).eval(), x)


def test_a_function_of_no_file_can_be_shared() -> None:
    """Functions that other functions make, as those of dataclasses, need not know a module."""
    model, made = RemembersElsewhere("nothing"), {"__builtins__": {}}
    exec("def around(x):\n    return x", made)
    model.around = made["around"]
    model.around.__module__ = None
    assert can_be_shared(model.eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64))


def hooked(kind: str) -> nn.Module:
    model = small_cnn().double()
    if kind == "pre":
        model[0].register_forward_pre_hook(lambda module, inputs: None)
    else:
        model[-1].register_forward_hook(lambda module, inputs, output: None)
    return model


def test_models_that_threads_may_share() -> None:
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    for batch_norm in (False, True):
        assert can_be_shared(small_cnn(batch_norm=batch_norm).double().eval(), x)
    assert can_be_shared(Remembers("nothing").eval(), x)
    for how in (
        *("attribute", "list", "entry", "buffer", "set and reset", "deleted", "deep entry", "module in a list"),
        *("an object", "an object in a container"),
    ):
        assert not can_be_shared(Remembers(how).eval(), x), how
    for kind in ("pre", "post"):
        assert not can_be_shared(hooked(kind).eval(), x), kind
    assert not can_be_shared(small_cnn().double().forward, x)
    assert not can_be_shared(torch.jit.script(small_cnn().double().eval()), x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    assert not can_be_shared(small_cnn().double().eval(), x)
    handle.remove()


class Ordinary(nn.Module):
    """What the attributes of published networks are, and a module that is made and changed in each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.config = small_cnn().double(), {"mean": (0.5,), "sizes": [{"width": 8, "name": None}]}
        self.activation, self.norm = functools.partial(nn.functional.leaky_relu, negative_slope=0.1), nn.BatchNorm2d
        self.scale, self.dtype, self.bound, self.blocks = 1.0, torch.float64, self.scaled, [nn.Identity()]
        self.register_load_state_dict_pre_hook(lambda *arguments: None)

    def scaled(self, x: Tensor) -> Tensor:
        return self.scale * x

    def forward(self, x: Tensor) -> Tensor:
        made = nn.Identity()
        made.seen = x
        return self.activation(self.bound(self.model(made(x))))


def test_ordinary_networks_are_shared() -> None:
    assert can_be_shared(Ordinary().eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64))
    normalised = Normalised(small_cnn(batch_norm=True), (0.5,), (0.2,))
    assert can_be_shared(normalised.eval(), torch.rand(2, 1, 8, 8))


def test_automatic_workers_are_those_of_torch() -> None:
    model, x = small_cnn().double().eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    for threads in (1, 2, MOST + 1):
        with torch_threads(threads):
            assert automatic(model, x) == min(threads, MOST)
            assert automatic(model.forward, x) == 1
            assert automatic(copy.deepcopy(model).to("meta"), x.to("meta")) == 1, "threads of the CPU are of no use"


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch says that it has two threads, and computes with as many as it had."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)


def threads_of(model: nn.Module, x: Tensor, y: Tensor, **options) -> int:
    """How many threads other than this one have called a model."""
    seen = set()
    original = type(model).forward

    class Spied(type(model)):
        def forward(self, x: Tensor) -> Tensor:
            seen.add(threading.get_ident())
            return original(self, x)

    model.__class__ = Spied
    adversary = attack(model, **{"version": "fast", **options})
    adversary.apgd.eot_iter = 1
    adversary.run_standard_evaluation(x, y)
    return len(seen - {threading.get_ident()})


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("options", [{"rng": "reference"}, {"version": "rand"}])
def test_auto_is_one_where_the_order_may_matter(options: dict) -> None:
    model, x, y = data()
    assert threads_of(model, x, y) > 1
    model, x, y = data()
    assert threads_of(model, x, y, **options) == 0


@pytest.mark.usefixtures("two_threads")
def test_auto_is_one_for_a_randomised_model() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + 0.01 * torch.randn_like(x))

    model, x, y = data()
    with pytest.warns(AutoAttackWarning, match="randomised"):
        assert threads_of(Noisy(*model).eval(), x, y) == 0


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "all", None])
def test_bad_numbers_of_workers(workers: object) -> None:
    model, x, y = data()
    with pytest.raises(ValueError, match='workers must be "auto" or a whole number of at least 1'):
        attack(model, workers=workers)
    adversary = attack(model)
    adversary.workers = workers
    with pytest.raises(ValueError, match='workers must be "auto"'):
        adversary.run_standard_evaluation(x, y)


def test_several_workers_are_for_the_cpu() -> None:
    model, x, y = data(count=COUNT)
    with pytest.raises(ValueError, match="workers must be 1 on another device than the CPU, got 2 on cuda"):
        attack(model, workers=2, device="cuda").run_standard_evaluation(x, y)
