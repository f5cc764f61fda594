"""Files: written whole or not at all, read without running what they hold."""

import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import OTHER_PARTS, ROOT

from beyond.arms import trained_vit
from minskip import ViT
from support.errors import UserError
from support.files import load_checkpoint, lock, save_checkpoint, write_atomically

SHAPE = dict(image_size=8, patch_size=4, num_classes=3, dim=16, depth=2, num_heads=2)


def content(**changed) -> dict:
    """A small checkpoint."""
    model = ViT(**SHAPE)
    parts = dict(script="train_cls", args={}, classes=["a", "b", "c"], epoch=1, **OTHER_PARTS)
    return parts | dict(model=model.state_dict(), model_config=model.config) | changed


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(value=1))

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        save_checkpoint(path, dict(value=Unpicklable()))
    assert load_checkpoint(str(path))["value"] == 1
    assert [f.name for f in tmp_path.iterdir()] == ["last.pt"]


def test_a_loaded_checkpoint_is_a_view_of_its_file_and_outlives_it(tmp_path):
    """Eight processes that resume a run would each hold all of SOAP's state."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, content(value=torch.arange(5.0)))
    x = load_checkpoint(str(path))["value"]
    if sys.platform == "linux":
        assert str(path) in Path("/proc/self/maps").read_text()
    x += 1
    assert torch.equal(load_checkpoint(str(path))["value"], torch.arange(5.0))
    save_checkpoint(path, content(value=torch.zeros(5)))
    assert torch.equal(x, torch.arange(5.0) + 1)
    assert torch.equal(load_checkpoint(str(path))["value"], torch.zeros(5))


class Intruder:
    def __reduce__(self):
        return os.system, ("echo intruder > intruder.txt",)


@pytest.mark.parametrize(
    "kind", ["missing", "noise", "cut short", "code", "foreign", "other script"]
)
def test_only_our_own_checkpoints_are_taken(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    if kind == "noise":
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "cut short":
        save_checkpoint(path, content(value=torch.randn(1000)))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        torch.save(content(value=Intruder()), path)
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "other script":
        save_checkpoint(path, content(script="train_ssl"))
    with pytest.raises(UserError, match=re.escape(str(path))):
        load_checkpoint(str(path), "train_cls")
    assert not (tmp_path / "intruder.txt").exists()


def test_one_flipped_bit_is_noticed(tmp_path):
    """torch.load checks no checksum; without a test of the archive it would load other weights."""
    path, generator = tmp_path / "last.pt", random.Random(3)
    save_checkpoint(path, content())
    whole = path.read_bytes()
    good = load_checkpoint(str(path))["model"]
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(str(path))["model"]
        except UserError as error:
            assert "is damaged" in str(error)
        else:  # a bit of the archive's padding
            assert all(torch.equal(found[name], good[name]) for name in good)


def test_a_full_disk_leaves_no_half_file(tmp_path):
    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "log.jsonl").write_text("before")
    with pytest.raises(UserError, match=r"log.jsonl \(No space left on device\); what it held bef"):
        write_atomically(tmp_path / "log.jsonl", full)
    assert (tmp_path / "log.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_two_processes_that_write_one_file_do_not_write_one_temporary_file(tmp_path, monkeypatch):
    names = []
    for process in (11, 12):
        monkeypatch.setattr("support.files.os.getpid", lambda process=process: process)
        write_atomically(tmp_path / "a", lambda path: names.append(path.name) or path.touch())
    assert len(set(names)) == 2


def test_a_whole_checkpoint_gives_the_network_back(tmp_path):
    whole = content()
    save_checkpoint(tmp_path / "last.pt", whole)
    model = trained_vit(load_checkpoint(str(tmp_path / "last.pt")))
    torch.testing.assert_close(model.state_dict(), whole["model"])


def test_where_a_disk_has_no_locks_runs_go_without(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("support.files.fcntl.lockf", unknown)
    lock(tmp_path)


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    lock(tmp_path)
    code = f"import pathlib; from support import files; files.lock(pathlib.Path({str(tmp_path)!r}))"
    words = dict(cwd=ROOT, capture_output=True, text=True)
    other = subprocess.run([sys.executable, "-c", code], **words)
    holder = f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}; wait for"
    assert other.returncode == 1 and holder in other.stderr
