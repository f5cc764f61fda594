"""What the frozen features of a ViT know about places in an image: three looks at its tokens.

segment   A linear probe on the tokens names the class of every pixel: mIoU, beside two baselines,
          the class met most often and the same network untrained.
discover  The object of an image, found without any training by cutting the graph of its patches
          in two (TokenCut): CorLoc, the share of images in which the object's box is found.
picture   The tokens' first three principal components as red, green and blue, and where the class
          token, where there is one, attends. spread: how far tokens are from their mean, over
          their norm; below 1e-3 they are alike, colours would show rounding, and all is grey.
          peak: the largest share of attention over the mean one.

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
from collections.abc import Iterable, Iterator
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

import cli
import files
import pictures
import scenes
from cli import fail
from data import ORDER, mixed_seeds, normalise
from engine import lr_at, progress, start_processes
from minskip import PRESETS, ViT
from networks import arm, fresh_arm, trained_vit, untrained_vit

BATCH_SIZE = 32
LEARNING_RATE = 3e-2  # of the probe: AdamW without decay; best of 3e-3, 1e-2, 3e-2 on a third split
SYNTHETIC = dict(train=(1_000, "train"), reported=(500, "val"), shown=(2, "val"))
SYNTHETIC_SIDE = 120  # pixels
ALIKE = 1e-3  # spread below which tokens count as alike

# --------------------------------------------------------------------------------------------------
# What is read off a network; the class token, where there is one, is left out
# --------------------------------------------------------------------------------------------------


def finite(x: Tensor) -> Tensor:
    """x; raises BadInput where it is not finite, which figures would not show."""
    if not x.isfinite().all():
        raise cli.BadInput("a network's tokens are not finite; use an earlier checkpoint of it")
    return x


def token_maps(model: ViT, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """Patch tokens after each block, (batch, 3, H, W) -> list of (batch, dim, row, column).

    The final LayerNorm is applied whatever the block, as DINOv2's linear evaluation does: it was
    trained for the last block alone, but brings the others to like size too, without which
    skipless tokens may overflow float16.
    """
    rows, first = images.shape[-2] // model.config["patch_size"], model.cls_token is not None
    return [
        rearrange(finite(model.norm(x))[:, first:], "b (row col) dim -> b dim row col", row=rows)
        for x in model.forward_features(images, blocks)
    ]


def last_keys(model: ViT, images: Tensor) -> Tensor:
    """Keys of the last block's attention, heads side by side: (batch, patch, dim)."""
    last, first = model.blocks[-1], model.cls_token is not None
    [x] = model.forward_features(images, [len(model.blocks) - 1])
    _, k, _ = last.attention.queries_keys_values(last.norm1(x))
    return rearrange(finite(k)[:, :, first:], "batch head patch dim -> batch patch (head dim)")


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


def train_probe(features: list[Tensor], masks: list[Tensor], classes: int, args) -> nn.Module:
    """A BatchNorm and a linear map, trained on the masks at their own resolution.

    features: (dim, row, column) an image. The probe maps (batch, dim, row, column) to (batch,
    class, row, column), which is upsampled bilinearly. The linear evaluation of DINOv2 (Oquab et
    al. 2023), with fewer steps. args: ignore, epochs, seed, device.
    """
    torch.manual_seed(args.seed)
    # momentum=None: the mean over all batches seen, which for frozen features is what is wanted
    norm = nn.BatchNorm2d(len(features[0]), momentum=None, affine=False)
    probe = nn.Sequential(norm, nn.Conv2d(len(features[0]), classes, 1)).to(args.device)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.0)
    batches = []
    for epoch in range(args.epochs):
        [seed] = mixed_seeds(1, ORDER, args.seed, epoch)
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed))
        batches += order.split(BATCH_SIZE)
    for step, numbers in enumerate(progress(batches, "training the probe")):
        optimizer.param_groups[0]["lr"] = lr_at(step, len(batches), 0, LEARNING_RATE)
        tokens = torch.stack([features[i] for i in numbers]).to(args.device)
        loss, labelled = 0.0, 0
        for i, logits in zip(numbers, probe(tokens.float())):
            truth = masks[i].to(args.device).long()[None]
            logits = F.interpolate(logits[None], truth.shape[1:], mode="bilinear")
            loss = loss + F.cross_entropy(logits, truth, ignore_index=args.ignore, reduction="sum")
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
        logits = probe(feature[None].to(args.device).float())
        logits = F.interpolate(logits, mask.shape, mode="bilinear")
        matrix += confusion(logits[0].argmax(dim=0).cpu(), mask, classes, args.ignore)
    return matrix


def scores(matrix: Tensor) -> dict:
    """mIoU, pixel accuracy and per-class IoU, in percent, of a (true, predicted) matrix of counts.

    IoU = both / (true or predicted); None, and not in the mean, where a class is neither.
    """
    matrix = matrix.double()
    both = matrix.diagonal()
    iou = 100 * both / (matrix.sum(0) + matrix.sum(1) - both)  # nan: neither
    known = [None if math.isnan(x) else x for x in iou.tolist()]
    accuracy = 100 * both.sum() / matrix.sum()
    return dict(miou=iou.nanmean().item(), accuracy=accuracy.item(), iou=known)


def majority(train: list[Tensor], reported: list[Tensor], classes: int, ignore: int) -> tuple:
    """(the class most frequent in the training masks, the scores of guessing it everywhere)."""
    best = int(sum(confusion(m, m, classes, ignore).diagonal() for m in train).argmax())
    guessed = (confusion(torch.full_like(m, best), m, classes, ignore) for m in reported)
    return best, scores(sum(guessed))


# --------------------------------------------------------------------------------------------------
# Second look: TokenCut
# --------------------------------------------------------------------------------------------------


def fiedler_vector(keys: Tensor, tau: float) -> np.ndarray:
    """Keys (patch, dim) -> x (patch,): what normalised cuts (Shi and Malik 2000) cut a graph by.

    W joins two patches by 1 where the cosine of their keys exceeds tau, else by 1e-5; D is the
    diagonal of its row sums: (D - W) x = lambda D x for the second smallest lambda.
    """
    unit = F.normalize(keys.double(), dim=-1).cpu().numpy()
    W = np.where(unit @ unit.T > tau, 1.0, 1e-5)
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
    return foreground(fiedler_vector(keys, tau).reshape(rows, -1))


def corloc(parts: Iterable[Tensor], boxes: list[Tensor], sizes: list[scenes.Size]) -> float:
    """Percent of the images with a true box in which it is found.

    parts, (row, column) an image, are the predictions. One is right if its box has an IoU of 0.5
    or more with any of the image's true ones, boxes (box, 4). sizes: (height, width) of an image.
    """
    found = []
    for part, true, size in zip(parts, boxes, sizes):
        if len(true):
            patch = torch.tensor(size).double() / torch.tensor(part.shape)  # height, width
            box = scenes.boxes_around(part[None]) * patch.flip(0).repeat(2)
            found.append(float(box_iou(box, true).max() >= 0.5))
    return 100 * sum(found) / len(found)


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
        raise UserError("no network given: name checkpoints (RUN/last.pt) or add --random-init ARM")
    models = {}
    folders = [Path(path).resolve().parent.name for path in args.checkpoints]
    for path, folder in zip(args.checkpoints, folders):
        checkpoint = files.load_checkpoint(path)
        name = folder if folders.count(folder) == 1 else path
        models[name] = trained_vit(checkpoint)
        if args.command != "picture":
            models[f"{name}, untrained"] = untrained_vit(checkpoint)
    for name in args.random_init:
        torch.manual_seed(args.seed)
        shape = dict(image_size=32, patch_size=8, num_classes=0) | PRESETS["nano"]
        models[f"{name}, random"] = fresh_arm(name, **shape)
    return {k: model.eval().requires_grad_(False).to(args.device) for k, model in models.items()}


def chosen_blocks(args: argparse.Namespace, models: dict, parts: int, least: int) -> dict:
    """Name -> the block numbers to look at, in least .. depth; of a network cut into so many
    equal parts each part's last, if none are asked for."""
    chosen = {}
    for name, model in models.items():
        depth = len(model.blocks)
        ends = {math.ceil(i * depth / parts) for i in range(1, parts + 1)}
        chosen[name] = args.blocks or sorted(ends)
        if bad := [b for b in chosen[name] if not least <= b <= depth]:
            raise UserError(
                f"--blocks {bad[0]}: {name} has {depth} blocks; give numbers {least}..{depth}"
            )
    return chosen


def load_scenes(args: argparse.Namespace, *splits: str) -> list[scenes.Scenes]:
    """The splits asked for: of a folder "train", or "reported": test/, else val/."""
    if args.images:
        return [scenes.image_files([Path(file) for file in args.images])]
    if args.data is None:
        side = max(args.image_size or [SYNTHETIC_SIDE])
        return [scenes.synthetic_scenes(*SYNTHETIC[split], side) for split in splits]
    root = Path(args.data)
    with_masks = args.command == "segment" or not (root / "boxes.tsv").is_file()
    folders = dict(train="train", reported=scenes.reported_split(root))
    return [scenes.folder_scenes(root, folders[split], with_masks) for split in splits]


def input_sizes(args: argparse.Namespace, models: dict[str, ViT], first: scenes.Size) -> dict:
    """Name -> (height, width) to which images are resized for the network, in whole patches: as
    asked for, else the first image's, rounded up."""
    sizes = {}
    for name, model in models.items():
        patch = model.config["patch_size"]
        height, width = args.image_size or (math.ceil(x / patch) * patch for x in first)
        if height % patch or width % patch:
            raise UserError(
                f"--image-size {height} {width}: give multiples of {name}'s patch, {patch}"
            )
        if height * width == patch**2:
            raise UserError(f"--image-size {height} {width} is one patch of {name}; give more")
        sizes[name], side = (height, width), model.config["image_size"]
        if (height, width) != (side, side) and not name.endswith(", untrained"):
            print(f"{name}: position embedding interpolated from {side} px to {height} x {width}")
    return sizes


def network_inputs(split: scenes.Scenes, size: scenes.Size, device, what: str) -> Iterator[Tensor]:
    """All images of a split in turn, as (batch, 3, *size), with a progress bar."""
    resize = v2.Resize(size, InterpolationMode.BICUBIC)
    for part in progress(torch.arange(len(split.names)).split(BATCH_SIZE), what, unit=" batches"):
        images = torch.stack([resize(split.image(i)) for i in part.tolist()])
        yield normalise(images.to(device))


def features_of(model: ViT, inputs: Iterable[Tensor], blocks: list[int]) -> list[Tensor]:
    """(dim x blocks, row, column) an image, on the CPU, in float16: many take gigabytes."""
    maps = (torch.cat(token_maps(model, images, blocks), dim=1) for images in inputs)
    return [features for batch in maps for features in batch.half().cpu()]


# --------------------------------------------------------------------------------------------------
# The commands and their flags
# --------------------------------------------------------------------------------------------------


def finish(args: argparse.Namespace, results: dict[str, dict], columns: dict, **facts) -> None:
    """A table of some columns (key -> title) of the results; all of it into OUT/COMMAND.json."""
    path = args.out / f"{args.command}.json"
    record = dict(arguments=vars(args), torch=torch.__version__, **facts, results=results)
    text = json.dumps(record, indent=1, default=str)
    files.write_atomically(path, lambda temporary: temporary.write_text(text))
    width = max(map(len, results))
    print(" " * width, *columns.values(), sep="  ")
    for name, result in results.items():
        cells = (f"{result[key]:{len(title)}.1f}" for key, title in columns.items())
        print(name.ljust(width), *cells, sep="  ")
    print(path)


def segment(args: argparse.Namespace, models: dict[str, ViT]) -> None:
    blocks = chosen_blocks(args, models, parts=1, least=0)
    train, reported = load_scenes(args, "train", "reported")
    sizes = input_sizes(args, models, train.sizes[0])
    classes = scenes.count_classes(train, reported, args.ignore)
    files.make_folder(args.out)
    print(f"{len(train.names)} training, {len(reported.names)} reported images, {classes} classes")
    best, baseline = majority(train.masks, reported.masks, classes, args.ignore)
    results = {f"class {best} everywhere": baseline}
    for name, model in models.items():
        seen, unseen = (
            features_of(model, network_inputs(x, sizes[name], args.device, name), blocks[name])
            for x in (train, reported)
        )
        probe = train_probe(seen, train.masks, classes, args)
        matrix = measure_probe(probe, unseen, reported.masks, classes, args)
        results[name] = scores(matrix) | dict(blocks=blocks[name], size=sizes[name])
        results[name]["confusion"] = matrix.tolist()
    finish(args, results, dict(miou="mIoU, %", accuracy="pixel accuracy, %"), classes=classes)


def discover(args: argparse.Namespace, models: dict[str, ViT]) -> None:
    [reported] = load_scenes(args, "reported")
    sizes = input_sizes(args, models, reported.sizes[0])
    boxes = scenes.true_boxes(reported, args.data, args.ignore)
    files.make_folder(args.out)
    counted = sum(len(b) > 0 for b in boxes)
    print(f"{counted} of {len(boxes)} images have a true box")
    whole = [torch.ones(1, 1, dtype=torch.bool)] * len(boxes)
    results = {"the whole image": dict(corloc=corloc(whole, boxes, reported.sizes))}
    for name, model in models.items():
        rows = sizes[name][0] // model.config["patch_size"]
        parts = (
            tokencut(keys, rows, args.tau)
            for images in network_inputs(reported, sizes[name], args.device, name)
            for keys in last_keys(model, images)
        )
        results[name] = dict(corloc=corloc(parts, boxes, reported.sizes), size=sizes[name])
    finish(args, results, dict(corloc="CorLoc, %"), images=counted)


def columns_of(model: ViT, inputs: Tensor, blocks: list[int]) -> list[tuple]:
    """(title, pictures, captions) of each column of the figure: tokens after each block, then each
    block's class attention, where there is a class token. inputs: (picture, 3, height, width)."""
    tokens, attention = [], []
    for block, maps in zip(blocks, token_maps(model, inputs, blocks)):
        colours = [principal_colours(x).numpy() for x in maps.cpu()]
        spreads = map(spread_of, maps.cpu())
        captions = [f"{'alike' if x < ALIKE else 'spread'} {x:.1g}" for x in spreads]
        tokens.append((f"tokens,\nblock {block}", colours, captions))
        if model.cls_token is not None:
            shares = class_attention(model, inputs, block).cpu().numpy()
            captions = [f"peak {x.max() / x.mean():.1f}" for x in shares]
            attention.append((f"attention,\nblock {block}", shares, captions))
    return tokens + attention


def picture(args: argparse.Namespace, models: dict[str, ViT]) -> None:
    """For each network a row an image: the image itself, then `columns_of`."""
    blocks = chosen_blocks(args, models, parts=4, least=1)
    [shown] = load_scenes(args, "shown")
    sizes = input_sizes(args, models, shown.sizes[0])
    files.make_folder(args.out)
    images = [shown.image(i).permute(1, 2, 0).numpy() for i in range(len(shown.names))]
    cell, columns = 1.3, 1 + 2 * max(map(len, blocks.values()))  # inches
    height, width = next(iter(sizes.values()))
    tall = 0.8 + (0.25 + cell * height / width) * len(images)
    figure = plt.figure(figsize=(cell * columns, tall * len(models)), layout="constrained")
    parts = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for part, (name, model) in zip(parts, models.items()):
        part.suptitle(name, color=pictures.colour_of(name, list(models)))
        axes = part.subplots(len(images), columns, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        inputs = torch.cat(list(network_inputs(shown, sizes[name], args.device, name)))
        looks = [("image", images, [""] * len(images)), *columns_of(model, inputs, blocks[name])]
        for column, (title, panels, captions) in zip(axes.T, looks):
            captions[0] = f"{title}\n{captions[0]}"
            for ax, panel, caption in zip(column, panels, captions):
                ax.imshow(panel, vmin=0, cmap="magma")  # which a panel in colours ignores
                ax.set_title(caption, fontsize=10)
    pictures.save_figure(figure, args.out / "picture.png")
    print(args.out / "picture.png")


def cosine(text: str) -> float:
    return cli.checked(text, float, lambda x: -1 < x < 1, "lie between -1 and 1")


def parse_arguments() -> argparse.Namespace:
    p = cli.Parser(__doc__)
    p.set_defaults(data=None, images=None)  # where a command has no such flag
    commands = p.add_subparsers(dest="command", required=True)
    for name in ("segment", "discover", "picture"):
        add = commands.add_parser(name).add_argument
        add("checkpoints", nargs="*", metavar="CHECKPOINT", help="networks, as RUN/last.pt")
        add("--random-init", action="append", default=[], type=arm, help="a fresh nano network")
        if name == "segment":
            blocks = "blocks whose tokens are concatenated; 0 is the embedding [the last]"
            add("--blocks", nargs="+", type=int, metavar="B", help=blocks)
            add("--epochs", type=cli.count, default=20, help="of the probe [20]")
        if name == "discover":
            add("--tau", type=cosine, default=0.2, help="cosine above which patches join [0.2]")
        if name == "picture":
            blocks = "blocks to look at [four, evenly spaced]"
            add("--blocks", nargs="+", type=int, metavar="B", help=blocks)
            add("--images", nargs="+", metavar="FILE", help="to look at [two synthetic ones]")
        else:
            add("--data", metavar="ROOT", help="folder described above [synthetic images]")
            add("--ignore", type=int, default=255, help="id of pixels not to count [255]")
        size = "height and width, or one number for both, that images are resized to [the first "
        size += f"image's, in whole patches; synthetic ones are of {SYNTHETIC_SIDE} px]"
        add("--image-size", nargs="+", type=cli.count, metavar="PX", help=size)
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
        add("--seed", type=cli.count_or_0, default=0, help="of probe and random networks [0]")
        add(
            "--out", type=cli.place, default=Path("runs/dense"), help="results' folder [runs/dense]"
        )
    args = p.parse_args()
    if args.image_size:
        if len(args.image_size) > 2:
            raise UserError(f"--image-size takes one or two numbers, not {len(args.image_size)}")
        args.image_size = args.image_size[0], args.image_size[-1]
    return args


def main() -> None:
    args = parse_arguments()
    args.device, _, _ = start_processes(args.device)
    command = dict(segment=segment, discover=discover, picture=picture)[args.command]
    command(args, load_networks(args))


if __name__ == "__main__":
    with cli.one_line_errors("make --image-size smaller"):
        main()
