"""What holds for every test: one seed, one thread, and nothing left behind.

The police fixtures put back what a test changed in its process and fail that test, so that no test depends on which
ones ran before it.
"""

from __future__ import annotations

import os
import tempfile

# Read by OpenMP and OpenBLAS when torch and numpy are imported; equal threads are part of the bitwise promise.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# Measured costs are kept between the tests of one run, and not for the user's next one.
os.environ["PIPEBD_CACHE"] = tempfile.mkdtemp(prefix="pipebd-tests-")

import shutil
import threading
import time
from collections.abc import Iterator

import hypothesis
import pytest
import torch
import torch.distributed

from tests.helpers.ranks import seed_generators

torch.set_num_threads(1)

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("reproducible", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("reproducible" if os.environ.get("CI") else "local")

#: Set by Lightning itself and never taken back: by `seed_everything` and by `Trainer(deterministic=True)`.
_LIGHTNING_VARIABLES = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS", "CUBLAS_WORKSPACE_CONFIG"}

#: Set once and for all: by pytest for every test, and by torch when its compiler is first imported.
_IGNORED_VARIABLES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}

#: Classes of threads that last as long as their process: tqdm's watch over slow bars, Lightning's over the processes
#: it launched, and native threads that once called Python.
_LASTING_THREADS = {"TMonitor", "_ChildProcessObserver", "_DummyThread"}

#: How long a thread that was told to end may need for it.
_THREAD_END_S = 2.0


@pytest.fixture(autouse=True, scope="session")
def cache_of_this_run() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["PIPEBD_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    seed_generators()


@pytest.fixture(autouse=True)
def no_leaked_environment_variables() -> Iterator[None]:
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    for name in changed - _IGNORED_VARIABLES:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    leaked = changed - _IGNORED_VARIABLES - _LIGHTNING_VARIABLES
    assert not leaked, f"the test left environment variables changed: {sorted(leaked)}; use monkeypatch.setenv"


@pytest.fixture(autouse=True)
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _THREAD_END_S
    ours = [
        thread
        for thread in set(threading.enumerate()) - before
        # The last one is that of the pool with which older versions of torch compile.
        if type(thread).__name__ not in _LASTING_THREADS and "(_read_thread)" not in thread.name
    ]
    for thread in ours:
        thread.join(max(0.0, deadline - time.monotonic()))
    leaked = sorted(thread.name for thread in ours if thread.is_alive())
    assert not leaked, f"the test left threads running: {leaked}"


@pytest.fixture(autouse=True)
def no_leaked_process_group() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left a process group open; destroy it, or use run_processes")


@pytest.fixture(autouse=True)
def no_leaked_torch_settings() -> Iterator[None]:
    dtype, num_threads, grad_enabled = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    yield
    leaked = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    torch.set_default_dtype(dtype)
    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(grad_enabled)
    assert leaked == (dtype, num_threads, grad_enabled), (
        f"the test left torch with default dtype, threads and grad mode {leaked}, "
        f"found it with {(dtype, num_threads, grad_enabled)}"
    )


@pytest.fixture(autouse=True)
def restored_determinism() -> Iterator[None]:
    """Put back what every `Trainer` sets for the whole process; that is Lightning's way, so no test fails for it."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    yield
    # Only where it changed: the first call of this function imports torch's compiler, which takes seconds.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
