"""Time of a training step: our ViT, with skips and without, against timm's with the same optimizer.

    pip install -r requirements.txt -r requirements-dev.txt
    python benchmarks/step_speed.py
    python benchmarks/step_speed.py --models small base --device cuda --batch-size 128 --compile

Forward, loss, backward and the optimizer's step on one random batch. The three take turns in one
process; the ratio of their times is given with its quartiles. bf16 on GPUs that have it; there also
images/s, hours an epoch of ImageNet, and GB: a step's peak beyond weights and optimizer states.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import engine
from minskip import PRESETS, ViT

try:
    from timm.models import VisionTransformer
except ImportError:
    raise UserError("timm is missing; pip install -r requirements-dev.txt")


OURS = ["residual", "skipless"]


def networks(name: str, image_size: int) -> dict[str, torch.nn.Module]:
    """timm's, ours with skips and ours without, of one size."""
    dim, depth, heads = PRESETS[name].values()
    timm = VisionTransformer(image_size, 16, embed_dim=dim, depth=depth, num_heads=heads)
    ours = {x: ViT(image_size, **PRESETS[name], residual=x == "residual") for x in OURS}
    return dict(timm=timm) | ours


def step_times(args: argparse.Namespace, name: str, device: torch.device) -> tuple[dict, dict]:
    """Network -> seconds of each of --steps training steps, after --warmup others; network ->
    bytes at a step's peak, on a GPU."""
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % 1000
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    nets = {kind: net.to(device) for kind, net in networks(name, args.image_size).items()}
    optimizers = {k: engine.build_optimizer(net, args.opt, 1e-4, 0.05) for k, net in nets.items()}
    forwards = {k: torch.compile(net) if args.compile else net for k, net in nets.items()}
    times, peaks = {kind: [] for kind in nets}, {}
    for _ in range(args.warmup + args.steps):
        for kind, forward in forwards.items():
            wait()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            begun = time.perf_counter()
            with engine.autocast(device, "auto"):
                loss = F.cross_entropy(forward(images).float(), labels)
            loss.backward()
            optimizers[kind].step()
            optimizers[kind].zero_grad()
            wait()
            times[kind].append(time.perf_counter() - begun)
            if cuda:
                peaks[kind] = torch.cuda.max_memory_allocated() - held
    return {kind: x[args.warmup :] for kind, x in times.items()}, peaks


def main() -> None:
    p = cli.Parser(__doc__)
    add = p.add_argument
    add("--models", nargs="+", choices=list(PRESETS), default=["tiny", "small"], help="[both]")
    add("--opt", choices=["soap", "adamw"], default="adamw", help="of all three [adamw]")
    add("--batch-size", type=cli.count, default=8, help="images [8]")
    add("--image-size", type=cli.count, default=224, help="pixels, a multiple of 16 [224]")
    add("--steps", type=cli.count, default=20, help="timed, from 2 on [20]")
    add("--warmup", type=cli.count, default=3, help="steps before those [3]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--compile", action="store_true", help="torch.compile all three")
    args = p.parse_args()
    if args.steps < 2 or args.image_size % 16:
        raise UserError("--steps must be at least 2, --image-size a multiple of 16")
    device, _, _ = engine.start_processes(args.device)
    precision = "bf16" if engine.uses_bf16(device, "auto") else "float32"
    mode = "compiled" if args.compile else "eager"
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {precision}, "
        f"{mode}, {args.opt}, batch {args.batch_size}"
    )
    for name in args.models:
        times, peaks = step_times(args, name, device)
        print(f"{name:6s} timm {1000 * median(times['timm']):.0f} ms", end="")
        for kind in OURS:
            ratios = [ours / timm for ours, timm in zip(times[kind], times["timm"])]
            low, middle, high = quantiles(ratios, n=4)
            print(f", {kind} {middle:.3f} ({low:.3f} .. {high:.3f}) of that", end="")
        print()
        for kind, peak in peaks.items():
            rate = args.batch_size / median(times[kind])
            hours = 1_281_167 / rate / 3600  # an epoch of ImageNet
            told = f"{rate:7.0f} images/s, {hours:.2f} h an epoch, {peak / 1e9:5.2f} GB"
            print(f"       {kind:<8} {told}")


if __name__ == "__main__":
    with cli.one_line_errors("use a smaller --batch-size"):
        main()
