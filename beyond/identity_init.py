"""An init of our own, not the paper's: each block starts as the identity, with room to learn.

A skip connection does two things: it hands a block's input on unchanged, and it leaves the block's
own weights free to learn. Without skips one set of weights has to do both. Each block must preserve
its input exactly, because small losses multiply with depth. So we give the two jobs to different
weights:

MLP, the "mirrored pairs". GELU(z) - GELU(-z) = z for every z, so two hidden units with opposite
weights pass z on as if there were no activation. 2 d of the H hidden units form such pairs and
return the input times g^2. The other H - 2 d units, with random weights S_1 and S_2, are free to
learn features, as the branch of a residual network is:

    W_1 = [g F, -g F, S_1],   W_2 = [g F^T; -g F^T; S_2],   F F^T = I
    MLP(x) = g^2 x + GELU(x S_1) S_2

(The same idea for ReLU is the looks-linear init of Balduzzi et al. 2017.)

Attention, "keepers" and "fetchers". A head cannot both keep a token's own content and bring that of
others, because both would pass through the same W_V. So most heads, the keepers, attend almost only
to their own token and copy their own coordinates (W_V = W_O = c I there). A learnable number b per
head is added to the diagonal of the logits; where the other logits are zero, a token attends to
itself with weight

    delta = e^b / (e^b + n - 1)                    (as at the start of U-SPA, He et al. 2023)

(the random W_Q and W_K make the logits small, not zero: 1 - delta is off by 1 % at d = 64 and by
10 % at 384). The last quarter of the heads (at least one), the fetchers, have b = 0: they average
all tokens, see a random projection of all coordinates, and write into coordinates of their own.

As delta depends on n, a keeper's b must follow it on images of another size: with b made for 25
tokens, delta falls from .997 to .91 at 690. So `minskip.Attention` adds log((n - 1) / (n_0 - 1)) to
the keepers' b, where training has n_0 tokens. That is 0 at n_0, and keeps delta as it was.

LayerNorm. A gain and shift in the blocks would multiply what passes through, 2 L times (in a
residual network they touch only the branch), so the blocks have none.

Training, "hold". The optimizer would overwrite the identity path as fast as anything else, because
Adam and SOAP move every entry by about lr. So we scale the pairs' updates by 0.1 (`hold_pairs`).
Keepers and fetchers need no such help: beside entries as large as c, a step is small.

All constants follow from d = dim, H = hidden, n = tokens, L = depth and l, the block's number,
counted from 1:

    S = N(0, 1/fan_in)    LeCun's variance: free units see inputs of rms 1 and return about .65
    g^2 = 2 l             the signal that is passed on grows from block to block, as in a residual
                          network, where each block adds about as much; so block l changes about
                          1/l of it
    c = d                 a step that moves every entry by lr changes c I by a fraction lr if all
                          signs agree; random signs make it 2 / sqrt(d) of that
    delta = 1 - 1/(n L)   in all blocks together a token gives away about 1/n of itself
    a quarter fetches     of 8 heads 2 did better than 4 and no worse than 1; of 3 or 6 it is 1

Results beside the paper's init and a residual network are in the README; the same init for a timm
ViT is in docs/copy_the_init.md.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from minskip import blocks_of, set_linear_

COUNTS_ON = dict(pool="mean", pos_embed_std=0.5)  # settings that it was tuned with
NEEDS = dict(diagonal_bias=True, norm_affine=False)  # arguments that the ViT must be built with


# --------------------------------------------------------------------------------------------------
# Three functions. Copy any of them; `import math, torch` is all they need. They return W for
# y = x W (nn.Linear takes W.T), in float32 if the default dtype is a half, which has no QR.
# --------------------------------------------------------------------------------------------------


def keepers_and_fetchers(
    dim: int, num_heads: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_V and W_O, each (dim, dim).

    Both are c I, except that the fetchers' columns of W_V are c times a random orthonormal frame.
    """
    c, kept = float(dim), dim - max(1, num_heads // 4) * (dim // num_heads)
    W_O = c * torch.eye(dim, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
    frame = torch.nn.init.orthogonal_(W_O.new_empty(dim, dim - kept), generator=generator)
    return torch.cat([W_O[:, :kept], c * frame], dim=1), W_O


def own_token_bias(num_heads: int, tokens: int, depth: int) -> torch.Tensor:
    """b of each head, (num_heads,): keepers attend to their own token by delta, fetchers have 0."""
    delta = 1 - 1 / (max(tokens, 2) * depth)
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    b = torch.full((num_heads,), math.log(max(tokens - 1, 1) * delta / (1 - delta)), dtype=dtype)
    b[num_heads - max(1, num_heads // 4) :] = 0
    return b


def mirrored_pairs(
    dim: int, hidden: int, block: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_1, (dim, hidden), and W_2, (hidden, dim), of an MLP that starts as g^2 x + its free units.

    block: the block's number, counted from 1.
    """
    free = hidden - 2 * dim
    if free < 0:
        raise ValueError(f"mirrored pairs take 2 x {dim} hidden units; there are {hidden}")
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    F = torch.nn.init.orthogonal_(torch.empty(dim, dim, dtype=dtype), generator=generator)
    S_1 = torch.randn(dim, free, dtype=dtype, generator=generator) / math.sqrt(dim)
    S_2 = torch.randn(free, dim, dtype=dtype, generator=generator) / math.sqrt(max(free, 1))
    g = math.sqrt(2 * block)
    return torch.cat([g * F, -g * F, S_1], dim=1), torch.cat([g * F.T, -g * F.T, S_2])


# --------------------------------------------------------------------------------------------------
# The same weights, put into a ViT
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def identity_init_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Re-initialise all blocks of a `minskip.ViT`, in place, by the equations above.

    W_Q and W_K keep their small default weights, and a half that alone keeps its skip keeps all of
    them; the other biases become zero. To train the network, call `hold_pairs` too.

    Args:
        model: a ViT built with diagonal_bias=True and norm_affine=False. A class token works too:
            it starts as little more than its position embedding, which the keepers preserve while
            the fetchers bring in the image.
        generator: source of the random numbers, on the CPU [torch's global one].

    Returns the model. Raises TypeError for a model that was built otherwise, ValueError for MLPs
    with fewer than 2 d hidden units or a single head.
    """
    blocks = blocks_of(model)
    if not NEEDS.items() <= model.config.items():
        raise TypeError("identity_init_ needs ViT(diagonal_bias=True, norm_affine=False)")
    for number, block in enumerate(blocks, start=1):
        attention, fc1, fc2 = block.attention, block.mlp.fc1, block.mlp.fc2
        d, heads = fc1.in_features, attention.num_heads
        if block.skips != ("attention",):
            if heads < 2:
                raise ValueError("the identity init needs two heads or more: keepers and fetchers")
            W_V, W_O = keepers_and_fetchers(d, heads, generator)
            b = own_token_bias(heads, model.pos_embed.shape[1], len(blocks))
            set_linear_(attention.W_V, W_V)
            set_linear_(attention.W_O, W_O)
            attention.diagonal_bias.copy_(b)
            nn.init.zeros_(attention.W_Q.bias)
            nn.init.zeros_(attention.W_K.bias)
        if block.skips != ("mlp",):
            W_1, W_2 = mirrored_pairs(d, fc1.out_features, number, generator)
            set_linear_(fc1, W_1)
            set_linear_(fc2, W_2)
    return model


def hold_pairs(
    optimizer: Optimizer,
    model: nn.Module | Sequence[tuple[nn.Linear, nn.Linear]],
    factor: float = 0.1,
) -> None:
    """From now on scale each of the optimizer's updates of the mirrored pairs, weight decay
    included, by `factor`. All other weights are updated as usual.

    model: anything with `.blocks` that have `mlp.fc1` and `mlp.fc2`, such as `minskip.ViT` or a
        timm ViT; or, for other models, a list of each block's (fc1, fc2).
    """
    if isinstance(model, nn.Module):
        model = [(block.mlp.fc1, block.mlp.fc2) for block in model.blocks]
    pairs = []
    for fc1, fc2 in model:
        width = 2 * fc1.in_features
        for part in (fc1.weight[:width], fc1.bias[:width], fc2.weight[:, :width]):
            pairs.append(part.detach())  # a view: it moves with the parameter
    before = [torch.empty_like(part) for part in pairs]

    @torch.no_grad()
    def remember(*_) -> None:
        torch._foreach_copy_(before, pairs)

    @torch.no_grad()
    def shorten(*_) -> None:
        torch._foreach_lerp_(before, pairs, factor)
        torch._foreach_copy_(pairs, before)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)
