"""The three looks at tokens, each against the same computed by hand, and their commands."""

import json
import math
import shutil
from argparse import Namespace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import OTHER_PARTS, assert_fails_in_one_line, run_here, run_main
from einops import einsum, rearrange
from PIL import Image
from scipy.ndimage import binary_propagation
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

import eval_dense
from beyond.arms import fresh_arm
from minskip import PRESETS, ViT, conditioned_init_
from support import pictures
from support.data import MEAN, ORDER, STD, mixed_seeds
from support.files import save_checkpoint
from support.shapes import draw_shapes

CPU = torch.device("cpu")
ARGS = dict(init="paper", alpha=0.7, beta=1.0, c=2.0, seed=3)


def network(pool: str = "cls", depth: int = 2, image_size: int = 16, patch_size: int = 8) -> ViT:
    """A small network in which every parameter counts: norms have gains, biases are not zero.
    With pool="mean" it has skip connections and drop-path, too."""
    torch.manual_seed(0)
    shape = dict(dim=16, depth=depth, num_heads=2, num_classes=5, pos_embed_std=0.5, pool=pool)
    shape |= dict(residual=True, drop_path=0.5) if pool == "mean" else {}
    model = conditioned_init_(ViT(image_size, patch_size, **shape), 0.7, 1.0, 2.0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval().requires_grad_(False)


def save(path: Path, model: ViT) -> Path:
    """A checkpoint whose averaged weights, which are to be used, are the model's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = model.state_dict()
    facts = dict(script="train_cls", args=ARGS, model_config=model.config, ema=weights)
    last = {k: v / 2 for k, v in weights.items()}
    save_checkpoint(path, facts | dict(classes=[], epoch=1, **OTHER_PARTS, model=last))
    return path


def parsed(monkeypatch, *words) -> Namespace:
    monkeypatch.setattr("sys.argv", ["eval_dense.py", *map(str, words)])
    args = eval_dense.parse_arguments()
    args.device = CPU
    return args


def make_scenes(root: Path, splits=("train", "val", "test"), bright: int = 1) -> Path:
    """Dark ground, class 0, below a bright one; two thirds of the pixels are unlabelled, 11."""
    generator = np.random.default_rng(0)
    for split in splits:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(4):
            mask = np.zeros(((20, 30), (17, 24))[i % 2], np.uint8 if bright < 256 else np.uint16)
            mask[: len(mask) // 2 + i] = bright
            image = 60 + 120 * (mask[..., None] > 0) + generator.integers(0, 30, (*mask.shape, 3))
            mask[:, : 2 * mask.shape[1] // 3] = 11
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


# ---- what is computed ----------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_maps_keys_and_class_attention_are_those_of_the_patches(pool):
    model = network(pool)
    images = torch.randn(3, 3, 16, 24, generator=torch.Generator().manual_seed(1))  # 2 x 3 patches
    tokens = [model.embed(images)]
    for block in model.blocks:
        tokens.append(block(tokens[-1]))
    for number, found in zip([2, 0, 1], eval_dense.token_maps(model, images, [2, 0, 1])):
        x = tokens[number]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
        x = (x * model.norm.weight + model.norm.bias)[:, -6:]
        expected = torch.stack([x[:, :3], x[:, 3:]], dim=1).permute(0, 3, 1, 2)
        assert found.shape == (3, 16, 2, 3) and torch.allclose(found, expected, atol=1e-5)
    for number, block in enumerate(model.blocks, start=1):
        x, a, attention = block.norm1(tokens[number - 1]), block.attention, 0
        q, k = x @ a.W_Q.weight.T + a.W_Q.bias, x @ a.W_K.weight.T + a.W_K.bias
        for head in (slice(0, 8), slice(8, 16)):
            logits = einsum(q[:, 0, head], k[..., head], "b dim, b token dim -> b token")
            attention = attention + (logits / math.sqrt(8)).softmax(dim=-1)[:, 1:] / 2
        if pool == "cls":
            found = eval_dense.class_attention(model, images, number)
            assert found.shape == (3, 2, 3)
            assert torch.allclose(found.flatten(1), attention, atol=1e-6)
    assert torch.allclose(eval_dense.last_keys(model, images), k[:, -6:], atol=1e-5)


def test_the_probe_takes_the_steps_written_out_by_hand():
    """Forty images make two batches; masks of two sizes, ignored pixels, an image without label."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(3, 2, 3, generator=generator).half() for _ in range(40)]
    sizes = [(5, 8) if i % 3 else (2, 3) for i in range(40)]
    masks = [torch.randint(0, 2, s, generator=generator).to(torch.uint8) for s in sizes]
    for i, mask in enumerate(masks):
        mask[: i % 2, : i % 3] = 9
    masks[7][:] = 9
    args = Namespace(ignore=9, epochs=3, seed=5, device=CPU)
    probe = eval_dense.train_probe(features, masks, 2, args)
    torch.manual_seed(5)
    conv, moments = torch.nn.Conv2d(3, 2, 1).double(), []
    start, optimizer = conv.weight.detach().clone(), torch.optim.Adam(conv.parameters())
    for step in range(6):
        [seed] = mixed_seeds(1, ORDER, 5, step // 2)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        numbers, losses = order[32:] if step % 2 else order[:32], []
        x = torch.stack([features[i].double() for i in numbers])
        moments.append(torch.stack(torch.var_mean(x, dim=(0, 2, 3))))
        for i, y in zip(numbers, conv(F.batch_norm(x, None, None, training=True))):
            logs = F.interpolate(y[None], masks[i].shape, mode="bilinear")[0].log_softmax(dim=0)
            losses += [-logs[c][masks[i] == c].sum() for c in (0, 1)]
        optimizer.param_groups[0]["lr"] = 0.03 * (1 + math.cos(math.pi * step / 6)) / 2
        optimizer.zero_grad()
        (sum(losses) / sum((masks[i] != 9).sum() for i in numbers)).backward()
        optimizer.step()
    for found, expected in zip(probe[1].parameters(), conv.parameters()):
        assert torch.allclose(found.double(), expected, atol=2e-5)
    variance, mean = torch.stack(moments).mean(dim=0)
    expected = conv(F.batch_norm(features[0][None].double(), mean, variance))
    assert torch.allclose(probe(features[0][None].float()).double(), expected, atol=1e-4)
    # a batch without any label changes nothing
    probe = eval_dense.train_probe(features[:1], [torch.full_like(masks[0], 9)], 2, args)
    assert torch.equal(probe[1].weight.double(), start)


def test_every_pixel_is_predicted_at_its_masks_own_resolution():
    probe = torch.nn.Conv2d(1, 2, 1).requires_grad_(False)
    probe.weight[:, 0, 0, 0], probe.bias[:] = torch.tensor([0.0, 1.0]), 0.0
    features = [torch.tensor([[[-1.0, 1.0]]]).half(), torch.tensor([[[3.0, -1.0]]]).half()]
    masks = [torch.zeros(3, 10), torch.zeros(1, 8)]
    first, second = eval_dense.predictions(probe, features, masks, CPU)
    assert torch.equal(first, (torch.arange(10) >= 5).long().expand(3, 10))
    # of the second image the logits are 3, 3, 2.5, 1.5, .5, -.5, -1, -1 at the pixels' centres
    assert second.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]


def test_scores_equal_a_count_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 2]])
    found = eval_dense.scores(prediction.chunk(2), truth.chunk(2), 4, 255)  # as two images
    assert found["confusion"] == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    # class 0: 2 of 4, class 1: 2 of 5, class 2: 0 of 1, class 3 nowhere, so not in the mean
    assert found["iou"] == [50.0, pytest.approx(40.0), 0.0, None]
    assert found["miou"] == pytest.approx(30.0)
    assert found["accuracy"] == pytest.approx(100 * 4 / 7)
    large = torch.tensor([200, 255], dtype=torch.uint8)  # ids whose products do not fit into uint8
    matrix = np.array(eval_dense.scores([large], [large], 256, -1)["confusion"])
    assert matrix[200, 200] == matrix[255, 255] == 1 and matrix.sum() == 2


def tokencut_by_hand(keys: np.ndarray, rows: int, tau: float) -> list[np.ndarray]:
    """The object, from the eigenvectors D^1/2 x of I - D^-1/2 W D^-1/2; one for each seed, if
    entries are equal but for rounding."""
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    W = np.where(unit @ unit.T > tau, 1.0, 1e-5)
    root = np.sqrt(W.sum(axis=1))
    values, vectors = np.linalg.eigh(np.eye(len(W)) - W / root[:, None] / root)
    assert values[2] - values[1] > 1e-6  # or there is no second eigenvector to speak of
    x, objects = vectors[:, 1] / root, []
    for seed in np.flatnonzero(np.abs(x) > np.abs(x).max() * (1 - 1e-8)):
        side = ((x > x.mean()) == (x[seed] > x.mean())).reshape(rows, -1)
        start = (np.arange(len(x)) == seed).reshape(rows, -1)
        objects.append(binary_propagation(start, mask=side))
    return objects


def test_tokencut_equals_an_implementation_of_its_own():
    generator, sizes, unique = np.random.default_rng(0), set(), 0
    for trial in range(40):
        tau, centres = (0.2, -0.1)[trial % 2], generator.normal(size=(2, 6))
        kinds = (generator.random((5, 8)) > 0.7).astype(int)
        kinds[1:4, 2:5] = 1
        keys = centres[kinds.flatten()] + 0.6 * generator.normal(size=(40, 6))
        found = eval_dense.tokencut(torch.from_numpy(keys), rows=5, tau=tau)
        objects = tokencut_by_hand(keys, 5, tau)
        assert found.shape == (5, 8) and any(np.array_equal(found, x) for x in objects)
        sizes.add(int(found.sum()))
        unique += len(objects) == 1
    assert len(sizes) > 8 and unique > 20  # objects of many sizes, few with a choice


def test_corloc_by_hand():
    """The object covers the left or the lower half of 4 x 6 pixels."""
    left, lower = torch.tensor([[1, 0], [1, 0]]).bool(), torch.tensor([[0], [1]]).bool()
    for predicted, boxes, expected in [
        (left, [[0, 0, 3, 2]], 100),  # IoU 0.5
        (left, [[0, 0, 3, 1.99]], 0),
        (left, [[4, 0, 6, 4], [0, 0, 3, 2]], 100),  # the best one counts
        (lower, [[0, 2, 6, 4]], 100),
        (lower, [[0, 0, 6, 2]], 0),
    ]:
        assert eval_dense.corloc([predicted], [torch.tensor(boxes).double()], [(4, 6)]) == expected
    # the mean is over the images with a box, each of its own size
    boxes = [torch.tensor(b).view(-1, 4) for b in ([0.0, 0, 30, 40], [], [0.0, 0, 30, 40])]
    assert eval_dense.corloc([left] * 3, boxes, [(40, 60), (4, 6), (4, 6)]) == 50


def test_principal_colours_are_rescaled_eigenvector_coordinates():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([5.0, 3, 2, 0.1, 0.1, 0.1])[:, None, None]
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    tokens = torch.randn(6, 4, 5, generator=generator) * scale
    tokens = einsum(turned, tokens, "i j, j row col -> i row col") + 1
    x = tokens.flatten(1).T.double().numpy()
    x = x - x.mean(axis=0)
    _, vectors = np.linalg.eigh(x.T @ x)
    expected = x @ vectors[:, [5, 4, 3]]
    for c in expected.T:
        c *= np.sign(c[np.abs(c).argmax()])
        c -= c.min()
        c /= c.max()
    colours = eval_dense.principal_colours(tokens)
    assert np.allclose(colours, expected.reshape(4, 5, 3), atol=1e-6)
    # a component of rounding alone has no colour
    along = torch.tensor([0.0, 1.0, 3.0, 4.0, 9.0, 2.0]).double().view(1, 2, 3)
    colours = eval_dense.principal_colours(torch.tensor([1.0, -2, 0.5]).view(3, 1, 1) * along)
    assert torch.allclose(colours[..., 0], along[0] / 9) and colours[..., 1:].abs().max() < 1e-2


def test_spread_by_hand_and_tokens_alike_are_grey_not_noise():
    tokens = torch.tensor([[[3.0, 3.0]], [[4.0, -4.0]]])  # mean (3, 0): each 4 away, of norm 5
    assert eval_dense.spread_of(tokens) == pytest.approx(0.8)
    step = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 2, 2)
    for spread, grey in ((0.9e-3, True), (1.1e-3, False), (0.0, True)):
        tokens = torch.cat([torch.ones(1, 2, 2), spread * step, torch.zeros(1, 2, 2)]).double()
        assert eval_dense.spread_of(tokens) == pytest.approx(spread, rel=1e-3)
        assert bool((eval_dense.principal_colours(tokens) == 0.5).all()) == grey


# ---- networks and images -------------------------------------------------------------------------


def test_networks_have_names_of_their_own(tmp_path, monkeypatch):
    """Those of their folders, or else the paths; random networks are named after their arms."""
    paths = [save(tmp_path / folder / "last.pt", network()) for folder in ("x/a", "y/a", "b")]
    words = ["--random-init", "skipless-identity", "--seed", 4]
    models = eval_dense.load_networks(parsed(monkeypatch, "picture", *paths, *words))
    assert list(models) == [*map(str, paths[:2]), "b", "skipless-identity, random"]
    torch.manual_seed(4)
    shape = dict(image_size=32, patch_size=8, num_classes=0) | PRESETS["nano"]
    expected = fresh_arm("skipless-identity", **shape)
    found = models["skipless-identity, random"]
    assert found.config == expected.config and not found.training
    assert all(map(torch.equal, found.parameters(), expected.parameters()))


def test_input_sizes_are_whole_patches(monkeypatch, capsys):
    """And a size that a network was not trained at is printed."""
    one = {"a": network()}
    two = one | {"b, untrained": network(image_size=32, patch_size=16)}
    for models, first, asked, expected in (
        (two, (120, 16), [], (128, 16)),
        (two, (45, 60), [48], (48, 48)),
        (two, (45, 60), [48, 64], (48, 64)),
        (one, (120, 3), [], (120, 8)),
        (one, (16, 16), [], (16, 16)),
    ):
        args = parsed(monkeypatch, "picture", *(["--image-size", *asked] if asked else []))
        assert eval_dense.input_size(args, models, first) == expected
        note = f"a: position embedding interpolated from 16 px to {expected[0]} x {expected[1]}\n"
        assert capsys.readouterr().out == ("" if expected == (16, 16) else note)


def test_without_a_folder_images_are_drawn_with_their_masks(monkeypatch):
    for words, side in ((["segment"], 120), (["picture", "--image-size", "8", "24"], 24)):
        args = parsed(monkeypatch, *words)
        for split in ("train", "val"):
            found = eval_dense.load_images(args, split, 103)  # more than are drawn at once
            images, _, masks = draw_shapes([0, 102], side, split)
            assert len(set(found.names)) == 103 and found.sizes == [(side, side)] * 103
            for i, number in enumerate((0, 102)):
                assert torch.equal(found.image(number), images[i])
                assert torch.equal(found.masks[number], masks[i])


# ---- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs/a/last.pt and runs/mean/last.pt, the latter also with a flipped bit, and
    two folders of images, of which `marked` has ids in test/ that train/ lacks."""
    folder = tmp_path_factory.mktemp("dense")
    save(folder / "runs/a/last.pt", network())
    content = bytearray(save(folder / "runs/mean/last.pt", network("mean", 3)).read_bytes())
    weights = network("mean", 3).patch_embed.weight.numpy().tobytes()
    content[content.find(weights) + len(weights) // 2] ^= 4
    (folder / "flipped.pt").write_bytes(content)
    make_scenes(folder / "scenes")
    make_scenes(folder / "marked", ["train"])
    make_scenes(folder / "marked", ["test"], bright=4096)
    return folder


def read_by_hand(folder: Path, split: str, size) -> tuple[Tensor, list[Tensor]]:
    """(network inputs, masks, if there are any) of a split."""
    inputs, masks = (
        [torch.from_numpy(np.array(Image.open(path))) for path in sorted(images.glob("*.png"))]
        for images in (folder / split / "images", folder / split / "masks")
    )
    inputs = [rearrange(x, "row col colour -> colour row col") for x in inputs]
    inputs = [v2.functional.resize(x, size, InterpolationMode.BICUBIC) for x in inputs]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (torch.stack(inputs) / 255 - mean) / std, masks


@pytest.mark.parametrize("blocks", [[], ["--blocks", "2", "0"]])
def test_segment_trains_on_train_and_reports_on_test(blocks, here, tmp_path, monkeypatch, capsys):
    """Here with ids of 16 bits."""
    monkeypatch.setattr(eval_dense, "BATCH_SIZE", 3)
    root = make_scenes(tmp_path, bright=300)
    words = ["segment", here / "runs/a/last.pt", "--data", root, "--ignore", "11", "--epochs", "3"]
    run_main(eval_dense.main, [*words, "--seed", "7", *blocks], tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    assert "4 training, 4 reported images, 301 classes" in printed
    assert printed.endswith("\nruns/dense/segment.json\n")
    record = json.loads((tmp_path / "runs/dense/segment.json").read_text())
    assert record["arguments"]["ignore"] == 11 and record["size"] == [24, 32]
    assert list(record["results"]) == ["class 300 everywhere", "a", "a, untrained"]
    baseline = record["results"]["class 300 everywhere"]
    right, total = 10 * 10 + 8 * 9 + 10 * 12 + 8 * 11, 2 * 10 * 20 + 2 * 8 * 17  # pixels
    assert baseline["accuracy"] == pytest.approx(100 * right / total)
    assert baseline["iou"] == [0, *[None] * 299, pytest.approx(100 * right / total)]

    args, blocks = Namespace(ignore=11, epochs=3, seed=7, device=CPU), [2, 0] if blocks else [2]
    (train, masks), (test, truth) = (read_by_hand(root, x, [24, 32]) for x in ("train", "test"))
    models = {"a": network()}
    torch.manual_seed(ARGS["seed"])
    untrained = conditioned_init_(ViT(**models["a"].config), 0.7, 1.0, 2.0)
    models["a, untrained"] = untrained.requires_grad_(False).eval()
    for name, model in models.items():
        maps = (eval_dense.token_maps(model, x, blocks) for x in (train, test))
        seen, unseen = (torch.cat(x, dim=1).half() for x in maps)
        probe = eval_dense.train_probe(list(seen), masks, 301, args)
        predicted = eval_dense.predictions(probe, unseen, truth, CPU)
        expected = eval_dense.scores(predicted, truth, 301, 11)
        assert record["results"][name] == expected | dict(blocks=blocks)
        row = f"{name:20}  miou {expected['miou']:5.1f} %  accuracy {expected['accuracy']:5.1f} %"
        assert row in printed.splitlines()


def test_discover_cuts_every_image(here, tmp_path, monkeypatch, capsys):
    """Of val/ where there is no test/, whose masks boxes.tsv replaces."""
    given = []
    monkeypatch.setattr(eval_dense, "corloc", lambda *x: given.append([*map(list, x)]) or 12.5)
    root = make_scenes(tmp_path, ["val"])
    shutil.rmtree(root / "val/masks")
    boxes = [[], [[0, 0, 24, 11]], [[0, 0, 30, 13], [1, 2, 30, 20]], []]
    lines = [[f"val/images/{i}.png", *box] for i in range(4) for box in boxes[i]]
    (root / "boxes.tsv").write_text("\n".join("\t".join(map(str, line)) for line in lines))
    words = ["discover", here / "runs/mean/last.pt", "--data", root, "--image-size", "32", "40"]
    run_main(eval_dense.main, [*words, "--tau", "0.95", "--out", "o"], tmp_path, monkeypatch)
    keys = eval_dense.last_keys(network("mean", 3), read_by_hand(root, "val", [32, 40])[0])
    expected = [eval_dense.tokencut(k, 4, 0.95) for k in keys]
    (whole, true, sizes), (found, *_), _ = given
    assert len(found) == 4 and all(map(torch.equal, found, expected))
    assert len(whole) == 4 and all(x.all() for x in whole)
    assert [b.tolist() for b in true] == boxes and sizes == [(20, 30), (17, 24)] * 2
    record = json.loads((tmp_path / "o/discover.json").read_text())
    assert list(record["results"]) == ["the whole image", "mean", "mean, untrained"]
    assert record["results"]["mean"] == dict(corloc=12.5) and record["size"] == [32, 40]
    assert record["images"] == 2
    printed = capsys.readouterr().out.splitlines()
    assert "2 of 4 images have a true box" in printed
    assert "mean             corloc  12.5 %" in printed


def test_discover_draws_the_cut_of_photographs(here, tmp_path, monkeypatch, capsys):
    """Each at its own size, dark outside the object, with the box that CorLoc would judge."""
    paths = [here / f"scenes/test/images/{i}.png" for i in (3, 0)]
    words = ["--tau", "0.9", "--image-size", "32", "40", "--images", *paths]
    caught, cwd = [], tmp_path
    monkeypatch.setattr(pictures, "save_figure", lambda *x: caught.append(x))
    words = ["discover", here / "runs/mean/last.pt", *words, "--out", "o"]
    run_main(eval_dense.main, words, cwd, monkeypatch)
    assert capsys.readouterr().out.endswith("\no/cut.png\n") and list((cwd / "o").iterdir()) == []
    [(figure, path)] = caught
    trained, untrained = np.array(figure.axes).reshape(2, 2)
    titles = [row[0].get_title(loc="left") for row in (trained, untrained)]
    assert titles == ["mean", "mean, untrained"] and path == Path("o/cut.png")
    inputs = read_by_hand(here / "scenes", "test", [32, 40])[0][[3, 0]]
    for ax, path, keys in zip(trained, paths, eval_dense.last_keys(network("mean", 3), inputs)):
        image, object = np.array(Image.open(path)) / 255, eval_dense.tokencut(keys, 4, 0.9).numpy()
        assert 0 < object.sum() < object.size
        height, width, _ = image.shape
        rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
        inside = object[rows][:, columns, None]
        assert np.allclose(ax.images[0].get_array(), np.where(inside, image, 0.3 * image))
        y, x = (np.flatnonzero(object.any(axis)) for axis in (1, 0))
        [box] = ax.patches
        found = np.array(box.get_bbox().extents) + 0.5
        corners = x[0] * width / 5, y[0] * height / 4, (x[-1] + 1) * width / 5
        assert found == pytest.approx([*corners, (y[-1] + 1) * height / 4])
    plt.close(figure)


def figure_of(words, cwd: Path, monkeypatch) -> plt.Figure:
    """The figure that `picture` saves into OUT."""
    caught, real = [], pictures.save_figure
    monkeypatch.setattr(pictures, "save_figure", lambda *x: (caught.append(x), real(*x)))
    run_main(eval_dense.main, ["picture", *words, "--out", "o"], cwd, monkeypatch)
    [(figure, _)] = caught
    assert (cwd / "o/picture.png").is_file()
    return figure


def test_picture_shows_tokens_and_attention_of_every_network(here, tmp_path, monkeypatch):
    paths = [here / f"scenes/test/images/{i}.png" for i in (3, 0)]
    words = [here / "runs/a/last.pt", here / "runs/mean/last.pt", "--images", *paths]
    words += ["--blocks", "2", "1", "--image-size", "24", "32"]
    figure = figure_of(words, tmp_path, monkeypatch)
    inputs = read_by_hand(here / "scenes", "test", [24, 32])[0][[3, 0]]
    models = dict(a=network(), mean=network("mean", 3))
    assert [part.get_suptitle() for part in figure.subfigs] == list(models)
    for part, model in zip(figure.subfigs, models.values()):
        for i, (path, axes) in enumerate(zip(paths, np.array(part.axes).reshape(2, 5))):
            maps = [x[i] for x in eval_dense.token_maps(model, inputs, [2, 1])]
            shown = [np.array(Image.open(path)), *map(eval_dense.principal_colours, maps)]
            captions = ["", *(f"spread {eval_dense.spread_of(x):.1g}" for x in maps)]
            if model.cls_token is not None:
                attention = [eval_dense.class_attention(model, inputs, b)[i] for b in (2, 1)]
                shown += attention
                captions += [f"peak {x.max() / x.mean():.1f}" for x in attention]
                limits = [ax.images[0].get_clim() for ax in axes[3:]]
                assert limits == [(0, x.max()) for x in attention]
            titles = ["image", "tokens,\nblock 2", "tokens,\nblock 1"]
            titles += ["attention,\nblock 2", "attention,\nblock 1"]
            for ax, title, caption, pixels in zip(axes, titles, captions, shown):
                assert ax.get_title() == (caption if i else f"{title}\n{caption}")
                assert np.allclose(ax.images[0].get_array(), pixels)
            assert not any(ax.images or ax.get_title() or ax.axison for ax in axes[len(shown) :])


def test_picture_says_where_tokens_are_alike_and_captions_can_be_read(here, tmp_path, monkeypatch):
    words = ["--random-init", "skipless-default", "--random-init", "residual"]
    figure = figure_of([here / "runs/mean/last.pt", *words], tmp_path, monkeypatch)
    for part, arm in zip(figure.subfigs[1:], ("skipless-default", "residual")):
        assert part._suptitle.get_color() == pictures.ARM_COLOURS[arm]
    shallow, alike, apart = (np.array(part.axes).reshape(2, 9) for part in figure.subfigs)
    for axes, blocks in ((shallow, [1, 2, 3]), (alike, [3, 6, 9, 12])):  # four, or as many
        titles = [ax.get_title().split("\n")[1] for ax in axes[0, 1 : 1 + len(blocks)]]
        assert titles == [f"block {b}" for b in blocks]
    assert alike[0, 0].images[0].get_array().shape == (120, 120, 3)
    assert alike[0, 1].images[0].get_array().shape == (15, 15, 3)
    for ax in alike[:, 4]:
        assert ax.get_title().splitlines()[-1].startswith("alike ")
        assert np.all(ax.images[0].get_array() == 0.5)
    assert not any("alike" in ax.get_title() for ax in apart.flat)
    # beside a page of text, 900 pixels wide, a caption is 9 pixels high, and none is over another
    scale = 900 / figure.bbox.width
    for ax in [*alike.flat, *apart.flat]:
        assert ax.title.get_fontsize() * figure.dpi / 72 * scale >= 9
        assert ax.title.get_window_extent().width < ax.get_window_extent().width * 1.05


# ---- flags and refusals --------------------------------------------------------------------------


def test_defaults(monkeypatch):
    shared = dict(image_size=None, seed=0, data=None, blocks=None, out=Path("runs/dense"))
    own = dict(segment=dict(epochs=20, ignore=255), discover=dict(tau=0.2, ignore=255), picture={})
    for command, expected in own.items():
        assert (shared | expected).items() <= vars(parsed(monkeypatch, command)).items()


BAD_FLAGS = {
    "segment": "no network given",
    "segment {a} --data nowhere": "nowhere: no images in nowhere/train/images",
    "picture {flipped}": r"flipped.pt is damaged \(at .*\); use another copy",
    "discover --random-init resnet": "resnet is no arm: .*skipless-paper",
    "segment {a} --data {root} --image-size 20 32": "20 32: use multiples of 8, the patch size",
    "segment {a} --data {root} --image-size 24 30": "24 30: use multiples of 8, the patch size",
    "segment {a} --data {root} --image-size 8 24": "--image-size 8 24: .* and at least four",
    "segment {a} --image-size 8 8 8": "takes one or two numbers, not 3",
    "segment {a} --blocks 1 3": "--blocks 3: a has only 2",
    "segment {a} --blocks -1": "--blocks: must not be negative",
    "picture {a} --blocks 0": "--blocks: must be at least 1",
    "picture {a} --images {image} nowhere.png": "^error: nowhere.png: No such file or directory",
    "picture {a} --images {a}": "cannot read image .*last.pt",
    "discover {a} --images {image} nowhere.png": "^error: nowhere.png: No such file or directory",
    "discover {a} --images {image} --data {root}": "--images have no true boxes .* leave one out",
    "discover {a} --images {image} --out {image}": "cannot write into this folder",
    "discover {a} --tau 1": "--tau: must lie in",
    "segment {a} --data {root} --out {image} --ignore 11": "cannot write into this folder",
    "discover {a} --data {root} --out {image} --ignore 11": "cannot write into this folder",
    "picture {a} --out {image}": "cannot write into this folder",
    "segment {a} --data {marked}": "test/images/0.png holds id 4096, above 11, .*--ignore 4096",
    "discover {a} --data {marked}": "test/images/0.png holds id 4096, above 4095, .*--ignore 4096",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, here, tmp_path, monkeypatch, capsys):
    files = dict(a="runs/a/last.pt", flipped="flipped.pt", image="scenes/test/images/0.png")
    files = {k: here / v for k, v in (files | dict(root="scenes", marked="marked")).items()}
    words = flags.format(**files).split()
    words += [] if "--out" in flags else ["--out", "o"]
    done = run_here(eval_dense.main, words, tmp_path, monkeypatch, capsys)
    assert_fails_in_one_line(done, BAD_FLAGS[flags])
    assert not (tmp_path / "o").exists()  # nothing was begun
