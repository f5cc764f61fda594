"""Times the crops of a DINO step: one pass per resolution, as in training, or one per crop.

    python experiments/speed_dino.py --model tiny

It runs the student's backbone forward and backward on 2 crops of 224 px and 8 of 96 px of each
image. The arithmetic is the same both ways.
"""

import torch
from turns import REPEATS, finish, in_turns, medians, ratio

from minskip import PRESETS, ViT
from support.errors import errors_in_one_line
from support.flags import COUNT, Parser
from support.processes import autocast, start_processes


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--model", choices=[*PRESETS], default="small", help="size of the ViT [small]")
    p.add_argument("--batch-size", type=COUNT, default=2, help="images per step [2]")
    p.add_argument("--repeats", type=REPEATS, default=6, help="steps to time each way [6]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    args = p.parse_args()
    device, _, _ = start_processes(args.device)
    model = ViT(**PRESETS[args.model], residual=False, pool="mean").to(device)
    sides = [224] * 2 + [96] * 8
    crops = [torch.randn(args.batch_size, 3, side, side, device=device) for side in sides]
    by_size = [torch.cat(crops[:2]), torch.cat(crops[2:])]

    def step(groups: list[torch.Tensor]) -> None:
        with autocast(device, "auto"):
            loss = sum(model(images).float().square().sum() for images in groups)
        loss.backward()
        model.zero_grad()
        finish(device)

    ways = {"per resolution": lambda: step(by_size), "per crop": lambda: step(crops)}
    times = in_turns(ways, args.repeats)
    print(f"{args.model}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads")
    print(f"{medians(times)}\n{ratio(times, 'per crop', 'per resolution')}")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller --batch-size"):
        main()
