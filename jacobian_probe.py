"""What skip connections do for gradients, block by block, in networks with them and without.

    python jacobian_probe.py                                  at initialisation; 2 minutes on a CPU
    python jacobian_probe.py --depths 12 24 48 --seeds 1      does it hold for deeper networks?
    python jacobian_probe.py --model small --image-size 224 --patch-size 16 --images 2 --seeds 1
    python jacobian_probe.py --checkpoint runs/a/last.pt runs/b/last.pt      trained networks

Skips are said to help gradients, so their norms come first, with respect to the tokens after each
block and to each weight matrix. A single norm misleads: once all tokens are alike, W_Q and W_K get
no gradient, while W_V and the MLP still do. Then come possible explanations. A residual network
multiplies factors K + I, a skipless one bare K, the Jacobian of a sub-block. The probe measures
condition numbers (kappa) of K, of K + I and of their product J from each block to the output; the
size of J (APJN); how much the tokens differ, and attend to themselves.

Prints two tables and a conclusion per network; writes OUT/probe.png and OUT/probe.json.
docs/probe.md explains every panel and column.

Sources: Ji et al., "Cutting the Skip" (arXiv 2510.00345) for K and K + I; "Convergence of Gradient
Descent on Transformers with Residual Connections" (arXiv 2506.05249) for kappa of the attention's
output; beyond/theory.py for the APJN.
"""

import argparse
import json
import math
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from beyond.arms import ARM, ARMS, fresh_arm, trained_vit, untrained_vit
from beyond.theory import theory_of
from minskip import MLP, PRESETS, Attention, Block, ViT
from support.data import augmentations, image_folder, normalise
from support.errors import UserError, errors_in_one_line
from support.files import load_checkpoint, make_folder, write_atomically
from support.flags import COUNT, NAME, NOT_NEGATIVE, PATH, Parser, flag_of
from support.pictures import MaxNLocator, colour_of, plt, save_figure, shortened, tidy
from support.processes import progress, start_processes
from support.shapes import draw_shapes

# --------------------------------------------------------------------------------------------------
# Gradient norms
# --------------------------------------------------------------------------------------------------

MATRICES = "attention.W_Q attention.W_K attention.W_V attention.W_O mlp.fc1 mlp.fc2".split()


def gradient_norms(model: ViT, tokens: list[Tensor], labels: Tensor) -> dict[str, list[float]]:
    """Norms of the gradient of the loss, the mean cross-entropy, with respect to the tokens
    h^0 .. h^L, (batch, token, dim) each with its graph, and to each weight matrix of each block."""
    loss = F.cross_entropy(model.classify(tokens[-1]), labels)
    if not loss.isfinite():
        raise UserError(f"the loss of this network is {loss.item()}: nothing can be measured on it")
    variables = {"g(tokens)": tokens}
    for W in MATRICES:
        variables[f"g({W.split('.')[1]})"] = [b.get_submodule(W).weight for b in model.blocks]
    together = [x for xs in variables.values() for x in xs]
    norms = (g.norm().item() for g in torch.autograd.grad(loss, together, retain_graph=True))
    return {name: [next(norms) for _ in xs] for name, xs in variables.items()}


# --------------------------------------------------------------------------------------------------
# Jacobians: K of a sub-block, K + I, and the product J from a block to the output
# --------------------------------------------------------------------------------------------------

DENSE_LIMIT = 1200  # largest n d (tokens times width) for which K is formed: 11 MB, 0.2 s an SVD
LARGEST = 1e15  # beyond it, a condition number in float64 is rounding
CONDITIONS = ["k(K)", "k(K+I)", "k(MLP)", "k(MLP+I)"]


def attention_of(attention: Attention, y: Tensor) -> Tensor:
    """attention(y), y (token, dim), without the fused kernel, which has no second derivative."""
    mixed = attention.weights(y[None]) @ attention.queries_keys_values(y[None])[2]
    return attention.W_O(rearrange(mixed, "1 head token dim -> token (head dim)"))


def attention_jacobian(attention: Attention, y: Tensor) -> Tensor:
    """K = d attention(y) / d y in closed form, (n d, n d), rows the outputs; y is (token, dim), the
    output of the LayerNorm, which by itself has two zero singular values per token.

    Per head, q = y W_Q + b_Q and so on, P = softmax(q k^T / sqrt(d_h)), Y = v W_O:

        value   d out_a / d y_b += P_ab W_V W_O
        query   d out_a / d y_a += sum_b P_ab (W_Q k_b) (Y_b - (P Y)_a)^T / sqrt(d_h)
        key     d out_a / d y_b += P_ab (W_K q_a) (Y_b - (P Y)_a)^T / sqrt(d_h)

    The attentions of `beyond/variants.py` have other equations, so autograd differentiates them.
    """
    if type(attention) is not Attention:
        K = torch.func.jacrev(lambda y: attention_of(attention, y))(y)
        return rearrange(K, "a i b j -> (a i) (b j)")
    heads = dict(head=attention.num_heads)
    W_Q, W_K, W_V = (
        rearrange(W.weight, "(head dim) model -> head model dim", **heads)
        for W in (attention.W_Q, attention.W_K, attention.W_V)
    )
    W_O = rearrange(attention.W_O.weight, "model (head dim) -> head dim model", **heads)
    q, k, v = attention.queries_keys_values(y[None])[:, 0]  # (head, token, d_h) each
    P, Y = attention.weights(y[None])[0], v @ W_O
    centred = Y[:, None] - (P @ Y)[:, :, None]  # Y_b - (P Y)_a, (head, a, b, dim)
    scale = 1 / math.sqrt(q.shape[-1])
    K = einsum(P, W_V @ W_O, "h a b, h j i -> a i b j")
    K += scale * einsum(P, q @ W_K.mT, centred, "h a b, h a j, h a b i -> a i b j")
    query = scale * einsum(P, k @ W_Q.mT, centred, "h a b, h b j, h a b i -> a i j")
    K.diagonal(dim1=0, dim2=2).add_(rearrange(query, "a i j -> i j a"))  # where a = b
    return rearrange(K, "a i b j -> (a i) (b j)")


def mlp_jacobians(mlp: MLP, y: Tensor) -> Tensor:
    """d mlp(y) / d y for each token, (token, d, d), rows the outputs; the rest of K is zero."""
    z = mlp.fc1(y)
    slope = torch.func.grad(lambda z: mlp.activation(z).sum())(z)
    return einsum(mlp.fc2.weight, slope, mlp.fc1.weight, "i h, t h, h j -> t i j")


def condition_number(singular: Tensor) -> float:
    """kappa, the largest singular value over the smallest, at most `LARGEST`."""
    largest, smallest = singular.max().item(), singular.min().item()
    return min(largest / smallest, LARGEST) if smallest > 0 else LARGEST


def krylov_stretches(f: Callable[[Tensor], Tensor], y: Tensor, steps: int = 20) -> Tensor:
    """Singular values of J = df/dy on the space spanned by v, J^T J v, (J^T J)^2 v ..., v random.

    They lie between J's own: the largest is close to sigma_max, the smallest only an upper bound of
    sigma_min, so their ratio is a lower bound of kappa(J). J is never formed. (scipy's `svds` looks
    for sigma_min itself: without skips it had found none after ten times as many products.)
    """
    _, times_J_T = torch.func.vjp(f, y)  # u -> (J^T u,)
    _, times_J = torch.func.vjp(lambda u: times_J_T(u)[0], torch.zeros_like(y))  # its own transpose
    Q = F.normalize(torch.randn(y.numel(), 1).to(y), dim=0)  # orthonormal columns, one per step
    stretched = []
    for _ in range(steps):
        (J_q,) = times_J(Q[:, -1].view_as(y))
        stretched.append(J_q.flatten())
        Q = torch.linalg.qr(torch.column_stack([Q, times_J_T(J_q)[0].flatten()])).Q
    return torch.linalg.svdvals(torch.stack(stretched))


def shortcuts(block: Block) -> list[float]:
    """The weights of x in a block's two additions, around attention and MLP; 0 without a skip."""
    return getattr(block, "shortcuts", [float(x in block.skips) for x in ("attention", "mlp")])


def conditioning(block: Block, x: Tensor) -> dict[str, float]:
    """kappa of the attention's K and K + I, and of the MLP's, for one image's x,
    (token, dim); exact up to n d = DENSE_LIMIT, lower bounds beyond."""

    def both(K: Tensor) -> list[Tensor]:
        return [torch.linalg.svdvals(J) for J in (K, K + torch.eye(K.shape[-1]).to(K))]

    y = block.norm1(x)
    z = block.norm2(shortcuts(block)[0] * x + block.attention(y[None])[0])
    if x.numel() <= DENSE_LIMIT:
        singular = both(attention_jacobian(block.attention, y))
    else:
        singular = [
            krylov_stretches(lambda y: attention_of(block.attention, y) + r * y, y)  # noqa: B023
            for r in (0, 1)
        ]
        z = z[:: max(1, len(z) // 8)]  # about eight tokens stand for all
    singular += both(mlp_jacobians(block.mlp, z))
    return dict(zip(CONDITIONS, map(condition_number, singular)))


def block_jacobian(block: Block, x: Tensor) -> Tensor:
    """d block(x) / d x = (M N_2 + s I) (K N_1 + r I), (n d, n d), rows the outputs; x is (n, d).

    K, M, N_1, N_2: Jacobians of attention, MLP and their LayerNorms; r, s: weights of the skips.
    """
    (r, s), (n, d) = shortcuts(block), x.shape
    y = block.norm1(x)
    h = r * x + block.attention(y[None])[0]
    K = rearrange(attention_jacobian(block.attention, y), "(a i) (b j) -> a i b j", a=n, b=n)
    M = mlp_jacobians(block.mlp, block.norm2(h))
    N_1 = torch.func.vmap(torch.func.jacrev(block.norm1))(x)
    N_2 = torch.func.vmap(torch.func.jacrev(block.norm2))(h)
    A = einsum(K, N_1, "a i b j, b j k -> a i b k") + r * torch.eye(n * d).to(x).view_as(K)
    M = M @ N_2 + s * torch.eye(d).to(x)
    return rearrange(einsum(M, A, "a l i, a i b k -> a l b k"), "a l b k -> (a l) (b k)")


def conditioning_to_output(model: ViT, image: Tensor) -> dict[str, list[float]]:
    """kappa of J = d h^L / d h^l for l = 0 .. L; image is (channel, height, width).

    Each LayerNorm removes two directions per token, mean and length. So a skipless network's J has
    2 n zero singular values or more, and for all networks alike k(J) is the largest over the
    n (d - 2)-th, and k(J) half the largest over the median.
    """
    inputs = model.forward_features(image[None], list(range(len(model.blocks))))
    n, d = inputs[0].shape[1:]
    J = torch.eye(n * d).to(inputs[0])
    kappas = {"k(J)": [1.0], "k(J) half": [1.0]}
    for block, x in reversed(list(zip(model.blocks, inputs))):
        if kappas["k(J) half"][0] < LARGEST:  # otherwise it stays: lost rank does not come back
            J = J @ block_jacobian(block, x[0])
            singular = torch.linalg.svdvals(J)
        kappas["k(J)"].insert(0, condition_number(singular[: n * (d - 2)]))
        kappas["k(J) half"].insert(0, condition_number(singular[: n * d // 2]))
    return kappas


def apjn(tokens: list[Tensor], probes: int = 2) -> list[float]:
    """J^{L,l} = E ||d h^L / d h^l||_F^2 / (n d) for l = 0 .. L, averaged over the images.
    One backward pass per probe gives every l: for v of random signs, E ||J^T v||^2 = ||J||_F^2."""
    totals = [0.0] * len(tokens)
    for _ in range(probes):
        v = torch.randint(0, 2, tokens[-1].shape, device=tokens[-1].device) * 2.0 - 1
        gradients = torch.autograd.grad(tokens[-1], tokens, v.to(tokens[-1]), retain_graph=True)
        totals = [t + g.square().mean().item() / probes for t, g in zip(totals, gradients)]
    return totals


# --------------------------------------------------------------------------------------------------
# All numbers of one network
# --------------------------------------------------------------------------------------------------


def token_statistics(x: Tensor) -> dict[str, float]:
    """How different the tokens of an image are, the mean over images; x is (batch, token, dim).

    1-corr: 1 minus the mean cosine of two different tokens. eff.rank: effective rank, the exp of
    the entropy of the singular values divided by their sum (Roy and Vetterli 2007); 1 .. n.
    """
    n = x.shape[1]
    cosine = (F.normalize(x, dim=-1).sum(1).square().sum(-1) - n) / (n * (n - 1))
    difference = (1 - cosine).clamp_min(0)  # rounding can make it negative
    singular = torch.linalg.svdvals(x)
    rank = torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()
    return {"1-corr": difference.mean().item(), "eff.rank": rank.mean().item()}


def attention_statistics(block: Block, X: Tensor) -> dict[str, float]:
    """own: the mean diagonal of the attention matrices. k(Z), k(X+Z): kappa of attention's output Z
    without and with the skip, the median over images; X is a block's input, (batch, token, dim)."""
    y = block.norm1(X)
    Z = block.attention(y)
    result = {"own": block.attention.weights(y).diagonal(dim1=-2, dim2=-1).mean().item()}
    for name, output in (("k(Z)", Z), ("k(X+Z)", X + Z)):
        result[name] = statistics.median(map(condition_number, torch.linalg.svdvals(output)))
    return result


@torch.no_grad()
def measure(model: ViT, images: Tensor, labels: Tensor, title: str) -> dict[str, list[float]]:
    """Column -> its numbers for l = 0 .. L (of tokens) or for blocks 1 .. L, in float64."""
    model = model.eval().double()
    with torch.enable_grad():
        tokens = model.forward_features(images.double(), list(range(len(model.blocks) + 1)))
        result = gradient_norms(model, tokens, labels) | {"APJN": apjn(tokens)}
    bar = progress(list(zip(model.blocks, tokens)), title, unit=" blocks")
    of_blocks = [attention_statistics(b, x) | conditioning(b, x[0]) for b, x in bar]
    for rows in ([token_statistics(x) for x in tokens], of_blocks):
        result |= {key: [row[key] for row in rows] for key in rows[0]}
    return result


@torch.no_grad()
def probe(models: Iterable[ViT], images: Tensor, labels: Tensor, theory: bool, title: str) -> dict:
    """A network's record: its numbers for each seed, their medians, and the sizes behind them."""
    runs = []
    for model in models:
        model = model.to(images.device)
        n, d = model.pos_embed.shape[1:]
        if n < 2:
            raise UserError("an image is one token: nothing to compare; use a smaller --patch-size")
        # Any class gives a gradient. Without a head, the pooled feature stands in for the logits.
        classes = labels % (model.config["num_classes"] or model.config["dim"])
        numbers = measure(model, images, classes, f"{title}, seed {len(runs)}")
        if theory and model.cls_token is None:  # the theory has none
            numbers |= dict(zip(THEORY, theory_of(model, model.embed(images.double()))))
        dense = n * d <= DENSE_LIMIT
        if dense and not runs:  # the first seed only, as every block needs a large SVD
            numbers |= conditioning_to_output(model, images[0].double())
        runs.append(numbers)
    columns = {key: [run[key] for run in runs if key in run] for key in runs[0]}
    medians = {key: [statistics.median(x) for x in zip(*xs)] for key, xs in columns.items()}
    sizes = dict(depth=len(model.blocks), residual="attention" in model.blocks[0].skips, tokens=n)
    return sizes | dict(exact=dense, medians=medians, runs=runs)


# --------------------------------------------------------------------------------------------------
# What is shown: tables, conclusions, the picture
# --------------------------------------------------------------------------------------------------

GRADIENTS = "g(tokens) g(W_Q) g(W_K) g(W_V) g(W_O) g(fc1) g(fc2) APJN k(J)".split()
STATE = ["1-corr", "eff.rank", "own", *CONDITIONS, "k(Z)", "k(X+Z)"]
THEORY = ["APJN pair", "APJN scalar"]
LOWEST = 1e-8  # networks train in float32, which has 7 digits: below it, differences are lost


def points(result: dict, column: str) -> list[tuple[int, float, bool]]:
    """(block, number, whether the true number is at least this one) for a column's medians."""
    values = result["medians"].get(column, [])
    first = result["depth"] + 1 - len(values)  # some columns start at block 1
    bound = column in CONDITIONS and not result["exact"]
    return [(first + i, x, bound or x >= LARGEST) for i, x in enumerate(values)]


def three_digits(value: float, at_least: bool = False) -> str:
    """A number that is not negative, to three digits, in at most eight characters."""
    plain = 1e-3 <= value < 99950 or value == 0
    return ">=" * at_least + (f"{float(f'{value:.3g}'):g}" if plain else f"{value:.0e}")


def print_table(title: str, columns: list[str], results: dict[str, dict]) -> None:
    """Up to five blocks of each network; columns that no network has are left out."""
    columns = [c for c in columns if any(c in result["medians"] for result in results.values())]
    print(f"\n{title}\n{'block':>6}" + "".join(f"{column:>10}" for column in columns))
    for name, result in results.items():
        print(name)
        L = result["depth"]
        cells = [{b: three_digits(x, bound) for b, x, bound in points(result, c)} for c in columns]
        for block in sorted({0, 1, L // 3, 2 * L // 3, L}):
            print(f"{block:>6}" + "".join(f"{row.get(block, ''):>10}" for row in cells).rstrip())


def conclusion(name: str, result: dict) -> str:
    """Computed from the numbers, about the worst block of each kind."""

    def variation(column: str) -> str:
        values = result["medians"][column]
        ratio = max(values) / max(min(values), 1e-300)
        return three_digits(min(ratio, 1 / LOWEST), ratio > 1 / LOWEST) + "-fold"

    number = itemgetter(1)
    factor = "k(K+I)" if result["residual"] else "k(K)"  # kappa of what the network multiplies
    weakest, _, _ = min(points(result, "g(W_Q)"), key=number)
    after, least, _ = min(points(result, "1-corr"), key=number)
    worst, kappa, bound = max(points(result, factor), key=number)
    return (
        f"{name}: across the blocks the gradient with respect to the tokens varies "
        f"{variation('g(tokens)')}, with respect to W_Q {variation('g(W_Q)')}, smallest in block "
        f"{weakest}. Tokens are most alike after block {after}, with 1-corr {three_digits(least)}. "
        f"{factor} is largest in block {worst}: {three_digits(kappa, bound)}."
    )


PANELS = {  # title -> columns: the first is drawn solid, the second dashed
    "gradient with respect to the tokens": ["g(tokens)"],
    "gradient with respect to W_Q, W_K (dashed)": ["g(W_Q)", "g(W_K)"],
    "1 - correlation of two tokens": ["1-corr"],
    "gradient with respect to W_V, W_O (dashed)": ["g(W_V)", "g(W_O)"],
    "gradient with respect to fc1, fc2 (dashed)": ["g(fc1)", "g(fc2)"],
    "attention of a token to itself": ["own"],
    "kappa of the attention's K, K + I (dashed)": ["k(K)", "k(K+I)"],
    "kappa of J (dashed: of its better half)": ["k(J)", "k(J) half"],
    "APJN (theory: dots; scalar form: crosses)": ["APJN", *THEORY],
}
LOOKS = {column: dict(ls="--") for columns in PANELS.values() for column in columns[1:]}
LOOKS |= dict(zip(THEORY, [dict(ls="", marker="o", mec="black"), dict(ls="", marker="x")]))


def log_tick(value: float, _: int) -> str:
    """A power of ten. The ends, where all values beyond them are drawn, say so."""
    sign = "≤" if value <= LOWEST else "≥" if value >= LARGEST else ""
    return f"{sign}$10^{{{math.log10(value):.0f}}}$"


def draw_column(ax: plt.Axes, column: str, result: dict, look: dict) -> None:
    """A column of one network against the block, with a band that spans the seeds."""
    low, high = (0.0, 1.0) if column == "own" else (LOWEST, LARGEST)
    blocks, values, bounds = zip(*points(result, column))
    look = look | LOOKS.get(column, {})
    if any(bounds):
        look |= dict(marker="^", markevery=[i for i, bound in enumerate(bounds) if bound])
    ax.plot(blocks, torch.tensor(values, dtype=torch.float64).clamp(low, high), ms=5, **look)
    if column not in LOOKS:
        runs = torch.tensor([run[column] for run in result["runs"] if column in run])
        least, most = runs.clamp(low, high).aminmax(dim=0)
        ax.fill_between(blocks, least, most, color=look["color"], alpha=0.12, lw=0)


def draw(results: dict[str, dict], path: Path, title: str) -> None:
    """One panel per quantity against the block number; panels without numbers are left out.
    A colour for each arm or run; paler means shallower, or before training."""
    groups = list(dict.fromkeys(result["group"] for result in results.values()))
    shades = list(dict.fromkeys(result["shade"] for result in results.values()))
    looks = {}
    for name, result in results.items():
        i, shade = groups.index(result["group"]), shades.index(result["shade"])
        look = dict(color=colour_of(groups[i], groups), alpha=(shade + 1) / len(shades))
        looks[name] = look | dict(lw=max(2.8 - 0.5 * i, 0.8))  # so that coinciding lines show
    measured = {column for result in results.values() for column in result["medians"]}
    panels = {name: columns for name, columns in PANELS.items() if columns[0] in measured}
    width = 4 if len(panels) == 8 else 3
    height = len(panels) // width
    size = dict(figsize=(3.7 * width, 2.7 * height + 1), layout="constrained")
    figure, axes = plt.subplots(height, width, **size)
    figure.get_layout_engine().set(h_pad=0.08)
    for ax, (name, columns) in zip(axes.flat, panels.items()):
        for column in columns:
            for network, result in results.items():
                if column in result["medians"]:
                    draw_column(ax, column, result, looks[network])
        if "own" in columns:
            ax.set_ylim(0, 1)
        else:
            ax.set_yscale("log")
            ax.yaxis.set(major_locator=plt.LogLocator(numticks=6), major_formatter=log_tick)
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, high / 100), max(high, low * 100))  # so that two ticks show
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(ax, name if measured.issuperset(columns) else columns[0])
    for ax in axes[-1]:
        ax.set_xlabel("block (0: the embedding)", fontsize=9)
    lines = [plt.Line2D([], [], label=results[x]["label"], **look) for x, look in looks.items()]
    per_row = max(1, 130 // max(len(line.get_label()) + 8 for line in lines))
    top = dict(loc="outside upper center", ncols=per_row, frameon=False)
    figure.legend(handles=lines, title=title, **top)
    notes = [plt.Line2D([], [], color="0.3", marker="^", ls="", label="at least this value")]
    if max(len(result["runs"]) for result in results.values()) > 1:
        notes += [plt.Rectangle((0, 0), 1, 1, color="0.85", label="range of the seeds")]
    figure.legend(handles=notes, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------

FRESH = dict(  # settings of fresh networks; a checkpoint has its own
    variants=ARMS, depths=[12], model="nano", image_size=32, patch_size=8, seeds=5,
    pos_embed_std=None, pool="mean",  # the same pool for all, so that gradients compare
)  # fmt: skip
OTHERS = dict(data=None, images=4, checkpoint=None, before=False, device="auto", out="runs/probe")


def parse_arguments() -> argparse.Namespace:
    p = Parser(__doc__, argument_default=argparse.SUPPRESS)
    add = p.add_argument
    add("--variants", nargs="+", type=ARM, help=f"arms to compare [{', '.join(ARMS)}]")
    add("--depths", nargs="+", type=COUNT, help="numbers of blocks to compare [12]")
    add("--model", choices=list(PRESETS), help="width and number of heads [nano]")
    add("--image-size", type=COUNT, help="side of the images in pixels [32]")
    add("--patch-size", type=COUNT, help="side of a patch in pixels [8]")
    add("--pos-embed-std", type=NOT_NEGATIVE, help="larger makes tokens differ more [the init's]")
    add("--pool", choices=["cls", "mean"], help="class token, or mean of the patch tokens [mean]")
    add("--data", type=NAME, help="real images: a folder with val/<class>/* [synthetic images]")
    add("--images", type=COUNT, help="how many; kappas of K and J are those of the first [4]")
    add("--checkpoint", nargs="+", type=NAME, help="trained networks instead of --variants [none]")
    add("--before", action="store_true", help="also show them as they were before training [no]")
    add("--seeds", type=COUNT, help="fresh networks per arm; medians are shown [5]")
    add("--device", help="auto, cpu, cuda or cuda:N [auto: a GPU if there is one]")
    add("--out", type=PATH, help="folder for probe.png and probe.json [runs/probe]")
    given = vars(p.parse_args())
    if "checkpoint" in given and (useless := [flag_of(name) for name in FRESH if name in given]):
        raise UserError(f"{useless[0]} is about fresh networks; leave it out with --checkpoint")
    if "before" in given and "checkpoint" not in given:
        raise UserError("--before is about trained networks: add --checkpoint")
    return argparse.Namespace(**FRESH | OTHERS | given)


def fresh_networks(args: argparse.Namespace) -> dict[tuple[str, str], Iterable[ViT]]:
    """(arm, depth) -> one network per seed, each built when its turn comes."""
    names = ("image_size", "patch_size", "pool", "pos_embed_std")
    shape = {k: v for k, v in vars(args).items() if k in names and v is not None}
    shape |= PRESETS[args.model] | dict(num_classes=10)

    def one_per_seed(arm: str, depth: int) -> Iterator[ViT]:
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            yield fresh_arm(arm, **shape | dict(depth=depth))

    return {(a, f"{L} blocks"): one_per_seed(a, L) for a in args.variants for L in args.depths}


def trained_networks(args: argparse.Namespace) -> dict[tuple[str, str], Iterable[ViT]]:
    """(run, "before training" or "trained") -> [the network]."""
    networks = {}
    for path in args.checkpoint:
        checkpoint = load_checkpoint(path)
        trained = trained_vit(checkpoint)
        name = Path(path).resolve().parent.name
        name = path if (name, "trained") in networks else name
        if args.before:
            networks[name, "before training"] = [untrained_vit(checkpoint)]
        networks[name, "trained"] = [trained]
    sizes = {model.config["image_size"] for [model] in networks.values()}
    if len(sizes) > 1:
        raise UserError(f"--checkpoint: different image sizes {sorted(sizes)}; use one at a time")
    args.image_size, args.seeds = sizes.pop(), 1
    return networks


def load_images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(images, labels): normalised as in training, (batch, 3, size, size) and (batch,)."""
    if args.data is None:
        images, labels, _ = draw_shapes(list(range(args.images)), args.image_size, "val")
    else:
        folder = image_folder(args.data, "val", need_labels=True)
        _, transform = augmentations(args.image_size, drawn=False)
        pairs = [folder[i * len(folder) // args.images] for i in range(args.images)]
        images = torch.stack([transform(image) for image, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
    return normalise(images), labels


def main() -> None:
    args = parse_arguments()
    device, _, _ = start_processes(args.device)
    out, started = Path(args.out), time.time()
    make_folder(out)
    networks = trained_networks(args) if args.checkpoint else fresh_networks(args)
    images, labels = (x.to(device) for x in load_images(args))
    groups = list(dict.fromkeys(group for group, _ in networks))
    labels_of = shortened(groups) if args.checkpoint else dict(zip(groups, groups))
    several = len({shade for _, shade in networks}) > 1
    results = {}
    torch.manual_seed(0)  # for trained networks: the random signs of `apjn`
    for (group, shade), models in networks.items():
        ending = f", {shade}" if several else ""
        record = dict(group=group, shade=shade, label=labels_of[group] + ending)
        theory = not args.checkpoint and group in ("residual", "skipless-default")  # default init
        results[group + ending] = record | probe(models, images, labels, theory, group + ending)

    what = "trained networks" if args.checkpoint else f"{args.model} at initialisation"
    tokens = " or ".join(str(n) for n in sorted({r["tokens"] for r in results.values()}))
    title = f"{what}: {tokens} tokens, {len(images)} images of {args.data or 'Shapes'}"
    title += f", median of {args.seeds} seeds" * (args.seeds > 1)
    draw(results, out / "probe.png", title)
    settings = {k: str(v) for k, v in vars(args).items()}
    text = json.dumps(dict(torch=torch.__version__, arguments=settings, networks=results))
    write_atomically(out / "probe.json", lambda path: path.write_text(text))

    print_table("norms of the gradient of the loss, APJN and kappa of J", GRADIENTS, results)
    print_table("tokens, attention and condition numbers", STATE, results)
    print()
    for name, result in results.items():
        print(textwrap.fill(conclusion(name, result), 100, subsequent_indent="    "))
    print(f"\n{out}/probe.png, {out}/probe.json  ({time.time() - started:.0f} s)")


if __name__ == "__main__":
    with errors_in_one_line("take fewer --images or a smaller --model"):
        main()
