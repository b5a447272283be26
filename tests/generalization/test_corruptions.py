"""Corruptions against closed forms, SciPy, Pillow and the severities of the published scripts."""

import math

import pytest
import torch

from flatmin.generalization import robustness
from flatmin.generalization.corruptions import SEVERITIES, corrupt


def images(n=4, size=16, channels=3):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SEVERITIES)
def test_every_corruption_is_deterministic_and_keeps_shape_and_range(name):
    x = images()
    before = x.clone()
    state = torch.get_rng_state()
    for shape in (x, x[0], x.view(2, 2, 3, 16, 16), x.float()):
        out = corrupt(shape, name, 3)
        assert out.shape == shape.shape and out.dtype == shape.dtype and 0 <= out.min() and out.max() <= 1
        assert torch.equal(out, corrupt(shape, name, 3))
    assert torch.equal(x, before) and torch.equal(state, torch.get_rng_state())
    assert corrupt(x[:0], name).shape == (0, 3, 16, 16) if name != "jpeg_compression" else True


@pytest.mark.parametrize("name", SEVERITIES)
@pytest.mark.parametrize("size, scale", [(32, "cifar"), (64, "imagenet")])
def test_severity_grows(name, size, scale):
    x = torch.nn.functional.interpolate(images(4, 8), size=(size, size), mode="bilinear")
    far = [float((corrupt(x, name, s) - x).square().mean()) for s in range(1, 6)]
    assert far[4] > far[0], far
    if (name, scale) != ("pixelate", "cifar"):      # published sides of 30, 28, 27, 24, 20: not in order
        assert far == sorted(far), far
    assert torch.equal(corrupt(x, name, 2), corrupt(x, name, 2, scale=scale))


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise"])
def test_noise_follows_the_seed(name):
    x = images()
    assert not torch.equal(corrupt(x, name, seed=1), corrupt(x, name, seed=2))


def test_noise_has_the_moments_it_says():
    x = torch.full((20, 3, 32, 32), 0.5)
    assert float((corrupt(x, "gaussian_noise", 3) - x).std()) == pytest.approx(0.08, rel=0.02)
    assert float((corrupt(x, "shot_noise", 3) - x).std()) == pytest.approx(math.sqrt(0.5 / 100), rel=0.02)
    hit = corrupt(x, "impulse_noise", 5) - x
    assert float((hit != 0).double().mean()) == pytest.approx(0.07, rel=0.05)
    assert float((hit > 0).sum() / (hit != 0).sum()) == pytest.approx(0.5, abs=0.02)


def test_gaussian_blur_equals_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images(2)
    for severity, sigma in enumerate((0.4, 0.6, 0.7, 0.8, 1.0), 1):
        theirs = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4.0)
        assert torch.allclose(corrupt(x, "gaussian_blur", severity), torch.from_numpy(theirs), atol=1e-12)


def test_defocus_keeps_a_flat_image_and_spreads_a_point():
    flat = torch.full((1, 1, 32, 32), 0.3)
    point = torch.zeros(1, 1, 31, 31)
    point[0, 0, 15, 15] = 1
    for severity in range(1, 6):
        assert torch.allclose(corrupt(flat, "defocus_blur", severity), flat)
        spread = corrupt(point, "defocus_blur", severity)[0, 0]
        assert float(spread.sum()) == pytest.approx(1) and torch.allclose(spread, spread.T)
        assert torch.allclose(spread, spread.flip(0))


def test_brightness_adds_to_the_value_of_hsv():
    import colorsys

    x = images(1, 4)
    out = corrupt(x, "brightness", 3)
    for before, after in zip(x[0].flatten(1).T.tolist(), out[0].flatten(1).T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb(h, s, min(v + 0.15, 1)), abs=1e-9)
    assert torch.allclose(corrupt(torch.zeros(1, 3, 4, 4), "brightness", 3), torch.tensor(0.15))


def test_contrast_keeps_the_mean_of_each_channel():
    x = images() * 0.2 + 0.4
    out = corrupt(x, "contrast", 5)
    assert torch.allclose(out.mean((-2, -1)), x.mean((-2, -1)))
    assert torch.allclose(out.std((-2, -1)), 0.15 * x.std((-2, -1)))


@pytest.mark.parametrize("size", [28, 32, 64])
def test_pixelate_and_jpeg_equal_pillow(size):
    Image = pytest.importorskip("PIL.Image")
    import io

    x = (images(2, size) * 255).round() / 255
    for severity in range(1, 6):
        sides = SEVERITIES["pixelate"][size >= 64]
        quality = SEVERITIES["jpeg_compression"][size >= 64][severity - 1]
        ours, coded = corrupt(x, "pixelate", severity), corrupt(x, "jpeg_compression", severity)
        for image, out, code in zip(x, ours, coded, strict=True):
            picture = Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())
            m = int(size * sides[severity - 1])
            theirs = picture.resize((m, m), Image.BOX).resize((size, size), Image.BOX)
            theirs = torch.tensor(list(theirs.tobytes())).view(size, size, 3).movedim(-1, 0) / 255
            assert float((out - theirs).abs().max()) <= 2.01 / 255      # Pillow rounds to bytes after each pass
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            theirs = torch.tensor(list(Image.open(file).tobytes())).view(size, size, 3).movedim(-1, 0) / 255
            assert torch.allclose(code, theirs, atol=1e-9)


def test_half_precision_and_grey_images():
    x = images(2, 16, 1).to(torch.bfloat16)
    for name in SEVERITIES:
        out = corrupt(x, name)
        assert out.dtype == torch.bfloat16 and out.shape == x.shape


def test_it_is_part_of_robustness():
    assert robustness.corrupt is corrupt


@pytest.mark.parametrize("call, message", [
    (lambda x: corrupt(x, "snow"), "unknown corruption 'snow': there are gaussian_noise"),
    (lambda x: corrupt(x, "contrast", 6), "severity must be"), (lambda x: corrupt(x, "contrast", 0), "severity"),
    (lambda x: corrupt(x * 255, "contrast"), "divide bytes by 255"),
    (lambda x: corrupt(x.byte(), "contrast"), "floating-point images"),
    (lambda x: corrupt(x[0, 0], "contrast"), "floating-point images"),
    (lambda x: corrupt(x, "contrast", scale="mnist"), "scale must be"),
    (lambda x: corrupt(x[:, :2], "jpeg_compression"), "1 or 3 channels"),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(images())
