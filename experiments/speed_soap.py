"""Times an optimizer's step: our SOAP, pytorch-optimizer's SOAP, and AdamW as the floor.

    pip install -r requirements.txt -r tests/requirements.txt
    python experiments/speed_soap.py --model tiny

All get the same gradients for the blocks of a ViT, and take turns of ten steps, of which one
refreshes the eigenbases, as in training.
"""

from functools import partial

import torch
from pytorch_optimizer import SOAP as PeerSOAP
from turns import REPEATS, finish, in_turns, medians, ratio

from minskip import PRESETS, ViT
from soap import SOAP
from support.errors import errors_in_one_line
from support.flags import Parser
from support.processes import start_processes


def ten_steps(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for _ in range(10):
        optimizer.step()
    finish(device)


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--model", choices=[*PRESETS], default="nano", help="size of the ViT [nano]")
    p.add_argument("--tens", type=REPEATS, default=6, help="turns of ten steps to time [6]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    args = p.parse_args()
    device, _, _ = start_processes(args.device)
    ways, peer = {}, "pytorch-optimizer's"
    for name, kind in (("SOAP here", SOAP), (peer, PeerSOAP), ("AdamW", torch.optim.AdamW)):
        blocks = ViT(**PRESETS[args.model]).blocks.to(device)
        torch.manual_seed(0)
        for weight in blocks.parameters():
            weight.grad = torch.randn_like(weight)
        ways[name] = partial(ten_steps, kind(blocks.parameters(), lr=1e-4), device)
    times = in_turns(ways, args.tens)  # the warm-up builds SOAP's factors
    print(f"{args.model}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"ten steps: {medians(times)}\n{ratio(times, peer, 'SOAP here')}")


if __name__ == "__main__":
    with errors_in_one_line("take a smaller --model"):
        main()
