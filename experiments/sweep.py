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
--camvid, a linear probe (`eval_dense.py segment`) of each final run follows. Each run is a process
with one thread. Ctrl-C lets all of them save and stop; the same command then continues, and no
finished run is repeated.

The column "steps" gives training steps relative to residual, to first reach the same accuracy: the
lower of the two mean curves' last ones; residual's where the arm trains longer (--skipless-epochs).
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

from beyond.arms import ARM, ARMS, flags_of
from support import files, pictures
from support.data import image_folders, listing
from support.errors import UserError, errors_in_one_line
from support.flags import COUNT, PATH, POSITIVE, SEED, Parser
from support.processes import say

ROOT = Path(__file__).resolve().parent.parent
METRICS = {"train_cls.py": "top1", "train_ssl.py": "knn"}
TITLES = dict(top1="top-1, %", knn="k-NN accuracy, %", soap="SOAP", adamw="AdamW")
RATES = [float(f"{digit}e-{power}") for power in range(6, 0, -1) for digit in (1, 3)]
PROBE = "last"  # a probe's folder in that of its run: it reads the tokens of the last block
SET_BY_SWEEP = "--data --out --init-from --resume --eval --lr --seed --epochs --depth --opt "
SET_BY_SWEEP += "--skipless --skips --init --norm --attention --activation --shortcut"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises UserError where this file does not hold what is taken from it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        advice = "use another copy, or delete it and run the sweep again"
        raise UserError(f"{path} is damaged ({error}); {advice}") from error


# ---- runs ----------------------------------------------------------------------------------------

# WORK/tune/residual-12-soap-lr0.01-seed0 is named after its settings; the name up to -lr is its
# cell, the unit that is tuned.
NAME = re.compile(r"(.+)-(\d+)-(\w+)-lr([\d.e+-]+)-seed(\d+)")


def settings_of(folder: Path) -> tuple[str, int, str, float, int]:
    """Arm, depth, optimizer, learning rate and seed."""
    arm, depth, opt, rate, seed = NAME.fullmatch(folder.name).groups()
    return arm, int(depth), opt, float(rate), int(seed)


def runs(work: Path, start: str) -> list[Path]:
    """The folders of runs in WORK whose path begins so; a renamed copy is not one."""
    return [folder for folder in sorted(work.glob(f"{start}*")) if NAME.fullmatch(folder.name)]


def epochs_of(args: argparse.Namespace, folder: Path) -> int:
    """How long this run trains."""
    if folder.parent.name == "tune":
        return args.tune_epochs
    return (folder.name.startswith("skipless") and args.skipless_epochs) or args.epochs


def log_of(args: argparse.Namespace, folder: Path) -> list[dict] | None:
    """The log of a finished run; [] if the run diverged, None if it is not finished."""
    if (folder / "diverged.txt").exists():
        return []
    path = folder / "log.jsonl"
    with reading(path):
        rows = files.read_log(path)
        for row in rows:
            row["epoch"] + (row.get(args.metric) or 0.0)  # raises where one is no number
        if not rows or rows[-1]["epoch"] != epochs_of(args, folder):
            return None
        rows[-1][args.metric] + 0.0
    return rows


def tuning_results(args: argparse.Namespace, cell: str) -> dict[float, list[tuple]]:
    """Learning rate -> (metric, minus validation loss) of each seed, (-inf, 0) if it diverged."""
    results = {}
    for folder in runs(args.work, f"tune/{cell}-lr"):
        if (log := log_of(args, folder)) is not None:
            last = log[-1] if log else {args.metric: -math.inf}
            result = last[args.metric], -last.get("val_loss", 0)  # DINO has none
            results.setdefault(settings_of(folder)[3], []).append(result)
    return results


def score(of_seeds: list[tuple]) -> tuple[float, float]:
    """What is compared between rates: means over the seeds."""
    return tuple(map(mean, zip(*of_seeds)))


def best_rate(results: dict[float, list[tuple]]) -> float:
    return max(results, key=lambda rate: (score(results[rate]), -rate))


def next_runs(results: dict[float, list[tuple]], first: list[float]) -> list[tuple[float, int]]:
    """The (rate, seed) pairs to try next: the first rates; then one beyond the end where the best
    rate is; then a second seed for rates that share the best score; none when the cell is tuned."""
    if missing := [rate for rate in first if rate not in results]:
        return [(rate, 0) for rate in missing]
    scores = {rate: score(of_seeds) for rate, of_seeds in results.items()}
    best = best_rate(results)
    trains = scores[best][0] > -math.inf
    if trains and len(results) > 2 and len(set(scores.values())) == 1:
        return []  # the result does not depend on the rate
    below = [rate for rate in RATES if rate < best == min(results)]
    above = [rate for rate in RATES if rate > best == max(results)]
    equal = [rate for rate in sorted(results) if trains and scores[rate] == scores[best]]
    again = [(rate, 1) for rate in equal if len(equal) > 1 == len(results[rate])]
    return [(rate, 0) for rate in below[-1:] + above[:1]] or again


def read_settings(work: Path) -> dict:
    """What `check_same_sweep` wrote, and the metric."""
    path = work / "sweep.json"
    with reading(path):
        settings = json.loads(path.read_text())
        script, _, _ = (settings[name] for name in ("script", "tune_epochs", "epochs"))
        return settings | dict(metric=METRICS[script])


def check_same_sweep(args: argparse.Namespace, train: ImageFolder) -> None:
    """Write WORK/sweep.json, what all runs there share. Raises UserError where that differs, and
    where there are too few classes or images."""
    sizes = sorted(Counter(train.targets).items())[: args.classes]  # (class, training images)
    if len(sizes) < (args.classes or 0):
        raise UserError(f"--classes {args.classes}: --data {args.data} has only {len(sizes)}")
    for label, size in sizes:
        if size == 1:
            rule = "one is held back, and none is left to train on; add another, or drop the class"
            where = Path(train.root) / train.classes[label]
            raise UserError(f"{where} holds a single image: {rule}")
    shared = "script classes tune_epochs epochs skipless_epochs flags".split()
    # One image more would move others between the two parts of the training images, and later runs
    # would be measured on what earlier ones trained on.
    settings = {name: vars(args)[name] for name in shared} | dict(images=listing(train))
    path = args.work / "sweep.json"
    before = read_settings(args.work) if path.exists() else settings
    for name, value in settings.items():
        if (old := before.get(name)) != value:
            raise UserError(f"{args.work} has runs with {name} {old}, not {value}; name another")
    files.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings)))


def link_images(args: argparse.Namespace, train: ImageFolder) -> None:
    """WORK/images/full/{train,val} are links to the first classes of DATA, WORK/images/tune/{train,
    val} to their training images, every fifth of a class in val."""
    classes, links, seen = train.classes[: args.classes], {}, Counter()
    for split in ("train", "val"):
        links |= {f"full/{split}/{name}": args.data.absolute() / split / name for name in classes}
    for path, label in train.samples:
        if label < len(classes):
            part = "train" if seen[label] % 5 else "val"
            links[f"tune/{part}/{Path(path).relative_to(train.root)}"] = path
            seen[label] += 1
    for name, target in links.items():
        link = args.work / "images" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # DATA may have moved
        link.symlink_to(target)


def command_of(args: argparse.Namespace, folder: Path) -> list:
    """The words that make this run, or the linear probe of the run whose folder this one is in."""
    if folder.name == PROBE:
        words = ["eval_dense.py", "segment", folder.parent / "last.pt", "--data", args.camvid]
        return [*words, "--ignore", 11, "--epochs", 10, "--out", folder]
    arm, depth, opt, rate, seed = settings_of(folder)
    words = [args.script, "--data", args.work / "images" / folder.parent.name]
    if (folder / "last.pt").exists():
        return [*words, "--resume", folder / "last.pt"]
    words += ["--out", folder, "--epochs", epochs_of(args, folder), "--lr", rate, "--seed", seed]
    return [*words, "--depth", depth, "--opt", opt, *args.flags, *flags_of(arm)]


def start(args: argparse.Namespace, folder: Path) -> subprocess.Popen:
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
    if folder.name == PROBE:
        return "measured" if (folder / "segment.json").exists() else None
    if log := log_of(args, folder):
        return f"{args.metric} {log[-1][args.metric]:.1f}"
    return None if log is None else "diverged"


def result_of_ended(args: argparse.Namespace, folder: Path, code: int) -> str:
    """The result of a run whose process has ended. Raises UserError where it has none."""
    output = (folder / "output.txt").read_text(errors="replace")
    last = ["no output", *output.strip().splitlines()][-1]
    if code == 1 and last.startswith("error: ") and "--lr" in last:  # a number was not finite
        (folder / "diverged.txt").write_text(last + "\n")
    elif code or not result_of(args, folder):
        raise UserError(f"{folder} ended with code {code} and no result: {last}", code=1)
    return result_of(args, folder)


def run_all(args: argparse.Namespace, folders: list[Path], signals: list[int]) -> None:
    """Make the runs that are not finished, --jobs at a time, and print a line as each ends. Raises
    UserError when a run fails or a signal has come."""
    waiting = [x for x in dict.fromkeys(folders) if result_of(args, x) is None]
    running, total = {}, len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                folder = waiting.pop(0)
                running[folder] = start(args, folder)
            time.sleep(0.1)
            for folder in [x for x, process in running.items() if process.poll() is not None]:
                result = result_of_ended(args, folder, running.pop(folder).returncode)
                done = total - len(waiting) - len(running)
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
        for rate, seed in next_runs(tuning_results(args, cell), args.rates)
    ]:
        run_all(args, tuning, signals)
    for cell in cells:
        results = tuning_results(args, cell)
        best = best_rate(results)
        if score(results[best])[0] > -math.inf:  # else the cell diverges at every rate
            final += [args.work / f"full/{cell}-lr{best:g}-seed{seed}" for seed in args.seeds]
    run_all(args, final, signals)
    if args.camvid:
        run_all(args, [folder / PROBE for folder in final if log_of(args, folder)], signals)


# ---- tables and pictures, from the logs alone ----------------------------------------------------


def curve_of(values: dict[float, list[float]]) -> np.ndarray:
    """x -> values over the seeds, as (4, points): x, and their mean, lowest, highest."""
    return np.array([[x, mean(y), min(y), max(y)] for x, y in sorted(values.items())]).T


def curve_of_logs(logs: list[list[dict]], metric: str) -> np.ndarray:
    """`curve_of` the epochs measured in all runs."""
    values = {}
    for row in (row for log in logs for row in log if row.get(metric) is not None):
        values.setdefault(row["epoch"], []).append(row[metric])
    return curve_of({epoch: y for epoch, y in values.items() if len(y) == len(logs)})


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


def write_table(path: Path, rows: list[list]) -> None:
    columns = "arm, blocks, optimizer, held back, rate, val, range, seeds, steps".split(", ")
    if max(map(len, rows)) > len(columns):
        columns += ["mIoU", "range", "untrained", "one class"]
    rows = [row + ["-"] * (len(columns) - len(row)) for row in rows]
    lines = [" | ".join(map(str, row)) for row in [columns, ["---"] * len(columns), *rows]]
    text = "".join(f"| {line} |\n" for line in lines)
    files.write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"\n{text}{path}")


def draw(path: Path, curves: dict[tuple, np.ndarray], title: str, against: str = "epoch") -> None:
    """One panel per depth and optimizer, one line per arm: mean over the seeds, and their range. A
    dotted line marks residual's last value where an arm trains longer to reach it. The key of a
    curve is (optimizer, depth, arm)."""
    panels = sorted({key[:2] for key in curves})
    arms = list(dict.fromkeys(key[2] for key in curves))
    labels, legend = pictures.shortened(arms), {}
    size = (4.4 * len(panels), 3.9) if len(panels) > 1 else (7.4, 4.9)
    options = dict(sharey=True, squeeze=False, figsize=size, layout="constrained")
    figure, axes = pictures.plt.subplots(1, len(panels), **options)
    for ax, panel in zip(axes[0], panels):
        here, lines = {key[2]: x for key, x in curves.items() if key[:2] == panel}, {}
        for arm, (x, middle, lowest, highest) in here.items():
            family = [other for other in arms if other.split("+")[0] == arm.split("+")[0]]
            marker, colour = "osD^vP"[family.index(arm) % 6], pictures.colour_of(arm, arms)
            [lines[labels[arm]]] = ax.plot(x, middle, color=colour, marker=marker, markersize=4)
            ax.fill_between(x, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        legend |= lines
        pictures.tidy(ax, f"{panel[1]} blocks, {TITLES[panel[0]]}")
        ax.set_xlabel(against)
        if against != "epoch":
            ax.set_xscale("log")
            continue
        ax.xaxis.set_major_locator(pictures.MaxNLocator(integer=True))
        if "residual" in here and len({x[0, -1] for x in here.values()}) > 1:
            target, colour = here["residual"][1, -1], pictures.ARM_COLOURS["residual"]
            dotted = dict(xmax=0.95, color=colour, linestyle=":")
            legend[f"residual's last, {target:.1f}"] = ax.axhline(target, **dotted)
    axes[0, 0].set_ylabel(title)
    if against == "epoch":  # in the last panel, which has room on its right
        for label in pictures.label_ends(ax, lines):
            del legend[label]
    below = dict(loc="outside lower center", ncols=max(3, len(panels)))
    figure.legend(legend.values(), legend, fontsize=8, frameon=False, **below)
    pictures.save_figure(figure, path)
    print(path)


def probe_results(folders: list[Path]) -> list[str]:
    """mIoU in percent of the linear probes: mean and range, mean of the same networks before
    training, and what naming the commonest class everywhere gives; [] if there are no probes."""
    paths = [folder / PROBE / "segment.json" for folder in folders]
    results = []
    for path in filter(Path.exists, paths):
        with reading(path):
            one_class, trained, untrained = json.loads(path.read_text())["results"].values()
            results.append([x["miou"] + 0.0 for x in (one_class, trained, untrained)])
    if not results:
        return []
    one_class, trained, untrained = zip(*results)
    return [*mean_and_range(trained), f"{mean(untrained):.1f}", f"{mean(one_class):.1f}"]


def report(args: argparse.Namespace) -> None:
    """Write table.md, curves.png, and rates.png (held-back result against learning rate)."""
    folders = [*runs(args.work, "tune/"), *runs(args.work, "full/")]
    if unfinished := [x.relative_to(args.work) for x in folders if log_of(args, x) is None]:
        print("left out, because they are not finished:", *unfinished, sep="\n  ")
    cells = {settings_of(folder)[2::-1] for folder in folders if folder.parent.name == "tune"}
    rows, curves, rates, metric = [], {}, {}, args.metric
    for opt, depth, arm in sorted(cells):
        cell = f"{arm}-{depth}-{opt}"
        results = tuning_results(args, cell)
        results = {rate: x for rate, x in results.items() if score(x)[0] > -math.inf}
        if not results:
            continue
        best = best_rate(results)
        rates[opt, depth, arm] = curve_of({r: [v for v, _ in x] for r, x in results.items()})
        row = [arm, depth, opt, f"{score(results[best])[0]:.1f}", f"{best:g}"]
        folders = runs(args.work, f"full/{cell}-lr{best:g}-seed")
        logs = [log_of(args, folder) for folder in folders]
        if finished := [log for log in logs if log]:
            own = curves[opt, depth, arm] = curve_of_logs(finished, metric)
            diverged = f" ({logs.count([])} diverged)" if [] in logs else ""
            row += mean_and_range([log[-1][metric] for log in finished])
            steps = relative_steps(own, curves.get((opt, depth, "residual")))
            row += [f"{len(finished)}{diverged}", steps, *probe_results(folders)]
        rows.append(row)
    if not rows:
        raise UserError(f"{args.work} holds no finished tuning run; name a sweep's folder")
    write_table(args.work / "table.md", rows)
    draw(args.work / "rates.png", rates, f"held-back {TITLES[metric]}", against="learning rate")
    if curves:
        draw(args.work / "curves.png", curves, f"val {TITLES[metric]}")


def RATE(text: str) -> float:
    return float(f"{POSITIVE(text):g}")  # as in the names of folders


def parse_arguments(words: list[str]) -> argparse.Namespace:
    p = Parser(__doc__)
    what, add = p.add_mutually_exclusive_group(required=True).add_argument, p.add_argument
    what("--data", type=PATH, help="folder with train/<class>/* and val/<class>/*")
    what("--table", type=PATH, metavar="WORK", help="train nothing, report on the runs in WORK")
    add("--script", choices=METRICS, default="train_cls.py", help="the trainer [train_cls.py]")
    add("--camvid", type=PATH, help="folder of images and masks for linear probes [no probes]")
    add("--classes", type=COUNT, help="how many classes to take, in sorted order [all]")
    add("--work", type=PATH, default="runs/sweep", help="folder for the runs [runs/sweep]")
    add("--arms", nargs="+", type=ARM, default=ARMS, help="networks [residual, and every init]")
    add("--depths", nargs="+", type=COUNT, default=[12], help="numbers of blocks to compare [12]")
    add("--opts", nargs="+", choices=["soap", "adamw"], default=["soap"], help="optimizers [soap]")
    add("--rates", nargs="+", type=RATE, default=[1e-3, 3e-3], help="to begin with [1e-3 3e-3]")
    add("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="of the final runs [0 1 2]")
    add("--tune-epochs", type=COUNT, default=3, help="epochs of a tuning run [3]")
    add("--epochs", type=COUNT, default=5, help="epochs of a final run [5]")
    add("--skipless-epochs", type=COUNT, help="epochs of a final run without skips [as --epochs]")
    add("--jobs", type=COUNT, default=os.cpu_count(), help="runs at a time [one per CPU core]")
    cut = words.index("--") if "--" in words else len(words)
    args = p.parse_args(words[:cut])
    args.flags = words[cut + 1 :]
    if ours := {word.split("=")[0] for word in args.flags} & set(SET_BY_SWEEP.split()):
        raise UserError(f"{', '.join(ours)} behind -- is for the sweep to set; leave it out")
    for kind in ("images", "masks") if args.camvid else ():
        if not (args.camvid / "train" / kind).is_dir():  # told now, not after the training
            raise UserError(f"--camvid {args.camvid}: no folder train/{kind} in it")
    return args


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.table:
        args.work = args.table
        vars(args).update(read_settings(args.work))
    else:
        args.metric = METRICS[args.script]
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
