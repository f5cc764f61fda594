"""Does a skipless network match a residual one on photographs, and with which init, how deep?

    python experiments/depths.py --data TINY --work runs/depths

TINY is Tiny-ImageNet as an image folder (train/<wnid>/*, val/<wnid>/*); the first twenty of its
classes in sorted order are used, at 32 px. Four arms (with skips, and without them from the
default, the paper's and the depth init) meet several settings (optimizer, depth). In each, every
arm is tuned in the same way on a held-back fifth of the training images: learning rates a factor
of three apart, from 1e-3 and 3e-3 on in both directions until the best has a worse one on either
side; in the first setting also a second scale of the position embedding at the best rate, and the
later settings keep the better scale (3 epochs, one seed). Then it is trained on all training images
for 5 epochs with three seeds and measured on val after the last one.

It can be interrupted: what is finished is read from its log, what is not is continued. The table
at the end is made from the logs alone, as is the picture of the learning curves. `--table DIR`
makes both from kept logs without training.
"""

import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import runs
from matplotlib.ticker import MaxNLocator

EPOCHS, TUNING_EPOCHS = 5, 3
COMMON_FLAGS = (
    "--model nano --image-size 32 --patch-size 8 --pool mean --batch-size 64 --warmup-epochs 0.5 "
    "--mixup 0 --cutmix 0 --drop-path 0 --workers 0"
).split()
ARMS = {
    "residual": "",
    "skipless-default": "--skipless --init default",
    "skipless-paper": "--skipless --init conditioned --alpha 2.0 --beta 0.6 --c 3.0",
    "skipless-depth": "--skipless --init depth --c 3.0",
}
SETTINGS = {  # in the order in which they are run
    "soap-12": "--opt soap --depth 12",
    "soap-24": "--opt soap --depth 24",
    "soap-4": "--opt soap --depth 4",
    "adamw-12": "--opt adamw --depth 12",
    "muon-12": "--opt muon --depth 12",
}
FIRST = next(iter(SETTINGS))
RATES = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2", "3e-2"]
FIRST_RATES = ["1e-3", "3e-3"]
POSITION_STDS = ["0.5", "1.0"]  # rates are tried with the first
SEEDS = [0, 1, 2]
CLASSES = 20


def tuned_choice(found: dict[tuple[str, str], dict]) -> tuple[str, str]:
    """(position std, learning rate) of the best tuning run.

    Runs that collapsed to one class have the same top-1; the lower loss and then the lower rate
    tells which way out is.
    """
    return max(found, key=lambda at: (found[at]["top1"], -found[at]["val_loss"], -float(at[1])))


def held_back(logs: Path, setting: str, arm: str) -> dict[tuple[str, str], dict]:
    """(position std, learning rate) -> last row of the log, of the finished tuning runs."""
    found = {}
    for std in POSITION_STDS:
        for lr in RATES:
            run = logs / f"tune/{setting}/{arm}-position{std}-lr{lr}"
            if row := runs.last_row(run, TUNING_EPOCHS):
                found[std, lr] = row
    return found


def tune(work: Path, setting: str, arm: str) -> None:
    """Leaves the runs that `held_back` reads: rates first, then the position embedding's scale."""
    logs = work / "runs"

    def once(std: str, lr: str) -> None:
        flags = [*COMMON_FLAGS, *SETTINGS[setting].split(), *ARMS[arm].split(), "--seed", "0"]
        flags += ["--data", str(work / "tune"), "--position-std", std, "--lr", lr]
        out = logs / f"tune/{setting}/{arm}-position{std}-lr{lr}"
        runs.train("train_cls.py", TUNING_EPOCHS, out, flags)

    std = POSITION_STDS[0] if setting == FIRST else tuned_choice(held_back(logs, FIRST, arm))[0]
    for lr in FIRST_RATES:
        once(std, lr)
    while True:
        found = {at: row for at, row in held_back(logs, setting, arm).items() if at[0] == std}
        at = RATES.index(tuned_choice(found)[1])
        beside = [lr for lr in RATES[max(at - 1, 0) : at + 2] if (std, lr) not in found]
        if not beside:
            break
        once(std, beside[0])
    if setting == FIRST:
        for other in POSITION_STDS[1:]:
            once(other, RATES[at])


def final_folder(logs: Path, setting: str, arm: str, seed: int) -> Path:
    std, lr = tuned_choice(held_back(logs, setting, arm))
    return logs / f"full/{setting}/{arm}-position{std}-lr{lr}-seed{seed}"


def final_run(work: Path, setting: str, arm: str, seed: int) -> tuple:
    """Arguments of `runs.train`."""
    std, lr = tuned_choice(held_back(work / "runs", setting, arm))
    flags = [*COMMON_FLAGS, *SETTINGS[setting].split(), *ARMS[arm].split(), "--seed", str(seed)]
    flags += ["--data", str(work / "full"), "--position-std", std, "--lr", lr]
    return "train_cls.py", EPOCHS, final_folder(work / "runs", setting, arm, seed), flags


def finished(logs: Path, setting: str, arm: str) -> list[list[dict]]:
    """The logs, row by row, of the seeds that were trained to the end."""
    if not held_back(logs, setting, arm):
        return []
    files = [final_folder(logs, setting, arm, seed) / "log.jsonl" for seed in SEEDS]
    rows = [[json.loads(line) for line in f.read_text().splitlines()] for f in files if f.exists()]
    return [log for log in rows if len(log) == EPOCHS]


def table(logs: Path) -> None:
    """Of the logs found; what has none is left out. Hours are those of the final runs."""
    columns = "setting, arm, held-back fifth, of runs, position std, lr, val top-1, range, seeds"
    columns = [*columns.split(", "), "images/s", "hours"]
    print(f"\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for setting in SETTINGS:
        for arm in ARMS:
            found = held_back(logs, setting, arm)
            if not found:
                continue
            std, lr = tuned_choice(found)
            cells = [setting, arm, f"{found[std, lr]['top1']:.1f}", str(len(found)), std, lr]
            if rows := [log[-1] for log in finished(logs, setting, arm)]:
                top1 = [row["top1"] for row in rows]
                cells += [f"{statistics.mean(top1):.1f}", f"{min(top1):.1f} .. {max(top1):.1f}"]
                cells += [
                    str(len(rows)),
                    f"{statistics.median(r['images_per_s'] for r in rows):.0f}",
                ]
                cells += [f"{sum(row['minutes'] for row in rows) / 60:.2f}"]
            else:
                cells += "-----"
            print(f"| {' | '.join(cells)} |")


def picture(logs: Path, file: Path) -> None:
    """Learning curves: val top-1 after each epoch, mean of the seeds and their range."""
    settings = [s for s in SETTINGS if any(finished(logs, s, arm) for arm in ARMS)]
    if not settings:
        return
    figure, axes = plt.subplots(
        1,
        len(settings),
        figsize=(3.6 * len(settings), 3.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, setting in zip(axes[0], settings):
        for number, arm in enumerate(ARMS):
            curves = [[row["top1"] for row in rows] for rows in finished(logs, setting, arm)]
            if not curves:
                continue
            epochs, points = range(1, EPOCHS + 1), list(zip(*curves))
            ax.plot(epochs, [statistics.mean(p) for p in points], color=f"C{number}")
            ax.fill_between(
                epochs, *zip(*[(min(p), max(p)) for p in points]), alpha=0.2, color=f"C{number}"
            )
        optimizer, depth = setting.split("-")
        ax.set_title(f"{optimizer}, {depth} blocks", fontsize=10)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("val top-1, %")
    handles = [plt.Line2D([], [], color=f"C{number}", label=arm) for number, arm in enumerate(ARMS)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
    print(file)


def main() -> None:
    p = runs.flags(__doc__, "runs/depths")
    p.add_argument(
        "--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="these alone [all]"
    )
    args = p.parse_args()
    if args.table is None and args.data is None:
        p.error("--data is needed (or --table)")
    logs = args.table or args.work / "runs"
    if args.table is None:
        runs.make_folders(args.data, args.work, CLASSES)
        for setting in (s for s in SETTINGS if s in args.only):
            if setting != FIRST and not all(held_back(logs, FIRST, arm) for arm in ARMS):
                p.error(f"{setting} takes over the position embeddings of {FIRST}: run that first")
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(tune, repeat(args.work), repeat(setting), ARMS))
            jobs = [final_run(args.work, setting, arm, seed) for seed in SEEDS for arm in ARMS]
            runs.train_all(jobs, args.jobs)
    elif not any(held_back(logs, setting, arm) for setting in SETTINGS for arm in ARMS):
        p.error(f"--table {logs}: no logs of this experiment in it")
    table(logs)
    picture(logs, logs / "curves.png")


if __name__ == "__main__":
    main()
