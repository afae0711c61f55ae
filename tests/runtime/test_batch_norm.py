"""BatchNorm layers of shared blocks, replaced for a fit."""

from __future__ import annotations

from torch import nn

from lightning_pipebd.runtime.batch_norm import SynchronisedNorms, has_norms


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Sequential(nn.BatchNorm1d(2)), nn.Linear(2, 2)
    )


def test_blocks_with_batch_norm_are_told_from_others() -> None:
    assert [has_norms(block) for block in make_model()] == [True, True, False]
    assert not has_norms(nn.SyncBatchNorm(2))


def test_layers_of_shared_blocks_are_replaced_and_come_back_with_their_statistics() -> None:
    model, group = make_model(), object()
    before = list(model.modules())
    norms = SynchronisedNorms(model, [(model[0], group)])
    replaced = model[0][1]
    assert isinstance(replaced, nn.SyncBatchNorm)
    assert replaced.process_group is group
    assert model[1] is before[4]
    replaced.running_mean.add_(1.0)
    norms.restore()
    assert list(model.modules()) == before
    assert model[0][1].running_mean.tolist() == [1.0, 1.0]
