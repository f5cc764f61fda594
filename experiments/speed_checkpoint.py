"""Size of a checkpoint with SOAP's state, and the time of writing and reading it.

    python benchmarks/checkpoint_speed.py --model base

The floor is the same number of bytes written plainly and forced to the disk, in turns.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
from turns import in_turns, medians, ratio, two_or_more

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import engine
import files
from minskip import PRESETS, ViT
from soap import kept_of


def checkpoint_of(name: str) -> dict:
    """What a run of that network keeps, the optimizer's state after a step, of ones."""
    model = ViT(**PRESETS[name], residual=False)
    optimizer = engine.build_optimizer(model, "soap", 1e-3, 0.0)
    for p in model.parameters():
        kept = {part: torch.ones(shape) for part, shape in kept_of(p.shape).items()}
        optimizer.state[p] = dict(step=1) | kept
    facts = {part: kind() for part, kind in files.PARTS.items()}
    return facts | dict(model=model.state_dict(), optimizer=optimizer.state_dict())


def write_plainly(path: Path, content: memoryview) -> None:
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def main() -> None:
    p = cli.Parser(__doc__)
    p.add_argument("--model", choices=list(PRESETS), default="tiny", help="network [tiny]")
    p.add_argument("--repeats", type=two_or_more, default=3, help="of each [3]")
    p.add_argument("--folder", type=cli.place, default=Path("."), help="on the disk to try [.]")
    args = p.parse_args()
    files.make_folder(args.folder)
    content = checkpoint_of(args.model)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "last.pt")
        files.save_checkpoint(path, content)
        size = path.stat().st_size
        plain = memoryview(bytes(size))
        ways = {
            "writing it": lambda: files.save_checkpoint(path, content),
            "reading it": lambda: files.load_checkpoint(str(path)),
            "writing plainly": lambda: write_plainly(Path(folder, "plain"), plain),
        }
        times = in_turns(ways, args.repeats)
    print(f"{args.model}: {size / 1e9:.2f} GB; {medians(times)}")
    print(ratio(times, "writing it", "writing plainly"))


if __name__ == "__main__":
    with cli.one_line_errors("take a smaller --model"):
        main()
