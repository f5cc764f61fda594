"""What the experiments share: parts of an image folder, and runs that are made once and kept."""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIVERGED = "diverged.txt"


def flags(description: str, work: str) -> argparse.ArgumentParser:
    """The flags that every experiment has."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, help="Tiny-ImageNet as an image folder")
    p.add_argument("--work", type=Path, default=Path(work), help=f"where runs go [{work}]")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time [cores]")
    p.add_argument("--table", type=Path, help="what these logs say, without training")
    return p


def link(source: Path, files: list[Path], target: Path) -> None:
    """TARGET/<class>/<file> as links to SOURCE/<class>/<file>."""
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(file.resolve())


def make_folders(data: Path, work: Path, first_classes: int) -> None:
    """work/tune: training images less every fifth, against that fifth; work/full: train and val.

    Of the first classes in sorted order.
    """
    if not (data / "train").is_dir() or not (data / "val").is_dir():
        sys.exit(f"--data {data}: expected train/<class>/* and val/<class>/* in it")
    classes = sorted(d.name for d in (data / "train").iterdir() if d.is_dir())[:first_classes]
    if missing := [name for name in classes if not (data / "val" / name).is_dir()]:
        sys.exit(f"--data {data}: val/ has no folder for {missing[:3]}")
    for name in classes:
        files = sorted((data / "train" / name).iterdir())
        link(data / "train", [f for i, f in enumerate(files) if i % 5], work / "tune" / "train")
        link(data / "train", files[::5], work / "tune" / "val")
        link(data / "train", files, work / "full" / "train")
        link(data / "val", sorted((data / "val" / name).iterdir()), work / "full" / "val")


def last_row(out: Path, epochs: int) -> dict | None:
    """The last epoch of a finished run, else None; one that diverged is finished, at zero."""
    if (out / DIVERGED).exists():
        return dict(epoch=epochs, top1=0.0, knn=0.0, val_loss=math.inf)
    log = out / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return rows[-1] if rows and rows[-1]["epoch"] == epochs else None


def train(script: str, epochs: int, out: Path, flags: list[str]) -> None:
    """Run a trainer into `out`, or continue it there; what is finished stays as it is."""
    if last_row(out, epochs):
        return
    command = [sys.executable, str(ROOT / script)]
    if (out / "last.pt").exists():
        command += ["--resume", str(out / "last.pt")]
    else:
        command += ["--out", str(out), "--epochs", str(epochs), *flags]
    # One thread a run and as many runs as cores: small matrices use two cores badly.
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode == 1 and b"Usual causes: --lr" in done.stderr:  # its loss was not finite
        (out / DIVERGED).write_bytes(done.stderr)
    elif done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.decode()}")
    print(f"{out}: {(done.stdout or done.stderr).decode().splitlines()[-1]}", flush=True)


def train_all(jobs: list[tuple[str, int, Path, list[str]]], at_a_time: int) -> None:
    """`train` for each tuple of its arguments."""
    with ThreadPoolExecutor(at_a_time) as pool:
        list(pool.map(lambda job: train(*job), jobs))


def tune_then_train(
    script: str,
    work: Path,
    settings: list[str],
    arms: dict[str, str],
    rates: list[str],
    seeds: list[int],
    epochs: dict[str, int],
    best_rate: Callable[[Path, str], str],
    at_a_time: int,
) -> Path:
    """Every arm at every learning rate on work/tune, then at its best one with every seed on
    work/full. epochs: for "tune" and "full". Returns the folder of the runs."""
    logs = work / "runs"

    def job(part: str, arm: str, lr: str, seed: int, name: str) -> tuple:
        flags = ["--data", str(work / part), *settings, *arms[arm].split(), "--lr", lr]
        out = logs / part / f"{arm}-{name}"
        return script, epochs[part], out, [*flags, "--seed", str(seed)]

    train_all([job("tune", arm, lr, 0, f"lr{lr}") for lr in rates for arm in arms], at_a_time)
    best = {arm: best_rate(logs, arm) for arm in arms}
    final = [job("full", arm, best[arm], seed, f"seed{seed}") for seed in seeds for arm in arms]
    train_all(final, at_a_time)
    return logs
