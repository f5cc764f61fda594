"""Time of an optimizer's step: SOAP here, pytorch-optimizer's SOAP, and AdamW as the floor.

    pip install -r requirements.txt -r requirements-dev.txt
    python benchmarks/soap_speed.py --model tiny

All take the same gradients for the blocks of a ViT, in turns. What is timed is ten steps, of which
one refreshes the eigenbases, as in training; the ratio is given with its quartiles over such tens.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from turns import ratio, two_or_more

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from engine import start_processes
from minskip import PRESETS, ViT
from soap import SOAP

try:
    from pytorch_optimizer import SOAP as PeerSOAP
except ImportError:
    raise UserError("pytorch-optimizer is missing; pip install -r requirements-dev.txt")


def main() -> None:
    p = cli.Parser(__doc__)
    p.add_argument("--model", choices=list(PRESETS), default="nano", help="network [nano]")
    p.add_argument("--tens", type=two_or_more, default=6, help="timed tens of steps [6]")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    args = p.parse_args()
    device, _, _ = start_processes(args.device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)

    nets = [ViT(**PRESETS[args.model], num_classes=10).blocks.to(device) for _ in range(3)]
    makers = (SOAP, PeerSOAP, torch.optim.AdamW)
    optimizers = [make(net.parameters(), lr=1e-4) for make, net in zip(makers, nets)]
    gradients = [torch.randn_like(w) for w in nets[0].parameters()]
    sums = []  # a ten of steps -> ms a step, of each optimizer
    for step in range(10 * (args.tens + 1)):
        if step % 10 == 0:
            sums.append([0.0, 0.0, 0.0])
        for i, (net, optimizer) in enumerate(zip(nets, optimizers)):
            for w, g in zip(net.parameters(), gradients):
                w.grad = g * (1 + step % 3)
            wait()
            begun = time.perf_counter()
            optimizer.step()
            wait()
            sums[-1][i] += 100 * (time.perf_counter() - begun)
    ours, peer, adamw = zip(*sums[1:])  # the first ten build the factors
    compared = ratio({"ours": ours, "pytorch-optimizer's": peer}, "pytorch-optimizer's", "ours")
    print(
        f"{args.model} on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
        f"ms a step: SOAP here {median(ours):.1f}, pytorch-optimizer's {median(peer):.1f}, AdamW "
        f"{median(adamw):.1f}\n{compared}"
    )


if __name__ == "__main__":
    with cli.one_line_errors("ask for less"):
        main()
