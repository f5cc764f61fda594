"""Times loading and augmenting JPEGs: `support/data.py` against the customary transforms.

    python experiments/speed_loading.py

The images are as large as photographs, 500 x 375 px, drawn here and cropped to 224 px. Customary
loaders do everything in the worker: crop, flip, RandAugment, float tensor, normalisation. Ours
sends uint8, and the device normalises. Where the device is a CPU, it pays there for what it saves
here, so ours is timed without normalisation and with it.
"""

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2
from turns import REPEATS, in_turns, medians, ratio

from support import data
from support.errors import errors_in_one_line
from support.flags import COUNT, WORKERS, Parser
from support.shapes import draw_shapes

SIZE = 224


def draw_photographs(root: Path, count: int) -> None:
    """ROOT/train/0/*.jpg."""
    folder = root / "train/0"
    folder.mkdir(parents=True)
    for number in range(count):
        [image], _, _ = draw_shapes([number], 500, "train")
        # without grain the files would be a fifth as large as a photograph's
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
    p = Parser(__doc__)
    p.add_argument("--images", type=COUNT, default=256, help="images per pass [256]")
    p.add_argument("--workers", type=WORKERS, default=2, help="processes that load [2]")
    p.add_argument("--repeats", type=REPEATS, default=6, help="passes to time each way [6]")
    args = p.parse_args()
    batch = min(32, args.images)
    with tempfile.TemporaryDirectory() as root:
        draw_photographs(Path(root), args.images)
        train = data.image_folder(root, "train")
        to_train, _ = data.augmentations(SIZE, drawn=False)
        batches = data.Batches(len(train), batch, 0, shuffle=True)
        ours = data.make_loader(train, to_train, batches, args.workers, torch.device("cpu"))
        options = dict(shuffle=True, drop_last=True, persistent_workers=args.workers > 0)
        theirs = ImageFolder(f"{root}/train", customary())
        theirs = DataLoader(theirs, batch, num_workers=args.workers, **options)
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
    with errors_in_one_line("ask for fewer --images"):
        main()
