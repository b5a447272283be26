"""Files are replaced as a whole, whatever happens; a digest sees every value, shape, dtype and text."""

import errno
import hashlib
import os
import re
import stat
from pathlib import Path

import pytest
import torch

from flatmin import files
from flatmin.files import digest, move_file, remove_file, replace_file

SOURCE = Path(files.__file__).parent


def fails_after_a_part(error):
    def write(path):
        path.write_text("half")
        raise error

    return write


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("torch's own"),
                                   KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(error, tmp_path):
    file = tmp_path / "record.json"
    file.write_text("old")
    with pytest.raises(type(error)):
        replace_file(file, fails_after_a_part(error))
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_end_leaves_the_old_file_alone(step, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "record.json"
    file.write_text("old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, lambda path: path.write_text("new"))
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["record.json"]


def test_file_and_folder_are_on_the_disk_before_and_after_the_rename(tmp_path, monkeypatch):
    steps, real = [], os.replace
    kind = {True: "folder", False: "file"}
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(kind[stat.S_ISDIR(os.fstat(fd).st_mode)]))
    monkeypatch.setattr(os, "replace", lambda *args: steps.append("rename") or real(*args))
    replace_file(tmp_path / "a" / "b" / "record.json", lambda path: path.write_text("new"))
    assert steps == ["file", "rename", "folder"]
    assert (tmp_path / "a" / "b" / "record.json").read_text() == "new"
    move_file(tmp_path / "a" / "b" / "record.json", tmp_path / "moved.json")
    assert steps[3:] == ["rename", "folder"] and (tmp_path / "moved.json").read_text() == "new"


def test_what_a_killed_write_left_is_written_over_and_removed_with_its_file(tmp_path):
    file = tmp_path / "state.pt"
    replace_file(file, lambda path: path.write_text("old"))
    files._temporary(file).write_text("half")
    assert not list(tmp_path.glob("state.pt*"))[1:], "a half-written file has no name that a job looks for"
    replace_file(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["state.pt"]
    files._temporary(file).write_text("half")
    remove_file(file)
    remove_file(file)
    assert not os.listdir(tmp_path)


def test_no_other_file_of_the_package_replaces_a_file_or_hashes_content():
    users = {name for name in (p.relative_to(SOURCE).as_posix() for p in SOURCE.rglob("*.py"))
             if re.search(r"os\.(replace|rename|fsync)\(|hashlib", (SOURCE / name).read_text())}
    assert users == {"files.py", "report/page.py"}, "page.py names its scripts by their hash for the browser"


def test_a_digest_is_sha256_of_text_shape_dtype_and_bytes():
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    expected = hashlib.sha256(b"name\0" + b"(2, 3) torch.float32" + x.numpy().tobytes())
    assert digest("name", x) == expected.hexdigest()


def test_a_digest_sees_every_difference():
    x = torch.arange(6.0)
    parts = [(x,), (x.view(2, 3),), (x.view(3, 2),), (x.float(),), (x.bfloat16(),), (x + 1e-12,), (x, x), ("", x),
             (x, ""), ("ab", "c"), ("a", "bc"), ("abc",), (torch.zeros(0),), (torch.zeros(0, 2),), (torch.tensor(0.0),),
             ()]
    assert len({digest(*p) for p in parts}) == len(parts)
    y = torch.arange(12.0).view(3, 4)
    assert digest(y.T) == digest(y.T.contiguous()) != digest(y)
    assert digest(y[:, ::2].requires_grad_()) == digest(y[:, ::2].clone())
