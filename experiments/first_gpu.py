"""Proves this project on a GPU that is there for a quarter of an hour, and loses nothing.

    python experiments/first_gpu.py --minutes 12
    python experiments/first_gpu.py --minutes 12 --data TINY       compared on photographs
    python experiments/first_gpu.py --table runs/first-gpu-DATE    table and picture from its rows

Three parts share the time; what one leaves is the next one's.

1. Every path of the real scripts, on a few drawn images: does it run?
2. Speed and memory, against timm where it is installed.
3. A comparison at 64 px of residual, the paper's init with each of its two sets of constants, and
   identity: ViT-Ti/8, then ViT-S/8 (on a CPU two blocks of nano). All images lie in the GPU's
   memory. All arms are tuned alike: three learning rates, a few epochs each, measured on a
   held-back fifth of the training images. Then all train on all of these for equally many epochs.
   They take turns by the epoch, so that they can be compared whenever the time ends. One seed.

A step that no longer fits is skipped. One that fails, or takes too long and is stopped, is
reported, and the next begins. Each result is a line of OUT/rows.jsonl at once, so the run may be
killed at any moment. OUT/table.md and OUT/curves.png are made of these lines alone.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from beyond.arms import fresh_arm
from beyond.identity_init import hold_pairs
from minskip import PRESETS, ViT
from soap import SOAP
from support import pictures
from support.data import CORES, Seeded, augmentations, image_folders, normalise
from support.errors import UserError, errors_in_one_line
from support.files import make_folder, write_atomically
from support.flags import COUNT, PATH, POSITIVE, Parser
from support.processes import autocast, say, start_processes, uses_bf16
from support.shapes import Shapes, draw_shapes

ROOT = Path(__file__).resolve().parent.parent

# ---- rows on disk --------------------------------------------------------------------------------


def add_row(out: Path, **row) -> None:
    with open(out / "rows.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows_of(out: Path) -> list[dict]:
    path, rows = out / "rows.jsonl", []
    if not path.exists():
        raise UserError(f"{path}: no such file; name the folder of a run of this script")
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line of a machine that went down while it was written
            continue
    return rows


# ---- 1 and 2: the project's scripts, each in a process of its own --------------------------------

# (step, seconds that it is likely to take on a GPU, its command). On a CPU, where all is small, a
# third of them. It is stopped at three times as many, and those that the imports may take from a
# disk that never read them. What stands in {braces} is below.
IMPORTS = 20
TRAIN = "--data {out}/images --model {model} --depth {depth} --image-size {size} --patch-size "
TRAIN += "{patch} --batch-size {batch} --epochs 1 --warmup-epochs 0.5 --workers {workers} {on} "
TRAIN += "--out {out}"
TWO = "-m torch.distributed.run --standalone --nproc-per-node=2"
PATHS = [
    ("SOAP, identity", 25, f"train_cls.py --skipless {TRAIN}/soap"),
    ("resumed", 20, "train_cls.py --resume {out}/soap/last.pt --epochs 2 {on}"),
    ("base, paper", 60, f"train_cls.py --skipless {TRAIN}/paper --init paper --model {{base}}"),
    ("DINO", 30, f"train_ssl.py --skipless {TRAIN}/ssl --prototypes 1024"),
    ("--eval", 15, "train_cls.py --eval {out}/soap/last.pt {on}"),
    ("AdamW, residual", 20, f"train_cls.py --opt adamw {TRAIN}/adamw"),
    ("--compile", 60, f"train_cls.py --skipless --compile {TRAIN}/compiled"),
    ("--ema", 20, f"train_cls.py --skipless --ema 0.999 {TRAIN}/ema"),
    ("checkpointing", 20, f"train_cls.py --skipless --checkpoint-activations {TRAIN}/twice"),
    ("two processes", 40, f"{TWO} train_cls.py --skipless {TRAIN}/two"),
    ("probe", 30, "jacobian_probe.py --checkpoint {out}/soap/last.pt --images 1 {on} --out {out}"),
    ("picture", 15, "eval_dense.py picture {out}/soap/last.pt {on} --out {out}/picture"),
    ("DINO --compile", 90, f"train_ssl.py --skipless --compile {TRAIN}/both --prototypes 1024"),
]
STEP = "experiments/speed.py step {timed} {on} --models"
SPEED = [
    ("step", 30, f"{STEP} {{sizes}}"),
    ("SOAP's parts", 40, "experiments/speed.py soap --model {model} --tens 2 {on}"),
    ("loading", 15, "experiments/speed.py loading --images {jpegs} --workers {workers}"),
    ("step with SOAP", 45, f"{STEP} {{pair}} --opt soap"),
    ("step compiled", 120, f"{STEP} {{sizes}} --compile"),
]
NAMES = dict(
    cuda=dict(model="small", base="base", pair="small base", sizes="base small tiny", depth=12)
    | dict(size=224, patch=16, batch=32, images=320, jpegs=512, workers=CORES)
    | dict(timed="--batch-size 128"),
    cpu=dict(model="nano", base="nano", pair="nano", sizes="nano", depth=2)
    | dict(size=32, patch=8, batch=16, images=48, jpegs=16, workers=0)
    | dict(timed="--batch-size 4 --image-size 32 --steps 4"),
)


def draw_images(root: Path, size: int, images: int) -> None:
    """ROOT/{train,val}/<class>/*.jpg."""
    for split, count in (("train", images), ("val", images // 4)):
        for number in range(count):
            [image], [label], _ = draw_shapes([number], size, split)
            folder = root / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{number}.jpg", quality=90)


def run_child(out: Path, words: list[str], text: Path, seconds: float) -> str:
    """`python words`, its output in a file; returns how it ended."""
    # In a session of its own, or Ctrl-C would reach it twice, from the terminal and from here.
    options = dict(cwd=ROOT, stderr=subprocess.STDOUT, start_new_session=True)
    options["env"] = os.environ | dict(PYTHONUNBUFFERED="1")
    with open(text, "w") as file:
        process = subprocess.Popen([sys.executable, *words], stdout=file, **options)
    try:
        code = process.wait(seconds)
        return f"failed, code {code}" if code else "ok"
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:  # also after Ctrl-C
        process.terminate()  # which torchrun passes on to its processes; an ended one hears nothing
        try:
            process.wait(8)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def output_of(text: Path, result: str) -> list[str]:
    """The last lines; after a failure the first error is the last of them, because the last lines
    of torchrun do not say what failed."""
    lines = [x[:300] for x in text.read_text(errors="replace").splitlines() if x.strip()]
    error = re.compile(r"(\[rank\d\]: )?(error: |[\w.]*(Error|Exception)\b)")
    errors = [x for x in lines if error.match(x)] if result != "ok" else []
    return lines[-20:] + errors[:1]


def run_part(part: str, steps: list, out: Path, device: torch.device, until: float) -> None:
    for step, seconds, command in steps:
        if TWO in command and device.type == "cuda" and torch.cuda.device_count() < 2:
            continue
        begun, text = time.monotonic(), out / f"{part}-{re.sub('[^A-Za-z]+', '-', step)}.txt"
        seconds, left = seconds / (1 if device.type == "cuda" else 3), until - begun
        if left < seconds:
            say(f"{part}: {step}: skipped, {seconds:.0f} s do not fit into {max(left, 0):.0f} s")
            add_row(out, part=part, step=step, result="skipped", seconds=0, output=[])
            continue
        say(f"{part}: {step} ...")
        words = command.format(**NAMES[device.type], on=f"--device {device}", out="{out}").split()
        words = [word.format(out=out.absolute()) for word in words]  # OUT may hold spaces
        result = run_child(out, words, text, min(IMPORTS + 3 * seconds, left))
        seconds, output = round(time.monotonic() - begun, 1), output_of(text, result)
        add_row(out, part=part, step=step, result=result, seconds=seconds, output=output)
        say(f"    {result}, {seconds} s: {output[-1] if output else 'no output'}")
        report(out)


# ---- 3: the comparison ---------------------------------------------------------------------------

ARMS = {
    "residual": dict(arm="residual"),
    "skipless-paper": dict(arm="skipless-paper", alpha=2.0, beta=0.6, c=3.0),  # with labels
    "skipless-paper-dino": dict(arm="skipless-paper", alpha=1.8, beta=1.0, c=3.0),
    "skipless-identity": dict(arm="skipless-identity"),
}
MODELS = dict(cuda=["tiny", "small"], cpu=["nano"])
IMAGES = dict(cuda=20_000, cpu=128)  # at most, for training; a fifth as many for val
RATES = [1e-3, 3e-3, 1e-2]
BATCH, SIZE, PATCH = dict(cuda=256, cpu=32), 64, 8
TUNING = 0.3  # share of a model's time
LONGEST_TUNING, LONGEST = 5, 100  # epochs


def read_images(dataset, limit: int, until: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (n, 3, SIZE, SIZE) uint8 and labels (n,) in random order, as many as time allows."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:limit]
    _, plain = augmentations(SIZE, drawn=isinstance(dataset, Shapes))
    dataset, samples = Seeded(dataset, plain), []

    def read(indices: Tensor) -> list[tuple]:
        late = time.monotonic() > until
        return [] if late else dataset.__getitems__([(i, 0) for i in indices.tolist()])

    with ThreadPoolExecutor(CORES) as pool:  # while Pillow decodes, other threads run
        for part in pool.map(read, order.split(32)):
            samples += part
    if not samples:
        raise UserError("no time was left to read images; give more --minutes")
    images, labels = zip(*samples)
    return torch.stack(images).to(device), torch.tensor(labels, device=device)


def both_sets(data: Path | None, classes: int, device: torch.device, until: float) -> list[tuple]:
    """(images, labels) for training, and the same of val."""
    limit = IMAGES[device.type]
    sets = Shapes("train", limit, SIZE), Shapes("val", limit // 5, SIZE)
    if data:
        sets = image_folders(str(data), check=False, image_size=SIZE)
        for folder in sets:
            folder.samples = [(path, label) for path, label in folder.samples if label < classes]
    begun = time.monotonic()
    val = read_images(sets[1], limit // 5, begun + (until - begun) / 4, device)
    return [read_images(sets[0], limit, until, device), val]


def held_back_fifth(images: Tensor, labels: Tensor) -> tuple[tuple, tuple]:
    """What to train on while tuning, and what to measure on."""
    fifth = len(images) // 5  # the images are in random order
    return (images[fifth:], labels[fifth:]), (images[:fifth], labels[:fifth])


def augmented(images: Tensor, shift: int = 6) -> Tensor:
    """Each image shifted by up to so many pixels either way, mirroring what it leaves, and half of
    them turned left to right."""
    n, last = len(images), SIZE - 1
    line = torch.arange(SIZE, device=images.device)
    by = torch.randint(-shift, shift + 1, (2, n, 1), device=images.device)
    rows, columns = last - (last - (line + by).abs()).abs()  # (n, SIZE) each
    columns = torch.where(torch.rand(n, 1, device=images.device) < 0.5, columns, last - columns)
    number = torch.arange(n, device=images.device)[:, None, None]
    moved = images[number, :, rows[:, :, None], columns[:, None, :]]
    return rearrange(moved, "n row column channel -> n channel row column")


@torch.no_grad()
def top1(model: ViT, images: Tensor, labels: Tensor) -> float:
    model.eval()
    hits = torch.zeros((), device=images.device)
    for x, y in zip(images.split(500), labels.split(500)):
        with autocast(images.device, "auto"):
            hits += (model(normalise(x)).argmax(-1) == y).sum()
    return 100 * hits.item() / len(images)


def training(
    arm: str, shape: dict, rate: float, epochs: int, train: tuple, val: tuple, until: float
) -> Iterator[dict]:
    """Trains an arm; gives loss, top-1 and seconds of each epoch. Leaves off at `until`."""
    (images, labels), device = train, train[0].device
    batch = min(BATCH[device.type], len(images))
    steps = len(images) // batch
    total, warmup = epochs * steps, max(1, min(steps, epochs * steps // 5))
    torch.manual_seed(0)
    # for all arms what identity counts on, so that they differ in the skips and the init alone
    model = fresh_arm(**ARMS[arm], **shape, pool="mean", pos_embed_std=0.5).to(device)
    groups = [dict(params=[], weight_decay=0.05), dict(params=[], weight_decay=0.0)]
    for name, p in model.named_parameters():
        groups[p.ndim < 2 or name == "pos_embed"]["params"].append(p)
    optimizer = SOAP(groups, stagger=True)
    if arm == "skipless-identity":
        hold_pairs(optimizer, model)
    step = 0
    for epoch in range(epochs):
        begun, losses = time.monotonic(), torch.zeros((), device=device)
        torch.manual_seed(1 + epoch)  # all arms see the same batches, although they take turns
        model.train()
        for at in torch.randperm(len(images), device=device).split(batch)[:steps]:
            if time.monotonic() > until:
                return
            cosine = (1 + math.cos(math.pi * max(0, step - warmup) / (total - warmup + 1))) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / warmup, cosine)
            with autocast(device, "auto"):
                logits = model(normalise(augmented(images[at]))).float()
            loss = F.cross_entropy(logits, labels[at], label_smoothing=0.1)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses, step = losses + loss.detach(), step + 1
        loss, accuracy = losses.item() / steps, top1(model, *val)
        loss = round(loss, 4) if math.isfinite(loss) else None  # JSON has no NaN
        yield dict(loss=loss, top1=accuracy, seconds=round(time.monotonic() - begun, 3))


def compare(out: Path, model: str, shape: dict, sets: list[tuple], until: float) -> None:
    """Tune all arms of a model, then train them for as many epochs as the time allows."""
    (train, val), begun = sets, time.monotonic()
    parts = held_back_fifth(*train)
    for _ in range(2):  # the first epoch of a process pays for its start
        trial = list(training("residual", shape, RATES[0], 1, *parts, until))
    runs = [(arm, rate) for arm in ARMS for rate in RATES]
    takes = len(runs) * trial[0]["seconds"] if trial else math.inf
    epochs = max(1, min(LONGEST_TUNING, int(TUNING * (until - begun) / takes)))
    say(f"    tuning: {epochs} epochs at each of {len(RATES)} rates, about {epochs * takes:.0f} s")
    results, seconds = defaultdict(dict), {}
    for arm, rate in runs:
        rows = list(training(arm, shape, rate, epochs, *parts, until))
        if len(rows) < epochs:
            raise UserError(f"the time ended while {model} was tuned; give more --minutes")
        add_row(out, part="tuning", model=model, arm=arm, rate=rate, epochs=epochs, **rows[-1])
        diverged = rows[-1]["loss"] is None
        results[arm][rate] = -math.inf if diverged else rows[-1]["top1"] - 1e-6 * rows[-1]["loss"]
        seconds[arm] = min(row["seconds"] for row in rows)
    takes = sum(seconds.values()) * len(train[0]) / len(parts[0][0])
    epochs = min(LONGEST, int(0.9 * (until - time.monotonic()) / takes))
    if epochs < 1:
        raise UserError(f"no time was left to train {model} after tuning; give more --minutes")
    say(f"    {epochs} epochs for each arm, about {epochs * takes:.0f} s")
    best = {arm: max(of, key=of.get) for arm, of in results.items()}
    running = {arm: training(arm, shape, best[arm], epochs, train, val, until) for arm in ARMS}
    for epoch in range(1, epochs + 1):
        for arm, run in running.items():
            if (row := next(run, None)) is None:
                return say("    the time has ended: arms are compared at their last common epoch")
            row = dict(model=model, arm=arm, rate=best[arm], epoch=epoch, epochs=epochs) | row
            add_row(out, part="epoch", **row)


def compare_all(
    out: Path, data: Path | None, classes: int, device: torch.device, until: float
) -> None:
    """Part 3; what goes wrong in it is a row as well."""
    begun, source = time.monotonic(), str(data) if data else "synthetic (Shapes)"
    say(f"comparison: reading images, {source} ...")
    try:
        sets = both_sets(data, classes, device, begun + (until - begun) / 6)
        (images, labels), (val, _) = sets
        row = dict(data=source, train=len(images), val=len(val), classes=int(labels.max()) + 1)
        add_row(out, part="images", **row, batch=BATCH[device.type], seed=0)
        seconds = time.monotonic() - begun
        say(f"    {len(images)} to train on, {len(val)} to measure, {seconds:.1f} s")
        for number, name in enumerate(MODELS[device.type]):
            begun = time.monotonic()
            seconds = (until - begun) / (len(MODELS[device.type]) - number)
            say(f"comparison: {name}/{PATCH}, {seconds:.0f} s ...")
            shape = dict(image_size=SIZE, patch_size=PATCH, num_classes=row["classes"])
            shape |= PRESETS[name] | dict(depth=NAMES[device.type]["depth"])
            compare(out, f"{name}/{PATCH}", shape, sets, begun + seconds)
            say(f"    {time.monotonic() - begun:.1f} s")
            report(out)
    except (UserError, RuntimeError, OSError) as error:  # CUDA's are RuntimeErrors
        seconds, what = round(time.monotonic() - begun, 1), str(error).split("\n")[0]
        say(f"    failed, {seconds} s: {what}")
        add_row(out, part="comparison", result="failed", seconds=seconds, output=[what])


# ---- table and picture, from the rows alone ------------------------------------------------------


def in_common(rows: list[dict]) -> dict[str, list[dict]]:
    """Arm -> its rows of a model, up to the last epoch that all arms have."""
    of_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    return {arm: of[: min(map(len, of_arm.values()))] for arm, of in of_arm.items()}


def draw(path: Path, curves: dict[str, dict[str, list[dict]]]) -> None:
    """Top-1 on val against the epoch: one panel per model, one line per arm."""
    size = dict(figsize=(6.4 * len(curves), 4.2), squeeze=False, layout="constrained")
    figure, axes = pictures.plt.subplots(1, len(curves), **size)
    for ax, (model, of_arm) in zip(axes[0], curves.items()):
        for arm, rows in of_arm.items():
            x, y = [row["epoch"] for row in rows], [row["top1"] for row in rows]
            colour = pictures.colour_of(arm, list(ARMS))
            ax.plot(x, y, color=colour, marker="." if len(x) < 9 else None, label=arm)
        pictures.tidy(ax, f"{model}, {SIZE} px: val top-1, %")
        ax.legend(fontsize=8, frameon=False)
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(pictures.MaxNLocator(integer=True))
    pictures.save_figure(figure, path)


def table(*rows: list) -> list[str]:
    """Lines of Markdown; the first row holds the columns' names."""
    head, *rest = [[str(x).replace("|", "/") for x in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rest)]


def report(out: Path) -> str:
    """Write OUT/table.md, and OUT/curves.png where all arms of a model have an epoch."""
    text, parts, curves = ["# First run on this machine"], defaultdict(list), {}
    for row in rows_of(out):
        parts[row["part"]].append(row)
    for row in parts["machine"] + parts["images"]:
        text += ["", ", ".join(f"{k} {v}" for k, v in row.items() if k != "part")]
    for part in ("paths", "speed"):
        if skipped := [x["step"] for x in parts[part] if x["result"] == "skipped"]:
            text += ["", f"{part} skipped for want of time: {', '.join(skipped)}"]
    done = [x for x in parts["paths"] + parts["speed"] if x["result"] != "skipped"]
    rows = [[x["step"], x["result"], x["seconds"], *(x["output"] or [""])[-1:]] for x in done]
    text += ["", *table(["step", "result", "seconds", "last line"], *rows)]
    for x in (x for x in done if x["part"] == "speed"):
        text += ["", f"{x['step']}:", "", "```", *x["output"], "```"]
    for model in dict.fromkeys(row["model"] for row in parts["tuning"]):
        tuning, final = ([x for x in parts[y] if x["model"] == model] for y in ("tuning", "epoch"))
        held_back = {arm: [] for arm in ARMS}
        for x in tuning:
            held_back[x["arm"]].append(f"{x['rate']:g}: {x['top1']:.1f}")
        of_arm = in_common(final)
        last = len(of_arm["residual"])
        marks = sorted({math.ceil(last * i / 5) for i in range(1, 6)}) if last else []
        columns = ["arm", "held back, by rate", "rate", "loss", *(f"epoch {x}" for x in marks)]
        rows = []
        for arm, x in of_arm.items():
            row = [x[-1]["rate"], x[-1]["loss"]] if last else ["-", "-"]
            row += [f"{x[mark - 1]['top1']:.1f}" for mark in marks]
            rows.append([arm, ", ".join(held_back[arm]), *row])
        of = final[0]["epochs"] if final else "-"
        text += ["", f"{model}, {SIZE} px: top-1 in %, {last} of {of} epochs, tuned in"]
        text[-1] += f" {tuning[0]['epochs']}"
        text += ["", *table(columns, *rows)]
        if last:
            curves[model] = of_arm
    for x in parts["comparison"]:
        text += ["", f"comparison {x['result']} after {x['seconds']} s: {x['output'][0]}"]
    whole = "\n".join(text) + "\n"
    write_atomically(out / "table.md", lambda temporary: temporary.write_text(whole))
    if curves:
        draw(out / "curves.png", curves)
    return whole


# ---- the command line ----------------------------------------------------------------------------

# Each ends, at the latest, at this part of the time.
PARTS = dict(paths=0.35, speed=0.55, comparison=0.98)


def machine(device: torch.device) -> dict:
    facts = dict(device=str(device), torch=torch.__version__, cores=os.cpu_count())
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= dict(name=gpu.name, GB=round(gpu.total_memory / 1e9, 1), CUDA=torch.version.cuda)
        facts |= dict(capability=f"{gpu.major}.{gpu.minor}", GPUs=torch.cuda.device_count())
    return facts | dict(bf16=uses_bf16(device, "auto"), threads=torch.get_num_threads())


def main() -> None:
    p, begun = Parser(__doc__), time.monotonic()
    out = Path(time.strftime("runs/first-gpu-%Y%m%d-%H%M%S"))
    add = p.add_argument
    add(
        "--minutes",
        type=POSITIVE,
        default=12,
        help="all that it may take, but to list DATA [12]",
    )
    add("--data", type=PATH, help="photographs: train/<class>/* and val/<class>/* [synthetic ones]")
    add("--classes", type=COUNT, default=20, help="the first classes of --data [20]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--out", type=PATH, default=out, help="folder for all files [runs/first-gpu-DATE]")
    add("--table", type=PATH, metavar="OUT", help="run nothing: table and picture from OUT's rows")
    args = p.parse_args()
    if args.table:
        return print(report(args.table))
    device, _, _ = start_processes(args.device)
    if device.type not in NAMES:
        raise UserError(f"--device {args.device}: this script is for CUDA and the CPU")
    for split in ("train", "val") if args.data else ():
        if not (args.data / split).is_dir():  # told now, not after all else
            raise UserError(f"--data {args.data}: no folder {split} in it")
    make_folder(args.out)
    if (args.out / "rows.jsonl").exists():
        raise UserError(f"{args.out} holds rows already; name another folder")

    def stop(number: int, frame) -> None:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)  # so that the table is written and children end
    facts = machine(device)
    say(", ".join(f"{k} {v}" for k, v in facts.items()) + f"\nfiles in {args.out}")
    add_row(args.out, part="machine", **facts)
    paths, speed, comparison = (begun + 60 * args.minutes * x for x in PARTS.values())
    try:
        small = NAMES[device.type]
        draw_images(args.out / "images", small["size"], small["images"])
        run_part("paths", PATHS, args.out, device, paths)
        run_part("speed", SPEED, args.out, device, speed)
        compare_all(args.out, args.data, args.classes, device, comparison)
    finally:
        text = report(args.out)
    print(f"\n{text}\n{args.out}: rows.jsonl, table.md, curves.png")
    say(f"{time.monotonic() - begun:.0f} s of {60 * args.minutes:.0f}")


if __name__ == "__main__":
    with errors_in_one_line("run one of the commands by itself, with smaller numbers"):
        main()
