"""Train a Vision Transformer without labels (DINO), with or without skip connections.

    python train_ssl.py --skipless                      the demo: CPU, no data, about 5 minutes
    python train_ssl.py --skipless --data /imagenet     the paper's network: ViT-S/16, 300 epochs
    python train_ssl.py --data /imagenet                the same network with its skips

A student sees crops of an image and learns to predict what a teacher, the running average of the
student, says of two large crops of it. DATA holds train/<class>/*; the labels are never trained
on. If there is a val/, with the same classes, a weighted k-nearest-neighbour vote on the teacher's
features is measured on it every few epochs: that is the number to watch, since the loss says little
(near ln(prototypes) the output is uniform). Without --data images are drawn (`common.Shapes`).
Each run writes a folder: log.jsonl, curves.png (this run and its siblings) and last.pt.
`torchrun --nproc-per-node=N train_ssl.py ...` trains on N GPUs, or on N CPU processes.

Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021
(arXiv 2104.14294); without skips Ji et al., "Cutting the Skip" (arXiv 2510.00345).
"""

import argparse
import copy
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import common
from minskip import ViT

# --------------------------------------------------------------------------------------------------
# Settings: what each flag is when it is not given
# --------------------------------------------------------------------------------------------------

#                     demo    folder      (demo: Shapes; folder: --data, ImageNet in mind)
DEFAULTS = {
    "model":          ("nano", "small"),
    "image_size":     (32,     224),
    "patch_size":     (8,      16),
    "position_std":   (0.5,    0.02),
    "pool":           ("cls",  "cls"),
    "local_crops":    (4,      8),
    "crop_split":     (0.5,    0.25),
    "prototypes":     (256,    65536),
    "teacher_temperature": (0.04, 0.07),
    "momentum":       (0.98,   0.996),
    "epochs":         (6,      300),
    "warmup_epochs":  (0.5,    10),
    "batch_size":     (64,     1024),
    "knn_every":      (3,      10),
    "opt":            ("soap", "soap"),
    "seed":           (0,      0),
    "amp":            ("auto", "auto"),
    "device":         ("auto", "auto"),
    "workers":        (common.CORES - 1, common.CORES),
}  # fmt: skip
#                     residual  skipless
DROP_PATH =           (0.1,     0.0)  # with --data; in the demo 0 for both  # fmt: skip
#                     residual  skipless                residual  skipless
LEARNING_RATE = {     # demo                            # folder
    "soap":          ((3e-3,    1e-3),                  (2e-3,    5e-4)),
    "adamw":         ((2e-3,    3e-4),                  (2e-3,    5e-4)),
    "muon":          ((2e-3,    1e-3),                  (2e-3,    5e-4)),
}  # fmt: skip
CONDITIONED_INIT = (
    dict(alpha=0.7, beta=1.0, c=3.0),  # demo: the supervised demo's
    dict(alpha=1.8, beta=1.0, c=3.0),  # folder: the paper's constants for ViT-S with DINO
)
# DINO's, for every run
LAST_LEARNING_RATE = 1e-6
WEIGHT_DECAY = (0.04, 0.4)  # first and last step
STUDENT_TEMPERATURE = 0.1
FIRST_TEACHER_TEMPERATURE = 0.04  # rises to --teacher-temperature over a tenth of the epochs
CENTRE_MOMENTUM = 0.9
CLIP_GRAD = 3.0  # largest norm of each parameter's gradient by itself
FROZEN_EPOCHS = 1  # of the prototypes

SHAPES_TRAIN, SHAPES_VAL = 5_000, 2_000

# Flags that may differ between a run and its continuation without changing its result.
FREE_TO_CHANGE = {"data", "out", "device", "workers", "compile", "resume"}


def parse_arguments() -> argparse.Namespace:
    """Flags as given; those not given are None, and `settle` fills them in."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = common.trainer_flags(p, DEFAULTS, CONDITIONED_INIT)
    add("--data", "folder with train/<class>/* and, for k-NN, val/; left out: images are drawn")
    add("--local-crops", "crops of about 3/7 the size, beside two global ones; 0 .. 10", type=int)
    add(
        "--crop-split",
        "share of the image's area: global crops cover between it and all, local crops "
        "between a fifth of it and it; too small: crops of one image have nothing in common",
        type=float,
    )
    add(
        "--prototypes",
        "outputs of the head; more tell images finer apart and need more of them",
        type=int,
    )
    add(
        "--teacher-temperature",
        "sharpness of the teacher, 0.04 .. 0.07; too high: its output turns uniform",
        type=float,
    )
    add(
        "--momentum",
        "of the teacher at the start, rising to 1; the teacher averages the last 1 / (1 - m) "
        "steps: short runs want less",
        type=float,
    )
    add("--knn-every", "epochs between two k-NN measurements", type=int)
    return p.parse_args()


def settle(given: argparse.Namespace, stored: dict | None) -> argparse.Namespace:
    """The effective settings: as given, else as stored in a checkpoint, else by default.

    Ends the program when a flag contradicts the checkpoint or another flag.
    """
    if stored is not None:
        return common.stored_settings(given, stored, FREE_TO_CHANGE)
    args = common.settled(given, DEFAULTS, CONDITIONED_INIT, LEARNING_RATE, DROP_PATH)
    common.check_ranges(
        args,
        "image_size patch_size depth batch_size epochs lr crop_split prototypes "
        "teacher_temperature knn_every".split(),
        "warmup_epochs position_std workers seed local_crops".split(),
        "momentum crop_split drop_path".split(),
    )
    return args


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

    Blur only from 96 px up: on smaller images it erases what there is to see (SimCLR leaves it
    out on CIFAR). drawn: the images are `common.Shapes`. Two crops of one share its colours and
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
        large = torch.stack([self.first(image), self.second(image)])
        few = [self.local(image) for _ in range(self.local_crops)]
        return large, torch.stack(few) if few else large.new_zeros(0, 3, self.small, self.small)


# --------------------------------------------------------------------------------------------------
# Head and loss
# --------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Three layers to a unit vector, then its cosine with each prototype.

    The prototypes are normalised here, in forward: parametrised weights cannot be deep-copied
    everywhere, and a plain parameter can. Shapes: (batch, width) -> (batch, prototypes).
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / bottleneck**0.5)

    def forward(self, features: Tensor) -> Tensor:
        directions = F.normalize(self.mlp(features), dim=-1)
        return F.linear(directions, F.normalize(self.prototypes, dim=-1))


class Network(nn.Module):
    """Backbone and head. Student and teacher are one each."""

    def __init__(self, backbone: ViT, head: Head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *groups: Tensor) -> tuple[Tensor, Tensor]:
        """Crops of one resolution go through the backbone together: a pass a resolution.

        groups: (batch, crop, 3, size, size) each. Returns the features, (crop, batch, width), and
        the logits, (crop, batch, prototypes), with the crops of the first group first.
        """
        batch = len(groups[0])
        features = torch.cat([
            self.backbone(rearrange(crops, "batch crop c h w -> (crop batch) c h w"))
            for crops in groups
        ])  # fmt: skip
        logits = self.head(features)
        features, logits = (
            rearrange(x, "(crop batch) dim -> crop batch dim", batch=batch)
            for x in (features, logits)
        )
        return features, logits


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
# Schedules: functions of the global step, so that there is nothing to resume
# --------------------------------------------------------------------------------------------------


def cosine(first: float, last: float, progress: float) -> float:
    """Half a cosine from first to last while progress goes from 0 to 1."""
    return last + (first - last) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def scheduled(step: int, steps: int, warmup_steps: int, args: argparse.Namespace) -> dict:
    """Learning rate, weight decay, teacher momentum and temperature at a global step of `steps`."""
    progress = step / max(steps - 1, 1)
    if step < warmup_steps:
        lr = args.lr * (step + 1) / warmup_steps
    else:
        after = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
        lr = cosine(args.lr, min(LAST_LEARNING_RATE, args.lr), after)
    warm = min(10 * progress, 1.0)
    first = min(FIRST_TEACHER_TEMPERATURE, args.teacher_temperature)
    return dict(
        lr=lr,
        weight_decay=cosine(*WEIGHT_DECAY, progress),
        momentum=cosine(args.momentum, 1.0, progress),
        teacher_temperature=first + warm * (args.teacher_temperature - first),
    )


# --------------------------------------------------------------------------------------------------
# Evaluation: weighted k nearest neighbours
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def features_of(model: ViT, loader, device: torch.device, amp: str) -> tuple[Tensor, Tensor]:
    """Unit-length pooled features, (image, width) float32, and labels, (image,), of a data set."""
    model.eval()
    features, labels = [], []
    silent = True if dist.is_initialized() and dist.get_rank() else None
    for images, classes in tqdm(loader, "k-NN features", disable=silent, leave=False):
        images = common.normalise(images.to(device, non_blocking=True))
        with common.autocast(device, amp):
            features.append(model(images).float())
        labels.append(classes.to(device, non_blocking=True))
    return F.normalize(torch.cat(features), dim=-1), torch.cat(labels)


@torch.no_grad()
def knn_classify(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class of each query by the vote of its k nearest neighbours, weighted exp(cosine / tau).

    Wu et al. 2018 (arXiv 1805.01978), as DINO evaluates. bank (n, width) and queries (m, width)
    have unit length; with fewer than k images in the bank all vote. Returns (m,).
    """
    classes = int(bank_labels.max()) + 1
    votes = []
    for part in queries.split(1024):  # similarities of a whole set would not fit
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)))
        weights = (similarity / temperature).exp()
        score = weights.new_zeros(len(part), classes)
        votes.append(score.scatter_add_(1, bank_labels[nearest], weights).argmax(1))
    return torch.cat(votes)


def knn_accuracy(model: ViT, train_loader, val_loader, device: torch.device, amp: str) -> float:
    """Top-1 in percent of the validation images' classes, from the training images'."""
    bank, bank_labels = (common.gathered(x) for x in features_of(model, train_loader, device, amp))
    queries, labels = features_of(model, val_loader, device, amp)
    hits = (knn_classify(bank, bank_labels, queries) == labels).sum()
    counts = torch.stack([hits, torch.full_like(hits, len(labels))])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return (100 * counts[0] / counts[1]).item()


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def load_sets(args: argparse.Namespace, check: bool):
    """(training set, validation set or None): the second is for k-NN alone."""
    if args.data is None:
        train_set = common.Shapes("train", SHAPES_TRAIN, args.image_size)
        return train_set, common.Shapes("val", SHAPES_VAL, args.image_size)
    if os.path.isdir(os.path.join(args.data, "val")):
        return common.image_folders(args.data, check)
    train_set = common.image_folder(args.data, "train")
    if check:
        common.check_images([path for path, _ in train_set.samples])
    return train_set, None


def main() -> None:
    given = parse_arguments()
    checkpoint = common.load_checkpoint(given.resume, "train_ssl") if given.resume else None
    args = settle(given, checkpoint["args"] if checkpoint else None)
    device, rank, world = common.start_processes(args.device)
    main_process = rank == 0
    say = print if main_process else (lambda *_, **__: None)

    # ---- data ------------------------------------------------------------------------------------
    drawn = args.data is None
    train_set, val_set = load_sets(args, check=main_process)
    data_name = "Shapes" if drawn else args.data
    if args.batch_size % world:
        common.fail(f"--batch-size {args.batch_size} must be a multiple of the {world} processes")
    if args.batch_size > len(train_set):
        common.fail(
            f"--batch-size {args.batch_size} exceeds the {len(train_set)} training images of "
            f"{data_name}; make it smaller"
        )
    if val_set is not None and len(val_set) < world:
        common.fail(f"--data {data_name}: fewer images in val/ than the {world} processes")
    small = local_size(args.image_size, args.patch_size)
    crops = MultiCrop(args.image_size, small, args.local_crops, args.crop_split, drawn)
    batches = common.Batches(len(train_set), args.batch_size, args.seed, True, rank, world)
    loader = common.make_loader(common.Seeded(train_set, crops), batches, args.workers, device)
    _, to_val = common.augmentations(args.image_size, drawn)
    knn_loaders = [
        common.make_loader(
            common.Seeded(data, to_val),
            common.Batches(len(data), 256, 0, False, rank, world),
            args.workers,
            device,
        )
        for data in (train_set, val_set)
        if val_set is not None
    ]

    # ---- student and teacher ---------------------------------------------------------------------
    torch.manual_seed(args.seed)
    backbone = common.build_vit(args, num_classes=0)
    width = backbone.config["width"]
    hidden, bottleneck = (2048, 256) if width >= 192 else (256, 64)
    student = Network(backbone, Head(width, hidden, bottleneck, args.prototypes)).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()  # eval: no drop-path
    teacher_parameters, student_parameters = list(teacher.parameters()), list(student.parameters())
    centre = torch.zeros(args.prototypes, device=device)
    optimizers = common.build_optimizers(student, args.opt, args.lr, WEIGHT_DECAY[0])

    stem, line = common.described(backbone, args)
    stem = f"ssl-{stem}"
    say(line)
    say(
        f"data    {data_name}: {len(train_set)} train, 2 crops of {args.image_size} px and "
        f"{args.local_crops} of {small} px, patches of {args.patch_size}"
    )

    # ---- schedule, resume ------------------------------------------------------------------------
    steps_an_epoch = len(batches)
    steps = args.epochs * steps_an_epoch
    warmup_steps = round(args.warmup_epochs * steps_an_epoch)
    history, first_epoch, first_step, seconds = [], 0, 0, 0.0
    # over the epoch's steps: loss, teacher entropy, feature std, norm of the gradients
    sums = torch.zeros(4, device=device)
    if checkpoint:
        common.check_same_run(args.resume, checkpoint, len(train_set), world)
        if checkpoint["classes"] != train_set.classes:
            common.fail(f"{data_name} has other classes than {args.resume} was trained on")
        student.load_state_dict(checkpoint["student"])
        teacher.backbone.load_state_dict(checkpoint["model"])
        teacher.head.load_state_dict(checkpoint["teacher_head"])
        centre.copy_(checkpoint["centre"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        history, first_epoch = checkpoint["history"], checkpoint["epoch"]
        first_step, seconds = checkpoint["step"], checkpoint["seconds"]
        sums += checkpoint["sums"].to(device)
        out = common.resumed_folder(args, given.out, stem)
        say(f"resume  {args.resume} at epoch {first_epoch}, step {first_step}")
    else:
        out = common.run_folder(args.out, stem, args.seed)
    if main_process:
        common.make_folder(out)
    say(
        f"train   {args.epochs} epochs of {steps_an_epoch} steps of {args.batch_size}, {args.opt}, "
        f"lr {args.lr:g}, on {device} x {world}, "
        f"{'bf16' if common.uses_bf16(device, args.amp) else 'float32'}"
    )
    if not knn_loaders:
        say(f"k-NN    off: {args.data} has no val/ to measure on")
    say(f"files   {out}")
    stored_args = {k: v for k, v in vars(args).items() if k != "resume"}
    say("flags   " + " ".join(f"{k}={v}" for k, v in sorted(stored_args.items())))

    network, target_network = student, teacher
    if args.compile:
        network, target_network = torch.compile(student), torch.compile(teacher)
    network = common.in_processes(network, device)

    def save(epoch: int, step: int) -> None:
        if main_process:
            common.save_checkpoint(
                out / "last.pt",
                script="train_ssl",
                args=stored_args,
                classes=train_set.classes,
                images=len(train_set),
                processes=world,
                model_config=backbone.config,
                model=teacher.backbone.state_dict(),  # what the features are taken from
                ema=None,
                teacher_head=teacher.head.state_dict(),
                student=student.state_dict(),
                centre=centre,
                optimizers=[o.state_dict() for o in optimizers],
                history=history,
                epoch=epoch,
                step=step,
                seconds=seconds + time.time() - started,
                sums=sums,
            )

    def save_now(epoch: int, step: int) -> None:
        sums.copy_(common.mean_over_processes(sums))
        save(epoch, step)

    def measure_knn() -> float | None:
        if not knn_loaders:
            return None
        return knn_accuracy(teacher.backbone, *knn_loaders, device, args.amp)

    def show() -> None:
        if main_process:
            common.write_log(out / "log.jsonl", history)
            panels = dict(train_loss="training loss", knn="k-NN top-1, %")
            common.plot_curves(out, panels if knn_loaders else dict(train_loss="training loss"))

    # ---- training --------------------------------------------------------------------------------
    # Reading a number off the GPU waits for it, so the loss is looked at now and then only.
    look_every = 1 if device.type == "cpu" else 20
    stop = common.StopSignal()
    started = time.time()
    if not history:
        history.append(dict(epoch=0, train_loss=None, knn=measure_knn()))
        show()
        if history[0]["knn"] is not None:
            say(f"epoch   0  k-NN {history[0]['knn']:.1f} % before training")
    for epoch in range(first_epoch, args.epochs):
        student.train()
        batches.epoch, batches.first = epoch, first_step
        epoch_started = time.time()
        bar = common.epoch_bar(loader, batches, args.epochs)
        for step, ((large, few), _) in enumerate(bar, start=first_step):
            now = scheduled(epoch * steps_an_epoch + step, steps, warmup_steps, args)
            # for drop-path
            torch.manual_seed(common.mixed_seeds(1, common.STEP, args.seed, epoch, step, rank)[0])
            large = common.normalise(large.to(device, non_blocking=True))
            groups = [large]
            if args.local_crops:
                groups.append(common.normalise(few.to(device, non_blocking=True)))
            with common.autocast(device, args.amp):
                with torch.no_grad():  # the teacher sees the global crops only
                    teacher_features, teacher_logits = target_network(large)
                _, student_logits = network(*groups)
            targets = teacher_targets(teacher_logits, centre, now["teacher_temperature"])
            loss = dino_loss(student_logits, targets, STUDENT_TEMPERATURE)
            loss.backward()

            with torch.no_grad():
                if epoch < FROZEN_EPOCHS:
                    student.head.prototypes.grad = None
                gradients = [p.grad for p in student_parameters if p.grad is not None]
                norms = torch.stack(torch._foreach_norm(gradients))
                factors = (CLIP_GRAD / (norms + 1e-6)).clamp(max=1)
                torch._foreach_mul_(gradients, list(factors.unbind()))
                entropy = -(targets * targets.clamp_min(1e-12).log()).sum(-1).mean()
                # of unit vectors in d dimensions: 1 when they point everywhere, 0 when they agree
                spread = F.normalize(teacher_features.float(), dim=-1).std(dim=1, correction=0)
                spread = spread.mean() * width**0.5
                sums += torch.stack([loss.detach(), entropy, spread, norms.norm()])
                batch_centre = teacher_logits.float().mean(dim=(0, 1))
                centre.lerp_(common.mean_over_processes(batch_centre), 1 - CENTRE_MOMENTUM)

            last = step + 1 == steps_an_epoch
            if last or (step + 1) % look_every == 0:
                # of all processes: they must leave together
                looked_at = common.mean_over_processes(sums)
                mean_loss = float(looked_at[0]) / (step + 1)
                if not math.isfinite(float(looked_at.sum())):
                    problem = f"the loss is {mean_loss}, the gradients' norm {float(looked_at[3])}"
                    common.break_off(problem, out, epoch, step, now["lr"])
                bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{now['lr']:.1e}")
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = now["lr"]
                    if group["decayed"]:
                        group["weight_decay"] = now["weight_decay"]
                try:
                    optimizer.step()
                except torch.linalg.LinAlgError:
                    problem = "SOAP found no eigenvectors (a gradient not finite?)"
                    common.break_off(problem, out, epoch, step, now["lr"])
                optimizer.zero_grad()
            with torch.no_grad():  # theta_t <- m theta_t + (1 - m) theta_s
                torch._foreach_lerp_(teacher_parameters, student_parameters, 1 - now["momentum"])
            if not last and (step + 1) % look_every == 0:
                common.leave_if_asked(stop, device, save_now, out, epoch, step + 1)
        bar.close()

        # ---- end of an epoch ---------------------------------------------------------------------
        loss, entropy, spread, _ = (common.mean_over_processes(sums) / steps_an_epoch).tolist()
        sums.zero_()
        rate = (steps_an_epoch - first_step) * args.batch_size / (time.time() - epoch_started)
        first_step = 0
        due = (epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs
        knn = measure_knn() if due else None
        minutes = (seconds + time.time() - started) / 60
        row = dict(epoch=epoch + 1, train_loss=loss, teacher_entropy=entropy, feature_std=spread)
        row |= dict(knn=knn, lr=now["lr"], momentum=now["momentum"])
        row |= dict(images_per_s=round(rate, 1), minutes=round(minutes, 3), warning=None)
        say(
            f"epoch {epoch + 1:3d}  loss {loss:.3f}  teacher entropy {entropy:.2f} of "
            f"{math.log(args.prototypes):.2f}  feature std {spread:.2f}  "
            + ("" if knn is None else f"k-NN {knn:.1f} %  ")
            + f"{rate:.0f} images/s"
        )
        if spread < 0.02:
            row["warning"] = "collapse: all images look the same"
        elif entropy > 0.98 * math.log(args.prototypes) and epoch + 1 > args.warmup_epochs:
            row["warning"] = "the teacher's output is uniform: little to learn from"
        if row["warning"] and row["warning"] not in [r.get("warning") for r in history]:
            say(f"warning: {row['warning']}; try a smaller --lr, --momentum or --prototypes")
        history.append(row)
        save(epoch + 1, 0)
        show()
        if epoch + 1 < args.epochs:
            common.leave_if_asked(stop, device, save_now, out, epoch + 1, 0)

    final = history[-1]
    result = "k-NN off" if final["knn"] is None else f"k-NN top-1 {final['knn']:.1f} %"
    say(f"{result}  ({final['epoch']} epochs, {final['minutes']:.1f} min)")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    with common.one_line_errors("make --batch-size smaller, or start more processes"):
        main()
