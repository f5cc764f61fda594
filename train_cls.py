"""Train a Vision Transformer with labels, with or without skip connections.

    python train_cls.py --skipless                      the demo: CPU, no data, some minutes
    python train_cls.py --skipless --data /imagenet     ViT-B/16, 300 epochs, on GPUs
    python train_cls.py --data /imagenet                the same network with its skips

DATA holds train/<class>/* and val/<class>/*. Without --data the images are synthetic (`shapes.py`).
Each run writes a folder: log.jsonl (a line an epoch), curves.png and last.pt, the result.
`torchrun --nproc-per-node=N train_cls.py ...` trains on N GPUs, or on N CPU processes.
Numbers measured with each command, and on what hardware: README and results/README.md.

Of the recipe for folders the paper's (arXiv 2510.00345) are: no skips, the init and its constants,
SOAP, ViT-B, 300 epochs. The rest is customary for ViTs (DeiT), the learning rates are ours, from
small runs.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import cli
import engine
import files
import identity_init
import networks
from data import Batches, augmentations, image_folder, image_folders, make_loader, normalise
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
    pos_embed_std=0.5,  # larger than customary: learns faster, with skips and without
    alpha=2.0,  # of --init paper: the paper's constants for ViT-B with labels
    beta=0.6,
    c=3.0,
    opt="soap",
    lr=dict(soap=5e-3, adamw=2e-3),
    epochs=3,
    warmup_epochs=0.5,
    batch_size=64,
    weight_decay=0.01,
    clip_grad=1.0,
    label_smoothing=0.0,
    mixup=0.0,
    cutmix=0.0,
    drop_path=0.0,
    ema=0.0,
    workers=0,  # drawing an image takes less than sending it to another process
    eval=None,
)
FOLDER = dict(  # --data, with ImageNet in mind
    model="base",
    image_size=224,
    patch_size=16,
    pos_embed_std=0.02,
    lr=dict(soap=3e-3, adamw=1e-3),
    epochs=300,
    warmup_epochs=5,
    batch_size=1024,
    weight_decay=0.05,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    drop_path=0.1,
    workers=cli.CORES,
)
SKIPLESS = dict(  # --skipless, over either; the paper's init where it was published
    init=dict(nano="identity", tiny="identity", small="identity", base="paper", large="identity"),
    # A step changes all that follows, as no skip carries x past it. The identity init alone stands
    # a residual network's rate, and takes it.
    lr=dict(
        paper=dict(soap=1e-3, adamw=2e-4),
        default=dict(soap=3e-4, adamw=2e-4),
    ),
    drop_path=0.0,  # a dropped sub-block would leave nothing
)
SHAPES_TRAIN, SHAPES_VAL = 20_000, 2_000


def parse_arguments() -> tuple[argparse.Namespace, dict | None]:
    """(the settings of this run, the checkpoint that --resume or --eval names)."""
    p, add = cli.trainer_flags(__doc__, DEMO, FOLDER, SKIPLESS)
    add("--weight-decay", "not on biases, norms and embeddings; 0 .. 0.1", cli.not_negative)
    add("--mixup", "alpha of MixUp's beta distribution; 0 is off", cli.not_negative)
    add("--cutmix", "alpha of CutMix's; with both on each batch takes one", cli.not_negative)
    add("--label-smoothing", "share of the target spread over all classes, 0 .. 0.2", cli.share)
    add("--clip-grad", "largest norm of the whole gradient; 0 is off", cli.not_negative)
    add(
        "--ema",
        "decay of averaged weights, which are then what val measures; 0 is off, 0.9999 usual",
        cli.share,
    )
    add("--eval", "measure this checkpoint on val and stop", cli.path, metavar="CKPT")
    explicit = vars(p.parse_args())
    if "resume" in explicit and "eval" in explicit:
        cli.fail("--resume and --eval exclude each other; choose one")
    path = explicit.get("resume") or explicit.get("eval")
    checkpoint = files.load_checkpoint(path, "train_cls") if path else None
    # up to rounding these change nothing either
    free = cli.FREE_TO_CHANGE | ({"batch_size", "amp"} if "eval" in explicit else {"grad_accum"})
    stored = checkpoint and cli.stored_settings(p, DEMO, checkpoint)
    return cli.settle(explicit, DEMO, FOLDER, SKIPLESS, stored, free), checkpoint


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, loader, device: torch.device, amp: str) -> dict:
    """Mean cross-entropy and top-1 and top-5 accuracy in percent, over all processes' images."""
    model.eval()
    totals = torch.zeros(4, device=device)  # images, loss, top-1 hits, top-5 hits
    for images, labels in engine.progress(loader, "val"):
        images, labels = engine.on_device([images, labels], device)
        with engine.autocast(device, amp):
            logits = model(normalise(images)).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[0] += len(labels)
        totals[1:] += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    count, loss, top1, top5 = engine.mean_over_processes(totals).tolist()
    return dict(val_loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def load_sets(args: argparse.Namespace):
    """(training set or None with --eval, validation set)."""
    if args.data is None:
        train = Shapes("train", SHAPES_TRAIN, args.image_size)
        return train, Shapes("val", SHAPES_VAL, args.image_size)
    if args.eval:
        return None, image_folder(args.data, "val")
    return image_folders(args.data, check=engine.main_process())


def mixing(args: argparse.Namespace, classes: int):
    """MixUp, CutMix, one of them at random for each batch, or neither."""
    mixes = [v2.MixUp(alpha=args.mixup, num_classes=classes)] if args.mixup else []
    mixes += [v2.CutMix(alpha=args.cutmix, num_classes=classes)] if args.cutmix else []
    return v2.RandomChoice(mixes) if mixes else lambda images, labels: (images, labels)


def main() -> None:
    args, checkpoint = parse_arguments()
    device, rank, world = engine.start_processes(args.device)

    train_set, val_set = load_sets(args)
    classes, data_name = val_set.classes, args.data or "Shapes"
    if checkpoint and checkpoint["classes"] != classes:
        cli.fail(f"{data_name} has other classes than the checkpoint was trained on")
    to_train, to_val = augmentations(args.image_size, drawn=args.data is None)
    val_batches = Batches(len(val_set), min(256, args.batch_size), 0, False, rank, world)
    val_loader = make_loader(val_set, to_val, val_batches, args.workers, device)
    if args.eval:
        model = networks.trained_vit(checkpoint).to(device)
        result = evaluate(model, val_loader, device, args.amp)
        if not math.isfinite(result["val_loss"]):
            cli.fail(f"{args.eval}: its network's output is not finite; use an earlier checkpoint")
        engine.say(
            f"top-1 {result['top1']:.1f} %  top-5 {result['top5']:.1f} %  "
            f"({args.eval}, epoch {checkpoint['epoch']})"
        )
        return engine.end_processes()
    engine.check_batch_size(args.batch_size, world * args.grad_accum, len(train_set), data_name)
    batches = Batches(len(train_set), args.batch_size, args.seed, True, rank, world)
    loader = make_loader(train_set, to_train, batches, args.workers, device)
    mix = mixing(args, len(classes))

    torch.manual_seed(args.seed)
    model = networks.build_vit(args, len(classes), checkpoint).to(device)
    network = engine.in_processes(torch.compile(model) if args.compile else model, device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    optimizer = engine.build_optimizer(model, args.opt, args.lr, args.weight_decay)
    if args.init == "identity":
        identity_init.hold_pairs(optimizer, model)
    if args.checkpoint_activations:
        engine.checkpoint_activations_(model)

    run = Run(
        args,
        "cls",
        device,
        train_set,
        batches,
        kept=dict(model=model, ema=ema, optimizer=optimizer),
        panels=dict(loss="training loss", top1="val top-1, %"),
        checkpoint=checkpoint,
    )
    del checkpoint  # its copy of the weights and the optimizer's state
    run.describe(model, data_name)
    run.describe_memory(model, (3, args.image_size, args.image_size))
    for epoch in run.epochs():
        model.train()
        for images, labels in run.steps(loader):
            lr = engine.lr_at(run.global_step, run.total_steps, run.warmup_steps, args.lr)
            images, labels = mix(normalise(images), labels)
            step_loss = 0.0
            parts = engine.micro_batches(network, args.grad_accum, images, labels)
            for some_images, some_labels in parts:
                with engine.autocast(device, args.amp):
                    logits = network(some_images).float()
                    loss = F.cross_entropy(
                        logits, some_labels, label_smoothing=args.label_smoothing
                    )
                (loss / args.grad_accum).backward()
                step_loss += loss.detach() / args.grad_accum
            norm = nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            run.add(loss=step_loss, grad_norm=norm)  # ends the run if one is not finite
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(model)

        row = run.end_epoch(**evaluate(ema or model, val_loader, device, args.amp), lr=lr)
        engine.say(
            f"epoch {epoch + 1:3d}  loss {row['loss']:.3f}  val loss {row['val_loss']:.3f}  top-1 "
            f"{row['top1']:.1f} %  top-5 {row['top5']:.1f} %  {row['images_per_s']:.0f} images/s"
        )

    final = run.history[-1]
    if final["loss"] > 0.99 * math.log(len(classes)):
        engine.say("note    nothing learned: the loss is that of guessing; try another --lr")
    engine.say(
        f"top-1 {final['top1']:.1f} %  top-5 {final['top5']:.1f} %  "
        f"({final['epoch']} epochs, {final['minutes']:.1f} min)"
    )
    engine.end_processes()


if __name__ == "__main__":
    with cli.one_line_errors("raise --grad-accum"):
        main()
