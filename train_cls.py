"""Train a Vision Transformer with labels, with or without skip connections.

    python train_cls.py --skipless                      the demo: CPU, no data, two minutes
    python train_cls.py --skipless --data /imagenet     ViT-B/16, 300 epochs, on GPUs
    python train_cls.py --data /imagenet                the same network with its skips

DATA holds train/<class>/* and val/<class>/*. Without --data the images are synthetic (`Shapes`).
Each run writes a folder: log.jsonl (one line per epoch), curves.png and last.pt, the result.
`torchrun --nproc-per-node=N train_cls.py ...` trains on N GPUs, or in N processes on the CPU.

Read from top to bottom: settings, images, network, optimizer, evaluation, the training loop. What
is imported from `support` is not the method. Measured accuracies: results/README.md.

From the paper (arXiv 2510.00345) the settings with --data take: no skips, the init and its
constants, SOAP, ViT-B, 300 epochs. The rest is customary for ViTs (DeiT), and the learning rates
are ours, extrapolated from small runs.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from beyond.arms import arm_of, initialise_, new_settings, say_twin, start_from_, trained_vit
from beyond.identity_init import NEEDS, hold_pairs
from beyond.variants import CHOICES, vary_
from minskip import PRESETS, ViT
from soap import SOAP
from support import processes
from support.data import (
    CORES,
    Batches,
    augmentations,
    image_folder,
    image_folders,
    make_loader,
    normalise,
)
from support.errors import UserError, errors_in_one_line
from support.files import load_checkpoint
from support.flags import (
    COMMON,
    COUNT,
    FRACTION,
    FREE_TO_CHANGE,
    NAME,
    NOT_NEGATIVE,
    POSITIVE,
    WORKERS,
    given_flags,
    stored_settings,
)
from support.processes import autocast, say
from support.run import Run
from support.shapes import Shapes

# --------------------------------------------------------------------------------------------------
# Settings: one row per flag. Without --data the first value holds, with --data the second.
# --------------------------------------------------------------------------------------------------

SETTINGS = dict(
    # name           demo      --data    takes
    model=           ("nano",   "base",   [*PRESETS],    "width and depth; nano is for CPUs"),
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
        "identity, for base paper"),
    alpha=           (2.0,      2.0,      NOT_NEGATIVE,
        "of --init paper: weight of the random part of W_Q W_K^T, 0.5 .. 2; too large: attention "
        "starts one-hot at random places"),
    beta=            (0.6,      0.6,      NOT_NEGATIVE,
        "of --init paper: weight of the identity in W_Q W_K^T, 0.5 .. 2; too small: tokens become "
        "alike with depth"),
    c=               (3.0,      3.0,      POSITIVE,
        "of --init paper: scale of W_V and W_O, 1 .. 3; smaller makes each step relatively larger"),
    pool=            ("cls",    "cls",    ["cls", "mean"],
        "what is classified: the class token, or the mean of the patch tokens; with --init "
        "identity mean"),
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
        "optimizer, LEARNING_RATE in this script: SOAP 5e-3, with --data 3e-3, for --init paper "
        "1e-3]"),
    epochs=          (3,        300,      COUNT,         "passes over the training images"),
    warmup_epochs=   (0.5,      5,        NOT_NEGATIVE,
        "epochs in which the learning rate rises, fractions too; too few: the loss jumps in the "
        "first steps"),
    batch_size=      (64,       1024,     COUNT,         "images per step, over all processes"),
    weight_decay=    (0.01,     0.05,     NOT_NEGATIVE,
        "0 .. 0.1; not for biases, norms and embeddings"),
    clip_grad=       (1.0,      1.0,      NOT_NEGATIVE,
        "largest norm of the whole gradient; 0 is off"),
    label_smoothing= (0.0,      0.1,      FRACTION,
        "share of the target spread over all classes, 0 .. 0.2"),
    mixup=           (0.0,      0.8,      NOT_NEGATIVE,
        "alpha of MixUp's beta distribution; 0 is off"),
    cutmix=          (0.0,      1.0,      NOT_NEGATIVE,
        "alpha of CutMix's; with both on, each batch takes one"),
    drop_path=       (0.0,      0.1,      FRACTION,
        "stochastic depth of the last block, with skips only"),
    ema=             (0.0,      0.0,      FRACTION,
        "decay of averaged weights, which val then measures; 0 is off, 0.9999 usual in long runs"),
    workers=         (0,        CORES,    WORKERS,
        "processes that load images; the demo is faster without"),
    eval=            (None,     None,     NAME,          "measure this checkpoint on val and stop"),
) | COMMON  # fmt: skip

# The init of --skipless, by model: ours, but the paper's where it was published.
INIT = dict(nano="identity", tiny="identity", small="identity", base="paper", large="identity")

# Peak learning rate by network. Without skips a step changes everything that follows, because no
# skip carries x past it; only the identity init tolerates the residual network's rate.
LEARNING_RATE = {
    #                    demo                         --data
    "residual":          (dict(soap=5e-3, adamw=2e-3), dict(soap=3e-3, adamw=1e-3)),
    "skipless-identity": (dict(soap=5e-3, adamw=2e-3), dict(soap=3e-3, adamw=1e-3)),
    "skipless-paper":    (dict(soap=1e-3, adamw=2e-4), dict(soap=1e-3, adamw=2e-4)),
    "skipless-default":  (dict(soap=3e-4, adamw=2e-4), dict(soap=3e-4, adamw=2e-4)),
}  # fmt: skip
SHAPES_TRAIN, SHAPES_VAL = 20_000, 2_000  # synthetic images


def read_settings() -> tuple[argparse.Namespace, dict | None, dict | None]:
    """(settings, the checkpoint that --resume or --eval names, the one that --init-from names)."""
    given = given_flags(__doc__, SETTINGS)
    if "resume" in given and "eval" in given:
        raise UserError("--resume and --eval exclude each other; choose one")
    if path := given.get("resume") or given.get("eval"):
        checkpoint = load_checkpoint(path, "train_cls")
        free = FREE_TO_CHANGE | ({"batch_size", "amp"} if "eval" in given else set())
        return stored_settings(checkpoint["args"], given, free), checkpoint, None
    args, source = new_settings(SETTINGS, given, INIT)
    network = f"skipless-{args.init}" if args.skipless else "residual"
    demo, with_data = LEARNING_RATE[network]
    args.lr = args.lr or (with_data if args.data else demo)[args.opt]
    return args, None, source


# --------------------------------------------------------------------------------------------------
# Images
# --------------------------------------------------------------------------------------------------


def validation_set(args: argparse.Namespace):
    if args.data:
        return image_folder(args.data, "val", image_size=args.image_size)
    return Shapes("val", SHAPES_VAL, args.image_size)


def both_sets(args: argparse.Namespace):
    """(training set, validation set), their images checked."""
    if args.data:
        return image_folders(args.data, processes.main_process(), image_size=args.image_size)
    return Shapes("train", SHAPES_TRAIN, args.image_size), validation_set(args)


def loader_of(dataset, batches: Batches, args: argparse.Namespace, device: torch.device):
    """Batches of (images (batch, 3, size, size) uint8, labels (batch,)); augmented for training."""
    to_train, to_val = augmentations(args.image_size, drawn=args.data is None)
    transform = to_train if batches.shuffle else to_val
    return make_loader(dataset, transform, batches, args.workers, device)


def mixing(args: argparse.Namespace, classes: int):
    """MixUp, CutMix, one of them at random for each batch, or neither."""
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=classes)] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=classes)] if args.cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)


# --------------------------------------------------------------------------------------------------
# Network, optimizer and learning rate
# --------------------------------------------------------------------------------------------------


def build_network(args: argparse.Namespace, num_classes: int) -> ViT:
    """The network at initialisation. Raises UserError for sizes that do not fit together."""
    size = PRESETS[args.model] | dict(depth=args.depth)
    needs = NEEDS if args.init == "identity" else {}
    try:
        model = ViT(
            args.image_size,
            args.patch_size,
            num_classes,
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


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """SOAP or AdamW. Biases, norms and embeddings, the second group, are not decayed."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        (plain if p.ndim < 2 or name.endswith(("cls_token", "pos_embed")) else decayed).append(p)
    groups = [
        dict(params=decayed, weight_decay=args.weight_decay),
        dict(params=plain, weight_decay=0.0),
    ]
    if args.opt == "soap":  # the paper's: the init and the optimizer complete each other
        # Staggered, because on a GPU refreshing all eigenbases in one step would take long.
        how = dict(lr=args.lr, stagger=True, precondition_frequency=args.refresh_every)
        optimizer = processes.sharing_state(groups, SOAP, **how)
    else:
        optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    if args.init == "identity" and args.skips != "mlp":  # or it would overwrite the pairs
        hold_pairs(optimizer, model)
    return optimizer


def lr_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """A line up to `peak` over `warmup` steps, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, batches, device: torch.device, amp: str) -> dict[str, float]:
    """Mean cross-entropy, and top-1 and top-5 accuracy in percent, over all processes' images."""
    model.eval()
    totals = torch.zeros(4, device=device)  # images, loss, top-1 hits, top-5 hits
    for images, labels in batches:
        images, labels = processes.on_device([images, labels], device)
        with autocast(device, amp):
            logits = model(normalise(images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[0] += len(labels)
        totals[1:] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    count, loss, top1, top5 = processes.mean_over_processes(totals).tolist()
    return dict(val_loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


def validation_loader(val_set, args: argparse.Namespace, device, rank: int, world: int):
    batches = Batches(len(val_set), min(256, args.batch_size), 0, False, rank, world)
    return loader_of(val_set, batches, args, device)


def evaluate_checkpoint(args: argparse.Namespace, checkpoint: dict) -> None:
    """What --eval does: print a checkpoint's accuracies on val."""
    device, rank, world = processes.start_processes(args.device)
    val_set = validation_set(args)
    check_classes(args, val_set, checkpoint)
    loader = validation_loader(val_set, args, device, rank, world)
    batches = processes.progress(loader, "val")
    result = evaluate(trained_vit(checkpoint).to(device), batches, device, args.amp)
    say(
        f"top-1 {result['top1']:.1f} %  top-5 {result['top5']:.1f} %  "
        f"({args.eval}, epoch {checkpoint['epoch']})"
    )


def check_classes(args: argparse.Namespace, val_set, checkpoint: dict) -> None:
    if checkpoint["classes"] != val_set.classes:
        data_name = args.data or "Shapes"
        raise UserError(f"{data_name} has other classes than the checkpoint was trained on")


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, checkpoint: dict | None, source: dict | None) -> None:
    device, rank, world = processes.start_processes(args.device)

    train_set, val_set = both_sets(args)
    classes, data_name = len(train_set.classes), args.data or "Shapes"
    if checkpoint:
        check_classes(args, val_set, checkpoint)
    parts = world * args.grad_accum
    processes.check_batch_size(args.batch_size, parts, len(train_set), data_name)
    val_loader = validation_loader(val_set, args, device, rank, world)
    batches = Batches(len(train_set), args.batch_size, args.seed, True, rank, world)
    loader = loader_of(train_set, batches, args, device)
    mix = mixing(args, classes)

    torch.manual_seed(args.seed)
    model = build_network(args, classes)
    if source:
        start_from_(model, source, train_set.classes)
    model.to(device)
    compiled = torch.compile(model) if args.compile else model
    network = processes.averaging_gradients(compiled, device)
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema else None
    parameters, averaged = list(model.parameters()), list(ema.parameters()) if ema else []
    optimizer = build_optimizer(args, model)
    if args.checkpoint_activations:
        processes.checkpoint_activations_(model)

    run = Run(
        args,
        "train_cls",
        arm_of(args),
        device,
        train_set,
        batches,
        kept=dict(model=model, ema=ema, optimizer=optimizer),
        panels=dict(loss="training loss", val_loss="validation loss", top1="val top-1, %"),
        checkpoint=checkpoint,
    )
    del checkpoint, source  # their copies of the weights, and the optimizer's state
    run.describe(model, data_name)
    say_twin(args, INIT)
    run.describe_memory(model, (3, args.image_size, args.image_size))
    for epoch in run.epochs():
        model.train()
        for images, labels in run.steps(loader):
            # Set by hand, because it is a function of the global step: nothing to resume.
            lr = lr_at(run.global_step, run.total_steps, run.warmup_steps, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # Normalised on the device, so that images travel there as uint8; mixed after that,
            # because labels become probabilities.
            images, labels = mix(normalise(images), labels)
            step_loss = 0.0
            for x, y in processes.micro_batches(network, args.grad_accum, images, labels):
                with autocast(device, args.amp):
                    logits = network(x).float()  # the loss in float32: bf16 has 8 bits
                    loss = F.cross_entropy(logits, y, label_smoothing=args.label_smoothing)
                (loss / args.grad_accum).backward()
                step_loss += loss.detach() / args.grad_accum
            norm = nn.utils.clip_grad_norm_(parameters, args.clip_grad or math.inf)
            run.add(loss=step_loss, grad_norm=norm)  # before the step: ends the run if not finite

            optimizer.step()
            optimizer.zero_grad()
            if ema:
                # It rises to --ema, or a short run's average would still hold the first weights.
                decay = min(args.ema, (1 + run.global_step) / (10 + run.global_step))
                with torch.no_grad():
                    torch._foreach_lerp_(averaged, parameters, 1 - decay)

        result = evaluate(ema or model, run.measuring(val_loader), device, args.amp)
        row = run.end_epoch(**result, lr=optimizer.param_groups[0]["lr"])
        say(
            f"epoch {epoch + 1:3d}  loss {row['loss']:.3f}  val loss {row['val_loss']:.3f}  top-1 "
            f"{row['top1']:.1f} %  top-5 {row['top5']:.1f} %  {row['images_per_s']:.0f} images/s"
        )

    final = run.history[-1]
    if final["loss"] > 0.99 * math.log(classes):
        say("note    nothing learned: the loss is that of guessing; try another --lr")
    say(
        f"top-1 {final['top1']:.1f} %  top-5 {final['top5']:.1f} %  "
        f"({final['epoch']} epochs, {final['minutes']:.1f} min)"
    )


def main() -> None:
    args, checkpoint, source = read_settings()
    if args.eval:
        evaluate_checkpoint(args, checkpoint)
    else:
        train(args, checkpoint, source)
    processes.end_processes()


if __name__ == "__main__":
    with errors_in_one_line("raise --grad-accum"):
        main()
