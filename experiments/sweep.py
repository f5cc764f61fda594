"""Which network learns most? Arms x depths x optimizers, each at its own best learning rate.

    python experiments/sweep.py --data TINY --classes 20 --depths 4 12 24 -- --model nano \\
        --image-size 32 --patch-size 8 --pool mean --batch-size 64 --warmup-epochs 0.5 \\
        --mixup 0 --cutmix 0 --drop-path 0 --workers 0
    python experiments/sweep.py --script train_ssl.py --data TINY --camvid CAMVID ... -- ...
    python experiments/sweep.py --table runs/sweep     tables and picture again, from the logs alone

DATA holds train/<class>/* and val/<class>/*. Words behind `--` go to the trainer.

Every arm is tuned alike: trained on four fifths of the training images and measured on the rest, at
learning rates a factor of three apart, until the best has a worse one on either side or three are
equal. Of equal ones the lower validation loss is better, then what a second seed says, then the
lower rate. Then it is trained on all training images at that rate, once a seed, and measured on val
after the last epoch. With --camvid a linear probe follows on the last block and on four
(`eval_dense.py segment`).

Each run is a process on one thread. They go in rounds: tuning runs, as long as an arm has a rate to
try; then the seeds; then the probes. Ctrl-C saves and ends them; the same command continues, and
what is finished stays. "steps" in the table: those an arm takes to the lower of its own and
residual's last value, as a multiple of residual's, read off the mean curves; of arms that train
longer (--skipless-epochs), to residual's last value.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what this project's files are in

import cli
import engine
import files
import networks
import pictures
from data import image_folders
from scenes import reported_split

ROOT = Path(cli.__file__).parent
METRICS = {"train_cls.py": "top1", "train_ssl.py": "knn"}
LADDER = [float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 3)]  # of rates
PROBES = ["last", "quarters"]  # blocks that the linear probe reads
SET_HERE = "--data --out --resume --eval --lr --seed --epochs --depth --opt --skipless --init "
SET_HERE += "--norm --attention --activation"


# --------------------------------------------------------------------------------------------------
# What is finished, and which rate to try next. The name of a run's folder says what it is:
# WORK/full/residual-12-soap-lr0.01-seed0; up to -lr that is its cell. Linear probes are inside.
# --------------------------------------------------------------------------------------------------


NAME = re.compile(r"(.+)-(\d+)-(\w+)-lr([\d.e+-]+)-seed(\d+)")


def parts(folder: Path) -> tuple[str, int, str, float, int]:
    """Arm, depth, optimizer, learning rate and seed."""
    arm, depth, opt, rate, seed = NAME.fullmatch(folder.name).groups()
    return arm, int(depth), opt, float(rate), int(seed)


def runs(work: Path, start: str) -> list[Path]:
    """The folders of runs in WORK whose path begins so; others, as copies aside, do not count."""
    return [folder for folder in sorted(work.glob(f"{start}*")) if NAME.fullmatch(folder.name)]


def epochs_of(args: argparse.Namespace, folder: Path) -> int:
    """Of a run as a whole."""
    if folder.parent.name == "tune":
        return args.tune_epochs
    longer = parts(folder)[0].startswith("skipless") and args.skipless_epochs
    return longer or args.epochs


def log_of(args: argparse.Namespace, folder: Path) -> list[dict] | None:
    """The rows of a finished run, none if it diverged; None of a run that is not finished."""
    if (folder / "diverged.txt").exists():
        return []
    rows = files.read_log(folder / "log.jsonl")
    return rows if rows and rows[-1]["epoch"] == epochs_of(args, folder) else None


def tuning_logs(args: argparse.Namespace, cell: str) -> dict[float, list[list[dict]]]:
    """Learning rate -> logs, by seed, of the cell's finished tuning runs."""
    found = {}
    for folder in runs(args.work, f"tune/{cell}-lr"):
        if (log := log_of(args, folder)) is not None:
            found.setdefault(parts(folder)[3], []).append(log)
    return found


def worth(logs: list[list[dict]], metric: str) -> tuple[float, float]:
    """The last value, and less the last loss, as means over the seeds."""
    last = [log[-1] if log else {metric: -math.inf} for log in logs]  # [] diverged
    return mean(row[metric] for row in last), -mean(row.get("val_loss", 0) for row in last)


def diverges(logs: list[list[dict]], metric: str) -> bool:
    return worth(logs, metric)[0] == -math.inf


def best_rate(logs: dict[float, list[list[dict]]], metric: str) -> float:
    return max(logs, key=lambda rate: (worth(logs[rate], metric), -rate))


def next_runs(
    logs: dict[float, list[list[dict]]], metric: str, first: list[float]
) -> list[tuple[float, int]]:
    """(rate, seed) of the runs to make next: at the rates to begin with, then one beyond the end
    where the best is, at last a second seed for the best where they are equal."""
    if missing := [rate for rate in first if rate not in logs]:
        return [(rate, 0) for rate in missing]
    worths = {rate: worth(of_rate, metric) for rate, of_rate in logs.items()}
    best = best_rate(logs, metric)
    learns = not diverges(logs[best], metric)
    if learns and len(logs) > 2 and len(set(worths.values())) == 1:
        return []  # three rates, one result: it does not depend on the rate
    below = [rate for rate in LADDER if rate < best == min(logs)]
    above = [rate for rate in LADDER if rate > best == max(logs)]
    equal = [rate for rate in sorted(logs) if learns and worths[rate] == worths[best]]
    again = [(rate, 1) for rate in equal if len(equal) > 1 == len(logs[rate])]
    return [(rate, 0) for rate in below[-1:] + above[:1]] or again


# --------------------------------------------------------------------------------------------------
# Doing it
# --------------------------------------------------------------------------------------------------


def training(args: argparse.Namespace, folder: Path) -> list:
    """The command of a tuning or final run."""
    arm, depth, opt, rate, seed = parts(folder)
    part = folder.parent.name
    words = [args.script, "--data", args.work / "images" / part]
    if (folder / "last.pt").exists():
        return [*words, "--resume", folder / "last.pt"]
    words += ["--out", folder, "--epochs", epochs_of(args, folder), "--lr", rate, "--seed", seed]
    words += ["--depth", depth, "--opt", opt, *args.flags]
    arm, varied = networks.parts_of(arm)
    for name, part in varied.items():
        words += [f"--{name}", part]
    return words if arm == "residual" else [*words, "--skipless", "--init", arm.split("-")[1]]


def probe(args: argparse.Namespace, folder: Path) -> list:
    """The command of a linear probe on the tokens of the finished run that its folder is in."""
    _, depth, *_ = parts(folder.parent)
    quarters = sorted({-(-depth * i // 4) for i in (1, 2, 3, 4)})
    words = ["eval_dense.py", "segment", folder.parent / "last.pt", "--data", args.camvid]
    words += ["--ignore", 11, "--epochs", 10, "--out", folder]
    return [*words, "--blocks", *(quarters if folder.name == "quarters" else [depth])]


def start(args: argparse.Namespace, folder: Path) -> subprocess.Popen:
    script, *words = (probe if folder.name in PROBES else training)(args, folder)
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    # A session of its own: Ctrl-C in a terminal would reach it beside the signal that the sweep
    # sends, and on the second a trainer does not save.
    how = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    files.make_folder(folder)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **how)


def result_of(args: argparse.Namespace, folder: Path) -> str | None:
    """What a finished run came to, in a few words."""
    if (folder / "segment.json").exists():
        return "measured"
    log = log_of(args, folder)
    if log is None:
        return None
    return f"{args.metric} {log[-1][args.metric]:.1f}" if log else "diverged"


def judged(args: argparse.Namespace, folder: Path, code: int) -> str:
    """`result_of` a run that ended; one without a result ends the sweep."""
    last = ["no output", *(folder / "output.txt").read_text().strip().splitlines()][-1]
    if code == 1 and last.startswith("error: ") and "--lr" in last:  # something was not finite
        (folder / "diverged.txt").write_text(last + "\n")
    elif code:
        raise UserError(f"{folder} ended with code {code}: {last.removeprefix('error: ')}", code=1)
    if result := result_of(args, folder):
        return result
    raise UserError(f"{folder}: the run ended well, but left no result; remove this folder", code=1)


def run_all(args: argparse.Namespace, folders: list[Path], asked: list[int]) -> None:
    """Those runs that have no result yet, args.jobs at a time; prints a line as each ends.

    asked: signals that came in.
    """
    waiting = [x for x in dict.fromkeys(folders) if result_of(args, x) is None]
    running, number, done = {}, len(waiting), 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                folder = waiting.pop(0)
                running[folder] = start(args, folder)
            time.sleep(0.1)
            for folder in [x for x, process in running.items() if process.poll() is not None]:
                result = judged(args, folder, running.pop(folder).returncode)
                done, name = done + 1, folder.relative_to(args.work)
                engine.say(f"run {done} of {number}  {name}  {result}")
            if asked:
                raise UserError("interrupted; the same command continues", code=128 + asked[0])
    finally:
        for process in running.values():
            process.terminate()  # trainers save
        for process in running.values():
            process.wait()


def work_through(args: argparse.Namespace, cells: list[str]) -> None:
    """Round after round: tuning until no cell has a rate left to try, final runs, linear probes."""
    asked, final = [], []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: asked.append(number))
    while tuning := [
        args.work / f"tune/{cell}-lr{rate:g}-seed{seed}"
        for cell in cells
        for rate, seed in next_runs(tuning_logs(args, cell), args.metric, args.rates)
    ]:
        run_all(args, tuning, asked)
    for cell in cells:
        logs = tuning_logs(args, cell)
        best = best_rate(logs, args.metric)
        if not diverges(logs[best], args.metric):  # else it does at every rate
            final += [args.work / f"full/{cell}-lr{best:g}-seed{seed}" for seed in args.seeds]
    run_all(args, final, asked)
    trained = [folder for folder in final if log_of(args, folder)]
    if args.camvid:
        run_all(args, [folder / blocks for folder in trained for blocks in PROBES], asked)


def prepare(args: argparse.Namespace) -> None:
    """WORK/sweep.json, which says what all runs in WORK share, and links to the images:

    WORK/images/full/{train,val} to the first classes of DATA; WORK/images/tune/{train,val} to their
    training images, every fifth of a class in val.
    """
    data, images = args.data.absolute(), args.work / "images"
    train, _ = image_folders(str(data), check=False)
    names, links, seen = train.classes[: args.classes], {}, Counter()
    if len(names) < (args.classes or 0):
        raise UserError(f"--classes {args.classes}: --data {args.data} has {len(names)}")
    for name in names:
        for split in ("train", "val"):
            links[images / "full" / split / name] = data / split / name
    for path, label in train.samples:
        if label < len(names):
            part = "train" if seen[label] % 5 else "val"
            links[images / "tune" / part / Path(path).relative_to(train.root)] = Path(path)
            seen[label] += 1

    shared = "script classes tune_epochs epochs skipless_epochs flags".split()
    facts = {name: vars(args)[name] for name in shared}
    kept = args.work / "sweep.json"
    before = json.loads(kept.read_text()) if kept.exists() else facts
    for name in facts:
        if before.get(name) != facts[name]:
            found = f"{name} {before.get(name)}, not {facts[name]}"
            raise UserError(f"--work {args.work} has runs with {found}")
    files.make_folder(args.work)
    files.write_atomically(kept, lambda temporary: temporary.write_text(json.dumps(facts)))
    had = {x for x in images.rglob("*") if x.is_symlink()}
    # others, or with the first run begun more: not what that was trained on
    if had - set(links) or ((args.work / "tune").exists() and had and had != set(links)):
        others = min(had ^ set(links))
        where = f"--work {args.work} has links to images that are no longer the same part of --data"
        raise UserError(f"{where}, as {others}; name another folder")
    for place, target in links.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(place):
            place.symlink_to(target)
        elif place.resolve() != target.resolve():
            raise UserError(f"--work {args.work} has links to another --data; name another folder")


# --------------------------------------------------------------------------------------------------
# Tables and picture, from the logs alone
# --------------------------------------------------------------------------------------------------


def curve(logs: list[list[dict]], metric: str) -> np.ndarray:
    """(4, measured epochs): the epoch, mean over the runs, lowest, highest."""
    measured = [[row for row in log if row.get(metric) is not None] for log in logs]
    y = np.array([[row[metric] for row in log] for log in measured])
    return np.stack([[row["epoch"] for row in measured[0]], y.mean(0), y.min(0), y.max(0)])


def steps_multiple(own: np.ndarray, residual: np.ndarray | None) -> str:
    """Steps to the lower of two curves' last values, as a multiple of the second's; of a longer
    curve, to the second's last value."""
    if residual is None:
        return "-"
    target, longer = residual[1, -1], own[0, -1] / residual[0, -1]
    if longer == 1:
        target = min(own[1, -1], target)
    elif own[1].max() < target:
        return f"> {longer:g}"
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


def tuning_curve(logs: dict[float, list[list[dict]]], metric: str) -> np.ndarray:
    """(4, rates that did not diverge): the rate, mean of the last values there, lowest, highest."""
    kept = {rate: x for rate, x in sorted(logs.items()) if not diverges(x, metric)}
    values = {rate: [log[-1][metric] for log in of_rate] for rate, of_rate in kept.items()}
    return np.array([[rate, mean(x), min(x), max(x)] for rate, x in values.items()]).T


def draw(path: Path, curves: dict[tuple, np.ndarray], title: str, against: str = "epoch") -> None:
    """A panel a depth and optimizer, a line an arm: mean over the seeds and their range.

    curves: (optimizer, depth, arm) -> `curve`, or what it is against, mean, lowest, highest.
    """
    panels = sorted({(opt, depth) for opt, depth, _ in curves})
    size = dict(figsize=(max(4.2 * len(panels), 5.6), 3.8), layout="constrained")
    figure, axes = pictures.plt.subplots(1, len(panels), sharey=True, squeeze=False, **size)
    lines, arms = {}, list(dict.fromkeys(arm for _, _, arm in curves))
    for (opt, depth, arm), (x, middle, lowest, highest) in curves.items():
        ax, colour = axes[0][panels.index((opt, depth))], pictures.colour_of(arm, arms)
        [lines[arm]] = ax.plot(x, middle, color=colour, marker=".")
        ax.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        ax.set_xlabel(against)
        if against == "epoch":
            ax.xaxis.set_major_locator(pictures.MaxNLocator(integer=True))
        else:
            ax.set_xscale("log")
        pictures.tidy(ax, f"{title}, {depth} blocks, {opt}")
    columns = 4 if len(panels) > 1 else 2
    below = dict(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    figure.legend(lines.values(), lines, **below)
    pictures.save_figure(figure, path)
    print(path)


def probe_rows(args: argparse.Namespace, cell: list, start: str) -> list[list]:
    """mIoU in percent, from what `eval_dense.py segment` wrote of the runs whose name starts so."""
    rows = []
    for blocks in PROBES:
        paths = [folder / blocks / "segment.json" for folder in runs(args.work, start)]
        read = [json.loads(path.read_text()) for path in paths if path.exists()]
        if scores := [record["results"].values() for record in read]:
            # of the commonest class everywhere, of the backbone, of the same before training
            one_class, trained, untrained = ([x["miou"] for x in kind] for kind in zip(*scores))
            ends = [f"{mean(x):.1f}" for x in (untrained, one_class)]
            rows.append([*cell, blocks, *spread(trained), len(trained), *ends])
    return rows


def show(args: argparse.Namespace) -> None:
    """table.md, curves.png, rates.png (what was held back, against the learning rate) and, of
    probes, probes.md in WORK: of all cells found there."""
    names = [parts(folder) for folder in runs(args.work, "tune/")]
    rows, probes, curves, rates, metric = [], [], {}, {}, args.metric
    # of the arms residual comes first
    for opt, depth, arm in sorted({(opt, depth, arm) for arm, depth, opt, *_ in names}):
        tuned = tuning_logs(args, f"{arm}-{depth}-{opt}")
        if not tuned or diverges(tuned[rate := best_rate(tuned, metric)], metric):
            continue
        rates[opt, depth, arm] = tuning_curve(tuned, metric)
        row = [arm, depth, opt, f"{worth(tuned[rate], metric)[0]:.1f}", f"{rate:g}"]
        start = f"full/{arm}-{depth}-{opt}-lr{rate:g}-seed"
        logs = [log_of(args, folder) for folder in runs(args.work, start)]
        if finished := [log for log in logs if log]:
            diverged = logs.count([])
            curves[opt, depth, arm] = curve(finished, metric)
            row += spread([log[-1][metric] for log in finished])
            row += [f"{len(finished)} ({diverged} diverged)" if diverged else len(finished)]
            row += [steps_multiple(curves[opt, depth, arm], curves.get((opt, depth, "residual")))]
        rows.append(row)
        probes += probe_rows(args, [arm, depth, opt], start)
    if not rows:
        raise UserError(f"{args.work} holds no finished tuning run")
    columns = "arm, blocks, optimizer, held back, rate, val, range, seeds, steps"
    write_table(args.work / "table.md", columns, rows)
    if probes:
        columns = "arm, blocks, optimizer, read, mIoU, range, seeds, untrained, one class"
        write_table(args.work / "probes.md", columns, probes)
    title = dict(top1="top-1, %", knn="k-NN, %")[metric]
    draw(args.work / "rates.png", rates, f"held back: {title}", against="learning rate")
    if curves:
        draw(args.work / "curves.png", curves, title)


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def rate(text: str) -> float:
    return float(f"{cli.positive(text):g}")  # as in the names of folders


def parse_arguments(words: list[str]) -> argparse.Namespace:
    p = cli.Parser(__doc__)
    add = p.add_argument
    add("--script", choices=list(METRICS), default="train_cls.py", help="[train_cls.py]")
    add("--data", type=cli.place, help="folder of images")
    add("--camvid", type=cli.place, help="folder of images and masks, for eval_dense.py")
    add("--classes", type=cli.count, help="the first so many, in sorted order [all]")
    add("--work", type=cli.place, default=Path("runs/sweep"), help="where runs go [runs/sweep]")
    add(
        "--arms",
        nargs="+",
        type=networks.arm,
        default=networks.ARMS,
        help="[all]; residual+dyt and the like",
    )
    add("--depths", nargs="+", type=cli.count, default=[12], help="numbers of blocks [12]")
    add("--opts", nargs="+", choices=["soap", "adamw"], default=["soap"], help="[soap]")
    add("--rates", nargs="+", type=rate, default=[1e-3, 3e-3], help="to begin with [1e-3 3e-3]")
    add("--seeds", nargs="+", type=cli.count_or_0, default=[0, 1, 2], help="[0 1 2]")
    add("--tune-epochs", type=cli.count, default=3, help="of a tuning run [3]")
    add("--epochs", type=cli.count, default=5, help="of a final run [5]")
    add("--skipless-epochs", type=cli.count, help="of a final run without skips [--epochs]")
    add("--jobs", type=cli.count, default=os.cpu_count(), help="runs at a time [cores]")
    add("--table", type=cli.place, metavar="WORK", help="show what is there, train nothing")
    cut = words.index("--") if "--" in words else len(words)
    args = p.parse_args(words[:cut])
    args.flags = words[cut + 1 :]
    for word in args.flags:
        if word.split("=")[0] in SET_HERE.split():
            raise UserError(f"{word} behind -- is for the sweep to set; leave it out")
    if not (args.data or args.table):
        raise UserError(
            "--data is needed, a folder with train/<class>/* and val/<class>/*; or --table"
        )
    for split in ("train", reported_split(args.camvid)) if args.camvid else ():
        for kind in ("images", "masks"):
            if not (args.camvid / split / kind).is_dir():
                raise UserError(f"--camvid {args.camvid}: no folder {split}/{kind} in it")
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.table:
        args.work = args.table
        if not (kept := args.work / "sweep.json").is_file():
            raise UserError(f"--table {args.work}: no sweep.json in it, so no runs of this script")
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
