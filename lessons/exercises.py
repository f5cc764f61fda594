"""Answers to a tutorial's exercises on residual connections, a function each.

    python demos/exercises.py                      some seconds; prints three tables

1. Other ways to combine x and F(x): what the loss's gradient is at the first of 50 layers, where
   F(x) = tanh(W x + b) with nn.Linear's own init, of width 64, and the loss is the last's sum with
   random signs (the plain sum is 0 behind a LayerNorm, whatever the weights).
2. How large activations are on the way through them.
3. The greatest depth at which Adam still halves the loss of 32 examples, without skips and with.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import engine

LAYERS, WIDTH = 50, 64
SHOWN = [1, 5, 10, 25, 50]  # layers
DEPTHS = [2, 4, 8, 16, 32, 64, 128]
STEPS = 200


# --------------------------------------------------------------------------------------------------
# The combinations. Each is a layer: (x, F(x)) -> the next x.
# --------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """F(x): no skip"""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class Skip(Plain):
    """x + F(x)"""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Scaled(Plain):
    """x + 0.1 F(x): a fixed factor, as in the tutorial's own demo"""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.branch(x)


class Gate(Plain):
    """x + g F(x): a learned number g from 0 on: starts as the identity"""

    def __init__(self):
        super().__init__()
        self.g = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g * self.branch(x)


class Highway(Plain):
    """(1 - T) x + T F(x), T = sigmoid(V x - 2): the gate shuts the skip as well"""

    def __init__(self):
        super().__init__()
        self.transform = nn.Linear(WIDTH, WIDTH)
        nn.init.constant_(self.transform.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        T = torch.sigmoid(self.transform(x))
        return (1 - T) * x + T * self.branch(x)


class Product(Plain):
    """x F(x): no sum, so no 1 in the derivative; small factors multiply"""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.branch(x)


class Dropout(Plain):
    """x + dropout(F(x)), a half: on the sum it would cut the skip too"""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.branch(x), 0.5)


class Projection(Plain):
    """P x + F(x), P learned, as where the width changes: a product of P's again"""

    def __init__(self):
        super().__init__()
        self.P = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.P(x) + self.branch(x)


class PostNorm(Plain):
    """LayerNorm(x + F(x)): each norm divides the skip as well"""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.branch(x))


KINDS = [Plain, Skip, Scaled, Gate, Highway, Product, Dropout, Projection, PostNorm]


# --------------------------------------------------------------------------------------------------
# What is asked of them
# --------------------------------------------------------------------------------------------------


def network(kind: Callable[[], nn.Module], depth: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(kind() for _ in range(depth)))


def through(layers: nn.Sequential) -> tuple[float, list[float]]:
    """(norm of the loss's gradient by the input, root mean square after each layer)"""
    h = [torch.randn(1, WIDTH, requires_grad=True)]
    for layer in layers:
        h.append(layer(h[-1]))
    signs = torch.randint(0, 2, (WIDTH,)) * 2.0 - 1
    [gradient] = torch.autograd.grad((h[-1] * signs).sum(), h[0])
    return gradient.norm().item(), [x.square().mean().sqrt().item() for x in h[1:]]


def learns(kind: Callable[[], nn.Module], depth: int, seed: int) -> bool:
    """Whether Adam halves the loss within STEPS at one of two rates.

    32 random inputs, each of one of ten classes; a linear head reads them off the last layer.
    """
    for lr in (1e-3, 3e-3):
        layers = network(kind, depth, seed).append(nn.Linear(WIDTH, 10))
        x, target = torch.randn(32, WIDTH), torch.randint(10, (32,))
        optimizer, losses = torch.optim.Adam(layers.parameters(), lr), []
        for _ in range(STEPS):
            loss = F.cross_entropy(layers(x), target)
            losses.append(loss.item())
            if losses[-1] < losses[0] / 2:
                return True
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return False


def greatest_depth(kind: Callable[[], nn.Module], seed: int) -> int:
    """The last of DEPTHS before the first that does not learn."""
    reached = 0
    for depth in DEPTHS:
        if not learns(kind, depth, seed):
            break
        reached = depth
    return reached


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--seeds", type=cli.count, default=20, help="draws of the weights")
    args = parser.parse_args()
    found = {
        kind: [through(network(kind, LAYERS, seed)) for seed in range(args.seeds)] for kind in KINDS
    }
    print(f"gradient at the first of {LAYERS} layers (median of {args.seeds} seeds)")
    for kind, runs in found.items():
        gradient = statistics.median(gradient for gradient, _ in runs)
        print(f"{kind.__name__:<11}{gradient:9.2g}   {kind.__doc__}")
    print(f"\nroot mean square of activations after layer\n{'':<11}", end="")
    print("".join(f"{layer:>9}" for layer in SHOWN))
    for kind, runs in found.items():
        sizes = [statistics.median(rms[layer - 1] for _, rms in runs) for layer in SHOWN]
        print(f"{kind.__name__:<11}" + "".join(f"{size:9.2g}" for size in sizes))
    print("\ngreatest depth that learns, of " + ", ".join(map(str, DEPTHS)) + "; three seeds")
    for kind in engine.progress([Plain, Skip, Scaled, PostNorm], "depths"):
        depths = [greatest_depth(kind, seed) for seed in range(min(3, args.seeds))]
        print(f"{kind.__name__:<11}" + "".join(f"{depth:9}" for depth in depths))


if __name__ == "__main__":
    main()
