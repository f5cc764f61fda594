"""SOAP here against the SOAP of pytorch-optimizer, in one process: time a step, as a ratio.

    pip install -r requirements.txt -r requirements-dev.txt
    python benchmarks/soap_speed.py --model tiny

Both take the same gradients for the blocks' matrices and vectors of a ViT; the two are timed in
turns so that a slow moment of the machine hits both. Steps with and without a refresh of the
eigenbases are mixed as in training (every tenth refreshes).
"""

import argparse
import statistics
import time

import torch
from pytorch_optimizer import SOAP as PeerSOAP

from minskip import PRESETS, ViT
from soap import SOAP


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=list(PRESETS), default="nano", help="network [nano]")
    p.add_argument("--steps", type=int, default=40, help="timed steps, a multiple of 10 [40]")
    p.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    args = p.parse_args()

    torch.manual_seed(0)
    nets = [ViT(**PRESETS[args.model], num_classes=10).blocks.to(args.device) for _ in range(2)]
    gradients = [torch.randn_like(w) for w in nets[0].parameters()]
    optimizers = [SOAP(nets[0].parameters(), lr=1e-4), PeerSOAP(nets[1].parameters(), lr=1e-4)]
    seconds = ([], [])
    for step in range(args.steps + 11):
        for net, optimizer, times in zip(nets, optimizers, seconds):
            for w, g in zip(net.parameters(), gradients):
                w.grad = g * (1 + step % 3)
            if args.device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            optimizer.step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if step > 10:  # the first steps build the factors and warm up
                times.append(time.perf_counter() - started)
    ours, peer = (1000 * statistics.mean(times) for times in seconds)
    print(
        f"{args.model} on {args.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}: minskip {ours:.1f} ms a step, pytorch-optimizer {peer:.1f} ms, "
        f"ratio {peer / ours:.2f}"
    )


if __name__ == "__main__":
    main()
