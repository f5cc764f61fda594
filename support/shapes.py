"""Shapes: a synthetic data set with masks, which needs no download.

Ten classes of bright shapes on dark, textured grounds. A linear classifier on the pixels stays
below 40 % accuracy; a network that recognises the shape reaches 99 %.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = {"train": 1, "val": 2, "test": 3}


def disc(x: Tensor, y: Tensor, radius: float, x0: float = 0.0) -> Tensor:
    return torch.hypot(x - x0, y) - radius


def box(x: Tensor, y: Tensor, half_width, half_height) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


# Signed distances, some approximate: negative inside the shape. The canvas is [-1, 1] x [-1, 1].
SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: disc(x, y, 0.8),
    "ring": lambda x, y: disc(x, y, 0.7).abs() - 0.2,
    "square": lambda x, y: box(x, y, 0.72, 0.72),
    "triangle": lambda x, y: torch.maximum(x - 0.5, 0.866 * y.abs() - 0.5 * x - 0.5),
    "cross": lambda x, y: torch.minimum(box(x, y, 0.9, 0.27), box(x, y, 0.27, 0.9)),
    "crescent": lambda x, y: torch.maximum(disc(x, y, 0.9), -disc(x, y, 0.75, 0.5)),
    "bar": lambda x, y: box(x, y, 0.95, 0.24),
    "frame": lambda x, y: box(x, y, 0.61, 0.61).abs() - 0.19,
    "corner": lambda x, y: torch.minimum(box(x + 0.5, y, 0.28, 0.85), box(x, y + 0.57, 0.78, 0.28)),
    "dots": lambda x, y: torch.minimum(disc(x, y, 0.4, -0.5), disc(x, y, 0.4, 0.5)),
}


def draw_shapes(indices: list[int], size: int, split: str, seed: int = 0):
    """Draw images with one bright shape each, on a dark, textured ground.

    The colour, position, size and rotation of the shape are random. The ground consists of three
    gratings, and three short bars distract from the shape. The same (seed, split, index) gives the
    same picture at every size; its class is index mod 10.

    Returns images (batch, 3, size, size) uint8, labels (batch,), and masks (batch, size, size)
    uint8: 0 for the ground and the distracting bars, 1 + label for the shape.
    """
    labels = torch.tensor(indices) % len(SHAPES)
    generators = [np.random.default_rng((seed, SPLITS[split], i)) for i in indices]
    numbers = np.stack([g.random(64, np.float32) for g in generators], axis=1)
    columns = iter(torch.from_numpy(numbers)[:, :, None, None])

    def draw(low: float, high: float) -> Tensor:  # (batch, 1, 1)
        return low + (high - low) * next(columns)

    def colour(low: float, high: float) -> Tensor:  # (batch, 3, 1, 1)
        return torch.stack([draw(low, high) for _ in range(3)], dim=1)

    ticks = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")

    def rotated(x0: Tensor | float, y0: Tensor | float, angle: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x - x0, y - y0
        return u * angle.cos() + v * angle.sin(), v * angle.cos() - u * angle.sin()

    def paint(image: Tensor, distance: Tensor, paint_colour: Tensor) -> tuple[Tensor, Tensor]:
        cover = (0.5 - distance * size / 2).clamp(0, 1)  # antialiased over one pixel
        return image + cover[:, None] * (paint_colour - image), cover

    image = colour(0.1, 0.4).expand(-1, -1, size, size)
    for _ in range(3):  # gratings
        u, _ = rotated(0, 0, draw(0, math.pi))
        wave = torch.sin(draw(4, 24) * u + draw(0, 2 * math.pi))
        image = image + colour(-0.08, 0.08) * wave[:, None]
    for _ in range(3):  # distractors
        u, v = rotated(draw(-1, 1), draw(-1, 1), draw(0, math.pi))
        image, _ = paint(image, box(u, v, draw(0.05, 0.4), draw(0.04, 0.1)), colour(0, 0.6))
    radius = draw(0.55, 0.85)
    room = 1 - radius
    u, v = rotated(draw(-1, 1) * room, draw(-1, 1) * room, draw(0, 2 * math.pi))
    distance = torch.empty(len(indices), size, size)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(u[chosen] / radius[chosen], v[chosen] / radius[chosen])
    image, cover = paint(image, distance * radius, colour(0.6, 1.0))
    masks = torch.where(cover > 0.5, labels[:, None, None] + 1, 0).to(torch.uint8)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels, masks


class Shapes(Dataset):
    """`draw_shapes` without the masks, as a data set of (image (3, size, size) uint8, label).

    split: "train", "val" or "test", which have no image in common.
    """

    def __init__(self, split: str, length: int, image_size: int = 32, seed: int = 0):
        self.classes = list(SHAPES)
        self.split, self.length, self.image_size, self.seed = split, length, image_size, seed

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        # DataLoader calls this with a whole batch: together they take a tenth of the time.
        images, labels, _ = draw_shapes(indices, self.image_size, self.split, self.seed)
        return list(zip(images, labels.tolist()))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        return self.__getitems__([index])[0]
