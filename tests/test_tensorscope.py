"""The code blocks of the TensorScope document, with only the import line changed, on language and vision models."""

import json
import math
import warnings

import pytest
import torch
from torch import nn

from flatmin import Objective
from flatmin.curvature import Hessian
from flatmin.sharpness import average_case, largest_random, m_sharpness, one_step, worst_case
from flatmin.sharpness.cautions import DisagreementWarning
from flatmin.tensorscope import (
    ICLRMetrics,
    ModularityMetrics,
    UnifiedModelAnalysis,
    compare_model_sharpness,
    compute_sam_sharpness,
    objective_for,
)
from problems import batch as pair
from problems import flat

pytestmark = pytest.mark.filterwarnings("ignore::flatmin.sharpness.SharpnessWarning")
EPSILON = 0.01


def gpt2(seed=0):
    import transformers
    torch.manual_seed(seed)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=17, n_positions=12)
    return transformers.GPT2LMHeadModel(config)


def tokens(n=8, padding="right"):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(17, (n, 10), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(n // 2):
        mask[row, slice(10 - row - 1, None) if padding == "right" else slice(None, row + 1)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def vision(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))


CASES = {"language": (gpt2, tokens), "vision": (vision, lambda: pair(0, 16))}


@pytest.mark.parametrize("kind", CASES)
def test_the_block_api_reference(kind):
    make, data = CASES[kind]
    model, batch = make(), data()
    before = flat(model)
    # --- the TensorScope document, "API Reference"; the import line is at the top of this file
    metrics = ModularityMetrics()

    # Basic usage (sanity check against Hessian)
    sam_sharpness = metrics.compute_sam_sharpness(
        model=model,
        batch=batch,
        epsilon=0.01  # Perturbation radius
    )
    fixed = sam_sharpness

    # With adaptive epsilon (recommended)
    sam_sharpness = metrics.compute_sam_sharpness(
        model=model,
        batch=batch,
        epsilon=0.01,
        adaptive_epsilon=True  # Scales with model size
    )
    # ---
    assert type(fixed) is float and type(sam_sharpness) is float and 0 < sam_sharpness < fixed
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", CASES)
def test_the_block_recommended_alternative(kind, capsys):
    make, data = CASES[kind]
    model, batch = make(), data()
    # --- the TensorScope document, "Recommended Alternative"
    metrics = ICLRMetrics()

    # Superior alternative - analyzes all directions
    hessian = metrics.compute_hessian_eigenvalues_lanczos(
        model=model,
        batch=batch,
        k=20  # Top 20 eigenvalues
    )

    # Rich information about loss landscape
    print(f"Max eigenvalue (sharpness): {hessian['max_eigenvalue']}")
    print(f"Eigenvalue spectrum: {hessian['top_eigenvalues']}")
    print(f"Condition number: {hessian['condition_number']}")
    print(f"Trace (average curvature): {hessian['trace']}")

    # Sanity check with SAM
    sam = metrics.compute_sam_sharpness(model, batch)
    print(f"SAM sharpness: {sam}")
    # ---
    dense = Hessian(objective_for(model, batch)).dense()
    values = torch.linalg.eigvalsh(dense).flip(0)
    assert len(hessian["top_eigenvalues"]) == 20 and all(hessian["converged"])
    torch.testing.assert_close(torch.tensor(hessian["top_eigenvalues"]), values[:20], rtol=0,
                               atol=1e-4 * float(values[0]))
    assert abs(hessian["trace"] - float(dense.trace())) < 4 * hessian["trace_stderr"] + 1e-9
    assert math.isnan(hessian["condition_number"]) and hessian["condition_number_reason"]
    assert all(type(hessian[key]) is float for key in ("max_eigenvalue", "trace", "condition_number"))
    assert "Max eigenvalue" in capsys.readouterr().out


@pytest.mark.parametrize("kind", CASES)
def test_the_block_integration(kind):
    import numpy as np
    make, data = CASES[kind]
    model, dataloader, epsilon = make(), [data(), data()], EPSILON
    # --- the TensorScope document, "Integration with TensorScope Pipeline"
    analyzer = UnifiedModelAnalysis()

    # Run comprehensive analysis
    results = analyzer.analyze_model(
        model=model,
        data=dataloader,
        config={
            'metrics': ['sharpness'],
            'sharpness_methods': ['hessian', 'sam'],  # Both for comparison
            'use_sam_as_sanity_check': True
        }
    )

    # Results include both metrics
    hessian_sharpness = results['hessian_eigenvalues']['max_eigenvalue']
    sam_sharpness = results['sam_sharpness']

    # Automatic sanity check
    if abs(np.log10(hessian_sharpness) - np.log10(sam_sharpness/epsilon**2)) > 1:
        print("Warning: SAM and Hessian sharpness diverge significantly")
    # ---
    assert sam_sharpness == pytest.approx(one_step(objective_for(model, data()), EPSILON).value)
    assert results["sanity_check"]["third_order"] and "agree" in results["sanity_check"]["sentence"]


@pytest.mark.parametrize("kind", CASES)
def test_the_block_model_comparison(kind):
    make, data = CASES[kind]
    results = compare_model_sharpness(make(0), make(1), [data()])
    assert set(results) >= {"sharper_model", "hessian_confirms", "sam_ratio", "eigenvalue_ratio"}
    assert results["sharper_model"] == ("A" if results["sam_ratio"] > 1 else "B")
    assert results["hessian_confirms"] == ((results["sam_ratio"] > 1) == (results["eigenvalue_ratio"] > 1))
    same = compare_model_sharpness(make(0), make(0), [data()])
    assert same["sharper_model"] == "neither" and same["sam_ratio"] == 1 and same["same_scale"]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_labels_are_the_shifted_inputs_without_padding(padding):
    model, batch = gpt2(), tokens(padding=padding)
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits
    mask = batch["attention_mask"].bool()
    keep = mask[:, 1:] & mask[:, :-1]
    expected = nn.functional.cross_entropy(logits[:, :-1][keep], batch["input_ids"][:, 1:][keep])
    # transformers takes its losses in float32
    assert float(objective_for(model, batch).value()) == pytest.approx(float(expected), rel=1e-6)
    assert float(objective_for(model, [batch, batch]).value()) == pytest.approx(float(expected), rel=1e-6)


def test_a_language_model_that_returns_logits_and_given_labels():
    model, batch = nn.Sequential(nn.Embedding(17, 5), nn.Linear(5, 17)), tokens()
    keep = batch["attention_mask"].bool()[:, 1:]
    z = model(batch["input_ids"])[:, :-1][keep]
    expected = nn.functional.cross_entropy(z, batch["input_ids"][:, 1:][keep]).item()
    assert float(objective_for(model, batch).value()) == pytest.approx(expected)
    labels = torch.full_like(batch["input_ids"], 3)
    assert float(objective_for(gpt2(), batch | {"labels": labels}).value()) == pytest.approx(
        float(Objective(gpt2(), None, batch | {"labels": labels}).value()))


def test_mappings_of_images_and_regression():
    x, y = pair(0, 16)
    assert compute_sam_sharpness(vision(), {"images": x, "label": y}) == compute_sam_sharpness(vision(), (x, y))
    assert compute_sam_sharpness(nn.Linear(6, 1), (x, torch.ones(16, 1))) > 0


def test_bad_batches_and_names_list_the_choices():
    x, y = pair(0)
    with pytest.raises(ValueError, match="input_ids, inputs, pixel_values"):
        compute_sam_sharpness(vision(), {"pictures": x})
    with pytest.raises(ValueError, match="labels, targets"):
        compute_sam_sharpness(vision(), {"images": x})
    with pytest.raises(ValueError, match="pair"):
        compute_sam_sharpness(vision(), x)
    for config, choices in (({"metrics": ["flatness"]}, "sharpness, loss, gradient_norm"),
                            ({"sharpness_methods": ["sma"]}, "hessian, sam"), ({"metric": ["loss"]}, "max_batches")):
        with pytest.raises(ValueError, match=choices):
            UnifiedModelAnalysis().analyze_model(vision(), (x, y), config)


def test_every_metric_and_method_gives_plain_numbers():
    from flatmin.tensorscope import METRICS, SHARPNESS_METHODS

    config = {"metrics": METRICS, "sharpness_methods": SHARPNESS_METHODS, "k": 2, "max_batches": 1, "epsilon": 0.05}
    results = UnifiedModelAnalysis().analyze_model(vision(), [pair(0, 16), pair(1, 16)], config)
    assert {type(v) for v in results.values()} == {float, dict} and len(results) == 15
    assert all(type(results[key]) is float for key in ("m_sharpness", "largest_random", "adaptive_sharpness", "trace"))
    assert len(results["density"]["x"]) == len(results["density"]["density"]) > 10
    assert len(results["surface"]["values"]) == len(results["surface"]["x"]) == 51
    json.dumps(results)


def test_the_methods_are_the_measures_themselves():
    names = ("m_sharpness", "largest_random", "worst_case", "adaptive", "average_case")
    results = UnifiedModelAnalysis().analyze_model(vision(), pair(0, 16), {"sharpness_methods": names, "epsilon": 0.05})
    o = Objective(vision(), nn.CrossEntropyLoss(), pair(0, 16))
    assert results == {
        "m_sharpness": float(m_sharpness(o, 4, 0.05, iterations=10, restarts=0)),
        "largest_random": float(largest_random(o, 0.05)), "worst_case_sharpness": float(worst_case(o, 0.05)),
        "adaptive_sharpness": float(worst_case(o, 0.05, adaptive="element")),
        "average_case_sharpness": float(average_case(o, 0.05))}


def test_a_failed_sanity_check_warns():
    """A kink within the radius: the loss is not its second-order expansion there."""
    config = {"sharpness_methods": ["sam"], "use_sam_as_sanity_check": True, "epsilon": 0.1}
    model, x = nn.Linear(1, 1, bias=False), torch.ones(8, 1)
    with torch.no_grad():
        model.weight.fill_(-0.03)

    def kinked(z, y):
        return (torch.relu(z) * 5 + z + z.square()).mean()

    with pytest.warns(DisagreementWarning, match="SAM and Hessian sharpness diverge: One-step"):
        found = UnifiedModelAnalysis().analyze_model(model, (x, x), {**config, "loss_fn": kinked})
    assert found["sanity_check"]["third_order"] is False
    with warnings.catch_warnings():
        warnings.simplefilter("error", DisagreementWarning)
        UnifiedModelAnalysis().analyze_model(vision(), pair(0, 16), config)


def test_models_ordered_differently_by_the_two_measures_warn():
    """L = c w + ½ h w² at 0: the gradient decides one, the curvature the other."""
    def model(c, h):
        net = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            net.weight.zero_()
        net.c, net.h = c, h
        net.forward = lambda x: torch.stack([c * net.weight[0, 0] + h * net.weight[0, 0] ** 2 / 2] * len(x))
        return net

    data, loss = [(torch.ones(8, 1), torch.zeros(8))], lambda z, y: z.mean()
    with pytest.warns(DisagreementWarning, match="disagree on relative sharpness"):
        found = compare_model_sharpness(model(2.0, 1.0), model(1.0, 5.0), data, loss_fn=loss)
    assert found["sharper_model"] == "A" and not found["hessian_confirms"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", DisagreementWarning)
        assert compare_model_sharpness(model(2.0, 5.0), model(1.0, 1.0), data, loss_fn=loss)["hessian_confirms"]


def test_small_batches_are_warned_about():
    x, y = pair(0, 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compute_sam_sharpness(vision(), (x, y))
    assert "SmallBatchWarning" in {w.category.__name__ for w in seen}
