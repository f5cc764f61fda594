"""Times writing and reading a checkpoint with SOAP's state.

    python experiments/speed_checkpoint.py --model base

The floor is the same number of bytes written plainly and forced to the disk. Reading tests the
checksums too.
"""

import os
import tempfile
from pathlib import Path

import torch
from turns import REPEATS, in_turns, medians, ratio

from minskip import PRESETS, ViT
from soap import SOAP, kept_of
from support.errors import errors_in_one_line
from support.files import load_checkpoint, make_folder, save_checkpoint
from support.flags import PATH, Parser


def checkpoint_of(name: str) -> dict:
    """What a run of this network keeps, after one step with a state of ones."""
    model = ViT(**PRESETS[name], residual=False)
    optimizer = SOAP(model.parameters())
    for p in model.parameters():
        kept = {part: torch.ones(shape) for part, shape in kept_of(p.shape).items()}
        optimizer.state[p] = dict(step=1) | kept
    return dict(model=model.state_dict(), optimizer=optimizer.state_dict())


def write_plainly(path: Path, content: memoryview) -> None:
    with open(path, "wb") as file:
        file.write(content)
        os.fsync(file.fileno())


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--model", choices=[*PRESETS], default="tiny", help="size of the ViT [tiny]")
    p.add_argument("--repeats", type=REPEATS, default=3, help="times to write and to read [3]")
    p.add_argument("--folder", type=PATH, default=Path("."), help="folder on the disk to try [.]")
    args = p.parse_args()
    make_folder(args.folder)
    content = checkpoint_of(args.model)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = Path(folder, "last.pt")
        save_checkpoint(path, content)
        size = path.stat().st_size
        plain = memoryview(bytes(size))
        ways = {
            "writing it": lambda: save_checkpoint(path, content),
            "reading it": lambda: load_checkpoint(str(path)),
            "writing plainly": lambda: write_plainly(Path(folder, "plain"), plain),
        }
        times = in_turns(ways, args.repeats)
    print(f"{args.model}: {size / 1e9:.2f} GB; {medians(times)}")
    print(ratio(times, "writing it", "writing plainly"))


if __name__ == "__main__":
    with errors_in_one_line("take a smaller --model"):
        main()
