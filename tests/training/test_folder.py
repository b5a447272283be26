"""Run folders: what is kept where the disk is full."""

import json
import os

import pytest

from flatmin.errors import RunFolderError
from flatmin.training.folder import RunFolder


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run")
    folder.save_record({"kind": "compare", "n": 1})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunFolderError, match=f"No space left on device; .* --resume {folder.path} continues"):
        folder.save_record({"kind": "compare", "n": 2})
    monkeypatch.undo()
    assert json.loads((folder.path / "record.json").read_text())["n"] == 1
    assert [p.name for p in folder.path.iterdir() if p.is_file()] == ["record.json"], "no half-written file is left"
