"""The arms of a comparison: every network of this project by name, fresh or from a checkpoint.

An arm is a network as it enters a comparison: `residual`, or `skipless-` and its init. In
`attention-skip-` and `mlp-skip-`, that half of each block alone keeps its skip; residual networks
may have another init than the usual one too, as `residual-paper`. After a + come the parts of
`beyond/variants.py` that it uses, as in `skipless-paper+none+e-spa+tat`.
"""

import argparse
from collections.abc import Iterable

import torch

from beyond.identity_init import COUNTS_ON, NEEDS, identity_init_
from beyond.mimetic_init import mimetic_init_
from beyond.variants import CHOICES, GRID_ATTENTIONS, STARTS, differing, start_, vary_
from minskip import PRESETS, ViT, conditioned_init_
from support.errors import UserError
from support.files import load_checkpoint
from support.flags import check_no_other, flag_of, settings_of
from support.processes import say

ARMS = ["residual", "skipless-default", "skipless-paper", "skipless-identity"]
SKIPS = {"residual": True, "skipless": False, "attention-skip": "attention", "mlp-skip": "mlp"}
NAMES = ARMS + [f"{half}-skip-{arm[9:]}" for half in ("attention", "mlp") for arm in ARMS[1:]]
NAMES += ["residual-paper", "residual-mimetic"]


# --------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------


def arm_of(args: argparse.Namespace) -> str:
    """The name of a run's arm, which is not one of `NAMES` for a residual network with the identity
    init."""
    start = "residual"
    if args.skipless:
        start = f"{args.skips}-skip" if args.skips else "skipless"
    if args.skipless or args.init != "default":
        start += f"-{args.init}"
    return "+".join([start, *differing(vars(args)).values()])


def parts_of(arm: str) -> tuple[str, dict[str, str]]:
    """An arm's name without its variants, and these: norm, attention and so on."""
    start, *words = arm.split("+")
    return start, {name: word for word in words for name in CHOICES if word in CHOICES[name]}


def skips_and_init(start: str) -> tuple[bool | str, str]:
    """`ViT`'s residual, and the init, of an arm's name without its variants."""
    kind, _, init = start.rpartition("-")
    return (SKIPS[kind], init) if kind else (True, "default")


def flags_of(arm: str) -> list[str]:
    """The trainers' flags that make an arm."""
    start, varied = parts_of(arm)
    words = [word for name, choice in varied.items() for word in (f"--{name}", choice)]
    residual, init = skips_and_init(start)
    words += ["--skipless"] if residual is not True else []
    words += ["--skips", residual] if isinstance(residual, str) else []
    return words + (["--init", init] if start != "residual" else [])


def ARM(text: str) -> str:
    """The type of a flag that names an arm."""
    start, varied = parts_of(text)
    if start not in NAMES or len(varied) < text.count("+"):
        parts = ", ".join(word for words in CHOICES.values() for word in words)
        raise argparse.ArgumentTypeError(
            f"{text} is no arm: {', '.join(NAMES)}, then + and each of {parts}"
        )
    return text


# --------------------------------------------------------------------------------------------------
# Settings of a trainer that follow from its network
# --------------------------------------------------------------------------------------------------


def complete(args: argparse.Namespace, given: Iterable[str], init_of: dict[str, str]) -> None:
    """Set what --skipless, --init, --norm and --attention imply for other settings, in place.

    given: names of the flags on the command line, which stay as they are. init_of: size of the
    model -> init of a skipless network. Raises UserError where the settings contradict each other.
    """

    def imply(**settings) -> None:
        vars(args).update({k: v for k, v in settings.items() if k not in given})

    W_Q, _, W_V, _ = STARTS[args.attention]
    if args.skipless:
        init = "paper" if differing(vars(args)) else init_of[args.model]
        imply(init=init, drop_path=0.0)  # a dropped sub-block would leave nothing of the image
    if args.norm == "none" or W_V == "orthogonal":
        imply(c=1.0)  # no norm cancels it: c = 3 would make tokens of size 1e9
    if args.attention in GRID_ATTENTIONS:
        imply(pool="mean")
    if args.init == "identity":
        imply(**COUNTS_ON)
    args.depth = args.depth or PRESETS[args.model]["depth"]

    for name, start in (("alpha", W_Q), ("beta", W_Q), ("c", W_V)):
        if name in given and start != "as --init":
            raise UserError(f"--{name} is not part of --attention {args.attention}; leave it out")
        if name in given and args.init != "paper":
            raise UserError(f"--{name} is not part of --init {args.init}; leave it out")
    if args.skips and not args.skipless:
        raise UserError("--skips says what --skipless leaves; add --skipless, or leave --skips out")
    if args.skipless and args.init == "mimetic":
        raise UserError("--init mimetic is made for networks with skips; leave --skipless out")
    if args.drop_path and args.skipless:
        raise UserError("--drop-path needs skip connections: leave it out with --skipless")
    if args.warmup_epochs >= args.epochs:
        raise UserError(
            f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}"
        )


# Settings that make the network; --init-from takes them from the checkpoint.
NETWORK = {
    "model", "depth", "image_size", "patch_size", "skipless", "skips", "init", "alpha", "beta", "c",
    "pool", "pos_embed_std", "norm", "attention", "activation", "shortcut",
}  # fmt: skip


def new_settings(
    table: dict[str, tuple], given: dict, init_of: dict[str, str]
) -> tuple[argparse.Namespace, dict | None]:
    """(settings of a run that is not resumed, the checkpoint that --init-from names).

    table: a trainer's. given: the flags on the command line. init_of: as of `complete`. Raises
    UserError where the settings contradict each other, or the checkpoint's network; --image-size
    may be another.
    """
    args, decided, source = settings_of(table, given), given.keys(), None
    if args.init_from:
        source = load_checkpoint(args.init_from)
        stored = {name: source["args"][name] for name in NETWORK}
        check_no_other(stored, {k: v for k, v in given.items() if k in NETWORK}, {"image_size"})
        vars(args).update(stored | given)
        decided = given.keys() | NETWORK - {"alpha", "beta", "c"}
    complete(args, decided, init_of)
    return args, source


def say_twin(args: argparse.Namespace, init_of: dict[str, str]) -> None:
    """Tell a residual run in what the run with --skipless would differ, beside the skips."""
    if args.skipless or args.init_from:
        return
    twin = argparse.Namespace(**vars(args) | dict(skipless=True))
    complete(twin, (), init_of)
    names = [n for n in ("pool", "pos_embed_std", "drop_path") if vars(twin)[n] != vars(args)[n]]
    if names:
        flags = " ".join(f"{flag_of(name)} {vars(twin)[name]}" for name in names)
        say(f"note    --skipless also sets {flags}: set it here to compare the skips alone")


# --------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------


def initialise_(model: ViT, init: str, alpha: float, beta: float, c: float) -> ViT:
    """The weights that --init asks for, in place; a `ViT` is born with the default ones."""
    if init == "paper":
        conditioned_init_(model, alpha, beta, c)
    elif init == "identity":
        identity_init_(model)
    elif init == "mimetic":
        mimetic_init_(model)
    return start_(model)


def fresh_arm(
    arm: str, alpha: float = 2.0, beta: float = 0.6, c: float | None = None, **shape
) -> ViT:
    """A fresh network of an arm. shape: `ViT`'s arguments; by default what the init counts on.

    c: of the paper's init [3; 1 without norms]. Raises UserError for what does not fit together.
    """
    start, varied = parts_of(arm)
    residual, init = skips_and_init(start)
    c = c or (1.0 if varied.get("norm") == "none" else 3.0)
    if varied.get("attention") in GRID_ATTENTIONS:
        shape = dict(pool="mean") | shape
    if init == "identity":
        shape = COUNTS_ON | NEEDS | shape
    try:
        model = vary_(ViT(**shape, residual=residual), **varied)
        return initialise_(model, init, alpha, beta, c)
    except ValueError as error:
        raise UserError(str(error)) from error


def rebuilt(checkpoint: dict) -> ViT:
    """The network of a checkpoint, its weights yet to come."""
    config = checkpoint["model_config"]
    varied = differing(config)
    return vary_(ViT(**{k: v for k, v in config.items() if k not in varied}), **varied)


def trained_vit(checkpoint: dict) -> ViT:
    """The network of a checkpoint, rebuilt from it alone; with averaged weights, if it has any.

    Raises UserError for a checkpoint of another version.
    """
    try:
        model = rebuilt(checkpoint)
        model.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"checkpoint {checkpoint['path']} is of another version ({str(error)[:200]}); "
            "use one of its own"
        ) from error
    return model


def untrained_vit(checkpoint: dict) -> ViT:
    """The network of a checkpoint as it was before training, with the very weights of its seed
    (before --init-from replaced them, if it did)."""
    had = checkpoint["args"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(had["seed"])
        return initialise_(rebuilt(checkpoint), had["init"], had["alpha"], had["beta"], had["c"])


@torch.no_grad()
def start_from_(model: ViT, checkpoint: dict, classes: list[str]) -> ViT:
    """Give a fresh network, in place, the weights of a checkpoint, averaged ones if it has any.

    The head stays fresh where the classes are others or a network has none. On images of another
    size the position embedding is resized, and the keepers' biases follow the number of tokens.
    """
    source, had, has = trained_vit(checkpoint), checkpoint["model_config"], model.config
    weights, taken = source.state_dict(), "all weights"
    if had["num_classes"] != has["num_classes"] or checkpoint["classes"] != classes:
        weights = {name: x for name, x in weights.items() if not name.startswith("head.")}
        taken += " but the head's" if has["num_classes"] else ""
    if had["image_size"] != has["image_size"]:
        side = has["image_size"] // has["patch_size"]
        weights["pos_embed"] = source.interpolate_pos_embed(side, side)
        taken += ", the position embedding resized"
        for number, block in enumerate(source.blocks):
            if block.attention.diagonal_bias is not None:
                b = block.attention.bias_for(model.pos_embed.shape[1])
                weights[f"blocks.{number}.attention.diagonal_bias"] = b
    model.load_state_dict(weights, strict=False)  # only the head may be missing
    say(f"start   {taken} of {checkpoint['path']}, epoch {checkpoint['epoch']}")
    return model
