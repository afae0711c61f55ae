"""Plans from everything a user may write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipebd import (
    Plan,
    PlanError,
    load_plan,
    parse_plan,
    save_plan,
)
from lightning_pipebd.plans import resolve_plan
from tests.helpers.toy import make_module

TEXT = "0,1:1/4|1:3/4,2-3"

#: No text form: rank 1 has the first rows.
CROSSED = {
    "num_ranks": 2,
    "teacher": [[[0, "1"]]] * 4,
    "student": [[[1, "1/3"], [0, "2/3"]]] + [[[1, "1"]]] * 3,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (TEXT, parse_plan(TEXT)),
        ("0-1|2-3", Plan.straight([2, 2])),
        (" joint ", Plan.joint(4, 2)),
        ("0-3*2", Plan.joint(4, 2)),
        (Plan.straight([1, 3]).to_dict(), Plan.straight([1, 3])),
        (CROSSED, Plan.from_dict(CROSSED)),
        (Plan.straight([3, 1]), Plan.straight([3, 1])),
    ],
)
def test_a_plan_is_text_a_dictionary_or_a_plan(given: Any, expected: Plan) -> None:
    assert resolve_plan(given, make_module("linear"), 2) == expected


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml"])
@pytest.mark.parametrize("text", [TEXT, yaml.safe_dump(TEXT), yaml.safe_dump(parse_plan(TEXT).to_dict())])
def test_a_plan_is_a_file_with_text_or_a_mapping(text: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert resolve_plan(str(path), make_module("linear"), 2) == parse_plan(TEXT)


@pytest.mark.parametrize("plan", [parse_plan(TEXT), Plan.from_dict(CROSSED), Plan.joint(3, 5), Plan.straight([1, 0])])
def test_a_saved_plan_is_loaded_as_it_was(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(str(tmp_path / "plan.yaml")) == plan


def test_a_plan_for_another_module_is_refused() -> None:
    with pytest.raises(PlanError, match=r"must cover the module's 4 blocks, but covers 2\. The blocks are 0, 1, 2, 3"):
        resolve_plan(Plan.straight([1, 1]), make_module("linear"), 2)


@pytest.mark.parametrize("given", [Plan.straight([2, 2]), "0-1|2-3", Plan.straight([2, 2]).to_dict()])
def test_a_plan_for_other_ranks_is_refused(given: Any) -> None:
    with pytest.raises(PlanError, match=r"must be for the 3 ranks of this run, but is for 2\. Set `devices=2`"):
        resolve_plan(given, make_module("linear"), 3)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"must name a readable YAML file, but .*nowhere\.yaml is not"):
        load_plan(tmp_path / "nowhere.yaml")
