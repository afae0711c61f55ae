"""From a loaded batch to the boundaries that a program starts from."""

from __future__ import annotations

from typing import Any

from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.planning.program import TARGETS
from lightning_pipebd.runtime.row_trees import RowTree, count_rows, leading_row_leaves

__all__ = ["check_rows", "load_boundaries"]


def load_boundaries(module: BlockwiseDistillationModule, batch: Any, rows: Rows) -> dict[int, RowTree]:
    """Give what a program starts from on a rank that loads rows: boundary 0, and the labels where a block wants them.

    Args:
        module: Unpacks the batch.
        batch: What the loader gave.
        rows: The rows of the batch that it holds.

    Raises:
        ValueError: The batch has another number of rows than were loaded, or no labels.
    """
    inputs, targets = module.take_apart(batch)
    loaded = {0: check_rows(inputs, rows)}
    if module.target_blocks:
        if targets is None:
            msg = (
                "`target_blocks` must get labels, but `unpack_batch` gave none. Let the loader yield (inputs, labels)."
            )
            raise ValueError(msg)
        loaded[TARGETS] = RowTree(rows, targets, leading_row_leaves(targets, rows.num_rows))
    return loaded


def check_rows(inputs: Any, rows: Rows) -> RowTree:
    """Give what was unpacked as the rows that were loaded.

    Raises:
        ValueError: It has another number of rows.
    """
    if count_rows(inputs) != rows.num_rows:
        msg = (
            f"`unpack_batch` must give the {rows.num_rows} rows that were loaded, but gives {count_rows(inputs)}. "
            "Change the number of rows in the dataset or the collate function, not in batch transfer hooks."
        )
        raise ValueError(msg)
    return RowTree(rows, inputs, leading_row_leaves(inputs, rows.num_rows))
