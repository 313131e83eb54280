"""Estimates with standard errors, and the difference of two models on the same documents."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Estimate:
    """A ratio of sums over documents, and how far each document moves it: `shares`, (N,)."""

    value: float
    shares: np.ndarray

    @property
    def error(self) -> float:
        """Return the standard error; NaN for one document, which says nothing about others."""
        n = len(self.shares)
        if n < 2:
            return math.nan
        return math.sqrt(n / (n - 1) * np.sum(self.shares**2))

    def __str__(self) -> str:
        # one document has no error
        error = f" ± {self.error:.4f}" if len(self.shares) > 1 else ""
        return f"{self.value:.4f}{error}"


def estimate(
    numerators: np.ndarray, denominators: np.ndarray | None = None
) -> Estimate:
    """Return sum(numerators) / sum(denominators), (N,) each: the ratio estimator of survey sampling
    (Cochran 1977, section 6.3), whose errors are those of the residuals. Without denominators it is
    the mean."""
    if denominators is None:
        denominators = np.ones(len(numerators))
    total = denominators.sum()
    value = numerators.sum() / total
    return Estimate(float(value), (numerators - value * denominators) / total)


def subtract(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b for two models on the same documents, in the same order. What makes a document
    hard for both cancels."""
    return Estimate(a.value - b.value, a.shares - b.shares)


def is_decided(difference: Estimate) -> bool:
    """Return True if a difference is larger than two standard errors."""
    return abs(difference.value) > 2 * difference.error
