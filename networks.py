"""The network that flags describe or a checkpoint holds, and the name it goes by.

An arm is a network as it enters a comparison: `residual`, or `skipless-` and its init; behind a +
each the parts it has of `variants.py`, as in `skipless-paper+none+e-spa+tat`.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import identity_init
from cli import fail
from minskip import PRESETS, ViT, conditioned_init_
from variants import CHOICES, GRID_ATTENTIONS, differing, start_, vary_

ARMS = ["residual", "skipless-default", "skipless-paper", "skipless-identity"]


def arm_of(args: argparse.Namespace) -> str:
    """An arm's name; a residual network with another init than the default is none of `ARMS`."""
    arm = "residual" if args.init == "default" else f"residual-{args.init}"
    start = f"skipless-{args.init}" if args.skipless else arm
    return "+".join([start, *differing(vars(args)).values()])


def parts_of(arm: str) -> tuple[str, dict[str, str]]:
    """An arm's name without the variants, and these: norm, attention and activation."""
    arm, *words = arm.split("+")
    return arm, {name: word for word in words for name in CHOICES if word in CHOICES[name]}


def arm(text: str) -> str:
    """The name of an arm as a flag."""
    start, varied = parts_of(text)
    if start not in ARMS or len(varied) < text.count("+"):
        known = ", ".join(word for words in CHOICES.values() for word in words)
        message = f"{text} is no arm: {', '.join(ARMS)}, then, behind a + each, of {known}"
        raise argparse.ArgumentTypeError(message)
    return text


def initialise_(model: ViT, init: str, alpha: float, beta: float, c: float) -> ViT:
    """The weights that --init asks for, in place; a `ViT` is born with the default ones."""
    if init == "paper":
        conditioned_init_(model, alpha, beta, c)
    elif init == "identity":
        identity_init.identity_init_(model)
    elif init != "default":
        raise ValueError(f"init {init}")
    return start_(model)


def unlike_its_settings(config: dict, checkpoint: dict) -> list[str]:
    """What a whole config of a checkpoint's network has otherwise than its settings ask for."""
    settings, needs = checkpoint["args"], identity_init.NEEDS
    if settings.get("init") != "identity":
        needs = {name: not value for name, value in needs.items()}
    asked = config | PRESETS.get(settings.get("model"), {}) | settings | dict(in_channels=3) | needs
    if checkpoint["script"] == "train_cls" and checkpoint["classes"]:
        asked["num_classes"] = len(checkpoint["classes"])
    others = [name for name, value in config.items() if asked[name] != value]
    if differing(asked) != differing(config) or asked.get("skipless") is config["residual"]:
        others.append("kind of blocks")
    return others


def vit_of(checkpoint: dict) -> ViT:
    """The network of a checkpoint, its weights yet to come; a shape that is not theirs, or not
    that of the settings, ends the program before memory is taken for it."""

    def build(config: dict) -> ViT:
        varied = differing(config)
        return vary_(ViT(**{k: v for k, v in config.items() if k not in varied}), **varied)

    config, weights, path = checkpoint["model_config"], checkpoint["model"], checkpoint["path"]
    damaged = f"checkpoint {path} is damaged: its weights are not those of its model_config"
    blocks = {str(name).split(".")[1] for name in weights if str(name).startswith("blocks.")}
    try:
        if int(config["depth"]) != len(blocks) or not isinstance(config["residual"], bool):
            fail(damaged)
        with torch.device("meta"):
            net = build(config)
        expected = {name: x.shape for name, x in net.state_dict().items()}
        found = {name: x.shape for name, x in weights.items()}
        others = [name for name in net.config if name not in config]
        others += unlike_its_settings(net.config, checkpoint)
    except Exception as error:  # whatever a config that nobody wrote makes a constructor say
        fail(f"{damaged} ({type(error).__name__}: {error})")
    if found != expected:
        fail(damaged)
    if others:
        fail(f"checkpoint {path} is damaged: its network's {others[0]} is not that of its settings")
    return build(config)


def fresh_vit(init: str, varied: dict, alpha: float, beta: float, c: float, **shape) -> ViT:
    """A network with its start; what does not fit together ends the program. shape: `ViT`'s."""
    needs = identity_init.NEEDS if init == "identity" else {}
    try:
        return initialise_(vary_(ViT(**needs | shape), **varied), init, alpha, beta, c)
    except ValueError as error:
        fail(str(error))


def build_vit(args: argparse.Namespace, num_classes: int, checkpoint: dict | None) -> ViT:
    """The network that a trainer's settings describe; sizes that do not fit end the program.

    With a checkpoint only its shape: the weights are to be loaded.
    """
    if checkpoint:
        return vit_of(checkpoint)
    shape = PRESETS[args.model] | dict(num_classes=num_classes, residual=not args.skipless)
    for name in ("image_size", "patch_size", "depth", "pool", "pos_embed_std", "drop_path"):
        shape[name] = getattr(args, name)
    return fresh_vit(args.init, differing(vars(args)), args.alpha, args.beta, args.c, **shape)


def fresh_arm(
    arm: str, alpha: float = 2.0, beta: float = 0.6, c: float | None = None, **shape
) -> ViT:
    """A fresh network of an arm. shape: `ViT`'s arguments; by default what the init counts on.
    c: of the paper's init [3; without norms 1]."""
    arm, varied = parts_of(arm)
    c = c or (1.0 if varied.get("norm") == "none" else 3.0)
    if varied.get("attention") in GRID_ATTENTIONS:
        shape = dict(pool="mean") | shape
    init = arm.removeprefix("skipless-") if arm != "residual" else "default"
    if init == "identity":
        shape = identity_init.COUNTS_ON | shape
    return fresh_vit(init, varied, alpha, beta, c, **shape, residual=arm == "residual")


def load_optimizer_(optimizer: Optimizer, state: dict) -> None:
    """optimizer.load_state_dict(state). Raises TypeError or RuntimeError where it is of another."""

    def kinds() -> list[dict]:
        return [{name: type(x) for name, x in g.items()} for g in optimizer.param_groups]

    before = kinds()
    optimizer.load_state_dict(state)
    if kinds() != before:
        raise TypeError("param_groups")
    if isinstance(optimizer, torch.optim.AdamW):  # which looks at none of this itself
        stored = [x for kept in state["state"].values() for x in kept.values()]
        alike = all(x.is_floating_point() for x in stored)  # before it was converted
        for p, kept in optimizer.state.items():
            sizes = dict(step=torch.Size([]), exp_avg=p.shape, exp_avg_sq=p.shape)
            alike &= {name: x.shape for name, x in kept.items()} == sizes
        if not alike:
            raise TypeError("state")


def load_(target: Tensor | nn.Module | Optimizer, state, checkpoint: dict) -> None:
    """Give target the state that a checkpoint has of it, or end the program in one line."""
    try:
        if isinstance(target, Tensor):
            target.copy_(state.view_as(target))
        elif isinstance(target, Optimizer):
            load_optimizer_(target, state)
        else:
            kinds = {name: x.dtype for name, x in target.state_dict().items()}
            if {name: x.dtype for name, x in state.items()} != kinds:  # it would be converted
                raise TypeError("names or types of weights")
            target.load_state_dict(state)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a state that nobody saved makes it stumble over
        why = f"{type(error).__name__}: {str(error)[:200]}"
        fail(f"checkpoint {checkpoint['path']} is damaged ({why}); use another")


def trained_vit(checkpoint: dict) -> ViT:
    """The network of a checkpoint, rebuilt from it alone; averaged weights where it has any."""
    model = vit_of(checkpoint)
    weights = checkpoint["model"]
    if checkpoint.get("ema") is not None:
        weights = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items()}
        weights.pop("n_averaged", None)
    load_(model, weights, checkpoint)
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(
            f"{checkpoint['path']} holds weights that are not finite: nothing can be measured on it"
        )
    return model


def untrained_vit(checkpoint: dict) -> ViT:
    """The network of a checkpoint as it was before training: its seed's very weights."""
    had = checkpoint["args"]
    with torch.random.fork_rng(devices=[]):
        try:
            torch.manual_seed(had["seed"])
            model = vit_of(checkpoint)
            return initialise_(model, *(had[name] for name in ("init", "alpha", "beta", "c")))
        except (KeyError, TypeError, ValueError) as error:
            fail(f"checkpoint {checkpoint['path']} is damaged: its settings give {error!r}")
