"""Everything that can fail, tried many times: ``python -m faults``."""
