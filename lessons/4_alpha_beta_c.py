"""What do the three constants of the paper's init do?

    python lessons/4_alpha_beta_c.py    # half a minute; its picture goes to runs/lessons

In the paper's init (minskip.py) each head's W_Q W_K^T is the best rank-d_h approximation of
alpha Z + beta I, with Z random, and W_V and W_O are c times orthogonal matrices. We look at
attention before training, on independent tokens of variance 1, as a LayerNorm makes them.

beta   raises each token's logit with itself, so the token keeps a larger share of its attention
       for itself, K is better conditioned (from beta = 0.6 on), and tokens stay apart longer.
alpha  scales the random logits between different tokens: attention turns to some of the other
       tokens instead of to their average. The larger it is, the more beta it takes.
c      cancels in the forward pass, because a LayerNorm follows. It divides the gradients of W_V and
       W_O by c; Adam and SOAP, whose steps ignore that, move them 1 / c as far for their size.

What to see: the same constants do not mean the same at every size. (2, 0.6) leaves a token of ViT-B
three quarters of its attention, but a token of nano with its eight narrow heads less than a third;
nano's tokens are alike after seven blocks of twelve, whatever c is.

Change and try: (2, 10) in CONSTANTS. Even in nano a token keeps 0.85, and tokens stay apart longer.
"""

import sys
from statistics import mean, median

import torch
import torch.nn.functional as F
from einops import rearrange

sys.path.insert(1, f"{sys.path[0]}/..")  # the project's root
import minskip
from support.errors import errors_in_one_line
from support.flags import lesson_flags
from support.pictures import OTHER_COLOURS, plt, save_figure, tidy

SIZES = {  # width d, heads, tokens
    "ViT-B": (768, 12, 197),
    "ViT-S": (384, 6, 197),
    "tiny": (192, 3, 65),
    "nano, 2 heads": (64, 2, 16),
    "nano, 8 heads": (64, 8, 16),
}
CONSTANTS = [(2, 0.6), (1.8, 1), (2, 3)]  # alpha, beta: ViT-B's, ViT-S's with DINO, more
BETAS = [0, 0.3, 0.6, 1, 1.5, 2]
NAMES = ["W_Q", "W_K", "W_V", "W_O"]


@torch.no_grad()
def paper_attention(d: int, heads: int, alpha: float, beta: float, seed: int) -> minskip.Attention:
    torch.manual_seed(seed)
    attention = minskip.Attention(d, heads)
    W_Q, W_K = minskip.query_key_projections(d, heads, alpha, beta)
    for name, W in zip(NAMES, (W_Q, W_K, *minskip.value_output_projections(d, c=1.0))):
        minskip.set_linear_(getattr(attention, name), W)
    return attention


def own_token_share(size: str, alpha: float, beta: float, seed: int) -> float:
    """The share of its attention that a token keeps for itself, averaged over tokens and heads."""
    d, heads, n = SIZES[size]
    P = paper_attention(d, heads, alpha, beta, seed).weights(torch.randn(1, n, d))  # (1, h, n, n)
    return P.diagonal(dim1=2, dim2=3).mean().item()


def kappa(alpha: float, beta: float, seed: int) -> float:
    """Condition number of K, the derivative of attention; nano with 2 heads, 8 tokens."""
    attention = paper_attention(64, 2, alpha, beta, seed).double()
    K = torch.autograd.functional.jacobian(attention, torch.randn(1, 8, 64).double())
    return torch.linalg.cond(rearrange(K, "1 a i 1 b j -> (a i) (b j)")).item()


def skipless_nano(alpha: float, beta: float, c: float) -> minskip.ViT:
    torch.manual_seed(0)
    model = minskip.ViT(16, 4, 0, dim=64, depth=12, num_heads=8, residual=False, pool="mean")
    return minskip.conditioned_init_(model, alpha, beta, c)


def differences(model: minskip.ViT) -> list[float]:
    """As in lesson 3: 1 - correlation of two tokens, of the input and after each block."""
    outputs = [torch.randn(1, 16, 64)]
    for block in model.blocks:
        outputs.append(block(outputs[-1]))
    return [torch.pdist(F.normalize(x[0], dim=-1)).square().mean().item() / 2 for x in outputs]


def gradient_norms(c: float) -> list[float]:
    """Of NAMES in the first block, for random images and a random linear loss."""
    model = skipless_nano(2, 0.6, c)
    (model(torch.randn(4, 3, 16, 16)) * torch.randn(4, 64)).sum().backward()
    return [getattr(model.blocks[0].attention, W).weight.grad.norm().item() for W in NAMES]


def main() -> None:
    args = lesson_flags(__doc__, seeds=3)
    seeds = range(args.seeds)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    print(f"own-token share, mean and range of {args.seeds} seeds, at (alpha, beta) =", *CONSTANTS)
    for size, colour in zip(SIZES, OTHER_COLOURS):
        runs = [[own_token_share(size, *constants, s) for s in seeds] for constants in CONSTANTS]
        print(f"{size:<14}", *(f"{mean(r):8.2f} ({min(r):.2f} .. {max(r):.2f})" for r in runs))
        means = [mean(own_token_share(size, 2, beta, s) for s in seeds) for beta in BETAS]
        left.plot(BETAS, means, ".-", color=colour, label=size)
    for alpha, colour in zip((0.5, 1, 2), OTHER_COLOURS):
        medians = [median(kappa(alpha, beta, s) for s in seeds) for beta in BETAS]
        middle.semilogy(BETAS, medians, ".-", color=colour, label=f"alpha = {alpha}")
    for (alpha, beta), colour in zip(CONSTANTS, OTHER_COLOURS):
        for c, style in ((3, "-"), (1, ".")):
            model, label = skipless_nano(alpha, beta, c), f"({alpha}, {beta}), c = {c}"
            right.semilogy(differences(model), style, color=colour, label=label)
    ratios = zip(NAMES, gradient_norms(3), gradient_norms(1))
    print("gradient with c = 3 over that with c = 1:", *(f"{W} {a / b:.3f} " for W, a, b in ratios))
    tidy(left, "own-token share of attention, against beta; alpha = 2")
    tidy(middle, "kappa(K), against beta; nano with 2 heads, 8 tokens")
    tidy(right, "1 - correlation of nano's tokens after each block")
    for ax in (left, middle, right):
        ax.legend(frameon=False, fontsize=8)
    save_figure(figure, args.out / "4_alpha_beta_c.png")


if __name__ == "__main__":
    with errors_in_one_line("leave ViT-B out of SIZES"):
        main()
