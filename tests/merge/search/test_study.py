"""Trials: the optimum of functions that have one in closed form, pruning, and studies that are continued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import pytest

from peru_cli.errors import BadFile, UsageError
from peru_cli.merge.search.space import Dimension, Point, dimension, parse_ranges
from peru_cli.merge.search.study import Study, Tried

RANGES = "x=0:1,y=-1:3,n=0:9"
BEST = (0.3, 1.2, 4)
Report = Callable[[float], bool]


def space(text: str = RANGES) -> list[Dimension]:
    return [dimension(one, Fraction(0), int if one.name == "n" else float) for one in parse_ranges(text, True)]


def bowl(point: Point, report: Report) -> tuple[float, Mapping[str, float]]:
    """-(x - 0.3)^2 - (y - 1.2)^2 - (n - 4)^2 / 50, largest at BEST."""
    x, y, n = map(float, point)
    return -((x - BEST[0]) ** 2) - (y - BEST[1]) ** 2 - (n - BEST[2]) ** 2 / 50, {"task": x}


def run(evaluate: object = bowl, trials: int = 60, seed: int = 0, path: Path | None = None, about: str = "bowl") -> list[Tried]:
    study = Study(space(), True, seed, path, {"the merge": about})
    study.run(trials, evaluate, lambda tried: None)  # type: ignore[arg-type]
    return study.tried


def best(tried: list[Tried]) -> Tried:
    return max(tried, key=lambda one: one.score or float("-inf"))


def test_the_optimum_of_a_quadratic_function_is_found() -> None:
    found = [float(number) for number in best(run(trials=100)).point]
    assert found == [pytest.approx(BEST[0], abs=0.1), pytest.approx(BEST[1], abs=0.15), pytest.approx(BEST[2], abs=1)]


def test_the_smallest_value_is_best_if_small_is_good() -> None:
    study = Study(space(), False, 0, None, {})
    study.run(60, lambda point, report: (-bowl(point, report)[0], {}), lambda tried: None)
    assert min(tried.score or 9 for tried in study.tried) < 0.1


def test_points_are_exact_decimals_and_the_search_begins_at_the_start() -> None:
    tried = run(trials=20)
    assert all(number * 1000 == int(number * 1000) for one in tried for number in one.point[:2])
    assert all(one.point[2].denominator == 1 for one in tried) and tried[0].point == (0, 0, 0)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others() -> None:
    assert run(trials=25) == run(trials=25) != run(trials=25, seed=1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 7, 14])
def test_a_study_that_was_killed_and_continued_equals_one_that_was_not(after: int, tmp_path: Path) -> None:
    left = [after]

    def killed(point: Point, report: Report) -> tuple[float, Mapping[str, float]]:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return bowl(point, report)

    path = tmp_path / "study"
    with pytest.raises(Killed):
        run(killed, 25, path=path)
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"torn')  # the process died while it wrote
    assert run(trials=25, path=path) == run(trials=25)


def test_a_finished_study_can_go_on_and_runs_nothing_again(tmp_path: Path) -> None:
    run(trials=15, path=tmp_path / "study")
    calls = []

    def counted(point: Point, report: Report) -> tuple[float, Mapping[str, float]]:
        calls.append(point)
        return bowl(point, report)

    assert run(counted, 18, path=tmp_path / "study") == run(trials=18) and len(calls) == 3


def test_optuna_reads_the_study(tmp_path: Path) -> None:
    import optuna

    tried = run(trials=12, path=tmp_path / "study")
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study"))
    study = optuna.load_study(study_name=None, storage=optuna.storages.JournalStorage(backend))
    assert [trial.value for trial in study.trials] == [one.score for one in tried]
    assert study.best_params == pytest.approx(dict(zip("xyn", map(float, best(tried).point), strict=True)))


def test_a_study_of_another_search_is_refused_and_says_what_differs(tmp_path: Path) -> None:
    run(trials=3, path=tmp_path / "study")
    with pytest.raises(UsageError, match="holds trials of another search: the merge differs"):
        run(trials=3, path=tmp_path / "study", about="another")


@pytest.mark.parametrize("content", [b"not a study\n", b'{"op_code": 77}\n', b"\xff\xfe\n", b"[]\n"])
def test_a_file_that_is_no_study_is_refused_and_left_alone(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study").write_bytes(content)
    with pytest.raises(BadFile, match="is not a study"):
        run(trials=3, path=tmp_path / "study")
    assert (tmp_path / "study").read_bytes() == content


def test_poor_trials_are_given_up_after_a_task() -> None:
    reports = 0

    def two_tasks(point: Point, report: Report) -> tuple[float, Mapping[str, float]] | None:
        nonlocal reports
        score = bowl(point, report)[0]
        reports += 1
        return None if report(score) else (score, {})

    tried = run(two_tasks, 60)
    given_up = [one for one in tried if one.score is None]
    assert 10 < len(given_up) < 50 and reports == 60 and best(tried).score == best(run(two_tasks, 60)).score
    assert all(one.score is not None for one in tried[:5]), "nothing to compare with yet"


def test_a_score_that_is_not_a_number_never_wins() -> None:
    tried = run(lambda point, report: (float("nan") if point[0] < Fraction(1, 2) else float(point[0]), {}), 20)
    assert any(one.score is None for one in tried) and best(tried).score is not None
