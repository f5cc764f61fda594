"""Images: folders, augmentation, and batches that are a function of the seed.

**Randomness is a function, not a stream.** Every random number of a run (weights, order of the
images, augmentation, drop-path) comes from a seed computed from the run's seed, what it is for,
and the epoch, step and place in the batch. So a resumed run needs no stored generator state to
equal an uninterrupted one, and neither does it matter how many loader workers there are.
"""

import atexit
import functools
import hashlib
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from support.errors import UserError
from support.processes import progress

CORES = min(8, os.cpu_count() or 1)

# What a seed is for comes first among the numbers it is made of, so that no two uses coincide.
ORDER, IMAGES, STEP = 1, 2, 3


def mixed_seeds(count: int, *numbers: int) -> list[int]:
    """32-bit seeds made of non-negative integers; neighbouring inputs give unrelated seeds."""
    return np.random.SeedSequence(numbers).generate_state(count).tolist()


# --------------------------------------------------------------------------------------------------
# Image folders: ROOT/train/<class>/*, ROOT/val/<class>/*
# --------------------------------------------------------------------------------------------------


@contextmanager
def decoding(path: str | Path, what: str = "image") -> Iterator[None]:
    """Raises UserError, naming the file, where Pillow cannot read it."""
    try:
        yield
    except (UserError, MemoryError, FileNotFoundError):
        raise
    except Exception as error:  # a broken file may make Pillow raise anything
        advice = "replace it; a run that is to be resumed needs the same number of images"
        raise UserError(f"cannot read {what} {path} ({error}); {advice}") from error


def open_rgb(path: str) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF tag says.

    Greyscale and palette images are converted; 16 bits per pixel are scaled to 8, because Pillow
    would clip them.

    Raises UserError, naming the file, where it cannot be decoded, or has numbers of unknown range.
    """
    with decoding(path), Image.open(path) as image:
        if image.mode in ("I", "F"):
            raise UserError(f"image {path} has 32 bits per pixel; save it with 8 or 16")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        return image.convert("RGB")


CHECKED_ALL = 20_000  # images; of a larger set only a sample is checked, to keep the start short


def image_sizes(paths: list[str]) -> list[tuple[int, int]]:
    """(height, width) of images. Raises UserError at the first unreadable one."""
    pool = ThreadPoolExecutor(CORES)  # no more: each thread may hold a very large image
    sizes = pool.map(lambda path: open_rgb(path).size[::-1], paths)
    try:
        return list(progress(sizes, "checking images", total=len(paths)))
    finally:
        pool.shutdown(cancel_futures=True)


def check_images(paths: list[str]) -> None:
    """Raises UserError at the first unreadable image, before training has begun.

    Checks a sample of more than `CHECKED_ALL`; a damaged image outside it stops the run when the
    run comes to it.
    """
    image_sizes(paths[:: len(paths) // 2000] if len(paths) > CHECKED_ALL else paths)


def image_folder(root: str, split: str) -> ImageFolder:
    """`ROOT/split/<class>/*` as torchvision's ImageFolder. Raises UserError where it is not so."""
    folder = Path(root) / split
    layout = f"expected ROOT/{split}/<class>/<image files>"
    if not Path(root).is_dir():
        raise UserError(f"--data {root}: no such folder")
    if not folder.is_dir():
        raise UserError(f"--data {root}: no folder {folder}; {layout}")
    try:
        return ImageFolder(str(folder), loader=open_rgb)
    except FileNotFoundError as error:  # no class folder, or one without images
        problem = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--data {root}: {problem}; {layout}") from error


def image_folders(root: str, check: bool, need_val: bool = True):
    """(train, val) under ROOT, with the same classes and readable images.

    need_val: False returns None where there is no val/. check: False leaves the images unread,
    because one of several processes is enough to check them. Raises UserError.
    """
    train, val = image_folder(root, "train"), None
    if need_val or (Path(root) / "val").is_dir():
        val = image_folder(root, "val")
        if train.classes != val.classes:
            only_train = sorted(set(train.classes) - set(val.classes))
            only_val = sorted(set(val.classes) - set(train.classes))
            raise UserError(
                f"--data {root}: train/ and val/ must hold the same classes; only in train: "
                f"{only_train[:3]}, only in val: {only_val[:3]}"
            )
    if check:
        check_images([path for path, _ in train.samples + (val.samples if val else [])])
    return train, val


def listing(dataset: Dataset) -> str:
    """A hash of the names of a folder's images, their classes and, where there are at most
    `CHECKED_ALL`, their sizes in bytes; "" for synthetic images."""
    if not isinstance(dataset, ImageFolder):
        return ""
    start = len(dataset.root)  # cut off as text, because there may be a million paths
    size = os.path.getsize if len(dataset) <= CHECKED_ALL else lambda path: ""
    names = [f"{path[start:]}\t{label}\t{size(path)}\n" for path, label in dataset.samples]
    return hashlib.sha256("".join(names).encode("utf-8", "surrogateescape")).hexdigest()


# --------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set here


@functools.cache  # once per device: making a tensor on a GPU in every step would wait for the GPU
def channel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))


def normalise(images: Tensor) -> Tensor:
    """(batch, 3, height, width) uint8 -> float with about zero mean and unit variance.

    On the device, so that images travel there as uint8: a quarter of the traffic.
    """
    mean, std = channel_statistics(images.device)
    return (images / 255 - mean) / std


def augmentations(size: int, drawn: bool) -> tuple[v2.Transform, v2.Transform]:
    """(training, validation) transforms to uint8 tensors of size x size."""
    if drawn:  # a turned-over disc is a disc; the drawings are of the right size already
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]), v2.Identity()
    grey = [round(255 * m) for m in MEAN]  # zero once normalised
    train = v2.Compose(
        [
            v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(num_ops=2, magnitude=9, fill=grey),
            v2.PILToTensor(),
            v2.RandomErasing(p=0.25, value=grey),
        ]
    )
    # ImageNet practice cuts the middle 7/8 out; of images hardly larger than `size` keep all.
    resized = round(size / 0.875) if size >= 128 else size
    val = v2.Compose(
        [
            v2.Resize(resized, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
        ]
    )
    return train, val


# --------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------


class Seeded(Dataset):
    """A data set whose transform draws its random numbers from a seed that comes with the index.

    Keys are (index, seed) pairs, as `Batches` makes them.
    """

    def __init__(self, dataset: Dataset, transform: Callable):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        indices = [index for index, _ in keys]
        if hasattr(self.dataset, "__getitems__"):
            samples = self.dataset.__getitems__(indices)
        else:
            samples = (self.dataset[index] for index in indices)  # one decoded at a time
        out = []
        for (_, seed), (image, label) in zip(keys, samples):
            # not torch.manual_seed: it seeds every device too, a quarter of the time of an image
            torch.default_generator.manual_seed(seed)
            out.append((self.transform(image), label))
        return out


class Batches:
    """The batches of an epoch as lists of (index, seed): a function of (run seed, epoch) alone.

    Set `epoch`, and `first` to leave out the batches that a resumed run has already seen. With
    several processes each gets every world_size-th image of a batch of `batch_size`.

    shuffle=True is for training: a new order every epoch, the last incomplete batch left out.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, shuffle: bool, rank: int = 0, world: int = 1
    ):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world = rank, world
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        whole = self.length // self.batch_size
        return whole if self.shuffle else math.ceil(self.length / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.length)
        if self.shuffle:
            [seed] = mixed_seeds(1, ORDER, self.seed, self.epoch)
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.length, generator=generator)
        for step in range(self.first, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            seeds = mixed_seeds(len(batch), IMAGES, self.seed, self.epoch, step)
            mine = list(zip(batch.tolist(), seeds))[self.rank :: self.world]
            if mine:  # the last batch of a validation may be smaller than the number of processes
                yield mine


def start_worker(_: int) -> None:
    # Ctrl-C reaches every process of the terminal, and a batch system sends SIGTERM to all of them.
    # Only the main process decides what it means; the workers end when it does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill leftover workers: they ignore SIGTERM, so Python would wait for them forever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a failure
    for worker in multiprocessing.active_children():
        if worker.daemon:  # as a loader's workers are
            worker.kill()


LOADER_PATIENCE = 900  # seconds for a batch, or a worker that died holding a lock blocks forever


def make_loader(
    dataset: Dataset, transform: Callable, batches: Batches, workers: int, device: torch.device
) -> DataLoader:
    return DataLoader(
        Seeded(dataset, transform),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0 and batches.shuffle,  # those for validation would idle
        worker_init_fn=start_worker,
        timeout=LOADER_PATIENCE if workers else 0,
    )
