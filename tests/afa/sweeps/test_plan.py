"""Plans of sweeps: combinations of values, and names of runs."""

import pytest

from afa.config import with_changes
from afa.errors import UserError
from afa.sweeps.plan import combinations, digest, plan


def test_every_value_is_combined_with_all_others():
    found = combinations({"a": [1, 2], "b": ["x", "y"]}, [])
    assert found == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert combinations({}, []) == [{}]


def test_values_of_a_group_change_together():
    found = combinations({"a": [1, 2]}, [{"b": [3, 4], "c": [5, 6]}])
    assert found == [
        {"a": 1, "b": 3, "c": 5}, {"a": 1, "b": 4, "c": 6},
        {"a": 2, "b": 3, "c": 5}, {"a": 2, "b": 4, "c": 6},
    ]  # fmt: skip


def test_a_random_choice_is_always_the_same():
    grid = {"a": list(range(10)), "b": list(range(10))}
    found = combinations(grid, [], 5)
    assert found == combinations(grid, [], 5)
    assert len({tuple(each.values()) for each in found}) == 5


@pytest.mark.parametrize(
    ("grid", "zipped", "chosen", "said"),
    [
        ({"a": [1]}, [{"b": [1, 2], "c": [1]}], 0,
         "--zip needs as many values for every field: b 2, c 1"),
        ({"a": [1]}, [{"a": [1]}], 0, "a is given twice"),
        ({"a": []}, [], 0, "a has no values"),
        ({"a": [1, 2]}, [], 3, "--random=3: there are only 2 combinations"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_are_refused(grid, zipped, chosen, said):
    with pytest.raises(UserError) as error:
        combinations(grid, zipped, chosen)
    assert str(error.value) == said


def test_runs_are_named_by_what_they_compute():
    changes = combinations({"optim.learning_rate": [1e-3, 3e-4]}, [])
    runs = plan(["debug"], changes, range(2), "laptop")
    assert [run.changes["seed"] for run in runs] == [0, 1, 0, 1]
    assert len({run.name for run in runs}) == 4
    assert all(run.name == f"debug-{digest(run.config)}" for run in runs)
    again = plan(["debug"], [{"optim.learning_rate": 3e-4, "data.read_threads": 7}], [1], "laptop")
    assert again[0].digest == runs[3].digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("launch.processes", 2), ("train.parallel", "pmap"), ("train.log_every", "3"),
        ("data.read_threads", 7), ("data.cache", "elsewhere"),
    ],
)  # fmt: skip
def test_settings_that_change_no_result_are_not_part_of_the_name(field, value):
    config = plan(["debug"], [{}], [0], "laptop")[0].config
    changed = with_changes(config, **{field: value})
    assert changed != config and digest(changed) == digest(config)
    assert digest(with_changes(config, **{"train.steps": "9"})) != digest(config)


def test_equal_runs_are_planned_once():
    runs = plan(["debug"], [{}, {"data.read_threads": 3}], [0], "laptop")
    assert len(runs) == 1


def test_an_unknown_field_is_refused():
    with pytest.raises(UserError, match=r"optim\.learning_rat is not a field; did you mean"):
        plan(["debug"], [{"optim.learning_rat": 1.0}], [0], "laptop")
