"""The experiment description: what it accepts, what it refuses, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from fedlpp_ray import quantization
from fedlpp_ray.aggregation import ROBUST, RULES
from fedlpp_ray.config import (
    ConfigError,
    DownlinkConfig,
    Experiment,
    ServerConfig,
    TaskConfig,
    dump_experiment,
    load_experiment,
    parse_overrides,
)
from fedlpp_ray.tasks import registry

ROOT = Path(__file__).parents[2]


def refusal(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as error:
        Experiment().with_values(values)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora.rnk": 4}, ["lora.rnk", "unknown key", "rank, alpha", "did you mean 'rank'"]),
        ({"bogus": 1}, ["bogus", "unknown key", "method, model, task, generation, adapter, lora"]),
        ({"bogus.x": 1}, ["bogus", "unknown key"]),
        ({"lora.rank.x": 1}, ["lora.rank.x", "holds no keys"]),
        ({"lora.rank": "8"}, ["lora.rank", "valid integer", "'8'"]),
        ({"lora.rank": 8.5}, ["lora.rank", "8.5"]),
        ({"lora.rank": True}, ["lora.rank", "valid integer"]),
        ({"lora.rank": 0}, ["lora.rank", "greater than or equal to 1", "0"]),
        ({"lora.dropout": 1.0}, ["lora.dropout", "less than 1"]),
        ({"lora.targets": []}, ["lora.targets", "at least 1"]),
        ({"downlink.bits": 1}, ["downlink.bits", "'ternary', 2, 3", "32", "1"]),
        ({"downlink.bits": 9}, ["downlink.bits", "allowed", "9"]),
        ({"downlink.kind": "nf4"}, ["downlink.kind", "'nf-symmetric'", "'nf4'"]),
        ({"downlink.block": 4}, ["downlink.block", "8"]),
        ({"downlink.every": 0}, ["downlink.every", "greater than or equal to 1"]),
        ({"downlink.server_mask": 1.0}, ["downlink.server_mask", "less than 1"]),
        (
            {"downlink.every": 2, "downlink.client_mask": 0.1},
            ["downlink.every = 2", "every round", "do without downlink.client_mask = 0.1"],
        ),
        ({"client.base_bits": "ternary"}, ["client.base_bits", "allowed: 2, 3"]),
        ({"client.lr": float("nan")}, ["client.lr", "finite"]),
        ({"federation.client_fraction": 0.0}, ["client_fraction", "greater than 0"]),
        ({"federation.client_fraction": 1.5}, ["client_fraction", "less than or equal to 1"]),
        ({"federation.partition": "random"}, ["partition", "'iid', 'dirichlet'", "'natural'"]),
        ({"federation.cohort": 0}, ["federation.cohort", "greater than or equal to 1"]),
        (
            {"federation.cohort": 4, "federation.client_fraction": 0.5},
            ["federation.cohort = 4", "federation.client_fraction = 0.5", "set one to null"],
        ),
        ({"federation.cohort": 21}, ["federation.cohort = 21", "federation.clients = 20"]),
        (
            {"federation.local_steps": 4, "federation.local_epochs": 1},
            ["federation.local_steps = 4", "federation.local_epochs = 1", "set one to null"],
        ),
        (
            {"evaluation.utility": "bleu"},
            ["evaluation.utility = 'bleu' is not measured", "allowed: accuracy, macro_f1"],
        ),
        ({"method": "central"}, ["method: allowed: 'federated', 'centralised' or 'local-only'"]),
        ({"federation.sampling": "weighted"}, ["sampling", "'uniform' or 'examples'"]),
        ({"task.key_column": "user"}, ["task.key_column", "'trec'"]),
        ({"server.rule": "average"}, ["server.rule", "'residual', 'replace' or 'pull'"]),
        ({"runtime.client_gpus": 2.0}, ["runtime.client_gpus", "less than or equal to 1"]),
        ({"runtime.server_cpus": 0.0}, ["runtime.server_cpus", "greater than or equal to 0.001"]),
        ({"seed": -1}, ["seed", "greater than or equal to 0"]),
        ({"model.sha256": "abc"}, ["model.sha256", "abc"]),
        ({"lora": None}, ["lora: is a section"]),
        ({"lora": {"rank": 4}}, ["lora: is a section", "lora.x="]),
        ({"task.name": "classification"}, ["task.data is required"]),
        ({"task.data": "x.csv"}, ["task.data", "'classification'"]),
        ({"task.name": "generation"}, ["task.data is required", "'generation'"]),
        (
            {"task.name": "generation", "task.data": "x.csv", "task.prompt": "{a}"},
            ["task.target is required"],
        ),
        ({"task.name": "sst2", "task.prompt": "{a}"}, ["task.prompt", "'sst2'", "'generation'"]),
        ({"task.name": "e2e", "task.text_column": "mr"}, ["task.text_column", "'e2e'", "'rte'"]),
        ({"task.name": "botocore", "task.key_column": "x"}, ["task.key_column", "'dialogsum'"]),
        ({"task.held_out_split": "test"}, ["task.held_out_split", "'trec'", "'classification'"]),
        (
            {"task.name": "e2e", "task.train_split": "x", "task.held_out_split": "x"},
            ["task.held_out_split = 'x' is also task.train_split"],
        ),
    ],
)
def test_a_wrong_value_is_refused_naming_the_key_and_what_is_allowed(
    values: dict[str, object], words: list[str]
) -> None:
    message = refusal(values)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"client.base_bits": 3}, ["client.base_bits = 3", "4 (nf4), 8 (int8)"]),
        ({"client.base_bits": 4, "client.dequantize_at_load": True}, ["dequantize_at_load"]),
        ({"client.base_bits": 4, "client.base_block": 128}, ["base_block", "'packed'"]),
    ],
)
def test_impossible_combinations_are_refused(values: dict[str, object], words: list[str]) -> None:
    message = refusal({"client.base_format": "bitsandbytes"} | values)
    assert [word for word in words if word not in message] == []


def test_every_fault_is_reported_at_once() -> None:
    message = refusal({"lora.rank": 0, "downlink.bits": 9})
    assert "lora.rank" in message
    assert "downlink.bits" in message


def test_an_experiment_is_frozen() -> None:
    with pytest.raises(ValidationError):
        Experiment().lora.rank = 3  # type: ignore[misc]


def test_full_is_another_word_for_32_bits() -> None:
    experiment = Experiment().with_values({"downlink.bits": "full", "client.base_bits": "full"})
    assert (experiment.downlink.bits, experiment.client.base_bits) == (32, 32)


def test_the_cohort_is_the_rounded_fraction_and_never_empty() -> None:
    def size(fraction: float) -> int:
        return (
            Experiment()
            .with_values({"federation.clients": 10, "federation.client_fraction": fraction})
            .federation.cohort_size
        )

    assert [size(fraction) for fraction in (0.01, 0.26, 1.0)] == [1, 3, 10]


def test_the_cohort_may_be_a_count_and_is_a_fifth_where_nothing_is_said() -> None:
    experiment = Experiment().with_values({"federation.clients": 30})
    assert experiment.federation.cohort_size == 6
    counted = experiment.with_values({"federation.cohort": 30})
    assert counted.federation.cohort_size == 30
    back = {"federation.cohort": None, "federation.client_fraction": 0.1}
    assert counted.with_values(back).federation.cohort_size == 3


def test_a_task_is_classification_or_generation() -> None:
    names = get_args(TaskConfig.model_fields["name"].annotation)
    given = {"data": "x.csv", "prompt": "{a}", "target": "{b}"}
    needs = {"classification": {"data": "x.csv"}, "generation": given}
    kinds = {name: TaskConfig(name=name, **needs.get(name, {})).kind for name in names}
    labelled = {"trec", "classification", "sst2", "rte", "mrpc", "qqp", "qnli"}
    assert {name for name, kind in kinds.items() if kind == "classification"} == labelled
    assert set(kinds.values()) == {"classification", "generation"}


def test_a_template_on_a_command_line_wants_quotes_for_yaml() -> None:
    assert parse_overrides(['task.target="{b}"']) == {"task.target": "{b}"}
    message = refusal({"task.name": "generation"} | parse_overrides(["task.target={b}"]))
    assert "task.target" in message
    assert "valid string" in message


def test_overrides_are_yaml_values_and_1e_3_is_a_number() -> None:
    values = parse_overrides(["a=1e-3", "b=-2E5", "c=null", "d=[x, y]", "e=3", "f=ternary", "g="])
    assert values == {
        "a": 1e-3, "b": -2e5, "c": None, "d": ["x", "y"], "e": 3, "f": "ternary", "g": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["lora.rank"], "not of the form key=value"),
        (["=3"], "not of the form key=value"),
        (["a=1", "a=2"], "given twice"),
        (["a=[1"], "not YAML"),
    ],
)
def test_malformed_overrides_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_overrides(overrides)


def test_an_experiment_survives_its_own_yaml(tmp_path: Path) -> None:
    experiment = Experiment().with_values(
        {"lora.targets": ["query", "key"], "client.lr": 1e-5, "downlink.bits": "ternary"}
    )
    path = tmp_path / "x.yaml"
    path.write_text(dump_experiment(experiment, "A test", "python -m x"))
    assert path.read_text().startswith("# A test\n# Run it: python -m x\n")
    assert load_experiment(path) == experiment


def test_an_override_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("lora:\n  rank: 2\n")
    assert load_experiment(path, ["lora.rank=7"]).lora.rank == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora: {rank: 2, rank: 3}", "given twice: rank"),
        ("lora: [", "not YAML"),
        ("- lora", "must hold keys with values"),
        ("lora:\n  rnk: 2", "lora.rnk: unknown key"),
    ],
)
def test_a_malformed_file_is_refused_naming_it(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_experiment(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_experiment("nowhere.yaml")


def test_the_allowed_server_rules_are_those_that_exist() -> None:
    assert set(get_args(ServerConfig.model_fields["rule"].annotation)) == set(RULES)
    assert get_args(ServerConfig.model_fields["robust"].annotation) == ("none", *ROBUST)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_experiment_loads_and_says_how_to_run_it(path: Path) -> None:
    first, second, *_ = path.read_text().splitlines()
    assert first.startswith("# ")
    assert second == f"# Run it: python -m fedlpp_ray.train {path.relative_to(ROOT)}"
    load_experiment(path)


def test_the_allowed_names_are_those_that_exist() -> None:
    assert get_args(DownlinkConfig.model_fields["kind"].annotation) == get_args(quantization.Kind)
    assert get_args(DownlinkConfig.model_fields["scale"].annotation) == get_args(quantization.Scale)
    assert set(get_args(TaskConfig.model_fields["name"].annotation)) == set(registry._LOADERS)
