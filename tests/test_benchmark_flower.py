"""The comparison with Flower: what both sides are given, and what their rounds come to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.flower import processes, settings, table
from benchmarks.flower.app import task
from fedlpp_ray.config import FULL_PRECISION, Experiment
from fedlpp_ray.federation.data import FederatedText

ROW = table.Row(
    setting="a setting",
    base="32 bits",
    target=2.5,
    workers=2,
    cohort=30,
    flower=[9.0, 3.0, 3.0],
    ours=[1.5, 0.1, 1.5],
    arithmetic=(0.05, 0.04),
)


def test_the_ratio_is_of_medians_and_idle_workers_count_as_beyond_arithmetic() -> None:
    assert ROW.ratio == 2.0
    assert ROW.beyond == pytest.approx((3.0 * 2 / 30 - 0.05, 1.5 * 2 / 30 - 0.04))


def test_a_row_of_the_table() -> None:
    *_, line = table.markdown([ROW]).splitlines()
    cells = line.strip("| ").split(" | ")
    assert cells[:6] == ["a setting", "32 bits", "3.00", "1.50", "**2.00**", "2.5"]
    assert cells[6:] == ["0.050, 0.040", "0.150, 0.060"]


def test_the_parts_of_flowers_seconds_add_up_to_what_its_workers_were_held() -> None:
    client = {"returned": 4, "arithmetic": 1.0, "model": 0.5, "data": 0.25, "client": 2.0}
    parts = table.flower_parts([5.0, 7.0], [client, {**client, "model": 0.75}], workers=2)
    assert parts["model"] == pytest.approx(0.625)
    assert sum(parts.values()) == pytest.approx((5.0 + 7.0) / 2 * 2 / 4)
    head, _, line = table.parts_markdown({"x": parts}).splitlines()
    assert head.count("|") == line.count("|") == len(parts) + 2


def test_a_round_of_ours_is_without_its_evaluation() -> None:
    seconds = {"broadcast": 0.5, "train": 2.0, "aggregate": 0.25, "evaluate": 99.0, "total": 101.75}
    assert processes.round_seconds({"history": [{"seconds": seconds}]}) == [2.75]


@pytest.mark.parametrize("setting", settings.SETTINGS, ids=lambda setting: setting.name)
def test_both_sides_are_in_full_precision_but_for_the_base(setting: settings.Setting) -> None:
    for base in setting.bases:
        experiment = setting.experiment(base, rounds=3)
        assert experiment.downlink.bits == experiment.uplink.bits == FULL_PRECISION
        assert experiment.lora.rank == 8
        assert experiment.runtime.client_actors == settings.WORKERS
        assert experiment.runtime.threads == 1
        assert experiment.evaluation.every > experiment.federation.rounds == 3


def test_flower_gets_the_shares_and_tokens_that_our_clients_have(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings.Setting, "experiment", lambda *_, **__: tiny_experiment)
    config = settings.app_config(settings.SETTINGS[0], 2, tmp_path)
    text = FederatedText(tiny_experiment)
    assert config["labels"] == text.classes
    assert config["clients"] == len(task.load_shares(config["shares"])) == len(text.examples)
    for client in range(config["clients"]):
        found = task.load_data(client, config).dataset
        ours = [(ids.tolist(), label) for ids, label in text.client(client)]
        assert [(row["input_ids"], row["labels"]) for row in found] == ours


def test_a_client_that_fails_fails_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *_: Any) -> None:
        found = {"rounds": [1.0, 1.0], "clients": [{"returned": 3}, {"returned": 2}]}
        Path(command[-1]).write_text(json.dumps(found), encoding="utf-8")

    monkeypatch.setattr(processes, "_run", run)
    with pytest.raises(processes.ProcessError, match=r"of 3 .* \[3, 2\]"):
        processes.run_flower(Path("python"), {"cohort": 3, "rounds": 2}, tmp_path)


def test_a_process_that_fails_shows_the_end_of_its_output(tmp_path: Path) -> None:
    code = "import sys; print('\\n'.join(map(str, range(99)))); sys.exit(3)"
    with pytest.raises(processes.ProcessError, match="exit status 3") as caught:
        processes._run([sys.executable, "-c", code], tmp_path / "log", {})
    assert str(caught.value).endswith("97\n98")
    assert "\n5\n" not in str(caught.value)
