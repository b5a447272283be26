"""The loss of a language model of the ``transformers`` library on a text, as an objective."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..objective import Objective
from ..results import FEWEST_BATCHES
from ..training.user_code import said

PREFIX = "hf:"
TOKENS, CONTEXT, BATCH_SIZE = 16384, 512, 8
"""How many tokens of the text, how many in a window at most, and how many windows in a batch, by default."""

MASKED = 0.15
IGNORED = -100
"""The label of a position on which there is no loss."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TextSettings:
    """Which part of which text, and how it is cut into windows and batches; None: the default."""

    text: str
    context: int | None = None
    batch_size: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class LanguageObjective:
    """An objective, and what is recorded of its data."""

    objective: Objective
    facts: dict[str, Any]


def language_objective(name: str, settings: TextSettings, device: torch.device) -> LanguageObjective:
    """The mean loss, over the tokens of a text, of the model in ``hf:FOLDER`` or ``hf:ID``.

    The model's own tokenizer makes the tokens. A causal model predicts each token of a window from those before it; the
    windows share one token, so that every token but the first is predicted once. Of a masked model's windows 15 % of
    the tokens, at positions drawn with the seed, are replaced by its mask token and predicted. Windows begin (and those
    of a masked model end) with the special tokens that the tokenizer puts there.

    Raises:
        ValueError: no such model, no head for language modelling, no tokenizer, no text or one that is too short.
    """
    source = name.removeprefix(PREFIX)
    text = _read(settings.text)
    with _quiet():
        model, causal = load_model(source, settings.dtype)
        tokenizer = _tokenizer(source)
    model.to(device)
    before, after = _special(tokenizer)
    after = [] if causal else after
    ids, whole = _tokens(tokenizer, text, settings.tokens or TOKENS, settings.text)
    if max([*ids, *before, *after]) >= _vocabulary(model):
        raise ValueError(f"the tokenizer in {source} has a token {max(ids)}, and the model knows {_vocabulary(model)}: "
                         "they do not belong together")
    if causal:
        _refuse_lookahead(model, ids, source)
    overlap = int(causal and not before)
    context = _context(model, tokenizer, settings.context, len(before) + len(after) + overlap)
    pieces = _cut(ids, context - len(before) - len(after), overlap)
    if len(pieces) < FEWEST_BATCHES:
        raise ValueError(f"the text {settings.text} is too short: {len(ids)} tokens make {len(pieces)} windows of "
                         f"{context} tokens, and {FEWEST_BATCHES} are needed for an error over batches; take a longer "
                         "text, more --tokens or a smaller --context")
    windows = [_causal(piece, before) for piece in pieces] if causal else \
        _masked(pieces, before, after, tokenizer, torch.Generator().manual_seed(settings.seed), source)
    size = settings.batch_size or max(1, min(BATCH_SIZE, len(windows) // FEWEST_BATCHES))
    batches = _batches(windows, size)
    facts = {"units": "tokens", "text": settings.text, "text_tokens": len(ids), "whole_text": whole,
             "context": context, "windows": len(windows), "batch_size": size,
             "predicted_tokens": sum(int(_count(b)) for b in batches)} | ({} if causal else {"mask": (
                 f"{100 * MASKED:g} % of the tokens of each window, at positions drawn with seed {settings.seed}, are "
                 f"replaced by {tokenizer.mask_token}, and the loss is over them")})
    return LanguageObjective(Objective(model, _loss, batches, forward=_logits, weight=_count), facts)


def load_model(source: str, dtype: str | None) -> tuple[nn.Module, bool]:
    """The model of a folder or of the hub, in evaluation mode, and whether it is causal.

    Raises:
        ValueError: transformers is missing, no such folder or model, an unknown dtype, no head for language modelling,
            or weights that the folder does not hold.
    """
    transformers = _transformers()
    kind = _dtype(dtype)
    if not Path(source).is_dir() and (Path(source).exists() or source.count("/") > 1 or source.startswith((".", "~"))):
        raise ValueError(f"there is no folder {source}: pass hf: and a folder that save_pretrained wrote, or the name "
                         "of a model of the Hugging Face hub")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} holds no config.json: write the model there with model.save_pretrained({source!r})")
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        causal = _is_causal(config, source)
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
        model, found = loader.from_pretrained(source, config=config, dtype=kind, output_loading_info=True)
    except (OSError, KeyError, RuntimeError, ImportError) as error:     # of files, of the hub, of safetensors
        raise ValueError(f"cannot load a model from {source}: {said(error)}") from error
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing:
        raise ValueError(f"{source} does not hold all weights of {type(model).__name__}: {missing[0]} "
                         f"{f'and {len(missing) - 1} more are' * (len(missing) > 1) or 'is'} missing or of another "
                         "shape, and would be random")
    return model.eval(), causal


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError("hf: models need the package transformers: pip install 'flatmin[transformers]'") from error
    return transformers


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers shows neither bars nor advice."""
    logging = _transformers().utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def _dtype(name: str | None) -> Any:
    """A torch dtype by name; by default float32, in which curvature keeps enough digits."""
    found = getattr(torch, name or "float32", None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"--dtype {name} is no floating-point dtype of torch: pass float32, float64, bfloat16, "
                         "float16, or auto for that of the checkpoint")
    return "auto" if name == "auto" else found


def _is_causal(config: Any, source: str) -> bool:
    """Whether the checkpoint is of a causal language model (True) or of a masked one (False)."""
    from transformers.models.auto import modeling_auto as auto

    names = list(getattr(config, "architectures", None) or [])
    causal, masked = ({name for entry in table.values() for name in ([entry] if isinstance(entry, str) else entry)}
                      for table in (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES))
    decodes = not getattr(config, "is_encoder_decoder", False)
    for name in names:
        if decodes and (name in causal or name in masked):
            return name in causal
    raise ValueError(f"{source} holds {', '.join(names) or 'a model of unknown class'}, which has no head for causal "
                     "or masked language modelling: pass a ...ForCausalLM, ...LMHeadModel or ...ForMaskedLM")


def _tokenizer(source: str) -> Any:
    missing = (f"there is no tokenizer in {source}: write the model's own there with "
               f"tokenizer.save_pretrained({source!r})")
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"{missing} ({said(error)[:200]})") from error
    if not _encoded(tokenizer, "language model"):       # transformers makes an empty one where there are no files
        raise ValueError(missing)
    return tokenizer


def _encoded(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # of sequences longer than the model's, which are cut here
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a sequence."""
    plain, full = _encoded(tokenizer, "a"), _encoded(tokenizer, "a", special=True)
    at = next((i for i in range(len(full)) if full[i:i + len(plain)] == plain), None)
    return ([], []) if at is None else (full[:at], full[at + len(plain):])


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from error
    if not text.strip():
        raise ValueError(f"the text {path} is empty")
    return text


def _tokens(tokenizer: Any, text: str, most: int, path: str) -> tuple[list[int], bool]:
    """The first tokens of a text, and whether they are all of it; no more of the text is read than needed."""
    length = 8 * most
    while True:
        ids = _encoded(tokenizer, text[:length])
        if length >= len(text) or len(ids) > most + 64:     # a cut changes the tokens next to it alone
            break
        length *= 2
    if not ids:
        raise ValueError(f"the tokenizer finds no token in the text {path}")
    return ids[:most], length >= len(text) and len(ids) <= most


def _vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _context(model: Any, tokenizer: Any, asked: int | None, taken: int) -> int:
    """Tokens of a window, special ones included."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    most = min([n for n in limits if isinstance(n, int) and n > 0], default=CONTEXT)
    if asked is not None and asked > most:
        raise ValueError(f"--context {asked} is more than the {most} tokens that the model takes")
    if asked is not None and asked <= taken:
        raise ValueError(f"--context must be more than {taken}, the tokens of a window that stand at its ends, got "
                         f"{asked}")
    return asked or min(most, CONTEXT)


def _cut(ids: list[int], length: int, overlap: int) -> list[Tensor]:
    """Pieces of ``length`` tokens, each beginning with the last ``overlap`` of the one before; the last is shorter."""
    starts = range(0, len(ids) - overlap, length - overlap)
    return [torch.tensor(ids[i:i + length]) for i in starts]


def _causal(piece: Tensor, before: list[int]) -> Batch:
    """A window and, at each position, the next token."""
    start, none = torch.tensor(before, dtype=torch.long), torch.full((len(before),), IGNORED)
    return {"input_ids": torch.cat([start, piece]),
            "labels": torch.cat([none, piece, torch.tensor([IGNORED])])[1:]}


def _masked(pieces: list[Tensor], before: list[int], after: list[int], tokenizer: Any, generator: torch.Generator,
            source: str) -> list[Batch]:
    """Windows with masked tokens, and the tokens that stood there."""
    if tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer in {source} has no mask token, which a masked language model needs")
    out = []
    for piece in pieces:
        hidden = torch.zeros(len(piece), dtype=torch.bool)
        hidden[torch.randperm(len(piece), generator=generator)[:max(1, round(MASKED * len(piece)))]] = True
        ends = [torch.tensor(part, dtype=torch.long) for part in (before, after)]
        none = [torch.full((len(part),), IGNORED) for part in ends]
        out.append({"input_ids": torch.cat([ends[0], piece.masked_fill(hidden, tokenizer.mask_token_id), ends[1]]),
                    "labels": torch.cat([none[0], piece.masked_fill(~hidden, IGNORED), none[1]])})
    return out


def _batches(windows: list[Batch], size: int) -> list[Batch]:
    """Windows of equal length together; the last, shorter one is a batch of its own."""
    whole = [w for w in windows if len(w["labels"]) == len(windows[0]["labels"])]
    groups = [whole[i:i + size] for i in range(0, len(whole), size)] + [[w] for w in windows[len(whole):]]
    return [{key: torch.stack([w[key] for w in group]) for key in group[0]} for group in groups]


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    ids = batch["input_ids"]
    outputs: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return outputs.logits


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the tokens that are predicted, in nats."""
    kind = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(kind), batch["labels"].flatten(), ignore_index=IGNORED)


_loss.__name__ = "cross-entropy a token"


def _count(batch: Batch) -> float:
    return float((batch["labels"] != IGNORED).sum())


@torch.no_grad()
def _refuse_lookahead(model: nn.Module, ids: list[int], source: str) -> None:
    """Raise where what a causal model predicts depends on later tokens, such as an encoder under a decoder's name."""
    first = torch.tensor([ids[:8]], device=next(model.parameters()).device)
    second = (first + 1) % _vocabulary(model)
    second[0, 0] = first[0, 0]
    a, b = (_logits(model, {"input_ids": t})[0, 0] for t in (first, second))
    if float((a - b).abs().max()) > 20 * torch.finfo(a.dtype).eps * float(a.abs().max()):
        raise ValueError(f"{source} ({type(model).__name__}) is not causal: what it predicts depends on later tokens; "
                         "set is_decoder=True in its config.json, or save it as a masked language model")
