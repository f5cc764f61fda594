"""Runs every command that needs a GPU, in about a quarter of an hour.

    python experiments/gpu.py

These are the demos of both trainers, in bf16 where the GPU has it, and those of `speed.py`. A
command that fails is reported, and the next one is run.
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
    "experiments/speed.py step --models tiny small base --batch-size 128",
    "experiments/speed.py step --models tiny small base --batch-size 128 --compile",
    "experiments/speed.py step --models small base --batch-size 128 --opt soap --compile",
    "experiments/speed.py soap --model small",
    "experiments/speed.py soap --model base",
    "experiments/speed.py dino --model small --batch-size 64",
]


def main() -> None:
    p = Parser(__doc__)
    out = Path(time.strftime("runs/gpu-%Y%m%d-%H%M%S"))
    p.add_argument("--device", default="cuda", help="cpu, cuda or cuda:N [cuda]")
    p.add_argument("--out", type=PATH, default=out, help="folder for the runs [runs/gpu-DATE]")
    p.add_argument("--patience", type=COUNT, default=300, help="seconds per command [300]")
    args = p.parse_args()
    device = chosen_device(args.device)  # told now if there is none
    if device.type == "cuda":
        say(str(torch.cuda.get_device_properties(device)))  # its name, its memory
    for command in COMMANDS:
        words = [word.format(out=args.out.absolute()) for word in command.split()]
        words += ["--device", args.device]
        say(f"\n$ python {' '.join(words)}")
        begun, options = time.time(), dict(cwd=ROOT, stderr=subprocess.STDOUT)
        try:
            code = subprocess.call([sys.executable, *words], timeout=args.patience, **options)
            end = f"code {code}"
        except subprocess.TimeoutExpired:
            end = "stopped"
        say(f"({end} after {time.time() - begun:.0f} s)")


if __name__ == "__main__":
    with errors_in_one_line("run one of the commands by itself, with smaller numbers"):
        main()
