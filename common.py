"""What the training scripts share: devices, seeds, data, checkpoints, logs, the data set Shapes.

Two conventions run through it.

**Randomness is a function, not a stream.** Every random number of a run (weights, order of the
images, augmentation, drop-path) comes from a seed computed from the run's seed, what it is for,
and the epoch, step and place in the batch. So a resumed run needs no stored generator state to
equal an uninterrupted one, and neither does it matter how many loader workers there are.

**Bad input ends in one line.** `fail` prints what, where and what to do, and exits with code 2.
"""

import argparse
import functools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from minskip import PRESETS, ViT, conditioned_init_
from soap import SOAP

matplotlib.use("Agg")  # pictures go to files; no window system is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

CHECKPOINT_FORMAT = "minskip-1"


def fail(message: str, code: int = 2) -> NoReturn:
    """End the program with one line on stderr: what is wrong, where, and what to do about it."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def one_line_errors(memory_advice: str) -> Iterator[None]:
    """Turns what can still go wrong in mid-run, and is the user's to mend, into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fail(f"out of memory ({str(error).split('.')[0]}); {memory_advice}")
    except UnreadableImage as error:  # a loader's process puts its traceback before the message
        fail(str(error).strip().splitlines()[-1].split("UnreadableImage: ")[-1])
    except KeyboardInterrupt:  # before training has begun; from then on StopSignal sees to it
        fail("interrupted", code=130)


# What a seed is for comes first among the numbers it is made of, so that no two uses coincide.
ORDER, IMAGES, STEP = 1, 2, 3


def mixed_seeds(count: int, *numbers: int) -> list[int]:
    """32-bit seeds made of non-negative integers; neighbouring inputs give unrelated seeds."""
    return np.random.SeedSequence(numbers).generate_state(count).tolist()


# --------------------------------------------------------------------------------------------------
# Settings of a run
# --------------------------------------------------------------------------------------------------


CORES = min(8, os.cpu_count() or 1)
OPTIMIZERS, INITS = ["soap", "adamw", "muon"], ["conditioned", "depth", "default"]


def trainer_flags(p: argparse.ArgumentParser, defaults: dict, constants: tuple[dict, dict]):
    """The flags that every trainer has; returns `add(flag, help, **kind)` for its own.

    defaults: name -> (demo, folder), shown behind the help texts. constants: alpha, beta and c of
    the conditioned init, likewise. A flag that is not given stays None: what it then is depends
    on the others.
    """
    shown = defaults | {name: tuple(x[name] for x in constants) for name in constants[0]}
    number, whole, switch = dict(type=float), dict(type=int), dict(action="store_true")

    def add(flag: str, help: str, **kind) -> None:
        name = flag[2:].replace("-", "_")
        if name in shown:
            demo, folder = shown[name]
            help += f" [{demo}]" if demo == folder else f" [demo {demo}, --data {folder}]"
        p.add_argument(flag, help=help, default=None, **kind)

    add("--out", "folder of this run's files [under runs/, named after the settings]")
    add("--model", "width and depth; nano is for CPUs", choices=list(PRESETS))
    add("--skipless", "train without skip connections", **switch)
    add(
        "--init",
        "weights a skipless network starts from; conditioned: the paper's, published for 12 "
        "blocks; depth: ours, keeps tokens apart at any depth; default: the usual std 0.02, which "
        "lets it learn little or nothing [--skipless: conditioned up to 12 blocks, depth beyond; "
        "default without]",
        choices=INITS,
    )
    add(
        "--alpha",
        "conditioned init, weight of the random part of W_Q W_K^T, 0.5 .. 2; too large: "
        "attention starts as one-hot at random places",
        **number,
    )
    add(
        "--beta",
        "conditioned init, weight of the identity in W_Q W_K^T, 0.5 .. 2; too small: tokens "
        "blur into one another with depth",
        **number,
    )
    add(
        "--c",
        "scale of W_V and W_O in both inits, 1 .. 3; smaller makes every step relatively larger",
        **number,
    )
    add(
        "--pool",
        "what is read off the last block: the class token, or the mean over patch tokens, which "
        "does not ask the blocks to gather an image in one token; mean with --init depth",
        choices=["cls", "mean"],
    )
    add(
        "--position-std",
        "standard deviation of the position embedding at the start, 0.02 .. 1; 1 with --init depth",
        **number,
    )
    add(
        "--opt",
        "optimizer; soap is the paper's and matters without skips; muon is used for the blocks' "
        "matrices, adamw for the rest",
        choices=OPTIMIZERS,
    )
    add(
        "--lr",
        "peak learning rate; a skipless network wants a third to a tenth of a residual one's: "
        "too large and the loss stays flat at its first value [by optimizer, 2e-4 .. 5e-3]",
        **number,
    )
    add("--batch-size", "images a step, over all processes", **whole)
    add("--epochs", "passes over the training images", **whole)
    add(
        "--warmup-epochs",
        "epochs over which the learning rate rises; fractions are fine; too short: the loss "
        "jumps in the first steps",
        **number,
    )
    add("--image-size", "side of the images, pixels", **whole)
    add("--patch-size", "side of a patch, pixels; halving it makes four times the tokens", **whole)
    add("--depth", "number of blocks [the model's]", **whole)
    add(
        "--drop-path",
        "stochastic depth of the last block, only with skips [demo 0, --data 0.1; 0 without skips]",
        **number,
    )
    add("--workers", "processes that load images", **whole)
    add("--compile", "torch.compile: faster after a minute or two of compiling", **switch)
    add("--amp", "bf16 autocast; auto: on GPUs that support it", choices=["auto", "bf16", "off"])
    add("--device", "auto, cpu, cuda or cuda:N")
    add("--seed", "of weights, order, augmentation and drop-path", **whole)
    add(
        "--resume",
        "continue the run of this checkpoint, on the CPU to the last bit; its settings are kept",
        metavar="CKPT",
    )
    p.error = fail  # one line, like every other mistake
    return add


def given_flags(given: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(given).items() if value is not None}


def stored_settings(given: argparse.Namespace, stored: dict, free: set[str]) -> argparse.Namespace:
    """A checkpoint's settings, overridden by the flags that are free to change.

    Ends the program when another flag contradicts the checkpoint.
    """
    explicit = given_flags(given)
    for name, value in explicit.items():
        if name not in free and value != stored.get(name):
            flag = "--" + name.replace("_", "-")
            fail(
                f"{flag} {value} contradicts the checkpoint, trained with {stored.get(name)}; "
                f"leave {flag} out"
            )
    return argparse.Namespace(**{**vars(given), **stored, **explicit})


def settle_init(settings: dict, explicit: dict, constants: dict) -> dict:
    """Settings with what belongs to the chosen --init; others' constants end the program.

    constants: alpha, beta and c of --init conditioned.
    """
    used = dict(conditioned=list(constants), depth=["c"], default=[])[settings["init"]]
    if useless := [f"--{name}" for name in constants if name in explicit and name not in used]:
        fail(f"{' and '.join(useless)} set the conditioned init; add --init conditioned")
    if settings["init"] == "depth":  # what that scheme counts on, unless told otherwise
        settings = settings | dict(position_std=1.0, pool="mean") | explicit
    return {name: constants[name] for name in used} | settings


def settled(
    given: argparse.Namespace,
    defaults: dict[str, tuple],
    constants: tuple[dict, dict],
    learning_rate: dict[str, tuple],
    drop_path: tuple[float, float],
) -> argparse.Namespace:
    """The settings of a fresh run: as given, else by default.

    defaults and constants as for `trainer_flags`; learning_rate: optimizer -> (demo, folder), each
    (residual, skipless); drop_path: (residual, skipless), with a folder.
    """
    explicit = given_flags(given)
    folder = "data" in explicit
    settings = {name: values[folder] for name, values in defaults.items()} | explicit
    skipless = settings.setdefault("skipless", False)
    settings.setdefault("compile", False)
    settings.setdefault("depth", PRESETS[settings["model"]]["depth"])
    # The paper's constants are published for 12 blocks; at 24 ours trained better (README).
    scheme = "conditioned" if settings["depth"] <= 12 else "depth"
    settings.setdefault("init", scheme if skipless else "default")
    settings.setdefault("drop_path", drop_path[skipless] if folder else 0.0)
    settings.setdefault("lr", learning_rate[settings["opt"]][folder][skipless])
    if settings["drop_path"] and skipless:
        fail("--drop-path needs skip connections: leave it out with --skipless")
    settings = settle_init(settings, explicit, constants[folder])
    return argparse.Namespace(**{**vars(given), **settings})


def check_ranges(
    args: argparse.Namespace, positive: list[str], not_negative: list[str], shares: list[str]
) -> None:
    """End the program at the first setting out of its range; a share lies in [0, 1)."""
    for names, fits, rule in (
        (positive, lambda x: x > 0, "be positive"),
        (not_negative, lambda x: x >= 0, "not be negative"),
        (shares, lambda x: 0 <= x < 1, "lie in [0, 1)"),
    ):
        for name in names:
            if not fits(getattr(args, name)):
                flag = "--" + name.replace("_", "-")
                fail(f"{flag} must {rule}; it is {getattr(args, name)}")
    if args.seed >= 2**32:
        fail(f"--seed must be below 2^32, not {args.seed}")
    if args.warmup_epochs >= args.epochs:
        fail(f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}")


def run_folder(out: str | None, stem: str, seed: int) -> Path:
    """--out, which must not hold another run; or else a free name under runs/."""
    if out is not None:
        if (Path(out) / "last.pt").exists():
            fail(f"--out {out} holds a run already; --resume it or name another folder")
        return Path(out)
    folder, number = Path("runs") / f"{stem}-seed{seed}", 1
    while folder.exists():
        number += 1
        folder = Path("runs") / f"{stem}-run{number}-seed{seed}"
    chosen = [folder]
    if dist.is_initialized():  # one process may have made it before another looked
        dist.broadcast_object_list(chosen)
    return chosen[0]


def resumed_folder(args: argparse.Namespace, given_out: str | None, stem: str) -> Path:
    """The folder of the checkpoint that --resume names, unless --out names another one."""
    here = Path(args.resume).resolve().parent
    same = given_out is None or Path(given_out).resolve() == here
    return here if same else run_folder(args.out, stem, args.seed)


def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {out}: cannot make this folder ({error.strerror})")


def check_same_run(path: str, checkpoint: dict, images: int, processes: int) -> None:
    """A run continues exactly only on as many images and processes as it began with."""
    before = (checkpoint["images"], checkpoint["processes"])
    if before != (images, processes):
        fail(
            f"--resume {path}: that run had {before[0]} training images and {before[1]} "
            f"processes, this one {images} and {processes}; give it the same"
        )


def break_off(what: str, out: Path, epoch: int, step: int, lr: float) -> NoReturn:
    """End a run that has gone wrong; what was saved before is good and stays."""
    kept = f"{out / 'last.pt'} is kept" if (out / "last.pt").exists() else "nothing saved yet"
    fail(
        f"{what} at epoch {epoch + 1}, step {step + 1}, lr {lr:.2g}; {kept}. Usual causes: --lr "
        f"too large, --warmup-epochs too short, gradients not clipped",
        code=1,
    )


def initialise_(model: ViT, args: argparse.Namespace) -> None:
    """The weights that --init asks for, in place; a `ViT` is born with the default ones."""
    if args.init == "conditioned":
        conditioned_init_(model, args.alpha, args.beta, args.c)
    elif args.init == "depth":
        conditioned_init_(model, c=args.c, scheme="depth")


def build_vit(args: argparse.Namespace, num_classes: int) -> ViT:
    """The network that the flags describe, initialised; sizes that do not fit end the program."""
    try:
        model = ViT(
            args.image_size,
            args.patch_size,
            num_classes,
            **PRESETS[args.model] | dict(depth=args.depth),
            residual=not args.skipless,
            pool=args.pool,
            position_std=args.position_std,
            drop_path=args.drop_path,
        )
        initialise_(model, args)
    except ValueError as error:
        fail(str(error))
    return model


def described(model: ViT, args: argparse.Namespace) -> tuple[str, str]:
    """(start of a run folder's name, the line that a run says of its network)."""
    body = "skipless" if args.skipless else "residual"
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    kind = f"skipless-{args.init}" if args.skipless else body
    return f"{args.model}-{kind}-{args.opt}", (
        f"model   ViT {args.model}, {args.depth} blocks, {parameters:.2f} M parameters, "
        f"{body}, {args.init} init"
    )


# --------------------------------------------------------------------------------------------------
# Optimizers
# --------------------------------------------------------------------------------------------------


def build_optimizers(
    model: nn.Module, opt: str, lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """One optimizer, or two for muon. Biases, norms and embeddings are not decayed.

    Groups that are decayed carry `decayed=True`, for schedules of the weight decay.
    """
    matrices, plain, hidden = [], [], []
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith(("class_token", "position_embedding")):
            plain.append(p)
        elif opt == "muon" and "blocks." in name:
            hidden.append(p)
        else:
            matrices.append(p)
    groups = [
        dict(params=matrices, weight_decay=weight_decay, decayed=True),
        dict(params=plain, weight_decay=0.0, decayed=False),
    ]
    if opt == "soap":
        return [SOAP(groups, lr=lr)]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    if opt == "adamw":
        return [adamw]
    # match_rms_adamw: steps as large as AdamW's, so that one learning rate serves both
    group = dict(params=hidden, decayed=True)
    muon = torch.optim.Muon(
        [group], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adamw]


# --------------------------------------------------------------------------------------------------
# Devices and processes
# --------------------------------------------------------------------------------------------------


def start_processes(device_name: str) -> tuple[torch.device, int, int]:
    """(device, rank, world size). Joins a process group only when launched by torchrun.

    device_name: "auto" (CUDA if there is any, else the CPU), "cpu", "cuda" or "cuda:1".
    Ends the program when CUDA is asked for and absent.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device_name):
        fail(f"--device {device_name!r} is not known here; use auto, cpu, cuda or cuda:N")
    device = torch.device("cpu" if device_name == "auto" else device_name)
    if device_name == "auto" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count() if torch.cuda.is_available() else "no"
        fail(f"--device {device_name}: {found} CUDA devices found here; use --device cpu or auto")
    launched = "RANK" in os.environ
    if device.type == "cuda":
        number = int(os.environ["LOCAL_RANK"]) if launched else device.index or 0
        if number >= torch.cuda.device_count():
            fail(f"--nproc-per-node exceeds the {torch.cuda.device_count()} CUDA devices here")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    if not launched:
        return device, 0, 1
    # The others wait while the first process looks through the images: minutes, of a large set.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device, dist.get_rank(), dist.get_world_size()


def uses_bf16(device: torch.device, amp: str) -> bool:
    """amp: "auto" is bf16 on CUDA cards that support it, "bf16" is bf16 wherever, "off" nowhere.

    Never fp16: it gives NaN on small images, where bf16, with float32's range, does not.
    """
    auto = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return amp == "bf16" or (amp == "auto" and auto)


def autocast(device: torch.device, amp: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(device, amp))


def gathered(x: Tensor) -> Tensor:
    """The processes' tensors, which may differ in length, one after the other along axis 0."""
    if not dist.is_initialized():
        return x
    length = torch.tensor([len(x)], device=x.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    lengths = [int(n) for n in lengths]
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, lengths)])


def mean_over_processes(x: Tensor) -> Tensor:
    if not dist.is_initialized():
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x / dist.get_world_size()


def in_processes(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over the processes, where there are several."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return network
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)


class StopSignal:
    """Ctrl-C and SIGTERM as a flag that a training loop reads between two steps.

    `requested()` is the signal's number or 0. A second signal falls through to Python's default.
    """

    def __init__(self):
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def requested(self, device: torch.device) -> int:
        if not dist.is_initialized():
            return self.number
        # Every process must leave at the same step, or the others wait for it in the next gradient
        # exchange for ever.
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def leave_if_asked(
    stop: StopSignal, device: torch.device, save: Callable, out: Path, epoch: int, step: int
) -> None:
    """On Ctrl-C or SIGTERM save, unless saved just now, and end with the shell's usual code."""
    number = stop.requested(device)
    if not number:
        return
    if step:
        save(epoch, step)
    if not dist.is_initialized() or dist.get_rank() == 0:
        last = out / "last.pt"
        print(f"stopped at epoch {epoch + 1}, step {step}; continue with --resume {last}")
    if dist.is_initialized():
        dist.barrier()  # torchrun ends all when the first leaves: save before that
    raise SystemExit(128 + number)


# --------------------------------------------------------------------------------------------------
# Shapes: a data set that is drawn, not downloaded
# --------------------------------------------------------------------------------------------------


def disc(x: Tensor, y: Tensor, radius: float, x0: float = 0.0) -> Tensor:
    return torch.hypot(x - x0, y) - radius


def box(x: Tensor, y: Tensor, half_width, half_height) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


# Each is a signed distance (or nearly): negative inside, on a canvas of [-1, 1] x [-1, 1].
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: disc(x, y, 0.8),
    "ring": lambda x, y: disc(x, y, 0.7).abs() - 0.2,
    "square": lambda x, y: box(x, y, 0.72, 0.72),
    "triangle": lambda x, y: torch.maximum(x - 0.5, 0.866 * y.abs() - 0.5 * x - 0.5),
    "cross": lambda x, y: torch.minimum(box(x, y, 0.9, 0.27), box(x, y, 0.27, 0.9)),
    "crescent": lambda x, y: torch.maximum(disc(x, y, 0.9), -disc(x, y, 0.75, 0.5)),
    "bar": lambda x, y: box(x, y, 0.95, 0.24),
    "frame": lambda x, y: box(x, y, 0.61, 0.61).abs() - 0.19,
    "corner": lambda x, y: torch.minimum(box(x + 0.5, y, 0.28, 0.85), box(x, y + 0.57, 0.78, 0.28)),
    "dots": lambda x, y: torch.minimum(disc(x, y, 0.4, -0.5), disc(x, y, 0.4, 0.5)),
}


SPLITS = {"train": 1, "val": 2, "test": 3}


def draw_shapes(indices: list[int], size: int, split: str, seed: int = 0):
    """Draw images of `SHAPES`, one bright shape each on a dark textured ground with distractors.

    Colour, place, size and rotation are random, the ground is three gratings, and three short
    bars lie about as distractors. An image is a function of (seed, split, index) alone, whatever
    its size, and its class is index mod 10.

    Returns images (batch, 3, size, size) uint8, labels (batch,), and masks (batch, size, size)
    uint8: 0 the ground and distractors, 1 + label the shape.
    """
    labels = torch.tensor(indices) % len(SHAPES)
    generators = [np.random.default_rng((seed, SPLITS[split], i)) for i in indices]
    numbers = np.stack([g.random(64, np.float32) for g in generators], axis=1)
    columns = iter(torch.from_numpy(numbers)[:, :, None, None])

    def draw(low: float, high: float) -> Tensor:  # (batch, 1, 1)
        return low + (high - low) * next(columns)

    def colour(low: float, high: float) -> Tensor:  # (batch, 3, 1, 1)
        return torch.stack([draw(low, high) for _ in range(3)], dim=1)

    ticks = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")

    def rotated(x0: Tensor | float, y0: Tensor | float, angle: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x - x0, y - y0
        return u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()

    def paint(image: Tensor, distance: Tensor, paint_colour: Tensor) -> tuple[Tensor, Tensor]:
        cover = (0.5 - distance * size / 2).clamp(0, 1)  # antialiased over one pixel
        return image + cover[:, None] * (paint_colour - image), cover

    image = colour(0.1, 0.4).expand(-1, -1, size, size)
    for _ in range(3):  # gratings
        u, _ = rotated(0, 0, draw(0, math.pi))
        wave = torch.sin(draw(4, 24) * u + draw(0, 2 * math.pi))
        image = image + colour(-0.08, 0.08) * wave[:, None]
    for _ in range(3):  # distractors
        u, v = rotated(draw(-1, 1), draw(-1, 1), draw(0, math.pi))
        image, _ = paint(image, box(u, v, draw(0.05, 0.4), draw(0.04, 0.1)), colour(0, 0.6))
    radius = draw(0.55, 0.85)
    room = 1 - radius
    u, v = rotated(draw(-1, 1) * room, draw(-1, 1) * room, draw(0, 2 * math.pi))
    distance = torch.empty(len(indices), size, size)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(u[chosen] / radius[chosen], v[chosen] / radius[chosen])
    image, cover = paint(image, distance * radius, colour(0.6, 1.0))
    masks = torch.where(cover > 0.5, labels[:, None, None] + 1, 0).to(torch.uint8)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels, masks


class Shapes(Dataset):
    """`draw_shapes` as a data set of (image (3, size, size) uint8, label). Deterministic.

    split: "train", "val" or "test"; they share no image. `draw_shapes` also gives masks.
    """

    def __init__(self, split: str, length: int, image_size: int = 32, seed: int = 0):
        self.classes = list(SHAPES)
        self.split, self.length, self.image_size, self.seed = split, length, image_size, seed

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        # DataLoader calls this with a whole batch; drawn together an image takes a tenth the time.
        images, labels, _ = draw_shapes(indices, self.image_size, self.split, self.seed)
        return list(zip(images, labels.tolist()))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.__getitems__([index])[0]


# --------------------------------------------------------------------------------------------------
# Image folders: ROOT/train/<class>/*, ROOT/val/<class>/*
# --------------------------------------------------------------------------------------------------


class UnreadableImage(RuntimeError):
    """Its message is the one line to show."""


DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's


def open_rgb(path: str) -> Image.Image:
    """Read an image file as RGB (greyscale and palette images are converted).

    Raises UnreadableImage, naming the file, where it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except DECODING_ERRORS as error:
        raise UnreadableImage(f"cannot read image {path} ({error}); repair or remove it") from error


def check_images(paths: list[str], decode_up_to: int = 20_000) -> None:
    """End the program at the first unreadable image, before training has begun.

    Up to `decode_up_to` files are decoded in full; of a larger set, where that would take long,
    only the headers are read (a damaged body then stops the run when it is met).
    """

    def problem(path: str) -> str | None:
        try:
            if len(paths) <= decode_up_to:
                open_rgb(path)
            else:
                Image.open(path).close()
        except UnreadableImage as error:
            return str(error)
        except DECODING_ERRORS as error:
            return f"cannot read image {path} ({error}); repair or remove it"

    with ThreadPoolExecutor(8) as pool:
        found = tqdm(
            pool.map(problem, paths), "checking images", len(paths), disable=None, leave=False
        )
        for message in found:
            if message:
                pool.shutdown(cancel_futures=True)
                fail(message)


def image_folder(root: str, split: str) -> ImageFolder:
    """`ROOT/split/<class>/*` as torchvision's ImageFolder, or an end with one clear line."""
    folder = Path(root) / split
    layout = f"expected ROOT/{split}/<class>/<image files>"
    if not Path(root).is_dir():
        fail(f"--data {root}: no such folder")
    if not folder.is_dir():
        fail(f"--data {root}: no folder {folder}; {layout}")
    try:
        return ImageFolder(str(folder), loader=open_rgb)
    except FileNotFoundError as error:  # no class folder, or one without images
        fail(f"--data {root}: {str(error).splitlines()[0].rstrip('.')}; {layout}")


def image_folders(root: str, check: bool = True) -> tuple[ImageFolder, ImageFolder]:
    """The train and val folders under ROOT, with the same classes and readable images.

    check=False leaves the images unread: of several processes one is enough.
    """
    train, val = image_folder(root, "train"), image_folder(root, "val")
    if train.classes != val.classes:
        only_train = sorted(set(train.classes) - set(val.classes))
        only_val = sorted(set(val.classes) - set(train.classes))
        fail(
            f"--data {root}: train/ and val/ must hold the same classes; only in train: "
            f"{only_train[:3]}, only in val: {only_val[:3]}"
        )
    if check:
        check_images([path for path, _ in train.samples + val.samples])
    return train, val


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set here


@functools.cache  # once a device: making a tensor on a GPU in every step would wait for the GPU
def channel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))


def normalise(images: Tensor) -> Tensor:
    """(batch, 3, height, width) uint8 -> float32 with about zero mean and unit variance.

    On the device, so that images travel there as uint8: a quarter of the traffic.
    """
    mean, std = channel_statistics(images.device)
    return (images.float() / 255 - mean) / std


def augmentations(size: int, drawn: bool) -> tuple[v2.Transform, v2.Transform]:
    """(training, validation) transforms to uint8 tensors of size x size."""
    if drawn:  # a turned-over disc is a disc; the drawings are of the right size already
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]), v2.Identity()
    grey = [round(255 * m) for m in MEAN]  # zero once normalised
    train = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9, fill=grey),
            v2.PILToTensor(),
            v2.RandomErasing(p=0.25, value=grey),
        ]
    )
    # ImageNet practice cuts the middle 7/8 out; of images hardly larger than `size` keep all.
    resized = round(size / 0.875) if size >= 128 else size
    val = v2.Compose(
        [
            v2.Resize(resized, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
        ]
    )
    return train, val


class Seeded(Dataset):
    """A data set whose transform draws its random numbers from a seed that comes with the index.

    Keys are (index, seed) pairs, as `Batches` makes them.
    """

    def __init__(self, dataset: Dataset, transform: Callable):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        indices = [index for index, _ in keys]
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = (self.dataset[index] for index in indices)  # one decoded at a time
        out = []
        for (_, seed), (image, label) in zip(keys, samples):
            # not torch.manual_seed: it seeds every device too, a quarter of the time of an image
            torch.default_generator.manual_seed(seed)
            out.append((self.transform(image), label))
        return out


class Batches:
    """The batches of an epoch as lists of (index, seed): a function of (run seed, epoch) alone.

    Set `epoch`, and `first` to leave out the batches that a resumed run has already seen. With
    several processes each gets every world_size-th image of a batch of `batch_size`.

    shuffle=True is for training: a new order every epoch, the last incomplete batch left out.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world: int = 1
    ):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world = rank, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole = self.length // self.batch_size
        return whole if self.shuffle else math.ceil(self.length / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.length)
        if self.shuffle:
            [seed] = mixed_seeds(1, ORDER, self.seed, self.epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.length, generator=generator)
        for step in range(self.first, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            seeds = mixed_seeds(len(batch), IMAGES, self.seed, self.epoch, step)
            mine = list(zip(batch.tolist(), seeds))[self.rank :: self.world]
            if mine:  # the last batch of a validation may be smaller than the number of processes
                yield mine


def _start_worker(_: int) -> None:
    # Ctrl-C goes to every process of the terminal; the main process alone decides what it means.
    # A batch system sends SIGTERM to all of them too. They end when the main process does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(
    dataset: Seeded, batches: Batches, workers: int, device: torch.device
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and batches.shuffle,  # those for validation would idle
        worker_init_fn=_start_worker,
    )


def epoch_bar(loader: DataLoader, batches: Batches, epochs: int) -> tqdm:
    """The loader behind a progress bar of the epoch that `batches` is set to, on terminals only."""
    return tqdm(
        loader,
        f"epoch {batches.epoch + 1}/{epochs}",
        len(batches),
        initial=batches.first,
        unit_scale=batches.batch_size,
        unit=" images",
        disable=None if batches.rank == 0 else True,
        leave=False,
    )


# --------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that a reader finds the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def save_checkpoint(path: Path, **content) -> None:
    """Tensors, numbers, strings, lists and dicts only, so that it loads with weights_only=True."""
    content = {"format": CHECKPOINT_FORMAT, **content}
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def load_checkpoint(path: str, script: str | None = None) -> dict:
    """A checkpoint of ours, on the CPU; anything else ends the program with one line.

    script: the name of the script that must have written it; None takes any.
    """
    if not Path(path).is_file():
        fail(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file of any other kind makes the reader stumble over
        kind = type(error).__name__
        fail(f"checkpoint {path} is damaged or of another program ({kind}); use a file saved here")
    if not isinstance(content, dict) or content.get("format") != CHECKPOINT_FORMAT:
        fail(
            f"checkpoint {path} was not written by this project; use one of its last.pt or best.pt"
        )
    if script is not None and content.get("script") != script:
        fail(f"checkpoint {path} was written by {content.get('script')}, not by {script}")
    return content


def model_of(checkpoint: dict) -> ViT:
    """The network of a checkpoint, rebuilt from it alone; averaged weights where it has any."""
    model = ViT(**checkpoint["model_config"])
    weights = checkpoint["model"]
    if checkpoint["ema"] is not None:
        weights = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items()}
        weights.pop("n_averaged")
    model.load_state_dict(weights)
    return model


def untrained_model_of(checkpoint: dict) -> ViT:
    """The network of a checkpoint as it was before training: its seed's very weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checkpoint["args"]["seed"])
        model = ViT(**checkpoint["model_config"])
        initialise_(model, argparse.Namespace(**checkpoint["args"]))
    return model


# --------------------------------------------------------------------------------------------------
# Logs and pictures
# --------------------------------------------------------------------------------------------------


def write_log(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, one line an epoch. Rewritten whole: it always matches its run."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text))


# Okabe and Ito's colours, told apart with every common colour blindness.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def save_figure(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and let go of it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130, format="png"))
    plt.close(figure)


def plot_curves(out: Path, panels: dict[str, str]) -> None:
    """`out/curves.png`: every run beside `out` (each folder with a log.jsonl) in one picture.

    panels: log key -> axis label; epochs in which a key is null are left out of its panel. Runs
    that differ only by a suffix -seedN share a colour.
    """
    runs = {}
    for log in sorted(out.resolve().parent.glob("*/log.jsonl")):
        try:
            rows = [json.loads(line) for line in log.read_text().splitlines()]
            if rows and all(key in row for row in rows for key in ("epoch", *panels)):
                runs[log.parent.name] = rows
        except (ValueError, TypeError, OSError):
            continue  # another program's log of the same name is no reason to stop a run
    groups = list(dict.fromkeys(re.sub(r"-seed\d+$", "", name) for name in runs))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for ax, (key, label) in zip(axes[0], panels.items()):
        drawn = set()
        for name, rows in runs.items():
            group = re.sub(r"-seed\d+$", "", name)
            number = groups.index(group)
            points = [(row["epoch"], row[key]) for row in rows if row[key] is not None]
            ax.plot(
                *zip(*points),
                color=COLOURS[number % len(COLOURS)],
                linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                linewidth=1.4,
                marker="." if len(points) <= 10 else None,
                label=None if group in drawn else group,
            )
            drawn.add(group)
        ax.set_xlabel("epoch")
        ax.set_title(label, fontsize=10)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, out / "curves.png")
