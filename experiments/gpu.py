"""Every figure that needs a GPU, in one go: to be run on the day one is there.

    python benchmarks/gpu.py                       about a quarter of an hour; writes report.txt

1. A first sign of life: both trainers' demos on the GPU, in bf16 where it has it.
2. Training steps against timm's, eager and compiled, with AdamW and SOAP, and their peak memory.
3. SOAP's step against pytorch-optimizer's; a DINO step's crops, a pass a resolution or a crop.

Each command is printed before what it says. One that fails is told, and the next is run.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import engine
import files

ROOT = Path(cli.__file__).parent
COMMANDS = [
    "train_cls.py --skipless --out {out}/cls",
    "train_ssl.py --skipless --epochs 2 --out {out}/ssl",
    "benchmarks/step_speed.py --models tiny small base --batch-size 128",
    "benchmarks/step_speed.py --models tiny small base --batch-size 128 --compile",
    "benchmarks/step_speed.py --models small base --batch-size 128 --opt soap --compile",
    "benchmarks/soap_speed.py --model small",
    "benchmarks/soap_speed.py --model base",
    "benchmarks/dino_speed.py --model small --batch-size 64",
]


def run(command: list[str], device: str, patience: int) -> str:
    """What a command says, with how it ended if not well."""
    words = [sys.executable, *command, "--device", device]
    begun = time.time()
    try:
        how = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=patience)
        done = subprocess.run(words, cwd=ROOT, **how)
        end = "" if done.returncode == 0 else f"ended with code {done.returncode}\n"
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        said, end = (error.stdout or b"").decode(errors="replace"), f"stopped after {patience} s\n"
    return f"$ python {' '.join(words[1:])}\n{said}{end}({time.time() - begun:.0f} s)\n\n"


def main() -> None:
    p = cli.Parser(__doc__)
    add = p.add_argument
    add("--device", default="cuda", help="[cuda]")
    now = time.strftime("runs/gpu-%Y%m%d-%H%M%S")
    add("--out", type=Path, default=Path(now), help="folder of report and runs [runs/gpu-DATE]")
    add("--patience", type=cli.count, default=300, help="seconds a command may take [300]")
    args = p.parse_args()
    device = engine.chosen_device(args.device)  # which the commands take, one by one
    files.make_folder(args.out)
    report = args.out / "report.txt"
    text = f"torch {torch.__version__}\n"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        text += f"{card.name}, {card.total_memory / 2**30:.0f} GiB\n"
    for command in COMMANDS:
        words = [word.format(out=args.out.absolute()) for word in command.split()]
        said = run(words, args.device, args.patience)
        engine.say(said)
        text += said
        files.write_atomically(report, lambda path, text=text: path.write_text(text))
    print(report)


if __name__ == "__main__":
    with cli.one_line_errors("ask for less"):
        main()
