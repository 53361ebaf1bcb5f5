"""The animation of the toy, and the completion of commands in a shell."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from training import completion, demo
from training.__main__ import PROGRAMS
from training.data import toy
from training.figures import toy_fits


def test_the_demo_writes_a_page_that_needs_no_network(call: Any) -> None:
    ending = call("demo", "--steps", "3", "--frames", "2", "--out", "here", "--gif")
    assert ending.status == 0, ending
    assert ending.out.count("R_SCORE 0.") == 2
    page = Path("here/demo.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "http" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64") >= 3
    assert sorted(path.name for path in Path("here").iterdir()) == ["demo.gif", "demo.html"]
    with Image.open("here/demo.gif") as film:
        assert film.n_frames == 3  # type: ignore[attr-defined]


def test_a_frame_shows_the_worst_point_of_its_own_objective() -> None:
    """PGD-AT compares with p_d at x, direct SCORE with p_d at x': where p_θ is p_d, only the first finds a gap."""

    class Truth(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return toy.log_joint(x)

    at = 0.5
    madry, score = (demo.frame(objective, 0, Truth(), at) for objective in ("madry", "score"))
    x = demo.GRID.x
    inside = x[(x - at).abs() <= toy.EPS + 1e-9]
    log_p = toy.log_joint(inside).log_softmax(1)
    own = toy.log_joint(torch.tensor([at], dtype=x.dtype)).log_softmax(1)
    gaps = (own.exp() * (own - log_p)).sum(1)
    assert madry.worst == pytest.approx(inside[gaps.argmax()].item())
    assert abs(madry.worst - at) == pytest.approx(toy.EPS)
    assert score.r_score == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(score.probability, toy.posterior(x)[:, 1])


def test_the_frames_are_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = demo.DemoSettings(steps=7, frames=3)
    frames = demo.film("score", settings, demo.tqdm(disable=True))
    assert [frame.step for frame in frames] == [0, 2, 5, 7]
    model = toy_fits.train(toy_fits.Fit("score", steps=7))
    assert frames[-1].r_score == pytest.approx(toy.robust_errors(model, demo.GRID)["r_score"], rel=1e-9)


def test_bad_settings(call: Any) -> None:
    for option, value in (("--at", "7"), ("--steps", "0"), ("--frames", "0")):
        ending = call("demo", option, value)
        assert (ending.status, option[2:] in ending.err) == (2, True), ending


def test_every_program_can_be_completed() -> None:
    assert list(completion.SETTINGS) == list(PROGRAMS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("scorematch eva", {"evaluate"}),
        ("scorematch run --obj", {"--objective"}),
        ("scorematch run --objective score_d", {"score_direct"}),
        ("scorematch evaluate --attack ", {"clean", "pgd", "autoattack", "obfuscation", "certify"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(completion.script("bash"))
    listed = words.split(" ")
    lines = [
        f"source {script}",
        "function=$(complete -p scorematch | sed 's/.*-F \\([^ ]*\\).*/\\1/')",
        f"COMP_WORDS=({' '.join(repr(word) for word in listed)}); COMP_CWORD={len(listed) - 1}",
        f"COMP_LINE={words!r}; COMP_POINT={len(words)}",
        '$function; printf "%s\\n" "${COMPREPLY[@]}"',
    ]
    ending = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert expected == set(ending.stdout.split())
