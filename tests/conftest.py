"""Shared by the tests: a folder of small real PNG files, and scripts run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fresh_process
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from support import data, processes
from support.errors import errors_in_one_line
from support.shapes import draw_shapes

ROOT = fresh_process.ROOT
os.environ["OMP_NUM_THREADS"] = "1"  # of processes started from here
torch.set_num_threads(1)  # a second thread costs these small matrices more than it gives

# A network of two narrow blocks on 16 x 16 pixels: an epoch takes a fraction of a second.
SMALL = "--model nano --depth 2 --image-size 16 --patch-size 8 --batch-size 12 --device cpu".split()
SMALL += "--epochs 2 --warmup-epochs 1 --workers 0".split()
TWO_PROCESSES = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


OTHER_PARTS = dict(  # of a checkpoint that a test makes
    listing="", images=1, processes=1, step=0, seconds=0.0, history=[], sums={}
)  # fmt: skip


def make_image_folder(root: Path, classes: int = 5) -> Path:
    """ROOT/{train,val}/classN/*.png: 60 and 30 synthetic images of 24 x 24 pixels."""
    for split, count in (("train", 60), ("val", 30)):
        images, labels, _ = draw_shapes(list(range(count)), 24, split)
        for i, (image, label) in enumerate(zip(images, labels.tolist())):
            folder = root / split / f"class{label % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rearrange(image, "channel row column -> row column channel").numpy()
            Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root


@pytest.fixture(scope="session")
def image_root(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def float64_sgd(monkeypatch):
    """Trainers run in this process train in float64, by plain SGD in the optimizer's own groups.

    Then a run can be compared with the same steps written out by hand: SGD's update shows a
    gradient as it is, where Adam's shows little more than its sign.
    """

    def build(groups, *_, **settings) -> torch.optim.Optimizer:
        keys = ("params", "weight_decay")
        groups = [{key: group[key] for key in keys} for group in groups]
        return torch.optim.SGD(groups, lr=settings["lr"])

    monkeypatch.setattr(processes, "sharing_state", build)
    torch.set_default_dtype(torch.float64)
    data.channel_statistics.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)
    data.channel_statistics.cache_clear()


def passes_computed_twice(monkeypatch) -> list:
    """Of a run in this process: an entry for each block's pass whose activations are not kept."""
    passes, real = [], processes.checkpoint

    def counted(*args, **kind):
        passes.append(args)
        return real(*args, **kind)

    monkeypatch.setattr(processes, "checkpoint", counted)
    return passes


def share_of(name: str, p) -> torch.Tensor:
    """Of a step, what each entry takes with the identity init: the pairs a tenth."""
    share = torch.ones_like(p)
    if "fc1" in name:
        share[:128] = 0.1
    elif name.endswith("fc2.weight"):
        share[:, :128] = 0.1
    return share


@torch.no_grad()
def correlation(tokens: torch.Tensor) -> float:
    """Mean cosine of two different tokens, for (..., token, dim)."""
    x = nn.functional.normalize(tokens, dim=-1)
    n = x.shape[-2]
    return ((x @ x.mT).sum((-2, -1)).mean().item() - n) / (n * (n - 1))


def script_environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}


def run_script(*args, cwd: Path, launcher=()) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGS` in cwd; launcher puts words before the script's name."""
    script, *rest = map(str, args)
    if not launcher:
        return fresh_process.run([ROOT / script, *rest], cwd, script_environment())
    command = [sys.executable, *launcher, str(ROOT / script), *rest]
    return subprocess.run(
        command, cwd=cwd, env=script_environment(), capture_output=True, text=True, timeout=200
    )


def run_main(main, words, cwd: Path, monkeypatch) -> None:
    """A script's `main()` in this process, to its end: importing torch anew takes seconds."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    with errors_in_one_line("-"):
        main()


def run_here(main, words, cwd: Path, monkeypatch, capsys) -> subprocess.CompletedProcess:
    """A script's `main()` in this process, for a command that ends the program before its end."""
    with pytest.raises(SystemExit) as ended:
        run_main(main, words, cwd, monkeypatch)
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(words, ended.value.code, out, err)


def assert_fails_in_one_line(done: subprocess.CompletedProcess, words: str) -> None:
    """Exit code 2, no traceback, one line that says what, where and what to do."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert re.search(words, lines[0]), lines[0]
