"""Images and what is true of them, masks or boxes: a folder's, or synthetic ones.

    ROOT/SPLIT/images/*  ROOT/SPLIT/masks/<the image's stem>.png  ROOT/boxes.tsv

A mask is an image of one channel, its values class ids. boxes.tsv has a line a box: file relative
to ROOT, x0, y0, x1, y1 in pixels, tab between them.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

from support.data import decoding, image_sizes, open_rgb
from support.errors import UserError
from support.processes import progress
from support.shapes import draw_shapes

Size = tuple[int, int]  # height, width

MOST_CLASSES = 4096  # larger ids are 16-bit masks' mark for unlabelled pixels, or a mistake


class Scenes(NamedTuple):
    """The images of a split and what is true of them, by number."""

    names: list[str]  # paths, of a folder's
    image: Callable[[int], Tensor]  # number -> (3, height, width) uint8
    sizes: list[Size]
    masks: list[Tensor] | None  # class ids, (height, width), uint8 or int32


def synthetic_scenes(length: int, split: str, side: int) -> Scenes:
    """`draw_shapes`, in parts: a thousand drawn together would take gigabytes."""
    parts = torch.arange(length).split(100)
    images, _, masks = zip(*(draw_shapes(part.tolist(), side, split) for part in parts))
    names, sizes = [f"Shapes {split} {i}" for i in range(length)], [(side, side)] * length
    return Scenes(names, torch.cat(images).__getitem__, sizes, [*torch.cat(masks)])


def read_mask(path: Path, size: Size) -> Tensor:
    """Class ids, (height, width), of a single-channel image; a palette's indices are its ids."""
    if not path.is_file():
        raise UserError(f"mask {path} is missing; add it or remove its image")
    with decoding(path, "mask"), Image.open(path) as image:
        mode, ids = image.mode, np.array(image)
    if ids.ndim != 2 or mode == "F" or ids.min() < 0:
        raise UserError(
            f"mask {path} is {mode}, not one channel of integers >= 0; save class ids as such"
        )
    if ids.shape != size:
        raise UserError(
            f"mask {path} is of {ids.shape}, its image of {size} (height, width); make them equal"
        )
    return torch.from_numpy(ids.astype(np.int32 if ids.max() > 255 else np.uint8))


def image_files(paths: list[Path]) -> Scenes:
    """Images without masks, checked now, and each read when it is asked for."""
    names = [str(path) for path in paths]
    sizes = image_sizes(names)
    return Scenes(names, lambda i: pil_to_tensor(open_rgb(names[i])), sizes, None)


def reported_split(root: Path) -> str:
    """The split that figures are of: test, where there is one, else val."""
    return "test" if (root / "test").is_dir() else "val"


def folder_scenes(root: Path, split: str, with_masks: bool) -> Scenes:
    """ROOT/split/images and, where asked for, ROOT/split/masks, checked."""
    images, masks = root / split / "images", root / split / "masks"
    layout = f"expected ROOT/{split}/images/* and ROOT/{split}/masks/<stem>.png"
    for folder in (images, masks) if with_masks else (images,):
        if not folder.is_dir():
            raise UserError(f"--data {root}: no folder {folder}; {layout}")
    paths = sorted(f for f in images.iterdir() if f.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UserError(f"--data {root}: no images in {images}; {layout}")
    found = image_files(paths)
    if with_masks:
        pairs = progress(list(zip(paths, found.sizes)), f"checking {split} masks")
        read = [read_mask(masks / f"{file.stem}.png", size) for file, size in pairs]
        found = found._replace(masks=read)
    return found


def count_classes(train: Scenes, reported: Scenes, ignore: int) -> int:
    """1 + the largest class id of the training masks; every reported id must be below it."""
    largest = [
        [int(torch.where(mask.long() == ignore, -1, mask.long()).max()) for mask in scenes.masks]
        for scenes in (train, reported)
    ]
    for which, ids in zip(("training", "reported"), largest):
        if max(ids) < 0:
            raise UserError(
                f"--ignore {ignore}: the {which} masks hold nothing else; give another id"
            )
    classes = min(1 + max(largest[0]), MOST_CLASSES)
    for name, id in zip(train.names + reported.names, largest[0] + largest[1]):
        if id >= classes:
            why = f"id {id}, above {classes - 1}, the largest allowed or in training masks"
            todo = f"if it marks unlabelled pixels add --ignore {id}, else mend the mask"
            raise UserError(f"the mask of {name} holds {why}; {todo}")
    return classes


def boxes_around(masks: Tensor) -> Tensor:
    """(mask, row, column) bool -> (mask, 4): x0, y0, x1, y1, x1 and y1 exclusive, float64."""
    return masks_to_boxes(masks).double() + torch.tensor([0, 0, 1, 1])  # its x1, y1 are inclusive


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """boxes.tsv as path -> its boxes (x0, y0, x1, y1). A line that names columns may lead."""
    boxes = defaultdict(list)
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1):
        file, *fields = line.split("\t")
        if not line.strip() or (number == 1 and file == "file"):
            continue
        try:
            x0, y0, x1, y1 = map(float, fields)
        except ValueError:  # not four numbers
            x0 = y0 = x1 = y1 = math.nan
        good = 0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf
        if not good or not (path.parent / file).is_file():
            why = "expected a file of ROOT, x0, y0, x1, y1, tab between them; mend the line"
            raise UserError(f"{path}, line {number}: {line!r}: {why}")
        boxes[str(path.parent / file)].append([x0, y0, x1, y1])
    return boxes


def true_boxes(scenes: Scenes, data: str | None, ignore: int) -> list[Tensor]:
    """Of each image its boxes, (box, 4): boxes.tsv's, else one around each id but 0 and ignore."""
    if data and (Path(data) / "boxes.tsv").is_file():
        listed = read_boxes(Path(data) / "boxes.tsv")
        boxes = [torch.tensor(listed[n], dtype=torch.float64).view(-1, 4) for n in scenes.names]
    else:
        count_classes(scenes, scenes, ignore)  # a mark for unlabelled pixels would be an object
        ids = (mask.unique() for mask in scenes.masks)
        ids = (i[(i != 0) & (i.long() != ignore)].view(-1, 1, 1) for i in ids)
        boxes = [boxes_around(mask == i) for mask, i in zip(scenes.masks, ids)]
    if not any(map(len, boxes)):
        raise UserError(
            "no reported image has a true box; list boxes in boxes.tsv or mend the masks"
        )
    return boxes
