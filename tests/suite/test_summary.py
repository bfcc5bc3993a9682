import math

import numpy as np
import pytest

from relic.suite.summary import bootstrap, differences, machine, summarise


def test_the_interval_is_that_of_resampled_means():
    values = np.random.default_rng(0).normal(20, 3, 60)
    found = bootstrap(values.tolist())
    draws = np.random.default_rng(1).choice(values, (20000, 60)).mean(1)
    assert found.mean == pytest.approx(values.mean()) and found.cases == 60
    assert found.low == pytest.approx(np.quantile(draws, 0.025), abs=0.08)
    assert found.high == pytest.approx(np.quantile(draws, 0.975), abs=0.08)
    assert found == bootstrap(values.tolist()), "the same each time"


def test_cases_of_one_scene_are_drawn_together():
    draw = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        scenes = np.repeat(draw.normal(0, 3, 12), 10)  # what is hard there is hard for all of its cases
        values = scenes + draw.normal(0, 1, 120)
        places = [str(i // 10) for i in range(120)]
        found = bootstrap(values.tolist(), places=places, seed=trial)
        covered += found.low <= 0 <= found.high
        alone = bootstrap(values.tolist(), seed=trial)
        assert found.mean == pytest.approx(alone.mean) and found.high - found.low > alone.high - alone.low
    assert covered >= 48, "of 60, nominal 57"
    assert bootstrap([1.0, 2.0], places=["one", "one"]) == (1.5, 1.5, 1.5, 2)


def test_what_was_not_measured_is_left_out_and_counted():
    assert bootstrap([1.0, math.nan, 3.0]).cases == 2 and bootstrap([1.0, math.nan, 3.0]).mean == 2.0
    assert bootstrap([5.0]) == (5.0, 5.0, 5.0, 1)
    empty = bootstrap([math.nan])
    assert empty.cases == 0 and math.isnan(empty.mean)


def test_cases_are_summarised_by_group_and_length_and_counts_are_summed():
    rows = [
        {"case": "a", "group": "pan", "seconds": 5.0, "scores": {"drift/colour": 1.0, "memory/pairs": 3.0}},
        {"case": "b", "group": "pan", "seconds": 10.0, "scores": {"drift/colour": 3.0, "memory/pairs": 4.0}},
        {"case": "c", "group": "loop", "seconds": 5.0, "scores": {"drift/colour": None, "memory/pairs": 0.0}},
    ]
    found = summarise(rows)
    assert set(found) == {"all", "group: pan", "group: loop", "seconds: 5", "seconds: 10"}
    assert found["all"]["drift/colour"]["mean"] == 2.0 and found["all"]["drift/colour"]["cases"] == 2
    assert found["all"]["memory/pairs"] == {"sum": 7} and found["seconds: 5"]["memory/pairs"] == {"sum": 3}
    assert found["group: loop"]["drift/colour"]["cases"] == 0


def test_a_figure_names_what_it_was_made_on():
    made = machine("cpu")
    assert made["device"] == "cpu" and made["versions"]["torch"] and made["cores"] >= 1
    assert made["commit"] is None or made["commit"].removesuffix("-dirty").isalnum()


def test_contestants_are_compared_case_by_case():
    rng = np.random.default_rng(0)
    hard = rng.normal(20, 5, 40)  # how hard a case is for both
    base = [{"case": str(i), "scores": {"memory/psnr_lcm": h}} for i, h in enumerate(hard)]
    better = [
        {"case": str(i), "scores": {"memory/psnr_lcm": h + 0.5 + 0.1 * (i % 3)}} for i, h in enumerate(hard)
    ]
    better += [{"case": "alone", "scores": {"memory/psnr_lcm": 99.0}}]
    better[0]["scores"]["memory/psnr_lcm"] = None
    found = differences(better, base)["memory/psnr_lcm"]
    assert found["cases"] == 39 and 0.5 < found["low"] < found["mean"] < found["high"] < 0.7
