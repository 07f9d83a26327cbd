"""The paired bootstrap interval: centred where it should be, 0 for equals, narrower for pairing."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("transformers", reason="needs the extra [hf]")

from alpkd_fast.cli.sweep_report import paired_interval  # noqa: E402


def accuracy(predicted, truth):
    return float((predicted == truth).mean())


def noisy(labels, share, seed):
    generator = np.random.default_rng(seed)
    return np.stack([np.where(generator.random(len(labels)) < share, 1 - labels, labels) for _ in range(3)])


LABELS = np.random.default_rng(1).integers(2, size=600)


def test_equal_methods_differ_by_nothing():
    ours = noisy(LABELS, 0.2, 2)
    assert paired_interval(accuracy, ours, ours, LABELS, 200) == (0.0, 0.0)


def test_a_clear_gain_excludes_zero_and_holds_the_difference():
    ours, theirs = noisy(LABELS, 0.1, 2), noisy(LABELS, 0.3, 3)
    low, high = paired_interval(accuracy, ours, theirs, LABELS, 400)
    assert 0 < low < accuracy(ours, LABELS) - accuracy(theirs, LABELS) < high
    # the standard error of the difference of two means of 600 independent rows and 3 seeds
    error = np.sqrt((0.1 * 0.9 + 0.3 * 0.7) / 1800)
    assert 2 * error < high - low < 9 * error


def test_noise_includes_zero():
    low, high = paired_interval(accuracy, noisy(LABELS, 0.2, 2), noisy(LABELS, 0.2, 3), LABELS, 400)
    assert low < 0 < high
