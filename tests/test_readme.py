"""The README's code is run, its commands name real flags."""

import copy
import re

import pytest
import torch
from conftest import ROOT, run_scripts
from torch import nn

from minskip import Block

README = (ROOT / "README.md").read_text()
WIDTH, HEADS, DEPTH = 48, 3, 2


def snippet() -> dict:
    """Names defined by the README's block of Python on copying the init."""
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "def fill_" in b)
    names = {}
    exec(block, names)
    return names


def as_our_block(eps, qkv, qkv_bias, out, fc1, fc2) -> Block:
    block = Block(WIDTH, HEADS, 4.0, residual=False).eval()
    block.norm1.eps = block.norm2.eps = eps
    a = block.attention
    with torch.no_grad():
        for ours, W, b in zip((a.W_Q, a.W_K, a.W_V), qkv, qkv_bias):
            ours.weight.copy_(W)
            ours.bias.copy_(b)
        for ours, theirs in ((a.W_O, out), (block.mlp.fc1, fc1), (block.mlp.fc2, fc2)):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    return block


def check(theirs: nn.Module, ours: Block) -> None:
    """The weights are conditioned, the skip is gone, and their block computes what ours does."""
    product = ours.attention.W_O.weight @ ours.attention.W_V.weight
    singular = torch.linalg.svdvals(product)
    assert torch.allclose(singular, torch.full_like(singular, 9.0), rtol=1e-4)
    up = ours.mlp.fc1.weight
    assert torch.allclose(up.T @ up, 4 * torch.eye(WIDTH), atol=1e-4)
    x = torch.randn(2, 7, WIDTH)
    twin = copy.deepcopy(theirs)  # as an averaged model or a teacher is made
    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x), atol=1e-4)
        for p in twin.parameters():
            p.zero_()
        assert twin(x).abs().max() == 0


def test_the_init_in_a_timm_vit():
    timm = pytest.importorskip("timm")
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=5
    ).eval()
    snippet()["skipless_timm_"](vit)
    b = vit.blocks[1]
    a, m = b.attn, b.mlp
    check(b, as_our_block(
        1e-6, a.qkv.weight.chunk(3), a.qkv.bias.chunk(3), a.proj, m.fc1, m.fc2
    ))  # fmt: skip
    assert vit(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_the_init_in_a_torchvision_vit():
    from torchvision.models import VisionTransformer

    vit = VisionTransformer(32, 16, DEPTH, HEADS, WIDTH, 4 * WIDTH, num_classes=5).eval()
    snippet()["skipless_torchvision_"](vit)
    b = vit.encoder.layers[1]
    a = b.self_attention
    check(b, as_our_block(
        1e-6, a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), a.out_proj, b.mlp[0], b.mlp[3]
    ))  # fmt: skip
    assert vit(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_the_init_in_a_hugging_face_vit():
    transformers = pytest.importorskip("transformers")
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            image_size=32,
        )
    ).eval()
    snippet()["skipless_hugging_face_"](vit)
    b = vit.layers[1]
    a = b.attention
    qkv = (a.q_proj, a.k_proj, a.v_proj)
    check(b, as_our_block(
        1e-12, [w.weight for w in qkv], [w.bias for w in qkv], a.o_proj, b.mlp.fc1, b.mlp.fc2
    ))  # fmt: skip
    assert vit(torch.randn(2, 3, 32, 32)).last_hidden_state.isfinite().all()


def test_commands_name_real_flags(tmp_path):
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    scripts = "train_cls.py train_ssl.py jacobian_probe.py experiments/photographs.py"
    scripts = [*scripts.split(), "experiments/dino_photographs.py", "experiments/depths.py"]
    helps = [[script, "--help"] for script in scripts]
    helps += [
        ["eval_dense.py", command, "--help"] for command in ("segment", "discover", "picture")
    ]
    done = run_scripts({" ".join(words): words for words in helps}, tmp_path)
    known = "".join(run.stdout for run in done.values())
    others = {"--nproc-per-node", "--dist", "--steps"}  # torchrun's, pytest's, a benchmark's
    assert not {flag for flag in shown - others if not re.search(rf"{flag}\b", known)}


def test_every_file_named_in_the_readme_exists():
    for name in re.findall(r"`((?:\w+/)*\w+\.(?:py|txt|png|jsonl|md))`", README):
        if name not in ("log.jsonl", "curves.png"):
            assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(((?!http|#)[^)]+)\)", README):
        assert (ROOT / name).exists(), name
