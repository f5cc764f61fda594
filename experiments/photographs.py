"""Real photographs on two CPU cores: four arms, each with its own learning rate, three seeds.

    python experiments/photographs.py --data TINY --work runs/photographs

TINY is Tiny-ImageNet as an image folder (train/<wnid>/*, val/<wnid>/*); the first ten of its
classes in sorted order are used. Every arm is tuned over the same grid of learning rates on a
held-back fifth of the training images (every fifth file), then trained on all of them with three
seeds and measured on val after the last epoch.

It can be interrupted: what is finished is read from its log, what is not is continued. The table
at the end is made from the logs alone. `--table DIR` prints it from kept logs without training.
"""

import statistics
from pathlib import Path

import runs

EPOCHS = 12
SETTINGS = (
    "--model nano --image-size 64 --patch-size 16 --warmup-epochs 2 "
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


def last_row(out: Path) -> dict | None:
    return runs.last_row(out, EPOCHS)


def best_rate(logs: Path, arm: str) -> str:
    return max(LEARNING_RATES, key=lambda lr: last_row(logs / f"tune/{arm}-lr{lr}")["top1"])


def table(logs: Path) -> None:
    """Of the logs found; - where there is none."""
    rates = " | ".join(f"lr {lr}" for lr in LEARNING_RATES)
    print(f"\n| arm | held-back fifth: {rates} | val top-1, mean | spread | minutes |")
    print("|---|" + "---|" * (len(LEARNING_RATES) + 3))
    for arm in ARMS:
        tuning = [last_row(logs / f"tune/{arm}-lr{lr}") for lr in LEARNING_RATES]
        tuned = " | ".join(f"{row['top1']:.1f}" if row else "-" for row in tuning)
        rows = [last_row(logs / f"full/{arm}-seed{seed}") for seed in SEEDS]
        top1 = [row["top1"] for row in rows if row]
        if top1:
            minutes = statistics.mean(row["minutes"] for row in rows if row)
            result = f"{statistics.mean(top1):.1f} | {min(top1):.1f} .. {max(top1):.1f}"
            print(f"| {arm} | {tuned} | {result} | {minutes:.1f} |")
        else:
            print(f"| {arm} | {tuned} | - | - | - |")


def main() -> None:
    p = runs.flags(__doc__, "runs/photographs")
    args = p.parse_args()
    if args.table:
        return table(args.table)
    if args.data is None:
        p.error("--data is needed (or --table)")
    runs.make_folders(args.data, args.work, CLASSES)
    epochs = dict(tune=EPOCHS, full=EPOCHS)
    logs = runs.tune_then_train(
        "train_cls.py",
        args.work,
        SETTINGS,
        ARMS,
        LEARNING_RATES,
        SEEDS,
        epochs,
        best_rate,
        args.jobs,
    )
    table(logs)


if __name__ == "__main__":
    main()
