"""Models of torchvision, divided and trained: the most different ones here, all of them by `python -m zoo`."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from lightning_pipebd.runtime.partition import PartitionError, cut_model
from zoo.__main__ import BEGIN, END, PAGE
from zoo.library import entries_of
from zoo.table import format_page
from zoo.trials import Trial, try_entries

pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="the models are torchvision's")

#: Between them: adapters aside, every kind of boundary, head and refusal that the library has.
QUICK = ["squeezenet1_1", "mobilenet_v3_small", "vit", "lraspp_mobilenet_v3_large"]
QUICK += ["fasterrcnn_mobilenet_v3_large_320_fpn"]


@pytest.fixture(scope="module")
def trials() -> dict[str, Trial]:
    return try_entries([f"torchvision.{name}" for name in QUICK], ["whole"])


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_model_is_divided_and_trained_as_promised(name: str, trials: dict[str, Trial]) -> None:
    trial = trials[f"torchvision.{name}"]
    assert trial.is_as_promised, trial
    assert trial.equal == {"whole": True}


def test_a_detector_as_a_whole_is_refused_with_the_reason() -> None:
    from torchvision.models import detection

    model = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    with pytest.raises(PartitionError, match=r"a value decides what is done .* Pass the blocks yourself"):
        cut_model(model, ["backbone", "head"])


def good(**changes: object) -> Trial:
    seen = {"num_blocks": 5, "is_as_undivided": True, "is_refused_well": True, "has_learned": True}
    return Trial(**{**seen, "equal": {"whole": True, "joint": True, "compile": True}, **changes})


@pytest.mark.parametrize(
    "broken",
    [
        {"is_as_undivided": False},
        {"is_refused_well": False},
        {"has_learned": False},
        {"equal": {"whole": False}},
        {"equal": {"whole": True, "joint": False}},
        {"equal": {}},
        {"failure": "whole on 2: RankError"},
    ],
)
def test_whatever_is_not_as_promised_shows_in_the_verdict_and_in_the_table(broken: dict[str, object]) -> None:
    assert good().is_as_promised
    assert not good(**broken).is_as_promised
    fine = format_page({"torchvision.vit": good()})
    assert "1 of 1 as promised" in fine
    assert "| bit for bit; joint: up to summation; compiled: bit for bit |" in fine
    assert "0 of 1 as promised" in format_page({"torchvision.vit": good(**broken)})


def test_what_is_not_trained_is_no_failure_and_the_table_says_so() -> None:
    seen = good(is_trained=False, has_learned=False, equal={})
    assert seen.is_as_promised
    assert "| bit for bit | not tried |" in format_page({"torchvision.vit": seen})


def test_the_page_has_a_good_row_for_every_entry() -> None:
    text = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    tables = dict(re.findall(r"^### (\w+)\n(.*?)(?=^###|\Z)", text, re.MULTILINE | re.DOTALL))
    rows = re.findall(r"^\| (?!model |-)([^|]+?) \|", tables["torchvision"], re.MULTILINE)
    assert rows == [name.partition(".")[2] for name in entries_of("torchvision")]
    assert "**no**" not in text
    assert "not as promised**" not in text
    assert tables.keys() == {"torchvision", "timm"}
