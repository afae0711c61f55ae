"""What makes a block depend on which rows of a batch it sees together, and on random numbers."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from lightning_pipebd.runtime.block_view import BlockView
from lightning_pipebd.runtime.blocks import CallableBlock

__all__ = ["graph_draws_random_numbers", "has_batch_statistics", "is_stochastic"]

_DROPOUTS = frozenset(
    {
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("feature_alpha_dropout", "stochastic_depth", "drop_path", "drop_block2d", "drop_block3d"),
    }
)
_DRAWS = frozenset(
    {
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "poisson"),
        *("bernoulli", "multinomial", "gumbel_softmax", "rrelu", "fractional_max_pool2d", "fractional_max_pool3d"),
        *("bernoulli_", "normal_", "uniform_", "exponential_", "random_", "log_normal_", "cauchy_", "geometric_"),
        *("random", "choice", "choices", "sample", "shuffle", "randrange", "uniform", "gauss"),
    }
)


_NO_CODE = compile("", "", "exec")


def has_batch_statistics(block: nn.Module) -> bool:
    """Say whether a block computes statistics over the rows of a batch, as BatchNorm does in training.

    Counted are all BatchNorms (also synchronised ones), whatever keeps running statistics (``InstanceNorm`` with
    ``track_running_stats``), and modules of any class with a buffer named ``running_mean``.

    Example:
        >>> has_batch_statistics(nn.BatchNorm1d(3)), has_batch_statistics(nn.LayerNorm(3))
        (True, False)
    """
    if any(isinstance(module, _BatchNorm) for module in block.modules()):
        return True
    return any(name.rpartition(".")[2] == "running_mean" for name, _ in block.named_buffers())


def is_stochastic(block: nn.Module) -> bool:
    """Say whether a block draws random numbers in training, as dropout with a probability above zero does.

    Looks at modules, at their attributes named like a probability of dropping, at the functions called in their
    ``forward`` and in code between modules. Random numbers drawn deeper in user code are not seen.

    Example:
        >>> is_stochastic(nn.Dropout(0.1)), is_stochastic(nn.Dropout(0.0))
        (True, False)
        >>> is_stochastic(nn.MultiheadAttention(4, 1, dropout=0.1))
        True
    """
    if isinstance(block, BlockView) and block.draws_random_numbers:
        return True
    return any(_module_draws(module) for module in block.modules())


def graph_draws_random_numbers(graph: fx.Graph) -> bool:
    """Say whether recorded code between modules draws random numbers.

    Example:
        >>> graph = fx.Graph()
        >>> _ = graph.call_function(nn.functional.dropout, (graph.placeholder("x"),), {"p": 0.5, "training": True})
        >>> graph_draws_random_numbers(graph)
        True
    """
    return any(_node_draws(node) for node in graph.nodes if node.op in ("call_function", "call_method"))


def _node_draws(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name == "scaled_dot_product_attention":
        return _may_be_positive(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    if name not in _DROPOUTS:
        return name in _DRAWS
    # All dropouts begin with (input, probability); stochastic depth has its mode before `training`.
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    position = 3 if name == "stochastic_depth" else 2
    training = node.args[position] if len(node.args) > position else node.kwargs.get("training", True)
    return training is not False and _may_be_positive(probability)


def _module_draws(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return True
    probabilities = _drop_probabilities(module)
    if any(_may_be_positive(value) for value in probabilities):
        return True
    if type(module).__module__.startswith("torch.nn.") or (probabilities and _is_named_dropping(module)):
        return False
    function = module.function if isinstance(module, CallableBlock) else type(module).forward
    # The names a function uses also hold those of submodules (`self.dropout`), which are looked at by themselves.
    called = {name for name in getattr(function, "__code__", _NO_CODE).co_names if not hasattr(module, name)}
    return bool(called & _DRAWS) or (not probabilities and bool(called & _DROPOUTS))


def _drop_probabilities(module: nn.Module) -> list[float]:
    """Collect the numbers a module keeps under names like ``dropout``, ``drop_prob``, and ``p`` of a dropping class."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and ("drop" in name.lower() or (name == "p" and _is_named_dropping(module)))
    ]


def _is_named_dropping(module: nn.Module) -> bool:
    return any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth"))


def _may_be_positive(value: Any) -> bool:
    return not isinstance(value, (int, float)) or value > 0
