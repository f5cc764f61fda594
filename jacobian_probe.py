"""See what skip connections do for gradients: networks with and without them, block by block.

    python jacobian_probe.py                                     at initialisation, on the CPU
    python jacobian_probe.py --depths 12 24 48 --seeds 1         does it hold with depth?
    python jacobian_probe.py --model small --image-size 224 --patch-size 16 --images 2 --seeds 1
    python jacobian_probe.py --checkpoint runs/a/last.pt runs/b/last.pt      trained networks

What is measured first is what skips are said to be for, **gradient norms**: the norm of the loss's
gradient by the tokens after each block, and by each weight matrix apart. Apart, because one norm
misleads: where an image's tokens have become alike, the gradients of W_Q and W_K are zero while
those of W_V and the MLP are not. Then what explains them: how alike the tokens are, whom they
attend to, the condition of the Jacobians K that a skipless network multiplies, of the K + I that a
residual one does, and of their product J from each block to the output; and the size of J, the
averaged partial Jacobian norm (APJN), beside its theory.

Prints two tables and a conclusion a network; writes OUT/probe.png (everything in one picture) and
OUT/probe.json (the numbers). `--explain` says what each column and panel means.

Sources: the view through K is Ji et al., "Cutting the Skip" (arXiv 2510.00345); the APJN and its
recursion see `theory.py`; singular values of the attention's output are from "Convergence of
Gradient Descent on Transformers with Residual Connections" (arXiv 2506.05249).
"""

import argparse
import json
import statistics
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

import cli
import engine
import files
import jacobians
import networks
import pictures
from data import augmentations, image_folder, normalise
from jacobians import CONDITIONS, LARGEST, apjn, condition_number
from minskip import PRESETS, Block, ViT
from shapes import draw_shapes
from theory import theory_of

# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------

MATRICES = "attention.W_Q attention.W_K attention.W_V attention.W_O mlp.fc1 mlp.fc2".split()


def gradient_norms(model: ViT, tokens: list[Tensor], labels: Tensor) -> dict[str, list[float]]:
    """Norm of the loss's gradient by the tokens h^0 .. h^L and by each weight matrix of each block.

    tokens: (batch, token, dim) each, connected by a graph. The loss is the mean cross-entropy.
    """
    loss = F.cross_entropy(model.classify(tokens[-1]), labels)
    if not loss.isfinite():
        raise UserError(f"the loss of this network is {loss.item()}: nothing can be measured on it")
    by = {"g(tokens)": tokens}
    for path in MATRICES:
        weights = [block.get_submodule(path).weight for block in model.blocks]
        by[f"g({path.split('.')[1]})"] = weights
    gradients = torch.autograd.grad(loss, [x for xs in by.values() for x in xs], retain_graph=True)
    norms = iter(gradients)
    return {key: [next(norms).norm().item() for _ in xs] for key, xs in by.items()}


@torch.no_grad()
def token_statistics(x: Tensor) -> dict[str, float]:
    """How different tokens are, (batch, token, dim), mean over images.

    1-corr: 1 minus the mean cosine of two different tokens. eff.rank: exp of the entropy of the
    singular values' shares (Roy and Vetterli 2007), of n tokens at most n.
    """
    n = x.shape[1]
    unit = F.normalize(x, dim=-1)
    cosine = (unit.sum(1).square().sum(-1) - n) / (n * (n - 1))
    singular = torch.linalg.svdvals(x)
    shares = singular / singular.sum(-1, keepdim=True)
    rank = torch.special.entr(shares).sum(-1).exp()
    apart = (1 - cosine).clamp_min(0)  # rounding may leave less
    return {"1-corr": apart.mean().item(), "eff.rank": rank.mean().item()}


@torch.no_grad()
def attention_statistics(block: Block, x: Tensor) -> dict[str, float]:
    """What the attention makes of a block's input X = x, (batch, token, dim).

    own: the mean diagonal of the attention matrices. k(Z), k(X+Z): kappa of its output, without
    the skip and with it, median over images.
    """
    y = block.norm1(x)
    Z = block.attention(y)
    result = {"own": block.attention.weights(y).diagonal(dim1=-2, dim2=-1).mean().item()}
    for name, output in (("k(Z)", Z), ("k(X+Z)", x + Z)):
        kappas = [condition_number(singular) for singular in torch.linalg.svdvals(output)]
        result[name] = statistics.median(kappas)
    return result


def measure(model: ViT, images: Tensor, labels: Tensor, what: str) -> dict[str, list[float]]:
    """Column -> its numbers over l = 0 .. L (of tokens) or over the blocks 1 .. L. In float64.

    what: the progress bar's name.
    """
    model = model.eval().double()
    tokens = model.forward_features(images.double(), list(range(len(model.blocks) + 1)))
    result = gradient_norms(model, tokens, labels) | {"APJN": apjn(tokens)}
    bar = engine.progress(list(zip(model.blocks, tokens)), what, unit=" blocks")
    by_block = [attention_statistics(b, x) | jacobians.conditioning(b, x[0]) for b, x in bar]
    for rows in ([token_statistics(x) for x in tokens], by_block):
        result |= {key: [row[key] for row in rows] for key in rows[0]}
    return result


def medians(runs: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Over the runs that have a column; the first has all."""
    columns = {key: [run[key] for run in runs if key in run] for key in runs[0]}
    return {key: [statistics.median(x) for x in zip(*lists)] for key, lists in columns.items()}


# --------------------------------------------------------------------------------------------------
# What a person sees
# --------------------------------------------------------------------------------------------------

GRADIENTS = "g(tokens) g(W_Q) g(W_K) g(W_V) g(W_O) g(fc1) g(fc2) APJN k(J)".split()
STATE = ["1-corr", "eff.rank", "own", *CONDITIONS, "k(Z)", "k(X+Z)"]
THEORY = ["APJN pair", "APJN scalar"]
WITH_THEORY = ["residual", "skipless-default"]  # the theory is of the default init

PANELS = {  # title -> columns; the first is drawn solid, the second dashed, the third dotted
    "gradient by the tokens": ["g(tokens)"],
    "gradient by W_Q, W_K": ["g(W_Q)", "g(W_K)"],
    "gradient by W_V, W_O": ["g(W_V)", "g(W_O)"],
    "gradient by fc1, fc2": ["g(fc1)", "g(fc2)"],
    "APJN": ["APJN", *THEORY],
    "1 - token correlation": ["1-corr"],
    "kappa of the Jacobian to the output": ["k(J)", "k(J) half"],
    "own-token share of the attention": ["own"],
    "kappa of the attention's K, K + I": ["k(K)", "k(K+I)"],
}
STYLES = {
    "-": "W_Q, W_V, fc1, K; all that is measured alone",
    "--": "W_K, W_O, fc2, K + I; kappa to the median; theory of the APJN",
    ":": "its scalar form",
}
LOWEST, HIGHEST = 1e-8, 1e8  # ends of log axes: float32, in which networks train, has 7 digits

EXPLANATIONS = """
Numbers are medians over the seeds. Block 0 is the embedding. In the picture the bands span the
seeds, and log axes end at 1e-8 and 1e8: a curve on the edge lies there or beyond.

gradient by the tokens: g(tokens)
    Norm of the loss's gradient by the tokens after a block. The loss is the mean cross-entropy.
    Falling to the left, gradients vanish on their way back; rising, they explode.

gradient by W_Q, W_K / W_V, W_O / fc1, fc2: g(W_Q), g(W_K), g(W_V), g(W_O), g(fc1), g(fc2)
    Norm of the loss's gradient by a block's weight matrix. Where tokens are alike it does not
    matter whom they attend to: W_Q and W_K get no gradient, although all else does.

APJN: APJN
    Averaged partial Jacobian norm from after block l to the output: the mean squared effect on the
    last tokens of a random change. At 1 changes pass as they are. For the default init, dashed is
    the theory, dotted its published scalar form, which drops what two tokens' gradients share.
    --pool cls leaves theory out: it knows no class token, which starts near 0 and so, divided by
    its LayerNorm, holds 99 % of a skipless network's J at block 0, 40 % of a residual one's.

1 - token correlation: 1-corr
    1 minus the mean cosine of two tokens of an image. At 1 they are unrelated; at 0 all the same
    (rank collapse, or oversmoothing), and no later block can tell them apart.

kappa of the Jacobian to the output: k(J), k(J) half
    Condition number of J, the Jacobian from after block l to the output: its largest over its
    smallest stretch of a small change of the tokens; of the first image and seed. Left out are the
    two directions a token, its mean and length, that a LayerNorm drops. Rising to the left, it gets
    worse with every block that gradients pass. Dashed, not in the table, the largest over the
    median: near 1 half of all directions pass alike, however bad the worst. Past 1e15 it is
    rounding. Absent above n d = 1200.

own-token share of the attention: own
    How much of its attention a token keeps for itself: 1/n is a plain average over all n tokens,
    near 1 each token is treated apart. To carry differences through many blocks without skips takes
    a share near 1 in all heads, or in most (skipless-identity: in three of four).

kappa of the attention's K, K + I: k(K), k(K+I)
    Condition number of the attention's Jacobian K, its largest over its smallest stretch of a small
    change of the input. A skipless network multiplies bare factors K (solid), a residual one K + I
    (dashed). Past 1e15 it is rounding. Above n d = 1200 lower bounds, printed with >=.

only in the table: eff.rank
    Effective rank of an image's tokens, in how many directions they differ: 1 when all are the
    same, at most their number.

only in the table: k(MLP), k(MLP+I)
    Condition number of the MLP's Jacobian, over all tokens, without the skip and with it.

only in the table: k(Z), k(X+Z)
    Condition number of the matrix of tokens that the attention puts out, without the skip and with
    it. It sets the linear rate of gradient descent on the layers behind.
"""


def shown(value: float, at_least: bool = False) -> str:
    """A number that is not negative, to three digits, in at most eight characters."""
    plain = 1e-3 <= value < 99950 or value == 0
    return ">=" * at_least + (f"{float(f'{value:.3g}'):g}" if plain else f"{value:.0e}")


def at(result: dict, column: str, block: int) -> str:
    """A column's number at a block as shown; empty where there is none, as at the embedding, 0."""
    values = result["medians"].get(column, [])
    index = block - (result["depth"] + 1 - len(values))
    if index < 0:
        return ""
    bound = column in CONDITIONS and not result["exact"]
    return shown(values[index], bound or values[index] == LARGEST)


def print_table(title: str, columns: list[str], results: dict[str, dict]) -> None:
    """At five places of each network, in at most 100 columns; without what no network has."""
    columns = [c for c in columns if any(c in result["medians"] for result in results.values())]
    print(f"\n{title}\n{'block':>6}" + "".join(f"{column:>10}" for column in columns))
    for name, result in results.items():
        print(name)
        L = result["depth"]
        for b in sorted({0, 1, L // 3, 2 * L // 3, L}):
            cells = "".join(f"{at(result, column, b):>10}" for column in columns)
            print(f"{b:>6}{cells}".rstrip())


def conclusion(name: str, result: dict) -> str:
    """A sentence computed from the numbers, about the worst block everywhere."""
    numbers = result["medians"]
    W_Q, apart = numbers["g(W_Q)"], numbers["1-corr"]
    used = "k(K+I)" if result["residual"] else "k(K)"  # what the network's Jacobian is made of
    worst = numbers[used].index(max(numbers[used])) + 1

    def fold(values: list[float]) -> str:
        ratio = max(values) / max(min(values), 1e-300)
        return shown(min(ratio, HIGHEST), at_least=ratio > HIGHEST)

    return (
        f"{name}: over the blocks the gradient by the tokens varies {fold(numbers['g(tokens)'])}"
        f"-fold, by W_Q {fold(W_Q)}-fold, least in block {W_Q.index(min(W_Q)) + 1}; tokens are "
        f"closest after block {apart.index(min(apart))}, 1 - correlation {shown(min(apart))}; "
        f"{used} is largest in block {worst}, {at(result, used, worst)}."
    )


def looks_of(results: dict[str, dict]) -> dict[str, dict]:
    """How each network is drawn: colour says which, paleness how deep or when."""
    groups = list(dict.fromkeys(result["group"] for result in results.values()))
    shades = list(dict.fromkeys(result["shade"] for result in results.values()))
    looks, colours = {}, {}
    for group in groups:  # of several trained networks of one arm the first has the arm's colour
        choice = [pictures.colour_of(group, groups), *pictures.OTHER_COLOURS]
        colours[group] = next((c for c in choice if c not in colours.values()), choice[0])
    for name, result in results.items():
        alpha = (shades.index(result["shade"]) + 1) / len(shades)
        width = max(2.8 - 0.5 * groups.index(result["group"]), 0.8)  # seen where they coincide
        looks[name] = dict(color=colours[result["group"]], alpha=alpha, lw=width)
    return looks


def draw(results: dict[str, dict], path: Path, title: str) -> None:
    """One panel a quantity against the block number; the gradients come first."""
    figure, axes = plt.subplots(3, 3, figsize=(11, 8.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)
    looks = looks_of(results)
    for ax, (name, columns) in zip(axes.flat, PANELS.items()):
        scale, low, high = ("linear", 0, 1) if columns == ["own"] else ("log", LOWEST, HIGHEST)
        for network, result in results.items():
            for column, style in zip(columns, STYLES):
                if column not in result["medians"]:
                    continue
                values = torch.tensor(result["medians"][column]).clamp(low, high)
                blocks = range(result["depth"] + 1 - len(values), result["depth"] + 1)
                ax.plot(blocks, values, style, label=network, **looks[network])
                if style == "-":
                    runs = [run[column] for run in result["runs"] if column in run]
                    least, most = torch.tensor(runs).clamp(low, high).aminmax(dim=0)
                    colour = looks[network]["color"]
                    ax.fill_between(blocks, least, most, color=colour, alpha=0.12, lw=0)
        ax.set_yscale(scale)
        pictures.tidy(ax, name)
    for ax in axes[-1]:
        ax.set_xlabel("block (0: the embedding)", fontsize=9)
    where = dict(loc="outside upper center", ncols=max(1, 130 // (max(map(len, results)) + 8)))
    figure.legend(handles=axes[0, 0].get_lines(), title=title, frameon=False, **where)
    styles = [plt.Line2D([], [], color="k", ls=s, lw=1.2, label=text) for s, text in STYLES.items()]
    figure.legend(handles=styles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    pictures.save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

FRESH = dict(  # settings of fresh networks; a checkpoint brings its own
    variants=networks.ARMS,
    depths=[12],
    model="nano",
    image_size=32,
    patch_size=8,
    pos_embed_std=None,  # what the arm's init counts on
    pool="mean",  # for all alike, so that their gradients compare; theory knows no class token
    seeds=5,
)
OTHERS = dict(data=None, images=4, checkpoint=None, before=False, device="auto", out="runs/probe")


def parse_arguments() -> argparse.Namespace:
    p = cli.Parser(__doc__, argument_default=argparse.SUPPRESS)

    def add(flag: str, help: str, **kind) -> None:
        default = (FRESH | OTHERS).get(flag[2:].replace("-", "_"))
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        p.add_argument(flag, help=f"{help} [{words}]" if default else help, **kind)

    add(
        "--variants",
        "networks to compare; skipless-paper+e-spa and the like",
        nargs="+",
        type=networks.arm,
    )
    add("--depths", "numbers of blocks to compare", nargs="+", type=cli.count)
    add("--model", "width and heads", choices=list(PRESETS))
    add("--image-size", "side of the images, pixels", type=cli.count)
    add("--patch-size", "side of a patch, pixels", type=cli.count)
    std = "std of the position embedding; larger keeps tokens apart longer "
    add("--pos-embed-std", std + "[what the init counts on]", type=cli.not_negative)
    add("--pool", "class token, or mean over patch tokens", choices=["cls", "mean"])
    data = "folder with val/<class>/*: real images; left out: synthetic ones"
    add("--data", data, type=cli.path)
    add("--images", "how many; numbers are means over them, of K and J the first's", type=cli.count)
    add("--checkpoint", "trained networks instead of --variants", nargs="+", metavar="CKPT")
    add("--before", "each checkpoint also as it was before training", action="store_true")
    add("--seeds", "fresh weights a variant; medians are shown", type=cli.count)
    add("--device", "auto, cpu, cuda or cuda:N")
    add("--out", "folder of probe.png and probe.json", type=cli.path)
    explain = "print what each column and panel means, and stop"
    add("--explain", explain, action="version", version=EXPLANATIONS)
    given = vars(p.parse_args())
    if "checkpoint" in given and (useless := [name for name in FRESH if name in given]):
        flag = "--" + useless[0].replace("_", "-")
        raise UserError(f"{flag} is about fresh networks; leave it out with --checkpoint")
    if "before" in given and "checkpoint" not in given:
        raise UserError("--before is about trained networks: add --checkpoint")
    return argparse.Namespace(**FRESH | OTHERS | given)


def one_a_seed(arm: str, seeds: int, **shape) -> Iterator[ViT]:
    for seed in range(seeds):
        torch.manual_seed(seed)
        yield networks.fresh_arm(arm, **shape)


def fresh_networks(args: argparse.Namespace) -> list[tuple[str, str, Iterable[ViT]]]:
    """(arm, depth, a network a seed) of each network asked for; built one by one, when measured."""
    shape = dict(PRESETS[args.model], num_classes=10, pool=args.pool)
    shape |= dict(image_size=args.image_size, patch_size=args.patch_size)
    if args.pos_embed_std is not None:
        shape |= dict(pos_embed_std=args.pos_embed_std)
    return [
        (arm, f"{depth} blocks", one_a_seed(arm, args.seeds, **shape | dict(depth=depth)))
        for arm in args.variants
        for depth in args.depths
    ]


def trained_networks(args: argparse.Namespace) -> list[tuple[str, str, Iterable[ViT]]]:
    """(run, "before training" or "trained", the one network) of each checkpoint."""
    found, sizes = [], set()
    for path in args.checkpoint:
        checkpoint = files.load_checkpoint(path)
        trained = networks.trained_vit(checkpoint)
        sizes.add(trained.config["image_size"])
        name = Path(path).resolve().parent.name
        name = path if name in [run for run, _, _ in found] else name
        if args.before:
            found.append((name, "before training", [networks.untrained_vit(checkpoint)]))
        found.append((name, "trained", [trained]))
    if len(sizes) > 1:
        raise UserError(f"--checkpoint: of different image sizes {sorted(sizes)}; probe them apart")
    args.image_size, args.seeds = sizes.pop(), 1
    return found


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(images, labels): normalised as in training, (batch, 3, size, size) and (batch,)."""
    if args.data is None:
        images, labels, _ = draw_shapes(list(range(args.images)), args.image_size, "val")
    else:
        folder = image_folder(args.data, "val")
        _, transform = augmentations(args.image_size, drawn=False)
        pairs = [folder[i * len(folder) // args.images] for i in range(args.images)]
        images = torch.stack([transform(image) for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
    return normalise(images), labels


def probe(models: Iterable[ViT], images: Tensor, labels: Tensor, theory: bool, what: str) -> dict:
    """A network's record: its numbers for each seed, their medians, and what they depend on."""
    runs = []
    for model in models:
        model = model.to(images.device)
        n, d = model.pos_embed.shape[1:]
        if n < 2:
            raise UserError(
                "an image is one token, with nothing to compare; make --patch-size smaller"
            )
        # Any class does for a gradient. A backbone without a head puts out its pooled feature,
        # which stands in for the logits: a class for each of its numbers.
        classes = labels % (model.config["num_classes"] or model.config["dim"])
        numbers = measure(model, images, classes, f"{what}, seed {len(runs)}")
        if theory:
            numbers |= dict(zip(THEORY, theory_of(model, model.embed(images.double()))))
        dense = n * d <= jacobians.DENSE_LIMIT
        if dense and not runs:  # of one seed: it takes longer than all else together
            numbers |= jacobians.progressive_conditioning(model, images[0].double())
        runs.append(numbers)
    facts = dict(depth=len(model.blocks), residual=model.config["residual"], tokens=n)
    return facts | dict(exact=dense, medians=medians(runs), runs=runs)


def main() -> None:
    args = parse_arguments()
    device, _, _ = engine.start_processes(args.device)
    out, started = Path(args.out), time.time()
    files.make_folder(out)
    found = trained_networks(args) if args.checkpoint else fresh_networks(args)
    images, labels = (x.to(device) for x in load_images(args))
    results, several = {}, len({shade for _, shade, _ in found}) > 1
    torch.manual_seed(0)  # trained networks: the signs that `apjn` draws
    for group, shade, models in found:
        name = f"{group}, {shade}" if several else group
        theory = group in WITH_THEORY and not args.checkpoint and args.pool == "mean"
        results[name] = dict(group=group, shade=shade)
        results[name] |= probe(models, images, labels, theory, name)

    what = "trained networks" if args.checkpoint else f"{args.model} at initialisation"
    tokens = " or ".join(str(n) for n in sorted({r["tokens"] for r in results.values()}))
    title = f"{what}: {tokens} tokens, {len(images)} images of {args.data or 'Shapes'}"
    title += f", median of {args.seeds} seeds" * (args.seeds > 1)
    title += f"; log axes end at {LOWEST:g} and {HIGHEST:g}"
    draw(results, out / "probe.png", title)
    record = dict(torch=torch.__version__, arguments={k: str(v) for k, v in vars(args).items()})
    text = json.dumps(record | dict(networks=results))
    files.write_atomically(out / "probe.json", lambda path: path.write_text(text))

    print_table("norms of the loss's gradient, APJN and kappa of J", GRADIENTS, results)
    print_table("tokens, attention and condition numbers", STATE, results)
    print()
    for name, result in results.items():
        print(textwrap.fill(conclusion(name, result), 100, subsequent_indent="    "))
    if args.pool == "cls" and not args.checkpoint:
        print("APJN without its theory, which knows no class token (--pool mean)")
    print(f"\n{out}/probe.png, {out}/probe.json  ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    with cli.one_line_errors("take fewer --images or a smaller --model"):
        main()
