"""Why does attention, of all layers, need its skip connection?

    python lessons/3_why_attention_needs_a_skip.py         some seconds; writes a picture

Attention replaces each token by a weighted average of all tokens: y = softmax(logits) x W_V W_O.
With the usual small weights the logits are close to 0, so every token becomes nearly the same
average. K, the derivative of the output with respect to the input, shows it: of its n d singular
values (n tokens of width d) only d stand out, those of the average. What makes the tokens different
is lost on the way forward, and its gradient on the way back.

What to see: on the left how K's singular values drop up to the d-th. Adding the identity, which is
what a skip does, lifts all of them to about 1. On the right a network of such layers, each behind a
LayerNorm: without skips all tokens are alike after two blocks. Larger weights make attention
sharper and delay the collapse, but they do not prevent it.

Change and try: STDS, say 0.5 in place of 0.15. Attention then picks single tokens, several tokens
pick the same one, and the collapse comes all the same.
"""

import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.errors import errors_in_one_line
from support.files import make_folder
from support.flags import COUNT, PATH, Parser
from support.pictures import ARM_COLOURS, save_figure, tidy

TOKENS, DIM, BLOCKS = 6, 32, 8
STDS = {"usual": 0.02, "larger": 0.15}  # of all weights; 0.02 is the usual init of a ViT


def draw_weights(std: float) -> list[Tensor]:
    """W_Q, W_K, W_V, W_O, each (DIM, DIM)."""
    return [std * torch.randn(DIM, DIM, dtype=torch.float64) for _ in range(4)]


def attention(x: Tensor, W_Q: Tensor, W_K: Tensor, W_V: Tensor, W_O: Tensor) -> Tensor:
    """One head of softmax attention, (token, dim) -> (token, dim)."""
    logits = (x @ W_Q) @ (x @ W_K).T / math.sqrt(DIM)  # (token, token)
    return logits.softmax(dim=-1) @ x @ W_V @ W_O


def singular_values(std: float, skip: bool) -> Tensor:
    """Of K, or of K + I with the skip, for independent tokens; (token * dim,), largest first."""
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    K = torch.func.jacrev(attention)(x, *draw_weights(std))  # d y[a, i] / d x[b, j]
    K = rearrange(K, "a i b j -> (a i) (b j)")
    return torch.linalg.svdvals(K + skip * torch.eye(TOKENS * DIM))


def differences(std: float, skip: bool) -> list[float]:
    """1 - correlation of two tokens, averaged over all pairs, of the input and after each block.

    0: all tokens are alike; 1: they are independent.
    """
    x, found = torch.randn(TOKENS, DIM, dtype=torch.float64), []
    for block in range(BLOCKS + 1):
        if block:
            y = attention(F.layer_norm(x, (DIM,)), *draw_weights(std))
            x = x + y if skip else y
        u = F.normalize(x, dim=-1)
        # |u_a - u_b|^2 = 2 - 2 correlation; the plain difference would drown in rounding.
        squares = (u[:, None] - u[None]).square().sum(-1)  # (token, token)
        found.append(squares.sum().item() / 2 / (TOKENS * (TOKENS - 1)))
    return found


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=PATH, default="runs/lessons", help="folder for the picture")
    parser.add_argument("--seeds", type=COUNT, default=5, help="draws of the weights [5]")
    args = parser.parse_args()
    make_folder(args.out)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    print(f"median of {args.seeds} seeds         kappa     1 - correlation of tokens after block")
    print(f"{'':<26}{'':>9}{1:>12}{2:>12}{BLOCKS:>12}")
    for skip, arm in ((True, "residual"), (False, "skipless-default")):
        for (name, std), style in zip(STDS.items(), ("-", "--")):
            torch.manual_seed(0)
            s = (
                torch.stack([singular_values(std, skip) for _ in range(args.seeds)])
                .median(0)
                .values
            )
            d = torch.tensor([differences(std, skip) for _ in range(args.seeds)]).median(0).values
            title = f"{'K + I' if skip else 'K'}, {name} weights"
            print(f"{title:<22}{s[0] / s[-1]:13.2g}{d[1]:12.2g}{d[2]:12.2g}{d[-1]:12.2g}")
            how = dict(color=ARM_COLOURS[arm], ls=style, lw=1.8)
            left.plot(range(1, len(s) + 1), s, **how)
            right.plot(d, **how)
    left.axvline(DIM, color="grey", lw=0.8)
    left.text(DIM + 3, 1e-8, "d: the average token", color="grey", fontsize=9)
    blue, orange = ARM_COLOURS["residual"], ARM_COLOURS["skipless-default"]
    for ax, x, y, text, colour in (
        (left, 60, 2.5, "K + I, both", blue),
        (left, 85, 0.3, "K, larger weights", orange),
        (left, 60, 5e-4, "K, usual weights", orange),
        (right, 3, 1e-3, "with skips, both", blue),
        (right, 3.4, 1e-13, "without, larger weights", orange),
        (right, 0.1, 1e-20, "without,\nusual weights", orange),
        (right, 5.2, 1e-30, "rounding of float64", "grey"),
    ):
        ax.text(x, y, text, color=colour, fontsize=9)
    left.set(yscale="log", xlabel=f"number of the singular value, 1 .. n d = {TOKENS} x {DIM}")
    right.set(yscale="log", xlabel="blocks passed")
    tidy(left, "singular values of attention's derivative")
    tidy(right, "difference of tokens, 1 - correlation")
    save_figure(figure, args.out / "3_why_attention_needs_a_skip.png")
    print(f"{args.out}/3_why_attention_needs_a_skip.png")


if __name__ == "__main__":
    with errors_in_one_line("use a smaller TOKENS or DIM"):
        main()
