"""The statistics of ablations: against tables, and by simulation how often they cry wolf and how often they see."""

import math

import numpy as np
import pytest

from mini.verdict import compare, mean_sd, seeds_needed, t_quantile, t_tail


@pytest.mark.parametrize(
    "df, share, t",  # the columns of any table of Student's distribution
    [(1, 0.975, 12.706), (2, 0.975, 4.303), (3, 0.95, 2.353), (4, 0.975, 2.776), (5, 0.995, 4.032), (9, 0.975, 2.262),
     (10, 0.9, 1.372), (30, 0.975, 2.042), (120, 0.975, 1.980)],
)  # fmt: skip
def test_student(df, share, t):
    assert t_quantile(share, df) == pytest.approx(t, abs=6e-4)
    assert t_tail(t, df) == pytest.approx(1 - share, abs=1e-4)
    assert t_tail(-t, df) == pytest.approx(share, abs=1e-4) and t_tail(0, df) == 0.5


def test_an_interval_by_hand():
    """Differences -1, -2, -3: mean -2, sd 1, so -2 ± 4.303 / √3."""
    found = compare({"b": [-1.0, -2.0, -3.0]}, "lower")["b"]
    assert (found.difference, found.n, found.level) == (-2, 3, 0.95)
    assert (found.low, found.high) == pytest.approx((-2 - 2.4843, -2 + 2.4843), abs=1e-3)
    assert found.p == pytest.approx(0.0742, abs=1e-4)
    assert found.verdict == f"no difference shown (needs about {seeds_needed(2, 0.95)} seeds)"
    assert mean_sd([1.0, 2.0, 3.0]) == (2, 1) and mean_sd([5.0]) == (5, 0)


def test_better_is_what_the_spec_says():
    differences = [-1.0, -1.1, -0.9, -1.0]
    assert compare({"b": differences}, "lower")["b"].verdict == "better"
    assert compare({"b": differences}, "higher")["b"].verdict == "worse"
    same = compare({"b": [0.0, 0.0, 0.0]}, "lower")["b"]
    assert same.verdict == "no difference shown" and (same.low, same.high, same.p) == (0, 0, 1)
    assert compare({"b": [0.5, 0.5]}, "higher")["b"].verdict == "better"  # always the same difference
    assert compare({"b": [0.5]}, "lower") == {} == compare({"b": []}, "lower")  # one seed tells nothing


def test_holm_by_hand():
    """Three arms: the smallest p has to be below 0.05 / 3, the next below 0.05 / 2; after a failure nothing counts."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=6)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # mean 0 and sd 1
    arms = {name: list(noise + t / math.sqrt(6)) for name, t in (("a", 6.0), ("b", 3.0), ("c", 2.9))}
    found = compare(arms, "higher")  # t = 6.0, 3.0 and 2.9 with 5 degrees of freedom: p = 0.0018, 0.0301, 0.0338
    assert [round(found[name].p, 4) for name in "abc"] == [0.0018, 0.0301, 0.0338]
    assert [round(found[name].level, 4) for name in "abc"] == [0.9833, 0.975, 0.975]
    assert found["a"].verdict == "better" and found["a"].low > 0
    for name in "bc":  # each alone would be significant
        assert found[name].verdict.startswith("no difference") and found[name].low < 0 < found[name].high
        assert compare({name: arms[name]}, "higher")[name].verdict == "better"


def share_found(effect: float, n: int, trials: int, arms: int = 1) -> float:
    """How often something is concluded, of arms whose differences have a mean of `effect` standard deviations."""
    rng = np.random.default_rng(1)
    drawn = rng.normal(effect, 1.0, (trials, arms, n)).tolist()
    return np.mean(
        [any("no" not in c.verdict for c in compare(dict(enumerate(sets)), "lower").values()) for sets in drawn]
    )


@pytest.mark.parametrize("arms, n", [(1, 3), (1, 5), (4, 5)])
def test_they_seldom_cry_wolf(arms, n):
    assert 0.035 < share_found(0.0, n, 2000, arms) <= 0.06


def test_power():
    """Of the noncentral t-distribution (Cohen 1988, table 2.3): n = 5 and 1.8 sd, n = 10 and 1 sd, n = 20 and 0.66."""
    for n, effect in ((5, 1.8), (10, 1.0), (20, 0.66)):
        assert share_found(effect, n, 1000) == pytest.approx(0.80, abs=0.05)


@pytest.mark.parametrize("effect", [0.5, 1.0, 2.0])
def test_the_seeds_that_it_asks_for_suffice(effect):
    assert 0.72 < share_found(effect, seeds_needed(effect, 0.95), 1000) < 0.95
    assert 7_840_000 < seeds_needed(0.001, 0.95) < 7_860_000  # (2.80 / 0.001)²
