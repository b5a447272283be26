"""Objective.check: whether the loss over several batches is the mean that it is taken for.

A reduction, class weights or ignore_index inside a function cannot be seen; two batches together can.
"""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flatmin import Objective
from problems import FEATURES, NoisyNet, batch, build

X, Y = batch(0, 30, torch.float64)
CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def cut(x, y, *sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


UNEQUAL, EQUAL = (7, 12, 11), (10, 10, 10)
WRONG = {
    "sum": lambda z, y: F.cross_entropy(z, y, reduction="sum"),
    "ignore_index": lambda z, y: F.cross_entropy(z, y, ignore_index=0),
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=CLASS_WEIGHTS),
    "a mean over what is wrong": lambda z, y: F.cross_entropy(z, y, reduction="none")[z.argmax(1) != y].mean(),
    "the root of a mean": lambda z, y: F.mse_loss(z, F.one_hot(y, 3).double()).sqrt(),
    "divided by a fixed number": lambda z, y: F.cross_entropy(z, y, reduction="sum") / 12,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mean_that_cannot_be_seen_asks_for_weights(name):
    objective = Objective(nn.Linear(FEATURES, 3), WRONG[name], cut(X, Y, *UNEQUAL))
    with pytest.raises(ValueError, match="merged is not their mean.*Pass weight="):
        objective.check()
    Objective(objective.model, WRONG[name], (X, Y)).check()                                     # one batch: no mean
    Objective(objective.model, WRONG[name], cut(X, Y, *UNEQUAL), weight=lambda b: 1).check()    # as the user says


@pytest.mark.parametrize("name", ["ignore_index", "class weights", "a mean over what is wrong"])
def test_equal_batches_with_hidden_weights_are_wrong_too(name):
    with pytest.raises(ValueError, match="Pass weight="):
        Objective(nn.Linear(FEATURES, 3), WRONG[name], cut(X, Y, *EQUAL)).check()


def contrastive(z, y):
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T - 9 * torch.eye(len(z)), torch.arange(len(z)).roll(1))


@pytest.mark.parametrize("loss", [contrastive, WRONG["sum"], lambda z, y: -z.std(0).mean()])
def test_a_loss_of_the_whole_batch_is_warned_of_where_batches_are_equal(loss):
    with pytest.warns(UserWarning, match="the mean over batches of the loss of each"):
        Objective(nn.Linear(FEATURES, 3), loss, cut(X, Y, *EQUAL)).check()
    with pytest.raises(ValueError, match="compares the samples of a batch"):
        Objective(nn.Linear(FEATURES, 3), loss, cut(X, Y, *UNEQUAL)).check()


def ignored(y):
    y = y.clone()
    y[::3] = -100
    return y


T = torch.rand(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
RIGHT = {
    "cross-entropy": (nn.CrossEntropyLoss(), Y),
    "ignored targets": (nn.CrossEntropyLoss(), ignored(Y)),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=1), Y),
    "class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), ignored(Y)),
    "label smoothing": (nn.CrossEntropyLoss(label_smoothing=0.1), ignored(Y)),
    "smoothing and class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, label_smoothing=0.2), Y),
    "keywords of a function": (functools.partial(F.cross_entropy, ignore_index=2, label_smoothing=0.1), Y),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), Y),
    "probabilities": (nn.CrossEntropyLoss(), T / T.sum(1, keepdim=True)),
    "probabilities and class weights": (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), T / T.sum(1, keepdim=True)),
    "squares": (nn.MSELoss(), T),
    "sum of squares": (nn.MSELoss(reduction="sum"), T),
    "Huber": (nn.HuberLoss(), T),
    "logits": (nn.BCEWithLogitsLoss(pos_weight=CLASS_WEIGHTS), T.round()),
    "KL batchmean": (nn.KLDivLoss(reduction="batchmean"), T),
    "KL by hand": (lambda z, t: F.kl_div(F.log_softmax(z, 1), t, reduction="batchmean"), T),
    "label positions": (nn.NLLLoss(), Y),
    "half the squares": (lambda z, t: 0.5 * (z - t).square().sum(1).mean(), T),
    "with a penalty": (lambda z, y: F.cross_entropy(z, y) + 1e-2, Y),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RIGHT)
def test_ordinary_losses_raise_no_alarm(name, dtype):
    loss, targets = RIGHT[name]
    loss = loss.to(dtype) if isinstance(loss, nn.Module) else loss
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "reduction: 'mean' divides")
        for sizes in (UNEQUAL, EQUAL):
            Objective(model, loss, cut(X.to(dtype), targets, *sizes)).check()


class OverTime(nn.Module):
    """(T, N, ·): the first dimension is not the one of samples, and what comes later depends on what was before."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(FEATURES, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0]).transpose(1, 2)


def test_batches_that_are_no_lists_of_samples_raise_no_alarm():
    x, y = X.reshape(15, 2, FEATURES), Y.reshape(15, 2)
    whole = build(NoisyNet, norm=nn.BatchNorm1d(8, track_running_stats=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Objective(OverTime(), nn.CrossEntropyLoss(), cut(x, y, 4, 6, 5)).check()
        Objective(whole, nn.CrossEntropyLoss(), cut(X, Y, *UNEQUAL)).check()
        Objective(build(NoisyNet), nn.CrossEntropyLoss(), cut(X, Y, *UNEQUAL), mode="train").check()
        ragged = [(torch.randn(3, n, FEATURES), torch.randint(3, (3, n))) for n in (2, 4, 3)]
        Objective(nn.Linear(FEATURES, 3), lambda z, y: F.cross_entropy(z.transpose(1, 2), y), ragged).check()


@pytest.mark.parametrize("kind", ["classifier", "causal", "masked", "seq2seq"])
def test_models_with_their_own_loss_raise_no_alarm(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8, "max_position_embeddings": 16}
    if kind == "causal":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **small))
    elif kind == "seq2seq":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=19, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0))
    else:
        cls = transformers.BertForSequenceClassification if kind == "classifier" else transformers.BertForMaskedLM
        model = cls(transformers.BertConfig(**small))
    parts = []
    for n in (3, 5, 2):
        ids = torch.randint(19, (n, 6))
        labels = torch.randint(2, (n,)) if kind == "classifier" else torch.where(torch.rand(n, 6) < 0.3, -100, ids)
        parts.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        objective = Objective(model.double(), None, parts)
        objective.check()
    wrong = Objective(model, lambda out, batch: 3 * out.loss / len(batch["input_ids"]), parts)
    with pytest.raises(ValueError, match="weight="):
        wrong.check()
    if kind == "classifier":
        del parts[0]["labels"]
        with pytest.raises(ValueError, match="returned no loss for a batch with 'input_ids', 'attention_mask'"):
            Objective(model, None, parts[:1]).value()
        with pytest.raises(ValueError, match="takes two tensors"):
            Objective(model, nn.CrossEntropyLoss(), parts[1]).value()
        pair = parts[1]["input_ids"], parts[1]["labels"]
        assert float(Objective(model, nn.CrossEntropyLoss(), pair).value()) == pytest.approx(
            float(Objective(model, None, parts[1]).value()), rel=1e-12)


def test_autocast_raises_no_alarm():
    model = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 3)).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            Objective(model, nn.CrossEntropyLoss(), cut(X.float(), Y, *UNEQUAL)).check()


@pytest.mark.parametrize("lengths", ((4, 4), (4, 6)))
def test_batches_of_different_length_are_compared_in_parts(lengths):
    """Batches padded to their own longest sequence cannot be concatenated; parts of one of them can."""
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids, labels):
            return self.head(self.embed(ids))

    def by_sequence(z, batch):      # a mean over sequences, where labels say tokens
        losses = nn.functional.cross_entropy(z.transpose(1, 2), batch["labels"], reduction="none")
        mask = batch["labels"] != -100
        return ((losses * mask).sum(1) / mask.sum(1)).mean()

    def by_token(z, batch):
        return nn.functional.cross_entropy(z.transpose(1, 2), batch["labels"])

    data = []
    for n, length in zip((6, 7), lengths, strict=True):
        ids = torch.randint(9, (n, length))
        labels = ids.clone()
        for i in range(n):
            labels[i, 1 + i % (length - 1):] = -100
        data.append({"ids": ids, "labels": labels})
    model = Language()
    with pytest.raises(ValueError, match="weight="):
        Objective(model, by_sequence, data).check()
    Objective(model, by_token, data).check()
