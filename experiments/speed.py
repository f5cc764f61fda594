"""Times one thing done in several ways, which take turns in one process.

    pip install -r requirements.txt -r tests/requirements.txt    (step and soap need the second)
    python experiments/speed.py step          a training step of our ViT and of timm's
    python experiments/speed.py soap          a step of our SOAP and of pytorch-optimizer's
    python experiments/speed.py init          the paper's init with one SVD per block, or per head
    python experiments/speed.py dino          a DINO step with one pass per resolution, or per crop
    python experiments/speed.py loading       JPEGs through our transforms, or the customary ones
    python experiments/speed.py checkpoint    writing a checkpoint, or as many bytes plainly

Each prints median times, and the ratio of two times in one turn: its median and its quartiles.
"""

import inspect
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minskip import PRESETS, ViT, conditioned_init_, orthogonal_mlp_weight, value_output_projections
from soap import SOAP, kept_of
from support import data
from support.crops import MultiCrop, recoloured
from support.errors import errors_in_one_line
from support.files import load_checkpoint, save_checkpoint, write_atomically
from support.flags import COUNT, WORKERS, Parser, checked
from support.processes import autocast, on_device, start_processes, uses_bf16
from support.shapes import draw_shapes

REPEATS = checked(int, lambda x: x >= 2, "be at least 2, because ratios have quartiles")
PIXELS = checked(int, lambda x: x > 0 and x % 16 == 0, "be a multiple of 16")
DEVICE = dict(default="auto", help="auto, cpu, cuda or cuda:N [auto]")


def in_turns(ways: dict[str, Callable], repeats: int, calls: int = 1) -> dict[str, list[float]]:
    """Name -> seconds of each of its turns, of so many calls. The first turn is not counted."""
    times = {name: [] for name in ways}
    for _ in range(1 + repeats):
        for name, call in ways.items():
            begun = time.perf_counter()
            for _ in range(calls):
                call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a GPU's calls return before the work is done
            times[name].append(time.perf_counter() - begun)
    return {name: seconds[1:] for name, seconds in times.items()}


def report(title: str, times: dict[str, list[float]], *pairs: tuple[str, str]) -> None:
    """Print the medians, and how the two ways of each pair compare in the same turn."""
    ways = ", ".join(f"{name} {1000 * median(x):.0f} ms" for name, x in times.items())
    print(f"{title}: {ways}")
    for one, other in pairs:
        ratios = [a / b for a, b in zip(times[one], times[other])]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        print(f"       {one} / {other} {middle:.3f} ({low:.3f} .. {high:.3f})")


def networks(name: str, image_size: int) -> dict[str, nn.Module]:
    """timm's, if it is installed, ours with skips and ours without, all of one size."""
    dim, depth, heads = PRESETS[name].values()
    networks = {
        kind: ViT(image_size, **PRESETS[name], residual=kind == "residual")
        for kind in ("residual", "skipless")
    }
    try:
        from timm.models import VisionTransformer
    except ImportError:
        print("timm is not installed: ours alone (pip install -r tests/requirements.txt)")
        return networks
    timm = VisionTransformer(image_size, 16, embed_dim=dim, depth=depth, num_heads=heads)
    return dict(timm=timm) | networks


def step(p: Parser) -> None:
    """Times a training step of our ViT, with skips and without, against timm's.

    A step is forward, loss, backward and the optimizer's update, on one random batch; in bf16 on
    GPUs that have it. On a GPU it also prints images per second, hours per epoch of ImageNet, and
    the memory that a step takes beyond weights and optimizer state.
    """
    add, sizes = p.add_argument, ["tiny", "small"]
    add("--models", nargs="+", choices=PRESETS, default=sizes, help="sizes [tiny small]")
    add("--opt", choices=["soap", "adamw"], default="adamw", help="optimizer of all three [adamw]")
    add("--batch-size", type=COUNT, default=8, help="images per step [8]")
    add("--image-size", type=PIXELS, default=224, help="pixels, a multiple of 16 [224]")
    add("--steps", type=REPEATS, default=20, help="steps to time [20]")
    add("--device", **DEVICE)
    add("--compile", action="store_true", help="torch.compile all three")
    args = p.parse_args(sys.argv[2:])
    device, _, _ = start_processes(args.device)
    precision = "bf16" if uses_bf16(device, "auto") else "float32"
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % 1000
    optimizer = SOAP if args.opt == "soap" else partial(torch.optim.AdamW, fused=True)

    def training_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with autocast(device, "auto"):
            loss = F.cross_entropy(network(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for name in args.models:
        ways = {}
        for kind, network in networks(name, args.image_size).items():
            network = torch.compile(network.to(device)) if args.compile else network.to(device)
            updates = optimizer(network.parameters(), lr=1e-4, weight_decay=0.05)
            ways[kind] = partial(training_step, network, updates)
        times = in_turns(ways, args.steps)
        base = next(iter(times))  # timm's, or ours with skips
        pairs = [(kind, base) for kind in ("residual", "skipless") if kind != base]
        report(f"{name}, {device}, {precision}", times, *pairs)
        for kind, take_step in ways.items() if device.type == "cuda" else ():
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            take_step()
            peak = (torch.cuda.max_memory_allocated() - held) / 1e9
            rate = args.batch_size / median(times[kind])
            hours = 1_281_167 / rate / 3600  # ImageNet has so many training images
            print(f"       {kind:8s} {rate:7.0f} images/s, {hours:.2f} h an epoch, {peak:5.2f} GB")


def soap(p: Parser) -> None:
    """Times an optimizer's step: our SOAP, pytorch-optimizer's SOAP, and AdamW as the floor.

    All get the same gradients for the blocks of a ViT. First the parts of our SOAP's step: moments
    alone, what products with factors and bases add to them, and what refreshing every basis adds to
    these. Then all three: a turn is ten steps, of which one refreshes all bases.
    Then how much longer the longest step is than the median one, with all refreshes in one step and
    with staggered ones, as in training.
    """
    p.add_argument("--model", choices=PRESETS, default="nano", help="size of the ViT [nano]")
    p.add_argument("--tens", type=REPEATS, default=6, help="turns of ten steps to time [6]")
    p.add_argument("--device", **DEVICE)
    args = p.parse_args(sys.argv[2:])
    device, _, _ = start_processes(args.device)
    kinds = {"SOAP here": SOAP, "AdamW": torch.optim.AdamW}
    try:
        from pytorch_optimizer import SOAP as PeerSOAP

        kinds["pytorch-optimizer's"] = PeerSOAP
    except ImportError:
        print("pytorch-optimizer is not installed: ours alone (tests/requirements.txt has it)")
    blocks = ViT(**PRESETS[args.model]).blocks.to(device)
    torch.manual_seed(0)
    for weight in blocks.parameters():
        weight.grad = torch.randn_like(weight)
    options = dict(
        moments=dict(max_precondition_dim=1),
        products=dict(precondition_frequency=10**9),
        refresh=dict(precondition_frequency=1),
    )
    ways = {name: SOAP(blocks.parameters(), **x).step for name, x in options.items()}
    first, second, third = (1000 * median(x) for x in in_turns(ways, args.tens).values())
    del ways
    print(f"{args.model}, {device}, a step of ours: moments {first:.1f} ms, products "
          f"{second - first:.1f} ms, a refresh of all bases {third - second:.1f} ms")  # fmt: skip

    ways = {name: kind(blocks.parameters(), lr=1e-4).step for name, kind in kinds.items()}
    times = in_turns(ways, args.tens, calls=10)  # the warm-up builds SOAP's factors
    pairs = [(name, "SOAP here") for name in times if name.startswith("pytorch")]
    report(f"{args.model}, {device}, ten steps", times, *pairs)
    for name, stagger in (("in one step", False), ("staggered", True)):
        step = SOAP(blocks.parameters(), stagger=stagger).step
        steps = in_turns({"": step}, 10 * args.tens)[""]
        longest = max(steps) / median(steps)
        print(f"       refreshes {name}: the longest step takes {longest:.1f} times the median")


def one_svd_per_head(dim: int, num_heads: int, alpha: float = 2.0, beta: float = 0.6) -> list:
    """The weights of one block, by the paper's formula as it stands."""
    d_h, weights = dim // num_heads, []
    for _ in range(num_heads):
        Z = torch.randn(dim, dim) / math.sqrt(dim)
        U, S, V_T = torch.linalg.svd(alpha * Z + beta * torch.eye(dim))
        weights += [U[:, :d_h] * S[:d_h].sqrt(), V_T.T[:, :d_h] * S[:d_h].sqrt()]
    weights += value_output_projections(dim)
    return [*weights, orthogonal_mlp_weight(dim, 4 * dim), orthogonal_mlp_weight(4 * dim, dim)]


def init(p: Parser) -> None:
    """Times the paper's init: one SVD per block, as here, against one SVD per head.

    One block is timed and multiplied by the depth. It depends on threads and on what else runs: on
    a busy machine OMP_NUM_THREADS=1 is many times faster.
    """
    add, sizes = p.add_argument, ["small", "base", "large"]
    add("--models", nargs="+", choices=PRESETS, default=sizes, help="sizes [small base large]")
    add("--repeats", type=REPEATS, default=5, help="inits to time each way [5]")
    args = p.parse_args(sys.argv[2:])
    for name in args.models:
        dim, depth, heads = PRESETS[name].values()
        block = ViT(dim=dim, depth=1, num_heads=heads, residual=False)
        ways = {"per block": partial(conditioned_init_, block)}
        ways["per head"] = partial(one_svd_per_head, dim, heads)
        times = in_turns(ways, args.repeats)
        whole = {way: [depth * x for x in seconds] for way, seconds in times.items()}
        report(name, whole, ("per head", "per block"))


def dino(p: Parser) -> None:
    """Times the crops of a DINO step: one pass per resolution, as in training, or one per crop.

    The student's backbone runs forward and backward on 2 crops of 224 px and 8 of 96 px per image.
    """
    p.add_argument("--model", choices=PRESETS, default="small", help="size of the ViT [small]")
    p.add_argument("--batch-size", type=COUNT, default=2, help="images per step [2]")
    p.add_argument("--repeats", type=REPEATS, default=6, help="steps to time each way [6]")
    p.add_argument("--device", **DEVICE)
    args = p.parse_args(sys.argv[2:])
    device, _, _ = start_processes(args.device)
    model = ViT(**PRESETS[args.model], residual=False, pool="mean").to(device)
    sides = [224] * 2 + [96] * 8
    crops = [torch.randn(args.batch_size, 3, side, side, device=device) for side in sides]
    passes = {"per resolution": [torch.cat(crops[:2]), torch.cat(crops[2:])], "per crop": crops}

    def forward_backward(groups: list[Tensor]) -> None:
        with autocast(device, "auto"):
            loss = sum(model(images).float().square().sum() for images in groups)
        loss.backward()
        model.zero_grad()

    ways = {name: partial(forward_backward, groups) for name, groups in passes.items()}
    times = in_turns(ways, args.repeats)
    report(f"{args.model}, {device}", times, ("per crop", "per resolution"))


def draw_photographs(root: Path, count: int) -> None:
    """ROOT/train/0/*.jpg, as large as photographs."""
    (root / "train/0").mkdir(parents=True)
    for number in range(count):
        [image], _, _ = draw_shapes([number], 500, "train")
        # without grain the files would be a fifth as large as a photograph's
        grainy = (image[:, :375] + torch.randint(0, 20, (3, 375, 500))).clamp(max=255)
        image = v2.functional.to_pil_image(grainy.to(torch.uint8))
        image.save(root / f"train/0/{number}.jpg", quality=90)


def customary_crop(size: int, *colours: v2.Transform, scale=(0.08, 1.0)) -> v2.Compose:
    """A transform from image to normalised floats, as published training code composes it."""
    return v2.Compose([
        v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), *colours,
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN, data.STD),
    ])  # fmt: skip


def customary_multicrop() -> Callable:
    """DINO's augmentation with everything done in the loader process, as in its published code."""

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        jitter, soft = v2.ColorJitter(0.4, 0.4, 0.2, 0.1), ImageFilter.GaussianBlur(1.05)
        return customary_crop(
            size, v2.RandomApply([jitter], p=0.8), v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.Lambda(lambda image: image.filter(soft))], p=blur),
            v2.RandomSolarize(128, p=solarize), scale=scale,
        )  # fmt: skip

    first, second = crop(224, (0.25, 1.0), 1.0, 0.0), crop(224, (0.25, 1.0), 0.1, 0.2)
    crops = [first, second, *[crop(96, (0.05, 0.25), 0.5, 0.0)] * 8]
    return lambda image: [crop(image) for crop in crops]


def loading(p: Parser) -> None:
    """Times loading and augmenting JPEGs for both trainers: ours against the customary transforms.

    The images are drawn here, as large as photographs, 500 x 375 px; labels take one crop of 224
    px, DINO two of 224 and eight of 96. Customary loader processes do everything, up to normalised
    floats. Ours send uint8 crops, of DINO's also how to change their colours, and leave the rest to
    the device. The last line is of that rest, on this device.
    """
    p.add_argument("--images", type=COUNT, default=64, help="images per pass [64]")
    p.add_argument("--workers", type=WORKERS, default=0, help="processes that load [0: this one]")
    p.add_argument("--repeats", type=REPEATS, default=6, help="passes to time each way [6]")
    p.add_argument("--device", **DEVICE)
    args = p.parse_args(sys.argv[2:])
    device, _, _ = start_processes(args.device)
    size, few = min(32, args.images), 8
    labels = customary_crop(224, v2.RandAugment()).transforms
    ways = {
        "labels": (data.augmentations(224, drawn=False)[0], [*labels, v2.RandomErasing(p=0.25)]),
        "DINO": (MultiCrop(224, 96, few, 0.25, drawn=False), [customary_multicrop()]),
    }
    with tempfile.TemporaryDirectory() as root:
        draw_photographs(Path(root), args.images)
        train = data.image_folder(root, "train", image_size=224)
        batches = data.Batches(len(train), size, 0, shuffle=True)
        count = len(batches) * size
        for name, (transform, customary) in ways.items():
            ours = data.make_loader(train, transform, batches, args.workers, device)
            theirs = ImageFolder(f"{root}/train", v2.Compose(customary))
            options = dict(num_workers=args.workers, persistent_workers=args.workers > 0)
            theirs = DataLoader(theirs, size, shuffle=True, drop_last=True, **options)
            passes = dict(ours=partial(list, ours), customary=partial(list, theirs))
            times = in_turns(passes, args.repeats)
            report(f"{name}, {count} JPEGs, {args.workers} workers", times, ("customary", "ours"))
            rates = ", ".join(f"{way} {count / median(x):.0f}" for way, x in times.items())
            print(f"       images/s: {rates}")
        [(large, small, changes), _] = on_device(next(iter(ours)), device)
    of_large, of_small = changes.split([2, few], dim=1)
    rest = {"large crops": partial(recoloured, large, of_large)}
    rest["small crops"] = partial(recoloured, small, of_small)
    report(f"DINO's colours, {size} images on {device}", in_turns(rest, args.repeats))


def checkpoint(p: Parser) -> None:
    """Times writing and reading a checkpoint with SOAP's state, in the current folder.

    The floor is as many bytes written plainly and forced to the disk. Reading tests checksums too.
    """
    p.add_argument("--model", choices=PRESETS, default="tiny", help="size of the ViT [tiny]")
    p.add_argument("--repeats", type=REPEATS, default=3, help="times to write and to read [3]")
    args = p.parse_args(sys.argv[2:])
    model = ViT(**PRESETS[args.model], residual=False)
    optimizer = SOAP(model.parameters())
    for weight in model.parameters():  # as after one step
        kept = {part: torch.ones(shape) for part, shape in kept_of(weight.shape).items()}
        optimizer.state[weight] = dict(step=1) | kept
    content = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path, other = Path(folder, "last.pt"), Path(folder, "plain")
        save_checkpoint(path, content)
        plain = bytes(path.stat().st_size)
        ways = {
            "writing it": partial(save_checkpoint, path, content),
            "reading it": partial(load_checkpoint, str(path)),
            "writing plainly": lambda: write_atomically(other, lambda x: x.write_bytes(plain)),
        }
        times = in_turns(ways, args.repeats)
    report(f"{args.model}, {len(plain) / 1e9:.2f} GB", times, ("writing it", "writing plainly"))


COMMANDS = dict(step=step, soap=soap, init=init, dino=dino, loading=loading, checkpoint=checkpoint)


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("command", choices=COMMANDS, help="`COMMAND --help` says more")
    name = p.parse_args(sys.argv[1:2]).command
    COMMANDS[name](Parser(inspect.getdoc(COMMANDS[name]), prog=f"speed.py {name}"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    with errors_in_one_line("take a smaller --model or --batch-size, or fewer --images"):
        main()
