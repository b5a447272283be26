"""``flatmin measure hf:FOLDER --text FILE``: tiny models of transformers with a trained tokenizer, in a folder.

The truth is a hand-written loop over the windows and the model's own loss.
"""

import json
import re

import pytest
import torch
from torch import nn

from flatmin import Objective, cli, report
from flatmin.curvature import Hessian, eigenpairs
from flatmin.jobs.language_objective import TextSettings, language_objective
from flatmin.jobs.settings import MeasureSettings
from flatmin.measures import METRICS
from flatmin.sharpness import one_step

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "".join(f"the {a} {b} sat on the {c} mat, and {c} ran.\n" for a in ("red", "big", "old") for b in
               ("cat", "dog", "fox", "hen") for c in ("wet", "new", "dry"))
ENDS = {"gpt2": ([], []), "llama": (["<s>"], []), "bert": (["[CLS]"], ["[SEP]"])}
CPU = torch.device("cpu")


def model_of(kind):
    small = {"vocab_size": 290, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "max_position_embeddings": 24}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=290, n_layer=1, n_head=2, n_embd=8, n_positions=24)
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    return transformers.BertForMaskedLM(transformers.BertConfig(**small))


def tokenizer_of(kind):
    special = {"gpt2": {"eos_token": "<|endoftext|>"}, "llama": {"bos_token": "<s>", "eos_token": "</s>"},
               "bert": {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}}[kind]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(special.values()), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    before, after = ENDS[kind]
    if before:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[(t, made.token_to_id(t)) for t in (*before, *after)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    transformers.utils.logging.disable_progress_bar()
    for kind in ENDS:
        model_of(kind).save_pretrained(root / kind)
        tokenizer_of(kind).save_pretrained(root / kind)
    (root / "book.txt").write_text(TEXT)
    return root


@pytest.fixture(autouse=True)
def _there(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(kept)


def run(*args):
    return cli.main(["measure", *map(str, args), "--quiet"])


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def windows_by_hand(folders, kind, tokens, context):
    """(input, label) sequences with None where nothing is predicted, by plain lists; causal kinds."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / kind)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:tokens]
    if kind == "gpt2":      # the last token of a window is the first of the next
        return [ids[i:i + context] for i in range(0, len(ids) - 1, context - 1)]
    start = tokenizer.bos_token_id
    return [[start, *ids[i:i + context - 1]] for i in range(0, len(ids), context - 1)]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_causal_model_is_measured_by_its_own_loss_of_every_token(folders, tmp_path, kind):
    """Against each window by itself in float64, and model(input_ids, labels=input_ids).loss, which is in float32."""
    rows = windows_by_hand(folders, kind, 150, 12)
    model, windows = model_of(kind).double(), [torch.tensor([row]) for row in rows]
    by_hand = Objective(model, lambda z, row: nn.functional.cross_entropy(z[0, :-1], row[0, 1:]), windows,
                        forward=lambda model, row: model(row).logits, weight=lambda row: row.shape[1] - 1)
    own = Objective(model, None, [{"input_ids": row, "labels": row} for row in windows])
    assert run(f"hf:{folders / kind}", "--text", folders / "book.txt", "--tokens", 150, "--context", 12, "--dtype",
               "float64", "--k", 2, "--metrics", "one_step,spectrum", "--out", "r") == 0
    record = record_of(tmp_path / "r")
    data, results = record["data"], record["results"]
    assert data["predicted_tokens"] == (149 if kind == "gpt2" else 150) == sum(len(row) - 1 for row in rows)
    assert data["samples"] == len(rows) and data["context"] == 12 and not data["whole_text"]
    assert data["loss"] == pytest.approx(float(by_hand.value()), rel=1e-12)
    assert data["loss"] == pytest.approx(float(own.value()), rel=1e-6)
    step, spectrum = one_step(by_hand, 0.05), eigenpairs(Hessian(by_hand), 2)
    assert results["one_step"]["value"] == pytest.approx(step.value, rel=1e-9)
    assert results["one_step"]["second_order"] == pytest.approx(step.second_order, rel=1e-6)
    assert results["spectrum"]["eigenvalues"] == pytest.approx(spectrum.eigenvalues.tolist(), rel=1e-3)
    assert results["spectrum"]["data_stderr"][0] > 0 and results["one_step"]["data_stderr"] > 0
    assert record["model"]["dtype"] == "float64" and record["model"]["name"] == type(model).__name__
    page = (tmp_path / "r" / "report.html").read_text()
    assert f"{data['predicted_tokens']} predicted tokens in {len(rows)} windows of 12" in page
    assert "nats a token" in page and "samples" not in report.table(record).splitlines()[0]


def test_a_masked_model_is_measured_on_the_same_masked_tokens(folders, tmp_path):
    def found(**kw):
        settings = TextSettings(str(folders / "book.txt"), **({"context": 12, "tokens": 150, "dtype": "float64"} | kw))
        return language_objective(f"hf:{folders / 'bert'}", settings, CPU)

    made, again, other = found(), found(), found(seed=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "bert")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:150]
    model, total, count, seen = model_of("bert").double().eval(), 0.0, 0, []
    for batch in made.objective.data:
        for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id and len(row) <= 12
            hidden = [i for i, y in enumerate(labels) if y != -100]
            assert len(hidden) == max(1, round(0.15 * (len(row) - 2)))
            assert hidden == [i for i, x in enumerate(row) if x == tokenizer.mask_token_id]
            seen += [y if i in hidden else x for i, (x, y) in enumerate(zip(row, labels, strict=True))][1:-1]
            logs = model(torch.tensor([row])).logits[0].log_softmax(-1)
            total, count = total - sum(float(logs[i, labels[i]].detach()) for i in hidden), count + len(hidden)
    assert seen == ids and count == made.facts["predicted_tokens"]
    assert float(made.objective.value()) == pytest.approx(total / count, rel=1e-12)
    assert float(again.objective.value()) == float(made.objective.value()) != float(other.objective.value())
    assert "15 %" in made.facts["mask"] and "seed 0" in made.facts["mask"] and "[MASK]" in made.facts["mask"]
    assert run(f"hf:{folders / 'bert'}", "--text", folders / "book.txt", "--context", 12, "--tokens", 150,
               "--metrics", "one_step", "--out", "r") == 0
    assert "15 % of the tokens" in report.table(record_of(tmp_path / "r"))


def test_batches_are_as_asked_and_five_by_default(folders):
    def data(**kw):
        return language_objective(f"hf:{folders / 'gpt2'}", TextSettings(str(folders / "book.txt"), **kw), CPU)

    found = data(context=12, tokens=150, batch_size=4)
    assert [len(b["labels"]) for b in found.objective.data] == [4, 4, 4, 1, 1][:len(found.objective.data)]
    assert len(data(context=12, tokens=80).objective.data) >= 5
    whole = data()
    assert whole.facts["whole_text"] and whole.facts["context"] == 24, "as many as the model takes"
    ids = transformers.AutoTokenizer.from_pretrained(folders / "gpt2")(TEXT)["input_ids"]
    assert whole.facts["text_tokens"] == len(ids) and whole.facts["predicted_tokens"] == len(ids) - 1


def test_only_as_much_text_is_read_as_its_tokens_need(folders):
    """The same tokens as of the whole text, whatever is cut off."""
    whole = transformers.AutoTokenizer.from_pretrained(folders / "gpt2")(TEXT)["input_ids"]
    for tokens in (60, 90, 121):
        found = language_objective(f"hf:{folders / 'gpt2'}", TextSettings(str(folders / "book.txt"), 6, 1, tokens), CPU)
        row = [t for b in found.objective.data for t in b["input_ids"][0][:-1].tolist()]
        assert row == whole[:tokens - 1]


def damaged(folders, tmp_path, kind):
    """A folder with something missing."""
    folder = tmp_path / kind
    if kind == "bare":
        model_of("bert").bert.save_pretrained(folder)
        tokenizer_of("bert").save_pretrained(folder)
    elif kind == "headless":      # its configuration names a class whose weights are not all there
        model_of("bert").bert.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer_of("bert").save_pretrained(folder)
    elif kind == "encoder":       # a decoder by name that looks ahead
        config = model_of("bert").config
        config.is_decoder = False
        transformers.BertLMHeadModel(config).save_pretrained(folder)
        tokenizer_of("bert").save_pretrained(folder)
    elif kind == "no_tokenizer":
        model_of("gpt2").save_pretrained(folder)
    elif kind == "wrong_tokenizer":
        config = transformers.GPT2Config(vocab_size=50, n_layer=1, n_head=2, n_embd=8, n_positions=24)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer_of("gpt2").save_pretrained(folder)
    elif kind == "no_weights":
        folder.mkdir()
        (folder / "config.json").write_text((folders / "gpt2" / "config.json").read_text())
    else:
        folder.mkdir()
    return f"hf:{folder}"


@pytest.mark.parametrize(("kind", "words"), [
    ("bare", "holds BertModel, which has no head for causal or masked language modelling"),
    ("headless", "does not hold all weights of BertForMaskedLM"), ("encoder", "is not causal"),
    ("no_tokenizer", "there is no tokenizer in"), ("wrong_tokenizer", "the model knows 50"),
    ("no_weights", "cannot load a model from"), ("empty", "holds no config.json")])
def test_a_folder_that_lacks_something_is_refused_in_one_line(folders, tmp_path, capfd, kind, words):
    name = damaged(folders, tmp_path, kind)
    capfd.readouterr()
    assert run(name, "--text", folders / "book.txt", "--context", 8, "--metrics", "one_step", "--out", "r") == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(("args", "words"), [
    (["hf:./nosuch", "--text", "BOOK"], "there is no folder ./nosuch"),
    (["hf:a/b/c", "--text", "BOOK"], "there is no folder a/b/c"),
    (["hf:BOOK", "--text", "BOOK"], "there is no folder"),
    (["hf:GPT2"], "needs a text to be measured on: pass --text FILE"),
    (["hf:GPT2", "--text", "nosuch.txt"], "cannot read the text nosuch.txt: No such file"),
    (["hf:GPT2", "--text", "binary"], "binary is not a text in UTF-8"),
    (["hf:GPT2", "--text", "blank"], "the text blank is empty"),
    (["hf:GPT2", "--text", "BOOK", "--dtype", "int32"], "--dtype int32 is no floating-point dtype"),
    (["hf:GPT2", "--text", "BOOK", "--dtype", "double precision"], "is no floating-point dtype"),
    (["hf:GPT2", "--text", "BOOK", "--context", "99"], "--context 99 is more than the 24 tokens"),
    (["hf:GPT2", "--text", "BOOK", "--context", "1"], "--context must be more than 1"),
    (["hf:GPT2", "--text", "BOOK", "--tokens", "50"], "is too short: 50 tokens make 3 windows"),
    (["hf:GPT2", "--text", "BOOK", "--batch-size", "0"], "--batch-size must be at least 1"),
    (["mine:objective", "--text", "BOOK"], "--text is for hf: models"),
    (["mine:objective", "--batch-size", "3"], "--batch-size is for hf: models")])
def test_wrong_calls_are_refused_in_one_line(folders, tmp_path, capfd, args, words):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "blank").write_text(" \n")
    args = [a.replace("BOOK", str(folders / "book.txt")).replace("GPT2", str(folders / "gpt2")) for a in args]
    capfd.readouterr()
    assert run(*args, "--out", "r") == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "r").exists()


def test_without_transformers_it_says_what_to_install(folders, monkeypatch, capfd):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert run(f"hf:{folders / 'gpt2'}", "--text", folders / "book.txt", "--out", "r") == 2
    error = capfd.readouterr().err
    assert "pip install 'flatmin[transformers]'" in error and error.count("\n") == 1


def test_eigenvectors_are_saved_by_the_names_of_the_parameters(folders, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    assert run(f"hf:{folders / 'gpt2'}", "--text", folders / "book.txt", "--context", 12, "--tokens", 100, "--k", 2,
               "--metrics", "spectrum", "--dtype", "float64", "--eigenvectors", "--out", "r") == 0
    found = load_file(tmp_path / "r" / "eigenvectors.safetensors")
    model = model_of("gpt2")
    assert {n: t.shape[1:] for n, t in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    objective = language_objective(f"hf:{folders / 'gpt2'}", TextSettings(
        str(folders / "book.txt"), 12, None, 100, "float64"), CPU).objective
    H, record = Hessian(objective), record_of(tmp_path / "r")
    values = record["results"]["spectrum"]["eigenvalues"]
    assert record["results"]["spectrum"]["eigenvectors"] == "eigenvectors.safetensors"
    for i, value in enumerate(values):
        v = torch.cat([found[n][i].flatten() for n in H.names])
        assert float(v.norm()) == pytest.approx(1) and float((H.matvec(v) - value * v).norm()) < 2e-3 * values[-1]
    with safe_open(tmp_path / "r" / "eigenvectors.safetensors", "pt") as file:
        assert json.loads(file.metadata()["eigenvalues"]) == values


def test_a_plan_names_every_measure_and_writes_nothing(folders, tmp_path, capsys):
    assert run(f"hf:{folders / 'gpt2'}", "--text", folders / "book.txt", "--context", 12, "--tokens", 100,
               "--metrics", "all", "--plan") == 0
    shown = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    for name in METRICS:
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert METRICS[name].cost in line and re.search(r" s |\d:\d\d ", line) and "iB" in line
    assert "3,400 parameters" in shown and "nan" not in shown


def test_the_type_of_settings_is_checked():
    with pytest.raises(ValueError, match="eigenvectors must be true or false"):
        MeasureSettings("a:b", eigenvectors=1)      # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="needs spectrum among"):
        MeasureSettings("a:b", metrics="trace", eigenvectors=True)
