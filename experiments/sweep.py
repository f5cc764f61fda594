"""Which network learns most? Arms x depths x optimizers, each at its own best learning rate.

    python experiments/sweep.py --data TINY --classes 20 --depths 4 12 24 -- --model nano \\
        --image-size 32 --patch-size 8 --pool mean --batch-size 64 --warmup-epochs 0.5 \\
        --mixup 0 --cutmix 0 --drop-path 0 --workers 0
    python experiments/sweep.py --script train_ssl.py --data TINY --camvid CAMVID ... -- ...
    python experiments/sweep.py --table runs/sweep     tables and picture again, from the logs alone

DATA holds train/<class>/* and val/<class>/*. Words behind `--` go to the trainer.

Every arm is tuned alike: trained on four fifths of the training images and measured on the rest, at
learning rates a factor of three apart, until the best has a worse one on either side (of equal ones
the lower validation loss, then the lower rate is better). Then it is trained on all training images
at that rate, once a seed, and measured on val after the last epoch. With --camvid a linear probe
follows on the last block and on four (`eval_dense.py segment`).

Each run is a process on one thread. Ctrl-C saves and ends them; the same command continues, and
what is finished stays. "steps" in the table: those an arm takes to the lower of its own and
residual's last value, as a multiple of residual's, read off the mean curves.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what this project's files are in

import cli
import files
import pictures
from data import image_folder
from networks import ARMS

ROOT = Path(cli.__file__).parent
METRICS = {"train_cls.py": "top1", "train_ssl.py": "knn"}
LADDER = [float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 3)]  # of rates
TUNING_SEED = 0
PROBES = ["last", "quarters"]  # blocks that the linear probe reads
SET_HERE = "--data --out --resume --eval --lr --seed --epochs --depth --opt --skipless --init"


class Run(NamedTuple):
    """One process: its folder in WORK, its command, and what it costs in epochs times blocks."""

    name: str
    words: tuple
    cost: float


# --------------------------------------------------------------------------------------------------
# What is finished, and what to do next. A cell is an arm, depth and optimizer: residual-12-soap
# --------------------------------------------------------------------------------------------------


def log_of(args: argparse.Namespace, name: str) -> list[dict] | None:
    """The rows of a finished run, none if it diverged; None of a run that is not finished."""
    if (args.work / name / "diverged.txt").exists():
        return []
    rows = files.read_log(args.work / name / "log.jsonl")
    epochs = args.tune_epochs if name.startswith("tune") else args.epochs
    return rows if rows and rows[-1]["epoch"] == epochs else None


def tuning_logs(args: argparse.Namespace, cell: str) -> dict[float, list[dict]]:
    """Learning rate -> log, of the cell's finished tuning runs."""
    start, end = f"tune/{cell}-lr", f"-seed{TUNING_SEED}"
    names = [str(path.relative_to(args.work)) for path in args.work.glob(f"{start}*{end}")]
    logs = {float(n.removeprefix(start).removesuffix(end)): log_of(args, n) for n in names}
    return {rate: log for rate, log in sorted(logs.items()) if log is not None}


def best_rate(logs: dict[float, list[dict]], metric: str) -> float:
    def worth(rate: float) -> tuple:
        last = logs[rate][-1] if logs[rate] else {metric: -math.inf}  # diverged
        return last[metric], -last.get("val_loss", 0), -rate

    return max(logs, key=worth)


def next_rates(logs: dict[float, list[dict]], metric: str, first: list[float]) -> list[float]:
    """The rates to try next: those to begin with, then one beyond the end where the best is."""
    if missing := [rate for rate in first if rate not in logs]:
        return missing
    best = best_rate(logs, metric)
    below = [rate for rate in LADDER if rate < best == min(logs)]
    above = [rate for rate in LADDER if rate > best == max(logs)]
    return below[-1:] + above[:1]


def training(args: argparse.Namespace, part: str, cell: str, rate: float, seed: int) -> Run:
    """part: tune or full."""
    name, (arm, depth, opt) = f"{part}/{cell}-lr{rate:g}-seed{seed}", cell.rsplit("-", 2)
    epochs, folder = args.epochs if part == "full" else args.tune_epochs, args.work / name
    words = [args.script, "--data", args.work / "images" / part]
    if (folder / "last.pt").exists():
        words += ["--resume", folder / "last.pt"]
    else:
        words += ["--out", folder, "--epochs", epochs, "--lr", rate, "--seed", seed]
        words += ["--depth", depth, "--opt", opt, *args.flags]
        words += [] if arm == "residual" else ["--skipless", "--init", arm.split("-")[1]]
    return Run(name, tuple(words), int(depth) * epochs)


def probe(args: argparse.Namespace, trained: str, depth: int, blocks: str) -> Run:
    """A linear probe on the tokens of a finished run; blocks: one of PROBES."""
    quarters = {-(-depth * i // 4) for i in (1, 2, 3, 4)}
    read = sorted(quarters) if blocks == "quarters" else [depth]
    name = f"{trained}/{blocks}"
    words = ["eval_dense.py", "segment", args.work / trained / "last.pt", "--data", args.camvid]
    words += ["--ignore", 11, "--epochs", 10, "--blocks", *read, "--out", args.work / name]
    return Run(name, tuple(words), 2 * depth)  # about the time of two epochs


def missing_runs(args: argparse.Namespace, cell: str) -> tuple[list[Run], list[Run]]:
    """(what can be started now, what is known to follow) of a cell."""
    logs = tuning_logs(args, cell)
    rates = next_rates(logs, args.metric, args.rates)
    now = [training(args, "tune", cell, rate, TUNING_SEED) for rate in rates]
    best = best_rate(logs, args.metric) if logs else 0.0
    if not rates and not logs[best]:
        return [], []  # it diverges at every rate
    later = []
    for run in [training(args, "full", cell, best, seed) for seed in args.seeds]:
        log = None if rates else log_of(args, run.name)
        if log is None:
            (later if rates else now).append(run)
        for blocks in PROBES if args.camvid and log != [] else ():
            look = probe(args, run.name, int(cell.split("-")[-2]), blocks)
            if not (args.work / look.name / "segment.json").exists():
                (now if log else later).append(look)
    return now, later


# --------------------------------------------------------------------------------------------------
# Doing it
# --------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, cells: list[str]) -> tuple[list[Run], list[Run]]:
    """`missing_runs` of all cells."""
    each = [missing_runs(args, cell) for cell in cells]
    return [run for now, _ in each for run in now], [run for _, later in each for run in later]


def start(args: argparse.Namespace, run: Run) -> subprocess.Popen:
    script, *words = run.words
    files.make_folder(args.work / run.name)
    with open(args.work / run.name / "output.txt", "a") as output:
        # A session of its own: Ctrl-C in a terminal would reach it beside the signal that the sweep
        # sends, and on the second a trainer does not save.
        return subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, words)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def outcome(args: argparse.Namespace, run: Run, code: int) -> str:
    """What became of a run that ended, in a few words; what is no result ends the sweep."""
    folder = args.work / run.name
    last = ["no output", *(folder / "output.txt").read_text().strip().splitlines()][-1]
    if code == 1 and last.startswith("error: ") and "--lr" in last:  # something was not finite
        (folder / "diverged.txt").write_text(last + "\n")
        return "diverged"
    if code:
        cli.fail(f"{folder} ended with code {code}: {last.removeprefix('error: ')}", code=1)
    if (folder / "segment.json").exists():
        return "measured"
    if log := log_of(args, run.name):
        return f"{args.metric} {log[-1][args.metric]:.1f}"
    cli.fail(f"{folder}: the run ended well, but left no result; remove this folder", code=1)


def first_to_end(running: dict[Run, subprocess.Popen], asked: list[int]) -> Run:
    while True:
        for run, process in running.items():
            if process.poll() is not None:
                return run
        if asked:
            cli.fail("interrupted; the same command continues", code=128 + asked[0])
        time.sleep(0.1)


def work_through(args: argparse.Namespace, cells: list[str]) -> None:
    """Every run of every cell, args.jobs at a time; prints a line as each ends."""
    asked, running, done, cost, begun = [], {}, 0, 0.0, time.time()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    now, later = plan(args, cells)
    try:
        while True:
            waiting = [run for run in now if run.name not in {r.name for r in running}]
            for run in waiting[: args.jobs - len(running)]:
                running[run] = start(args, run)
            if not running:
                return
            run = first_to_end(running, asked)
            result = outcome(args, run, running.pop(run).returncode)
            now, later = plan(args, cells)
            done, cost, left = done + 1, cost + run.cost, now + later
            minutes = (time.time() - begun) / 60 * sum(r.cost for r in left) / cost
            count = f"run {done} of {done + len(left)}"  # the second grows as rates are added
            print(f"{count}  {run.name}  {result}  about {minutes:.0f} min to go", flush=True)
    finally:
        for process in running.values():
            process.terminate()  # trainers save
        for process in running.values():
            process.wait()


def link_images(args: argparse.Namespace) -> dict[Path, str]:
    """Links to make -> files: WORK/images/full/{train,val} with the first classes of DATA, and
    WORK/images/tune/{train,val} with its training images, every fifth of a class in val."""
    sets = {split: image_folder(str(args.data.absolute()), split) for split in ("train", "val")}
    names, links, images = sets["train"].classes[: args.classes], {}, args.work / "images"
    if len(names) < (args.classes or 0):
        cli.fail(f"--classes {args.classes}: --data {args.data} has {len(names)}")
    for split, files_of in sets.items():
        for name in names:
            label = files_of.class_to_idx.get(name)
            paths = [path for path, its_label in files_of.samples if its_label == label]
            if len(paths) < 2:
                cli.fail(f"--data {args.data}: {name} needs two images in train/ and two in val/")
            for number, path in enumerate(paths):
                file = Path(path).relative_to(files_of.root)
                links[images / "full" / split / file] = path
                if split == "train":
                    links[images / "tune" / ("train" if number % 5 else "val") / file] = path
    return links


def prepare(args: argparse.Namespace) -> None:
    """WORK with the links to the images, and sweep.json, which says what all runs in it share."""
    links = link_images(args)
    facts = {x: vars(args)[x] for x in ("script", "classes", "tune_epochs", "epochs", "flags")}
    kept = args.work / "sweep.json"
    before = json.loads(kept.read_text()) if kept.exists() else facts
    for name in facts:
        if before[name] != facts[name]:
            cli.fail(f"--work {args.work} has runs with {name} {before[name]}, not {facts[name]}")
    files.make_folder(args.work)
    files.write_atomically(kept, lambda temporary: temporary.write_text(json.dumps(facts)))
    for place, path in links.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(path)
        elif os.readlink(place) != path:
            cli.fail(f"--work {args.work} has links to another --data; name another folder")


# --------------------------------------------------------------------------------------------------
# Tables and picture, from the logs alone
# --------------------------------------------------------------------------------------------------


def curve(logs: list[list[dict]], metric: str) -> np.ndarray:
    """(4, measured epochs): the epoch, mean over the runs, lowest, highest."""
    measured = [[row for row in log if row.get(metric) is not None] for log in logs]
    y = np.array([[row[metric] for row in log] for log in measured])
    return np.stack([[row["epoch"] for row in measured[0]], y.mean(0), y.min(0), y.max(0)])


def steps_multiple(own: np.ndarray, residual: np.ndarray | None) -> str:
    """Steps to the lower of two curves' last values, as a multiple of the second's."""
    if residual is None:
        return "-"
    target = min(own[1, -1], residual[1, -1])
    reached = [np.interp(target, np.maximum.accumulate(c[1]), c[0]) for c in (own, residual)]
    return f"{reached[0] / reached[1]:.2f}" if reached[1] else "-"


def spread(values: list[float]) -> list[str]:
    return [f"{mean(values):.1f}", f"{min(values):.1f} .. {max(values):.1f}"]


def write_table(path: Path, columns: str, rows: list[list]) -> None:
    columns = columns.split(", ")
    rows = [row + ["-"] * (len(columns) - len(row)) for row in rows]
    lines = [" | ".join(map(str, row)) for row in [columns, ["---"] * len(columns), *rows]]
    text = "".join(f"| {line} |\n" for line in lines)
    files.write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"\n{text}{path}")


def draw(path: Path, curves: dict[tuple, np.ndarray], title: str) -> None:
    """A panel a depth and optimizer, a line an arm: mean over the seeds and their range.

    curves: (optimizer, depth, arm) -> `curve`.
    """
    panels, arms = sorted({at[:2] for at in curves}), sorted({at[2] for at in curves})
    size = dict(figsize=(4.2 * len(panels), 3.6), layout="constrained")
    figure, axes = pictures.plt.subplots(1, len(panels), sharey=True, squeeze=False, **size)
    lines = {}
    for (opt, depth, arm), (epochs, middle, lowest, highest) in curves.items():
        ax, colour = axes[0][panels.index((opt, depth))], pictures.colour_of(arm, arms)
        [lines[arm]] = ax.plot(epochs, middle, color=colour, marker=".")
        ax.fill_between(epochs, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(pictures.MaxNLocator(integer=True))
        pictures.tidy(ax, f"{title}, {depth} blocks, {opt}")
    style = dict(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.legend(lines.values(), lines, **style)
    pictures.save_figure(figure, path)
    print(path)


def probe_rows(args: argparse.Namespace, row: list, start: str) -> list[list]:
    """mIoU in percent, from what `eval_dense.py segment` wrote of the runs whose name starts so."""
    rows = []
    for blocks in PROBES:
        paths = args.work.glob(f"{start}*/{blocks}/segment.json")
        if scores := [json.loads(path.read_text())["results"].values() for path in paths]:
            # of the commonest class everywhere, of the backbone, of the same before training
            one_class, trained, untrained = ([x["miou"] for x in kind] for kind in zip(*scores))
            ends = [f"{mean(x):.1f}" for x in (untrained, one_class)]
            rows.append([*row, blocks, *spread(trained), len(trained), *ends])
    return rows


def show(args: argparse.Namespace) -> None:
    """table.md, curves.png and, of probes, probes.md in WORK: of all cells found there."""
    names = {path.name.split("-lr")[0] for path in args.work.glob("tune/*-lr*-seed*")}
    cells = [(opt, int(depth), arm) for arm, depth, opt in (name.rsplit("-", 2) for name in names)]
    rows, probes, curves, metric = [], [], {}, args.metric
    for opt, depth, arm in sorted(cells):  # of the arms residual comes first
        cell = f"{arm}-{depth}-{opt}"
        tuned = tuning_logs(args, cell)
        if not any(tuned.values()):
            continue
        rate = best_rate(tuned, metric)
        row = [arm, depth, opt, f"{tuned[rate][-1][metric]:.1f}", f"{rate:g}"]
        start = f"full/{cell}-lr{rate:g}-seed"
        paths = args.work.glob(f"{start}*")
        logs = [log_of(args, str(path.relative_to(args.work))) for path in paths]
        if finished := [log for log in logs if log]:
            last, diverged = [log[-1] for log in finished], logs.count([])
            curves[opt, depth, arm] = own = curve(finished, metric)
            row += spread([r[metric] for r in last])
            row += [f"{len(last)} ({diverged} diverged)" if diverged else len(last)]
            row += [steps_multiple(own, curves.get((opt, depth, "residual")))]
            row += [f"{median(r['images_per_s'] for r in last):.0f}"]
            row += [f"{sum(r['minutes'] for r in last) / 60:.2f}"]
        rows.append(row)
        probes += probe_rows(args, [arm, depth, opt], start)
    if not rows:
        cli.fail(f"{args.work} holds no finished tuning run")
    columns = "arm, blocks, optimizer, held back, rate, val, range, seeds, steps, images/s, hours"
    write_table(args.work / "table.md", columns, rows)
    if probes:
        columns = "arm, blocks, optimizer, read, mIoU, range, seeds, untrained, one class"
        write_table(args.work / "probes.md", columns, probes)
    if curves:
        draw(args.work / "curves.png", curves, dict(top1="top-1, %", knn="k-NN, %")[metric])


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def rate(text: str) -> float:
    return float(f"{cli.positive(text):g}")  # as in the names of folders


def parse_arguments(words: list[str]) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind, allow_abbrev=False)
    p.error, add = cli.fail, p.add_argument  # one line, like every other mistake
    add("--script", choices=list(METRICS), default="train_cls.py", help="[train_cls.py]")
    add("--data", type=Path, help="folder of images")
    add("--camvid", type=Path, help="folder of images and masks, for eval_dense.py")
    add("--classes", type=cli.count, help="the first so many, in sorted order [all]")
    add("--work", type=Path, default=Path("runs/sweep"), help="where runs go [runs/sweep]")
    add("--arms", nargs="+", choices=ARMS, default=ARMS, help="[all]")
    add("--depths", nargs="+", type=cli.count, default=[12], help="numbers of blocks [12]")
    add("--opts", nargs="+", choices=["soap", "adamw"], default=["soap"], help="[soap]")
    add("--rates", nargs="+", type=rate, default=[1e-3, 3e-3], help="to begin with [1e-3 3e-3]")
    add("--seeds", nargs="+", type=cli.count_or_0, default=[0, 1, 2], help="[0 1 2]")
    add("--tune-epochs", type=cli.count, default=3, help="of a tuning run [3]")
    add("--epochs", type=cli.count, default=5, help="of a final run [5]")
    add("--jobs", type=cli.count, default=os.cpu_count(), help="runs at a time [cores]")
    add("--table", type=Path, metavar="WORK", help="show what is there, train nothing")
    cut = words.index("--") if "--" in words else len(words)
    args = p.parse_args(words[:cut])
    args.flags = words[cut + 1 :]
    for word in args.flags:
        if word.split("=")[0] in SET_HERE.split():
            cli.fail(f"{word} behind -- is for the sweep to set; leave it out")
    if not (args.data or args.table):
        cli.fail("--data is needed, a folder with train/<class>/* and val/<class>/*; or --table")
    for part in ("train/images", "train/masks") if args.camvid else ():
        if not (args.camvid / part).is_dir():
            cli.fail(f"--camvid {args.camvid}: no folder {part} in it")
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.table:
        args.work = args.table
        if not (kept := args.work / "sweep.json").is_file():
            cli.fail(f"--table {args.work}: no sweep.json in it, so no runs of this script")
        vars(args).update(json.loads(kept.read_text()))
    args.metric = METRICS[args.script]
    if not args.table:
        every = [(arm, d, opt) for opt in args.opts for d in args.depths for arm in args.arms]
        prepare(args)
        work_through(args, [f"{arm}-{d}-{opt}" for arm, d, opt in every])
    show(args)


if __name__ == "__main__":
    with cli.one_line_errors("use fewer --jobs"):
        main()
