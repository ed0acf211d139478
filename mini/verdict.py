"""What several seeds of several arms say: paired differences, their intervals, and what can be concluded.

Two arms with the same seed see the same examples and begin with the same weights, so that the difference of their
figures is freed of what both have in common. Student's t-test over these differences assumes that they are independent
and near to normally distributed; with few seeds that cannot be checked, and an interval is as honest as that.
"""

import functools
import math
from dataclasses import dataclass
from statistics import NormalDist

ALPHA = 0.05  # how often a verdict may be wrong where there is no difference, over all arms together
POWER = 0.8  # how often a difference as large as the one seen should be found with the seeds that are asked for
MANY = 200  # seeds from which on Student's t is as good as normal


@dataclass
class Comparison:
    """An arm against the baseline, by the differences arm - baseline of the seeds that both have."""

    difference: float  # their mean
    low: float  # the interval for the true one: 95 %, or more where several arms are compared (Holm 1979)
    high: float
    level: float  # of that interval
    p: float  # two-sided; as it is, for this comparison alone
    n: int  # seeds
    verdict: str


def t_tail(t: float, df: int) -> float:
    """P(T > t) of Student's t with df degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan2(abs(t), math.sqrt(df))
    cos, sin = math.cos(angle), math.sin(angle)
    term, total = (1.0, 1.0) if df % 2 == 0 else (cos, cos if df > 1 else 0.0)
    for k in range(2 + df % 2, df, 2):
        term *= cos * cos * (k - 1) / k
        total += term
    inside = sin * total if df % 2 == 0 else 2 / math.pi * (angle + sin * total)  # P(|T| < |t|)
    return (1 - inside) / 2 if t >= 0 else (1 + inside) / 2


@functools.cache
def t_quantile(share: float, df: int) -> float:
    """The t below which T is with this probability, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - t_tail(middle, df) < share else (low, middle)
    return (low + high) / 2


def mean_sd(values: list[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of the population that n values are drawn from (0 for one value)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def seeds_needed(effect: float, level: float) -> int:
    """How many pairs find a difference of so many standard deviations with probability POWER.

    The smallest n with effect √n >= t(level) + t(POWER), which is within a seed or two of the noncentral t.
    """
    normal = NormalDist()
    n = max(2, int(((normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(POWER)) / effect) ** 2))  # t is wider than z
    while n < MANY and effect * math.sqrt(n) < t_quantile((1 + level) / 2, n - 1) + t_quantile(POWER, n - 1):
        n += 1
    return n


def compare(differences: dict[str, list[float]], better: str) -> dict[str, Comparison]:
    """For each arm the verdict on its differences to the baseline, of the same seeds; better: "lower" or "higher".

    Over k arms Holm's steps: the smallest p is held against ALPHA / k, the next against ALPHA / (k - 1), and from the
    first that fails on, nothing is shown. Each interval is that of its step, so it holds 0 where nothing is shown.
    An arm with fewer than two differences gets none.
    """
    tested = {}
    for name, values in differences.items():
        if len(values) > 1:
            mean, sd = mean_sd(values)
            t = mean / (sd / math.sqrt(len(values))) if sd else math.copysign(math.inf, mean) if mean else 0.0
            tested[name] = (2 * t_tail(abs(t), len(values) - 1) if math.isfinite(t) else 0.0, mean, sd)
    found, level, failed = {}, 0.0, False
    for i, (name, (p, mean, sd)) in enumerate(sorted(tested.items(), key=lambda item: item[1][0])):
        level = level if failed else 1 - ALPHA / (len(tested) - i)
        failed = failed or p >= 1 - level
        n = len(differences[name])
        half = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
        if not failed:
            verdict = "better" if (mean < 0) == (better == "lower") else "worse"
        elif not mean:
            verdict = "no difference shown"
        else:
            verdict = f"no difference shown (needs about {seeds_needed(abs(mean) / sd, level):,} seeds)"
        found[name] = Comparison(mean, mean - half, mean + half, level, p, n, verdict)
    return found
