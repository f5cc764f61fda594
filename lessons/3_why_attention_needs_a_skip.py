"""Why does attention, of all layers, need its skip connection?

    python lessons/3_why_attention_needs_a_skip.py    # seconds; its picture goes to runs/lessons

Attention replaces each token by a weighted average of all tokens: y = softmax(logits) x W_V W_O.
With small weights the logits are close to 0, so every token becomes nearly the same average. Of the
n d singular values of K = dy/dx (n tokens of width d) only d stand out then, those of the average.
What makes the tokens different is lost on the way forward, and its gradient on the way back.

What to see: on the left, with the usual weights, K's singular values fall steeply up to the d-th.
Adding the identity, which is what a skip does, lifts all of them to about 1. On the right a network
of such layers, each behind a LayerNorm: without skips all tokens are alike after two blocks. Larger
weights make attention sharper and delay the collapse, but they do not prevent it.

Change and try: 0.5 in place of 0.15 in STDS. Attention then picks single tokens, several tokens
pick the same one, and the collapse comes all the same.
"""

import sys

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

sys.path.insert(1, f"{sys.path[0]}/..")  # the project's root
from support.errors import errors_in_one_line
from support.flags import lesson_flags
from support.pictures import ARM_COLOURS, plt, save_figure, tidy

TOKENS, DIM, BLOCKS = 6, 32, 8
STDS = {"usual": 0.02, "larger": 0.15}  # of all weights; 0.02 is the usual init of a ViT


def attention(x: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, W_O: Tensor) -> Tensor:
    """One head of softmax attention, (token, dim) -> (token, dim)."""
    logits = (x @ W_Q) @ (x @ W_K).T / DIM**0.5  # (token, token)
    return logits.softmax(dim=-1) @ x @ W_V @ W_O


def spectrum(std: float, skip: bool) -> list[float]:
    """Singular values of K, or with a skip of K + I, for independent tokens, the largest first."""
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    W = std * torch.randn(4, DIM, DIM, dtype=torch.float64)
    K = torch.func.jacrev(attention)(x, *W)  # d y[a, i] / d x[b, j]
    K = rearrange(K, "a i b j -> (a i) (b j)")
    return torch.linalg.svdvals(K + skip * torch.eye(TOKENS * DIM)).tolist()


def differences(std: float, skip: bool) -> list[float]:
    """1 - correlation of two tokens, averaged over all pairs, of the input and after each block;
    it is |u_a - u_b|^2 / 2, u being a token scaled to length 1."""
    outputs = [torch.randn(TOKENS, DIM, dtype=torch.float64)]
    for _ in range(BLOCKS):
        x, W = outputs[-1], std * torch.randn(4, DIM, DIM, dtype=torch.float64)
        y = attention(F.layer_norm(x, (DIM,)), *W)
        outputs.append(x + y if skip else y)
    return [torch.pdist(F.normalize(x, dim=-1)).square().mean().item() / 2 for x in outputs]


def main() -> None:
    args = lesson_flags(__doc__, seeds=5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    print(f"median of {args.seeds} seeds{'kappa':>24}   1 - correlation after block 1, 2, {BLOCKS}")
    for skip, arm in ((True, "residual"), (False, "skipless-default")):
        for (size, std), style in zip(STDS.items(), ("-", "--")):
            torch.manual_seed(0)
            s = torch.tensor([spectrum(std, skip) for _ in range(args.seeds)]).median(0).values
            d = torch.tensor([differences(std, skip) for _ in range(args.seeds)]).median(0).values
            name = f"{'K + I (skip)' if skip else 'K (no skip)'}, {size} weights"
            print(f"{name:<29}{s[0] / s[-1]:12.2g}{d[1]:12.2g}{d[2]:12.2g}{d[-1]:12.2g}")
            left.semilogy(range(1, len(s) + 1), s, style, color=ARM_COLOURS[arm], label=name)
            right.semilogy(d, style, color=ARM_COLOURS[arm])
    left.axvline(DIM, color="grey", lw=0.8, label="d, the width of a token")
    left.legend(frameon=False, fontsize=8)
    tidy(left, f"the n d = {TOKENS} x {DIM} singular values of attention's derivative")
    tidy(right, "1 - correlation of tokens after each block; 1e-32 is rounding")
    save_figure(figure, args.out / "3_why_attention_needs_a_skip.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller TOKENS or DIM"):
        main()
