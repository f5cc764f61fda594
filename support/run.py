"""The part of a training run that is not the method: resuming, seeds, logs, saving, stopping."""

import argparse
import math
import signal
import textwrap
import time
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from support import files, pictures
from support.data import STEP, Batches, listing, mixed_seeds
from support.errors import UserError
from support.memory import say_memory
from support.processes import (
    main_process,
    max_over_processes,
    mean_over_processes,
    on_device,
    progress,
    say,
    uses_bf16,
    whole_state,
)

LOOK_EVERY = 2  # seconds between two looks whether to stop: torchrun kills 30 s after SIGTERM


class Run:
    """A training loop's surroundings, so that the loop shows only the method:

        for epoch in run.epochs():                   # from where a resumed run left off
            for batch in run.steps(loader):          # on the device, random numbers seeded
                ...                                  # forward, loss, backward
                run.add(loss=loss, grad_norm=norm)   # for the log; ends the run if not finite
                optimizer.step()
            run.end_epoch(**evaluate(model, run.measuring(loader)))  # log, picture, checkpoint

    Args:
        args: the settings of the run.
        script: the trainer's name, which a checkpoint records.
        arm: the network's name in a comparison, as "skipless-paper".
        kept: name -> what a checkpoint holds: anything with a state_dict, or a tensor; None is left
            out. "model" is the `ViT` that the run is about.
        panels: key of the log -> title of its panel in the picture.
        checkpoint: the one to continue from, or None.

    `step` counts the steps made in this epoch, `global_step` all of them, out of `total_steps`.
    Raises UserError where the run cannot go on, KeyboardInterrupt once it has saved on a signal.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        script: str,
        arm: str,
        device: torch.device,
        train_set: Dataset,
        batches: Batches,
        kept: dict,
        panels: dict[str, str],
        checkpoint: dict | None,
    ):
        self.args, self.arm, self.device = args, arm, device
        self.batches, self.panels = batches, panels
        self.kept = {name: x for name, x in kept.items() if x is not None}
        stored = {k: v for k, v in vars(args).items() if k not in ("resume", "eval")}
        self.facts = dict(
            script=script, args=stored, model_config=kept["model"].config,
            classes=train_set.classes, listing=listing(train_set), images=batches.length,
            processes=batches.world,
        )  # fmt: skip
        self.epoch = self.step = 0
        self.seconds, self.history, self.sums = 0.0, [], {}
        self.rate = 0.0  # images per second
        self.silent = True  # nothing was said of the training yet
        self.saved, self.saved_at = None, -math.inf  # (epoch, step), and when
        # Reading a number from the GPU waits for all its work, so there we do it only now and then.
        self.rarest = 1 if device.type == "cpu" else 20
        self.total_steps = args.epochs * len(batches)
        self.warmup_steps = round(args.warmup_epochs * len(batches))
        if self.warmup_steps >= self.total_steps:
            raise UserError(
                f"--warmup-epochs {args.warmup_epochs} leaves no step to train; make it smaller"
            )
        if checkpoint:
            self.restore(checkpoint)
        stem = f"{script.removeprefix('train_')}-{args.model}-{arm}-{args.opt}"
        self.out = files.run_folder(args.out, stem, args.seed, args.resume)
        if main_process():
            files.make_folder(self.out)
            files.lock(self.out)
            files.write_log(self.out / "log.jsonl", self.history)  # fails now if it ever will
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self.receive)
        self.started = time.time()
        if args.resume and args.out:  # a resumed run in a new folder: write what it has so far
            if dist.is_initialized():
                dist.barrier()  # until every process has seen that the folder held no run
            self.write()

    @property
    def global_step(self) -> int:
        return self.epoch * len(self.batches) + self.step

    def epochs(self) -> Iterator[int]:
        while self.epoch < self.args.epochs:
            self.batches.epoch, self.batches.first = self.epoch, self.step
            self.epoch_started = time.time()
            yield self.epoch
            left = self.args.epochs - self.epoch
            minutes = left * (time.time() - self.epoch_started) / 60
            if self.epoch == 1 and minutes > 1:
                say(f"about {minutes:.0f} minutes to go")
            if left:
                self.leave_if_asked()

    def steps(self, loader: DataLoader) -> Iterator[list]:
        title = f"epoch {self.epoch + 1}/{self.args.epochs}"
        bar = progress(loader, title, total=len(self.batches), initial=self.step)
        for batch in self.watched(bar, len(self.batches) - self.step):
            numbers = STEP, self.args.seed, self.epoch, self.step, self.batches.rank
            torch.manual_seed(mixed_seeds(1, *numbers)[0])  # for MixUp, CutMix and drop-path
            yield on_device(batch, self.device)
            self.step += 1
            if self.reading:
                bar.set_postfix(loss=f"{self.sums['loss'].item() / self.step:.3f}")
            seconds = time.time() - self.epoch_started
            if bar.disable and self.silent and seconds > 30:  # who reads a log file sees no bar
                self.silent = False
                minutes = seconds * len(self.batches) / (self.step - self.batches.first) / 60
                loss = self.sums["loss"].item() / self.step
                say(f"{title}, step {self.step}: loss {loss:.3f}, {minutes:.1f} minutes an epoch")
        if made := self.step - self.batches.first:  # none, if it was stopped during the evaluation
            self.rate = made * self.batches.batch_size / (time.time() - self.epoch_started)

    def measuring(self, loader: DataLoader) -> Iterator[list]:
        """The batches of an evaluation, which a signal interrupts as it does the training."""
        yield from self.watched(progress(loader, "measuring"), len(loader))

    def watched(self, batches: Iterable, total: int) -> Iterator:
        """Batches, and every few seconds a look whether to stop, in all processes after the same.

        `reading` is true with those after which it looks, and with the last one. total: of batches;
        an evaluation's last one may be too small to give each process a part.
        """
        due, looked, then = 1, 0, time.time()
        for number, batch in enumerate(batches, start=1):
            self.reading = number in (due, total)
            yield batch
            if number == due < total:
                self.leave_if_asked()
                seconds = (time.time() - then) / (number - looked)  # one batch takes
                seconds = max_over_processes(seconds, self.device)
                wait = int(LOOK_EVERY / max(seconds, 1e-3))
                due, looked, then = number + max(1, min(wait, self.rarest)), number, time.time()

    def add(self, **numbers: Tensor) -> None:
        """Add a step's numbers to the epoch's sums. Call it before the optimizer's step."""
        for name, x in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + x.detach()
        if self.reading:
            # the sums of all processes, because they must leave together
            sums = mean_over_processes(torch.stack(list(self.sums.values()))).tolist()
            for name, value in zip(self.sums, sums):
                if not math.isfinite(value):
                    self.break_off(f"the {name} is {value}")

    def end_epoch(self, **measured: float | None) -> dict:
        """Write log, picture and checkpoint of an epoch. Returns its row of the log."""
        minutes = (self.seconds + time.time() - self.started) / 60
        row = dict(epoch=self.epoch + 1)
        row |= {k: mean_over_processes(x).item() / self.step for k, x in self.sums.items()}
        row |= measured | dict(images_per_s=round(self.rate, 1), minutes=round(minutes, 3))
        self.history.append(row)
        self.epoch, self.step, self.sums, self.silent = self.epoch + 1, 0, {}, False
        # The log may run ahead of the checkpoint: a resumed run first cuts it to its own rows.
        minutes = max_over_processes(time.time() - self.saved_at, self.device) / 60
        self.write(save=self.epoch == self.args.epochs or minutes >= self.args.save_every)
        return row

    def write(self, save: bool = True) -> None:
        """Write the files of the folder, for the epochs so far; the checkpoint only if `save`."""
        if save:
            self.save()
        if main_process() and self.history:
            files.write_log(self.out / "log.jsonl", self.history)
            curves = self.out / "curves.png"
            pictures.draw_curves(curves, self.out.name, self.history, self.panels)

    # ---- interruption ----------------------------------------------------------------------------

    def receive(self, number: int, frame) -> None:
        """Note Ctrl-C, SIGTERM or a closed terminal; the loop acts on it. A second Ctrl-C ends the
        program at once, but a second SIGTERM does not: a batch system and torchrun both send one.
        """
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave_if_asked(self) -> None:
        """After Ctrl-C or SIGTERM save, unless that was just done, and raise KeyboardInterrupt."""
        # All leave at the same place, or some would wait for the others.
        number = int(max_over_processes(self.signal, self.device))
        if not number:
            return
        if self.saved != (self.epoch, self.step):
            self.save()
        where = f"epoch {self.epoch + 1}, step {self.step}"
        say(f"stopped at {where}; continue with --resume {self.out / 'last.pt'}")
        if dist.is_initialized():
            dist.barrier()  # torchrun ends all processes when the first one leaves: save before
        raise KeyboardInterrupt(number)

    def break_off(self, problem: str) -> None:
        """End a run that has gone wrong; the last checkpoint was good and stays."""
        last = self.out / "last.pt"
        raise UserError(
            f"{problem} at epoch {self.epoch + 1}, step {self.step + 1}; "
            f"{f'{last} is kept' if last.exists() else 'nothing saved yet'}. Usual causes: --lr "
            f"{self.args.lr:g} too large, --warmup-epochs too short, gradients not clipped",
            code=1,
        )

    def save(self) -> None:
        sums = {name: mean_over_processes(x).item() for name, x in self.sums.items()}
        # The steps since the last look at the loss may have broken the weights: keep the old file.
        weights = [
            p for x in self.kept.values() if isinstance(x, nn.Module) for p in x.parameters()
        ]
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
            self.break_off("a weight is not finite")
        states = {k: whole_state(x) for k, x in self.kept.items()}
        place = dict(epoch=self.epoch, step=self.step, sums=sums, history=self.history)
        place |= dict(seconds=self.seconds + time.time() - self.started, rate=self.rate)
        if main_process():
            files.save_checkpoint(self.out / "last.pt", self.facts | states | place)
        self.saved, self.saved_at = (self.epoch, self.step), time.time()

    def restore(self, checkpoint: dict) -> None:
        had, has = checkpoint["images"], self.facts["images"]
        if (had, checkpoint["listing"]) != (has, self.facts["listing"]):
            others = f"{has} others" if had == has else f"{has}"
            raise UserError(
                f"--resume {self.args.resume}: that run had {had} training images, this folder has "
                f"{others}; give it the same images"
            )
        had, has = checkpoint["processes"], self.facts["processes"]
        if had != has:  # a preempted job may come back with others
            say(f"note    {had} processes before, {has} now: the same batches, but other random")
            say("        numbers for MixUp, CutMix and drop-path than in an uninterrupted run")
        had, has = checkpoint["args"]["epochs"], self.args.epochs
        if had != has:
            rule = f"from here on the schedule is that of {has}"
            say(f"note    {had} epochs before, {has} now: {rule}")
        try:
            for name, x in self.kept.items():
                if isinstance(x, Tensor):
                    x.copy_(checkpoint[name])
                else:
                    x.load_state_dict(checkpoint[name])
            self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
            self.seconds, self.history = checkpoint["seconds"], checkpoint["history"]
            self.rate = checkpoint["rate"]
            sums = checkpoint["sums"].items()
            self.sums = {name: torch.tensor(x, device=self.device) for name, x in sums}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"checkpoint {self.args.resume} is damaged or of another version "
                f"({type(error).__name__}: {str(error)[:200]}); use another"
            ) from error

    # ---- what a person reads ---------------------------------------------------------------------

    def describe(self, model: nn.Module, data_name: str) -> None:
        """Print what the run is."""
        a, size = self.args, model.config["image_size"]
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        precision = "bf16" if uses_bf16(self.device, a.amp) else "float32"
        say(f"model   ViT {a.model}, {self.arm}, {a.depth} blocks, {parameters:.2f} M parameters")
        say(f"data    {data_name}: {self.batches.length} training images of {size} px")
        say(f"train   {a.epochs} epochs of {len(self.batches)} steps of {a.batch_size}, {a.opt}, "
              f"lr {a.lr:g}, on {self.device} x {self.batches.world}, {precision}")  # fmt: skip
        say(f"files   {self.out}")
        flags = "flags   " + " ".join(f"{k}={v}" for k, v in sorted(self.facts["args"].items()))
        say(textwrap.fill(flags, 100, subsequent_indent=8 * " ", break_on_hyphens=False))
        if a.init in ("paper", "identity") and not a.skipless:
            say(f"note    --init {a.init} without --skipless: a residual network starts from it")
        if len(self.batches) < 10:
            say("note    fewer than ten steps in an epoch: a smaller --batch-size learns more")
        if a.resume and self.epoch == a.epochs:
            say(f"resume  {a.resume} is finished: nothing is left to train")
        elif a.resume:
            say(f"resume  {a.resume} at epoch {self.epoch + 1}, step {self.step}")

    def describe_memory(self, network: nn.Module, *shapes: tuple[int, ...]) -> None:
        """Print an estimate of the memory of a step; shapes: of one image in each of its inputs."""
        a = self.args
        if not a.checkpoint_activations:  # which autograd does not report
            at_once = a.batch_size // (self.batches.world * a.grad_accum)
            say_memory(network, shapes, at_once, a.opt, self.device, a.amp)
