"""Train a Vision Transformer with labels, with or without skip connections.

    python train_cls.py --skipless                      the demo: CPU, no data, about 3 minutes
    python train_cls.py --skipless --data /imagenet     the paper's recipe: ViT-B/16, 300 epochs
    python train_cls.py --data /imagenet                the same network with its skips

DATA holds train/<class>/* and val/<class>/*. Without --data the images are drawn (`common.Shapes`).
Each run writes a folder: log.jsonl (a line an epoch), curves.png (this run and its siblings),
last.pt (the result) and best.pt (the epoch that did best on val: optimistic, do not report it).
`torchrun --nproc-per-node=N train_cls.py ...` trains on N GPUs, or on N CPU processes.
Numbers measured with each command, and on what hardware: README, "Results".
"""

import argparse
import contextlib
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2
from tqdm import tqdm

import common
from minskip import ViT

# --------------------------------------------------------------------------------------------------
# Settings: what each flag is when it is not given
# --------------------------------------------------------------------------------------------------

#                     demo    folder      (demo: Shapes; folder: --data, ImageNet in mind)
DEFAULTS = {
    "model":          ("nano", "base"),
    "image_size":     (32,     224),
    "patch_size":     (8,      16),
    "pool":           ("cls",  "cls"),
    "position_std":   (0.5,    0.02),
    "epochs":         (4,      300),
    "warmup_epochs":  (0.5,    5),
    "batch_size":     (64,     1024),
    "weight_decay":   (0.01,   0.05),
    "label_smoothing": (0.0,   0.1),
    "mixup":          (0.0,    0.8),
    "cutmix":         (0.0,    1.0),
    "clip_grad":      (1.0,    1.0),
    "ema":            (0.0,    0.0),
    "opt":            ("soap", "soap"),
    "seed":           (0,      0),
    "grad_accum":     (1,      1),
    "amp":            ("auto", "auto"),
    "device":         ("auto", "auto"),
    "workers":        (0,      common.CORES),
}  # fmt: skip
#                     residual  skipless
DROP_PATH =           (0.1,     0.0)  # with --data; in the demo 0 for both  # fmt: skip
#                     residual  skipless                residual  skipless
LEARNING_RATE = {     # demo                            # folder
    "soap":          ((5e-3,    3e-3),                  (3e-3,    1e-3)),
    "adamw":         ((2e-3,    3e-4),                  (1e-3,    2e-4)),
    "muon":          ((2e-3,    1e-3),                  (1e-3,    5e-4)),
}  # fmt: skip
CONDITIONED_INIT = (
    dict(alpha=0.7, beta=1.0, c=3.0),  # demo: more identity, as (2, 0.6) learns slowly at this size
    dict(alpha=2.0, beta=0.6, c=3.0),  # folder: the paper's constants for ViT-B with labels
)

SHAPES_TRAIN, SHAPES_VAL = 20_000, 2_000

# Flags that may differ between a run and its continuation without changing its result.
FREE_TO_CHANGE = {"data", "out", "device", "workers", "compile", "resume", "eval"}
FREE_IN_EVAL = {"batch_size", "amp"}  # ... nor the accuracy of a finished network, up to rounding


def parse_arguments() -> argparse.Namespace:
    """Flags as given; those not given are None, and `settle` fills them in."""
    p = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = common.trainer_flags(p, DEFAULTS, CONDITIONED_INIT)
    add("--data", "folder with train/<class>/* and val/<class>/*; left out: images are drawn")
    add("--weight-decay", "decoupled; not on biases, norms and embeddings; 0 .. 0.1", type=float)
    add("--grad-accum", "parts a batch is computed in; raise it when memory runs out", type=int)
    add("--mixup", "alpha of MixUp's beta distribution; 0 is off", type=float)
    add("--cutmix", "alpha of CutMix's; 0 is off, with both on each batch takes one", type=float)
    add("--label-smoothing", "share of the target spread over all classes, 0 .. 0.2", type=float)
    add("--clip-grad", "largest norm of the whole gradient; 0 is off", type=float)
    add(
        "--ema",
        "decay of averaged weights, which are then what val measures; 0 is off, 0.9999 "
        "usual for long runs",
        type=float,
    )
    add(
        "--eval",
        "measure this checkpoint on val and stop; the network is rebuilt from the file",
        metavar="CKPT",
    )
    return p.parse_args()


def settle(given: argparse.Namespace, stored: dict | None) -> argparse.Namespace:
    """The effective settings: as given, else as stored in a checkpoint, else by default.

    Ends the program when a flag contradicts the checkpoint or another flag.
    """
    if stored is not None:
        free = FREE_TO_CHANGE | (FREE_IN_EVAL if given.eval else set())
        stored = {"pool": "cls"} | stored  # checkpoints from before --pool
        return common.stored_settings(given, stored, free)
    args = common.settled(given, DEFAULTS, CONDITIONED_INIT, LEARNING_RATE, DROP_PATH)
    common.check_ranges(
        args,
        "image_size patch_size depth batch_size grad_accum epochs lr".split(),
        "weight_decay warmup_epochs mixup cutmix clip_grad position_std workers seed".split(),
        "label_smoothing ema drop_path".split(),
    )
    return args


# --------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: nn.Module, loader, device: torch.device, amp: str) -> dict:
    """Mean cross-entropy and top-1 and top-5 accuracy in percent, over all processes' images."""
    model.eval()
    totals = torch.zeros(4, device=device)  # images, loss, top-1 hits, top-5 hits
    silent = True if dist.is_initialized() and dist.get_rank() else None  # None: bars on terminals
    for images, labels in tqdm(loader, "val", disable=silent, leave=False):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with common.autocast(device, amp):
            logits = model(common.normalise(images)).float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals[0] += len(labels)
        totals[1:] += torch.stack([loss, best[:, 0].sum(), best.sum()])
    if dist.is_initialized():
        dist.all_reduce(totals)
    count, loss, top1, top5 = totals.tolist()
    return dict(val_loss=loss / count, top1=100 * top1 / count, top5=100 * top5 / count)


# --------------------------------------------------------------------------------------------------
# Schedule
# --------------------------------------------------------------------------------------------------


def warmup_cosine(optimizer, warmup_steps: int, steps: int) -> SequentialLR:
    """Linear rise over warmup_steps, then half a cosine down to zero at `steps`."""
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup_steps)
    if warmup_steps == 0:
        return cosine
    rise = LinearLR(optimizer, start_factor=1 / warmup_steps, total_iters=warmup_steps - 1)
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup_steps])


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def main() -> None:
    given = parse_arguments()
    if given.resume and given.eval:
        common.fail("--resume and --eval exclude each other; choose one")
    path = given.resume or given.eval
    checkpoint = common.load_checkpoint(path, "train_cls") if path else None
    args = settle(given, checkpoint["args"] if checkpoint else None)
    device, rank, world = common.start_processes(args.device)
    main_process = rank == 0
    say = print if main_process else (lambda *_, **__: None)

    # ---- data ------------------------------------------------------------------------------------
    if args.data is None:
        train_set = common.Shapes("train", SHAPES_TRAIN, args.image_size)
        val_set = common.Shapes("val", SHAPES_VAL, args.image_size)
        data_name = "Shapes"
    else:
        train_set, val_set = common.image_folders(args.data, check=main_process)
        data_name = args.data
    classes = train_set.classes
    if checkpoint and checkpoint["classes"] != classes:
        common.fail(f"{data_name} has other classes than checkpoint {path} was trained on")
    part, rest = divmod(args.batch_size, world * args.grad_accum)
    if (rest or not part) and not args.eval:
        common.fail(
            f"--batch-size {args.batch_size} must be a multiple of processes x --grad-accum = "
            f"{world} x {args.grad_accum}"
        )
    if args.batch_size > len(train_set) and not args.eval:
        common.fail(
            f"--batch-size {args.batch_size} exceeds the {len(train_set)} training images of "
            f"{data_name}; make it smaller"
        )
    to_train, to_val = common.augmentations(args.image_size, drawn=args.data is None)
    train_batches = common.Batches(len(train_set), args.batch_size, args.seed, True, rank, world)
    val_batches = common.Batches(len(val_set), 256, 0, False, rank, world)
    train_loader = common.make_loader(
        common.Seeded(train_set, to_train), train_batches, args.workers, device
    )
    val_loader = common.make_loader(
        common.Seeded(val_set, to_val), val_batches, args.workers, device
    )

    # ---- model -----------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    if args.eval:
        model = common.model_of(checkpoint)
    elif checkpoint:
        model = ViT(**checkpoint["model_config"])
    else:
        model = common.build_vit(args, len(classes))
    model.to(device)
    stem, line = common.described(model, args)
    stem = f"cls-{stem}"
    say(line)
    say(
        f"data    {data_name}: {len(train_set)} train, {len(val_set)} val, {len(classes)} classes, "
        f"{args.image_size} px in patches of {args.patch_size}"
    )

    if args.eval:
        result = evaluate(model, val_loader, device, args.amp)
        say(
            f"top-1 {result['top1']:.1f} %  top-5 {result['top5']:.1f} %  "
            f"({args.eval}, epoch {checkpoint['epoch']})"
        )
        return

    # ---- optimizer, schedule, resume -------------------------------------------------------------
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema)) if args.ema else None
    measured = ema or model
    optimizers = common.build_optimizers(model, args.opt, args.lr, args.weight_decay)
    steps_an_epoch = len(train_batches)
    warmup_steps = round(args.warmup_epochs * steps_an_epoch)
    if warmup_steps >= args.epochs * steps_an_epoch:
        common.fail(
            f"--warmup-epochs {args.warmup_epochs} leaves no step of the {steps_an_epoch} x "
            f"{args.epochs} for training; make it smaller"
        )
    schedules = [warmup_cosine(o, warmup_steps, args.epochs * steps_an_epoch) for o in optimizers]
    mixes = []
    if args.mixup:
        mixes.append(v2.MixUp(alpha=args.mixup, num_classes=len(classes)))
    if args.cutmix:
        mixes.append(v2.CutMix(alpha=args.cutmix, num_classes=len(classes)))
    mix = v2.RandomChoice(mixes) if mixes else None

    history, first_epoch, first_step, seconds = [], 0, 0, 0.0
    loss_sum = torch.zeros((), device=device)  # of this process, over the epoch's steps
    if checkpoint:
        common.check_same_run(args.resume, checkpoint, len(train_set), world)
        model.load_state_dict(checkpoint["model"])
        if ema:
            ema.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for schedule, state in zip(schedules, checkpoint["schedules"], strict=True):
            schedule.load_state_dict(state)
        history, first_epoch = checkpoint["history"], checkpoint["epoch"]
        first_step, seconds = checkpoint["step"], checkpoint["seconds"]
        loss_sum += checkpoint["loss_sum"]
        out = common.resumed_folder(args, given.out, stem)
        say(f"resume  {args.resume} at epoch {first_epoch}, step {first_step}")
    else:
        out = common.run_folder(args.out, stem, args.seed)
    if main_process:
        common.make_folder(out)
    say(
        f"train   {args.epochs} epochs of {steps_an_epoch} steps of {args.batch_size}, {args.opt}, "
        f"lr {args.lr:g}, weight decay {args.weight_decay:g}, on {device} x {world}, "
        f"{'bf16' if common.uses_bf16(device, args.amp) else 'float32'}"
    )
    say(f"files   {out}")
    stored_args = {k: v for k, v in vars(args).items() if k not in ("resume", "eval")}
    say("flags   " + " ".join(f"{k}={v}" for k, v in sorted(stored_args.items())))

    network = torch.compile(model) if args.compile else model
    network = common.in_processes(network, device)

    def save(name: str, epoch: int, step: int) -> None:
        if main_process:
            common.save_checkpoint(
                out / name,
                script="train_cls",
                args=stored_args,
                classes=classes,
                images=len(train_set),
                processes=world,
                model_config=model.config,
                model=model.state_dict(),
                ema=ema.state_dict() if ema else None,
                optimizers=[o.state_dict() for o in optimizers],
                schedules=[s.state_dict() for s in schedules],
                history=history,
                epoch=epoch,
                step=step,
                seconds=seconds + time.time() - started,
                loss_sum=float(loss_sum),
            )

    def save_now(epoch: int, step: int) -> None:
        loss_sum.copy_(common.mean_over_processes(loss_sum))
        save("last.pt", epoch, step)

    def break_off(what: str, epoch: int, step: int) -> None:
        common.break_off(what, out, epoch, step, optimizers[0].param_groups[0]["lr"])

    # ---- training --------------------------------------------------------------------------------
    # Reading a number off the GPU waits for it, so the loss is looked at now and then only.
    look_every = 1 if device.type == "cpu" else 20
    stop = common.StopSignal()
    started = time.time()
    for epoch in range(first_epoch, args.epochs):
        model.train()
        train_batches.epoch, train_batches.first = epoch, first_step
        epoch_started = time.time()
        bar = common.epoch_bar(train_loader, train_batches, args.epochs)
        for step, (images, labels) in enumerate(bar, start=first_step):
            # for MixUp, CutMix and drop-path
            torch.manual_seed(common.mixed_seeds(1, common.STEP, args.seed, epoch, step, rank)[0])
            images = common.normalise(images.to(device, non_blocking=True))
            labels = labels.to(device, non_blocking=True)
            if mix is not None:
                images, labels = mix(images, labels)
            for i in range(args.grad_accum):
                mine = slice(i * part, (i + 1) * part)
                waits = world > 1 and i + 1 < args.grad_accum
                with network.no_sync() if waits else contextlib.nullcontext():
                    with common.autocast(device, args.amp):
                        logits = network(images[mine])
                        loss = F.cross_entropy(
                            logits.float(), labels[mine], label_smoothing=args.label_smoothing
                        )
                    (loss / args.grad_accum).backward()
                loss_sum += loss.detach() / args.grad_accum
            if args.clip_grad:
                nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            last = step + 1 == steps_an_epoch
            if last or (step + 1) % look_every == 0:
                # of all processes: they must leave together
                mean_loss = float(common.mean_over_processes(loss_sum)) / (step + 1)
                if not math.isfinite(mean_loss):
                    break_off(f"the loss is {mean_loss}", epoch, step)
                bar.set_postfix(loss=f"{mean_loss:.3f}", lr=f"{schedules[0].get_last_lr()[0]:.1e}")
            try:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            except torch.linalg.LinAlgError:
                break_off("SOAP found no eigenvectors (a gradient not finite?)", epoch, step)
            for schedule in schedules:
                schedule.step()
            if ema:
                ema.update_parameters(model)
            if not last and (step + 1) % look_every == 0:
                common.leave_if_asked(stop, device, save_now, out, epoch, step + 1)
        bar.close()

        # ---- end of an epoch ---------------------------------------------------------------------
        train_loss = float(common.mean_over_processes(loss_sum)) / steps_an_epoch
        loss_sum.zero_()
        rate = (steps_an_epoch - first_step) * args.batch_size / (time.time() - epoch_started)
        first_step = 0
        row = dict(epoch=epoch + 1, train_loss=train_loss)
        row |= evaluate(measured, val_loader, device, args.amp)
        if not math.isfinite(row["val_loss"]):
            break_off(f"the validation loss is {row['val_loss']}", epoch, steps_an_epoch - 1)
        minutes = (seconds + time.time() - started) / 60
        row |= dict(lr=schedules[0].get_last_lr()[0], images_per_s=round(rate, 1))
        row |= dict(minutes=round(minutes, 3))
        history.append(row)
        say(
            f"epoch {epoch + 1:3d}  loss {train_loss:.3f}  val loss {row['val_loss']:.3f}  top-1 "
            f"{row['top1']:.1f} %  top-5 {row['top5']:.1f} %  {rate:.0f} images/s"
        )
        save("last.pt", epoch + 1, 0)
        if row["top1"] >= max(r["top1"] for r in history):
            save("best.pt", epoch + 1, 0)
        if main_process:
            common.write_log(out / "log.jsonl", history)
            common.plot_curves(out, dict(train_loss="training loss", top1="val top-1, %"))
        if epoch + 1 < args.epochs:
            common.leave_if_asked(stop, device, save_now, out, epoch + 1, 0)

    final = history[-1]
    say(
        f"top-1 {final['top1']:.1f} %  top-5 {final['top5']:.1f} %  "
        f"({final['epoch']} epochs, {final['minutes']:.1f} min)"
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    with common.one_line_errors("raise --grad-accum"):
        main()
