"""Times a training step of our ViT, with skips and without, against timm's.

    pip install -r requirements.txt -r tests/requirements.txt
    python experiments/speed_step.py
    python experiments/speed_step.py --models small base --device cuda --batch-size 128 --compile

A step is forward, loss, backward and the optimizer's update, on one random batch; in bf16 on GPUs
that have it. The three networks take turns. On a GPU it also prints images per second, hours per
epoch of ImageNet, and the memory that a step takes beyond weights and optimizer state.
"""

import argparse
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import nn
from turns import REPEATS, finish, in_turns, medians, ratio

from minskip import PRESETS, ViT
from soap import SOAP
from support.errors import UserError, errors_in_one_line
from support.flags import COUNT, COUNT_OR_0, Parser
from support.processes import autocast, start_processes, uses_bf16

IMAGENET = 1_281_167  # training images


def networks(name: str, image_size: int) -> dict[str, nn.Module]:
    """timm's, ours with skips and ours without, all of one size."""
    dim, depth, heads = PRESETS[name].values()
    return dict(
        timm=VisionTransformer(image_size, 16, embed_dim=dim, depth=depth, num_heads=heads),
        residual=ViT(image_size, **PRESETS[name], residual=True),
        skipless=ViT(image_size, **PRESETS[name], residual=False),
    )


def optimizer_of(network: nn.Module, opt: str) -> torch.optim.Optimizer:
    if opt == "soap":
        return SOAP(network.parameters(), lr=1e-4, weight_decay=0.05)
    return torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)


def time_steps(args: argparse.Namespace, name: str, device: torch.device) -> tuple[dict, dict]:
    """Network -> seconds of each step; network -> bytes at a step's peak, on a GPU."""
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % 1000
    peaks = {}

    def step(kind: str, forward: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        with autocast(device, "auto"):
            loss = F.cross_entropy(forward(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        finish(device)
        if device.type == "cuda":
            peaks[kind] = torch.cuda.max_memory_allocated() - held

    ways = {}
    for kind, network in networks(name, args.image_size).items():
        network.to(device)
        forward = torch.compile(network) if args.compile else network
        ways[kind] = partial(step, kind, forward, optimizer_of(network, args.opt))
    return in_turns(ways, args.steps, args.warmup), peaks


def main() -> None:
    p = Parser(__doc__)
    add = p.add_argument
    sizes = ["tiny", "small"]
    add("--models", nargs="+", choices=[*PRESETS], default=sizes, help="sizes [tiny small]")
    add("--opt", choices=["soap", "adamw"], default="adamw", help="optimizer of all three [adamw]")
    add("--batch-size", type=COUNT, default=8, help="images per step [8]")
    add("--image-size", type=COUNT, default=224, help="pixels, a multiple of 16 [224]")
    add("--steps", type=REPEATS, default=20, help="steps to time [20]")
    add("--warmup", type=COUNT_OR_0, default=3, help="steps before those [3]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--compile", action="store_true", help="torch.compile all three")
    args = p.parse_args()
    if args.image_size % 16:
        raise UserError(f"--image-size must be a multiple of 16; it is {args.image_size}")
    device, _, _ = start_processes(args.device)
    precision = "bf16" if uses_bf16(device, "auto") else "float32"
    mode = "compiled" if args.compile else "eager"
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}, "
        f"{mode}, {args.opt}, batch {args.batch_size}"
    )
    for name in args.models:
        times, peaks = time_steps(args, name, device)
        ratios = [ratio(times, kind, "timm") for kind in times if kind != "timm"]
        print(f"{name:6s} {medians(times)}; {', '.join(ratios)}")
        for kind, peak in peaks.items():
            rate = args.batch_size / median(times[kind])
            hours = IMAGENET / rate / 3600
            print(
                f"       {kind:<8} {rate:7.0f} images/s, {hours:.2f} h an epoch, "
                f"{peak / 1e9:5.2f} GB"
            )


if __name__ == "__main__":
    with errors_in_one_line("use a smaller --batch-size"):
        main()
