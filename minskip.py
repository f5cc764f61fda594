"""Vision Transformers without skip connections: the model and the init, one file.

Read it top to bottom:

1. `ViT`, a standard pre-LN Vision Transformer in which the skip connection is one visible line
   (`Block.forward`). `residual=True` is the usual network, `residual=False` the skipless one.
2. Three pure functions that draw well-conditioned weights. They know nothing of the classes here:
   copy them into any project.
3. `conditioned_init_`, which puts those weights into a `ViT`.

Why a skipless network needs a special init: let K be the derivative of a sub-block's output by its
input. A residual network multiplies factors (K + I), a skipless one bare K. Softmax attention makes
K nearly rank-deficient, "+ I" lifts its small singular values; without the skip the init has to.

Source: Ji et al., "Cutting the Skip: Training Residual-Free Transformers", ICLR 2026
(arXiv 2510.00345).

Notation, as in the paper: tokens are rows, a projection is y = x W, so `nn.Linear.weight` is W^T.
d = width, h = heads, d_h = d / h, n = tokens, L = depth.
"""

import functools
import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

# Widths, depths and heads as published (Dosovitskiy et al. 2021; Touvron et al. 2021 for tiny and
# small). nano is ours: narrow enough for two CPU cores, twelve blocks deep so that depth bites.
PRESETS = {
    "nano": dict(width=64, depth=12, heads=2),
    "tiny": dict(width=192, depth=12, heads=3),
    "small": dict(width=384, depth=12, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
}


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention with its four projections apart, so they read like the equations.

    Shapes: (batch, token, width) -> (batch, token, width).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width: width {width}, heads {heads}")
        self.heads = heads
        self.W_Q = nn.Linear(width, width)
        self.W_K = nn.Linear(width, width)
        self.W_V = nn.Linear(width, width)
        self.W_O = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(W(x), "batch token (head dim) -> batch head token dim", head=self.heads)
            for W in (self.W_Q, self.W_K, self.W_V)
        )
        y = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d_h)) v, for each head
        return self.W_O(rearrange(y, "batch head token dim -> batch token (head dim)"))


class MLP(nn.Module):
    """Two linear maps with a GELU between them. Shapes: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-LN transformer block, with or without its two skip connections.

    residual: 1 is the standard block, 0 the skipless one, a number between weighs the skip.
    Shapes: (batch, token, width) -> (batch, token, width).
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, residual: float, drop_path: float = 0.0
    ):
        super().__init__()
        self.residual = float(residual)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        # Dropping a sub-block leaves the skip; without a skip nothing would be left of the image.
        self.drop_path = StochasticDepth(drop_path, mode="row") if residual else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for norm, sub_block in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            update = sub_block(norm(x))
            # This line is what the project is about:  x + f(x)  with the skip,  f(x)  without it.
            x = self.residual * x + self.drop_path(update) if self.residual else update
        return x


class ViT(nn.Module):
    """Vision Transformer (Dosovitskiy et al. 2021), pre-LN, with or without skip connections.

    Args:
        image_size: side of the square images it is built for, pixels.
        patch_size: side of a patch, pixels; must divide `image_size`.
        num_classes: width of the output; 0 leaves the head out and returns the pooled feature.
        width, depth, heads, mlp_ratio: d, L, h and the MLP's hidden width over d.
        residual: True the standard network, False the skipless one, a number in between weighs
            every skip by that factor.
        pool: "cls" reads a learned class token, "mean" averages the patch tokens (no class token).
        position_std: standard deviation of the position embedding at initialisation. 0.02 is
            customary; patch embeddings start near 1, and a network without skips, which sees
            positions once and never again, learns faster from a larger value.
        drop_path: stochastic depth rate of the last block, growing linearly from 0 at the first;
            only with a skip.

    Input (batch, channel, height, width), output (batch, num_classes).

    Raises:
        ValueError: sizes that do not fit together, or an option that does not exist.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        *,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        residual: bool | float = True,
        pool: str = "cls",
        position_std: float = 0.02,
        drop_path: float = 0.0,
        in_channels: int = 3,
    ):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"patch size must divide image size: image {image_size}, patch {patch_size}"
            )
        if pool not in ("cls", "mean"):
            raise ValueError(f'pool must be "cls" or "mean", not {pool!r}')
        if not 0 <= residual <= 1:
            raise ValueError(f"residual must lie in [0, 1], not {residual}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), not {drop_path}")
        if position_std < 0:
            raise ValueError(f"position_std must not be negative: {position_std}")
        if drop_path and not residual:
            raise ValueError("drop_path needs a skip connection; with residual=False leave it at 0")
        # Everything needed to build this network again; checkpoints store it beside the weights.
        self.config = dict(
            image_size=image_size,
            patch_size=patch_size,
            num_classes=num_classes,
            width=width,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            residual=residual,
            pool=pool,
            position_std=position_std,
            drop_path=drop_path,
            in_channels=in_channels,
        )
        grid = image_size // patch_size
        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "cls" else None
        tokens = grid**2 + (pool == "cls")
        self.position_embedding = nn.Parameter(torch.zeros(1, tokens, width))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, residual, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, num_classes) if num_classes else nn.Identity()
        self.default_init_()

    @torch.no_grad()
    def default_init_(self) -> None:
        """The customary ViT init: truncated normals of std 0.02, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        # LeCun's variance 1 / fan_in: a patch of unit-variance pixels becomes unit-variance tokens.
        fan_in = self.patch_embedding.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embedding.weight, std=fan_in**-0.5)
        nn.init.zeros_(self.patch_embedding.bias)
        std = self.config["position_std"]
        if std:
            nn.init.trunc_normal_(self.position_embedding, std=std, a=-2 * std, b=2 * std)
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=1e-6)

    def positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding for a grid of patches, bicubically resized if it is another grid."""
        embedding = self.position_embedding
        side = self.config["image_size"] // self.config["patch_size"]
        if (rows, columns) == (side, side):
            return embedding
        cls, grid = embedding[:, : -(side**2)], embedding[:, -(side**2) :]
        grid = rearrange(grid, "1 (row column) dim -> 1 dim row column", row=side)
        grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
        grid = rearrange(grid, "1 dim row column -> 1 (row column) dim")
        return torch.cat([cls, grid], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """(batch, channel, height, width) -> (batch, token, width), the class token first."""
        patch = self.config["patch_size"]
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise ValueError(
                f"patch size must divide image size: images are {images.shape[-2]} x "
                f"{images.shape[-1]}, patch {patch}"
            )
        x = self.patch_embedding(images)
        rows, columns = x.shape[-2:]
        x = rearrange(x, "batch dim row column -> batch (row column) dim")
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions(rows, columns)

    def forward_features(
        self, images: Tensor, blocks: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        """Tokens, (batch, token, width), the class token first if there is one.

        blocks=None gives the tokens after the final LayerNorm. A list of block numbers gives the
        tokens right after those blocks, in the order asked for, without the final LayerNorm
        (`model.norm` applies it); 0 is the embedding, `depth` the last block.
        """
        if blocks is None:
            return self.norm(self.forward_features(images, [len(self.blocks)])[0])
        if bad := [b for b in blocks if not 0 <= b <= len(self.blocks)]:
            raise ValueError(f"blocks must lie in 0..{len(self.blocks)}, not {bad}")
        after = {0: (x := self.embed(images))}
        for number, block in enumerate(self.blocks[: max(blocks, default=0)], start=1):
            after[number] = x = block(x)
        return [after[b] for b in blocks]

    def classify(self, x: Tensor) -> Tensor:
        """Logits from the last block's tokens, (batch, token, width) -> (batch, num_classes)."""
        x = self.norm(x)
        pooled = x.mean(dim=1) if self.class_token is None else x[:, 0]
        return self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)


# --------------------------------------------------------------------------------------------------
# The init: three pure functions. Copy these.
# They return W for y = x W; into an nn.Linear goes W.T.
# --------------------------------------------------------------------------------------------------


def haar_orthogonal(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Haar-distributed matrices, (..., rows, columns), orthonormal along the shorter side.

    Drawn on the generator's device in float32. Q of the QR of a Gaussian is Haar once the signs
    of R's diagonal are fixed (Mezzadri 2007).
    """
    *batch, rows, columns = shape
    device = generator.device if generator is not None else "cpu"
    long, short = max(rows, columns), min(rows, columns)
    Q, R = torch.linalg.qr(torch.randn(*batch, long, short, generator=generator, device=device))
    Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return Q if rows >= columns else Q.mT


def value_output_projections(
    width: int, c: float = 3.0, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """W_V and W_O, each (width, width), in float32. Cutting the Skip, section 4.

        W_V = c U,  W_O = c V^T,  U S V^T the SVD of a Gaussian matrix

    so every singular value of W_V W_O is c^2 and its condition number kappa is 1. U and V of a
    Gaussian matrix are independent Haar orthogonal matrices, so they are drawn as such. One
    d x d construction for all heads together: redrawn per head, the joint map is ill-conditioned.
    """
    U, V_T = haar_orthogonal(2, width, width, generator=generator)
    return c * U, c * V_T


def query_key_projections(
    width: int,
    heads: int,
    alpha: float = 2.0,
    beta: float = 0.6,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """W_Q and W_K, each (width, width), heads side by side along the columns, in float32.

    Cutting the Skip, section 4; for each head, with Z_ij ~ N(0, 1/d) and U S V^T the SVD,

        alpha Z + beta I = U S V^T,   W_Q = U[:, :d_h] sqrt(S_h),   W_K = V[:, :d_h] sqrt(S_h)

    so W_Q W_K^T is the best rank-d_h approximation of alpha Z + beta I: beta lifts the diagonal of
    the attention logits, hence a token's attention to itself.

    One SVD serves all heads. Z and R Z R^T have the same law for every orthogonal R, and
    R (alpha Z + beta I) R^T = alpha R Z R^T + beta I has the singular vectors R U and R V. So each
    head gets a Haar rotation R of its own: its Z, taken alone, has exactly the law of a fresh one.
    What the heads of a block share is what no rotation changes, the singular values and U^T V
    (hence the trace of W_Q W_K^T), which fluctuate by O(1) around values of O(d). And R is needed
    only on the span of the 2 d_h singular vectors kept, where it is a Haar (d, 2 d_h) frame: a
    thin QR.
    """
    if width % heads:
        raise ValueError(f"heads must divide width: width {width}, heads {heads}")
    d_h = width // heads
    device = generator.device if generator is not None else "cpu"
    Z = torch.randn(width, width, generator=generator, device=device) / math.sqrt(width)
    U, S, V_T = torch.linalg.svd(alpha * Z + beta * torch.eye(width, device=device))
    vectors = torch.cat([U[:, :d_h], V_T.mT[:, :d_h]], dim=1)  # (d, 2 d_h)
    _, coordinates = torch.linalg.qr(vectors)  # in an orthonormal basis of their span
    frames = haar_orthogonal(heads, width, len(coordinates), generator=generator)
    U_h, V_h = (frames @ coordinates).split(d_h, dim=-1)  # each (heads, d, d_h)
    W_Q, W_K = (
        rearrange(X * S[:d_h].sqrt(), "head width dim -> width (head dim)") for X in (U_h, V_h)
    )
    return W_Q, W_K


def orthogonal_mlp_weight(
    in_features: int, out_features: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Scale-corrected uniform orthogonal (SUO) weight, (in_features, out_features), in float32.

        W = max(sqrt(out / in), 1) * (semi-orthogonal)

    Martens et al. 2021, "Rapid training of deep neural networks without skip connections or
    normalization layers using Deep Kernel Shaping". At MLP ratio 4, fc1 gets a factor 2 and fc2
    a factor 1: every coordinate keeps the mean square of its input, in both.
    """
    scale = max(math.sqrt(out_features / in_features), 1.0)
    return scale * haar_orthogonal(in_features, out_features, generator=generator)


# --------------------------------------------------------------------------------------------------
# A second scheme, ours: constants that hold at every depth
#
# With the paper's constants an image's tokens are all alike after some eight blocks, and what is
# left of an input's directions shrinks from block to block. Four causes, each with a remedy at
# initialisation that needs width, heads, tokens and depth alone. r = hidden / d, the MLP ratio:
#
#   frames      GELU(g z) = g z / 2 + h(z), h even. The linear part of an MLP of independent W_1 and
#               W_2 is W_1 W_2 / 2, whose singular values, cosines between two random d-dimensional
#               subspaces of r d, reach down to 0: a product of many has lost all rank. With
#               W_1 = g sqrt(r) F, W_2 = F^T (I - 1 1^T / d) and F F^T = I it is (g sqrt(r) / 2) I.
#               Likewise W_O = W_V^T. The skip's identity, written into the weights.
#   LayerNorm   removes a token's mean: one direction of d, but 2 L different ones if the sub-blocks
#               rotate it. I - 1 1^T / d in W_2 keeps zero means zero, so it is lost once.
#   mean        m = E GELU(g z), the same for every token, is added to all of them by each MLP:
#               fc2's bias -m W_2^T 1 removes it.
#   shrinking   an attention that leaves a token the share delta of itself shrinks the difference
#               of two alike tokens by delta. The MLP spreads them: it multiplies their squared
#               difference by chi(g) = (r g^2 / 4 + E h'^2) / (r g^2 / 4 + Var h), at r = 4 from 1
#               at g = 0 to 1.10 at g = 1. So the gain can balance attention: chi(g) delta^2 = 1.
#   delta       = 1 - 1/(2L): over all blocks a token is averaged with others half a time, and a
#               squared gradient grows e-fold. From 11 blocks on a g <= 1 can balance it; fewer
#               blocks keep g = 1 and lose a little.
#   W_Q = W_K   = sqrt(s) R, R Haar orthogonal: with tokens of square norm d behind a LayerNorm
#               and of correlation rho the mean logits are s sqrt(d_h) on the diagonal, rho times
#               that off it, so  s sqrt(d_h) (1 - rho) = log((n - 1) delta / (1 - delta)). Logits
#               off the diagonal also fluctuate, the more the narrower the heads, which takes some
#               of the share: it comes out below delta.
#   rho         = 0.65, a choice: two equal patches have 1/2 where the position embedding is as
#               large as the patch embedding (position_std = 1, which this scheme wants); tokens
#               much closer than rho merge, and a larger rho starts with attention saturated.
# --------------------------------------------------------------------------------------------------


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
    width: int, heads: int, tokens: int, depth: int, mlp_ratio: float = 4.0
) -> tuple[float, float]:
    """s, the scale of W_Q and W_K, and g, fc1's gain, for `depth` blocks: the equations above."""
    delta, rho = 1 - 1 / (2 * max(depth, 2)), 0.65
    logit_gap = math.log((max(tokens, 2) - 1) * delta / (1 - delta))
    s = logit_gap / (math.sqrt(width / heads) * (1 - rho))
    low, high = 1e-3, 1.0  # chi grows with the gain; where even g = 1 is too little it is kept
    for _ in range(40):
        middle = (low + high) / 2
        balanced = centred_gelu(middle, mlp_ratio)[1] * delta**2 > 1
        low, high = (low, middle) if balanced else (middle, high)
    return s, high


@torch.no_grad()
def conditioned_init_(
    model: nn.Module,
    alpha: float = 2.0,
    beta: float = 0.6,
    c: float = 3.0,
    generator: torch.Generator | None = None,
    scheme: str = "paper",
) -> nn.Module:
    """Re-initialise every block of a `ViT` so that it trains without skip connections. In place.

    scheme="paper": Cutting the Skip, section 4. The source's constants (alpha, beta, c):
    (2, 0.6, 3) for ViT-B trained with labels, (1.8, 1, 3) for ViT-S trained by DINO. Embeddings,
    norms and head keep their init; biases in the blocks become zero.

    scheme="depth": the equations of the section above, so that tokens stay apart however many
    blocks there are. Ours, not the paper's; for models with position_std = 1 and pool = "mean" (a
    class token, whose position is all it has, would hardly attend to the image). alpha and beta
    are not used.

    Args:
        model: a `ViT`, or any module with `.blocks` whose members have `attention.W_Q ... W_O`,
            `attention.heads`, `mlp.fc1` and `mlp.fc2` (for "depth" also `.position_embedding`).
        alpha: weight of the random part of W_Q W_K^T.
        beta: weight of the identity in W_Q W_K^T; more of it, more attention of a token to itself.
        c: scale of W_V and W_O. LayerNorm cancels it in the forward pass; it scales gradients.
        generator: the random numbers; weights are drawn on its device in float32, then cast to
            each parameter's own dtype and device. Default: torch's global CPU generator.

    Returns the model.

    Raises:
        ValueError: negative or non-finite constants, c = 0, alpha = beta = 0, another scheme, or
            scheme="depth" with MLPs narrower than the tokens.
        TypeError: a model whose blocks do not look like ours.
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("c", c)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, not {value}")
    if c == 0 or alpha == beta == 0:
        raise ValueError("c and at least one of alpha and beta must be positive")
    if scheme not in ("paper", "depth"):
        raise ValueError(f'scheme must be "paper" or "depth", not {scheme!r}')
    positions = getattr(model, "position_embedding", None)
    if scheme == "depth" and positions is None:
        raise TypeError('scheme "depth" reads the number of tokens from model.position_embedding')
    for block in getattr(model, "blocks", [None]):
        if not hasattr(getattr(block, "attention", None), "W_Q") or not hasattr(block, "mlp"):
            raise TypeError(
                "conditioned_init_ fills minskip.ViT; for another model write its weights with "
                "value_output_projections, query_key_projections and orthogonal_mlp_weight"
            )
        attention, fc1, fc2 = block.attention, block.mlp.fc1, block.mlp.fc2
        width, heads, hidden = attention.W_Q.in_features, attention.heads, fc1.out_features
        if scheme == "depth" and hidden < width:
            raise ValueError(
                f"the depth scheme needs an mlp_ratio of at least 1, not {hidden / width}"
            )
        if scheme == "paper":
            W_Q, W_K = query_key_projections(width, heads, alpha, beta, generator=generator)
            W_V, W_O = value_output_projections(width, c, generator=generator)
            W_1 = orthogonal_mlp_weight(width, hidden, generator=generator)
            W_2 = orthogonal_mlp_weight(hidden, width, generator=generator)
            b_2 = torch.zeros(width)
        else:
            tokens, depth = positions.shape[1], len(model.blocks)
            s, gain = depth_constants(width, heads, tokens, depth, hidden / width)
            W_Q = W_K = math.sqrt(s) * haar_orthogonal(width, width, generator=generator)
            W_V, _ = value_output_projections(width, c, generator=generator)
            W_O = W_V.T
            W_1 = orthogonal_mlp_weight(width, hidden, generator=generator)  # sqrt(r) F
            W_2 = W_1.T * math.sqrt(width / hidden)
            W_1, W_2 = gain * W_1, W_2 - W_2.mean(dim=1, keepdim=True)
            b_2 = -centred_gelu(gain)[0] * W_2.sum(dim=0)
        for linear, W in (
            (attention.W_Q, W_Q),
            (attention.W_K, W_K),
            (attention.W_V, W_V),
            (attention.W_O, W_O),
            (fc1, W_1),
            (fc2, W_2),
        ):
            linear.weight.copy_(W.T)
            linear.bias.zero_()
        fc2.bias.copy_(b_2)
    return model
