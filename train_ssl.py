"""Train a Vision Transformer without labels (DINO), with or without skip connections.

    python train_ssl.py --skipless                      the demo: CPU, no data, some minutes
    python train_ssl.py --skipless --data /imagenet     ViT-S/16, 300 epochs, on GPUs
    python train_ssl.py --data /imagenet                the same network with its skips

A student sees crops of an image and learns to predict what a teacher, the running average of the
student, says of two large crops of it. DATA holds train/<class>/*; the labels are never trained
on. If there is a val/, with the same classes, a weighted k-nearest-neighbour vote on the teacher's
features is measured on it every few epochs: that is the number to watch, since the loss says little
(near ln(prototypes) the output is uniform). Without --data images are synthetic (`shapes.py`).
Each run writes a folder: log.jsonl, curves.png and last.pt.
`torchrun --nproc-per-node=N train_ssl.py ...` trains on N GPUs, or on N CPU processes.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021
(arXiv 2104.14294); without skips Ji et al., "Cutting the Skip" (arXiv 2510.00345). Where we leave
DINO's published code, the line says so.
"""

import argparse
import copy
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

import cli
import engine
import files
import identity_init
import networks
from data import Batches, augmentations, image_folders, make_loader, normalise
from knn import knn_accuracy
from minskip import ViT
from run import Run
from shapes import Shapes

# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

DEMO = cli.COMMON | dict(  # ten synthetic classes, two CPU cores
    model="nano",
    image_size=32,
    patch_size=8,
    pool="cls",
    pos_embed_std=0.5,
    alpha=1.8,  # of --init paper: the paper's constants for ViT-S with DINO
    beta=1.0,
    c=3.0,
    opt="soap",  # DINO has AdamW
    lr=dict(soap=3e-3, adamw=2e-3),
    epochs=6,
    warmup_epochs=0.5,
    batch_size=64,
    drop_path=0.0,
    local_crops=4,
    crop_split=0.5,
    prototypes=256,
    teacher_temperature=0.04,
    momentum=0.98,  # averages 50 steps: a run has 468
    knn_every=3,
    workers=cli.CORES - 1,
)
FOLDER = dict(  # --data, with ImageNet in mind
    model="small",
    image_size=224,
    patch_size=16,
    pos_embed_std=0.02,
    lr=dict(soap=2e-3, adamw=2e-3),  # DINO's 5e-4 x batch / 256, at this batch; not scaled with it
    epochs=300,
    warmup_epochs=10,
    batch_size=1024,
    drop_path=0.1,
    local_crops=8,
    crop_split=0.25,  # DINO's for ViT-S: global crops of .25 .. 1, local ones of .05 .. .25
    prototypes=65536,
    teacher_temperature=0.07,
    momentum=0.996,
    knn_every=10,
    workers=cli.CORES,
)
SKIPLESS = dict(  # --skipless, over either; the paper's init where it was published
    init=dict(nano="identity", tiny="identity", small="paper", base="identity", large="identity"),
    lr=dict(
        paper=dict(soap=5e-4, adamw=3e-4),
        default=dict(soap=5e-4, adamw=3e-4),
    ),
    drop_path=0.0,  # a dropped sub-block would leave nothing
)
# DINO's, for every run
LAST_LR = 1e-6
WEIGHT_DECAY = (0.04, 0.4)  # first and last step
STUDENT_TEMPERATURE = 0.1
FIRST_TEACHER_TEMPERATURE = 0.04  # rises to --teacher-temperature over a tenth of the epochs
CENTRE_MOMENTUM = 0.9
CLIP_GRAD = 3.0  # largest norm of each parameter's gradient by itself
FROZEN_EPOCHS = 1  # of the prototypes
ADAMW_BETAS = (0.9, 0.999)

SMALL_SET = 100_000  # images; of a larger one k-NN before training would take long
SHAPES_TRAIN, SHAPES_VAL = 5_000, 2_000


def parse_arguments() -> tuple[argparse.Namespace, dict | None]:
    """(the settings of this run, the checkpoint that --resume names)."""
    p, add = cli.trainer_flags(__doc__, DEMO, FOLDER, SKIPLESS)
    add("--local-crops", "crops of about 3/7 the size, beside two global ones", cli.count_or_0)
    add(
        "--crop-split",
        "share of the image's area: global crops cover between it and all, local crops between a "
        "fifth of it and it; too small: crops of one image have nothing in common",
        cli.share,
    )
    add("--prototypes", "outputs of the head; more tell images finer apart", cli.count)
    add(
        "--teacher-temperature",
        "sharpness of the teacher, 0.04 .. 0.07; too high: its output turns uniform",
        cli.positive,
    )
    add(
        "--momentum",
        "of the teacher at the start, rising to 1; the teacher averages the last 1 / (1 - m) "
        "steps: short runs want less",
        cli.share,
    )
    add("--knn-every", "epochs between two k-NN measurements", cli.count)
    explicit = vars(p.parse_args())
    path = explicit.get("resume")
    checkpoint = files.load_checkpoint(path, "train_ssl") if path else None
    stored = checkpoint and cli.stored_settings(p, DEMO, checkpoint)
    free = cli.FREE_TO_CHANGE | {"grad_accum"}  # which up to rounding changes nothing either
    return cli.settle(explicit, DEMO, FOLDER, SKIPLESS, stored, free), checkpoint


# --------------------------------------------------------------------------------------------------
# Crops
# --------------------------------------------------------------------------------------------------


def local_size(image_size: int, patch_size: int) -> int:
    """Side of the local crops: 3/7 of the global ones' (96 of 224), to whole patches."""
    return max(1, round(image_size * 3 / 7 / patch_size)) * patch_size


def blurred(image: Image.Image) -> Image.Image:
    """A Gaussian blur of random width, by Pillow: several times as fast as a dense kernel."""
    sigma = torch.empty(()).uniform_(0.1, 2.0).item()
    return image.filter(ImageFilter.GaussianBlur(sigma))


class MultiCrop:
    """image -> ((2, 3, size, size), (local_crops, 3, small, small)), uint8: DINO's augmentation.

    Ours: blur only from 96 px up, as on smaller images it erases what there is to see (SimCLR
    leaves it out on CIFAR). drawn: the images are `Shapes`. Two crops of one share its colours and
    the direction of its grating, which would be all a network learned; so hues and angles are
    drawn anew for each crop.
    """

    def __init__(self, size: int, small: int, local_crops: int, split: float, drawn: bool):
        self.drawn = drawn
        self.first = self.crop(size, (split, 1.0), blur=1.0, solarize=0.0)
        self.second = self.crop(size, (split, 1.0), blur=0.1, solarize=0.2)
        self.local = self.crop(small, (split / 5, split), blur=0.5, solarize=0.0)
        self.small, self.local_crops = small, local_crops

    def crop(
        self, size: int, scale: tuple[float, float], blur: float, solarize: float
    ) -> v2.Transform:
        steps = [
            v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.5 if self.drawn else 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
        ]
        if self.drawn:
            steps.insert(0, v2.RandomRotation(180, InterpolationMode.BILINEAR))
        if size >= 96:
            steps.append(v2.RandomApply([v2.Lambda(blurred)], p=blur))
        return v2.Compose([*steps, v2.RandomSolarize(128, p=solarize), v2.PILToTensor()])

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, Tensor]:
        if self.drawn:  # on images this small Pillow is several times as fast as tensors are
            image = v2.functional.to_pil_image(image)
        global_crops = torch.stack([self.first(image), self.second(image)])
        local_crops = global_crops.new_zeros(self.local_crops, 3, self.small, self.small)
        for i in range(self.local_crops):
            local_crops[i] = self.local(image)
        return global_crops, local_crops


# --------------------------------------------------------------------------------------------------
# Networks and loss
# --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Three layers to a unit vector, then its cosine with each prototype.

    The prototypes are normalised here, in forward: parametrised weights cannot be deep-copied
    everywhere, and a plain parameter can. It is DINO's norm_last_layer=True, always.
    Shapes: (batch, dim) -> (batch, prototypes).
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        directions = F.normalize(self.mlp(features), dim=-1)
        return F.linear(directions, F.normalize(self.prototypes, dim=-1))


class Network(nn.Module):
    """Backbone and head. Student and teacher are one each."""

    def __init__(self, backbone: ViT, prototypes: int):
        super().__init__()
        dim = backbone.config["dim"]
        hidden, bottleneck = (2048, 256) if dim >= 192 else (256, 64)  # DINO's; less for nano
        self.backbone, self.head = backbone, Head(dim, hidden, bottleneck, prototypes)

    def forward(self, *groups: Tensor) -> tuple[Tensor, Tensor]:
        """Crops of one resolution go through the backbone together: a pass a resolution.

        groups: (batch, crop, 3, size, size) each. Returns the features, (crop, batch, dim), and
        the logits, (crop, batch, prototypes), with the crops of the first group first.
        """
        batch = len(groups[0])
        features = torch.cat([
            self.backbone(rearrange(crops, "batch crop c h w -> (crop batch) c h w"))
            for crops in groups
        ])  # fmt: skip
        apart = "(crop batch) dim -> crop batch dim"
        return tuple(rearrange(x, apart, batch=batch) for x in (features, self.head(features)))


def teacher_targets(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """P_t = softmax((g_t(x) - c) / tau_t), DINO's centring and sharpening. Shapes: any, K last.

    Centring alone would lead to the uniform output, sharpening alone to a single prototype.
    """
    return ((logits.float() - centre) / temperature).softmax(-1)


def dino_loss(student_logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """- mean over pairs (teacher's crop g, student's crop s != g) and images of P_t(g) . log P_s(s)

    with P_s = softmax(g_s(x) / tau_s). DINO, equation 3.
    student_logits: (crop, batch, K), the teacher's crops first; targets: (2, batch, K).
    """
    log_p = (student_logits.float() / temperature).log_softmax(-1)
    pairs = [
        -(target * log_p_s).sum(-1).mean()
        for g, target in enumerate(targets)
        for s, log_p_s in enumerate(log_p.unbind())
        if s != g
    ]
    return torch.stack(pairs).mean()


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale each gradient down to a norm of `largest`; returns the norm of all before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms.norm()


def scheduled(step: int, steps: int, warmup: int, args: argparse.Namespace) -> dict[str, float]:
    """What changes with the global step, of `steps`: a function of it, so nothing to resume."""
    progress = step / steps
    rise = min(10 * progress, 1.0)
    first = min(FIRST_TEACHER_TEMPERATURE, args.teacher_temperature)
    return dict(
        lr=engine.lr_at(step, steps, warmup, args.lr, LAST_LR),
        weight_decay=engine.cosine(*WEIGHT_DECAY, progress),
        momentum=engine.cosine(args.momentum, 1.0, progress),
        teacher_temperature=first + rise * (args.teacher_temperature - first),
    )


@torch.no_grad()
def health(targets: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Two signs of collapse: how undecided the teacher is, and how far apart images' features are.

    targets (crop, batch, K), features (crop, batch, dim).
    """
    entropy = -(targets * targets.clamp_min(1e-12).log()).sum(-1).mean()
    # of unit vectors in d dimensions: 1 when they point everywhere, 0 when they agree
    spread = F.normalize(features.float(), dim=-1).std(dim=1, correction=0)
    return dict(teacher_entropy=entropy, feature_std=spread.mean() * features.shape[-1] ** 0.5)


def warning_of(row: dict, args: argparse.Namespace) -> str | None:
    """A sign of collapse in an epoch's row of the log, in words."""
    if row["feature_std"] < 0.02:
        return "collapse: all images look the same"
    uniform = row["teacher_entropy"] > 0.98 * math.log(args.prototypes)
    if uniform and row["epoch"] > args.warmup_epochs:
        return "the teacher's output is uniform: little to learn from"


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def load_sets(args: argparse.Namespace):
    """(training set, validation set or None): the second is for k-NN alone."""
    if args.data is None:
        train_set = Shapes("train", SHAPES_TRAIN, args.image_size)
        return train_set, Shapes("val", SHAPES_VAL, args.image_size)
    return image_folders(args.data, check=engine.main_process(), need_val=False)


def knn_loaders(args: argparse.Namespace, sets: tuple, device, rank: int, world: int) -> list:
    """Loaders of both sets for `knn_accuracy`, unaugmented; none without a validation set."""
    if sets[1] is None:
        return []
    if len(sets[1]) < world:
        cli.fail(f"--data {args.data}: fewer images in val/ than the {world} processes")
    _, transform = augmentations(args.image_size, drawn=args.data is None)
    batches = [Batches(len(data), 256, 0, False, rank, world) for data in sets]
    return [make_loader(d, transform, b, args.workers, device) for d, b in zip(sets, batches)]


def main() -> None:
    args, checkpoint = parse_arguments()
    device, rank, world = engine.start_processes(args.device)

    train_set, val_set = load_sets(args)
    classes, data_name = train_set.classes, args.data or "Shapes"
    if checkpoint and checkpoint["classes"] != classes:
        cli.fail(f"{data_name} has other classes than the checkpoint was trained on")
    engine.check_batch_size(args.batch_size, world * args.grad_accum, len(train_set), data_name)
    small = local_size(args.image_size, args.patch_size)
    crops = MultiCrop(args.image_size, small, args.local_crops, args.crop_split, args.data is None)
    batches = Batches(len(train_set), args.batch_size, args.seed, True, rank, world)
    loader = make_loader(train_set, crops, batches, args.workers, device)
    to_measure = knn_loaders(args, (train_set, val_set), device, rank, world)

    torch.manual_seed(args.seed)
    backbone = networks.build_vit(args, 0, checkpoint)
    student = Network(backbone, args.prototypes).to(device)
    network = engine.in_processes(torch.compile(student) if args.compile else student, device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()  # eval: no drop-path
    teacher_parameters, student_parameters = list(teacher.parameters()), list(student.parameters())
    centre = torch.zeros(args.prototypes, device=device)
    optimizer = engine.build_optimizer(student, args.opt, args.lr, WEIGHT_DECAY[0], ADAMW_BETAS)
    if args.init == "identity":
        identity_init.hold_pairs(optimizer, backbone)
    if args.checkpoint_activations:
        engine.checkpoint_activations_(backbone)
    target_network = torch.compile(teacher) if args.compile else teacher

    run = Run(
        args,
        "ssl",
        device,
        train_set,
        batches,
        kept=dict(
            model=teacher.backbone,  # what features are taken from
            teacher_head=teacher.head,
            student=student,
            centre=centre,
            optimizer=optimizer,
        ),
        panels=dict(loss="training loss") | (dict(knn="k-NN top-1, %") if to_measure else {}),
        checkpoint=checkpoint,
    )
    del checkpoint  # its copy of the weights and the optimizer's state
    run.describe(student.backbone, data_name)
    engine.say(f"crops   2 of {args.image_size} px and {args.local_crops} of {small} px an image")
    groups = (2, args.image_size), (args.local_crops, small)
    run.describe_memory(student, *[(count, 3, size, size) for count, size in groups if count])
    if not to_measure:
        engine.say(f"k-NN    off: {args.data} has no val/ to measure on")
    elif not run.history and len(train_set) <= SMALL_SET:
        knn = knn_accuracy(teacher.backbone, *to_measure, device, args.amp)
        run.history.append(dict(epoch=0, knn=knn))
        engine.say(f"epoch   0  k-NN {knn:.1f} % before training")
    warned = {None}
    for epoch in run.epochs():
        student.train()
        for (global_crops, local_crops), _ in run.steps(loader):
            now = scheduled(run.global_step, run.total_steps, run.warmup_steps, args)
            groups = [normalise(x) for x in (global_crops, local_crops) if x.numel()]
            step_loss, seen = 0.0, []
            for some in engine.micro_batches(network, args.grad_accum, *groups):
                with engine.autocast(device, args.amp):
                    with torch.no_grad():  # the teacher sees the global crops only
                        features, teacher_logits = target_network(some[0])
                    _, student_logits = network(*some)
                targets = teacher_targets(teacher_logits, centre, now["teacher_temperature"])
                loss = dino_loss(student_logits, targets, STUDENT_TEMPERATURE)
                (loss / args.grad_accum).backward()
                step_loss += loss.detach() / args.grad_accum
                seen.append((features, teacher_logits, targets))
            features, teacher_logits, targets = (torch.cat(x, dim=1) for x in zip(*seen))
            if epoch < FROZEN_EPOCHS:
                student.head.prototypes.grad = None
            norm = clip_each_(student_parameters, CLIP_GRAD)
            # ends the run if one is not finite
            run.add(loss=step_loss, grad_norm=norm, **health(targets, features))
            decayed, plain = optimizer.param_groups
            decayed["lr"] = plain["lr"] = now["lr"]
            decayed["weight_decay"] = now["weight_decay"]
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                # theta_t <- m theta_t + (1 - m) theta_s, and c <- .9 c + .1 mean of g_t
                torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - now["momentum"])
                batch_centre = teacher_logits.mean(dim=(0, 1), dtype=centre.dtype)
                centre.lerp_(engine.mean_over_processes(batch_centre), 1 - CENTRE_MOMENTUM)

        due = to_measure and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs)
        knn = knn_accuracy(teacher.backbone, *to_measure, device, args.amp) if due else None
        row = run.end_epoch(knn=knn, lr=now["lr"], momentum=now["momentum"])
        engine.say(
            f"epoch {epoch + 1:3d}  loss {row['loss']:.3f}  teacher entropy "
            f"{row['teacher_entropy']:.2f} of {math.log(args.prototypes):.2f}  feature std "
            f"{row['feature_std']:.2f}  "
            + (f"k-NN {knn:.1f} %  " if due else "")
            + f"{row['images_per_s']:.0f} images/s"
        )
        if (warning := warning_of(row, args)) not in warned:
            engine.say(f"warning: {warning}; try a smaller --lr, --momentum or --prototypes")
            warned.add(warning)

    final = run.history[-1]
    result = "k-NN off" if final["knn"] is None else f"k-NN top-1 {final['knn']:.1f} %"
    engine.say(f"{result}  ({final['epoch']} epochs, {final['minutes']:.1f} min)")
    engine.end_processes()


if __name__ == "__main__":
    with cli.one_line_errors("raise --grad-accum"):
        main()
