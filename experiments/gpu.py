"""Runs every command that needs a GPU, in about a quarter of an hour.

    python experiments/gpu.py | tee report.txt

1. The demos of both trainers, in bf16 where the GPU has it, as a first sign of life.
2. Training steps against timm's, eager and compiled, with AdamW and SOAP, and their peak memory.
3. SOAP's step against pytorch-optimizer's; the crops of a DINO step.

A command that fails is reported, and the next one is run.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support.errors import errors_in_one_line
from support.flags import COUNT, PATH, Parser
from support.processes import chosen_device, say

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = [
    "train_cls.py --skipless --out {out}/cls",
    "train_ssl.py --skipless --epochs 2 --out {out}/ssl",
    "experiments/speed_step.py --models tiny small base --batch-size 128",
    "experiments/speed_step.py --models tiny small base --batch-size 128 --compile",
    "experiments/speed_step.py --models small base --batch-size 128 --opt soap --compile",
    "experiments/speed_soap.py --model small",
    "experiments/speed_soap.py --model base",
    "experiments/speed_dino.py --model small --batch-size 64",
]


def main() -> None:
    p = Parser(__doc__)
    out = Path(time.strftime("runs/gpu-%Y%m%d-%H%M%S"))
    p.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N [cuda]")
    p.add_argument("--out", type=PATH, default=out, help="folder for the runs [runs/gpu-DATE]")
    p.add_argument("--patience", type=COUNT, default=300, help="seconds per command [300]")
    args = p.parse_args()
    device = chosen_device(args.device)  # told now if there is none
    say(f"torch {torch.__version__}")
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        say(f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    for command in COMMANDS:
        words = [word.format(out=args.out.absolute()) for word in command.split()]
        words += ["--device", args.device]
        say(f"\n$ python {' '.join(words)}")
        begun, options = time.time(), dict(cwd=ROOT, stderr=subprocess.STDOUT)
        try:
            done = subprocess.run([sys.executable, *words], timeout=args.patience, **options)
            end = f"code {done.returncode}"
        except subprocess.TimeoutExpired:
            end = "no code: stopped"
        say(f"({end} after {time.time() - begun:.0f} s)")


if __name__ == "__main__":
    with errors_in_one_line("run one of the commands by itself, with smaller numbers"):
        main()
