"""The documentation as pages: each is reachable, and its pictures are drawn from what the package does today."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_pipebd
from tests.helpers.scripts import run_script

DOCS = Path(lightning_pipebd.__file__).parents[1] / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.md"))

_TOCTREE = re.compile(r"^```\{toctree\}\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_PICTURE = re.compile(r"^```\{picture\} (?P<name>\w+)\n(?P<options>(?::.+\n)*)", re.MULTILINE)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "figures", module)
    spec.loader.exec_module(module)
    return module


def step_times(figure: Any) -> list[float]:
    """Give the times that the titles of a picture's drawing areas name."""
    titles = [area.get_title(loc="left") for area in figure.axes]
    return [float(match[1]) for title in titles if (match := re.search(r"([\d.]+) ms per batch", title))]


def test_every_page_is_listed_once_in_the_table_of_contents() -> None:
    bodies = [match["body"] for match in _TOCTREE.finditer((DOCS / "index.md").read_text(encoding="utf-8"))]
    listed = [line for body in bodies for line in body.splitlines() if line and not line.startswith(":")]
    assert sorted([*listed, "index"]) == PAGES


@pytest.mark.spawn
@pytest.mark.slow
def test_the_tutorial_s_files_pass_the_command_that_it_shows(tmp_path: Path) -> None:
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    (module,), (configuration,) = (
        re.findall(rf"^```{kind}\n(.*?)^```$", text, re.M | re.S) for kind in ("python", "yaml")
    )
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "mine.yaml").write_text(configuration)
    output = run_script(["-m", "lightning_pipebd", "check", "--config", "mine.yaml"], {}, folder=tmp_path)
    assert f"```text\n{output}```" in text


def test_pages_show_every_picture_and_say_what_is_on_it(figures: ModuleType) -> None:
    shown = [match for page in PAGES for match in _PICTURE.finditer((DOCS / f"{page}.md").read_text(encoding="utf-8"))]
    assert {match["name"] for match in shown} == set(figures.PICTURES)
    assert [match["name"] for match in shown if ":alt: " not in match["options"]] == []


def test_pictures_name_the_step_times_that_their_pages_explain(figures: ModuleType) -> None:
    theme = figures.THEMES["light"]
    assert step_times(figures.relay(theme)) == [16, 4]
    assert step_times(figures.decoupling(theme)) == [6, 4]
    assert step_times(figures.worked(theme)) == [14, 13, 13.5]


def test_the_measured_picture_is_of_a_run_that_took_about_what_was_predicted(figures: ModuleType) -> None:
    figure = figures.measured(figures.THEMES["light"])
    predicted, real = step_times(figure)
    assert predicted == 10 * 13
    assert real == pytest.approx(predicted, rel=0.1)
    assert f"measured {real:.0f};" in (DOCS / "planning.md").read_text(encoding="utf-8")
    labels = [[text.get_text() for text in area.texts] for area in figure.axes]
    assert [sorted(set(line)) for line in labels] == [["S0", "S1", "S2", "S3", "T0", "T1", "T2", "T3"]] * 2


def test_the_readme_s_ratios_are_those_of_the_benchmark() -> None:
    report = (DOCS.parent / "benchmarks/baselines/README.md").read_text(encoding="utf-8").split("**vgg**")[1]
    table = re.findall(r"^\| ([^|]+?)(?: \*)? \| [\d.]+ \([^|]+ \| (\d\.\d\d) \(", report, re.M)
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8").split("## Measured")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!\*)([^|]+?) \| (\d.+) \|$", readme, re.M)
    assert len(rows) == 5
    for name, numbers in rows:
        assert re.findall(r"[\d.]+", numbers) == [ratio for variant, ratio in table if variant == name]


def test_block_after_block_teaches_ten_blocks_and_once_for_all_teaches_four(figures: ModuleType) -> None:
    separate, together = figures.redundancy(figures.THEMES["light"]).axes
    labels = [[text.get_text() for text in area.texts] for area in (separate, together)]
    assert [sum(label.startswith("T") for label in line) for line in labels] == [10, 4]
    assert [sum(label.startswith("S") for label in line) for line in labels] == [4, 4]


def test_a_picture_is_the_same_file_when_it_is_drawn_again(
    figures: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "PICTURES", {"redundancy": figures.redundancy})
    for folder in ("first", "second"):
        figures.draw_all(tmp_path / folder)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [
        "redundancy_dark.svg",
        "redundancy_light.svg",
    ]
    for name in ("redundancy_dark.svg", "redundancy_light.svg"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
