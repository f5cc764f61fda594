"""Which network learns most? Compares arms, each at its own best learning rate.

    python experiments/sweep.py --data TINY --classes 20 --depths 4 12 24 -- --model nano \\
        --image-size 32 --patch-size 8 --pool mean --batch-size 64 --warmup-epochs 0.5 \\
        --mixup 0 --cutmix 0 --drop-path 0 --workers 0
    python experiments/sweep.py --script train_ssl.py --data TINY --camvid CAMVID ... -- ...
    python experiments/sweep.py --table runs/sweep     tables and pictures again, from logs alone

An arm is a network by name (`beyond/arms.py`). DATA holds train/<class>/* and val/<class>/*. What
stands behind `--` goes to the trainer.

All arms are tuned alike. A tuning run trains on four fifths of the training images and is measured
on the fifth held back. Learning rates are a factor of three apart, and more are tried until the
best one has a worse one on either side, or three give equal results. Between equal results the
lower validation loss decides, then a second seed, then the lower rate. Final runs train on all
training images at the best rate, once per seed, and are measured on val after the last epoch. With
--camvid, linear probes (`eval_dense.py segment`) of the last block and of four blocks follow.

Each run is a process with one thread. Ctrl-C lets all of them save and stop; the same command then
continues, and no finished run is repeated.

The column "steps" gives training steps relative to residual, to reach the same accuracy: the lower
of the two last ones, or residual's where the arm trains longer (--skipless-epochs). It is read off
the mean curves, where they first reach that accuracy.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

import numpy as np
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from beyond.arms import ARM, ARMS, parts_of
from support import files, pictures
from support.data import image_folders, listing
from support.errors import UserError, errors_in_one_line
from support.flags import COUNT, PATH, POSITIVE, SEED, Parser
from support.processes import say

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"train_cls.py": "top1", "train_ssl.py": "knn"}
TITLES = dict(top1="top-1, %", knn="k-NN accuracy, %", soap="SOAP", adamw="AdamW")
RATES = [float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 3)]
PROBES = ["last", "quarters"]  # the blocks whose tokens a linear probe reads
SET_BY_SWEEP = "--data --out --resume --eval --lr --seed --epochs --depth --opt --skipless --init "
SET_BY_SWEEP += "--norm --attention --activation"


# --------------------------------------------------------------------------------------------------
# Finished runs, and which learning rate to try next. WORK/tune/residual-12-soap-lr0.01-seed0 is
# named after its settings; the name up to -lr is its cell, the unit that is tuned.
# --------------------------------------------------------------------------------------------------

NAME = re.compile(r"(.+)-(\d+)-(\w+)-lr([\d.e+-]+)-seed(\d+)")


def settings_of(folder: Path) -> tuple[str, int, str, float, int]:
    """Arm, depth, optimizer, learning rate and seed."""
    arm, depth, opt, rate, seed = NAME.fullmatch(folder.name).groups()
    return arm, int(depth), opt, float(rate), int(seed)


def runs(work: Path, start: str) -> list[Path]:
    """The folders of runs in WORK whose path begins so; a renamed copy is not one."""
    return [folder for folder in sorted(work.glob(f"{start}*")) if NAME.fullmatch(folder.name)]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UserError where a file does not hold what this script or a trainer wrote."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); restore it, or remove its run") from error


def epochs_of(args: argparse.Namespace, folder: Path) -> int:
    """How long this run trains."""
    if folder.parent.name == "tune":
        return args.tune_epochs
    longer = settings_of(folder)[0].startswith("skipless") and args.skipless_epochs
    return longer or args.epochs


def log_of(args: argparse.Namespace, folder: Path) -> list[dict] | None:
    """The log of a finished run; [] if the run diverged, None if it is not finished."""
    if (folder / "diverged.txt").exists():
        return []
    with reading(folder / "log.jsonl"):
        rows = files.read_log(folder / "log.jsonl")
        epochs = [row["epoch"] for row in rows]
        if not rows or epochs[-1] != epochs_of(args, folder):
            return None
        if epochs != list(range(epochs[0], epochs[-1] + 1)):
            raise ValueError("an epoch is missing")
        float(rows[-1][args.metric])
    return rows


def tuning_results(args: argparse.Namespace, cell: str) -> dict[float, list[dict | None]]:
    """Learning rate -> the last row of the log of each seed, None if that run diverged."""
    results = {}
    for folder in runs(args.work, f"tune/{cell}-lr"):
        if (log := log_of(args, folder)) is not None:
            results.setdefault(settings_of(folder)[3], []).append(log[-1] if log else None)
    return results


def score(rows: list[dict | None], metric: str) -> tuple[float, float]:
    """What is compared between rates: the metric, then minus the loss, as means over the seeds."""
    if None in rows:
        return -math.inf, 0.0
    return mean(row[metric] for row in rows), -mean(row.get("val_loss", 0) for row in rows)


def best_rate(results: dict[float, list[dict | None]], metric: str) -> float:
    return max(results, key=lambda rate: (score(results[rate], metric), -rate))


def next_runs(
    results: dict[float, list[dict | None]], metric: str, first: list[float]
) -> list[tuple[float, int]]:
    """The (rate, seed) pairs to try next; none when the cell is tuned.

    They are the first rates; then one beyond the end where the best rate is; then a second seed for
    rates that share the best score.
    """
    if missing := [rate for rate in first if rate not in results]:
        return [(rate, 0) for rate in missing]
    scores = {rate: score(rows, metric) for rate, rows in results.items()}
    best = best_rate(results, metric)
    trains = None not in results[best]
    if trains and len(results) > 2 and len(set(scores.values())) == 1:
        return []  # the result does not depend on the rate
    below = [rate for rate in RATES if rate < best == min(results)]
    above = [rate for rate in RATES if rate > best == max(results)]
    equal = [rate for rate in sorted(results) if trains and scores[rate] == scores[best]]
    again = [(rate, 1) for rate in equal if len(equal) > 1 == len(results[rate])]
    return [(rate, 0) for rate in below[-1:] + above[:1]] or again


# --------------------------------------------------------------------------------------------------
# Preparing the folder and running
# --------------------------------------------------------------------------------------------------


def check_same_sweep(args: argparse.Namespace, train: ImageFolder) -> None:
    """Write WORK/sweep.json, what all runs there share. Raises UserError where that differs."""
    shared = "script classes tune_epochs epochs skipless_epochs flags".split()
    # One image more would move others between the two parts of the training images, and later runs
    # would be measured on what earlier ones trained on.
    settings = {name: vars(args)[name] for name in shared} | dict(images=listing(train))
    path, before = args.work / "sweep.json", settings
    if path.exists():
        with reading(path):
            before = dict(json.loads(path.read_text()))
    for name, value in settings.items():
        if (old := before.get(name)) != value:
            problem = f"--work {args.work} has runs with {name} {old}, not {value}"
            raise UserError(f"{problem}; name another folder")
    files.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings)))


def link_images(args: argparse.Namespace, train: ImageFolder) -> None:
    """WORK/images/full/{train,val} are links to the first classes of DATA, WORK/images/tune/{train,
    val} to their training images, every fifth of a class in val. Raises UserError."""
    classes, links, seen = train.classes[: args.classes], {}, Counter()
    if len(classes) < (args.classes or 0):
        raise UserError(f"--classes {args.classes}: --data {args.data} has only {len(classes)}")
    for split in ("train", "val"):
        links |= {f"full/{split}/{name}": args.data.absolute() / split / name for name in classes}
    for path, label in train.samples:
        if label < len(classes):
            part = "train" if seen[label] % 5 else "val"
            links[f"tune/{part}/{Path(path).relative_to(train.root)}"] = Path(path)
            seen[label] += 1
    for label, count in seen.items():
        if count == 1:  # it is held back, so there is nothing to train on
            problem = f"class {classes[label]} has one training image, and tuning needs two"
            raise UserError(f"--data {args.data}: {problem}; add one, or remove the class")
    for name, target in links.items():
        link = args.work / "images" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # DATA may have moved
        link.symlink_to(target)


def training_command(args: argparse.Namespace, folder: Path) -> list:
    arm, depth, opt, rate, seed = settings_of(folder)
    words = [args.script, "--data", args.work / "images" / folder.parent.name]
    if (folder / "last.pt").exists():
        return [*words, "--resume", folder / "last.pt"]
    words += ["--out", folder, "--epochs", epochs_of(args, folder), "--lr", rate, "--seed", seed]
    words += ["--depth", depth, "--opt", opt, *args.flags]
    network, variants = parts_of(arm)
    for name, choice in variants.items():
        words += [f"--{name}", choice]
    skipless = ["--skipless", "--init", network.removeprefix("skipless-")]
    return words if network == "residual" else words + skipless


def probe_command(args: argparse.Namespace, folder: Path) -> list:
    """A linear probe of the run whose folder this one is in."""
    _, depth, *_ = settings_of(folder.parent)
    quarters = sorted({-(-depth * i // 4) for i in (1, 2, 3, 4)})
    words = ["eval_dense.py", "segment", folder.parent / "last.pt", "--data", args.camvid]
    words += ["--ignore", 11, "--epochs", 10, "--out", folder]
    return [*words, "--blocks", *(quarters if folder.name == "quarters" else [depth])]


def start(args: argparse.Namespace, folder: Path) -> subprocess.Popen:
    command_of = probe_command if folder.name in PROBES else training_command
    script, *words = command_of(args, folder)
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    # In a session of its own, or Ctrl-C would reach it twice, from the terminal and from the sweep,
    # and at a second signal a trainer ends without saving.
    options = dict(env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    files.make_folder(folder)
    with open(folder / "output.txt", "a") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)


def result_of(args: argparse.Namespace, folder: Path) -> str | None:
    """The result of a finished run in a few words; None if it is not finished."""
    if folder.name in PROBES:
        return "measured" if (folder / "segment.json").exists() else None
    log = log_of(args, folder)
    if log is None:
        return None
    return f"{args.metric} {log[-1][args.metric]:.1f}" if log else "diverged"


def result_of_ended(args: argparse.Namespace, folder: Path, code: int) -> str:
    """The result of a run whose process has ended. Raises UserError where it has none."""
    last = ["no output", *(folder / "output.txt").read_text().strip().splitlines()][-1]
    if code == 1 and last.startswith("error: ") and "--lr" in last:  # a number was not finite
        (folder / "diverged.txt").write_text(last + "\n")
    elif code:
        raise UserError(f"{folder} ended with code {code}: {last.removeprefix('error: ')}", code=1)
    if result := result_of(args, folder):
        return result
    raise UserError(f"{folder}: the run ended well, but left no result; remove this folder", code=1)


def run_all(args: argparse.Namespace, folders: list[Path], signals: list[int]) -> None:
    """Make the runs that are not finished, --jobs at a time, and print a line as each ends.

    signals: those received so far. Raises UserError when there is one, or when a run fails.
    """
    waiting = [x for x in dict.fromkeys(folders) if result_of(args, x) is None]
    running, total, done = {}, len(waiting), 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                folder = waiting.pop(0)
                running[folder] = start(args, folder)
            time.sleep(0.1)
            for folder in [x for x, process in running.items() if process.poll() is not None]:
                result = result_of_ended(args, folder, running.pop(folder).returncode)
                done += 1
                say(f"run {done} of {total}  {folder.relative_to(args.work)}  {result}")
            if signals:
                raise UserError("interrupted; the same command continues", code=128 + signals[0])
    finally:
        for process in running.values():
            process.terminate()  # at which a trainer saves
        for process in running.values():
            process.wait()


def run_sweep(args: argparse.Namespace, cells: list[str]) -> None:
    """Tuning runs, round after round while a cell has a rate to try; final runs; linear probes."""
    signals, final = [], []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, frame: signals.append(number))
    while tuning := [
        args.work / f"tune/{cell}-lr{rate:g}-seed{seed}"
        for cell in cells
        for rate, seed in next_runs(tuning_results(args, cell), args.metric, args.rates)
    ]:
        run_all(args, tuning, signals)
    for cell in cells:
        results = tuning_results(args, cell)
        best = best_rate(results, args.metric)
        if None not in results[best]:  # else the cell diverges at every rate
            final += [args.work / f"full/{cell}-lr{best:g}-seed{seed}" for seed in args.seeds]
    run_all(args, final, signals)
    if args.camvid:
        trained = [folder for folder in final if log_of(args, folder)]
        run_all(args, [folder / blocks for folder in trained for blocks in PROBES], signals)


# --------------------------------------------------------------------------------------------------
# Tables and pictures, from the logs alone
# --------------------------------------------------------------------------------------------------


def mean_curve(logs: list[list[dict]], metric: str) -> np.ndarray:
    """(4, epochs): the epochs measured in all runs; mean over the runs, lowest, highest."""
    values = [{row["epoch"]: row[metric] for row in x if row.get(metric) is not None} for x in logs]
    epochs = sorted(set.intersection(*map(set, values)))
    y = np.array([[of_run[epoch] for epoch in epochs] for of_run in values])
    return np.stack([epochs, y.mean(0), y.min(0), y.max(0)])


def tuning_curve(results: dict[float, list[dict | None]], metric: str) -> np.ndarray:
    """(4, rates that did not diverge): the rates; mean over the seeds, lowest, highest."""
    values = {r: [row[metric] for row in rows] for r, rows in results.items() if None not in rows}
    return np.array([[rate, mean(x), min(x), max(x)] for rate, x in sorted(values.items())]).T


def first_reached(target: float, curve: np.ndarray) -> float:
    """The epoch at which the mean curve first reaches a value, between epochs on a line."""
    first = int(np.argmax(curve[1] >= target))
    epochs, values = curve[:2, max(first - 1, 0) : first + 1]
    return float(np.interp(target, values, epochs))


def relative_steps(own: np.ndarray, residual: np.ndarray | None) -> str:
    """Steps relative to residual, to reach the lower of the two curves' last values; for a curve
    that is longer than residual's, to reach residual's last value."""
    if residual is None:
        return "-"
    target, longer = residual[1, -1], own[0, -1] / residual[0, -1]
    if longer == 1:
        target = min(own[1, -1], target)
    elif own[1].max() < target:
        return f"> {longer:g}"
    steps = first_reached(target, residual)
    return f"{first_reached(target, own) / steps:.2f}" if steps else "-"


def mean_and_range(values: list[float]) -> list[str]:
    return [f"{mean(values):.1f}", f"{min(values):.1f} .. {max(values):.1f}"]


def write_table(path: Path, columns: str, rows: list[list]) -> None:
    columns = columns.split(", ")
    rows = [row + ["-"] * (len(columns) - len(row)) for row in rows]
    lines = [" | ".join(map(str, row)) for row in [columns, ["---"] * len(columns), *rows]]
    text = "".join(f"| {line} |\n" for line in lines)
    files.write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"\n{text}{path}")


def draw(path: Path, curves: dict[tuple, np.ndarray], title: str, against: str = "epoch") -> None:
    """One panel per depth and optimizer, one line per arm: mean over the seeds, and their range.

    curves: (optimizer, depth, arm) -> `mean_curve` or `tuning_curve`. A dotted line marks
    residual's last value where an arm trains longer to reach it.
    """
    panels, arms = (
        sorted({key[:2] for key in curves}),
        list(dict.fromkeys(key[2] for key in curves)),
    )
    size = (4.4 * len(panels), 3.9) if len(panels) > 1 else (7.4, 4.9)
    options = dict(sharey=True, squeeze=False, figsize=size, layout="constrained")
    figure, axes = pictures.plt.subplots(1, len(panels), **options)
    labels, legend = pictures.shortened(arms), {}
    for ax, panel in zip(axes[0], panels):
        here, lines = {key[2]: x for key, x in curves.items() if key[:2] == panel}, {}
        for arm, (x, middle, lowest, highest) in here.items():
            family = [other for other in arms if other.split("+")[0] == arm.split("+")[0]]
            marker, colour = "osD^vP"[family.index(arm) % 6], pictures.colour_of(arm, arms)
            [lines[labels[arm]]] = ax.plot(x, middle, color=colour, marker=marker, markersize=4)
            ax.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        legend |= lines
        ax.set_xlabel(against)
        pictures.tidy(ax, f"{panel[1]} blocks, {TITLES[panel[0]]}")
        if against != "epoch":
            ax.set_xscale("log")
            continue
        ax.xaxis.set_major_locator(pictures.MaxNLocator(integer=True))
        if "residual" in here and len({x[0, -1] for x in here.values()}) > 1:
            target, colour = here["residual"][1, -1], pictures.ARM_COLOURS["residual"]
            line = ax.axhline(target, xmax=0.95, color=colour, linestyle=":")
            legend[f"residual's last, {target:.1f}"] = line
    axes[0, 0].set_ylabel(title)
    if against == "epoch":  # in the last panel, which has room on its right
        for label in pictures.label_ends(ax, lines):
            del legend[label]
    below = dict(loc="outside lower center", ncols=max(3, len(panels)))
    figure.legend(legend.values(), legend, fontsize=8, frameon=False, **below)
    pictures.save_figure(figure, path)
    print(path)


def probe_rows(args: argparse.Namespace, cell: list, start: str) -> list[list]:
    """mIoU in percent from the linear probes of the runs whose path begins so."""
    rows = []
    for blocks in PROBES:
        scores = []
        for path in (folder / blocks / "segment.json" for folder in runs(args.work, start)):
            if path.exists():
                with reading(path):
                    results = json.loads(path.read_text())["results"].values()
                    scores.append([float(x["miou"]) for x in results])
        if scores:  # of the commonest class everywhere, of the network, of the same before training
            one_class, trained, untrained = zip(*scores)
            ends = [f"{mean(x):.1f}" for x in (untrained, one_class)]
            rows.append([*cell, blocks, *mean_and_range(trained), len(trained), *ends])
    return rows


def report(args: argparse.Namespace) -> None:
    """Write what WORK holds: table.md, curves.png, rates.png (the result on the held-back fifth
    against the learning rate) and, if there are linear probes, probes.md."""
    cells = {settings_of(folder)[2::-1] for folder in runs(args.work, "tune/")}
    rows, probes, curves, rates, metric = [], [], {}, {}, args.metric
    for opt, depth, arm in sorted(cells):
        cell = f"{arm}-{depth}-{opt}"
        results = tuning_results(args, cell)
        if not results or None in results[best := best_rate(results, metric)]:
            continue
        rates[opt, depth, arm] = tuning_curve(results, metric)
        row = [arm, depth, opt, f"{score(results[best], metric)[0]:.1f}", f"{best:g}"]
        start = f"full/{cell}-lr{best:g}-seed"
        logs = [log_of(args, folder) for folder in runs(args.work, start)]
        if finished := [log for log in logs if log]:
            own = curves[opt, depth, arm] = mean_curve(finished, metric)
            diverged = f" ({logs.count([])} diverged)" if [] in logs else ""
            row += mean_and_range([log[-1][metric] for log in finished])
            row += [f"{len(finished)}{diverged}"]
            row += [relative_steps(own, curves.get((opt, depth, "residual")))]
        rows.append(row)
        probes += probe_rows(args, [arm, depth, opt], start)
    if not rows:
        raise UserError(f"{args.work} holds no finished tuning run; name a sweep's folder")
    columns = "arm, blocks, optimizer, held back, rate, val, range, seeds, steps"
    write_table(args.work / "table.md", columns, rows)
    if probes:
        columns = "arm, blocks, optimizer, read, mIoU, range, seeds, untrained, one class"
        write_table(args.work / "probes.md", columns, probes)
    draw(args.work / "rates.png", rates, f"held-back {TITLES[metric]}", against="learning rate")
    if curves:
        draw(args.work / "curves.png", curves, f"val {TITLES[metric]}")


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------


def RATE(text: str) -> float:
    return float(f"{POSITIVE(text):g}")  # as in the names of folders


def parse_arguments(words: list[str]) -> argparse.Namespace:
    p = Parser(__doc__)

    def add(flag: str, help: str, **options) -> None:
        p.add_argument(flag, help=help, **options)

    several = dict(nargs="+")
    # fmt: off
    add("--script", "the trainer to run [train_cls.py]", choices=[*METRICS], default="train_cls.py")
    add("--data", "folder with train/<class>/* and val/<class>/*", type=PATH)
    add("--camvid", "folder of images and masks for linear probes [no probes]", type=PATH)
    add("--classes", "how many classes to take, in sorted order [all]", type=COUNT)
    add("--work", "folder for the runs [runs/sweep]", type=PATH, default=Path("runs/sweep"))
    add("--arms", "networks to compare, also residual+dyt and the like [residual and the three "
        "skipless inits]", type=ARM, default=ARMS, **several)
    add("--depths", "numbers of blocks to compare [12]", type=COUNT, default=[12], **several)
    add("--opts", "optimizers to compare [soap]", choices=["soap", "adamw"], default=["soap"],
        **several)
    add("--rates", "learning rates that tuning begins with [1e-3 3e-3]", type=RATE,
        default=[1e-3, 3e-3], **several)
    add("--seeds", "seeds of the final runs [0 1 2]", type=SEED, default=[0, 1, 2], **several)
    add("--tune-epochs", "epochs of a tuning run [3]", type=COUNT, default=3)
    add("--epochs", "epochs of a final run [5]", type=COUNT, default=5)
    add("--skipless-epochs", "epochs of a final run without skips [as --epochs]", type=COUNT)
    add("--jobs", "runs at a time [one per CPU core]", type=COUNT, default=os.cpu_count())
    add("--table", "train nothing, report on the runs in WORK", type=PATH, metavar="WORK")
    # fmt: on
    cut = words.index("--") if "--" in words else len(words)
    args = p.parse_args(words[:cut])
    args.flags = words[cut + 1 :]
    for word in args.flags:
        if word.split("=")[0] in SET_BY_SWEEP.split():
            raise UserError(f"{word} behind -- is for the sweep to set; leave it out")
    if not (args.data or args.table):
        raise UserError("--data is needed, a folder with train/ and val/; or --table WORK")
    for kind in ("images", "masks") if args.camvid else ():
        if not (args.camvid / "train" / kind).is_dir():  # told now, not after the training
            raise UserError(f"--camvid {args.camvid}: no folder train/{kind} in it")
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.table:
        path, args.work = args.table / "sweep.json", args.table
        if not path.is_file():
            raise UserError(f"--table {args.work}: no sweep.json in it, so no runs of this script")
        with reading(path):
            vars(args).update(**json.loads(path.read_text()))
    args.metric = METRICS[args.script]
    if not args.table:
        files.make_folder(args.work)
        files.lock(args.work)
        train, _ = image_folders(str(args.data.absolute()), check=False)
        check_same_sweep(args, train)
        link_images(args, train)
        pairs = [(depth, opt) for opt in args.opts for depth in args.depths]
        run_sweep(args, [f"{arm}-{depth}-{opt}" for depth, opt in pairs for arm in args.arms])
    report(args)


if __name__ == "__main__":
    with errors_in_one_line("use fewer --jobs"):
        main()
