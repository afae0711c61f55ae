"""How the work is done: tensors, threads and messages; no Trainer."""

__all__: list[str] = []
