"""Images and what is true of them, masks or boxes: a folder's, or synthetic ones.

    ROOT/SPLIT/images/*  ROOT/SPLIT/masks/<the image's stem>.png  ROOT/boxes.tsv

A mask is an image of one channel, its values class ids. boxes.tsv has a line a box: file relative
to ROOT, x0, y0, x1, y1 in pixels, tab between them.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from tqdm import tqdm

from cli import fail
from data import DECODING_ERRORS, check_images, open_rgb
from shapes import draw_shapes

Size = tuple[int, int]  # height, width

MOST_CLASSES = 4096  # larger ids are 16-bit masks' mark for unlabelled pixels, or a mistake


class Scenes(NamedTuple):
    """The images of a split and what is true of them, by number."""

    names: list[str]  # files relative to ROOT
    image: Callable[[int], Tensor]  # number -> (3, height, width) uint8
    sizes: list[Size]
    masks: list[Tensor] | None  # class ids, (height, width), uint8 or int32


def synthetic_scenes(length: int, split: str, side: int) -> Scenes:
    """`draw_shapes`, in parts: a thousand drawn together would take gigabytes."""
    parts = torch.arange(length).split(100)
    images, _, masks = zip(*(draw_shapes(part.tolist(), side, split) for part in parts))
    names = [f"Shapes {split} {i}" for i in range(length)]
    return Scenes(
        names, torch.cat(images).__getitem__, [(side, side)] * length, [*torch.cat(masks)]
    )


def read_image(path: str | Path) -> Tensor:
    """(3, height, width) uint8."""
    return v2.functional.pil_to_tensor(open_rgb(str(path)))


def read_mask(path: Path, size: Size) -> Tensor:
    """Class ids, (height, width), of a single-channel image; a palette's indices are its ids."""
    if not path.is_file():
        fail(f"mask {path} is missing; add it or remove its image")
    try:
        with Image.open(path) as image:
            mode, channels, ids = image.mode, len(image.getbands()), np.array(image)
    except DECODING_ERRORS as error:
        fail(f"cannot read mask {path} ({error}); repair or remove it")
    if channels != 1 or mode == "F" or ids.min() < 0:
        fail(f"mask {path} is {mode}, not one channel of integers >= 0; save class ids as such")
    if ids.shape != size:
        fail(f"mask {path} is of {ids.shape}, its image of {size} (height, width); make them equal")
    return torch.from_numpy(ids.astype(np.int32 if ids.max() > 255 else np.uint8))


def folder_scenes(root: Path, split: str, need_masks: bool) -> Scenes:
    """ROOT/split/images and, if there are any or they are needed, ROOT/split/masks, checked."""
    images, masks = root / split / "images", root / split / "masks"
    layout = f"expected ROOT/{split}/images/* and ROOT/{split}/masks/<stem>.png"
    for folder in (images, masks) if need_masks else (images,):
        if not folder.is_dir():
            fail(f"--data {root}: no folder {folder}; {layout}")
    paths = sorted(f for f in images.iterdir() if f.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        fail(f"--data {root}: no images in {images}; {layout}")
    check_images([str(f) for f in paths])
    names, sizes, read = [f.relative_to(root).as_posix() for f in paths], [], []
    for file in tqdm(paths, f"checking {split} masks", disable=None, leave=False):
        with Image.open(file) as image:
            sizes.append((image.height, image.width))
        if masks.is_dir():
            read.append(read_mask(masks / f"{file.stem}.png", sizes[-1]))
    return Scenes(names, lambda i: read_image(paths[i]), sizes, read or None)


def count_classes(train: Scenes, reported: Scenes, ignore: int) -> int:
    """1 + the largest class id of the training masks; every reported id must be below it."""

    def largest_ids(scenes: Scenes, which: str) -> list[int]:  # -1: all ignored
        ids = (torch.where(mask.long() == ignore, -1, mask.long()) for mask in scenes.masks)
        ids = [int(x.max()) for x in ids]
        if max(ids) < 0:
            fail(f"--ignore {ignore}: the {which} masks hold nothing else; give another id")
        return ids

    trained, found = largest_ids(train, "training"), largest_ids(reported, "reported")
    classes = min(1 + max(trained), MOST_CLASSES)
    for name, id in zip(train.names + reported.names, trained + found):
        if id >= classes:
            why = "the training masks none" if classes < MOST_CLASSES else "allowed are none"
            fail(
                f"the mask of {name} holds id {id}, {why} above {classes - 1}; if it marks "
                f"unlabelled pixels add --ignore {id}, else mend the mask"
            )
    return classes


def boxes_around(masks: Tensor) -> Tensor:
    """(mask, row, column) bool -> (mask, 4): x0, y0, x1, y1, x1 and y1 exclusive, float64."""
    return masks_to_boxes(masks).double() + torch.tensor([0, 0, 1, 1])  # its x1, y1 are inclusive


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """boxes.tsv as file -> its boxes (x0, y0, x1, y1). A line that names columns may lead."""
    boxes = {}
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
        file, *fields = line.split("\t")
        if not line.strip() or (number == 1 and file == "file"):
            continue
        try:
            x0, y0, x1, y1 = map(float, fields)
            good = 0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf
        except ValueError:  # not four numbers
            good = False
        if not good or not (path.parent / file).is_file():
            why = "no such file under ROOT" if good else "not file, x0, y0, x1, y1, tabs between"
            fail(f"{path}, line {number}: {line!r}: {why}; mend the line")
        boxes.setdefault(Path(file).as_posix(), []).append([x0, y0, x1, y1])
    return boxes


def true_boxes(scenes: Scenes, data: str | None, ignore: int) -> list[Tensor]:
    """Of each image its boxes, (box, 4): boxes.tsv's, else one around each id but 0 and ignore."""
    if data and (Path(data) / "boxes.tsv").is_file():
        listed = read_boxes(Path(data) / "boxes.tsv")
        boxes = [torch.tensor(listed.get(name, []), dtype=torch.float64) for name in scenes.names]
        boxes = [b.view(-1, 4) for b in boxes]
    else:
        ids = (mask.unique() for mask in scenes.masks)
        ids = (i[(i != 0) & (i.long() != ignore)].view(-1, 1, 1) for i in ids)
        boxes = [boxes_around(mask == i) for mask, i in zip(scenes.masks, ids)]
    if not any(map(len, boxes)):
        fail("no reported image has a true box; list boxes in boxes.tsv or mend the masks")
    return boxes
