"""The part of a training run that is not the method: resuming, seeds, logs, saving, stopping."""

import argparse
import math
import signal
import textwrap
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import files
import networks
import pictures
from cli import fail
from data import STEP, Batches, listing, mixed_seeds
from engine import (
    main_process,
    mean_over_processes,
    on_device,
    progress,
    say,
    say_memory,
    uses_bf16,
    whole_state,
)


def is_row(row) -> bool:
    """Whether it is a row of a log: an epoch and other numbers, or None, by name."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    numbers = [x for x in row.values() if x is not None]
    return all(type(x) is float or (type(x) is int and abs(x) < 2**53) for x in numbers)


class Run:
    """A training loop's surroundings, so that the loop shows the method alone:

        for epoch in run.epochs():                   # from where a resumed run left off
            for batch in run.steps(loader):          # on the device, random numbers seeded
                ...                                  # forward, loss, backward
                run.add(loss=loss, grad_norm=norm)   # for the log; ends the run if not finite
                optimizer.step()
            run.end_epoch(**evaluate(...))           # log, picture, checkpoint

    kind: cls or ssl. kept: what a checkpoint holds by name, anything with a state_dict, or tensors.
    Its `model` is the `ViT` that it is for. panels: log key -> title, of the picture. `step` counts
    the steps made in this epoch, `global_step` in all, of `total_steps`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        kind: str,
        device: torch.device,
        train_set: Dataset,
        batches: Batches,
        kept: dict,
        panels: dict[str, str],
        checkpoint: dict | None,
    ):
        self.args, self.device, self.batches, self.panels = args, device, batches, panels
        self.kept = {name: x for name, x in kept.items() if x is not None}
        stored = {k: v for k, v in vars(args).items() if k not in ("resume", "eval")}
        self.facts = dict(
            script=f"train_{kind}", args=stored, model_config=kept["model"].config,
            classes=train_set.classes, listing=listing(train_set), images=batches.length,
            processes=batches.world,
        )  # fmt: skip
        self.arm = networks.arm_of(args)
        self.epoch = self.step = 0
        self.seconds, self.history, self.sums = 0.0, [], {}
        # Reading a number off the GPU waits for it, so there it is looked at now and then only.
        self.look_every = 1 if device.type == "cpu" else 20
        self.total_steps = args.epochs * len(batches)
        self.warmup_steps = round(args.warmup_epochs * len(batches))
        if self.warmup_steps >= self.total_steps:
            fail(f"--warmup-epochs {args.warmup_epochs} leaves no step to train; make it smaller")
        if checkpoint:
            self.restore(checkpoint)
        stem = f"{kind}-{args.model}-{self.arm}-{args.opt}"
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
        if args.resume and args.out:  # a folder of its own is whole from the start
            if dist.is_initialized():
                dist.barrier()  # until all have seen that it had none
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

    def looks(self, step: int) -> bool:
        return step % self.look_every == 0 or step == len(self.batches)

    def steps(self, loader: DataLoader) -> Iterator[list]:
        title = f"epoch {self.epoch + 1}/{self.args.epochs}"
        bar = progress(loader, title, total=len(self.batches), initial=self.step)
        for batch in bar:
            numbers = STEP, self.args.seed, self.epoch, self.step, self.batches.rank
            torch.manual_seed(mixed_seeds(1, *numbers)[0])  # for MixUp, CutMix and drop-path
            yield on_device(batch, self.device)
            self.step += 1
            if self.looks(self.step):
                bar.set_postfix(loss=f"{self.sums['loss'].item() / self.step:.3f}")
                if self.step < len(self.batches):
                    self.leave_if_asked()
        self.steps_ended = time.time()

    def add(self, **numbers: Tensor) -> None:
        """Add a step's numbers to the epoch's sums. Call it before the optimizer's step."""
        for name, x in numbers.items():
            self.sums[name] = self.sums.get(name, 0) + x.detach()
        if self.looks(self.step + 1):
            # of all processes: they must leave together
            sums = mean_over_processes(torch.stack(list(self.sums.values()))).tolist()
            for name, value in zip(self.sums, sums):
                if not math.isfinite(value):
                    self.break_off(f"the {name} is {value}")

    def end_epoch(self, **measured: float | None) -> dict:
        """Log, picture and checkpoint of an epoch. Returns its row of the log."""
        images = (self.step - self.batches.first) * self.batches.batch_size
        rate = images / (self.steps_ended - self.epoch_started)
        minutes = (self.seconds + time.time() - self.started) / 60
        row = dict(epoch=self.epoch + 1)
        row |= {k: mean_over_processes(x).item() / self.step for k, x in self.sums.items()}
        row |= measured | dict(images_per_s=round(rate, 1), minutes=round(minutes, 3))
        for name, value in measured.items():  # of weights so large that their output is not finite
            if value is not None and not math.isfinite(value):
                self.break_off(f"the {name} is {value}")
        self.history.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.write()
        return row

    def write(self) -> None:
        """All files of the folder, of the epochs so far."""
        self.save()
        if main_process() and self.history:
            files.write_log(self.out / "log.jsonl", self.history)
            curves = self.out / "curves.png"
            pictures.draw_curves(curves, self.out.name, self.history, self.panels)

    # ---- interruption ----------------------------------------------------------------------------

    def receive(self, number: int, frame) -> None:
        """Ctrl-C, SIGTERM or a closed terminal: noted, for the loop to heed. A second Ctrl-C ends
        the program at once; SIGTERM comes twice where the batch system and torchrun both send it.
        """
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave_if_asked(self) -> None:
        """On Ctrl-C or SIGTERM save, unless saved just now, and end with the shell's usual code."""
        number = torch.tensor(self.signal, device=self.device)
        if dist.is_initialized():  # at the same step, or the others wait for this one for ever
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if not number:
            return
        if self.step:
            self.save()
        where = f"epoch {self.epoch + 1}, step {self.step}"
        say(f"stopped at {where}; continue with --resume {self.out / 'last.pt'}")
        if dist.is_initialized():
            dist.barrier()  # torchrun ends all when the first leaves: save before that
        raise SystemExit(128 + int(number))

    def break_off(self, what: str) -> None:
        """End a run that has gone wrong; what was saved before is good and stays."""
        last = self.out / "last.pt"
        fail(
            f"{what} at epoch {self.epoch + 1}, step {self.step + 1}; "
            f"{f'{last} is kept' if last.exists() else 'nothing saved yet'}. Usual causes: --lr "
            f"{self.args.lr:g} too large, --warmup-epochs too short, gradients not clipped",
            code=1,
        )

    def save(self) -> None:
        sums = {name: mean_over_processes(x).item() for name, x in self.sums.items()}
        # The step taken since the last look may have broken the weights: not worth keeping.
        weights = [
            p for x in self.kept.values() if isinstance(x, nn.Module) for p in x.parameters()
        ]
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
            self.break_off("a weight is not finite")
        states = {k: whole_state(x) for k, x in self.kept.items()}
        if not main_process():
            return
        place = dict(epoch=self.epoch, step=self.step, sums=sums, history=self.history)
        place |= dict(seconds=self.seconds + time.time() - self.started)
        files.save_checkpoint(self.out / "last.pt", self.facts | states | place)

    def restore(self, checkpoint: dict) -> None:
        had, has = checkpoint["images"], self.facts["images"]
        if (had, checkpoint["listing"]) != (has, self.facts["listing"]):
            others = f"others, as many ({has})" if had == has else f"{has}"
            fail(
                f"--resume {self.args.resume}: that run had {had} training images, this folder has "
                f"{others}; give it the same"
            )
        had, has = checkpoint["processes"], self.facts["processes"]
        if had != has:  # a preempted job may come back with others
            say(f"note    {had} processes before, {has} now: the same batches, but other random")
            say("        numbers for MixUp, CutMix and drop-path than in an uninterrupted run")
        for name, x in self.kept.items():
            networks.load_(x, checkpoint.get(name), checkpoint)
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]
        self.seconds, self.history = checkpoint["seconds"], checkpoint["history"]
        needed = self.panels.keys() | {"minutes"} if self.epoch else set()
        last = self.history[-1] if self.history else dict(epoch=0)
        if not (
            all(map(is_row, self.history))
            and all(type(x) is float for x in checkpoint["sums"].values())
            and last.get("epoch") == self.epoch
            and needed <= last.keys()
            and self.step < len(self.batches)
        ):
            fail(f"checkpoint {self.args.resume} is damaged: its history is not of its epochs")
        self.sums = {k: torch.tensor(v, device=self.device) for k, v in checkpoint["sums"].items()}

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
        if a.init != "default" and not a.skipless:
            say(f"note    --init {a.init} without --skipless: a residual network starts from it")
        if a.resume:
            say(f"resume  {a.resume} at epoch {self.epoch + 1}, step {self.step}")

    def describe_memory(self, network: nn.Module, *shapes: tuple[int, ...]) -> None:
        """Print an estimate of what a step holds; shapes: of one image in each input of network."""
        a = self.args
        if not a.checkpoint_activations:  # which autograd does not tell of
            at_once = a.batch_size // (self.batches.world * a.grad_accum)
            say_memory(network, shapes, at_once, a.opt, self.device, a.amp)
