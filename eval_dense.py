"""Three looks at what the frozen tokens of a Vision Transformer know about an image.

segment   A linear probe on the tokens predicts the class of every pixel. Reports mIoU, beside two
          baselines: the most frequent class everywhere, and a probe on the untrained network.
discover  TokenCut finds the object in an image without any training, by cutting the graph of its
          patches in two. Reports CorLoc, the percentage of images in which its box is found; of
          --images, which have no true boxes, it draws the cut instead.
picture   Shows the tokens' first three principal components as red, green and blue, and where the
          class token attends, if there is one. spread: the distance of the tokens from their mean,
          relative to their norm; below 1e-3 they are alike, and the panel is grey, because its
          colours would show rounding errors. peak: the largest attention weight over the mean.

    python eval_dense.py segment RUN/last.pt
    python eval_dense.py segment RUN/last.pt --data ROOT --ignore 11 --blocks 3 6 9 12
    python eval_dense.py discover RUN/last.pt OTHER/last.pt
    python eval_dense.py discover RUN/last.pt --images dog.jpg --image-size 224
    python eval_dense.py picture RUN/last.pt OTHER/last.pt --images street.png
    python eval_dense.py picture --random-init residual --random-init skipless-paper

ROOT holds train/images/*, train/masks/<the image's stem>.png, and the same under test/ (or val/),
which the figures are reported on. A mask is an image with one channel, whose values are class ids.
`discover` does not read train/; it takes the true boxes from ROOT/boxes.tsv, if there is one, with
one line per box: file relative to ROOT, x0, y0, x1, y1 in pixels, separated by tabs. Without --data
the images are synthetic. OUT gets COMMAND.json, cut.png or picture.png. `COMMAND --help` lists the
flags.
"""

import json
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.linalg import eigh
from scipy.ndimage import label as connected_components
from torch import Tensor, nn
from torchvision.ops import box_iou
from torchvision.transforms import InterpolationMode, v2

from beyond.arms import ARM, fresh_arm, trained_vit, untrained_vit
from minskip import PRESETS, ViT
from support import pictures, scenes
from support.data import ORDER, mixed_seeds, normalise
from support.errors import UserError, errors_in_one_line
from support.files import load_checkpoint, make_folder, write_atomically
from support.flags import COUNT, COUNT_OR_0, FRACTION, PATH, SEED, Parser
from support.processes import progress, start_processes

BATCH_SIZE = 32
LEARNING_RATE = 3e-2  # of the probe: AdamW without decay; best of 3e-3, 1e-2, 3e-2 on a third split
SYNTHETIC_SIDE = 120  # pixels, even for a network trained on 32: its 4 x 4 patches show no outline
ALIKE = 1e-3  # spread below which tokens count as alike

# --------------------------------------------------------------------------------------------------
# Networks, images, results
# --------------------------------------------------------------------------------------------------


def load_networks(args: Namespace) -> dict[str, ViT]:
    """Name -> frozen network. A checkpoint is named after its folder, or by its path if two folders
    have the same name. It is followed by its untrained network, except for pictures."""
    if not (args.checkpoints or args.random_init):
        raise UserError("no network given: name checkpoints (RUN/last.pt) or add --random-init ARM")
    models = {}
    folders = [Path(path).resolve().parent.name for path in args.checkpoints]
    for path, folder in zip(args.checkpoints, folders):
        checkpoint = load_checkpoint(path)
        name = folder if folders.count(folder) == 1 else path
        models[name] = trained_vit(checkpoint)
        if args.command != "picture":
            models[f"{name}, untrained"] = untrained_vit(checkpoint)
    for arm in args.random_init:
        torch.manual_seed(args.seed)
        shape = dict(image_size=32, patch_size=8, num_classes=0) | PRESETS["nano"]
        models[f"{arm}, random"] = fresh_arm(arm, **shape)
    for name, model in models.items():
        if max(args.blocks or [0]) > len(model.blocks):
            raise UserError(f"--blocks {max(args.blocks)}: {name} has only {len(model.blocks)}")
        model.eval().requires_grad_(False).to(args.device)
    return models


def load_images(args: Namespace, split: str, drawn: int) -> scenes.Scenes:
    """split: "train" or "val" (ROOT/test, if there is one). drawn: how many, if synthetic."""
    if args.data is None:
        return scenes.synthetic_scenes(drawn, split, max(args.image_size or [SYNTHETIC_SIDE]))
    split = "test" if split == "val" and (args.data / "test").is_dir() else split
    boxes_replace_masks = args.command == "discover" and (args.data / "boxes.tsv").is_file()
    return scenes.folder_scenes(args.data, split, with_masks=not boxes_replace_masks)


def input_size(args: Namespace, models: dict[str, ViT], first: scenes.Size) -> scenes.Size:
    """The (height, width) that images are resized to: --image-size, or else the size of the first
    image, rounded up to whole patches of every network."""
    whole = math.lcm(*(model.config["patch_size"] for model in models.values()))
    height, width = args.image_size or (math.ceil(x / whole) * whole for x in first)
    for name, model in models.items():
        patch, side = model.config["patch_size"], model.config["image_size"]
        if height % patch or width % patch or height * width < 4 * patch**2:
            rule = f"use multiples of {patch}, the patch size of {name}, and at least four patches"
            raise UserError(f"--image-size {height} {width}: {rule}")
        if (height, width) != (side, side) and not name.endswith(", untrained"):
            print(f"{name}: position embedding interpolated from {side} px to {height} x {width}")
    return height, width


def network_inputs(images: scenes.Scenes, size: scenes.Size, device, title: str) -> Iterator:
    """The images in order, in batches of (batch, 3, *size), under a progress bar."""
    resize = v2.Resize(size, InterpolationMode.BICUBIC)
    numbers = torch.arange(len(images.names)).split(BATCH_SIZE)
    for batch in progress(numbers, title, unit=" batches"):
        pixels = torch.stack([resize(images.image(i)) for i in batch.tolist()])
        yield normalise(pixels.to(device))


def write_results(args: Namespace, results: dict, figures: list[str], **facts) -> None:
    """Write OUT/COMMAND.json, and print these figures of each result, in percent."""
    path = args.out / f"{args.command}.json"
    record = dict(arguments=vars(args), torch=torch.__version__, **facts, results=results)
    text = json.dumps(record, indent=1, default=str)
    write_atomically(path, lambda temporary: temporary.write_text(text))
    for name, result in results.items():
        values = (f"{figure} {result[figure]:5.1f} %" for figure in figures)
        print(name.ljust(max(map(len, results))), *values, sep="  ")
    print(path)


# --------------------------------------------------------------------------------------------------
# segment: a linear probe
# --------------------------------------------------------------------------------------------------


def token_maps(model: ViT, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """Patch tokens after each of the blocks: (batch, 3, H, W) -> [(batch, dim, row, column)].

    The final LayerNorm is applied after every block, as in DINOv2's linear evaluation. It was
    trained for the last block only, but it also brings the tokens of the others to a similar size;
    without it those of a skipless network may overflow float16.
    """
    rows, first = images.shape[-2] // model.config["patch_size"], model.cls_token is not None
    return [
        rearrange(model.norm(x)[:, first:], "b (row col) dim -> b dim row col", row=rows)
        for x in model.forward_features(images, blocks)
    ]


def features_of(model: ViT, inputs: Iterable[Tensor], blocks: list[int]) -> list[Tensor]:
    """The blocks' tokens, concatenated: (block x dim, row, column) per image. On the CPU and in
    float16, because those of many images take gigabytes."""
    maps = (torch.cat(token_maps(model, images, blocks), dim=1) for images in inputs)
    return [features for batch in maps for features in batch.half().cpu()]


def train_probe(features: list[Tensor], masks: list[Tensor], classes: int, args) -> nn.Module:
    """Train a BatchNorm and a linear map to predict each mask, at the mask's own resolution.

    This is the linear evaluation of DINOv2 (Oquab et al. 2023), with fewer steps. The probe maps
    features (batch, dim, row, column) to logits (batch, class, row, column), which are upsampled
    bilinearly. features: (dim, row, column) per image. args: ignore, epochs, seed, device.
    """
    torch.manual_seed(args.seed)
    # momentum=None averages over all batches, which is right for features that do not change
    norm = nn.BatchNorm2d(len(features[0]), momentum=None, affine=False)
    probe = nn.Sequential(norm, nn.Conv2d(len(features[0]), classes, 1)).to(args.device)
    optimizer = torch.optim.AdamW(probe.parameters(), weight_decay=0.0)
    batches = []
    for epoch in range(args.epochs):
        [seed] = mixed_seeds(1, ORDER, args.seed, epoch)
        order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(seed))
        batches += order.split(BATCH_SIZE)
    for step, batch in enumerate(progress(batches, "training the probe")):
        half_cosine = (1 + math.cos(math.pi * (step / len(batches)))) / 2
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * half_cosine
        tokens = torch.stack([features[i] for i in batch]).to(args.device)
        loss, labelled = 0.0, 0
        for i, logits in zip(batch, probe(tokens.float())):  # one by one: masks differ in size
            truth = masks[i].to(args.device).long()[None]
            logits = F.interpolate(logits[None], truth.shape[1:], mode="bilinear")
            loss = loss + F.cross_entropy(logits, truth, ignore_index=args.ignore, reduction="sum")
            labelled = labelled + (truth != args.ignore).sum()
        optimizer.zero_grad()
        (loss / labelled.clamp(min=1)).backward()
        optimizer.step()
    return probe.eval().requires_grad_(False)


def predictions(probe: nn.Module, features, masks, device: torch.device) -> Iterator[Tensor]:
    """The most probable class of every pixel, at the resolution of the image's mask."""
    for tokens, mask in zip(features, masks):
        logits = probe(tokens[None].to(device).float())
        yield F.interpolate(logits, mask.shape, mode="bilinear")[0].argmax(dim=0).cpu()


def scores(predicted: Iterable, masks: list[Tensor], classes: int, ignore: int) -> dict:
    """mIoU, pixel accuracy and the IoU of each class, in percent, and what they are computed from:
    the number of pixels per (true class, predicted class), without those whose truth is `ignore`.

    IoU = (true and predicted) / (true or predicted); None, and not in the mean, if that is 0 / 0.
    """
    matrix = torch.zeros(classes, classes, dtype=torch.long)
    for prediction, truth in zip(predicted, masks):
        truth, prediction = truth.long(), prediction.long()  # uint8 would overflow
        pairs = (truth * classes + prediction)[truth != ignore]
        matrix += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    both, either = matrix.diagonal().double(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
    iou, accuracy = 100 * both / either, 100 * both.sum() / matrix.sum()
    known = [None if math.isnan(x) else x for x in iou.tolist()]
    figures = dict(miou=iou.nanmean().item(), accuracy=accuracy.item(), iou=known)
    return figures | dict(confusion=matrix.tolist())


def segment(args: Namespace, models: dict[str, ViT]) -> None:
    train, reported = load_images(args, "train", 1000), load_images(args, "val", 500)
    size = input_size(args, models, train.sizes[0])
    classes = scenes.count_classes(train, reported, args.ignore)
    make_folder(args.out)
    print(f"{len(train.names)} training, {len(reported.names)} reported images, {classes} classes")
    labelled = (mask[mask.long() != args.ignore] for mask in train.masks)
    best = sum(torch.bincount(ids, minlength=classes) for ids in labelled).argmax()
    guesses = (best.expand(mask.shape) for mask in reported.masks)
    results = {f"class {best} everywhere": scores(guesses, reported.masks, classes, args.ignore)}
    for name, model in models.items():
        blocks = args.blocks or [len(model.blocks)]
        inputs = (network_inputs(images, size, args.device, name) for images in (train, reported))
        seen, unseen = (features_of(model, x, blocks) for x in inputs)
        probe = train_probe(seen, train.masks, classes, args)
        guesses = predictions(probe, unseen, reported.masks, args.device)
        results[name] = scores(guesses, reported.masks, classes, args.ignore) | dict(blocks=blocks)
    write_results(args, results, ["miou", "accuracy"], classes=classes, size=size)


# --------------------------------------------------------------------------------------------------
# discover: TokenCut (Wang et al., CVPR 2022)
# --------------------------------------------------------------------------------------------------


def last_keys(model: ViT, images: Tensor) -> Tensor:
    """The patches' keys in the last block, heads concatenated: (batch, patch, dim)."""
    last, first = model.blocks[-1], model.cls_token is not None
    [x] = model.forward_features(images, [len(model.blocks) - 1])
    _, k, _ = last.attention.queries_keys_values(last.norm1(x))
    return rearrange(k[:, :, first:], "batch head patch dim -> batch patch (head dim)")


def tokencut(keys: Tensor, rows: int, tau: float) -> Tensor:
    """The object among the patches of an image: keys (row x column, dim) -> bool (row, column).

    W_ij = 1 if cos(key_i, key_j) > tau, else 1e-5       D = diag(row sums of W)
    (D - W) x = lambda D x, for the second smallest lambda

    Normalised cuts (Shi and Malik 2000) cut the graph W in two by x, here at its mean. The object
    is on the side of the largest |x|: the patches connected to it there, with 4 neighbours each.
    If all keys are alike, as after a rank collapse, the cut is arbitrary.
    """
    unit = F.normalize(keys.double(), dim=-1).cpu().numpy()
    W = np.where(unit @ unit.T > tau, 1.0, 1e-5)
    D = np.diag(W.sum(axis=1))
    x = eigh(D - W, D, subset_by_index=[1, 1])[1].reshape(rows, -1)  # W is dense: so is the solver
    seed, above = np.abs(x).argmax(), x > x.mean()
    components, _ = connected_components(above == above.flat[seed])
    return torch.from_numpy(components == components.flat[seed])


def box_of(object: Tensor, size: scenes.Size) -> Tensor:
    """The box around an object of patches (row, column), in the pixels of its image: (1, 4)."""
    patch = torch.tensor(size).double() / torch.tensor(object.shape)  # height, width
    return scenes.boxes_around(object[None]) * patch.flip(0).repeat(2)


def corloc(objects: Iterable[Tensor], boxes: list[Tensor], sizes: list[scenes.Size]) -> float:
    """Percentage of the images with true boxes in which the box around the predicted object has an
    IoU of at least 0.5 with any true box. Per image: objects (row, column) bool, boxes (box, 4),
    sizes (height, width) in pixels."""
    found = []
    for predicted, true, size in zip(objects, boxes, sizes):
        if len(true):
            found.append(float(box_iou(box_of(predicted, size), true).max() >= 0.5))
    return 100 * sum(found) / len(found)


def objects_in(images: scenes.Scenes, name: str, model: ViT, size, args) -> Iterator[Tensor]:
    """`tokencut` of each image."""
    for inputs in network_inputs(images, size, args.device, name):
        for keys in last_keys(model, inputs):
            yield tokencut(keys, size[0] // model.config["patch_size"], args.tau)


def draw_cuts(args: Namespace, models: dict[str, ViT]) -> None:
    """For each network one row of --images, dark outside the object, with the box around it."""
    pictured = scenes.image_files(args.images)
    size = input_size(args, models, pictured.sizes[0])
    make_folder(args.out)
    inches = 2.4 * len(args.images), (0.3 + 2.4 * size[0] / size[1]) * len(models)
    options = dict(figsize=inches, layout="constrained", squeeze=False)
    figure, axes = pictures.plt.subplots(len(models), len(args.images), **options)
    for row, (name, model) in zip(axes, models.items()):
        row[0].set_title(name, loc="left", fontsize=10)
        for i, object in enumerate(objects_in(pictured, name, model, size, args)):
            inside = F.interpolate(object[None, None].double(), pictured.sizes[i])[0]
            pixels = pictured.image(i) / 255 * (0.3 + 0.7 * inside)
            row[i].imshow(rearrange(pixels, "colour row col -> row col colour").numpy())
            # imshow puts the centre of the first pixel at 0, so its corner is at -0.5
            x0, y0, x1, y1 = (box_of(object, pictured.sizes[i])[0] - 0.5).tolist()
            box = pictures.plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="#e69f00")
            row[i].add_patch(box)
            row[i].set_axis_off()
    pictures.save_figure(figure, args.out / "cut.png")
    print(args.out / "cut.png")


def discover(args: Namespace, models: dict[str, ViT]) -> None:
    if args.images:
        return draw_cuts(args, models)
    reported = load_images(args, "val", 500)
    size = input_size(args, models, reported.sizes[0])
    boxes = scenes.true_boxes(reported, args.data, args.ignore)
    make_folder(args.out)
    with_box = sum(len(b) > 0 for b in boxes)
    print(f"{with_box} of {len(boxes)} images have a true box")
    whole = [torch.ones(1, 1, dtype=torch.bool)] * len(boxes)
    results = {"the whole image": dict(corloc=corloc(whole, boxes, reported.sizes))}
    for name, model in models.items():
        objects = objects_in(reported, name, model, size, args)
        results[name] = dict(corloc=corloc(objects, boxes, reported.sizes))
    write_results(args, results, ["corloc"], images=with_box, size=size)


# --------------------------------------------------------------------------------------------------
# picture: principal components and attention
# --------------------------------------------------------------------------------------------------


def spread_of(tokens: Tensor) -> float:
    """RMS distance of the tokens (dim, row, column) from their mean, over their mean norm."""
    x = tokens.double().flatten(1)
    return float(x.std(dim=1, correction=0).norm() / x.norm(dim=0).mean())


def principal_colours(tokens: Tensor) -> Tensor:
    """First three principal components as red, green, blue: (dim, row, col) -> (row, col, 3).

    Each is rescaled to 0 .. 1, which would hide that tokens are alike, so those are all grey. The
    sign of a component is arbitrary: we make the token farthest from the mean positive.
    """
    if spread_of(tokens) < ALIKE:
        return torch.full((*tokens.shape[1:], 3), 0.5)
    x = rearrange(tokens, "dim row col -> (row col) dim").double()
    U, S, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    components = (U * S)[:, :3]
    low, high = components.aminmax(dim=0)
    colours = torch.where(-low > high, high - components, components - low)
    colours = colours / (high - low).clamp(min=1e-12)
    return rearrange(colours, "(row col) colour -> row col colour", row=tokens.shape[1])


def class_attention(model: ViT, images: Tensor, block: int) -> Tensor:
    """Attention of the class token to the patches, mean over the heads: (batch, row, column).

    It sums to less than one, because the class token attends to itself too.
    """
    rows, layer = images.shape[-2] // model.config["patch_size"], model.blocks[block - 1]
    [x] = model.forward_features(images, [block - 1])
    weights = layer.attention.weights(layer.norm1(x))[:, :, 0, 1:].mean(dim=1)
    return rearrange(weights, "b (row col) -> b row col", row=rows)


def figure_columns(model: ViT, images: list, inputs: Tensor, blocks: list[int]) -> list[tuple]:
    """(title, panels, captions) per column: the images, the tokens after each block, then the
    attention of the class token in each block, if there is one. inputs: (image, 3, H, W)."""
    columns = [("image", images, [""] * len(images))]
    for block, maps in zip(blocks, token_maps(model, inputs, blocks)):
        spreads = [spread_of(x) for x in maps.cpu()]
        captions = [f"{'alike' if x < ALIKE else 'spread'} {x:.1g}" for x in spreads]
        colours = [principal_colours(x).numpy() for x in maps.cpu()]
        columns.append((f"tokens,\nblock {block}", colours, captions))
    for block in blocks if model.cls_token is not None else []:
        weights = class_attention(model, inputs, block).cpu().numpy()
        captions = [f"peak {x.max() / x.mean():.1f}" for x in weights]
        columns.append((f"attention,\nblock {block}", weights, captions))
    return columns


def picture(args: Namespace, models: dict[str, ViT]) -> None:
    """For each network one row per image, with `figure_columns`."""
    pictured = scenes.image_files(args.images) if args.images else load_images(args, "val", 2)
    size = input_size(args, models, pictured.sizes[0])
    make_folder(args.out)
    inputs = torch.cat(list(network_inputs(pictured, size, args.device, "images")))
    images = [pictured.image(i).permute(1, 2, 0).numpy() for i in range(len(inputs))]
    blocks = {}
    for name, model in models.items():
        quarters = {math.ceil(i * len(model.blocks) / 4) for i in (1, 2, 3, 4)}
        blocks[name] = args.blocks or sorted(quarters)
    kinds = 1 + any(model.cls_token is not None for model in models.values())  # tokens, attention
    panel, columns = 1.3, 1 + kinds * max(map(len, blocks.values()))  # inches
    rows = 0.8 + (0.25 + panel * size[0] / size[1]) * len(images)  # inches for each network
    inches = panel * columns, rows * len(models)
    figure = pictures.plt.figure(figsize=inches, layout="constrained")
    parts = figure.subfigures(len(models), 1, squeeze=False)[:, 0]
    for part, (name, model) in zip(parts, models.items()):
        part.suptitle(name, color=pictures.colour_of(name, list(models)))
        axes = part.subplots(len(images), columns, squeeze=False)
        for ax in axes.flat:
            ax.set_axis_off()
        filled = figure_columns(model, images, inputs, blocks[name])
        for column, (title, panels, captions) in zip(axes.T, filled):
            captions[0] = f"{title}\n{captions[0]}"
            for ax, pixels, caption in zip(column, panels, captions):
                ax.imshow(pixels, vmin=0, cmap="magma")  # both ignored for pixels in colour
                ax.set_title(caption, fontsize=10)
    pictures.save_figure(figure, args.out / "picture.png")
    print(args.out / "picture.png")


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def parse_arguments() -> Namespace:
    p = Parser(__doc__)
    p.set_defaults(data=None, blocks=None)  # for the commands without such a flag
    commands = p.add_subparsers(dest="command", required=True)
    for name in ("segment", "discover", "picture"):
        add = commands.add_parser(name).add_argument
        add("checkpoints", nargs="*", metavar="CHECKPOINT", help="trained networks: RUN/last.pt")
        add("--random-init", action="append", default=[], type=ARM, help="add a fresh nano network")
        if name == "segment":
            add("--blocks", nargs="+", type=COUNT_OR_0, help="probe these [the last; 0: embedding]")
            add("--epochs", type=COUNT, default=20, help="passes over the training images [20]")
        elif name == "discover":
            add("--tau", type=FRACTION, default=0.2, help="cosine above which patches join [0.2]")
            add("--images", nargs="+", type=PATH, metavar="FILE", help="draw the cut of these")
        else:
            add("--blocks", nargs="+", type=COUNT, help="show these [four, evenly spaced]")
            add("--images", nargs="+", type=PATH, metavar="FILE", help="[two synthetic images]")
        if name != "picture":
            add("--data", type=PATH, metavar="ROOT", help="folder of images [synthetic ones]")
            add("--ignore", type=int, default=255, help="class id of unlabelled pixels [255]")
        size = "height and width images are resized to, or one number for both [the first image's]"
        add("--image-size", nargs="+", type=COUNT, metavar="PX", help=size)
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
        add("--seed", type=SEED, default=0, help="of the probe and of fresh networks [0]")
        add("--out", type=PATH, default=Path("runs/dense"), help="results' folder [runs/dense]")
    args = p.parse_args()
    if args.command == "discover" and args.images and args.data:
        raise UserError("--images have no true boxes and --data's are not drawn; leave one out")
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
    with errors_in_one_line("make --image-size smaller"):
        main()
