"""How good samples of digits are, by judges that never saw the model: a classifier of the real digits, and their spread.

Needs NumPy and scikit-learn alone. Samples are (N, 64) or (N, 1, 8, 8) in [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.svm import SVC


@dataclass(frozen=True)
class Judge:
    """A support vector machine fitted on the first half of the real digits, 0..16, and what the real digits are like."""

    classifier: SVC
    held_out_accuracy: float
    """On the second half of the real digits, which other people wrote."""
    real_spread: np.ndarray
    """(10,): see ``spread``."""


@dataclass(frozen=True)
class Quality:
    """What the judge says of samples."""

    accuracy: float
    by_class: np.ndarray
    """(10,): part of the samples of each class that the classifier recognises."""
    spread_ratio: float
    """Mean over the classes of the samples' spread in units of the real digits'."""
    spread_by_class: np.ndarray
    """(10,)"""

    def __str__(self) -> str:
        low, high = self.spread_by_class.min(), self.spread_by_class.max()
        worst = f"worst class {100 * self.by_class.min():.0f} %"
        return f"recognised {100 * self.accuracy:.1f} % ({worst}), spread {self.spread_ratio:.3f} ({low:.2f} .. {high:.2f})"


def make_judge() -> Judge:
    """The judge; the same every time."""
    x, labels = load_digits(return_X_y=True)
    half = len(x) // 2
    classifier = SVC(gamma=0.001).fit(x[:half], labels[:half])
    return Judge(classifier, classifier.score(x[half:], labels[half:]), spread(x / 8 - 1, labels))


def spread(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Root mean squared distance of the samples (N, 64) of each class to their mean, (10,)."""
    classes = [x[labels == label] for label in range(10)]
    return np.array([np.sqrt(((c - c.mean(axis=0)) ** 2).sum(axis=1).mean()) for c in classes])


def judge(samples: np.ndarray, labels: np.ndarray, by: Judge) -> Quality:
    """The quality of samples in [-1, 1], which are clipped to it; every label has to be among ``labels`` (N,)."""
    x = np.clip(np.asarray(samples, np.float64).reshape(len(labels), 64), -1, 1)
    assert set(np.unique(labels)) == set(range(10))
    right = by.classifier.predict((x + 1) * 8) == labels
    ratios = spread(x, np.asarray(labels)) / by.real_spread
    by_class = np.array([right[labels == label].mean() for label in range(10)])
    return Quality(float(right.mean()), by_class, float(ratios.mean()), ratios)
