"""Images: folders, augmentation, and batches that are a function of the seed.

**Randomness is a function, not a stream.** Every random number of a run (weights, order of the
images, augmentation, drop-path) comes from a seed computed from the run's seed, what it is for,
and the epoch, step and place in the batch. So a resumed run needs no stored generator state to
equal an uninterrupted one, and neither does it matter how many loader workers there are.
"""

import atexit
import filecmp
import functools
import hashlib
import math
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from support.errors import UserError
from support.processes import progress, say


def cores() -> int:
    """Processor cores for each of the processes that torchrun started on this machine, 16 at most:
    so many loaders feed a GPU, and each holds two batches in shared memory."""
    can_tell = hasattr(os, "sched_getaffinity")  # not on macOS; a batch system may grant only some
    granted = len(os.sched_getaffinity(0)) if can_tell else os.cpu_count() or 1
    return min(16, max(1, granted // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


CORES = cores()

# What a seed is for comes first among the numbers it is made of, so that no two uses coincide.
ORDER, IMAGES, STEP = 1, 2, 3


def mixed_seeds(count: int, *numbers: int) -> list[int]:
    """32-bit seeds made of non-negative integers; neighbouring inputs give unrelated seeds."""
    return np.random.SeedSequence(numbers).generate_state(count).tolist()


# --------------------------------------------------------------------------------------------------
# Image files
# --------------------------------------------------------------------------------------------------


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every data set here
GREY = [round(255 * m) for m in MEAN]  # zero once normalised

# What turns an image upright whose EXIF orientation is 2, 3, ... 8
TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
TURNS = {number: Image.Transpose[turn] for number, turn in enumerate(TURNS.split(), start=2)}


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


def turned(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, whatever may be wrong with its other tags."""
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # metadata that Pillow cannot parse
        orientation = None
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def open_rgb(path: str, image_size: int | None = None) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF tag says.

    image_size: of what is to be cut out of it and resized. A JPEG whose sides are 8 times as long
    or more is decoded at a half, a quarter or an eighth of its size, but not below 4 times: a crop
    of a twelfth of the area is then hardly enlarged.

    Greyscale and palette images are converted; 16 bits per pixel are scaled to 8, because Pillow
    would clip them. Transparent images are laid on (124, 116, 104), ImageNet's mean grey, on which
    white drawings show as well as black ones. info["brightest"] of the result: the largest value
    of a 16-bit file, after scaling; else None.

    Raises UserError, naming the file, where it cannot be decoded, or has numbers of unknown range.
    """
    with decoding(path), Image.open(path) as image:
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
            raise UserError(f"image {path} has 32 bits per pixel; save it with 8 or 16")
        if image_size:
            image.draft(None, (4 * image_size, 4 * image_size))  # does nothing if it is no JPEG
        sixteen_bits = re.search(r";16|65535\)", str(image.tile))  # what the decoder is told
        image = turned(image)
        if image.mode.startswith("I"):
            values, clear = np.asarray(image), image.info.get("transparency")
            image = Image.fromarray((values // 257).astype(np.uint8))
            if clear is not None:
                image.putalpha(Image.fromarray(np.uint8(255) * (values != clear)))
        rgb = image.convert("RGB")
        brightest = max(high for _, high in rgb.getextrema()) if sixteen_bits else None
        if image.has_transparency_data:
            ground = Image.new("RGBA", image.size, tuple(GREY))
            rgb = Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
        rgb.info["brightest"] = brightest
        return rgb


def image_sizes(paths: list[str]) -> list[tuple[int, int]]:
    """(height, width) of images. Raises UserError at the first unreadable one."""
    pool = ThreadPoolExecutor(min(8, CORES))  # no more: each thread may hold a very large image
    facts = pool.map(lambda p: ((x := open_rgb(p)).size[::-1], x.info.get("brightest")), paths)
    try:
        sizes, brightest = zip(*progress(facts, "checking images", total=len(paths)))
    finally:
        pool.shutdown(cancel_futures=True)
    bits = 8 + max((x.bit_length() for x in brightest if x is not None), default=8)
    if bits <= 12:
        facts = f"hold only {bits} bits, 0 .. {2**bits - 1} of 65535, and are almost black"
        say(f"note    the 16-bit images here {facts}; multiply them by {2 ** (16 - bits)}")
    return list(sizes)


CHECKED_ALL = 20_000  # images; of a larger set only a sample is checked, to keep the start short


def sample(paths: list[str]) -> list[str]:
    return paths[:: len(paths) // 2000] if len(paths) > CHECKED_ALL else paths


# --------------------------------------------------------------------------------------------------
# Image folders: ROOT/train/<class>/*, ROOT/val/<class>/*; without labels also ROOT/train/*, ROOT/*
# --------------------------------------------------------------------------------------------------


# Besides names that begin with a dot, in lower case: what systems and file servers leave behind.
HIDDEN = {"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found", "@eadir"}
OTHER_NAMES = dict(train=["train", "training"], val=["val", "validation", "valid", "test"])


def stop(error: OSError) -> NoReturn:
    raise error


def visible_walk(folder: str | Path, left_out: Counter) -> Iterator[tuple[str, list, list]]:
    """(folder, its folders, its images) for folder and all below; left_out counts other things."""
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        names = {x for x in folders + files if x[0] != "." and x.lower() not in HIDDEN}
        left_out["hidden files or folders"] += len(folders) + len(files) - len(names)
        folders[:] = sorted(names.intersection(folders))  # the walk goes on into these alone
        images = []
        for name in sorted(names.intersection(files)):
            extension = os.path.splitext(name)[1].lower()
            if extension in IMG_EXTENSIONS:
                images.append(name)
            else:
                left_out[extension or "without extension"] += 1
        yield parent, folders, images


def say_left_out(folder: str | Path, left_out: Counter) -> None:
    kinds = [f"{number} {kind}" for kind, number in left_out.most_common() if number]
    if kinds:
        say(f"note    {folder}: left out {', '.join(kinds[:6])}{', ...' if kinds[6:] else ''}")


def renaming(root: str | Path, split: str, otherwise: str) -> str:
    """Advice where ROOT/split is missing: rename the folder that seems to be it, or `otherwise`."""
    folders = {name.lower(): name for name in os.listdir(root)}
    found = [folders[name] for name in OTHER_NAMES[split] if name in folders]
    return f"rename {found[0]} to {split}" if found else otherwise


class VisibleImages(ImageFolder):
    """torchvision's ImageFolder, without hidden files and folders; it says what it leaves out.

    The class "" is of the images in the folder itself. Raises UserError where a class has no image.
    """

    def __init__(self, folder: Path, class_folders: list[str], image_size: int | None):
        self.class_folders = class_folders
        loader = functools.partial(open_rgb, image_size=image_size)
        super().__init__(str(folder), loader=loader)

    def find_classes(self, folder: str) -> tuple[list[str], dict[str, int]]:
        return self.class_folders, {name: i for i, name in enumerate(self.class_folders)}

    def make_dataset(self, folder: str, class_to_idx: dict[str, int], **_) -> list[tuple[str, int]]:
        found, below, left_out = [], {name: set() for name in class_to_idx}, Counter()
        for parent, _, images in visible_walk(folder, left_out):
            name, _, subfolder = parent[len(folder) + 1 :].partition(os.sep)
            if name not in class_to_idx:
                left_out["images in subfolders" if name else "images in no class"] += len(images)
            elif images:
                below[name].add(subfolder)
                found += [(name, parent, image) for image in images]
        say_left_out(folder, left_out)
        for name in class_to_idx:
            if not below[name]:
                advice = f"add some ({' '.join(IMG_EXTENSIONS)}) or remove the folder"
                raise UserError(f"no images in {Path(folder, name)}; {advice}")
        shared = set.intersection(*below.values())
        if len(below) > 1 and len(shared) > 1 and "" not in shared:
            hint = f"every class has the folders {', '.join(sorted(shared)[:3])}"
            say(f"note    {folder}: {hint}; one folder level too many?")
        return [(os.path.join(parent, x), class_to_idx[name]) for name, parent, x in sorted(found)]


def image_folder(
    root: str, split: str, need_labels: bool = False, image_size: int | None = None
) -> ImageFolder:
    """`ROOT/split/<class>/*` in the order of torchvision's ImageFolder.

    need_labels: False accepts a single class too, `ROOT/split/*`, and for training `ROOT/*`.
    image_size: see `open_rgb`. Raises UserError where there are no such images.
    """
    folder, layout = Path(root) / split, f"expected ROOT/{split}/<class>/<image files>"
    if not Path(root).is_dir():
        raise UserError(f"--data {root}: no such folder")
    if not folder.is_dir():
        _, _, images = next(visible_walk(root, Counter()))
        if need_labels or split != "train" or not images:
            raise UserError(f"--data {root}: no folder {folder}; {renaming(root, split, layout)}")
        return VisibleImages(Path(root), [""], image_size)
    _, classes, images = next(visible_walk(folder, Counter()))
    if not classes and (need_labels or not images):
        raise UserError(f"--data {root}: Couldn't find any class folder in {folder}; {layout}")
    if need_labels and len(classes) == 1:
        problem = f"the only class in {folder} is {classes[0]}; one folder level too many?"
        raise UserError(f"--data {root}: {problem} {layout} of two classes or more")
    return VisibleImages(folder, classes or [""], image_size)


def image_folders(root: str, check: bool, need_val: bool = True, image_size: int | None = None):
    """(train, val) under ROOT, with the same classes and readable images.

    Raises UserError at the first unreadable image, before training has begun; of more than
    `CHECKED_ALL` only a sample is checked, and a damaged one outside it stops the run when the run
    comes to it.

    need_val: False is for training without labels; val is None where there is none, or one class.
    check: False leaves the images unread, because one of several processes is enough to check them.
    image_size: see `open_rgb`.
    """
    train, val = image_folder(root, "train", need_val, image_size), None
    if need_val or (len(train.classes) > 1 and (Path(root) / "val").is_dir()):
        val = image_folder(root, "val", image_size=image_size)
        if train.classes != val.classes:
            only_train = sorted(set(train.classes) - set(val.classes))
            only_val = sorted(set(val.classes) - set(train.classes))
            raise UserError(
                f"--data {root}: train/ and val/ must hold the same classes; only in train: "
                f"{only_train[:3]}, only in val: {only_val[:3]}"
            )
    if check:
        image_sizes(sample([path for path, _ in train.samples + (val.samples if val else [])]))
    if check and val:
        names = sample([path[len(val.root) :] for path, _ in val.samples])
        twins = [(val.root + x, train.root + x) for x in names if os.path.isfile(train.root + x)]
        if seen := sum(filecmp.cmp(*files, shallow=False) for files in twins):
            facts = f"{seen} of {len(names)} images in val/ are in train/ too"
            say(f"note    {facts}: that measures what the network remembers")
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
    # torchvision resizes uint8 tensors four times as fast as Pillow, which is faster at the rest.
    train = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToPILImage(),
            v2.RandAugment(num_ops=2, magnitude=9, fill=GREY),
            v2.PILToTensor(),
            v2.RandomErasing(p=0.25, value=GREY),
        ]
    )
    # ImageNet practice cuts the middle 7/8 out; of images hardly larger than `size` keep all.
    resized = round(size / 0.875) if size >= 128 else size
    val = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(resized, interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
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
        # Any other way to start them gives a worker time to die of a signal before start_worker.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        timeout=LOADER_PATIENCE if workers else 0,
    )
