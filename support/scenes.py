"""Images with masks or boxes: synthetic, or from a folder as `eval_dense.py` describes it."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2.functional import pil_to_tensor

from support.data import (
    decoding,
    image_sizes,
    open_rgb,
    renaming,
    say_left_out,
    turned,
    visible_walk,
)
from support.errors import UserError
from support.processes import progress
from support.shapes import draw_shapes

Size = tuple[int, int]  # height, width
MOST_CLASSES = 4096  # a larger id marks unlabelled pixels, as 65535 does, or is a mistake


class Scenes(NamedTuple):
    names: list[str]  # of the images of a split: the paths of files
    image: Callable[[int], Tensor]  # number -> (3, height, width) uint8
    sizes: list[Size]
    masks: list[Tensor] | None  # class ids, (height, width), uint8 or int32


def synthetic_scenes(length: int, split: str, side: int) -> Scenes:
    parts = torch.arange(length).split(100)  # a thousand drawn at once would take gigabytes
    images, _, masks = zip(*(draw_shapes(part.tolist(), side, split) for part in parts))
    names, sizes = [f"Shapes {split} {i}" for i in range(length)], [(side, side)] * length
    return Scenes(names, torch.cat(images).__getitem__, sizes, [*torch.cat(masks)])


def image_files(paths: list[Path]) -> Scenes:
    """Images without masks. All are checked now, and read again when they are asked for."""
    names = [str(path) for path in paths]
    return Scenes(names, lambda i: pil_to_tensor(open_rgb(names[i])), image_sizes(names), None)


def read_mask(path: Path, size: Size) -> Tensor:
    """Class ids, (height, width); those of a palette image are its indices.

    Turned as the mask's own EXIF tag says, whatever its image's says.
    """
    if not path.is_file():
        raise UserError(f"mask {path} is missing; add it or remove its image")
    with decoding(path, "mask"), Image.open(path) as image:
        mode, ids = image.mode, np.array(turned(image))
    if ids.ndim != 2 or mode == "F" or ids.min() < 0:
        raise UserError(f"mask {path} is {mode}; save class ids as one channel of integers >= 0")
    if ids.shape != size:
        raise UserError(f"mask {path} is {ids.shape}, its image {size} pixels; make them equal")
    return torch.from_numpy(ids.astype(np.int32 if ids.max() > 255 else np.uint8))


def visible_files(folder: Path) -> list[Path]:
    """The image files in the folder, sorted. Says what else it holds."""
    left_out = Counter()
    _, _, names = next(visible_walk(folder, left_out)) if folder.is_dir() else (folder, [], [])
    say_left_out(folder, left_out)
    return [folder / name for name in names]


def folder_scenes(root: Path, split: str, with_masks: bool) -> Scenes:
    """ROOT/split/images and, if asked for, ROOT/split/masks. All files are checked now."""
    images, masks = root / split / "images", root / split / "masks"
    paths = visible_files(images)
    if not paths:
        advice = f"expected ROOT/{split}/images/*"
        if root.is_dir() and not (root / split).is_dir():
            advice = renaming(root, split, advice)
        raise UserError(f"--data {root}: no images in {images}; {advice}")
    scenes = image_files(paths)
    if not with_masks:
        return scenes
    found = {f.stem: f for f in visible_files(masks) if f.suffix.lower() == ".png"}
    named = [found.get(path.stem, masks / f"{path.stem}.png") for path in paths]
    pairs = progress(list(zip(named, scenes.sizes)), f"checking {split} masks")
    return scenes._replace(masks=[read_mask(mask, size) for mask, size in pairs])


def count_classes(train: Scenes, reported: Scenes, ignore: int) -> int:
    """1 + the largest class id in the training masks. Raises UserError where another is larger."""
    masks = (mask.long() for mask in train.masks + reported.masks)  # ignore may exceed uint8
    largest = [int(mask.masked_fill(mask == ignore, -1).max()) for mask in masks]
    in_train, in_reported = largest[: len(train.masks)], largest[len(train.masks) :]
    for split, ids in (("training", in_train), ("reported", in_reported)):
        if max(ids) < 0:
            raise UserError(f"--ignore {ignore}: the {split} masks hold no other id; use another")
    classes = min(1 + max(in_train), MOST_CLASSES)
    for name, id in zip(train.names + reported.names, largest):
        if id >= classes:
            known = f"above {classes - 1}, the largest allowed or in training masks"
            advice = f"if it marks unlabelled pixels add --ignore {id}, else correct the mask"
            raise UserError(f"the mask of {name} holds id {id}, {known}; {advice}")
    return classes


def boxes_around(masks: Tensor) -> Tensor:
    """(mask, row, column) bool -> (mask, 4): x0, y0, x1, y1, x1 and y1 exclusive, float64."""
    return masks_to_boxes(masks).double() + torch.tensor([0, 0, 1, 1])  # its x1, y1 are inclusive


def read_boxes(path: Path) -> dict[str, list[list[float]]]:
    """boxes.tsv as image path -> boxes (x0, y0, x1, y1). The first line may name the columns."""
    boxes = defaultdict(list)
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").splitlines(), start=1):
        file, *fields = line.split("\t")
        if not line.strip() or (number == 1 and file == "file"):
            continue
        try:
            x0, y0, x1, y1 = map(float, fields)
        except ValueError:  # not four numbers
            x0 = y0 = x1 = y1 = math.nan
        valid = 0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf
        if not valid or not (path.parent / file).is_file():
            layout = "expected a file of ROOT, x0, y0, x1, y1, separated by tabs"
            raise UserError(f"{path}, line {number} is {line!r}; {layout}")
        boxes[str(path.parent / file)].append([x0, y0, x1, y1])
    return boxes


def true_boxes(scenes: Scenes, root: Path | None, ignore: int) -> list[Tensor]:
    """The boxes of each image, (box, 4): those of boxes.tsv, or else one around each class in its
    mask, except 0, the background, and ignore."""
    if root and (root / "boxes.tsv").is_file():
        listed = read_boxes(root / "boxes.tsv")
        boxes = [torch.tensor(listed[n], dtype=torch.float64).view(-1, 4) for n in scenes.names]
    else:
        count_classes(scenes, scenes, ignore)  # or a mark for unlabelled pixels would be an object
        ids = [torch.tensor(sorted({*m.unique().tolist()} - {0, ignore})) for m in scenes.masks]
        boxes = [boxes_around(m == i[:, None, None]) for m, i in zip(scenes.masks, ids)]
    if not any(map(len, boxes)):
        raise UserError("no reported image has a true box; list boxes in boxes.tsv or add masks")
    return boxes
