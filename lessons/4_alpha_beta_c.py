"""What do the three constants of the paper's init do?

    python lessons/4_alpha_beta_c.py               half a minute; writes 4_alpha_beta_c.png

In the paper's init (minskip.py) each head's W_Q W_K^T is the best rank-d_h approximation of
alpha Z + beta I, with Z random, and W_V and W_O are c times orthogonal matrices. We look at
attention before training, on independent tokens of variance 1, as a LayerNorm makes them.

beta   raises each token's logit with itself, so the token keeps a larger share of its attention
       for itself, K is better conditioned, and tokens stay apart through more blocks.
alpha  scales the random logits between different tokens: attention turns to some of the other
       tokens instead of to their average. The larger it is, the more beta it takes.
c      cancels in the forward pass, because a LayerNorm follows. It divides the gradients of W_V and
       W_O by c; Adam and SOAP, whose steps ignore that, move them 1 / c as far for their size.

What to see: the same constants do not mean the same at every size. (2, 0.6) leaves a token of ViT-B
three quarters of its attention, but a token of nano with its eight narrow heads less than a third;
nano's tokens are alike after seven blocks of twelve, whatever c is.

Change and try: add (2, 10) to CONSTANTS. A token then keeps 0.86 of its attention even in
nano, and the tokens stay apart for some four more blocks.
"""

import sys
from pathlib import Path
from statistics import mean, median

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minskip
from support.errors import errors_in_one_line
from support.files import make_folder
from support.flags import COUNT, PATH, Parser
from support.pictures import OTHER_COLOURS, save_figure, tidy

SIZES = {  # width d, heads, tokens
    "ViT-B": (768, 12, 197),
    "ViT-S": (384, 6, 197),
    "tiny": (192, 3, 65),
    "nano, 2 heads": (64, 2, 16),
    "nano, 8 heads": (64, 8, 16),
}
PUBLISHED = [(2, 0.6), (1.8, 1)]  # alpha and beta: ViT-B with labels, ViT-S with DINO
CONSTANTS = [*PUBLISHED, (2, 3)]  # of the picture on the right
BETAS = [0, 0.3, 0.6, 1, 1.5, 2]
NAMES = ["W_Q", "W_K", "W_V", "W_O"]


@torch.no_grad()
def paper_attention(d: int, heads: int, alpha: float, beta: float) -> minskip.Attention:
    attention = minskip.Attention(d, heads)
    Ws = (
        *minskip.query_key_projections(d, heads, alpha, beta),
        *minskip.value_output_projections(d, c=1.0),
    )
    for name, W in zip(NAMES, Ws):
        minskip.set_linear_(getattr(attention, name), W)
    return attention


@torch.no_grad()
def own_token_share(size: str, alpha: float, beta: float, seed: int) -> float:
    """The share of its attention that a token keeps for itself, averaged over tokens and heads."""
    torch.manual_seed(seed)
    d, heads, n = SIZES[size]
    P = paper_attention(d, heads, alpha, beta).weights(
        torch.randn(1, n, d)
    )  # (1, head, token, token)
    return P.diagonal(dim1=2, dim2=3).mean().item()


def kappa(alpha: float, beta: float, seed: int) -> float:
    """Condition number of K, the derivative of attention; nano with 2 heads, 8 tokens."""
    torch.manual_seed(seed)
    attention, x = paper_attention(64, 2, alpha, beta).double(), torch.randn(1, 8, 64).double()
    K = torch.autograd.functional.jacobian(attention, x)
    return torch.linalg.cond(rearrange(K, "1 a i 1 b j -> (a i) (b j)")).item()


def skipless_nano(alpha: float, beta: float, c: float, seed: int) -> minskip.ViT:
    torch.manual_seed(seed)
    model = minskip.ViT(16, 4, 0, dim=64, depth=12, num_heads=8, residual=False, pool="mean")
    return minskip.conditioned_init_(model, alpha, beta, c)


@torch.no_grad()
def differences(model: minskip.ViT) -> list[float]:
    """1 - correlation of two tokens, averaged over all pairs, at the input and after each block."""
    x, found = torch.randn(1, 16, 64), []
    for block in [nn.Identity(), *model.blocks]:
        x = block(x)
        u = F.normalize(x[0], dim=-1)  # |u_a - u_b|^2 = 2 - 2 correlation
        found.append((u[:, None] - u).square().sum().item() / 2 / (len(u) * (len(u) - 1)))
    return found


def gradient_norms(c: float) -> list[float]:
    """Of NAMES in the first block, for random images and a random linear loss."""
    model = skipless_nano(2, 0.6, c, seed=0)
    (model(torch.randn(4, 3, 16, 16)) * torch.randn(4, 64)).sum().backward()
    return [getattr(model.blocks[0].attention, W).weight.grad.norm().item() for W in NAMES]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    parser.add_argument("--seeds", type=COUNT, default=3, help="draws of the weights [3]")
    args = parser.parse_args()
    make_folder(args.out)
    seeds, how = range(args.seeds), dict(marker="o", ms=4)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    print(f"own-token share, mean and range of {args.seeds} seeds, at (alpha, beta) of")
    print("{:<16}{!s:<24}{!s}".format("", *PUBLISHED))
    for size, colour in zip(SIZES, OTHER_COLOURS):
        runs = [[own_token_share(size, *constants, s) for s in seeds] for constants in PUBLISHED]
        texts = [f"{mean(run):.2f} ({min(run):.2f} .. {max(run):.2f})" for run in runs]
        print(f"{size:<16}{texts[0]:<24}{texts[1]}")
        means = [mean(own_token_share(size, 2, beta, s) for s in seeds) for beta in BETAS]
        left.plot(BETAS, means, color=colour, label=size, **how)
    for alpha, colour in zip((0.5, 1, 2), OTHER_COLOURS):
        medians = [median(kappa(alpha, beta, s) for s in seeds) for beta in BETAS]
        middle.plot(BETAS, medians, color=colour, label=f"alpha = {alpha}", **how)
    for (alpha, beta), colour in zip(CONSTANTS, OTHER_COLOURS):
        line, dots = (differences(skipless_nano(alpha, beta, c, seed=0)) for c in (3, 1))
        right.plot(line, color=colour, label=f"({alpha}, {beta})")
        right.plot(dots, "o", ms=4, color=colour)
    ratios = zip(NAMES, gradient_norms(3), gradient_norms(1))
    print("gradient with c = 3 over that with c = 1:", *(f"{W} {a / b:.3f} " for W, a, b in ratios))

    for ax, xlabel, scale, title in (
        (left, "beta, at alpha = 2", "linear", "own-token share of attention"),
        (middle, "beta", "log", "kappa(K), nano with 2 heads, 8 tokens"),
        (right, "blocks passed; lines c = 3, dots c = 1", "log", "1 - correlation of tokens, nano"),
    ):
        ax.set(xlabel=xlabel, yscale=scale)
        tidy(ax, title)
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, args.out / "4_alpha_beta_c.png")
    print(f"{args.out}/4_alpha_beta_c.png")


if __name__ == "__main__":
    with errors_in_one_line("leave ViT-B out of SIZES"):
        main()
