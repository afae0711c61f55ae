from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import yaml

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import (
    BlockSizes,
    BlockTimes,
    CostTable,
    DeviceTimes,
    LinkCost,
    LoaderCost,
    ReduceTimes,
)
from lightning_pipebd.planning.curve import CostError, Curve
from tests.planning.cost_tables import constant_costs, random_costs

TIMES = BlockTimes(teach_ms=Curve([(1, 1)]), learn_ms=Curve([(1, 1)]))


def table(**changes: Any) -> CostTable:
    return replace(constant_costs([(1, 2), (3, 4)]), **changes)


def test_table_comes_back_from_json_and_yaml() -> None:
    costs = random_costs(Random(0), 3, device_classes=("a", "b"))
    assert CostTable.from_dict(json.loads(json.dumps(costs.to_dict()))) == costs
    assert CostTable.from_dict(yaml.safe_load(yaml.safe_dump(costs.to_dict()))) == costs


def test_equal_tables_have_equal_hashes() -> None:
    assert hash(random_costs(Random(0), 3)) == hash(random_costs(Random(0), 3))


def test_cluster_comes_back_from_json() -> None:
    cluster = Cluster(device_class=["a", "b"], node=[0, 1], memory_limit_bytes=[None, 8])  # type: ignore[arg-type]
    assert Cluster.from_dict(json.loads(json.dumps(cluster.to_dict()))) == cluster


def test_fields_with_a_default_may_be_left_out_of_a_file() -> None:
    data = {
        "blocks": [{"name": "only"}],
        "devices": [{"device_class": "x", "blocks": [{"teach_ms": [[1, 1]], "learn_ms": [[8, 2], [1, 1]]}]}],
        "boundary_bytes_per_row": [4, 4],
        "same_node": {"reduces": [{"num_ranks": 2, "ms": [[1000, 0.5]]}]},
    }
    costs = CostTable.from_dict(data)
    assert costs.times("x")[0].learn_ms.at(8) == 2
    assert costs.same_node.reduce_ms(2000, 2) == 1.0
    assert costs.loader == LoaderCost()


def test_measured_reduce_overrides_the_ring_for_its_number_of_ranks_only() -> None:
    link = LinkCost(bytes_per_ms=100, reduces=(ReduceTimes(num_ranks=2, ms=Curve([(100, 9)])),))
    assert [link.reduce_ms(100, ranks) for ranks in (1, 2, 4)] == [0.0, 9.0, 1.5]


def test_transfer_takes_latency_and_bandwidth() -> None:
    assert LinkCost(latency_ms=0.5, bytes_per_ms=100).transfer_ms(200) == 2.5
    assert LinkCost().transfer_ms(10**12) == 0


def test_nothing_is_loaded_in_no_time() -> None:
    assert [LoaderCost(fixed_ms=1, per_row_ms=2).load_ms(rows) for rows in (0, 3)] == [0, 7]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: table(blocks=()), "`blocks` must have at least one block"),
        (lambda: table(blocks="ab"), "`blocks` must be a list, but is 'ab'"),
        (lambda: table(devices=()), "`devices` must have at least one class of devices"),
        (lambda: table(devices=table().devices * 2), "`devices` must have every class of devices once"),
        (
            lambda: table(devices=(DeviceTimes(device_class="x", blocks=(TIMES,)),)),
            "`devices` must have the times of all 2 blocks, but 'x' has 1",
        ),
        (lambda: table(boundary_bytes_per_row=(1, 2)), "`boundary_bytes_per_row` must have 3 entries.* but has 2"),
        (
            lambda: table(boundary_bytes_per_row=(1, -2, 3)),
            r"`boundary_bytes_per_row\[1\]` must be finite and not below",
        ),
        (lambda: table(target_bytes_per_row=-1), "`target_bytes_per_row` must be finite and not below 0, but is -1"),
        (lambda: table(jitter_ms=-1), "`jitter_ms` must be finite and not below 0, but is -1"),
        (lambda: table(noise=2), "`noise` must lie between 0 and 1, but is 2"),
        (lambda: table().times("x"), "`device_class` must be one of default, but is 'x'"),
        (
            lambda: BlockSizes(name="a", gradient_bytes=-1),
            "`gradient_bytes` of `block 'a'` must be finite and not below",
        ),
        (lambda: replace(TIMES, update_ms=-1), "`update_ms` of `block times` must be finite and not below 0"),
        (lambda: LinkCost(latency_ms=float("inf")), "`latency_ms` of `link` must be finite"),
        (lambda: LinkCost(bytes_per_ms=0), "`bytes_per_ms` must be above 0, but is 0"),
        (lambda: LinkCost(send_occupation=1.5), "`send_occupation` must lie between 0 and 1, but is 1.5"),
        (lambda: LinkCost(reduces=(ReduceTimes(num_ranks=2, ms=Curve([(1, 1)])),) * 2), "`reduces` must have every"),
        (lambda: ReduceTimes(num_ranks=1, ms=Curve([(1, 1)])), "`num_ranks` of a REDUCE must be at least 2, but is 1"),
        (lambda: LoaderCost(occupation=-1), "`occupation` of `loader` must be finite and not below 0, but is -1"),
        (lambda: LoaderCost(occupation=2), "`occupation` must lie between 0 and 1, but is 2"),
    ],
)
def test_impossible_costs_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(CostError, match=message):
        make()


def test_table_that_was_written_before_there_was_jitter_is_one_of_steady_ranks() -> None:
    data = table(noise=0.1).to_dict()
    del data["jitter_ms"]
    assert CostTable.from_dict(data) == table(noise=0.1, jitter_ms=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocs": []}, "`costs` must have keys among .*, but has blocs"),
        ({"noise": "much"}, r"`costs.noise` must be float, but is 'much' \(str\)"),
        ({"noise": True}, r"`costs.noise` must be float, but is True \(bool\)"),
        ({"blocks": 3}, "`costs.blocks` must be a list, but is 3"),
        ({"blocks": [{}, {}]}, r"`costs.blocks\[0\]` must have the keys name, but lacks name"),
        ({"blocks": ["a"]}, r"`costs.blocks\[0\]` must be a mapping, but is 'a'"),
        ({"boundary_bytes_per_row": [1, 2.5, 3]}, r"`costs.boundary_bytes_per_row\[1\]` must be int, but is 2.5"),
        ({"devices": [{"device_class": "x", "blocks": [{"teach_ms": 1, "learn_ms": 1}]}]}, "must be a list of pairs"),
        (
            {"devices": [{"device_class": "x", "blocks": [{"teach_ms": [[0, 1]], "learn_ms": [[1, 1]]}]}]},
            r"`costs.devices\[0\].blocks\[0\].teach_ms` cannot be read: `points` must have finite amounts",
        ),
    ],
)
def test_unreadable_costs_are_refused_with_their_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CostError, match=message):
        CostTable.from_dict({**table().to_dict(), **change})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (([], [], []), "`device_class` must have at least one rank, but is empty"),
        ((["a"], [0, 1], [None]), "must have one entry per rank each, but have 1, 2 and 1"),
        ((["a"], [0], [0]), r"`memory_limit_bytes\[0\]` must be above 0, but is 0"),
    ],
)
def test_impossible_clusters_are_refused(fields: tuple[Any, Any, Any], message: str) -> None:
    device_class, node, limits = fields
    with pytest.raises(CostError, match=message):
        Cluster(device_class=device_class, node=node, memory_limit_bytes=limits)


def test_link_between_ranks_is_that_of_nodes_if_any_of_them_is_elsewhere() -> None:
    costs = table(same_node=LinkCost(latency_ms=1), other_node=LinkCost(latency_ms=2))
    cluster = Cluster.uniform(4, ranks_per_node=2)
    assert [cluster.link(costs, ranks).latency_ms for ranks in ((0, 1), (1, 2), (0, 1, 2), (3,))] == [1, 2, 2, 1]
    assert (cluster.num_ranks, cluster.num_nodes) == (4, 2)
