"""What the documentation shows is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlpp_ray import tune
from fedlpp_ray.aggregation import METHODS
from fedlpp_ray.config import Experiment, dump_experiment

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.slow
def test_the_example_of_ones_own_method_runs_in_a_search(
    tmp_path: Path,
    tiny_experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(
        r"```python\n# (\w+\.py)\n(.*?)```", (DOCS / "methods.md").read_text(), re.S
    )
    assert [name for name, _ in blocks] == ["clipped.py", "median.py", "space.py"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    values = {"federation.rounds": 1, "federation.local_steps": 2, "runtime.client_actors": 1}
    experiment = tiny_experiment.with_values(values)
    (tmp_path / "experiment.yaml").write_text(dump_experiment(experiment, "x", "x"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tune.main(["space.py", "--storage", "out"]) == 0
    told = capsys.readouterr().err
    assert "clipped:CLIPPED" in told
    assert "median:MEDIAN" in told


def test_every_method_is_in_the_table() -> None:
    text = (DOCS / "methods.md").read_text()
    files = {path.stem for path in (DOCS.parent / "configs" / "methods").glob("*.yaml")}
    for name in METHODS:
        assert f"| `{name}` | `{name.replace('-', '_')}.py` |" in text
        assert name.replace("-", "_") in files
