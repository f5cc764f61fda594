"""An init of our own, not the paper's: each block starts as the identity and keeps room to learn.

A skip gives a block two things: what came in goes out, and what the block adds is free. Without
skips the weights themselves have to do both, in six steps:

  identity    what a block is to pass on, its weights pass on exactly; a product of L blocks that
              are nearly the identity loses nothing, and so nothing dies on the way back either.
  MLP         GELU(z) - GELU(-z) = z, for every z. Hidden units in mirrored pairs carry the input:
                  W_1 = [g F, -g F, S_1],   W_2 = [g F^T; -g F^T; S_2],   F F^T = I
                  MLP(x) = g^2 x + GELU(x S_1) S_2
              It takes 2 d of the H hidden units; the rest, S_1 and S_2, is free to learn features
              as in a residual network. (For ReLU: the looks-linear init of Balduzzi et al. 2017.)
  keepers     a head whose attention is the diagonal passes tokens on, but then fetches nothing. A
              bias b on the diagonal of its logits, one learnable number, gives the own share
                  delta = e^b / (e^b + n - 1)
              exactly (the start of U-SPA, He et al. 2023). Its W_V and W_O are c I on its own
              coordinates.
  fetchers    a head that brings context cannot also keep a token's own content: both would go
              through one value map. So a quarter of the heads attend uniformly (b = 0), read a
              random projection of all coordinates, and write where no keeper writes.
  no gains    a block's LayerNorms have no gain and shift: they would multiply what the blocks pass
              on, 2 L times, where in a residual network they only touch the branch.
  hold        Adam and SOAP move every entry about alike, those that carry as far as those that are
              to learn. A skip does not move at all. So the pairs take a tenth of each step
              (`hold_pairs`); keepers and fetchers are slow by their size c.

Every constant, from d = dim, H = hidden, n = tokens, L = depth, l = the block's number, from 1 on:

  S = N(0, 1/fan_in)    LeCun's: free units see unit variance, and put out about .65 of it
  g^2 = 2 l             heavier from block to block, as a residual network's stream is, to which
                        each block adds about as much: what block l learns then weighs about 1/l
  c = d                 a step of size lr in every entry turns c I by a fraction lr
  delta = 1 - 1/(n L)   over all blocks a token gives up one token's share to the others
  a quarter fetches     of 8 heads 2 did better than 4 and no worse than 1

Ours, not the paper's: what it reaches, beside the paper's and a residual network, is in the README.

In a timm ViT with class_token=False, global_pool="avg" and
norm_layer=partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False):

    def skipless_forward(block, x, **_):
        b = block.diagonal_bias[:, None, None] * torch.eye(x.shape[1], device=x.device)[None, None]
        return block.mlp(block.norm2(block.attn(block.norm1(x), attn_mask=b)))

    @torch.no_grad()
    def identity_timm_(vit):
        vit.pos_embed.normal_(std=0.5)
        for number, block in enumerate(vit.blocks, start=1):
            attn, fc1, fc2 = block.attn, block.mlp.fc1, block.mlp.fc2
            d, heads = fc1.in_features, attn.num_heads
            W_V, W_O = keepers_and_fetchers(d, heads)
            W_1, W_2 = mirrored_pairs(d, fc1.out_features, number)
            attn.qkv.weight[2 * d :] = W_V.T  # W_Q and W_K keep their small init
            for layer, W in ((attn.proj, W_O), (fc1, W_1), (fc2, W_2)):
                layer.weight.copy_(W.T)
            b = own_token_bias(heads, vit.patch_embed.num_patches, len(vit.blocks))
            block.diagonal_bias = nn.Parameter(b)
            block.forward = MethodType(skipless_forward, block)

and, before the first step, `hold_pairs(optimizer, vit)`.
"""

import math

import torch
from torch import nn
from torch.optim import Optimizer

from minskip import blocks_of, set_

COUNTS_ON = dict(pool="mean", pos_embed_std=0.5)  # flags
NEEDS = dict(diagonal_bias=True, norm_affine=False)  # of the network


# --------------------------------------------------------------------------------------------------
# Three functions. Copy any of them; `import math, torch` is all they need.
# They return W for y = x W in float32; into an nn.Linear goes W.T.
# --------------------------------------------------------------------------------------------------


def keepers_and_fetchers(
    dim: int, num_heads: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_V and W_O, each (dim, dim): c I, but for the last quarter of the heads, which read
    everything: their columns of W_V are c times a random orthonormal frame."""
    c, kept = float(dim), dim - max(1, num_heads // 4) * (dim // num_heads)
    W_V, W_O = c * torch.eye(dim), c * torch.eye(dim)
    frame = torch.empty(dim, dim - kept)
    W_V[:, kept:] = c * torch.nn.init.orthogonal_(frame, generator=generator)
    return W_V, W_O


def own_token_bias(num_heads: int, tokens: int, depth: int) -> torch.Tensor:
    """b of each head, (num_heads,): delta = 1 - 1/(n L) of its own for keepers, 0 for fetchers."""
    delta = 1 - 1 / (max(tokens, 2) * depth)
    b = torch.full((num_heads,), math.log(max(tokens - 1, 1) * delta / (1 - delta)))
    b[num_heads - max(1, num_heads // 4) :] = 0
    return b


def mirrored_pairs(
    dim: int, hidden: int, block: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_1, (dim, hidden), and W_2, (hidden, dim), of an MLP that starts as g^2 x + (free units).

    block: its number, from 1 on.
    """
    free = hidden - 2 * dim
    if free < 0:
        raise ValueError(f"mirrored pairs take 2 x {dim} hidden units; there are {hidden}")
    F = torch.nn.init.orthogonal_(torch.empty(dim, dim), generator=generator)
    S_1 = torch.randn(dim, free, generator=generator) / math.sqrt(dim)
    S_2 = torch.randn(free, dim, generator=generator) / math.sqrt(max(free, 1))
    g = math.sqrt(2 * block)
    return torch.cat([g * F, -g * F, S_1], dim=1), torch.cat([g * F.T, -g * F.T, S_2])


# --------------------------------------------------------------------------------------------------
# ... put into a ViT
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def identity_init_(model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
    """Re-initialise every block of a `minskip.ViT`, in place, by the equations above.

    model: built with diagonal_bias=True and norm_affine=False. W_Q and W_K keep their small default
    init; biases become zero. A class token needs nothing more: it starts empty, and what fetchers
    bring fills it. generator: the random numbers, on the CPU [torch's global one].
    Returns the model. To train it, add `hold_pairs`.

    Raises:
        TypeError: a model whose blocks do not look like ours, or without the diagonal bias.
        ValueError: MLPs with fewer than 2 d hidden units, or a single head, which cannot both keep
            and fetch.
    """
    blocks = blocks_of(model)
    for number, block in enumerate(blocks, start=1):
        attention, fc1, fc2 = block.attention, block.mlp.fc1, block.mlp.fc2
        d, heads = fc1.in_features, attention.num_heads
        if attention.diagonal_bias is None or block.norm1.elementwise_affine:
            raise TypeError("identity_init_ needs ViT(diagonal_bias=True, norm_affine=False)")
        if heads < 2:
            raise ValueError("the identity init needs two heads or more: one keeps, one fetches")
        W_V, W_O = keepers_and_fetchers(d, heads, generator)
        W_1, W_2 = mirrored_pairs(d, fc1.out_features, number, generator)
        set_(attention.W_V, W_V)
        set_(attention.W_O, W_O)
        set_(fc1, W_1)
        set_(fc2, W_2)
        attention.diagonal_bias.copy_(own_token_bias(heads, model.pos_embed.shape[1], len(blocks)))
        nn.init.zeros_(attention.W_Q.bias)
        nn.init.zeros_(attention.W_K.bias)
    return model


def hold_pairs(optimizer: Optimizer, model: nn.Module, share: float = 0.1) -> None:
    """From now on each step of the optimizer moves the mirrored pairs by a share of what it would,
    weight decay included; all other weights by the whole.

    model: a `minskip.ViT`, or any with `.blocks` whose members have `mlp.fc1` and `mlp.fc2`.
    """
    pairs = []
    for block in model.blocks:
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        width = 2 * fc1.in_features
        for part in (fc1.weight[:width], fc1.bias[:width], fc2.weight[:, :width]):
            pairs.append(part.detach())  # a view: it moves with the parameter
    before = [torch.empty_like(part) for part in pairs]

    @torch.no_grad()
    def remember(*_) -> None:
        torch._foreach_copy_(before, pairs)

    @torch.no_grad()
    def shorten(*_) -> None:
        torch._foreach_lerp_(before, pairs, share)
        torch._foreach_copy_(pairs, before)

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(shorten)
