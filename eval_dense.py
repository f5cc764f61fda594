"""What the frozen features of a ViT know about places in an image: three looks at its tokens.

segment   A linear probe on the tokens names the class of every pixel: mIoU, beside two baselines,
          the class met most often and the same network untrained.
discover  The object of an image, found without any training by cutting the graph of its patches
          in two (TokenCut): CorLoc, the share of images in which the object's box is found.
picture   The tokens' first three principal components as red, green and blue, and where the class
          token attends. spread: how far tokens are from their mean, over their norm; below 1e-3
          they are alike, colours would show rounding, and all is grey. peak: the largest share
          of attention over the mean one.

    python eval_dense.py segment RUN/last.pt
    python eval_dense.py segment RUN/last.pt --data ROOT --ignore 11 --blocks 3 6 9 12
    python eval_dense.py discover RUN/last.pt OTHER/last.pt
    python eval_dense.py picture RUN/last.pt OTHER/last.pt --images street.png
    python eval_dense.py picture --random-init residual --random-init skipless-paper

ROOT holds train/images/*, train/masks/<the image's stem>.png, and the same under test/ (or val/),
on which figures are reported. A mask is an image of one channel, its values class ids. `discover`
reads no train/, and takes true boxes from ROOT/boxes.tsv where there is one (a line each: file
relative to ROOT, x0, y0, x1, y1 in pixels, tab between them). Without --data images are synthetic
(`shapes.py`), of 120 px even for a network trained on smaller ones: the 4 x 4 patches of 32 px
show no outline. OUT gets segment.json, discover.json or picture.png. `COMMAND --help`: the flags.
"""

import argparse
import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.linalg import eigh
from scipy.ndimage import label as connected_components
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import cli
import files
import pictures
from cli import fail
from data import ORDER, check_images, mixed_seeds, normalise
from engine import lr_at, start_processes
from minskip import PRESETS, ViT
from networks import ARMS, fresh_arm, trained_vit, untrained_vit
from scenes import (
    Scenes,
    Size,
    boxes_around,
    count_classes,
    folder_scenes,
    read_image,
    synthetic_scenes,
    true_boxes,
)

BATCH_SIZE = 32
LEARNING_RATE = 3e-2  # of the probe: AdamW without decay; best of 3e-3, 1e-2, 3e-2 on a third split
SYNTHETIC = dict(train=(1_000, "train"), reported=(500, "val"), shown=(2, "val"))
SYNTHETIC_SIDE = 120  # pixels, at least
ALIKE = 1e-3  # spread below which tokens count as alike

# --------------------------------------------------------------------------------------------------
# What is read off a network; the class token, where there is one, is left out
# --------------------------------------------------------------------------------------------------


def token_maps(model: ViT, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """Patch tokens after each block, (batch, 3, H, W) -> list of (batch, dim, row, column).

    The final LayerNorm is applied whatever the block, as DINOv2's linear evaluation does: it was
    trained for the last block alone, but brings the others to like size too, without which
    skipless tokens may overflow float16.
    """
    rows, first = images.shape[-2] // model.config["patch_size"], model.cls_token is not None
    return [
        rearrange(model.norm(x)[:, first:], "batch (row col) dim -> batch dim row col", row=rows)
        for x in model.forward_features(images, blocks)
    ]


def last_keys(model: ViT, images: Tensor) -> Tensor:
    """Keys of the last block's attention, heads side by side: (batch, patch, dim)."""
    last, first = model.blocks[-1], model.cls_token is not None
    [x] = model.forward_features(images, [len(model.blocks) - 1])
    _, k, _ = last.attention.queries_keys_values(last.norm1(x))
    return rearrange(k[:, :, first:], "batch head patch dim -> batch patch (head dim)")


def class_attention(model: ViT, images: Tensor, block: int) -> Tensor:
    """What the class token attends to in a block, mean over heads: (batch, row, column).

    Sums to less than one: the rest goes to the class token itself.
    """
    [x] = model.forward_features(images, [block - 1])
    weights = model.blocks[block - 1].attention.weights(model.blocks[block - 1].norm1(x))
    rows = images.shape[-2] // model.config["patch_size"]
    return rearrange(weights[:, :, 0, 1:].mean(dim=1), "b (row col) -> b row col", row=rows)


# --------------------------------------------------------------------------------------------------
# First look: a linear probe
# --------------------------------------------------------------------------------------------------


def upsampled(logits: Tensor, size: Size) -> Tensor:
    """(batch, class, row, column) -> (batch, class, *size), bilinearly."""
    return F.interpolate(logits, size, mode="bilinear")


def train_probe(features: list[Tensor], masks: list[Tensor], classes: int, args) -> nn.Module:
    """A BatchNorm and a linear map, trained on the masks at their own resolution.

    features: (dim, row, column) an image. The probe maps (batch, dim, row, column) to (batch,
    class, row, column). The linear evaluation of DINOv2 (Oquab et al. 2023), with fewer steps.
    args: ignore, epochs, seed, device.
    """
    torch.manual_seed(args.seed)
    # momentum=None: the mean over all batches seen, which for frozen features is what is wanted
    norm = nn.BatchNorm2d(len(features[0]), momentum=None, affine=False)
    probe = nn.Sequential(norm, nn.Conv2d(len(features[0]), classes, 1)).to(args.device)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.0)
    batches = []
    for [seed] in (mixed_seeds(1, ORDER, args.seed, epoch) for epoch in range(args.epochs)):
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed))
        batches += order.split(BATCH_SIZE)
    for step, numbers in enumerate(tqdm(batches, "training the probe", disable=None, leave=False)):
        optimizer.param_groups[0]["lr"] = lr_at(step, len(batches), 0, LEARNING_RATE)
        tokens = torch.stack([features[i] for i in numbers]).to(args.device)
        loss, labelled = 0.0, 0
        for i, logits in zip(numbers, probe(tokens.float())):
            truth = masks[i].to(args.device).long()[None]
            logits = upsampled(logits[None], truth.shape[1:])
            ignored = dict(ignore_index=args.ignore, reduction="sum")
            loss = loss + F.cross_entropy(logits, truth, **ignored)
            labelled = labelled + (truth != args.ignore).sum()
        optimizer.zero_grad()
        (loss / labelled.clamp(min=1)).backward()
        optimizer.step()
    return probe.eval().requires_grad_(False)


def confusion(prediction: Tensor, truth: Tensor, classes: int, ignore: int) -> Tensor:
    """Counts of pixels, (true class, predicted class); pixels whose truth is `ignore` left out.

    prediction, truth: class ids of one shape, whatever it is.
    """
    truth, prediction = truth.long(), prediction.long()
    kept = truth != ignore
    pairs = truth[kept] * classes + prediction[kept]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def measure_probe(probe, features: list[Tensor], masks: list[Tensor], classes: int, args) -> Tensor:
    """Confusion matrix over all images, each judged at its mask's own resolution."""
    matrix = torch.zeros(classes, classes, dtype=torch.long)
    for feature, mask in zip(features, masks):
        logits = upsampled(probe(feature[None].to(args.device).float()), mask.shape)
        matrix += confusion(logits[0].argmax(dim=0).cpu(), mask, classes, args.ignore)
    return matrix


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


def majority(train: list[Tensor], reported: list[Tensor], classes: int, ignore: int):
    """(the class most frequent in the training masks, the scores of guessing it everywhere)."""
    best = int(sum(confusion(m, m, classes, ignore).diagonal() for m in train).argmax())
    guessed = (confusion(torch.full_like(m, best), m, classes, ignore) for m in reported)
    return best, scores(sum(guessed))


# --------------------------------------------------------------------------------------------------
# Second look: TokenCut
# --------------------------------------------------------------------------------------------------


def affinity(keys: Tensor, tau: float) -> np.ndarray:
    """(patch, dim) -> (patch, patch): 1 where the cosine of two keys exceeds tau, else 1e-5."""
    unit = F.normalize(keys.double(), dim=-1).cpu().numpy()
    return np.where(unit @ unit.T > tau, 1.0, 1e-5)


def fiedler_vector(W: np.ndarray) -> np.ndarray:
    """x with (D - W) x = lambda D x for the second smallest lambda; D the diagonal of W's row sums.

    W symmetric and positive, (node, node); x (node,). Normalised cuts (Shi and Malik 2000).
    """
    D = np.diag(W.sum(axis=1))
    return eigh(D - W, D, subset_by_index=[1, 1])[1][:, 0]


def foreground(x: np.ndarray) -> Tensor:
    """Of x, (row, column), cut in two at its mean: the side of the entry of largest absolute value,
    and of that side the connected part (4 neighbours) that holds this entry, as bool."""
    seed = np.abs(x).argmax()
    above = x > x.mean()
    parts, _ = connected_components(above == above.flat[seed])
    return torch.from_numpy(parts == parts.flat[seed])


def tokencut(keys: Tensor, rows: int, tau: float) -> Tensor:
    """The object among the patches of an image: keys (rows x columns, dim) -> bool (row, column).

    TokenCut (Wang et al., CVPR 2022). Where all keys are alike, as after a rank collapse, nothing
    tells the patches apart and the cut is arbitrary. The floor of 1e-5 makes the graph dense, so
    the dense solver is the right one: 784 patches take a tenth of a second and 15 MB.
    """
    if len(keys) < 2:
        return torch.ones(1, 1, dtype=torch.bool)  # nothing to cut
    return foreground(fiedler_vector(affinity(keys, tau)).reshape(rows, -1))


def judge(part: Tensor, boxes: Tensor, mask: Tensor | None, size: Size, ignore: int):
    """(found, mask IoU) of a predicted part (row, column) of an image of size (height, width).

    found: the best IoU of its box with a true one, boxes (box, 4), is at least 0.5. The mask IoU
    is that of the part, nearest-upsampled, and the pixels neither 0 nor ignored; None where there
    are none.
    """
    patch = torch.tensor(size[::-1]).double() / torch.tensor(part.shape[::-1])  # width, height
    found = bool(box_iou(boxes_around(part[None]) * patch.repeat(2), boxes).max() >= 0.5)
    if mask is None:
        return found, None
    up = F.interpolate(part[None, None].float(), size, mode="nearest")[0, 0] > 0
    kept, truth = mask.long() != ignore, mask.long() != 0
    if not (truth & kept).any():
        return found, None
    return found, float((up & truth & kept).sum() / ((up | truth) & kept).sum())


def summary(judged: list[tuple]) -> dict:
    """CorLoc and mean mask IoU (None without masks), in percent."""
    found, ious = zip(*judged)
    ious = [iou for iou in ious if iou is not None]
    mask_iou = 100 * sum(ious) / len(ious) if ious else None
    return dict(corloc=100 * sum(found) / len(found), mask_iou=mask_iou)


# --------------------------------------------------------------------------------------------------
# Third look: principal components
# --------------------------------------------------------------------------------------------------


def spread_of(tokens: Tensor) -> float:
    """Root mean square distance of (dim, row, column) from their mean, over their mean norm."""
    x = tokens.double().flatten(1)
    return float(x.std(dim=1, correction=0).norm() / x.norm(dim=0).mean())


def principal_colours(tokens: Tensor) -> Tensor:
    """The first three principal components as red, green, blue: (dim, row, col) -> (row, col, 3).

    Each is rescaled to 0 .. 1, which hides how much tokens differ at all: where they are alike
    all is grey. A component's sign is arbitrary: here the token farthest from the mean lies on
    the positive side.
    """
    rows, columns = tokens.shape[1:]
    if spread_of(tokens) < ALIKE:
        return torch.full((rows, columns, 3), 0.5)
    x = rearrange(tokens, "dim row col -> (row col) dim").double()
    U, S, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    components = F.pad(U * S, (0, max(0, 3 - len(S))))[:, :3]
    farthest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(farthest < 0, -1.0, 1.0)
    low, high = components.amin(dim=0), components.amax(dim=0)
    colours = (components - low) / (high - low).clamp(min=1e-12)
    return rearrange(colours, "(row col) colour -> row col colour", row=rows)


# --------------------------------------------------------------------------------------------------
# Networks and what they are shown
# --------------------------------------------------------------------------------------------------


def load_networks(args: argparse.Namespace) -> dict[str, ViT]:
    """Name -> frozen network. A checkpoint is named after its folder, or by its path where two
    folders have one name; but for pictures it is followed by itself before training."""
    if not (args.checkpoints or args.random_init):
        fail("no network given: name checkpoints (RUN/last.pt) or add --random-init ARM")
    models = {}
    folders = [Path(path).resolve().parent.name for path in args.checkpoints]
    for path, folder in zip(args.checkpoints, folders):
        checkpoint = files.load_checkpoint(path)
        name = folder if folders.count(folder) == 1 else path
        models[name] = trained_vit(checkpoint)
        if args.command != "picture":
            models[f"{name}, untrained"] = untrained_vit(checkpoint)
    for arm in args.random_init:
        torch.manual_seed(args.seed)
        shape = dict(image_size=32, patch_size=8, num_classes=0) | PRESETS["nano"]
        models[f"{arm}, random"] = fresh_arm(arm, **shape)
    return {k: model.eval().requires_grad_(False).to(args.device) for k, model in models.items()}


def chosen_blocks(args: argparse.Namespace, models: dict, default: Callable, least: int) -> dict:
    """Name -> the block numbers to look at, in least .. depth; default: depth -> numbers."""
    for name, model in models.items():
        depth = len(model.blocks)
        if bad := [b for b in args.blocks or [] if not least <= b <= depth]:
            fail(f"--blocks {bad[0]}: {name} has {depth} blocks; give numbers {least}..{depth}")
    return {name: args.blocks or default(len(model.blocks)) for name, model in models.items()}


def input_sizes(args: argparse.Namespace, models: dict, first: Size | None) -> dict[str, Size]:
    """Name -> (height, width) to which images are resized for the network: patches must tile it.

    As asked for; else, in whole patches, the size of the first image, or of synthetic images
    (first=None) the size the network was trained at, at least SYNTHETIC_SIDE.
    """
    sizes = {}
    for name, model in models.items():
        patch, side = model.config["patch_size"], model.config["image_size"]
        wanted = first or (max(side, SYNTHETIC_SIDE),)
        rounded = [max(1, math.floor(x / patch + 0.5)) * patch for x in wanted]
        height, width = sizes[name] = tuple((args.image_size or rounded)[i] for i in (0, -1))
        if height % patch or width % patch:
            fail(f"--image-size {height} {width}: give multiples of {name}'s patch, {patch}")
        if (height, width) != (side, side) and not name.endswith(", untrained"):
            line = f"{name}: images of {height} x {width}, trained at {side} x {side}: "
            say(line + "position embeddings interpolated")
    return sizes


def load_scenes(args: argparse.Namespace, models: dict[str, ViT], *splits: str):
    """(input sizes, the scenes of each split): of a folder "train", or "reported": test/, else
    val/; otherwise synthetic ones, drawn at the largest input size."""
    if args.data is None:
        sizes = input_sizes(args, models, None)
        side = max(map(max, sizes.values()))
        return sizes, *(synthetic_scenes(*SYNTHETIC[split], side) for split in splits)
    root = Path(args.data)
    need_masks = args.command == "segment" or not (root / "boxes.tsv").is_file()
    folders = dict(train="train", reported="test" if (root / "test").is_dir() else "val")
    scenes = [folder_scenes(root, folders[split], need_masks) for split in splits]
    return input_sizes(args, models, scenes[0].sizes[0]), *scenes


def network_inputs(scenes: Scenes, size: Size, device: torch.device, what: str):
    """(numbers, inputs (batch, 3, *size)) of all images in turn, with a progress bar."""
    resize = v2.Resize(size, InterpolationMode.BICUBIC)
    parts = torch.arange(len(scenes.names)).split(BATCH_SIZE)
    for part in tqdm(parts, what, disable=None, leave=False, unit=" batches"):
        images = torch.stack([resize(scenes.image(i)) for i in part.tolist()])
        yield part.tolist(), normalise(images.to(device))


# --------------------------------------------------------------------------------------------------
# The commands
# --------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(textwrap.fill(line, 100, subsequent_indent="   "))


def finish(args: argparse.Namespace, results: dict[str, dict], columns: dict, **facts) -> None:
    """A table of some columns (key -> title) of the results; all of it into OUT/COMMAND.json."""
    rows = [["network", *columns.values()]]
    for name, result in results.items():
        cells = (result[key] for key in columns)
        rows.append([name, *("-" if cell is None else f"{cell:.1f}" for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *cells in rows:
        print("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    path = args.out / f"{args.command}.json"
    record = dict(arguments=vars(args), torch=torch.__version__, **facts, results=results)
    text = json.dumps(record, indent=1, default=str)
    files.write_atomically(path, lambda temporary: temporary.write_text(text))
    print(path)


def extract(
    model: ViT, scenes: Scenes, size: Size, blocks: list[int], device: torch.device, what: str
) -> list[Tensor]:
    """Features of every image, (dim x blocks, row, column), float16 on the CPU."""
    features = []
    for numbers, images in network_inputs(scenes, size, device, what):
        features.extend(torch.cat(token_maps(model, images, blocks), dim=1).half().cpu())
        gigabytes = len(scenes.names) * features[0].nbytes / 1e9
        if numbers[0] == 0 and gigabytes > 1:
            print(f"{what}: {gigabytes:.1f} GB of features in memory")
    return features


def segment(args: argparse.Namespace, models: dict[str, ViT]) -> None:
    blocks = chosen_blocks(args, models, lambda depth: [depth], least=0)
    sizes, train, reported = load_scenes(args, models, "train", "reported")
    classes = count_classes(train, reported, args.ignore)
    files.make_folder(args.out)
    print(f"{len(train.names)} training, {len(reported.names)} reported images, {classes} classes")
    best, baseline = majority(train.masks, reported.masks, classes, args.ignore)
    results = {f"class {best} everywhere": baseline}
    for name, model in models.items():
        seen, unseen = (
            extract(model, scenes, sizes[name], blocks[name], args.device, f"{name}, {which}")
            for scenes, which in ((train, "training images"), (reported, "reported images"))
        )
        probe = train_probe(seen, train.masks, classes, args)
        matrix = measure_probe(probe, unseen, reported.masks, classes, args)
        results[name] = scores(matrix) | dict(blocks=blocks[name], size=sizes[name])
        results[name]["confusion"] = matrix.tolist()
    print("IoU of each class, % (id:IoU; - in neither truth nor prediction)")
    for name, r in results.items():
        texts = ("-" if x is None else f"{x:.1f}" for x in r["iou"])
        say(f"{name}   " + "  ".join(f"{id}:{text}" for id, text in enumerate(texts)))
    finish(args, results, dict(miou="mIoU, %", accuracy="pixel accuracy, %"), classes=classes)


def discover(args: argparse.Namespace, models: dict[str, ViT]) -> None:
    sizes, scenes = load_scenes(args, models, "reported")
    boxes = true_boxes(scenes, args.data, args.ignore)
    files.make_folder(args.out)
    counted = [i for i, b in enumerate(boxes) if len(b)]
    print(f"{len(counted)} of {len(scenes.names)} images have a true box")

    def judged(i: int, part: Tensor) -> tuple:
        mask = scenes.masks[i] if scenes.masks else None
        return judge(part, boxes[i], mask, scenes.sizes[i], args.ignore)

    whole = torch.ones(1, 1, dtype=torch.bool)
    results = {"the whole image": summary([judged(i, whole) for i in counted])}
    for name, model in models.items():
        rows, verdicts = sizes[name][0] // model.config["patch_size"], []
        for numbers, images in network_inputs(scenes, sizes[name], args.device, name):
            for i, keys in zip(numbers, last_keys(model, images)):
                if len(boxes[i]):
                    verdicts.append(judged(i, tokencut(keys, rows, args.tau)))
        results[name] = summary(verdicts) | dict(size=sizes[name])
    columns = dict(corloc="CorLoc, %", mask_iou="mask IoU, %")
    finish(args, results, columns, images=len(counted))


def draw_network(part, scenes: Scenes, model: ViT, inputs: Tensor, blocks: list[int]) -> None:
    """A row an image: the image, its tokens after each block, each block's class attention.

    part: the piece of the figure to draw on; inputs: the images as this network sees them.
    """
    axes = part.subplots(len(inputs), 1 + 2 * len(blocks), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    axes[0, 0].set_title("image")
    middle = dict(ha="center", va="center")
    for i, ax in enumerate(axes[:, 0]):
        ax.imshow(rearrange(scenes.image(i).numpy(), "colour row col -> row col colour"))
    for block, tokens, attention in zip(blocks, axes.T[1:], axes.T[1 + len(blocks) :]):
        tokens[0].set_title(f"tokens,\nblock {block}")
        for ax, x in zip(tokens, token_maps(model, inputs, [block])[0].cpu()):
            ax.imshow(principal_colours(x).numpy())
            ax.set_xlabel(f"spread {spread_of(x):.1g}")
            if spread_of(x) < ALIKE:
                ax.text(0.5, 0.5, "tokens\nalike", **middle, transform=ax.transAxes)
        attention[0].set_title(f"attention,\nblock {block}")
        if model.cls_token is None:
            for ax in attention:
                ax.text(0.5, 0.5, "no class\ntoken", **middle)
                ax.set_box_aspect(inputs.shape[2] / inputs.shape[3])
            continue
        for ax, share in zip(attention, class_attention(model, inputs, block).cpu()):
            ax.imshow(share.numpy(), vmin=0, cmap="magma")
            ax.set_xlabel(f"peak {float(share.max() / share.mean()):.1f}")


def picture(args: argparse.Namespace, models: dict[str, ViT]) -> None:
    def quarters(depth: int) -> list[int]:
        return sorted({math.ceil(i * depth / 4) for i in (1, 2, 3, 4)})

    blocks = chosen_blocks(args, models, quarters, least=1)
    if args.images:
        if missing := [file for file in args.images if not Path(file).is_file()]:
            fail(f"--images {missing[0]}: no such file; mend the path")
        check_images(args.images)
        shown = [read_image(file) for file in args.images]
        scenes = Scenes(args.images, shown.__getitem__, [tuple(x.shape[1:]) for x in shown], None)
        sizes = input_sizes(args, models, scenes.sizes[0])
    else:
        sizes, scenes = load_scenes(args, models, "shown")
    files.make_folder(args.out)
    cell, columns = 1.3, 1 + 2 * max(map(len, blocks.values()))  # inches
    tall = [0.8 + (0.25 + cell * h / w) * len(scenes.names) for h, w in sizes.values()]
    figure = plt.figure(figsize=(cell * columns, sum(tall)), layout="constrained")
    parts = figure.subfigures(len(models), 1, height_ratios=tall, squeeze=False)[:, 0]
    for part, (name, model) in zip(parts, models.items()):
        part.suptitle(name, color=pictures.colour_of(name, list(models)))
        inputs = [x for _, x in network_inputs(scenes, sizes[name], args.device, name)]
        draw_network(part, scenes, model, torch.cat(inputs), blocks[name])
    pictures.save_figure(figure, args.out / "picture.png")
    print(args.out / "picture.png")


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def cosine(text: str) -> float:
    return cli.checked(text, float, lambda x: -1 < x < 1, "lie between -1 and 1")


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    p.error = fail  # one line, like every other mistake
    commands = p.add_subparsers(dest="command", required=True)
    for name in ("segment", "discover", "picture"):
        parser = commands.add_parser(name, allow_abbrev=False)
        parser.error = fail
        parser.set_defaults(data=None)
        add = parser.add_argument
        add("checkpoints", nargs="*", metavar="CHECKPOINT", help="networks, as RUN/last.pt")
        random = "a fresh nano network; may be given more than once"
        add("--random-init", action="append", default=[], choices=ARMS, help=random)
        blocks = dict(
            segment="blocks whose tokens are concatenated; 0 is the embedding [the last]",
            picture="blocks to look at [four, evenly spaced]",
        )
        if name in blocks:
            add("--blocks", nargs="+", type=int, metavar="B", help=blocks[name])
        if name == "segment":
            add("--epochs", type=cli.count, default=20, help="of the probe [20]")
        if name == "discover":
            tau = "patches are joined where the cosine of their keys is above, -1 .. 1 [0.2]"
            add("--tau", type=cosine, default=0.2, help=tau)
        if name == "picture":
            add("--images", nargs="+", metavar="FILE", help="to look at [two synthetic ones]")
        else:
            add("--data", metavar="ROOT", help="folder described above [synthetic images]")
            add("--ignore", type=int, default=255, help="id of pixels not to count [255]")
        size = "height and width, or one number for both, to which images are resized for the "
        size += "network [the first image's in whole patches; of synthetic ones the network's own, "
        size += f"at least {SYNTHETIC_SIDE}]"
        add("--image-size", nargs="+", type=cli.count, metavar="PX", help=size)
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
        add("--seed", type=cli.count_or_0, default=0, help="of probe and random networks [0]")
        add("--out", type=Path, default=Path("runs/dense"), help="results' folder [runs/dense]")
    args = p.parse_args()
    if args.image_size and len(args.image_size) > 2:
        fail(f"--image-size takes one or two numbers, not {len(args.image_size)}")
    return args


def main() -> None:
    args = parse_arguments()
    args.device, _, _ = start_processes(args.device)
    command = dict(segment=segment, discover=discover, picture=picture)[args.command]
    command(args, load_networks(args))


if __name__ == "__main__":
    with cli.one_line_errors("make --image-size smaller"):
        main()
