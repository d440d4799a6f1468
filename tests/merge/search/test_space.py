"""Ranges as they are typed, and the points in them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from peru_cli.errors import UsageError
from peru_cli.merge.search.objective import split
from peru_cli.merge.search.space import decimal, dimension, parse_ranges


def test_a_range_without_a_step_has_at_least_a_thousand_steps_of_a_power_of_ten() -> None:
    for text, step in (("x=0:1", "0.001"), ("x=0.2:1.5", "0.001"), ("x=5%:50%", "0.0001"), ("x=0:2000", "1"), ("x=0:1e-5", "1e-8")):
        (one,) = parse_ranges(text, True)
        made = dimension(one, Fraction(0), float)
        assert made.step == Fraction(step) and made.low == one.low and made.high == one.high


def test_the_last_point_is_at_most_the_end() -> None:
    (one,) = parse_ranges("x=0:1:0.3", True)
    made = dimension(one, Fraction(7), float)
    assert made.points() == [0, Fraction(3, 10), Fraction(3, 5), Fraction(9, 10)] and made.start == Fraction(9, 10)
    assert [made.nearest(Fraction(n)) for n in ("-1", "0.14", "0.16", "5")] == [0, 0, Fraction(3, 10), Fraction(9, 10)]


def test_points_are_typed_as_decimals() -> None:
    assert [decimal(Fraction(n)) for n in ("0.3", "-2", "1e-3", "0.0625")] == ["0.3", "-2", "0.001", "0.0625"]


@pytest.mark.parametrize(
    ("text", "trials", "says"),
    [
        ("scale", True, "'scale' is not OPTION=FROM:TO:STEP"),
        ("=0:1", True, "'=0:1' is not OPTION=FROM:TO:STEP"),
        ("", True, "'' is not OPTION=FROM:TO:STEP"),
        ("scale=0:1,", True, "'' is not OPTION=FROM:TO:STEP"),
        ("scale=0:1,scale=0:2", True, "names scale twice"),
        ("scale=0:1:2:3", True, "is not FROM:TO or FROM:TO:STEP"),
        ("scale=0", True, "is not FROM:TO or FROM:TO:STEP"),
        ("scale=a:b", True, "is not FROM:TO or FROM:TO:STEP"),
        ("scale=1:0", True, "has no values"),
        ("scale=1:1", True, "has one value"),
        ("scale=0:1:-1", True, "has no values"),
        ("scale=0:1", False, "is not FROM:TO:STEP in numbers"),
        ("scale=0:1:0.5,keep=10%:20%:5%", False, "--search of several options needs --trials"),
    ],
)
def test_bad_ranges_are_refused(text: str, trials: bool, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_ranges(text, trials)
    assert says in error.value.message and error.value.hint


def test_whole_numbers_have_whole_steps() -> None:
    (one,) = parse_ranges("n=1:9", True)
    assert dimension(one, Fraction(3), int).points() == list(range(1, 10))
    (one,) = parse_ranges("n=1:9:0.5", True)
    with pytest.raises(UsageError, match="whole number"):
        dimension(one, Fraction(3), int)


def test_examples_are_held_out_by_seed_and_task_and_each_is_on_one_side() -> None:
    searched, held = split(50, Fraction(1, 5), 3, "a")
    assert len(held) == 10 and sorted([*searched, *held]) == list(range(50))
    assert list(split(50, Fraction(1, 5), 3, "a")[1]) == list(held)
    assert list(split(50, Fraction(1, 5), 4, "a")[1]) != list(held) != list(split(50, Fraction(1, 5), 3, "b")[1])
    assert list(held) == [8, 9, 11, 15, 18, 24, 40, 44, 45, 48]  # docs/random.md
