"""Time to load and augment JPEGs: `data.py` against the list of transforms that is customary.

    python benchmarks/loading_speed.py

Photographs' size, 500 x 375 px, drawn here; to 224 px by two workers, in turns; the ratio is given
with its quartiles. Customary: crop, flip, RandAugment, float tensor, normalisation, all in the
worker; ours sends uint8, and the device normalises it. Where that is a CPU it costs there what it
saves here, so ours is timed without and with it.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from turns import in_turns, medians, ratio, two_or_more

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
import data
from shapes import draw_shapes

SIZE = 224


def draw_photographs(root: Path, count: int) -> None:
    """ROOT/train/0/*.jpg."""
    folder = root / "train/0"
    folder.mkdir(parents=True)
    for number in range(count):
        [image], _, _ = draw_shapes([number], 500, "train")
        # grain, or the files are a fifth of a photograph's size
        grainy = image[:, :375] + torch.randint(0, 20, (3, 375, 500))
        grainy = grainy.clamp(max=255).to(torch.uint8)
        v2.functional.to_pil_image(grainy).save(folder / f"{number}.jpg", quality=90)


def customary() -> v2.Transform:
    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(data.MEAN, data.STD),
            v2.RandomErasing(p=0.25),
        ]
    )


def main() -> None:
    p = cli.Parser(__doc__)
    add = p.add_argument
    add("--images", type=cli.count, default=256, help="in a pass [256]")
    add("--workers", type=cli.count_or_0, default=2, help="processes [2]")
    add("--repeats", type=two_or_more, default=6, help="passes timed [6]")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as root:
        draw_photographs(Path(root), args.images)
        train = data.image_folder(root, "train")
        batch, cpu = min(32, args.images), torch.device("cpu")
        to_train, _ = data.augmentations(SIZE, drawn=False)
        ours = data.make_loader(
            train, to_train, data.Batches(len(train), batch, 0, True), args.workers, cpu
        )
        theirs = DataLoader(
            ImageFolder(f"{root}/train", customary()),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=args.workers,
            persistent_workers=args.workers > 0,
        )
        ways = dict(
            ours=lambda: [images for images, _ in ours],
            normalised=lambda: [data.normalise(images) for images, _ in ours],
            customary=lambda: [images for images, _ in theirs],
        )
        times = in_turns(ways, args.repeats)
    print(f"{len(train) // batch * batch} JPEGs of 500 x 375 px, {args.workers} workers")
    print(f"{medians(times)}\n{ratio(times, 'customary', 'ours')}")
    print(ratio(times, "customary", "normalised"))


if __name__ == "__main__":
    with cli.one_line_errors("ask for less"):
        main()
