"""The network that flags describe or a checkpoint holds, and the name it goes by.

An arm is a network as it enters a comparison: `residual`, or `skipless-` and its init.
"""

import argparse

import torch

import identity_init
from cli import fail
from minskip import PRESETS, ViT, conditioned_init_

ARMS = ["residual", "skipless-default", "skipless-paper", "skipless-identity"]


def arm_of(skipless: bool, init: str) -> str:
    """An arm's name; a residual network with another init than the default is none of `ARMS`."""
    if skipless:
        return f"skipless-{init}"
    return "residual" if init == "default" else f"residual-{init}"


def initialise_(model: ViT, init: str, alpha: float, beta: float, c: float) -> ViT:
    """The weights that --init asks for, in place; a `ViT` is born with the default ones."""
    if init == "paper":
        conditioned_init_(model, alpha, beta, c)
    elif init == "identity":
        identity_init.identity_init_(model)
    return model


def build_vit(args: argparse.Namespace, num_classes: int, checkpoint: dict | None) -> ViT:
    """The network that a trainer's settings describe; sizes that do not fit end the program.

    With a checkpoint only its shape: the weights are to be loaded.
    """
    if checkpoint:
        return ViT(**checkpoint["model_config"])
    try:
        model = ViT(
            args.image_size,
            args.patch_size,
            num_classes,
            **PRESETS[args.model] | dict(depth=args.depth),
            residual=not args.skipless,
            pool=args.pool,
            pos_embed_std=args.pos_embed_std,
            drop_path=args.drop_path,
            **(identity_init.NEEDS if args.init == "identity" else {}),
        )
        return initialise_(model, args.init, args.alpha, args.beta, args.c)
    except ValueError as error:
        fail(str(error))


def fresh_arm(arm: str, alpha: float = 2.0, beta: float = 0.6, c: float = 3.0, **shape) -> ViT:
    """A fresh network of an arm. shape: `ViT`'s arguments; by default what the init counts on."""
    init = arm.removeprefix("skipless-") if arm != "residual" else "default"
    if init == "identity":
        shape = identity_init.COUNTS_ON | identity_init.NEEDS | shape
    try:
        model = ViT(**shape, residual=arm == "residual")
        return initialise_(model, init, alpha, beta, c)
    except ValueError as error:
        fail(str(error))


def trained_vit(checkpoint: dict) -> ViT:
    """The network of a checkpoint, rebuilt from it alone; averaged weights where it has any."""
    model = ViT(**checkpoint["model_config"])
    weights = checkpoint["model"]
    if checkpoint.get("ema") is not None:
        weights = {k.removeprefix("module."): v for k, v in checkpoint["ema"].items()}
        weights.pop("n_averaged")
    model.load_state_dict(weights)
    if not all(p.isfinite().all() for p in model.parameters()):
        fail(
            f"{checkpoint['path']} holds weights that are not finite: nothing can be measured on it"
        )
    return model


def untrained_vit(checkpoint: dict) -> ViT:
    """The network of a checkpoint as it was before training: its seed's very weights."""
    args = argparse.Namespace(**checkpoint["args"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = ViT(**checkpoint["model_config"])
        return initialise_(model, args.init, args.alpha, args.beta, args.c)
