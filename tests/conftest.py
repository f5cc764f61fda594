"""Shared by the tests: a folder of small real PNG files, and scripts run as a user runs them."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from einops import rearrange
from PIL import Image

from common import draw_shapes, one_line_errors

ROOT = Path(__file__).parent.parent
torch.set_num_threads(
    1
)  # on two cores a second thread costs these small matrices more than it gives

# A network of two narrow blocks on 16 x 16 pixels: an epoch takes a fraction of a second.
SMALL = "--model nano --depth 2 --image-size 16 --patch-size 8 --batch-size 12 --device cpu".split()


def make_image_folder(root: Path, classes: int = 5) -> Path:
    """ROOT/{train,val}/classN/*.png: 60 and 30 drawn images of 24 x 24 pixels."""
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


def script_environment() -> dict:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}


def run_script(*args, cwd: Path, launcher=()) -> subprocess.CompletedProcess:
    """`python SCRIPT ARGS` in cwd; launcher puts words before the script's name."""
    script, *rest = map(str, args)
    command = [sys.executable, *launcher, str(ROOT / script), *rest]
    return subprocess.run(
        command, cwd=cwd, env=script_environment(), capture_output=True, text=True, timeout=200
    )


def run_interrupted(script: str, looks: int, words, cwd: Path) -> subprocess.CompletedProcess:
    """A training script that finds itself asked to stop the looks-th time it looks.

    As by SIGTERM, but at a place that does not depend on how fast the machine is.
    """
    code = f"""
import signal, common, {script}
looks = iter(range(1, 10**6))
common.StopSignal.requested = lambda *_: signal.SIGTERM * (next(looks) == {looks})
{script}.main()
"""
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=script_environment(), capture_output=True, text=True, timeout=200
    )


def run_scripts(commands: dict, cwd: Path) -> dict:
    """`run_script` for each named list of words, two at a time: most of their time is importing."""
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda words: run_script(*words, cwd=cwd), commands.values())
        return dict(zip(commands, done))


def run_here(main, words, cwd: Path, monkeypatch, capsys) -> subprocess.CompletedProcess:
    """A script's `main()` in this process: for commands that end before any work is done.

    It saves the seconds that a new process spends importing.
    """
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended, one_line_errors("-"):
        main()
    out, err = capsys.readouterr()
    return subprocess.CompletedProcess(words, ended.value.code, out, err)


def assert_fails_in_one_line(done: subprocess.CompletedProcess, words: str) -> None:
    """Exit code 2, no traceback, one line that says what, where and what to do."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert re.search(words, lines[0]), lines[0]
