"""Real photographs on two CPU cores: four arms, each with its own learning rate, three seeds.

    python experiments/photographs.py --data TINY --work runs/photographs

TINY is Tiny-ImageNet as an image folder (train/<wnid>/*, val/<wnid>/*); the first ten of its
classes in sorted order are used. Every arm is tuned over the same grid of learning rates on a
held-back fifth of the training images (every fifth file), then trained on all of them with three
seeds and measured on val after the last epoch.

It can be interrupted: what is finished is read from its log, what is not is continued. The table
at the end is made from the logs alone. `--table DIR` prints it from kept logs without training.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EPOCHS = 12
TRAINER = str(Path(__file__).resolve().parent.parent / "train_cls.py")
SETTINGS = (
    f"--model nano --image-size 64 --patch-size 16 --epochs {EPOCHS} --warmup-epochs 2 "
    "--batch-size 64 --position-std 0.5 --mixup 0 --cutmix 0 --opt soap --workers 0"
).split()
ARMS = {
    "residual": "--drop-path 0",
    "skipless-default": "--skipless --init default",
    "skipless-published": "--skipless --alpha 2.0 --beta 0.6 --c 3.0",
    "skipless-conditioned": "--skipless --alpha 0.7 --beta 1.0 --c 3.0",
}
LEARNING_RATES = ["3e-4", "1e-3", "3e-3"]
SEEDS = [0, 1, 2]
CLASSES = 10


def link(source: Path, files: list[Path], target: Path) -> None:
    """TARGET/<class>/<file> as links to SOURCE/<class>/<file>."""
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(file.resolve())


def make_folders(data: Path, work: Path) -> None:
    """work/tune: training images less every fifth, against that fifth; work/full: train and val."""
    if not (data / "train").is_dir() or not (data / "val").is_dir():
        sys.exit(f"--data {data}: expected train/<class>/* and val/<class>/* in it")
    classes = sorted(d.name for d in (data / "train").iterdir() if d.is_dir())[:CLASSES]
    if missing := [name for name in classes if not (data / "val" / name).is_dir()]:
        sys.exit(f"--data {data}: val/ has no folder for {missing[:3]}")
    for name in classes:
        files = sorted((data / "train" / name).iterdir())
        link(data / "train", [f for i, f in enumerate(files) if i % 5], work / "tune" / "train")
        link(data / "train", files[::5], work / "tune" / "val")
        link(data / "train", files, work / "full" / "train")
        link(data / "val", sorted((data / "val" / name).iterdir()), work / "full" / "val")


def last_row(out: Path) -> dict | None:
    """The last epoch of a finished run, else None."""
    log = out / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return rows[-1] if rows and rows[-1]["epoch"] == EPOCHS else None


def train(job: tuple[Path, str, str, int, Path]) -> None:
    data, arm, lr, seed, out = job
    if last_row(out):
        return
    command = [sys.executable, TRAINER, "--data", str(data), "--out", str(out), *SETTINGS,
               *ARMS[arm].split(), "--lr", lr, "--seed", str(seed)]  # fmt: skip
    if (out / "last.pt").exists():
        command = [sys.executable, TRAINER, "--resume", str(out / "last.pt")]
    # One thread a run and as many runs as cores: small matrices use two cores badly.
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.decode()}")
    print(done.stdout.decode().splitlines()[-1], out, flush=True)


def best_rate(runs: Path, arm: str) -> str:
    return max(LEARNING_RATES, key=lambda lr: last_row(runs / f"tune/{arm}-lr{lr}")["top1"])


def table(runs: Path) -> None:
    rates = " | ".join(f"lr {lr}" for lr in LEARNING_RATES)
    print(f"\n| arm | held-back fifth: {rates} | val top-1, mean | spread | minutes |")
    print("|---|" + "---|" * (len(LEARNING_RATES) + 3))
    for arm in ARMS:
        tuned = [f"{last_row(runs / f'tune/{arm}-lr{lr}')['top1']:.1f}" for lr in LEARNING_RATES]
        rows = [last_row(runs / f"full/{arm}-seed{seed}") for seed in SEEDS]
        top1 = [row["top1"] for row in rows]
        minutes = statistics.mean(row["minutes"] for row in rows)
        print(
            f"| {arm} | {' | '.join(tuned)} | {statistics.mean(top1):.1f} | "
            f"{min(top1):.1f} .. {max(top1):.1f} | {minutes:.1f} |"
        )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, help="Tiny-ImageNet as an image folder")
    p.add_argument("--work", type=Path, default=Path("runs/photographs"), help="where runs go")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time [cores]")
    p.add_argument("--table", type=Path, help="print the table of these logs and stop")
    args = p.parse_args()
    if args.table:
        return table(args.table)
    if args.data is None:
        p.error("--data is needed (or --table)")
    make_folders(args.data, args.work)
    runs = args.work / "runs"
    with ThreadPoolExecutor(args.jobs) as pool:
        tuning = [
            (args.work / "tune", arm, lr, 0, runs / f"tune/{arm}-lr{lr}")
            for lr in LEARNING_RATES
            for arm in ARMS
        ]
        list(pool.map(train, tuning))
        final = [
            (args.work / "full", arm, best_rate(runs, arm), seed, runs / f"full/{arm}-seed{seed}")
            for seed in SEEDS
            for arm in ARMS
        ]
        list(pool.map(train, final))
    table(runs)


if __name__ == "__main__":
    main()
