"""The evaluation of tokens: its figures against counts by hand, its cuts, its one-line errors."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import run_script
from einops import rearrange
from PIL import Image

import common
import eval_dense
from minskip import ViT, conditioned_init_


def command(monkeypatch, *words) -> None:
    """eval_dense.py as from the command line, in this process: importing takes seconds."""
    monkeypatch.setattr(sys, "argv", ["eval_dense.py", *map(str, words)])
    with common.one_line_errors("make --image-size smaller"):
        eval_dense.main()


def save_network(path, pool: str = "cls", residual: bool = False, image_size: int = 16):
    torch.manual_seed(0)
    shape = dict(width=16, depth=2, heads=2, position_std=0.5)
    model = ViT(image_size, 8, num_classes=5, **shape, residual=residual, pool=pool)
    conditioned_init_(model, 0.7, 1.0, 3.0)
    args = dict(init="conditioned", alpha=0.7, beta=1.0, c=3.0, model="nano", seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(
        path,
        script="train_cls",
        args=args,
        model_config=model.config,
        model=model.state_dict(),
        ema=None,
    )
    return model.eval()


def make_scenes(root, sizes=((45, 60),), counts=(("train", 8), ("test", 4))):
    """Streets in miniature: dark ground 0 below, bright 1 above, an ignored 11 along the rim."""
    generator = np.random.default_rng(0)
    for split, count in counts:
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            mask = np.zeros((height, width), np.uint8)
            mask[: height // 2 + i] = 1
            image = 60 + 120 * mask[..., None] + generator.integers(0, 30, (height, width, 3))
            mask[:, :2] = 11
            Image.fromarray(image.astype(np.uint8)).save(root / split / "images" / f"{i}.jpg")
            Image.fromarray(mask).save(root / split / "masks" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with runs/a/last.pt, runs/mean/last.pt and scenes/."""
    folder = tmp_path_factory.mktemp("dense")
    save_network(folder / "runs/a/last.pt")
    save_network(folder / "runs/mean/last.pt", pool="mean", residual=True)
    make_scenes(folder / "scenes")
    return folder


# ---- scores --------------------------------------------------------------------------------------


def test_scores_equal_a_count_by_hand():
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 255]])
    prediction = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 2]])
    matrix = eval_dense.confusion(prediction, truth, classes=4, ignore=255)
    assert matrix.tolist() == [[2, 1, 0, 0], [1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    scores = eval_dense.scores(matrix)
    # class 0: 2 of 4, class 1: 2 of 5, class 2: 0 of 1, class 3 nowhere, so not in the mean
    assert scores["iou"] == [50.0, pytest.approx(40.0), 0.0, None]
    assert scores["miou"] == pytest.approx(30.0)
    assert scores["accuracy"] == pytest.approx(100 * 4 / 7)


def test_ignored_pixels_change_nothing():
    generator = torch.Generator().manual_seed(0)
    truth, prediction = (torch.randint(0, 3, (9, 9), generator=generator) for _ in range(2))
    truth[:, :3] = 7
    matrix = eval_dense.confusion(prediction, truth, 3, ignore=7)
    prediction[:, :3] = 2
    assert torch.equal(matrix, eval_dense.confusion(prediction, truth, 3, ignore=7))
    assert matrix.sum() == 54


def test_the_probe_is_blind_to_what_masks_ignore():
    torch.manual_seed(0)
    features = torch.randn(6, 5, 2, 2).half()
    masks = [torch.randint(0, 2, (10, 12), dtype=torch.uint8) for _ in range(6)]
    for mask in masks:
        mask[:4] = 9

    def weight(ignore_as):
        ids = [torch.where(m == 9, ignore_as, m) for m in masks]
        probe = eval_dense.train_probe(features, ids, 2, ignore_as, 2, 0, torch.device("cpu"))
        return probe[1].weight

    assert torch.equal(weight(9), weight(200))


# ---- the probe -----------------------------------------------------------------------------------


def test_a_probe_on_patches_beats_the_majority_on_shapes():
    images, _, masks = common.draw_shapes(list(range(120)), 32, "train")
    masks = list((masks > 0).to(torch.uint8))
    x = common.normalise(images)
    patches = rearrange(x, "b c (row p) (col q) -> b (c p q) row col", p=8, q=8).half()
    cpu = torch.device("cpu")
    probe = eval_dense.train_probe(patches[:90], masks[:90], 2, 255, 5, 0, cpu)
    matrix = eval_dense.measure_probe(probe, patches[90:], masks[90:], 2, 255, cpu)
    scenes = [eval_dense.Scenes([], None, [], m) for m in (masks[:90], masks[90:])]
    best, baseline = eval_dense.majority(*scenes, classes=2, ignore=255)
    assert best == 0
    assert eval_dense.scores(matrix)["miou"] > baseline["miou"] + 10
    share = torch.stack(masks[90:]).float().mean()
    assert baseline["accuracy"] == pytest.approx(100 * (1 - share.item()))


def test_masks_of_several_sizes_are_judged_at_their_own_resolution():
    """Class 0 in the upper three rows of tokens, 1 in the lower three, at whatever resolution."""
    sizes = [(45, 60), (30, 21), (45, 60), (7, 90)]
    features = torch.zeros(len(sizes), 4, 6, 8)
    features[:, 0, 3:] = 1
    masks = []
    for height, width in sizes:
        mask = torch.zeros(height, width, dtype=torch.uint8)
        mask[round(height / 2) :] = 1
        masks.append(mask)
    cpu = torch.device("cpu")
    probe = eval_dense.train_probe(features.half(), masks, 2, 255, 20, 0, cpu)
    matrix = eval_dense.measure_probe(probe, features.half(), masks, 2, 255, cpu)
    assert matrix.sum() == sum(height * width for height, width in sizes)  # every pixel judged
    assert eval_dense.scores(matrix)["accuracy"] > 95


def test_logits_are_interpolated_between_the_centres_of_patches():
    probe = torch.nn.Identity()
    tokens = torch.zeros(1, 2, 1, 2)
    tokens[0, 1] = torch.tensor([-1.0, 1.0])  # class 1 wins right of the middle
    truth = (torch.arange(10) >= 5).expand(3, 10).to(torch.uint8)
    matrix = eval_dense.measure_probe(probe, tokens, [truth], 2, 255, torch.device("cpu"))
    assert matrix.tolist() == [[15, 0], [0, 15]]


def test_features_are_the_normed_patch_tokens_of_the_chosen_blocks(here):
    model = common.model_of(common.load_checkpoint(here / "runs/a/last.pt")).eval()
    images = common.draw_shapes([0, 1, 2], 24, "val")[0]
    scenes = eval_dense.Scenes(["a", "b", "c"], images.__getitem__, [(24, 24)] * 3, None)
    features = eval_dense.extract(model, scenes, (24, 24), [0, 2], torch.device("cpu"), "")
    assert features.shape == (3, 2 * 16, 3, 3) and features.dtype == torch.float16
    last = model.forward_features(common.normalise(images))[:, 1:]
    ours = rearrange(features[:, 16:], "b dim row col -> b (row col) dim")
    assert torch.allclose(ours.float(), last, atol=4e-3)


# ---- TokenCut ------------------------------------------------------------------------------------


def keys_of(picture: np.ndarray) -> torch.Tensor:
    """Keys of two kinds, at right angles but for noise, where the picture is and is not."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(picture.size, 8, generator=generator) * 0.02
    keys[torch.arange(picture.size), torch.from_numpy(picture).flatten().long()] += 1
    return keys


def test_tokencut_finds_the_blob_and_only_the_part_with_the_seed():
    picture = np.zeros((9, 12), bool)
    picture[2:5, 3:7] = True
    assert np.array_equal(eval_dense.tokencut(keys_of(picture), 9, 12), picture)
    two = picture.copy()
    two[6:8, 9:11] = True  # a second blob of the same kind, touching nowhere
    found = eval_dense.tokencut(keys_of(two), 9, 12)
    assert found.any() and not (found & ~two).any()
    assert np.array_equal(found, picture) or np.array_equal(found, two & ~picture)
    touching_by_a_corner = picture.copy()
    touching_by_a_corner[5:7, 7:9] = True
    found = eval_dense.tokencut(keys_of(touching_by_a_corner), 9, 12)
    assert found.sum() in (12, 4)  # corners do not connect


def test_tokencut_cuts_at_tau():
    """Keys at a cosine of 0.5: two kinds for tau 0.6, one for tau 0.4, where any cut will do."""
    picture = np.zeros((4, 4), bool)
    picture[1:3, 1:3] = True
    keys = torch.where(
        torch.from_numpy(picture).flatten()[:, None],
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.5, 0.75**0.5]),
    )
    assert np.array_equal(eval_dense.tokencut(keys, 4, 4, tau=0.6), picture)
    assert eval_dense.tokencut(keys[:1], 1, 1).all()


def test_fiedler_vector_solves_the_generalised_problem():
    generator = np.random.default_rng(0)
    W = np.where(generator.random((40, 40)) > 0.8, 1.0, 1e-5)
    W = np.maximum(W, W.T)
    D = np.diag(W.sum(axis=1))
    x = eval_dense.fiedler_vector(W)
    value = x @ (D - W) @ x / (x @ D @ x)
    assert np.abs((D - W) @ x - value * D @ x).max() < 1e-10
    everything = np.sort(np.linalg.eigvals(np.linalg.solve(D, D - W)).real)
    assert everything[0] == pytest.approx(0, abs=1e-10)
    assert value == pytest.approx(everything[1])


@pytest.mark.parametrize("pool", ["a", "mean"])
def test_keys_are_those_the_last_attention_computes(here, pool):
    model = common.model_of(common.load_checkpoint(here / f"runs/{pool}/last.pt")).eval()
    images = common.normalise(common.draw_shapes([0, 1], 24, "val")[0])
    seen = []
    model.blocks[-1].attention.W_K.register_forward_hook(lambda m, i, out: seen.append(out))
    model(images)
    cut = model.class_token is not None
    keys = eval_dense.last_keys(model, images)
    assert torch.equal(keys, seen[0][:, cut:]) and keys.shape == (2, 9, 16)


def test_boxes_by_hand():
    part = np.zeros((3, 4), bool)
    part[1, 1:3] = part[2, 2] = True
    assert eval_dense.box_of(part, height=30, width=80) == (20, 10, 60, 30)
    assert eval_dense.box_iou((0, 0, 4, 2), (2, 1, 6, 3)) == pytest.approx(2 / 14)
    assert eval_dense.box_iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    assert eval_dense.box_iou((0, 0, 2, 2), (0, 0, 2, 1)) == 0.5


def test_judging_a_part_by_hand():
    """The part covers the left half of 4 x 4 pixels; the object is its upper row; 9 is ignored."""
    part = np.array([[True, False]])
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[0, :2], mask[3], mask[1, 3] = 1, 9, 2
    found, iou = eval_dense.judge(part, [(0, 0, 2, 2)], mask, (4, 4), ignore=9)
    assert found and iou == pytest.approx(2 / 7)
    assert eval_dense.judge(part, [(0, 0, 2, 1.9)], None, (4, 4), 9) == (False, None)
    assert eval_dense.summary([(True, 0.5), (False, None)]) == dict(corloc=50, mask_iou=50)
    scenes = eval_dense.Scenes(["x"], None, [(4, 4)], [mask])
    assert eval_dense.true_boxes(scenes, None, 9) == [[(0, 0, 2, 1), (3, 1, 4, 2)]]


# ---- pictures ------------------------------------------------------------------------------------


def test_principal_colours_do_not_depend_on_the_axes_they_are_given_in():
    torch.manual_seed(0)
    tokens = torch.randn(6, 4, 5) * torch.tensor([5.0, 3, 2, 0.1, 0.1, 0.1])[:, None, None]
    colours = eval_dense.principal_colours(tokens)
    assert colours.shape == (4, 5, 3) and colours.min() == 0 and colours.max() == 1
    turned = torch.linalg.qr(torch.randn(6, 6))[0]
    others = eval_dense.principal_colours(torch.einsum("ij,jrc->irc", turned, tokens) + 3)
    assert torch.allclose(colours, others, atol=1e-4)
    assert eval_dense.principal_colours(torch.randn(6, 1, 2)).shape == (1, 2, 3)


def test_class_attention_weighs_the_values(here):
    """With its own share added, the weights give the attention's output from its values."""
    model = common.model_of(common.load_checkpoint(here / "runs/a/last.pt")).eval()
    images = common.normalise(common.draw_shapes([0], 16, "val")[0])
    attention, captured = model.blocks[1].attention, {}
    attention.W_O.register_forward_hook(lambda m, i, out: captured.update(mixed=i[0]))
    attention.W_V.register_forward_hook(lambda m, i, out: captured.update(values=out))
    with torch.no_grad():
        for W in (attention.W_Q, attention.W_K):  # one head's weights in both: mean over heads
            W.weight[8:], W.bias[8:] = W.weight[:8].clone(), W.bias[:8].clone()
        model(images)
    share = eval_dense.class_attention(model, images, 2)[0]
    assert share.shape == (2, 2) and 0 < share.sum() < 1
    weights = torch.cat([1 - share.sum()[None], share.flatten()])
    assert torch.allclose(weights @ captured["values"][0], captured["mixed"][0, 0], atol=1e-5)


# ---- the commands --------------------------------------------------------------------------------


def test_segment_from_the_command_line(here, tmp_path, monkeypatch, capsys):
    words = ["segment", here / "runs/a/last.pt", "--data", here / "scenes", "--ignore", "11"]
    words += ["--blocks", "1", "2", "--epochs", "4", "--device", "cpu"]
    done = run_script("eval_dense.py", *words, "--out", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr and max(map(len, done.stdout.splitlines())) <= 100
    assert "a: images of 48 x 64, trained at 16 x 16" in done.stdout
    record = json.loads((tmp_path / "one/segment.json").read_text())
    assert list(record["results"]) == ["class 1 everywhere", "a", "a, untrained"]
    result = record["results"]["a"]
    assert result["miou"] > record["results"]["class 1 everywhere"]["miou"] + 10
    assert np.sum(result["confusion"]) == 4 * 45 * 58  # at full resolution, two columns ignored
    assert f"{result['miou']:.1f}" in done.stdout and record["arguments"]["ignore"] == 11
    # the checkpoint was not trained, so it equals itself before training
    assert result["iou"] == record["results"]["a, untrained"]["iou"]
    command(monkeypatch, *words, "--out", tmp_path / "two")
    again = json.loads((tmp_path / "two/segment.json").read_text())
    assert again["results"]["a"]["confusion"] == result["confusion"]


def test_discover_from_the_command_line(here, tmp_path):
    words = ["discover", here / "runs/a/last.pt", here / "runs/mean/last.pt", "--device", "cpu"]
    done = run_script("eval_dense.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "500 of 500 images have a true box" in done.stdout
    record = json.loads((tmp_path / "runs/dense/discover.json").read_text())
    names = ["the whole image", "a", "a, untrained", "mean", "mean, untrained"]
    assert list(record["results"]) == names
    for result in record["results"].values():
        assert 0 <= result["corloc"] <= 100 and 0 <= result["mask_iou"] <= 100
    assert f"{record['results']['mean']['corloc']:.1f}" in done.stdout


def test_discover_takes_boxes_from_a_file(here, tmp_path, monkeypatch):
    """Then masks are not needed, and an image without a box is not counted."""
    root = tmp_path / "scenes"
    shutil.copytree(here / "scenes/test/images", root / "val/images")
    lines = [
        "file\tx0\ty0\tx1\ty1",
        "val/images/0.jpg\t0\t0\t60\t45",
        "val/images/0.jpg\t1\t1\t2\t2",
    ]
    (root / "boxes.tsv").write_text("\n".join(lines) + "\n\n")
    words = ["--random-init", "residual", "--data", root, "--out", tmp_path, "--image-size", "16"]
    command(monkeypatch, "discover", *words)
    record = json.loads((tmp_path / "discover.json").read_text())
    assert record["images"] == 1
    assert record["results"]["the whole image"] == dict(corloc=100, mask_iou=None)


def test_picture_from_the_command_line(here, tmp_path):
    files = [here / f"scenes/test/images/{i}.jpg" for i in (0, 1)]
    words = ["picture", here / "runs/a/last.pt", here / "runs/mean/last.pt", "--images", *files]
    done = run_script("eval_dense.py", *words, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    with Image.open(tmp_path / "runs/dense/picture.png") as image:
        assert image.width > 400 and image.height > 400
    assert [f.name for f in (tmp_path / "runs/dense").iterdir()] == ["picture.png"]


# ---- bad input -----------------------------------------------------------------------------------


def assert_refused(monkeypatch, capsys, words, expected: str) -> None:
    with pytest.raises(SystemExit) as ending:
        command(monkeypatch, *words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert ending.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert re.search(expected, lines[0]), lines[0]


BAD_FLAGS = {
    "segment": "no network given",
    "explain {a}": "invalid choice: 'explain'",
    "segment {a} --data nowhere": "nowhere: no such folder",
    "segment nowhere.pt": "nowhere.pt: no such file",
    "segment {image}": "damaged or of another program",
    "discover --random-init resnet": "invalid choice: 'resnet'.*skipless",
    "segment {a} --data {root} --image-size 50 60": "--image-size 50 60: .* patch, 8",
    "segment {a} --image-size 0": "--image-size 0 0",
    "segment {a} --image-size 8 8 8": "takes one or two numbers",
    "segment {a} --blocks 3": r"--blocks 3: a has 2 blocks; give numbers 0\.\.2",
    "picture {a} --blocks 0": r"--blocks 0: a has 2 blocks; give numbers 1\.\.2",
    "picture {a} --images nowhere.png": "nowhere.png: no such file",
    "picture {a} --images {a}": "cannot read image .*last.pt",
    "segment {a} --epochs 0": "--epochs must be at least 1",
    "segment {a} --seed -1": "--seed must lie in",
    "discover {a} --tau 1": "--tau must lie between",
    "segment {a} --device tpu": "is not known here",
    "segment {a} --out {image}": "cannot make this folder",
    "segment {a} --data {root}": r"test/images/0.jpg holds id 12, .* above 11; .*--ignore 12",
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_end_in_one_line(flags, here, tmp_path, monkeypatch, capsys):
    root = here / "scenes"
    if flags.endswith("{root}"):
        root = shutil.copytree(root, tmp_path / "scenes")
        damage_mask(root / "test/masks/0.png", lambda ids: ids + 1)
    words = flags.format(a=here / "runs/a/last.pt", root=root, image=root / "test/images/0.jpg")
    assert_refused(monkeypatch, capsys, words.split(), BAD_FLAGS[flags])


def damage_mask(path, change) -> None:
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


BAD_FOLDERS = {
    "no masks folder": r"no folder .*train/masks; expected ROOT/train/images",
    "no images": r"no images in .*test/images",
    "no split": r"no folder .*val/images",
    "image without a mask": r"test/images/3.jpg has no mask .*test/masks/3.png",
    "other size": r"train/masks/1.png is 60 x 44, its image 60 x 45",
    "colours": r"train/masks/0.png is RGB, not single-channel",
    "only ignored, train": r"--ignore 11: the training masks hold nothing else",
    "only ignored, test": r"--ignore 11: the reported masks hold nothing else",
    "image of text": r"cannot read image .*train/images/2.jpg",
    "mask of text": r"cannot read mask .*train/masks/2.png",
    "boxes: letters": r"boxes.tsv, line 2: .*: not file, x0, y0, x1, y1",
    "boxes: too few": r"boxes.tsv, line 1: .*: not file, x0, y0, x1, y1",
    "boxes: inside out": r"boxes.tsv, line 1: .*: not file, x0, y0, x1, y1",
    "boxes: no such file": r"boxes.tsv, line 1: .*: no such file under ROOT",
    "boxes: none of this split": r"no reported image has a true box",
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_bad_folders_end_in_one_line(damage, here, tmp_path, monkeypatch, capsys):
    root = shutil.copytree(here / "scenes", tmp_path / "scenes")
    masks = root / "train/masks"
    boxes = {
        "letters": "test/images/0.jpg\t0\t0\t5\t5\ntest/images/0.jpg\t0\t0\tfive\t5",
        "too few": "test/images/0.jpg\t0\t0\t5",
        "inside out": "test/images/0.jpg\t5\t0\t0\t5",
        "no such file": "test/images/7.jpg\t0\t0\t5\t5",
        "none of this split": "train/images/0.jpg\t0\t0\t5\t5",
    }
    if damage == "no masks folder":
        shutil.rmtree(masks)
    elif damage == "no images":
        for file in (root / "test/images").iterdir():
            file.unlink()
    elif damage == "no split":
        shutil.rmtree(root / "test")
    elif damage == "image without a mask":
        (root / "test/masks/3.png").unlink()
    elif damage == "other size":
        damage_mask(masks / "1.png", lambda ids: ids[1:])
    elif damage == "colours":
        damage_mask(masks / "0.png", lambda ids: np.stack([ids] * 3, axis=-1))
    elif damage.startswith("only ignored"):
        for file in (root / damage.split()[-1] / "masks").iterdir():
            damage_mask(file, lambda ids: np.full_like(ids, 11))
    elif damage == "image of text":
        (root / "train/images/2.jpg").write_text("this is no image")
    elif damage == "mask of text":
        (masks / "2.png").write_text("this is no image")
    else:
        (root / "boxes.tsv").write_text(boxes[damage.removeprefix("boxes: ")] + "\n")
    task = "discover" if damage.startswith("boxes") else "segment"
    words = [
        task,
        here / "runs/a/last.pt",
        "--data",
        root,
        "--ignore",
        "11",
        "--out",
        tmp_path / "o",
    ]
    assert_refused(monkeypatch, capsys, words, BAD_FOLDERS[damage])
    assert not (tmp_path / "o").exists()  # nothing was begun
