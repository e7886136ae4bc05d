"""The benchmarks' own arithmetic, and the tables that they make. No timings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from benchmarks import (
    arithmetic,
    distances,
    memory,
    methods,
    page,
    recovery,
    rounds,
    scale,
    startup,
    zero,
)
from benchmarks.bare import Loop
from fedlpp_ray import train
from fedlpp_ray.config import Experiment, dump_experiment
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.messages import MessageError
from fedlpp_ray.tasks import collate
from tests.federation.test_loop import run

ROOT = Path(__file__).parents[1]


def test_a_method_that_fails_keeps_its_row_with_the_reason(
    tiny_experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = tiny_experiment.with_values({"federation.rounds": 2})
    bad = good.with_values({"task.text_column": "gone"})
    for name, experiment in (("good", good), ("bad", bad)):
        (tmp_path / f"{name}.yaml").write_text(dump_experiment(experiment, name, "x"))
    monkeypatch.setattr(methods, "CONFIGS", tmp_path)
    works, fails = methods.measure(["good", "bad"], seeds=2)
    assert (works["method"], fails["method"]) == ("good", "bad")
    assert "gone" in fails["error"]
    assert set(works) == {"method", *methods.COLUMNS}
    last = [run(good.with_values({"seed": seed}))[-1].evaluation for seed in (0, 1)]
    servers = [found.server["utility"] for found in last if found and found.server]
    assert works["server"] == servers
    assert all(len(works[key]) == 2 and min(works[key]) > 0 for key in methods.COLUMNS)
    *_, first, second = methods.markdown([works, fails]).splitlines()
    assert first.startswith(f"| [`good`](configs/methods/good.yaml) | {mean(servers):.3f} ± ")
    assert first.count("|") == len(methods.COLUMNS) + 2
    assert second == f"| [`bad`](configs/methods/bad.yaml) | {fails['error']} |"


def test_what_is_not_measured_or_not_a_number_is_a_dash() -> None:
    row = {"method": "x", **{key: [None, math.nan] for key in methods.COLUMNS}}
    row |= {"floor": [None, 0.25, math.nan, 0.75], "MB up": [2_500_000]}
    line = methods.markdown([row]).splitlines()[-1]
    cells = dict(zip(methods.COLUMNS, line.strip("| ").split(" | ")[1:], strict=True))
    assert cells.pop("floor") == "0.500"
    assert cells.pop("MB up") == "2.50"
    assert set(cells.values()) == {"-"}


def test_the_table_is_replaced_between_its_marks_alone(tmp_path: Path) -> None:
    begin, end = page.marks("x")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    new = page.replaced(text, "x", "new")
    assert new == text.replace("old", "new")
    assert page.replaced(new, "x", "newer") == text.replace("old", "newer")
    with pytest.raises(ValueError, match="has no"):
        page.replaced(text, "y", "new")
    file = tmp_path / "page.md"
    file.write_text(text)
    page.write(file, "x", "new")
    assert file.read_text() == new


def test_the_page_has_a_place_for_every_table() -> None:
    text = page.README.read_text(encoding="utf-8")
    modules = (arithmetic, memory, recovery, rounds, scale, startup, zero)
    names = [rounds.NAME_GPU, *(module.NAME for module in modules)]
    names += [f"benchmarks.{name}" for name in ("flower", "federation", "base", "quantizer")]
    for name in names:
        assert page.replaced(text, name, "new") != text
        assert f"`python -m {name}" in text
    assert page.replaced((ROOT / "README.md").read_text("utf-8"), methods.NAME, "new")
    targets = (ROOT / "Makefile").read_text("utf-8")
    (line,) = (line for line in targets.splitlines() if line.startswith("BENCHMARKS :="))
    assert {f"benchmarks.{name}" for name in line.split()[2:]} == {m.NAME for m in modules}


def test_the_bare_loop_makes_the_steps_of_the_clients(
    tiny_experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches are those of `Training`, and each client begins at the same adapter."""
    experiment = tiny_experiment.with_values(
        {"federation.client_fraction": None, "federation.cohort": 3}
    )
    loops = [Loop(experiment, worker, 2, "ours") for worker in range(2)]
    assert [len(loop._shares[1]) for loop in loops] == [2, 1]
    loop, number = loops[0], 2
    client = loop._shares[number][0]
    seen: list[list[list[int]]] = []

    def note(chosen: Sequence[Any], pad: int) -> Any:
        seen.append([x.reshape(-1).tolist() for x, _ in chosen])
        return collate(chosen, pad)

    monkeypatch.setattr("fedlpp_ray.tasks.collate", note)
    monkeypatch.setattr("fedlpp_ray.training.local.collate", note)
    list(loop._batches(number, client))
    bare, seen = seen, []
    broadcast = InProcess(experiment).encode_broadcast(number, [client])
    ClientHost(experiment).train(number, client, broadcast)
    assert bare == seen
    assert len(bare) == 4
    before = [tensor.clone() for tensor in loop._initial]
    torch.manual_seed(0)  # of dropout
    tokens = loop.round(number)
    trained = [parameter.detach().clone() for parameter in loop._trained]
    assert tokens > 0
    torch.manual_seed(0)
    assert loop.round(number) == tokens
    assert all(map(torch.equal, trained, (p.detach() for p in loop._trained)))
    assert all(map(torch.equal, before, loop._initial))
    assert not all(map(torch.equal, before, trained))


def test_a_ratio_is_of_medians_and_what_is_beyond_is_a_workers() -> None:
    setting = rounds.Setting("x", "c.yaml", (), 2, 1.05)
    row = rounds.Row(setting, 4, ours=[2.0, 9.0, 2.2], bare=[2.0, 1.0, 2.1], tokens=100)
    assert row.ratio == pytest.approx(1.1)
    assert row.beyond == pytest.approx(0.1)
    assert "| **1.100** | at most 1.05 | 100.0 |" in rounds.markdown([row])
    assert "| 50 | 45 | **0.909** |" in rounds.gpu_markdown([row])


def test_every_setting_of_the_rounds_is_an_experiment() -> None:
    for setting in rounds.cpu_settings():
        experiment = setting.experiment(3)
        assert experiment.federation.rounds == 4
        assert experiment.runtime.client_actors == setting.workers
    keys = ["seed=7", "client.batch_size=3"]  # in the place of its own
    packed = [setting.experiment(3) for setting in rounds.gpu_settings(keys)]
    assert {each.client.batch_size for each in packed} == {3}
    assert [each.runtime.client_actors for each in packed] == [1, 2, 4]
    assert [each.runtime.client_gpus for each in packed] == [1, 0.5, 0.25]
    assert {(each.client.base_format, each.seed) for each in packed} == {("bitsandbytes", 7)}


def test_a_synthetic_round_is_taken_through_the_servers_own_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "WIDTH", 64)
    monkeypatch.setattr(scale, "FIRST", 10)
    made = scale.make(2, 3, tmp_path)
    aggregator = scale._open(2, 3, (tmp_path / "broadcast").read_bytes())
    for client in (12, 10, 11):
        assert scale._receive_one(aggregator, tmp_path / "update", client) > 0
    assert aggregator.clients == [10, 11, 12]
    with pytest.raises(MessageError, match="has returned before"):
        scale._receive_one(aggregator, tmp_path / "update", 11)
    found = scale.receive(2, 3, tmp_path)
    row = {"size": 2, "cohort": 3, **made, **found}
    assert scale.markdown([row], []).count("| 2 | 3 |") == 1


def test_a_fault_is_read_from_when_things_happened() -> None:
    log = recovery.Log(
        struck=10.0, accepted=[1.0, 9.9, 12.5, 13.0], rounds=[3.0, 5.0, 8.0, 14.0, 16.0]
    )
    assert log.fault() == recovery.Fault(after=2.5, round=6.0, usual=2.5)
    assert "| x | **2.5** | 2.5 | 6.0 | 2.4 |" in recovery.markdown({"x": [log.fault()]})


def test_a_later_trial_begins_where_the_one_before_it_in_its_process_ends() -> None:
    reports = [
        startup.Report("a", 1, at=110.0, took=2.0),
        startup.Report("b", 2, at=111.0, took=2.0),
        startup.Report("a", 1, at=112.0, took=2.0),
        startup.Report("c", 1, at=115.0, took=2.0),
        startup.Report("c", 1, at=117.0, took=2.0),
    ]
    found = startup.trials(reports, begin=100.0)
    assert found == [
        startup.Row("a", first=True, start_up=8.0, wall=12.0),
        startup.Row("b", first=True, start_up=9.0, wall=11.0),
        startup.Row("c", first=False, start_up=1.0, wall=5.0),
    ]
    assert found[2].share == pytest.approx(0.2)
    assert "Of all trials' wall time: **64.3%**" in startup.markdown(found)


def test_the_line_of_a_spread_servers_memory_is_through_the_spread_rows_alone() -> None:
    rows = [{"server": "one actor", "ranks": 1, "size": 1000, "bare": 1, "load": 5}]
    rows += [
        {"server": "ZeRO-3", "ranks": n, "size": 1000, "bare": 1, "load": 2000 / n + 300}
        for n in (1, 2, 4)
    ]
    assert zero.fit(rows, "load") == pytest.approx((2.0, 300.0))


def test_distances_are_of_what_is_sent_and_of_products_which_no_gauge_changes() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = {"a.lora_A.weight": (2, 5), "a.lora_B.weight": (3, 2), "head.weight": (4, 3)}
    server = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    further = {name: 1.1 * tensor for name, tensor in server.items()}
    assert distances.of_weights(further, server) == pytest.approx(0.1)
    assert distances.of_products(further, server) == pytest.approx(0.21)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=random))[0]
    turned = server | {
        "a.lora_A.weight": turn.T @ server["a.lora_A.weight"],
        "a.lora_B.weight": server["a.lora_B.weight"] @ turn,
    }
    assert distances.of_weights(turned, server) > 0.1
    assert distances.of_products(turned, server) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bits", [32, 2])
def test_the_last_broadcast_of_full_precision_is_the_server(
    bits: int,
    tiny_experiment: Experiment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment = tiny_experiment.with_values({"downlink.bits": bits})
    (tmp_path / "x.yaml").write_text(dump_experiment(experiment, "x", "x"), encoding="utf-8")
    options = ["--output", str(tmp_path / "run"), "--in-process"]
    assert train.main([str(tmp_path / "x.yaml"), *options]) == 0
    assert distances.main([str(tmp_path / "run"), "adversary.architecture=unknown"]) == 2
    assert "by name; allowed: known" in capsys.readouterr().err
    asked = [str(tmp_path / "run"), "adversary.colluders=8", "--attacks", "followed"]
    assert distances.main(asked) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| followed | 0.000 | 0.000 |"]
    assert distances.main([str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {name: x for name, *x in (line.strip("| ").split(" | ") for line in lines)}
    assert {"last-broadcast", "mean-products", "interval"} <= cells.keys()
    assert not {"after-training", "distilled"} & cells.keys()
    if bits == 32:
        assert cells["last-broadcast"] == ["0.000", "0.000"]
    else:
        assert min(map(float, cells["last-broadcast"])) > 0.1
