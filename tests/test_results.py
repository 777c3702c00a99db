"""The table of a run's accuracies, and the file that stores them."""

from empssl_jax.run_folder.results import add_results, format_table, load_results, recorded

PLAIN = {"kNN": {"top1": 0.625, "top5": 1.0}}
LINEAR = {"linear": {"top1": 0.5, "top5": 0.03}}


def test_a_line_for_each_measure_in_percent():
    assert format_table(PLAIN | LINEAR).splitlines() == [
        "         top-1   top-5",
        "kNN     62.50%  100.00%",
        "linear  50.00%   3.00%",
    ]


def test_effective_ranks_follow_the_accuracies():
    rank = {"effective rank": {"rank": 31.25, "images": 2000, "dimensions": 1500}}
    assert format_table(rank | PLAIN).splitlines() == [
        "                 top-1   top-5",
        "kNN             62.50%  100.00%",
        "effective rank  31.2 of 1,500",
    ]
    assert format_table(rank) == "effective rank  31.2 of 1,500"


def test_the_step_and_the_embeddings_are_named_where_they_differ(tmp_path):
    add_results(tmp_path, recorded(PLAIN, embeddings="16 random patches"))
    both = add_results(tmp_path, recorded(LINEAR, embeddings="16 grid patches"))
    assert both == load_results(tmp_path)
    assert [line.rpartition("%  ")[2] for line in format_table(both).splitlines()[1:]] == [
        "16 random patches",
        "16 grid patches",
    ]
    half = recorded(PLAIN, step=450, embeddings="16 random patches") | recorded(LINEAR, step=500)
    assert [line.rpartition("%  ")[2] for line in format_table(half).splitlines()[1:]] == [
        "step 450: 16 random patches",
        "step 500",
    ]
    before = {"kNN before training": PLAIN["kNN"]}
    assert "step" not in format_table(recorded(PLAIN | LINEAR, step=500) | before)
    assert "patches" not in format_table(recorded(PLAIN | LINEAR, embeddings="16 grid patches"))
    assert recorded(PLAIN, embeddings=None) == PLAIN
