"""The README's code runs as it stands, in order, in one namespace; and it quotes commands that exist."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_python_block_runs(capsys):
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(3)]
        names = {"model": model, "loader": loader, "loss_fn": torch.nn.functional.cross_entropy, "x": loader[0][0],
                 "y": loader[0][1], "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3)}
        before = [p.clone() for p in model.parameters()]
        assert len(BLOCKS) >= 4
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), names)  # our own text
        assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "nothing trained"
        assert names["spectrum"].converged.all() and float(names["estimate"]) == names["estimate"].value
        assert names["plane"].values.shape == (51, 51)
    finally:
        torch.set_default_dtype(kept)


def test_the_three_line_change_comes_early():
    assert README.splitlines().index("    loss = sharpener.backward(lambda: loss_fn(model(x), y))  # 2. replaces "
                                     "loss.backward()") < 20


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^flatmin (?:compare|measure|report)[^\n]*?(?=  |$)", README,
                                                       re.MULTILINE))))
def test_quoted_commands_parse(line):
    from flatmin import cli

    args = cli._parser().parse_args(line.split()[1:])
    assert args.verb == line.split()[1]


def test_quoted_scripts_exist():
    quoted = set(re.findall(r"`((?:benchmarks|examples|docs)/[\w./]+)`", README))
    assert quoted and all((Path(__file__).parents[1] / q).exists() for q in quoted)
