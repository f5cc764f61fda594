"""What the frozen features of a ViT know about places in an image: three looks at its tokens.

    python eval_dense.py segment RUN/last.pt --data ROOT --ignore 11 --blocks 3 6 9 12
    python eval_dense.py discover RUN/last.pt OTHER/last.pt
    python eval_dense.py picture RUN/last.pt OTHER/last.pt --images a.jpg b.png
    python eval_dense.py picture --random-init residual --random-init skipless

segment   trains a linear probe on the tokens and reports mIoU, beside two baselines: the class met
          most often, and the same network untrained.
discover  finds the object of an image without any training (TokenCut) and reports CorLoc.
picture   draws the tokens' principal components and the class token's attention. spread: how far
          tokens are from their mean, over their norm; peak: the largest share over the mean one.

ROOT holds train/images/*, train/masks/<the image's stem>.png, and the same under test/ (or val/),
on which figures are reported. A mask is an image of one channel, its values class ids. `discover`
reads no train/, and takes true boxes from ROOT/boxes.tsv where there is one (a line each: file
relative to ROOT, x0, y0, x1, y1 in pixels, tab between them). Without --data images are drawn
(Shapes). OUT gets segment.json, discover.json or picture.png. `COMMAND --help` explains the flags.
"""

import argparse
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from PIL import Image
from scipy.linalg import eigh
from scipy.ndimage import label as connected_components
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import common
from minskip import PRESETS, ViT, conditioned_init_

Size = tuple[int, int]  # height, width
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, x1 and y1 exclusive

SHAPES_TRAIN, SHAPES_REPORTED = 1_000, 500
BATCH_SIZE = 32
LEARNING_RATE = 3e-2  # of the probe: AdamW without decay; best of 3e-3, 1e-2, 3e-2 on a third split

# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def drawn_network(residual: bool, conditioned: bool = False) -> ViT:
    """A fresh nano ViT of the size of the demo of train_cls.py, with the demo's constants."""
    model = ViT(32, 8, num_classes=0, **PRESETS["nano"], residual=residual, position_std=0.5)
    return conditioned_init_(model, alpha=0.7, beta=1.0, c=3.0) if conditioned else model


RANDOM_INIT = {
    "residual": lambda: drawn_network(residual=True),
    "skipless": lambda: drawn_network(residual=False),
    "skipless+conditioned": lambda: drawn_network(residual=False, conditioned=True),
}


def load_networks(args: argparse.Namespace, untrained: bool) -> dict[str, ViT]:
    """Name -> frozen network, from the checkpoints (each followed by itself before training)
    and --random-init.

    A checkpoint is named after its folder, or by its path where two folders have one name.
    """
    if not (args.checkpoints or args.random_init):
        common.fail("no network given: name checkpoints (RUN/last.pt) or add --random-init VARIANT")
    networks = {}
    folders = [Path(path).resolve().parent.name for path in args.checkpoints]
    for path, folder in zip(args.checkpoints, folders):
        checkpoint = common.load_checkpoint(path)
        name = folder if folders.count(folder) == 1 else path
        networks[name] = common.model_of(checkpoint)
        if untrained:
            networks[f"{name}, untrained"] = common.untrained_model_of(checkpoint)
    for variant in args.random_init:
        torch.manual_seed(args.seed)
        networks[f"{variant}, random"] = RANDOM_INIT[variant]()
    return {name: model.eval().requires_grad_(False) for name, model in networks.items()}


def input_sizes(networks: dict, asked: list[int] | None, first: Size | None) -> dict[str, Size]:
    """(height, width) to which images are resized for each network: patches must tile it.

    As asked for; else the size of the first image rounded to whole patches; first=None (drawn
    images): the size the network was trained at.
    """
    sizes = {}
    for name, model in networks.items():
        patch, side = model.config["patch_size"], model.config["image_size"]
        rounded = [max(1, math.floor(x / patch + 0.5)) * patch for x in first or (side,)]
        height, width = size = ((asked or rounded)[0], (asked or rounded)[-1])
        if min(size) < 1 or height % patch or width % patch:
            common.fail(f"--image-size {height} {width}: give multiples of {name}'s patch, {patch}")
        if size != (side, side):
            print(
                f"{name}: images of {height} x {width}, trained at {side} x {side}: position "
                "embeddings interpolated bicubically"
            )
        sizes[name] = size
    return sizes


def chosen_blocks(name: str, model: ViT, asked: list[int] | None, default: list, least: int):
    """The block numbers to look at, in least .. depth."""
    depth = len(model.blocks)
    if asked and (bad := [b for b in asked if not least <= b <= depth]):
        common.fail(f"--blocks {bad[0]}: {name} has {depth} blocks; give numbers {least}..{depth}")
    return asked or default


@torch.no_grad()
def token_maps(model: ViT, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """Patch tokens after each block, (batch, 3, H, W) -> list of (batch, dim, row, column).

    The class token is left out. The final LayerNorm is applied whatever the block, as DINOv2's
    linear evaluation does: it was trained for the last block alone, but brings the others to
    like size too, without which skipless tokens may overflow float16; its learned scales and
    shifts a probe that begins with a BatchNorm absorbs.
    """
    rows = images.shape[-2] // model.config["patch_size"]
    cut = model.class_token is not None
    return [
        rearrange(model.norm(x)[:, cut:], "batch (row col) dim -> batch dim row col", row=rows)
        for x in model.forward_features(images, blocks)
    ]


# --------------------------------------------------------------------------------------------------
# Images and masks
# --------------------------------------------------------------------------------------------------


class Scenes(NamedTuple):
    """The images of a split and what is true of them, by number."""

    names: list[str]  # files relative to ROOT
    image: Callable[[int], Tensor]  # number -> (3, height, width) uint8
    sizes: list[Size]
    masks: list[Tensor] | None  # class ids, (height, width), uint8 or int32


def read_image(path: str | Path) -> Tensor:
    """(3, height, width) uint8."""
    return v2.functional.pil_to_tensor(common.open_rgb(str(path)))


def resized(image: Tensor, size: Size) -> Tensor:
    """(3, height, width) uint8 -> (3, *size) uint8."""
    return v2.functional.resize(image, list(size), InterpolationMode.BICUBIC)


def read_mask(path: Path) -> Tensor:
    """Class ids, (height, width), of a single-channel image; a palette's indices are its ids."""
    try:
        with Image.open(path) as image:
            if len(image.getbands()) != 1 or image.mode == "F":
                common.fail(
                    f"mask {path} is {image.mode}, not single-channel; save class ids as one "
                    "channel of integers"
                )
            ids = np.array(image).astype(np.int32)
    except (OSError, SyntaxError, ValueError) as error:
        common.fail(f"cannot read mask {path} ({error}); repair or remove it")
    return torch.from_numpy(ids if ids.max() > 255 else ids.astype(np.uint8))


def folder_scenes(root: Path, split: str, need_masks: bool) -> Scenes:
    """ROOT/split/images and, if there are any or they are needed, ROOT/split/masks, checked."""
    images, masks = root / split / "images", root / split / "masks"
    layout = f"expected ROOT/{split}/images/* and ROOT/{split}/masks/<stem>.png"
    if not root.is_dir():
        common.fail(f"--data {root}: no such folder")
    for folder in (images, masks) if need_masks else (images,):
        if not folder.is_dir():
            common.fail(f"--data {root}: no folder {folder}; {layout}")
    files = sorted(f for f in images.iterdir() if f.suffix.lower() in IMG_EXTENSIONS)
    if not files:
        common.fail(f"--data {root}: no images in {images}; {layout}")
    common.check_images([str(f) for f in files])
    sizes, read = [], []
    for file in tqdm(files, f"checking {split} masks", disable=None, leave=False):
        with Image.open(file) as image:
            sizes.append((image.height, image.width))
        if masks.is_dir():
            path = masks / f"{file.stem}.png"
            if not path.is_file():
                common.fail(f"image {file} has no mask {path}; add it or remove the image")
            read.append(read_mask(path))
            if tuple(read[-1].shape) != sizes[-1]:
                common.fail(
                    f"mask {path} is {read[-1].shape[1]} x {read[-1].shape[0]}, its image "
                    f"{sizes[-1][1]} x {sizes[-1][0]}; they must be of one size"
                )
    names = [f.relative_to(root).as_posix() for f in files]
    return Scenes(names, lambda i: read_image(files[i]), sizes, read or None)


def load_scenes(args: argparse.Namespace, networks: dict[str, ViT], split: str) -> Scenes:
    """The images of split "train", or of "reported": test/, else val/, of drawn images val.

    Drawn images are as large as the largest that a network here was trained on.
    """
    if args.data is None:
        split, length = (split, SHAPES_TRAIN) if split == "train" else ("val", SHAPES_REPORTED)
        side = max(model.config["image_size"] for model in networks.values())
        images, _, masks = common.draw_shapes(list(range(length)), side, split)
        names = [f"Shapes {split} {i}" for i in range(length)]
        return Scenes(names, images.__getitem__, [(side, side)] * length, list(masks))
    root = Path(args.data)
    if split != "train":
        split = "test" if (root / "test").is_dir() else "val"
    boxes_do = args.command == "discover" and (root / "boxes.tsv").is_file()
    return folder_scenes(root, split, need_masks=not boxes_do)


def batches(scenes: Scenes, size: Size, device, what: str) -> Iterator[tuple]:
    """(numbers, network inputs (batch, 3, *size)) of all images in turn, with a progress bar."""
    parts = torch.arange(len(scenes.names)).split(BATCH_SIZE)
    for numbers in tqdm(parts, what, disable=None, leave=False, unit=" batches"):
        images = [resized(scenes.image(i), size) for i in numbers.tolist()]
        yield numbers.tolist(), common.normalise(torch.stack(images).to(device))


def classes_of(train: Scenes, reported: Scenes, ignore: int) -> int:
    """1 + the largest class id of the training masks; every reported id must be below it."""

    def largest(mask: Tensor) -> int:  # -1: nothing but ignored pixels
        return int(torch.where(mask.long() == ignore, -1, mask.long()).max())

    classes = 1 + max(map(largest, train.masks))
    found = list(map(largest, reported.masks))
    if classes == 0 or max(found) < 0:
        where = "reported" if classes else "training"
        common.fail(f"--ignore {ignore}: the {where} masks hold nothing else; give another id")
    for name, id in zip(reported.names, found):
        if id >= classes:
            common.fail(
                f"the mask of {name} holds id {id}, the training masks none above {classes - 1}; "
                f"if it marks unlabelled pixels add --ignore {id}, else mend the mask"
            )
    return classes


# --------------------------------------------------------------------------------------------------
# segment: a linear probe
# --------------------------------------------------------------------------------------------------


def confusion(prediction: Tensor, truth: Tensor, classes: int, ignore: int) -> Tensor:
    """Counts of pixels, (true class, predicted class); pixels whose truth is `ignore` left out.

    prediction, truth: class ids of one shape, whatever it is.
    """
    truth, prediction = truth.long(), prediction.long()
    kept = truth != ignore
    pairs = truth[kept] * classes + prediction[kept]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def scores(matrix: Tensor) -> dict:
    """mIoU, pixel accuracy and per-class IoU, in percent, of a (true, predicted) matrix of counts.

    IoU = both / (true or predicted); None, and not in the mean, where a class is neither.
    """
    matrix = matrix.double()
    both = matrix.diagonal()
    either = matrix.sum(0) + matrix.sum(1) - both
    iou = [100 * b / e if e else None for b, e in zip(both.tolist(), either.tolist())]
    present = [x for x in iou if x is not None]
    accuracy = 100 * both.sum() / matrix.sum()
    return dict(miou=sum(present) / len(present), accuracy=accuracy.item(), iou=iou)


def extract(model: ViT, scenes: Scenes, size: Size, blocks: list, device, what: str) -> Tensor:
    """Features of every image, (image, dim x blocks, row, column), float16 on the CPU."""
    patch, width = model.config["patch_size"], model.config["width"]
    shape = (len(scenes.names), len(blocks) * width, size[0] // patch, size[1] // patch)
    gigabytes = 2 * math.prod(shape) / 1e9
    if gigabytes > 1:
        print(f"{what}: {gigabytes:.1f} GB of features in memory")
    features = torch.empty(shape, dtype=torch.float16)
    for numbers, images in batches(scenes, size, device, what):
        maps = torch.cat(token_maps(model, images, blocks), dim=1)
        features[numbers] = maps.half().cpu()
    return features


def upsampled(logits: Tensor, size: Size) -> Tensor:
    """(batch, class, row, column) -> (batch, class, *size), bilinearly."""
    return F.interpolate(logits, size, mode="bilinear")


def train_probe(
    features: Tensor, masks: list[Tensor], classes: int, ignore: int, epochs: int, seed: int, device
) -> nn.Module:
    """A BatchNorm and a linear map, trained on the masks at their own resolution.

    features (image, dim, row, column); the probe maps (batch, dim, row, column) to (batch, class,
    row, column). The linear evaluation of DINOv2 (Oquab et al. 2023), with fewer steps.
    """
    torch.manual_seed(seed)
    # momentum=None: the mean over all batches seen, which for frozen features is what is wanted
    probe = nn.Sequential(
        nn.BatchNorm2d(features.shape[1], momentum=None, affine=False),
        nn.Conv2d(features.shape[1], classes, kernel_size=1),
    ).to(device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    steps = epochs * math.ceil(len(masks) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    bar = tqdm(total=steps, desc="training the probe", disable=None, leave=False, unit=" steps")
    for epoch in range(epochs):
        [order_seed] = common.mixed_seeds(1, common.ORDER, seed, epoch)
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(order_seed))
        for numbers in order.split(BATCH_SIZE):
            truth = [masks[i].to(device).long() for i in numbers]
            tokens = probe(features[numbers].to(device).float())
            loss, labelled = 0, sum((t != ignore).sum() for t in truth)
            for size in dict.fromkeys(t.shape for t in truth):  # usually there is one
                mine = [i for i, t in enumerate(truth) if t.shape == size]
                logits = upsampled(tokens[mine], size)
                target = torch.stack([truth[i] for i in mine])
                loss = loss + F.cross_entropy(logits, target, ignore_index=ignore, reduction="sum")
            optimizer.zero_grad()
            (loss / labelled.clamp(min=1)).backward()
            optimizer.step()
            schedule.step()
            bar.update()
    bar.close()
    return probe.eval()


@torch.no_grad()
def measure_probe(
    probe, features: Tensor, masks: list[Tensor], classes: int, ignore: int, device
) -> Tensor:
    """Confusion matrix over all images, each judged at its mask's own resolution."""
    matrix = torch.zeros(classes, classes, dtype=torch.long)
    for feature, mask in zip(features, masks):
        logits = upsampled(probe(feature[None].to(device).float()), mask.shape)
        matrix += confusion(logits[0].argmax(dim=0).cpu(), mask, classes, ignore)
    return matrix


def majority(train: Scenes, reported: Scenes, classes: int, ignore: int) -> tuple[int, dict]:
    """The class most frequent in training, and the scores of predicting it everywhere."""
    counts = sum(confusion(m, m, classes, ignore).diagonal() for m in train.masks)
    best = int(counts.argmax())
    guesses = (torch.full_like(m, best) for m in reported.masks)
    pairs = zip(guesses, reported.masks)
    return best, scores(sum(confusion(guess, m, classes, ignore) for guess, m in pairs))


def segment(args: argparse.Namespace, networks: dict[str, ViT], device: torch.device) -> None:
    blocks = {
        name: chosen_blocks(name, model, args.blocks, [len(model.blocks)], least=0)
        for name, model in networks.items()
    }
    train, reported = (load_scenes(args, networks, split) for split in ("train", "reported"))
    classes = classes_of(train, reported, args.ignore)
    sizes = input_sizes(networks, args.image_size, train.sizes[0] if args.data else None)
    common.make_folder(args.out)
    print(f"{len(train.names)} training, {len(reported.names)} reported images, {classes} classes")

    best, baseline = majority(train, reported, classes, args.ignore)
    results = {f"class {best} everywhere": baseline}
    for name, model in networks.items():
        started = time.time()
        model.to(device)
        features, unseen = (
            extract(model, scenes, sizes[name], blocks[name], device, f"{name}, {what}")
            for scenes, what in ((train, "train"), (reported, "reported"))
        )
        task = dict(classes=classes, ignore=args.ignore, device=device)
        probe = train_probe(features, train.masks, epochs=args.epochs, seed=args.seed, **task)
        matrix = measure_probe(probe, unseen, reported.masks, **task)
        results[name] = scores(matrix) | dict(confusion=matrix.tolist())
        results[name] |= dict(blocks=blocks[name], size=sizes[name], seconds=time.time() - started)
        model.cpu()

    rows = [["network", "blocks", "mIoU, %", "pixel accuracy, %"]]
    for name, r in results.items():
        numbers = " ".join(map(str, r.get("blocks", "-")))
        rows.append([name, numbers, f"{r['miou']:.1f}", f"{r['accuracy']:.1f}"])
    print_table(rows)
    print("\nIoU of each class, % (id:IoU; - in neither truth nor prediction)")
    for name, r in results.items():
        texts = ("-" if x is None else f"{x:.1f}" for x in r["iou"])
        line = "  ".join(f"{id}:{text}" for id, text in enumerate(texts))
        print(textwrap.fill(f"{name}   {line}", 100, subsequent_indent="   "))
    write_record(args, dict(classes=classes, results=results))


# --------------------------------------------------------------------------------------------------
# discover: TokenCut
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_keys(model: ViT, images: Tensor) -> Tensor:
    """Keys of the last block's attention, heads side by side: (batch, patch, width)."""
    last = model.blocks[-1]
    x = model.forward_features(images, [len(model.blocks) - 1])[0]
    return last.attention.W_K(last.norm1(x))[:, model.class_token is not None :]


def fiedler_vector(W: np.ndarray) -> np.ndarray:
    """x with (D - W) x = lambda D x for the second smallest lambda; D the diagonal of W's row sums.

    W symmetric and positive, (node, node); x (node,). Normalised cuts (Shi and Malik 2000).
    """
    D = np.diag(W.sum(axis=1))
    return eigh(D - W, D, subset_by_index=[1, 1])[1][:, 0]


def tokencut(keys: Tensor, rows: int, columns: int, tau: float = 0.2) -> np.ndarray:
    """The object among the patches of an image: (rows x columns, dim) -> bool (rows, columns).

    TokenCut (Wang et al., CVPR 2022): the graph of patches joined by weight 1 where the cosine of
    their keys exceeds tau, else 1e-5, is cut in two by its second eigenvector, at the mean. The
    foreground is the side of the entry of largest absolute value, of which the connected part
    (4 neighbours) that holds this entry is kept. Where all keys are alike, as after a collapse,
    nothing tells the patches apart and the cut is arbitrary.

    The floor of 1e-5 makes the graph dense, so the dense solver is the right one: 784 patches
    take a tenth of a second and 15 MB.
    """
    if len(keys) < 2:
        return np.ones((rows, columns), dtype=bool)  # nothing to cut
    unit = F.normalize(keys.double(), dim=-1).cpu().numpy()
    x = fiedler_vector(np.where(unit @ unit.T > tau, 1.0, 1e-5))
    seed = np.abs(x).argmax()
    above = x > x.mean()
    side = (above == above[seed]).reshape(rows, columns)
    parts, _ = connected_components(side)
    return parts == parts.flat[seed]


def box_of(mask: np.ndarray, height: float, width: float) -> Box:
    """(x0, y0, x1, y1) in pixels, x1 and y1 exclusive, around what is True in (rows, columns).

    The mask's grid is stretched over an image of height x width.
    """
    ys, xs = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    v, u = height / mask.shape[0], width / mask.shape[1]
    return xs[0] * u, ys[0] * v, (xs[-1] + 1) * u, (ys[-1] + 1) * v


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    areas = ((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b))
    return both / (sum(areas) - both)


def read_boxes(root: Path) -> dict[str, list[Box]]:
    """ROOT/boxes.tsv as file -> its boxes (x0, y0, x1, y1). A line that names columns may lead."""
    boxes = {}
    for number, line in enumerate((root / "boxes.tsv").read_text().splitlines(), start=1):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and fields[0] == "file"):
            continue
        try:
            file, x0, y0, x1, y1 = fields[0], *map(float, fields[1:])
            good = 0 <= x0 < x1 < math.inf and 0 <= y0 < y1 < math.inf
        except ValueError:  # not four numbers
            good = False
        if not good or not (root / file).is_file():
            why = "no such file under ROOT" if good else "not file, x0, y0, x1, y1, tabs between"
            common.fail(f"{root / 'boxes.tsv'}, line {number}: {line!r}: {why}; mend the line")
        boxes.setdefault(Path(file).as_posix(), []).append((x0, y0, x1, y1))
    return boxes


def true_boxes(scenes: Scenes, data: str | None, ignore: int) -> list[list[Box]]:
    """For each image its boxes: those of boxes.tsv, else one around each class but 0 and ignore."""
    if data and (Path(data) / "boxes.tsv").is_file():
        listed = read_boxes(Path(data))
        boxes = [listed.get(name, []) for name in scenes.names]
    else:
        masks = [m.numpy() for m in scenes.masks]
        boxes = [
            [box_of(m == id, *m.shape) for id in np.unique(m) if id not in (0, ignore)]
            for m in masks
        ]
    if not any(boxes):
        common.fail("no reported image has a true box; list boxes in boxes.tsv or mend the masks")
    return boxes


def judge(part: np.ndarray, boxes: list[Box], mask: Tensor | None, size: Size, ignore: int):
    """(found, mask IoU) of a predicted part (rows, columns) of an image of size (height, width).

    found: the best IoU of its box with a true one is at least 0.5. The mask IoU is that of the
    part, nearest-upsampled, and the pixels neither 0 nor ignored; None where there are none.
    """
    box = box_of(part, *size)
    found = max(box_iou(box, other) for other in boxes) >= 0.5
    if mask is None:
        return found, None
    up = F.interpolate(torch.from_numpy(part)[None, None].float(), size, mode="nearest")[0, 0] > 0
    kept, truth = mask.long() != ignore, mask.long() != 0
    if not (truth & kept).any():
        return found, None
    return found, float((up & truth & kept).sum() / ((up | truth) & kept).sum())


def summary(judged: list[tuple]) -> dict:
    """CorLoc and mean mask IoU (None without masks), in percent."""
    ious = [iou for _, iou in judged if iou is not None]
    corloc = 100 * sum(found for found, _ in judged) / len(judged)
    return dict(corloc=corloc, mask_iou=100 * sum(ious) / len(ious) if ious else None)


def discover(args: argparse.Namespace, networks: dict[str, ViT], device: torch.device) -> None:
    scenes = load_scenes(args, networks, "reported")
    boxes = true_boxes(scenes, args.data, args.ignore)
    sizes = input_sizes(networks, args.image_size, scenes.sizes[0] if args.data else None)
    common.make_folder(args.out)
    counted = [i for i, b in enumerate(boxes) if b]
    print(f"{len(counted)} of {len(scenes.names)} images have a true box")

    def judged(i: int, part: np.ndarray) -> tuple:
        mask = scenes.masks[i] if scenes.masks else None
        return judge(part, boxes[i], mask, scenes.sizes[i], args.ignore)

    whole = np.ones((1, 1), dtype=bool)
    results = {"the whole image": summary([judged(i, whole) for i in counted])}
    for name, model in networks.items():
        started, verdicts = time.time(), []
        model.to(device)
        patch = model.config["patch_size"]
        rows, columns = sizes[name][0] // patch, sizes[name][1] // patch
        for numbers, images in batches(scenes, sizes[name], device, name):
            for i, keys in zip(numbers, last_keys(model, images)):
                if boxes[i]:
                    verdicts.append(judged(i, tokencut(keys, rows, columns, args.tau)))
        results[name] = summary(verdicts)
        results[name] |= dict(size=sizes[name], seconds=time.time() - started)
        model.cpu()

    table = [["network", "CorLoc, %", "mask IoU, %"]]
    for name, r in results.items():
        iou = "-" if r["mask_iou"] is None else f"{r['mask_iou']:.1f}"
        table.append([name, f"{r['corloc']:.1f}", iou])
    print_table(table)
    write_record(args, dict(images=len(counted), results=results))


# --------------------------------------------------------------------------------------------------
# picture: principal components and attention
# --------------------------------------------------------------------------------------------------


def principal_colours(tokens: Tensor) -> Tensor:
    """The first three principal components as red, green, blue: (dim, row, col) -> (row, col, 3).

    Each rescaled to 0 .. 1, which hides how much tokens differ at all (where they are alike, it
    shows rounding). A component's sign is arbitrary: here the token farthest from the mean lies
    on the positive side.
    """
    rows = tokens.shape[1]
    x = rearrange(tokens, "dim row col -> (row col) dim").double()
    U, S, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    components = F.pad(U * S, (0, max(0, 3 - len(S))))[:, :3]
    farthest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(farthest < 0, -1.0, 1.0)
    low, high = components.amin(dim=0), components.amax(dim=0)
    colours = (components - low) / (high - low).clamp(min=1e-12)
    return rearrange(colours, "(row col) colour -> row col colour", row=rows)


@torch.no_grad()
def class_attention(model: ViT, images: Tensor, block: int) -> Tensor:
    """What the class token attends to in a block, mean over heads: (batch, row, column).

    Sums to less than one: the rest goes to the class token itself.
    """
    attention = model.blocks[block - 1].attention
    x = model.blocks[block - 1].norm1(model.forward_features(images, [block - 1])[0])
    q, k = (
        rearrange(W(y), "batch token (head dim) -> batch head token dim", head=attention.heads)
        for W, y in ((attention.W_Q, x[:, :1]), (attention.W_K, x))
    )
    logits = einsum(q, k, "batch head one dim, batch head token dim -> batch head token")
    share = (logits / math.sqrt(q.shape[-1])).softmax(dim=-1).mean(dim=1)[:, 1:]
    rows = images.shape[-2] // model.config["patch_size"]
    return rearrange(share, "batch (row col) -> batch row col", row=rows)


def draw_network(part, name: str, model: ViT, images: Tensor, blocks: list[int]) -> None:
    """A column for each block; for each image a row of tokens and a row of attention.

    images (batch, 3, *size) of this network; part: the piece of the figure to draw on.
    """
    axes = blank_axes(part, name, 2 * len(images), len(blocks))
    for column, block in enumerate(blocks):
        axes[0, column].set_title(f"block {block}", fontsize=8)
        [tokens] = token_maps(model, images, [block])
        for i, x in enumerate(tokens.cpu()):
            spread = float(x.std(dim=(1, 2)).norm() / x.norm(dim=0).mean())
            axes[2 * i, column].imshow(principal_colours(x))
            axes[2 * i, column].set_xlabel(f"spread {spread:.1g}", fontsize=6)
        if model.class_token is not None:
            for i, share in enumerate(class_attention(model, images, block).cpu()):
                peak = float(share.max() / share.mean())
                axes[2 * i + 1, column].imshow(share, vmin=0, cmap="magma")
                axes[2 * i + 1, column].set_xlabel(f"peak {peak:.1f} x mean", fontsize=6)


def blank_axes(part, title: str, rows: int, columns: int) -> np.ndarray:
    part.suptitle(textwrap.fill(title, 16 * columns), fontsize=9)
    axes = part.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return axes


def picture(args: argparse.Namespace, networks: dict[str, ViT], device: torch.device) -> None:
    blocks = {}
    for name, model in networks.items():
        quarters = sorted({math.ceil(i * len(model.blocks) / 4) for i in (1, 2, 3, 4)})
        blocks[name] = chosen_blocks(name, model, args.blocks, quarters, least=1)
    if args.images:
        if missing := [file for file in args.images if not Path(file).is_file()]:
            common.fail(f"--images {missing[0]}: no such file; mend the path")
        common.check_images(args.images)
        pictures = [read_image(file) for file in args.images]
    else:
        side = max(model.config["image_size"] for model in networks.values())
        pictures = list(common.draw_shapes([0, 1, 2], side, "val")[0])
    first = tuple(pictures[0].shape[1:]) if args.images else None
    sizes = input_sizes(networks, args.image_size, first)
    common.make_folder(args.out)

    widths = [1.25, *map(len, blocks.values())]  # of the columns, the images' first
    height, width = next(iter(sizes.values()))
    tall = (1.3 * height / width + 0.15) * 2 * len(pictures) + 0.7
    figure = plt.figure(figsize=(1.3 * sum(widths), tall), layout="constrained")
    parts = figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0]
    axes = blank_axes(parts[0], "image", 2 * len(pictures), 1)[:, 0]
    axes[0].set_title(" ", fontsize=8)
    for ax, image in zip(axes[::2], pictures):
        ax.imshow(rearrange(image, "colour row col -> row col colour"))
        ax.set_ylabel("tokens", fontsize=8)
    for ax in axes[1::2]:
        ax.set_ylabel("attention of\nclass token", fontsize=8)
    for part, (name, model) in zip(parts[1:], networks.items()):
        images = torch.stack([resized(image, sizes[name]) for image in pictures])
        model.to(device)
        draw_network(part, name, model, common.normalise(images.to(device)), blocks[name])
        model.cpu()
    common.save_figure(figure, args.out / "picture.png")
    print(args.out / "picture.png")


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------


def print_table(rows: list[list[str]]) -> None:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]
        print("  ".join(cells))


def write_record(args: argparse.Namespace, content: dict) -> None:
    """OUT/<command>.json: every number, and the flags that led to it."""
    path = args.out / f"{args.command}.json"
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "run"}
    text = json.dumps(dict(arguments=flags, torch=torch.__version__, **content), indent=1)
    common.write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"\n{path}")


def parse_arguments() -> argparse.Namespace:
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="networks, as RUN/last.pt")
    add(
        "--random-init",
        action="append",
        default=[],
        choices=list(RANDOM_INIT),
        help="a fresh nano network; may be given more than once",
    )
    size = "height and width, or one number for both, to which images are resized for the network"
    size += " [the first image's in whole patches; of drawn images the network's own]"
    add("--image-size", nargs="+", type=int, metavar="PX", help=size)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--seed", type=int, default=0, help="of the probe and of untrained networks [0]")
    add("--out", type=Path, default=Path("runs/dense"), help="folder of the results [runs/dense]")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", metavar="ROOT", help="folder described above [drawn images]")
    data.add_argument("--ignore", type=int, default=255, help="id of pixels not to count [255]")

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = p.add_subparsers(dest="command", required=True)
    parsers = {}
    for name, run, parents in (
        ("segment", segment, [shared, data]),
        ("discover", discover, [shared, data]),
        ("picture", picture, [shared]),
    ):
        parsers[name] = commands.add_parser(name, parents=parents, allow_abbrev=False)
        parsers[name].set_defaults(run=run)
    add = parsers["segment"].add_argument
    blocks = "blocks whose tokens are concatenated; 0 is the embedding [the last]"
    add("--blocks", nargs="+", type=int, metavar="B", help=blocks)
    add("--epochs", type=int, default=20, help="of the probe [20]")
    tau = "patches are joined where the cosine of their keys is above, -1 .. 1 [0.2]"
    parsers["discover"].add_argument("--tau", type=float, default=0.2, help=tau)
    add = parsers["picture"].add_argument
    add("--images", nargs="+", metavar="FILE", help="images to look at [three drawn ones]")
    add("--blocks", nargs="+", type=int, metavar="B", help="[four, evenly spaced]")
    for parser in (p, *parsers.values()):
        parser.error = common.fail  # one line, like every other mistake
    args = p.parse_args()
    if args.image_size and len(args.image_size) > 2:
        common.fail(f"--image-size takes one or two numbers, not {len(args.image_size)}")
    if getattr(args, "epochs", 1) < 1:
        common.fail(f"--epochs must be at least 1, not {args.epochs}")
    if not 0 <= args.seed < 2**32:
        common.fail(f"--seed must lie in 0 .. 2^32 - 1, not {args.seed}")
    if not -1 < getattr(args, "tau", 0) < 1:
        common.fail(f"--tau must lie between -1 and 1, not {args.tau}")
    return args


def main() -> None:
    args = parse_arguments()
    device, _, _ = common.start_processes(args.device)
    networks = load_networks(args, untrained=args.command != "picture")
    args.run(args, networks, device)


if __name__ == "__main__":
    with common.one_line_errors("make --image-size smaller"):
        main()
