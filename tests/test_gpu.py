"""Which rows of benchmarks/gpu.py a visit measures, on a clock that the test sets, and the tables of given lines."""

import signal

import pytest

from benchmarks import budget, gpu, gpu_table, sizes
from benchmarks.budget import Row
from experiments.records import read_lines


class Clock:
    """Counts the seconds that are left. Each row takes the seconds that its test gives it."""

    def __init__(self, seconds):
        self.seconds = seconds

    def left(self):
        return self.seconds

    def row(self, takes, estimate, result=None):
        def measure():
            self.seconds -= takes
            if isinstance(result, Exception):
                raise result
            return {"takes": takes} if result is None else result

        return Row(measure, estimate)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "environment", lambda: {"device": "none"})
    return tmp_path / "lines.jsonl"


def rows_of(path):
    return [line["row"] for line in read_lines(path)]


def test_a_row_starts_only_if_its_estimate_is_left_and_the_next_visit_measures_the_rest(path):
    clock = Clock(100)
    rows = {"first": clock.row(40, 50), "long": clock.row(65, 70), "short": clock.row(5, 10), "late": clock.row(1, 56)}
    budget.run(rows, path, clock.left)
    assert read_lines(path) == [
        {"row": "first", "seconds": 40, "takes": 40, "device": "none"},
        {"row": "short", "seconds": 5, "takes": 5, "device": "none"},
    ]
    assert budget.missing(rows, path) == ["long", "late"]
    clock.seconds = 71
    budget.run(rows, path, clock.left)
    assert rows_of(path) == ["first", "short", "long"]
    clock.seconds = 56
    budget.run(rows, path, clock.left)
    budget.run(rows, path, clock.left)
    assert rows_of(path) == ["first", "short", "long", "late"]


def test_a_row_that_fails_writes_its_error_and_only_its_name_measures_it_again(path):
    clock = Clock(100)
    rows = {"broken": clock.row(3, 1, ValueError("no such thing")), "good": clock.row(1, 1)}
    budget.run(rows, path, clock.left)
    broken = {"row": "broken", "seconds": 3, "error": "ValueError: no such thing", "device": "none"}
    assert read_lines(path)[0] == broken
    assert rows_of(path) == ["broken", "good"]
    budget.run(rows, path, clock.left)
    assert rows_of(path) == ["broken", "good"]
    rows["broken"] = clock.row(2, 1)
    budget.run(rows, path, clock.left, named=["broken"])
    budget.run(rows, path, clock.left, named=["broken", "good"])
    assert rows_of(path) == ["broken", "good", "broken"]
    assert read_lines(path)[-1]["takes"] == 2


def test_only_named_rows_are_measured(path):
    clock = Clock(100)
    budget.run({name: clock.row(1, 1) for name in "abc"}, path, clock.left, named=["c", "a"])
    assert rows_of(path) == ["a", "c"]


def test_a_row_with_more_to_do_gets_no_line(path):
    clock, results = Clock(100), [None, {"runs": 2}]
    rows = {"study": Row(lambda: results.pop(0), 1)}
    budget.run(rows, path, clock.left)
    assert budget.missing(rows, path) == ["study"]
    budget.run(rows, path, clock.left)
    assert read_lines(path) == [{"row": "study", "seconds": 0, "runs": 2, "device": "none"}]


def test_a_row_stops_at_its_limit_with_an_error_and_at_the_end_of_the_budget_without_a_line(path):
    def hang():
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception as error:  # as callees may
            raise AssertionError from error
        raise AssertionError

    clock = Clock(100)
    rows = {"hangs": Row(hang, 10), "long": Row(hang, 40), "after": clock.row(1, 1)}
    previous = signal.getsignal(signal.SIGALRM)
    budget.run(rows, path, clock.left)
    assert [line.get("error") for line in read_lines(path)] == ["stopped after 30 s", None]
    assert budget.missing(rows, path) == ["long"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == previous


def test_an_alarm_stops_a_row(path):
    """The first takes forever, with 0.05 s left."""

    def forever():
        while True:
            signal.pause()

    budget.run({"forever": Row(forever, 0.01)}, path, lambda: 0.02)
    assert read_lines(path) == []


ENVIRONMENT = {"device": "H100", "versions": {"jax": "1.2"}, "commit": "abc", "date": "2026-01-02"}
LINES = [
    {"row": "default", "error": "ValueError: first try"},
    {
        "row": "train_step",
        "run_seconds": [0.03, 0.02, 0.01],
        "patches_per_second": 100_000.0,
        "fraction_of_matmul": 0.4,
        "matmul_flops_per_second": 8e14,
        "first_step_seconds": 21.04,
        "programs_cached_before": 0,
    },
    {
        "row": "small_train_step",
        "run_seconds": [0.008],
        "patches_per_second": 250_000.0,
        "fraction_of_matmul": 0.3,
        "matmul_flops_per_second": 8e14,
    },
    {"row": "theirs_train_step", "run_seconds": [0.09, 0.04, 0.05]},
    {"row": "theirs_helped_train_step", "run_seconds": [0.03, 0.03, 0.03]},
    {"row": "loss", "run_seconds": [0.5]},
    {
        "row": "default",
        "seconds": 61.2,
        "kNN": 74.25,
        "linear": 82.5,
        "training_seconds": 20.0,
        "embedding_seconds": 30.0,
        "measuring_seconds": 5.0,
    },
    {"row": "recommended", "kNN": 80.0, "logistic": 85.5},
    {"row": "theirs_end_to_end", "seconds": 183.6, "kNN": 74.0, "linear": 81.0},
    {"row": "other_numbers", "same_seconds": 9.0, "seed_seconds": 0.25, "learning_rate_seconds": 0.5},
    {"row": "profile", "kernels": {"convolutions": {"milliseconds": 3.0, "kernels": 4.0}}},
    {"row": "golden", "error": "TimeoutExpired: late"},
]


def test_the_tables_of_given_lines():
    text = gpu_table.table([line | ENVIRONMENT for line in LINES], sizes.ACCELERATOR)
    for row in (
        "H100, jax 1.2, torch -, commit abc, 2026-01-02.",
        "| train step | 20.0 ms, 100,000 patches/s, 40% of the rate of a matrix product (800 TFLOP/s) "
        "| 17.5 ms, 114,000 patches/s, 50 % |",
        "| the same with patches of 16x16 "
        "| 8.0 ms, 250,000 patches/s, 30% of the rate of a matrix product (800 TFLOP/s) |  |",
        "| first step, nothing cached | 21.0 s | 20 s |",
        "| first step with another seed | 0.2 s | 5 s |",
        "| one epoch, 128-patch embeddings, kNN and linear classifier | 61 s | 60 s |",
        "| ten epochs and evaluation | not measured | 100 s |",
        # 2,000 patches in 0.02 s and in 0.05 s.
        "| train step, full model | 100,000 | 40,000 | patches/s | **3.00** (2.00 to 5.00) | 1.25 on CPU, 2 on GPU |",
        "| one epoch, 128-patch embeddings, kNN and linear classifier | 61.2 | 184 | s | **3.00** (3.00 to 3.00) |  |",
        "| default | 74.25 | 82.50 | - | 20.0, 30.0, 5.0 |",
        "| recommended | 80.00 | - | 85.50 | -, -, - |",
        "| theirs_end_to_end | 74.00 | 81.00 | - | -, -, - |",
        "| convolutions | 3.00 | 100% | 4 |",
        "golden failed: TimeoutExpired: late",
    ):
        assert row in text.splitlines()
    assert "loss and gradient" not in text  # the baseline's is missing
    assert "default failed" not in text


def test_no_lines_give_the_goals_alone():
    text = gpu_table.table([], sizes.ACCELERATOR)
    assert text.splitlines()[2:] == [f"| {name} | not measured | {goal[1]} |" for name, goal in gpu_table.GOALS.items()]


def test_the_tables_name_existing_rows(tmp_path):
    visit = gpu.Visit(tmp_path, tiny=True, end=0.0)
    mine, theirs = gpu.our_rows(visit), gpu.their_rows(visit)
    assert {row for row, _, _ in gpu_table.GOALS.values()} <= mine.keys()
    assert {line["row"] for line in LINES} <= {*mine, *theirs}
    assert list(mine)[:3] == ["train_step", "profile", "best"]
    assert list(theirs)[-1] == "theirs_end_to_end"
