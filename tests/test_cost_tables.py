"""Measurements in files: read as they were written, and found again only for what they were made of."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision

from lightning_pipebd.cost_tables import MeasurementCache, as_measurement, load_measurement, save_measurement
from lightning_pipebd.measurement_key import measurement_key
from lightning_pipebd.planning.costs import LinkCost
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.explain import BlockTraits
from lightning_pipebd.planning.measurement import Measurement
from tests.helpers.toy import make_module
from tests.planning.cost_tables import constant_costs

TRAITS = (BlockTraits(name="a", has_batch_statistics=True, boundary_bytes_per_row=7), BlockTraits(name="b"))


def make_measurement(**changes: Any) -> Measurement:
    costs = constant_costs([(1.5, 2.5), (0.1, 1 / 3)], link=LinkCost(latency_ms=0.1, bytes_per_ms=1e6))
    return replace(Measurement(costs=costs, num_rows=64, traits=TRAITS, target_blocks=(1,)), **changes)


@pytest.mark.parametrize("name", ["costs.yaml", "costs.json", "costs.txt"])
def test_a_measurement_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    measurement = make_measurement(whole_reason="block a mixes rows")
    save_measurement(measurement, tmp_path / name)
    assert load_measurement(tmp_path / name) == measurement
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must name a readable YAML or JSON file"),
        ("num_rows: 3", "`measurement` must have the keys costs, num_rows, but lacks costs"),
        ("[1]", "must be a mapping"),
        ("costs: 3\nnum_rows: 4", r"`measurement\.costs` must be a mapping"),
    ],
)
def test_a_file_without_a_measurement_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "costs.yaml").write_text(text)
    with pytest.raises(CostError, match=message) as caught:
        load_measurement(tmp_path / "costs.yaml")
    assert "costs.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_rows": 0}, "`num_rows` must be at least 1, but is 0"),
        ({"traits": TRAITS[:1]}, "one entry for each of the 2 blocks, but has 1"),
        ({"target_blocks": (2,)}, "`target_blocks` must be below 2"),
    ],
)
def test_an_impossible_measurement_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CostError, match=message):
        make_measurement(**changes)


def test_a_table_alone_is_taken_for_the_rows_that_are_trained() -> None:
    measurement = make_measurement()
    assert as_measurement(measurement.costs, 8) == Measurement(costs=measurement.costs, num_rows=8)
    assert as_measurement(measurement, 8) is measurement


def test_the_cache_finds_what_was_kept_under_the_same_key_only(tmp_path: Path) -> None:
    cache, measurement = MeasurementCache(tmp_path / "deep" / "cache"), make_measurement()
    assert cache.find({"rows": 1}) is None
    cache.keep({"rows": 1}, measurement)
    assert cache.find({"rows": 1}) == measurement
    assert cache.find({"rows": 2}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"costs": {}}'])
def test_a_damaged_file_in_the_cache_is_measured_anew_with_a_warning(text: str, tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path)
    cache.path({}).write_text(text)
    with pytest.warns(UserWarning, match="in the cache is damaged and is made anew"):
        assert cache.find({}) is None
    cache.keep({}, make_measurement())
    assert cache.find({}) == make_measurement()


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be kept for the next run"):
        MeasurementCache(tmp_path / "file" / "cache").keep({}, make_measurement())


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PIPEBD_CACHE", str(tmp_path))
    assert MeasurementCache().folder == tmp_path
    monkeypatch.setenv("PIPEBD_CACHE", "")
    MeasurementCache().keep({}, make_measurement())
    assert MeasurementCache().find({}) is None
    monkeypatch.delenv("PIPEBD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert MeasurementCache().folder == tmp_path / ".cache" / "lightning_pipebd"


def key_of(module_name: str = "conv", **changes: Any) -> Any:
    module = changes.pop("module", None) or make_module(module_name)
    arguments: dict[str, Any] = {
        "batch": (torch.zeros(4, 3, 8, 8), torch.zeros(4)),
        "optimizers": [torch.optim.SGD(module.parameters(), lr=0.1)],
        "plugin": Precision(),
        "machines": [("cpu", 0, 1)],
        "num_ranks": 2,
        "is_synchronised": False,
    }
    merged = arguments | changes
    return measurement_key(module, merged.pop("batch"), merged.pop("optimizers"), merged.pop("plugin"), **merged)


def test_a_key_depends_on_what_the_costs_depend_on_and_on_nothing_else(tmp_path: Path) -> None:
    cache = MeasurementCache(tmp_path)
    frozen, trained = make_module("conv"), make_module("conv")
    next(iter(frozen.student.parameters())).requires_grad_(False)
    with torch.no_grad():
        next(iter(trained.student.parameters())).add_(1)
    parameters = list(trained.parameters())
    others = [
        key_of("dropout"),
        key_of(module=frozen),
        key_of(batch=(torch.zeros(8, 3, 8, 8), torch.zeros(8))),
        key_of(batch=(torch.zeros(4, 3, 8, 8).double(), torch.zeros(4))),
        key_of(optimizers=[torch.optim.Adam(parameters)]),
        key_of(optimizers=[torch.optim.SGD(parameters, foreach=False)]),
        key_of(plugin=MixedPrecision("bf16-mixed", "cpu")),
        key_of(machines=[("cpu", 0, 2)]),
        key_of(machines=[("another", 0, 1)]),
        key_of(num_ranks=4),
        key_of(is_synchronised=True),
    ]
    paths = {cache.path(key) for key in others}
    assert len(paths) == len(others)
    assert cache.path(key_of()) not in paths
    same = [key_of(module=trained), key_of(optimizers=[torch.optim.SGD(parameters, lr=0.7)])]
    assert {cache.path(key) for key in same} == {cache.path(key_of())}


def test_a_cache_in_the_folder_of_somebody_else_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "stat", refuse)
    assert MeasurementCache(tmp_path).find({"a": 1}) is None
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.warns(UserWarning, match="Set PIPEBD_CACHE to a folder that can be written"):
        MeasurementCache(tmp_path / "new").keep({"a": 1}, make_measurement())


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIPEBD_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    cache = MeasurementCache()
    cache.keep({"a": 1}, make_measurement())
    assert cache.find({"a": 1}) is None
    assert not cache.folder.exists()
