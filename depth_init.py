"""An init of our own, not the paper's: weights that keep tokens apart at every depth. One function.

With the paper's constants an image's tokens are all alike after some eight blocks (rank collapse,
or oversmoothing), and what is left of an input's directions shrinks from block to block. Four
causes, each with a remedy at initialisation that needs width, heads, tokens and depth alone.
r = hidden / d is the MLP ratio:

  frames      GELU(g z) = g z / 2 + h(z), h even. The linear part of an MLP of independent W_1 and
              W_2 is W_1 W_2 / 2, whose singular values, cosines between two random d-dimensional
              subspaces of r d, reach down to 0: a product of many has lost all rank. With
                  W_1 = g sqrt(r) F,  W_2 = F^T (I - 1 1^T / d),  F F^T = I
              it is (g sqrt(r) / 2) I. Likewise W_O = W_V^T. The skip's identity, in the weights.
  LayerNorm   removes a token's mean: one direction of d, but 2 L different ones if the sub-blocks
              rotate it. I - 1 1^T / d in W_2 keeps zero means zero, so it is lost once.
  mean        m = E GELU(g z), the same for every token, is added to all of them by each MLP:
              fc2's bias -m W_2^T 1 removes it.
  shrinking   an attention that leaves a token the share delta of itself shrinks the difference
              of two alike tokens by delta. The MLP spreads them: it multiplies their squared
              difference by
                  chi(g) = (r g^2 / 4 + E h'^2) / (r g^2 / 4 + Var h)
              at r = 4 from 1 at g = 0 to 1.10 at g = 1. So the gain can balance attention:
                  chi(g) delta^2 = 1
  delta       = 1 - 1/(2L): over all blocks a token is averaged with others half a time, and a
              squared gradient grows e-fold. From 11 blocks on a g <= 1 can balance it; fewer
              blocks keep g = 1 and lose a little.
  W_Q = W_K   = sqrt(s) R, R Haar orthogonal: with tokens of square norm d behind a LayerNorm
              and of correlation rho the mean logits are s sqrt(d_h) on the diagonal, rho times
              that off it, so
                  s sqrt(d_h) (1 - rho) = log((n - 1) delta / (1 - delta))
              Logits off the diagonal also fluctuate, the more the narrower the heads, which takes
              some of the share: it comes out below delta.
  rho         = 0.65, a choice: two equal patches have 1/2 where the position embedding is as large
              as the patch embedding; tokens much closer than rho merge, and a larger rho starts
              with attention saturated.

It counts on a position embedding of std 1 and on mean pooling (`COUNTS_ON`): a class token, whose
position is all it has, would hardly attend to the image.
"""

import functools
import math

import torch
from torch import nn

from minskip import blocks_of, orthogonal_mlp_weight, set_

COUNTS_ON = dict(pool="mean", pos_embed_std=1.0)


def centred_gelu(gain: float, mlp_ratio: float = 4.0) -> tuple[float, float]:
    """m = E GELU(gain z) and chi of the equation above, z ~ N(0, 1), by quadrature."""
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-(z**2) / 2)
    weight /= weight.sum()
    above_half = 0.5 * torch.erf(gain * z / math.sqrt(2))
    density = torch.exp(-((gain * z) ** 2) / 2) / math.sqrt(2 * math.pi)
    h, slope = gain * z * above_half, gain * (above_half + gain * z * density)
    mean = (weight * h).sum()
    variance = (weight * h**2).sum() - mean**2
    linear = mlp_ratio * gain**2 / 4
    return mean.item(), ((linear + (weight * slope**2).sum()) / (linear + variance)).item()


@functools.cache  # blocks alike need it once
def depth_constants(
    dim: int, num_heads: int, tokens: int, depth: int, mlp_ratio: float = 4.0
) -> tuple[float, float]:
    """s, the scale of W_Q and W_K, and g, fc1's gain, for `depth` blocks: the equations above."""
    delta, rho = 1 - 1 / (2 * max(depth, 2)), 0.65
    logit_gap = math.log((max(tokens, 2) - 1) * delta / (1 - delta))
    s = logit_gap / (math.sqrt(dim / num_heads) * (1 - rho))
    low, high = 1e-3, 1.0  # chi grows with the gain; where even g = 1 is too little it is kept
    for _ in range(40):
        middle = (low + high) / 2
        balanced = centred_gelu(middle, mlp_ratio)[1] * delta**2 > 1
        low, high = (low, middle) if balanced else (middle, high)
    return s, high


@torch.no_grad()
def depth_init_(
    model: nn.Module, c: float = 3.0, generator: torch.Generator | None = None
) -> nn.Module:
    """Re-initialise every block of a `minskip.ViT`, in place, by the equations above.

    c: scale of W_V and W_O. LayerNorm cancels it in the forward pass; it scales gradients.
    generator: the random numbers, on the CPU [torch's global one]. Returns the model.

    Raises:
        TypeError: a model whose blocks do not look like ours.
        ValueError: MLPs narrower than the tokens, or c not positive.
    """
    blocks, tokens = blocks_of(model), model.pos_embed.shape[1]
    if not 0 < c < math.inf:
        raise ValueError(f"c must be a positive number, not {c}")
    for block in blocks:
        attention, fc1, fc2 = block.attention, block.mlp.fc1, block.mlp.fc2
        d, hidden = fc1.in_features, fc1.out_features
        if hidden < d:
            raise ValueError(f"the depth init needs an mlp_ratio of at least 1, not {hidden / d}")
        s, g = depth_constants(d, attention.num_heads, tokens, len(blocks), hidden / d)
        R = orthogonal_mlp_weight(d, d, generator)  # Haar
        set_(attention.W_Q, math.sqrt(s) * R)
        set_(attention.W_K, math.sqrt(s) * R)
        W_V = c * orthogonal_mlp_weight(d, d, generator)
        set_(attention.W_V, W_V)
        set_(attention.W_O, W_V.T)
        W_1 = orthogonal_mlp_weight(d, hidden, generator)  # sqrt(r) F
        W_2 = W_1.T * math.sqrt(d / hidden)
        W_2 = W_2 - W_2.mean(dim=1, keepdim=True)
        set_(fc1, g * W_1)
        set_(fc2, W_2, -centred_gelu(g)[0] * W_2.sum(dim=0))
    return model
