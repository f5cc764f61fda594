"""Time of the many crops of a DINO step: a pass a resolution, as in training, or a pass a crop.

    python benchmarks/dino_speed.py --model tiny

Forward and backward of the student's backbone on 2 crops of 224 px and 8 of 96 px of each image,
in turns; the ratio is given with its quartiles. The arithmetic is the same.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from turns import in_turns, medians, ratio, two_or_more

import cli
import engine
from minskip import PRESETS, ViT


def main() -> None:
    p = cli.Parser(__doc__)
    add = p.add_argument
    add("--model", choices=list(PRESETS), default="small", help="network [small]")
    add("--batch-size", type=cli.count, default=2, help="images [2]")
    add("--repeats", type=two_or_more, default=6, help="timed [6]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    args = p.parse_args()
    device, _, _ = engine.start_processes(args.device)
    model = ViT(**PRESETS[args.model], residual=False, pool="mean").to(device)
    crops = [torch.randn(args.batch_size, 3, 224, 224, device=device) for _ in range(2)]
    crops += [torch.randn(args.batch_size, 3, 96, 96, device=device) for _ in range(8)]

    def step(groups: list[torch.Tensor]) -> None:
        with engine.autocast(device, "auto"):
            loss = sum(model(images).float().square().sum() for images in groups)
        loss.backward()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    by_size = [torch.cat(crops[:2]), torch.cat(crops[2:])]
    ways = {"a pass a resolution": lambda: step(by_size), "a pass a crop": lambda: step(crops)}
    times = in_turns(ways, args.repeats)
    print(f"{args.model}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads")
    print(f"{medians(times)}\n{ratio(times, 'a pass a crop', 'a pass a resolution')}")


if __name__ == "__main__":
    with cli.one_line_errors("use a smaller --batch-size"):
        main()
