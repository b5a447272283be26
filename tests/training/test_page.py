"""The examples of docs/training.md run as they stand."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_the_examples_of_the_page(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 2
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    names: dict[str, object] = {}
    try:
        for block in blocks:
            exec(block, names)
    finally:
        torch.set_default_dtype(kept)
    loss, rest = capsys.readouterr().out.split("\n", 1)
    assert float(loss) < 0.05 and float(rest.split()[1]) > 0.1
