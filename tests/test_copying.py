"""The inits copied into other frameworks, straight from README.md and docs/copy_the_init.md.

Each snippet runs as it is printed. Then its network and this project's, drawn from one seed, must
have equal weights where the page's table says, and equal logits; no skip may be left; and it must
learn. All in float64, so that equal means equal.
"""

import copy
import re
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT
from torch import nn

from beyond.identity_init import (
    hold_pairs,
    identity_init_,
    keepers_and_fetchers,
    mirrored_pairs,
    own_token_bias,
)
from minskip import ViT, conditioned_init_
from soap import SOAP

PAGE = (ROOT / "docs/copy_the_init.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE + (ROOT / "README.md").read_text(), re.S)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.S))
ROWS = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"\|.*\|", PAGE)]
QKV = "W_Q, W_K, W_V"
DIM, HEADS, DEPTH, CLASSES, IMAGE, PATCH = 48, 4, 3, 5, 24, 8


def printed(function: str):
    """A function as the pages define it, from its snippet run in an empty file."""
    [snippet] = [snippet for snippet in SNIPPETS if f"def {function}(" in snippet]
    names = {}
    exec(snippet, names)
    return names[function]


def inline(part: str) -> str:
    """The code within a sentence of the page that has this part."""
    [code] = [code for code in INLINE if part in code]
    return code


# ---- four frameworks -----------------------------------------------------------------------------
# Each function returns the framework's network and those of its parts that surround the blocks.


def timm_vit(settings: str = ""):
    timm = pytest.importorskip("timm")
    size = dict(img_size=IMAGE, patch_size=PATCH, num_classes=CLASSES)
    size |= dict(embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    vit = timm.models.VisionTransformer(**size, **eval(f"dict({settings})"))
    parts = dict(patch_embed=vit.patch_embed.proj, norm=vit.norm, head=vit.head)
    return vit, parts | dict(cls_token=vit.cls_token, pos_embed=vit.pos_embed)


def hugging_face_vit():
    modeling = pytest.importorskip("transformers.models.vit.modeling_vit")
    size = dict(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
    size |= dict(intermediate_size=4 * DIM, image_size=IMAGE, patch_size=PATCH, num_labels=CLASSES)
    net = modeling.ViTForImageClassification(modeling.ViTConfig(**size, layer_norm_eps=1e-6))
    e = net.vit.embeddings
    parts = dict(patch_embed=e.patch_embeddings.projection, norm=net.vit.layernorm)
    parts |= dict(head=net.classifier, cls_token=e.cls_token, pos_embed=e.position_embeddings)
    return net, parts


def torchvision_vit():
    size = dict(num_layers=DEPTH, num_heads=HEADS, hidden_dim=DIM, mlp_dim=4 * DIM)
    vit = torchvision.models.VisionTransformer(IMAGE, PATCH, **size, num_classes=CLASSES)
    parts = dict(patch_embed=vit.conv_proj, norm=vit.encoder.ln, head=vit.heads.head)
    return vit, parts | dict(cls_token=vit.class_token, pos_embed=vit.encoder.pos_embedding)


class EncoderViT(ViT):
    """Our ViT around `nn.TransformerEncoder`, whose layers are built as the page says."""

    def __init__(self):
        super().__init__(IMAGE, PATCH, CLASSES, dim=DIM, depth=1, num_heads=HEADS)
        layer = eval(inline("nn.TransformerEncoderLayer("), dict(nn=nn, d=DIM, heads=HEADS))
        layer.norm1.eps = layer.norm2.eps = 1e-6
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        del self.blocks

    def forward(self, images):
        return self.classify(self.encoder(self.embed(images)))


def torch_vit():
    vit = EncoderViT()
    names = ("patch_embed", "norm", "head", "cls_token", "pos_embed")
    return vit, {name: getattr(vit, name) for name in names}


# By column of the page's table: the network, and the page's function for the paper's init.
FRAMEWORKS = {
    "timm": (timm_vit, "skipless_timm_"),
    "Hugging Face": (hugging_face_vit, "skipless_hf_"),
    "torchvision": (torchvision_vit, "skipless_torchvision_"),
    "torch.nn": (torch_vit, "skipless_encoder_"),
}


def in_table(framework: str, row: str) -> list[str]:
    """The code in a cell of the page's table."""
    [cells] = [cells for cells in ROWS if cells[0] == row]
    return re.findall(r"`([^`]+)`", cells[ROWS[0].index(framework)])


def blocks_of(net, framework: str) -> list[nn.Module]:
    [code] = in_table(framework, "block")
    names = dict(vit=getattr(net, "vit", net), encoder=getattr(net, "encoder", None))
    return list(eval(code.removesuffix("[i]"), names))


def in_block(block, framework: str, row: str) -> list:
    """What the names in a cell of the table stand for."""
    return [eval(f"block.{name}", dict(block=block)) for name in in_table(framework, row)]


def linears_of(block, framework: str) -> list[tuple]:
    """(weight, bias) of W_Q, W_K, W_V, W_O, fc1 and fc2, unpacked."""
    first, *others = (in_block(block, framework, row) for row in (QKV, "W_O", "fc1, fc2"))
    pairs = [(part.weight, part.bias) for parts in others for part in parts]
    if len(first) == 3:
        return [(part.weight, part.bias) for part in first] + pairs
    if isinstance(first[0], nn.Parameter):  # of nn.MultiheadAttention
        packed = first[0], attention_of(block, framework).in_proj_bias
    else:
        packed = first[0].weight, first[0].bias
    return [*zip(*(tensor.chunk(3) for tensor in packed)), *pairs]


def attention_of(block, framework: str) -> nn.Module:
    [W_O] = in_table(framework, "W_O")
    return getattr(block, W_O.split(".")[0])


@torch.no_grad()
def as_ours(net, parts: dict, framework: str, identity: bool) -> ViT:
    """Our ViT in float64 with their weights, taken from where the table says they are."""
    pool = "mean" if parts["cls_token"] is None else "cls"
    size = dict(dim=DIM, depth=DEPTH, num_heads=HEADS, residual=False, pool=pool)
    size |= dict(diagonal_bias=identity, norm_affine=not identity)
    ours = ViT(IMAGE, PATCH, CLASSES, **size).double()
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            getattr(ours, name).load_state_dict(part.state_dict())
        elif part is not None:
            getattr(ours, name).copy_(part)
    for block, theirs in zip(ours.blocks, blocks_of(net, framework), strict=True):
        a = block.attention
        linears = (a.W_Q, a.W_K, a.W_V, a.W_O, block.mlp.fc1, block.mlp.fc2)
        for linear, (weight, bias) in zip(linears, linears_of(theirs, framework), strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
        norms = in_block(theirs, framework, "norms")
        for norm, other in zip((block.norm1, block.norm2), norms, strict=True):
            norm.load_state_dict(other.state_dict())
        if identity:
            a.diagonal_bias.copy_(theirs.diagonal_bias)
    return ours


# ---- what must hold for each ---------------------------------------------------------------------


def logits_of(net, images):
    out = net(images)
    return getattr(out, "logits", out)


def check(net, parts: dict, framework: str, init_, identity: bool = False) -> None:
    """init_(net): a function of the pages, or one that follows what they say."""
    torch.manual_seed(7)
    init_(net)
    net.double()
    check_weights(as_ours(net, parts, framework, identity), identity)
    check_training(copy.deepcopy(net), framework, identity)
    check_forward(net, parts, framework, identity)


def check_weights(ours: ViT, identity: bool) -> None:
    """Each weight is the one that our own function draws from the same seed."""
    drawn = ViT(**ours.config)
    torch.manual_seed(7)
    (identity_init_ if identity else conditioned_init_)(drawn)
    for name, found in ours.blocks.state_dict().items():
        if identity and re.search(r"W_[QK]\.weight", name):
            assert 0.015 < found.std() < 0.025, f"{name} is not small"
        else:  # torchvision draws biases of std 1e-6
            expected, message = drawn.blocks.state_dict()[name].double(), f"{name} differs"
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=message)
    if identity:
        std = (ours.patch_embed.in_channels * PATCH**2) ** -0.5
        assert ours.pos_embed.std().item() == pytest.approx(0.5, rel=0.15)
        assert ours.patch_embed.weight.std().item() == pytest.approx(std, rel=0.1)


def check_training(net, framework: str, identity: bool) -> None:
    optimizer = SOAP(net.train().parameters(), lr=3e-3 if identity else 1e-3)
    if identity:
        blocks = blocks_of(net, framework)
        hold_pairs(optimizer, [in_block(block, framework, "fc1, fc2") for block in blocks])
    images, labels = torch.randn(5, 3, IMAGE, IMAGE, dtype=torch.float64), torch.arange(5)
    losses = []
    for _ in range(30):
        losses.append(F.cross_entropy(logits_of(net, images), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], f"it does not learn: {losses[0]:.2f}, {losses[-1]:.2f}"


@torch.no_grad()
def check_forward(net, parts: dict, framework: str, identity: bool) -> None:
    """Equal logits, also with biases, gains and shifts; and no skip is left."""
    for p in net.parameters():
        p.add_(0.2 * torch.randn_like(p))
    ours = as_ours(net, parts, framework, identity)
    images = torch.randn(2, 3, IMAGE, IMAGE, dtype=torch.float64)
    for mode in (True, False):  # of training; for inference torch has other code
        theirs = logits_of(net.train(mode), images)
        torch.testing.assert_close(theirs, ours(images), atol=1e-9, rtol=1e-9)
    larger = torch.randn(2, 37, DIM, dtype=torch.float64)  # as of images of another size
    pair = blocks_of(net, framework)[1], ours.blocks[1]
    torch.testing.assert_close(*(block(larger) for block in pair), atol=1e-9, rtol=1e-9)
    block = copy.deepcopy(blocks_of(net, framework)[1])  # as of an averaged model: on its own
    for p in block.parameters():
        p.zero_()
    tokens = torch.randn(2, (IMAGE // PATCH) ** 2, DIM, dtype=torch.float64)
    assert block(tokens).abs().max() == 0, "a skip or the original is left"


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_papers_init(framework):
    network, function = FRAMEWORKS[framework]
    net, parts = network()
    takes = net.encoder if framework == "torch.nn" else net
    check(net, parts, framework, lambda _: printed(function)(takes))


def test_our_init_in_timm():
    net, parts = timm_vit(inline("class_token=False"))
    check(net, parts, "timm", printed("identity_timm_"), identity=True)


@pytest.mark.parametrize("framework", ["Hugging Face", "torchvision", "torch.nn"])
def test_our_init_elsewhere(framework):
    """As the last section of the page says, with the names of the table."""
    network, _ = FRAMEWORKS[framework]
    net, parts = network()
    names = dict(own_token_mask=printed("own_token_mask"))

    def forward(layer, x, *_, **__):
        norm1, norm2 = in_block(layer, framework, "norms")
        fc1, fc2 = in_block(layer, framework, "fc1, fc2")
        mask = eval(inline("mask = own_token_mask").split("= ")[1], dict(names, layer=layer, x=x))
        if framework == "Hugging Face":
            y, _ = eval(inline("layer.attention("))
        else:
            y, more = norm1(x), eval(f"dict({inline('attn_mask=')})", dict(mask=mask, x=x))
            y, _ = attention_of(layer, framework)(y, y, y, need_weights=False, **more)
        return fc2(F.gelu(fc1(norm2(y))))

    @torch.no_grad()
    def identity_(net):
        blocks = blocks_of(net, framework)
        for number, layer in enumerate(blocks, start=1):
            Ws = keepers_and_fetchers(DIM, HEADS) + mirrored_pairs(DIM, 4 * DIM, number)
            for (weight, bias), W in zip(linears_of(layer, framework)[2:], Ws, strict=True):
                weight.copy_(W.T)
                bias.zero_()
            layer.tokens, layer.diagonal_bias = 10, nn.Parameter(own_token_bias(HEADS, 10, DEPTH))
            for name in in_table(framework, "norms"):
                setattr(layer, name, nn.LayerNorm(DIM, eps=1e-6, elementwise_affine=False))
            layer.forward = MethodType(forward, layer)
        if framework != "Hugging Face":
            for layer in blocks:
                names = dict(attention=attention_of(layer, framework), d=DIM)
                exec("attention." + inline("in_proj_weight["), names)
        parts["pos_embed"].normal_(std=0.5)
        parts["patch_embed"].weight.normal_(std=parts["patch_embed"].weight[0].numel() ** -0.5)

    check(net, parts, framework, identity_, identity=True)
