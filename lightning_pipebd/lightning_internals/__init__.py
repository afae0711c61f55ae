"""Every private name of Lightning that we use; ``tests/test_lightning_internals.py`` pins each of them."""
