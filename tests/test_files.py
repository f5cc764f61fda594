"""Files: written whole or not at all, read without running what they hold."""

import os
import pickle

import pytest
import torch

from files import load_checkpoint, save_checkpoint, write_atomically


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, dict(script="train_cls", value=1))

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
        save_checkpoint(path, dict(script="train_cls", value=torch.randn(1000)))
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Intruder()))
    elif kind == "foreign":
        torch.save({"state_dict": {}}, path)
    elif kind == "other script":
        save_checkpoint(path, dict(script="train_ssl"))
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
