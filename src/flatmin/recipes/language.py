"""Language models: a decoder-only transformer, or any causal model of ``transformers``, on any text."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..training.protocol import Metric, Place
from . import text
from .transformer import SIZES, Shape, Transformer


@dataclass(frozen=True)
class Language:
    """Next-token prediction.

    Args:
        size: "2M", "24M", "118M" or "1208M": shape and size of the vocabulary.
        pretrained: "hf:FOLDER_OR_ID", a causal model of ``transformers`` with its own tokenizer, instead of ``size``.
        data: "stdlib" (the sources of Python's standard library), a text file, a folder, or "hf:DATASET".
        tokenizer: "bytes", "bpe-N", the path of a tokenizer.json; None: BPE with the size's vocabulary.
        context: tokens of a window.
        batch_size: windows of a micro-batch on each rank.
        steps: optimizer steps by default.
        lr, betas, weight_decay: of AdamW; weights of one dimension are not decayed.
        optimizer: "adamw", or "muon" for the matrices of the blocks, with AdamW for all other tensors.
        positions: "rotary" or "learned".
        held_out_windows: windows of each split that are evaluated, at most.
        cache: where tokenized texts are kept.
    """

    size: Literal["2M", "24M", "118M", "1208M"] = "2M"
    pretrained: str | None = None
    data: str = "stdlib"
    tokenizer: str | None = None
    context: int = 128
    batch_size: int = 16
    steps: int = 500
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    positions: Literal["rotary", "learned"] = "rotary"
    held_out_windows: int = 256
    cache: str | None = None
    name: str = "language"
    units: str = "tokens"

    @property
    def shape(self) -> Shape:
        if self.size not in SIZES:
            raise ValueError(f"--size must be one of {', '.join(SIZES)}, got {self.size!r}")
        return SIZES[self.size]

    def folder(self, at: Place) -> Path:
        """The tokenized text; the first rank makes it, the others wait."""
        if at.rank == 0:
            _prepared(self.data, self._tokenizer(), self.cache)
        at.group.wait()
        return _prepared(self.data, self._tokenizer(), self.cache)

    def _tokenizer(self) -> str:
        if self.pretrained is not None:
            return str(Path(self.pretrained.removeprefix("hf:")) / "tokenizer.json")
        return self.tokenizer or f"bpe-{self.shape.vocabulary}"

    def model(self) -> nn.Module:
        if self.pretrained is not None:
            return _pretrained(self.pretrained.removeprefix("hf:"))
        shape = self.shape
        if self.tokenizer == "bytes":
            shape = Shape(shape.width, shape.depth, shape.heads, text.Bytes.vocabulary)
        return Transformer(shape, self.context, self.positions)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        return list(max(lists, key=len, default=nn.ModuleList()))

    def train_batches(self, at: Place) -> text.Windows:
        return text.Windows(text.tokens(self.folder(at), "train"), self.context, self.batch_size, at)

    def held_out(self, split: str, at: Place) -> list[dict[str, Tensor]]:
        """Windows at the same places in every call; "measure" takes training data."""
        found = text.tokens(self.folder(at), "train" if split == "measure" else split)
        count = min(self.held_out_windows, (len(found.values) - 1) // self.context)
        starts = torch.arange(count)[at.rank::at.world] * self.context
        rate = torch.tensor(found.bytes_per_token)
        return [{"tokens": text.windows(found.values, part, self.context), "bytes_per_token": rate}
                for part in starts.split(self.batch_size) if len(part)]

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        outputs: Any = model(batch["tokens"][:, :-1])
        return outputs if isinstance(outputs, Tensor) else outputs.logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1).float(), batch["tokens"][:, 1:].flatten())

    def losses(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), batch["tokens"][:, 1:], reduction="none").mean(1)

    def weight(self, batch: dict[str, Tensor]) -> float:
        return float(batch["tokens"][:, 1:].numel())

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        muon: list[Any] = []
        if self.optimizer == "muon":
            if not hasattr(torch.optim, "Muon"):
                raise ValueError("this torch has no torch.optim.Muon: take --optimizer adamw, or a newer torch")
            inside = {id(p) for block in self.blocks(model) for p in block.parameters() if p.dim() == 2}
            muon = [torch.optim.Muon([p for _, p in named if id(p) in inside], lr=self.lr,
                                     weight_decay=self.weight_decay)]
            named = [(n, p) for n, p in named if id(p) not in inside]
        groups = [{"params": [p for _, p in named if p.dim() > 1], "weight_decay": self.weight_decay},
                  {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0}]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas)
        return [adamw, *muon]

    def evaluate(self, model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Metric]:
        """Loss in nats a token, bits per byte, accuracy and entropy of the predictions, with errors over windows."""
        device = next(model.parameters()).device
        rows = []
        for batch in batches:
            tokens = batch["tokens"].to(device)
            logits = self.forward(model, {"tokens": tokens}).float()
            logs, targets = logits.log_softmax(-1), tokens[:, 1:]
            loss = -logs.gather(-1, targets[..., None])[..., 0].mean(1)
            right = (logits.argmax(-1) == targets).float().mean(1)
            entropy = -(logs.exp() * logs).sum(-1).mean(1)
            bits = loss / math.log(2) / batch["bytes_per_token"].to(device)
            rows.append(torch.stack([loss, bits, right, entropy], 1).double().cpu())
        table = torch.cat(rows)
        names = ("loss", "bits_per_byte", "accuracy", "entropy")
        error = table.std(0) / math.sqrt(len(table)) if len(table) > 1 else torch.full((4,), math.nan)
        return {name: Metric(float(table[:, i].mean()), float(error[i]), len(table), name == "accuracy")
                for i, name in enumerate(names)}


@functools.lru_cache(maxsize=8)
def _prepared(data: str, tokenizer: str, cache: str | None) -> Path:
    return text.prepared(data, tokenizer, cache)


def _pretrained(name: str) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("hf: models need the package transformers: pip install 'flatmin[transformers]'") from error
    return transformers.AutoModelForCausalLM.from_pretrained(name)


language = Language()
