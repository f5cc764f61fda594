"""DINO on real photographs, on two CPU cores: with skips and without, then dense features.

    python experiments/dino_photographs.py --data TINY --camvid CAMVID --work runs/dino

TINY is Tiny-ImageNet as an image folder (train/<wnid>/*, val/<wnid>/*), of which the first ten
classes in sorted order are used; CAMVID holds {train,val,test}/{images,masks}, ids 0 .. 10, 11
ignored. All arms are tuned over the same learning rates by k-NN on a held-back fifth of the
training images, then pretrained on all of them with several seeds, measured by k-NN on val after
the last epoch, and by `eval_dense.py segment` on CAMVID's test images.

It can be interrupted: what is finished is read from its logs, what is not is continued. The table
at the end is made from the logs alone. `--table DIR` prints it from kept logs without training.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import runs

EPOCHS, TUNING_EPOCHS = 12, 4
SETTINGS = (
    "--model nano --image-size 40 --patch-size 8 --batch-size 64 --warmup-epochs 1 --knn-every 4 "
    "--position-std 0.5 --local-crops 4 --crop-split 0.3 --prototypes 512 --momentum 0.98 "
    "--teacher-temperature 0.04 --opt soap --workers 0"
).split()
ARMS = {
    "residual": "--drop-path 0",
    "residual-mean": "--drop-path 0 --pool mean",
    "skipless-conditioned": "--skipless --alpha 1.8 --beta 1.0 --c 3.0",
    "skipless-depth": "--skipless --init depth --position-std 1.0 --pool mean",
}
LEARNING_RATES = ["3e-4", "1e-3", "3e-3"]
SEEDS = [0, 1, 2]
CLASSES = 10
BLOCKS = {"single-layer": ["12"], "multi-scale": ["3", "6", "9", "12"]}


def best_rate(logs: Path, arm: str) -> str:
    def held_back(lr: str) -> float:
        return runs.last_row(logs / f"tune/{arm}-lr{lr}", TUNING_EPOCHS)["knn"]

    return max(LEARNING_RATES, key=held_back)


def segment(logs: Path, camvid: Path, arm: str, seed: int, setting: str) -> None:
    """`eval_dense.py segment` of one pretrained backbone, unless done already."""
    out = logs / f"full/{arm}-seed{seed}/{setting}"
    if (out / "segment.json").exists():
        return
    command = [sys.executable, str(runs.ROOT / "eval_dense.py"), "segment",
               str(out.parent / "last.pt"), "--data", str(camvid), "--ignore", "11", "--blocks",
               *BLOCKS[setting], "--epochs", "10", "--out", str(out)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")


def cells(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.1f} .. {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(logs: Path) -> None:
    """Mean and range over the seeds found; - where nothing is."""
    rates = " | ".join(f"lr {lr}" for lr in LEARNING_RATES)
    print(f"\n| arm | k-NN on the held-back fifth: {rates} | seeds | k-NN on val, before | after |")
    print("|---|" + "---|" * (len(LEARNING_RATES) + 3))
    finished = {}
    for arm in ARMS:
        folders = [logs / f"full/{arm}-seed{seed}" for seed in SEEDS]
        finished[arm] = [f for f in folders if runs.last_row(f, EPOCHS)]
        tuning = [
            runs.last_row(logs / f"tune/{arm}-lr{lr}", TUNING_EPOCHS) for lr in LEARNING_RATES
        ]
        tuned = " | ".join(f"{row['knn']:.1f}" if row else "-" for row in tuning)
        first = [(f / "log.jsonl").read_text().splitlines()[0] for f in finished[arm]]
        before = [json.loads(line)["knn"] for line in first]
        after = [runs.last_row(f, EPOCHS)["knn"] for f in finished[arm]]
        print(f"| {arm} | {tuned} | {len(after)} | {cells(before)} | {cells(after)} |")
    print("\n| arm | blocks | seeds | mIoU | untrained | pixel accuracy | majority class: mIoU |")
    print("|---|---|---|---|---|---|---|")
    for arm in ARMS:
        for setting in BLOCKS:
            files = [f / setting / "segment.json" for f in finished[arm]]
            results = [json.loads(f.read_text())["results"] for f in files if f.exists()]
            if results:
                majority, trained, untrained = zip(*(r.values() for r in results))
                print(
                    f"| {arm} | {setting} | {len(results)} | {cells([r['miou'] for r in trained])} "
                    f"| {cells([r['miou'] for r in untrained])} | "
                    f"{cells([r['accuracy'] for r in trained])} | {majority[0]['miou']:.1f} |"
                )


def main() -> None:
    p = runs.flags(__doc__, "runs/dino")
    p.add_argument("--camvid", type=Path, help="CamVid: {train,val,test}/{images,masks}")
    args = p.parse_args()
    if args.table:
        return table(args.table)
    if args.data is None or args.camvid is None:
        p.error("--data and --camvid are needed (or --table)")
    runs.make_folders(args.data, args.work, CLASSES)
    epochs = dict(tune=TUNING_EPOCHS, full=EPOCHS)
    logs = runs.tune_then_train(
        "train_ssl.py",
        args.work,
        SETTINGS,
        ARMS,
        LEARNING_RATES,
        SEEDS,
        epochs,
        best_rate,
        args.jobs,
    )
    for arm in ARMS:
        for seed in SEEDS:
            for setting in BLOCKS:
                segment(logs, args.camvid, arm, seed, setting)
    table(logs)


if __name__ == "__main__":
    main()
