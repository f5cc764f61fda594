"""Train a Vision Transformer without labels (DINO), with or without skip connections.

    python train_ssl.py --skipless                      the demo: CPU, no data, some minutes
    python train_ssl.py --skipless --data /imagenet     ViT-S/16, 300 epochs, on GPUs
    python train_ssl.py --data /imagenet                the same network with its skips

A student sees crops of an image and learns to predict what a teacher, the running average of the
student, says of two large crops of it. DATA holds train/<class>/*, whose labels are never trained
on, and optionally val/<class>/*. If there is a val/, a weighted k-nearest-neighbour vote on the
teacher's features is measured on it every few epochs. That is the number to watch, because the loss
says little: near ln(prototypes) the output is uniform. Without --data the images are synthetic
(`Shapes`). Each run writes a folder: log.jsonl, curves.png and last.pt.
`torchrun --nproc-per-node=N train_ssl.py ...` trains on N GPUs, or in N processes on the CPU.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021
(arXiv 2104.14294); without skips Ji et al., "Cutting the Skip" (arXiv 2510.00345). A comment marks
each line that departs from DINO's published code.
"""

import argparse
import copy
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from beyond.arms import arm_of, initialise_, new_settings, say_twin, start_from_
from beyond.identity_init import NEEDS, hold_pairs
from beyond.variants import CHOICES, vary_
from minskip import PRESETS, ViT
from soap import SOAP
from support import processes
from support.crops import MultiCrop, recoloured
from support.data import CORES, Batches, augmentations, image_folders, make_loader, normalise
from support.errors import UserError, errors_in_one_line
from support.files import load_checkpoint
from support.flags import (
    COMMON,
    COUNT,
    COUNT_OR_0,
    FRACTION,
    FREE_TO_CHANGE,
    NOT_NEGATIVE,
    POSITIVE,
    WORKERS,
    given_flags,
    stored_settings,
)
from support.knn import knn_accuracy
from support.processes import autocast, say
from support.run import Run
from support.shapes import Shapes

# --------------------------------------------------------------------------------------------------
# Settings: one row per flag. Without --data the first value holds, with --data the second.
# --------------------------------------------------------------------------------------------------

SETTINGS = dict(
    # name           demo      --data    takes
    model=           ("nano",   "small",  [*PRESETS],    "width and depth; nano is for CPUs"),
    depth=           (None,     None,     COUNT,         "number of blocks [12; large 24]"),
    image_size=      (32,       224,      COUNT,         "side of the images, pixels"),
    patch_size=      (8,        16,       COUNT,
        "side of a patch, pixels; half the side makes four times the tokens"),
    skipless=        (False,    False,    bool,          "train without skip connections"),
    skips=           (None,     None,     ["attention", "mlp"],
        "with --skipless: the half of each block that keeps its skip [neither]"),
    init=            ("default", "default", ["identity", "paper", "default", "mimetic"],
        "weights the blocks start from: identity, ours, keeps tokens best in small networks; "
        "paper, from Cutting the Skip; default, std 0.02, with which a skipless network learns "
        "little; mimetic, for networks with skips (beyond/mimetic_init.py); with --skipless "
        "identity, for small paper"),
    alpha=           (1.8,      1.8,      NOT_NEGATIVE,
        "of --init paper: weight of the random part of W_Q W_K^T, 0.5 .. 2; too large: attention "
        "starts one-hot at random places"),
    beta=            (1.0,      1.0,      NOT_NEGATIVE,
        "of --init paper: weight of the identity in W_Q W_K^T, 0.5 .. 2; too small: tokens become "
        "alike with depth"),
    c=               (3.0,      3.0,      POSITIVE,
        "of --init paper: scale of W_V and W_O, 1 .. 3; smaller makes each step relatively larger"),
    pool=            ("cls",    "cls",    ["cls", "mean"],
        "what is read off: the class token, or the mean of the patch tokens; with --init identity "
        "mean"),
    pos_embed_std=   (0.5,      0.02,     NOT_NEGATIVE,
        "standard deviation at which the position embedding starts, 0.02 .. 1; with --init "
        "identity 0.5"),
    norm=            ("layernorm", "layernorm", CHOICES["norm"],
        "what normalises in the blocks (beyond/variants.py)"),
    attention=       ("softmax", "softmax", CHOICES["attention"],
        "how tokens mix; the others start near the identity or keep tokens apart"),
    activation=      ("gelu",   "gelu",   CHOICES["activation"],
        "of the MLPs; tat: a leaky ReLU fitted to the depth"),
    shortcut=        ("constant", "constant", CHOICES["shortcut"],
        "weight of the skips; decreasing: falling with depth from 1 to 0.7"),
    opt=             ("soap",   "soap",   ["soap", "adamw"],
        "optimizer; soap is the paper's and matters without skips"),
    lr=              (None,     None,     POSITIVE,
        "peak learning rate; too large: the loss stays at its first value [by network and "
        "optimizer, LEARNING_RATE in this script: SOAP 3e-3, with --data 2e-3, for --init paper "
        "5e-4]"),
    epochs=          (6,        300,      COUNT,         "passes over the training images"),
    warmup_epochs=   (0.5,      10,       NOT_NEGATIVE,
        "epochs in which the learning rate rises, fractions too; too few: the loss jumps in the "
        "first steps"),
    batch_size=      (64,       1024,     COUNT,         "images per step, over all processes"),
    drop_path=       (0.0,      0.1,      FRACTION,
        "stochastic depth of the last block, with skips only"),
    local_crops=     (4,        8,        COUNT_OR_0,
        "crops of about 3/7 of the size, beside two global ones"),
    crop_split=      (0.5,      0.25,     FRACTION,
        "share of the image's area: global crops cover between it and all, local crops between a "
        "fifth of it and it; too small: crops of one image have nothing in common"),
    prototypes=      (256,      65536,    COUNT,
        "outputs of the head; more tell finer differences"),
    teacher_temperature= (0.04,  0.07,     POSITIVE,
        "sharpness of the teacher, 0.04 .. 0.07; too high: its output becomes uniform"),
    momentum=        (0.98,     0.996,    FRACTION,
        "of the teacher at the start, rising to 1: it averages the last 1 / (1 - m) steps; short "
        "runs want less"),
    knn_every=       (3,        10,       COUNT,         "epochs between two k-NN measurements"),
    workers=         (min(7, CORES - 1), CORES,    WORKERS,       "processes that load images"),
) | COMMON  # fmt: skip

# The init of --skipless, by model: ours, but the paper's where it was published.
INIT = dict(nano="identity", tiny="identity", small="paper", base="identity", large="identity")

# Peak learning rate by network; see train_cls.py. With --data DINO's 5e-4 x batch / 256, at this
# batch size; not scaled with another.
LEARNING_RATE = {
    #                    demo                         --data
    "residual":          (dict(soap=3e-3, adamw=2e-3), dict(soap=2e-3, adamw=2e-3)),
    "skipless-identity": (dict(soap=3e-3, adamw=2e-3), dict(soap=2e-3, adamw=2e-3)),
    "skipless-paper":    (dict(soap=5e-4, adamw=3e-4), dict(soap=5e-4, adamw=3e-4)),
    "skipless-default":  (dict(soap=5e-4, adamw=3e-4), dict(soap=5e-4, adamw=3e-4)),
}  # fmt: skip

# DINO's, for every run
LAST_LR = 1e-6
WEIGHT_DECAY = (0.04, 0.4)  # at the first and last step
STUDENT_TEMPERATURE = 0.1
FIRST_TEACHER_TEMPERATURE = 0.04  # rises to --teacher-temperature over a tenth of the epochs
CENTRE_MOMENTUM = 0.9
CLIP_GRAD = 3.0  # largest norm of each parameter's own gradient
FROZEN_EPOCHS = 1  # for the prototypes

SMALL_SET = 100_000  # images; in a larger set k-NN before training would take long
SHAPES_TRAIN, SHAPES_VAL = 5_000, 2_000  # synthetic images


def read_settings() -> tuple[argparse.Namespace, dict | None, dict | None]:
    """(settings, the checkpoint that --resume names, the one that --init-from names)."""
    given = given_flags(__doc__, SETTINGS)
    if "resume" in given:
        checkpoint = load_checkpoint(given["resume"], "train_ssl")
        return stored_settings(checkpoint["args"], given, FREE_TO_CHANGE), checkpoint, None
    args, source = new_settings(SETTINGS, given, INIT)
    network = f"skipless-{args.init}" if args.skipless else "residual"
    demo, with_data = LEARNING_RATE[network]
    args.lr = args.lr or (with_data if args.data else demo)[args.opt]
    return args, None, source


# --------------------------------------------------------------------------------------------------
# Images: the crops of each
# --------------------------------------------------------------------------------------------------


def load_sets(args: argparse.Namespace):
    """(training set, validation set or None), their images checked; the second is only for k-NN."""
    if args.data:
        check, size = processes.main_process(), args.image_size
        return image_folders(args.data, check, need_val=False, image_size=size)
    train_set = Shapes("train", SHAPES_TRAIN, args.image_size)
    return train_set, Shapes("val", SHAPES_VAL, args.image_size)


def local_size(image_size: int, patch_size: int) -> int:
    """Side of the local crops: 3/7 of the global ones' (96 of 224), to whole patches.

    (`ViT.interpolate_pos_embed` resizes positions to the crop's grid, DINO's code by a factor that
    is .1 of a patch larger.)
    """
    return max(1, round(image_size * 3 / 7 / patch_size)) * patch_size


# --------------------------------------------------------------------------------------------------
# Student, teacher and loss
# --------------------------------------------------------------------------------------------------


def build_backbone(args: argparse.Namespace) -> ViT:
    """The backbone at initialisation. Raises UserError for sizes that do not fit together."""
    size = PRESETS[args.model] | dict(depth=args.depth)
    needs = NEEDS if args.init == "identity" else {}
    try:
        model = ViT(
            args.image_size,
            args.patch_size,
            num_classes=0,  # its output is the pooled feature
            **size | needs,
            residual=args.skips or not args.skipless,  # minskip.Block.forward: x + f(x), or f(x)
            pool=args.pool,
            pos_embed_std=args.pos_embed_std,
            drop_path=args.drop_path,
        )
        # Other norms, attentions and so on, if asked for; the defaults change nothing.
        vary_(model, **{part: vars(args)[part] for part in CHOICES})
        return initialise_(model, args.init, args.alpha, args.beta, args.c)
    except ValueError as error:
        raise UserError(str(error)) from error


class Head(nn.Module):
    """Three layers to a unit vector, then its cosine with each prototype.

    DINO's norm_last_layer=True, always. We normalise the prototypes in forward, because a plain
    parameter can be deep-copied everywhere, unlike a parametrised weight; and they start at a
    length of about .32 at 256 inputs, DINO's at .58.
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
    """A backbone and its head. The student is one, the teacher another."""

    def __init__(self, backbone: ViT, prototypes: int):
        super().__init__()
        dim = backbone.config["dim"]
        hidden, bottleneck = (2048, 256) if dim >= 192 else (256, 64)  # DINO's; less for nano
        self.backbone, self.head = backbone, Head(dim, hidden, bottleneck, prototypes)

    def forward(self, *groups: Tensor) -> tuple[Tensor, Tensor]:
        """All crops of one resolution go through the backbone together, so one pass per resolution.

        groups: one (batch, crop, 3, size, size) per resolution. Returns the features, (crop, batch,
        dim), and the logits, (crop, batch, prototypes), the crops of the first group first.
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


# --------------------------------------------------------------------------------------------------
# Optimizer and schedules
# --------------------------------------------------------------------------------------------------


def build_optimizer(args: argparse.Namespace, student: Network) -> torch.optim.Optimizer:
    """SOAP or AdamW (DINO's). Biases, norms and embeddings, the second group, are not decayed.

    (DINO decays class token and position embedding.)
    """
    decayed, plain = [], []
    for name, p in student.named_parameters():
        (plain if p.ndim < 2 or name.endswith(("cls_token", "pos_embed")) else decayed).append(p)
    groups = [
        dict(params=decayed, weight_decay=WEIGHT_DECAY[0]),
        dict(params=plain, weight_decay=0.0),
    ]
    if args.opt == "soap":
        # Staggered, because on a GPU refreshing all eigenbases in one step would take long.
        how = dict(lr=args.lr, stagger=True, precondition_frequency=args.refresh_every)
        optimizer = processes.sharing_state(groups, SOAP, **how)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.999), fused=True)
    if args.init == "identity" and args.skips != "mlp":  # or it would overwrite the pairs
        hold_pairs(optimizer, student.backbone)
    return optimizer


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale each gradient down to a norm of `largest`; returns the norm of all before that."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    factors = (largest / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(gradients, list(factors.unbind()))
    return norms.norm()


def cosine(first: float, last: float, progress: float) -> float:
    """Half a cosine from first to last while progress goes from 0 to 1."""
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def lr_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """A line up to `peak` over `warmup` steps, then half a cosine down to `LAST_LR` at `steps`.

    (DINO's line starts at 0 and reaches the peak one step earlier.)
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(peak, min(LAST_LR, peak), (step - warmup) / (steps - warmup))


def scheduled(step: int, steps: int, warmup: int, args: argparse.Namespace) -> dict[str, float]:
    """What changes with the global step: a function of it, so there is nothing to resume."""
    progress = step / steps
    rise = min(10 * progress, 1.0)
    first = min(FIRST_TEACHER_TEMPERATURE, args.teacher_temperature)
    return dict(
        lr=lr_at(step, steps, warmup, args.lr),
        weight_decay=cosine(*WEIGHT_DECAY, progress),
        momentum=cosine(args.momentum, 1.0, progress),
        teacher_temperature=first + rise * (args.teacher_temperature - first),
    )


# --------------------------------------------------------------------------------------------------
# What is watched: k-NN accuracy and signs of collapse
# --------------------------------------------------------------------------------------------------


def knn_loaders(args: argparse.Namespace, sets: tuple, device, rank: int, world: int) -> list:
    """Loaders of both sets for `knn_accuracy`, unaugmented; none without a validation set."""
    if sets[1] is None:
        return []
    if len(sets[1]) < world:
        raise UserError(f"--data {args.data}: fewer images in val/ than the {world} processes")
    _, transform = augmentations(args.image_size, drawn=args.data is None)
    batches = [Batches(len(data), 256, 0, False, rank, world) for data in sets]
    return [make_loader(d, transform, b, args.workers, device) for d, b in zip(sets, batches)]


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
# Training
# --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, checkpoint: dict | None, source: dict | None) -> None:
    device, rank, world = processes.start_processes(args.device)

    train_set, val_set = load_sets(args)
    classes, data_name = train_set.classes, args.data or "Shapes"
    if checkpoint and checkpoint["classes"] != classes:
        raise UserError(f"{data_name} has other classes than the checkpoint was trained on")
    processes.check_batch_size(args.batch_size, world * args.grad_accum, len(train_set), data_name)
    small = local_size(args.image_size, args.patch_size)
    drawn = args.data is None
    to_crops = MultiCrop(args.image_size, small, args.local_crops, args.crop_split, drawn)
    batches = Batches(len(train_set), args.batch_size, args.seed, True, rank, world)
    loader = make_loader(train_set, to_crops, batches, args.workers, device)
    to_measure = knn_loaders(args, (train_set, val_set), device, rank, world)

    torch.manual_seed(args.seed)
    backbone = build_backbone(args)
    if source:
        start_from_(backbone, source, classes)
    student = Network(backbone, args.prototypes).to(device)
    compiled = torch.compile(student) if args.compile else student
    network = processes.averaging_gradients(compiled, device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()  # eval: no drop-path
    teacher_parameters, student_parameters = list(teacher.parameters()), list(student.parameters())
    centre = torch.zeros(args.prototypes, device=device)
    optimizer = build_optimizer(args, student)
    if args.checkpoint_activations:
        processes.checkpoint_activations_(backbone)
    target_network = torch.compile(teacher) if args.compile else teacher
    recolour = torch.compile(recoloured) if args.compile else recoloured

    run = Run(
        args,
        "train_ssl",
        arm_of(args),
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
    del checkpoint, source  # their copies of the weights, and the optimizer's state
    run.describe(student.backbone, data_name)
    say_twin(args, INIT)
    say(f"crops   2 of {args.image_size} px and {args.local_crops} of {small} px per image")
    groups = (2, args.image_size), (args.local_crops, small)
    run.describe_memory(student, *[(count, 3, size, size) for count, size in groups if count])
    if not to_measure:
        say(f"k-NN    off: {args.data} has no val/ with two classes or more to measure on")
    elif not run.history and len(train_set) <= SMALL_SET:
        knn = knn_accuracy(teacher.backbone, *map(run.measuring, to_measure), device, args.amp)
        run.history.append(dict(epoch=0, knn=knn))
        say(f"epoch   0  k-NN {knn:.1f} % before training")
    warned = {None}
    for epoch in run.epochs():
        student.train()
        for batch, _ in run.steps(loader):
            # Functions of the global step, set by hand: nothing to resume.
            now = scheduled(run.global_step, run.total_steps, run.warmup_steps, args)
            decayed, plain = optimizer.param_groups
            decayed["lr"] = plain["lr"] = now["lr"]
            decayed["weight_decay"] = now["weight_decay"]

            step_loss, parts = 0.0, []
            for *groups, changes in processes.micro_batches(network, args.grad_accum, *batch):
                groups = zip(groups, changes.split([2, args.local_crops], dim=1))
                crops = [normalise(recolour(x, change)) for x, change in groups if x.numel()]
                with autocast(device, args.amp):
                    with torch.no_grad():  # the teacher learns by averaging, not by gradients
                        features, teacher_logits = target_network(crops[0])  # global crops only
                    _, student_logits = network(*crops)
                targets = teacher_targets(teacher_logits, centre, now["teacher_temperature"])
                loss = dino_loss(student_logits, targets, STUDENT_TEMPERATURE)
                (loss / args.grad_accum).backward()
                step_loss += loss.detach() / args.grad_accum
                parts.append((features, teacher_logits, targets))
            features, teacher_logits, targets = (torch.cat(x, dim=1) for x in zip(*parts))

            if epoch < FROZEN_EPOCHS:  # at first the prototypes would follow an untrained backbone
                student.head.prototypes.grad = None
            norm = clip_each_(student_parameters, CLIP_GRAD)
            # before the step: ends the run if one of them is not finite
            run.add(loss=step_loss, grad_norm=norm, **health(targets, features))
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                # theta_t <- m theta_t + (1 - m) theta_s, and c <- .9 c + .1 mean of g_t
                torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - now["momentum"])
                batch_centre = teacher_logits.mean(dim=(0, 1), dtype=centre.dtype)
                centre.lerp_(processes.mean_over_processes(batch_centre), 1 - CENTRE_MOMENTUM)

        due = to_measure and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs)
        knn = None
        if due:
            knn = knn_accuracy(teacher.backbone, *map(run.measuring, to_measure), device, args.amp)
        last = scheduled(run.global_step - 1, run.total_steps, run.warmup_steps, args)
        row = run.end_epoch(knn=knn, lr=last["lr"], momentum=last["momentum"])
        say(
            f"epoch {epoch + 1:3d}  loss {row['loss']:.3f}  teacher entropy "
            f"{row['teacher_entropy']:.2f} of {math.log(args.prototypes):.2f}  feature std "
            f"{row['feature_std']:.2f}  "
            + (f"k-NN {knn:.1f} %  " if due else "")
            + f"{row['images_per_s']:.0f} images/s"
        )
        if (warning := warning_of(row, args)) not in warned:
            say(f"warning: {warning}; try a smaller --lr, --momentum or --prototypes")
            warned.add(warning)

    final = run.history[-1]
    if final["loss"] > math.log(args.prototypes):
        say("note    nothing learned: the loss is above a uniform guess's; try a smaller --lr")
    result = "k-NN off" if final["knn"] is None else f"k-NN top-1 {final['knn']:.1f} %"
    say(f"{result}  ({final['epoch']} epochs, {final['minutes']:.1f} min)")


def main() -> None:
    train(*read_settings())
    processes.end_processes()


if __name__ == "__main__":
    with errors_in_one_line("raise --grad-accum"):
        main()
