"""Files: written whole or not at all, read without running what they hold."""

import os
import pickle
import re
import socket
import subprocess
import sys

import pytest
import torch
from conftest import OTHER_PARTS, ROOT

import networks
from files import load_checkpoint, lock, save_checkpoint, write_atomically
from minskip import ViT

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


class Intruder:
    def __reduce__(self):
        return os.system, ("echo intruder > intruder.txt",)


@pytest.mark.parametrize(
    "kind", ["missing", "noise", "cut short", "code", "foreign", "other script"]
)
def test_only_our_own_checkpoints_are_taken(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    if kind == "noise":
        path.write_bytes(b"not a checkpoint at all")
    elif kind == "cut short":
        save_checkpoint(path, content(value=torch.randn(1000)))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Intruder()))
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "other script":
        save_checkpoint(path, content(script="train_ssl"))
    with pytest.raises(SystemExit) as stop:
        load_checkpoint(str(path), "train_cls")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(path) in message
    assert not (tmp_path / "intruder.txt").exists()


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(tmp_path, capsys):
    def full(temporary):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "log.jsonl").write_text("before")
    with pytest.raises(SystemExit):
        write_atomically(tmp_path / "log.jsonl", full)
    assert (
        "log.jsonl (No space left on device); what it held before is kept"
        in capsys.readouterr().err
    )
    assert (tmp_path / "log.jsonl").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_two_processes_that_write_one_file_do_not_write_one_temporary_file(tmp_path, monkeypatch):
    names = []
    for process in (11, 12):
        monkeypatch.setattr("files.os.getpid", lambda process=process: process)
        write_atomically(tmp_path / "a", lambda path: names.append(path.name) or path.touch())
    assert len(set(names)) == 2


def without(name: str) -> dict:
    return {key: value for key, value in content().items() if key != name}


def config(**changed) -> dict:
    whole = content()
    return whole | dict(model_config=whole["model_config"] | changed)


def weights(**changed) -> dict:
    whole = content()
    return whole | dict(model=whole["model"] | changed)


DAMAGED = {
    "no args": (lambda: without("args"), "it has no args"),
    "no weights": (lambda: without("model"), "it has no model"),
    "classes of another kind": (lambda: content(classes="abc"), "it has no classes"),
    "no epoch": (lambda: content(epoch=None), "it has no epoch"),
    "empty config": (lambda: content(model_config={}), "not those of its model_config"),
    "strange skips": (lambda: config(residual="no"), "not those of its model_config"),
    "before its start": (lambda: content(step=-1), "it has no step"),
    "too wide": (lambda: config(dim=2**20), "not those of its model_config"),
    "too deep": (lambda: config(depth=20_000), "not those of its model_config"),
    "strange depth": (lambda: config(depth=2.0), r"model_config \(TypeError"),
    "strange heads": (lambda: config(num_heads=3), r"model_config \(ValueError: num_heads"),
    "an unknown name": (lambda: config(colour=1), r"model_config \(TypeError"),
    "an unknown norm": (lambda: config(norm="x"), r"model_config \(KeyError"),
    "a weight too many": (lambda: weights(x=torch.ones(1)), "not those of its model_config"),
    "another shape": (lambda: weights(**{"norm.bias": torch.ones(1)}), "not those of its model_c"),
    "no tensor": (lambda: weights(**{"norm.bias": 3}), r"model_config \(AttributeError"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_checkpoint_ends_in_one_line_before_it_takes_memory(kind, tmp_path, capsys):
    make, words = DAMAGED[kind]
    path = tmp_path / "last.pt"
    save_checkpoint(path, make())
    with pytest.raises(SystemExit) as stop:
        networks.trained_vit(load_checkpoint(str(path)))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(f"^error: checkpoint {path} is damaged: .*{words}", message), message


def test_a_whole_checkpoint_gives_the_network_back(tmp_path):
    whole = content()
    save_checkpoint(tmp_path / "last.pt", whole)
    model = networks.trained_vit(load_checkpoint(str(tmp_path / "last.pt")))
    torch.testing.assert_close(model.state_dict(), whole["model"])


def test_memory_that_runs_out_is_not_called_damage():
    class Large(torch.nn.Module):
        def load_state_dict(self, state):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        networks.load_(Large(), {}, dict(path="x"))


def test_where_a_disk_has_no_locks_runs_go_without(tmp_path, monkeypatch):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("files.fcntl.lockf", unknown)
    lock(tmp_path)


def test_a_folder_is_one_process_s_at_a_time(tmp_path, capsys):
    lock(tmp_path)
    code = f"import files, pathlib; files.lock(pathlib.Path({str(tmp_path)!r}))"
    words = dict(cwd=ROOT, capture_output=True, text=True)
    other = subprocess.run([sys.executable, "-c", code], **words)
    assert other.returncode == 2
    assert other.stderr == (
        f"error: {tmp_path} is in use by process {os.getpid()} on {socket.gethostname()}; wait for "
        "it, or name another folder\n"
    )
