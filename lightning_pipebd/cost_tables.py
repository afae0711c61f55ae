"""Measurements in files: those that users save, edit and ship, and the cache of those that were made before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement

__all__ = ["MeasurementCache", "as_measurement", "load_measurement", "save_measurement"]

# Another number when costs mean something else: older files are not found any more.
_FORMAT = 3


def load_measurement(path: str | Path) -> Measurement | PipelineMeasurement:
    """Read a measurement from a YAML or JSON file that :func:`save_measurement` or a user has written.

    One with a list ``student`` is of a whole student, any other of blocks that learn by themselves.

    Raises:
        CostError: The file does not exist, is neither YAML nor JSON, or describes no measurement.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text) if str(path).endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeError, ValueError, yaml.YAMLError) as error:
        msg = f"`costs` must name a readable YAML or JSON file, but {path} is not: {error}. `pipebd plan` writes one."
        raise CostError(msg) from error
    try:
        is_whole = isinstance(data, Mapping) and "student" in data
        return PipelineMeasurement.from_dict(data) if is_whole else Measurement.from_dict(data)
    except CostError as error:
        raise CostError(f"{path}: {error}") from error


def save_measurement(measurement: Measurement | PipelineMeasurement, path: str | Path) -> None:
    """Write a measurement to a YAML file, or to a JSON file if the name ends so; an old file stays whole until then."""
    data = measurement.to_dict()
    if str(path).endswith(".json"):
        _write_atomically(Path(path), json.dumps(data, indent=1))
    else:
        _write_atomically(Path(path), yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120))


class MeasurementCache:
    """Measurements that were made before, one file per key.

    Args:
        folder: Where they lie; `None` takes `$PIPEBD_CACHE`, or else `~/.cache/lightning_pipebd`. An empty
            `$PIPEBD_CACHE` keeps nothing, and so does a user without a home.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        given = os.environ.get("PIPEBD_CACHE") if folder is None else str(folder)
        # Not by `Path.expanduser`, which raises where a user has no home.
        self.folder = Path(os.path.expanduser("~/.cache/lightning_pipebd") if given is None else given)
        self._is_on = given != "" and self.folder.parts[:1] != ("~",)

    def path(self, key: Mapping[str, Any]) -> Path:
        """Give the file of a key."""
        text = json.dumps({"format": _FORMAT, **key}, sort_keys=True)
        return self.folder / f"costs-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}.json"

    def find(self, key: Mapping[str, Any]) -> Measurement | PipelineMeasurement | None:
        """Give the measurement of a key, if there is one; warns of a damaged file and gives nothing."""
        path = self.path(key)
        # Not by `Path.exists`, which raises where the folder is somebody else's.
        if not self._is_on or not os.path.exists(path):
            return None
        try:
            return load_measurement(path)
        except CostError as error:
            warnings.warn(f"The measurement in the cache is damaged and is made anew. {error}", stacklevel=2)
            return None

    def keep(self, key: Mapping[str, Any], measurement: Measurement | PipelineMeasurement) -> None:
        """Write a measurement; warns if that is impossible."""
        if not self._is_on:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_measurement(measurement, self.path(key))
        except OSError as error:
            warnings.warn(
                f"The measurement cannot be kept for the next run: {error}. Set PIPEBD_CACHE to a folder that can be "
                "written, or to nothing.",
                stacklevel=2,
            )


def as_measurement(costs: str | Path | CostTable | Measurement, num_rows: int) -> Measurement:
    """Make a measurement of what a user gave for `costs`.

    Args:
        costs: A file, a measurement, or a table alone, which is taken for one of `num_rows` rows.
        num_rows: Rows of the batch, for a table alone.
    """
    if isinstance(costs, Measurement):
        return costs
    if isinstance(costs, CostTable):
        return Measurement(costs=costs, num_rows=num_rows)
    loaded = load_measurement(costs)
    if isinstance(loaded, PipelineMeasurement):
        raise CostError(f"`costs` must be of blocks that learn by themselves, but {costs} is of a whole student.")
    return loaded


def _write_atomically(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
