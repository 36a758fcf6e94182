"""Cost against size: the power law of its upper part, the straight line of all of it, and a table of both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from measuring import print_table

CONSTANT_SHARE = 0.1
FEWEST = 3


@dataclass(frozen=True)
class Fit:
    """cost = constant + slope x size over all sizes, and cost ~ size^exponent over those from `first` on."""

    first: float
    exponent: float
    error: float
    """Standard error of the exponent."""
    constant: float
    slope: float
    slope_error: float


@dataclass(frozen=True)
class Series:
    name: str
    title: str
    of: str
    """What the sizes count."""
    unit: str
    """Of the costs: "s" or "MiB"."""
    sizes: tuple[float, ...]
    costs: tuple[float, ...]
    """Medians, one for each size."""
    fit: Fit | None = None

    @property
    def is_memory(self) -> bool:
        return self.unit == "MiB"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Series:
        fit = None if data["fit"] is None else Fit(**data["fit"])
        return cls(**{**data, "fit": fit, "sizes": tuple(data["sizes"]), "costs": tuple(data["costs"])})


def fitted_time(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """The line by least squares of relative errors, so that each size counts alike; the exponent by least squares of
    log cost on log size over the sizes at which the line's constant is at most CONSTANT_SHARE of the rest, and never
    over fewer than the FEWEST largest.
    """
    n, cost = np.asarray(sizes, float), np.asarray(costs, float)
    (constant, slope), (_, slope_error) = _least_squares(np.stack([1 / cost, n / cost], 1), np.ones(len(n)))
    if constant < 0:
        (slope,), (slope_error,) = _least_squares((n / cost)[:, None], np.ones(len(n)))
        constant = 0.0
    upper = constant <= CONSTANT_SHARE * slope * n
    upper[-FEWEST:] = True
    return _with_exponent(n[upper], cost[upper], constant, slope, slope_error)


def fitted_memory(sizes: Sequence[float], costs: Sequence[float], least_growth: float = 8.0) -> Fit | None:
    """The same of a peak's growth over that of the smallest size; None where fewer than FEWEST sizes grow by so much
    that it is not noise (`least_growth`, MiB).
    """
    n, growth = np.asarray(sizes, float), np.asarray(costs, float) - costs[0]
    upper = growth >= least_growth
    if upper.sum() < FEWEST:
        return None
    (constant, slope), (_, slope_error) = _least_squares(np.stack([np.ones(len(n)), n], 1), np.asarray(costs, float))
    # The smallest size's own share is missing from the growth, so both are counted from there.
    return _with_exponent(n[upper] - n[0], growth[upper], constant, slope, slope_error, first=n[upper][0])


def _with_exponent(
    n: np.ndarray, cost: np.ndarray, constant: float, slope: float, slope_error: float, first: float | None = None
) -> Fit:
    (_, exponent), (_, error) = _least_squares(np.stack([np.ones(len(n)), np.log(n)], 1), np.log(cost))
    return Fit(float(n[0] if first is None else first), exponent, error, constant, slope, slope_error)


def _least_squares(design: np.ndarray, values: np.ndarray) -> tuple[list[float], list[float]]:
    """Coefficients and their standard errors."""
    scale = np.linalg.norm(design, axis=0)  # sizes of 10^6 beside a constant of 1
    scaled = design / scale
    found = np.linalg.lstsq(scaled, values, rcond=None)[0]
    freedom = len(values) - design.shape[1]
    variance = float(((values - scaled @ found) ** 2).sum()) / freedom if freedom > 0 else math.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(scaled.T @ scaled)))
    return [float(value) for value in found / scale], [float(value) for value in errors / scale]


def print_series(series: Series) -> None:
    unit = "MiB" if series.is_memory else "s"
    rows: list[Sequence[object]] = []
    for size, cost in zip(series.sizes, series.costs, strict=True):
        shown = f"{cost:,.0f}" if series.is_memory else f"{cost:.4g}"
        each = f"{cost * 2**20 / size:,.0f} B" if series.is_memory else duration(cost / size)
        rows.append((f"{size:,.0f}", shown, each))
    print_table(series.title, (series.of, unit, "each"), rows)
    print(in_words(series), flush=True)


def in_words(series: Series) -> str:
    fit = series.fit
    if fit is None:
        span = math.log10(series.sizes[-1] / series.sizes[0])
        if series.is_memory:
            return f"Grows by {series.costs[-1] - series.costs[0]:,.0f} MiB over {span:.1f} decades: too little to fit."
        return "Too few sizes to fit."
    law = f"Exponent {fit.exponent:.3f} +- {fit.error:.3f} from {fit.first:,.0f} on"
    if series.is_memory:
        return f"{law} (growth over the smallest); {fit.slope * 2**20:,.1f} B each, {fit.constant:,.0f} MiB at none."
    return f"{law}; {duration(fit.slope)} +- {duration(fit.slope_error)} each after {duration(fit.constant)}."


def duration(seconds: float) -> str:
    """Three digits, in the largest unit of which it is at least 1."""
    units = (("years", 365.25 * 86400), ("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3), ("us", 1e-6))
    for name, unit in units:
        if seconds >= unit:
            return f"{three_digits(seconds / unit)} {name}"
    return f"{three_digits(seconds * 1e9)} ns"


def three_digits(value: float) -> str:
    if value >= 1e6:
        exponent = math.floor(math.log10(float(f"{value:.1e}")))
        return f"{value / 10**exponent:.1f} x 10^{exponent}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
