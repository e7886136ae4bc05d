"""Search spaces: what a file must say, which trials it gives, and what is refused at once."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.search.variant_generator import generate_variants

from fedlpp_ray.config import ConfigError, dump_experiment
from fedlpp_ray.config.schema import Experiment
from fedlpp_ray.federation.combinations import check_combinations
from fedlpp_ray.runtime.space import SearchSpace, load_space
from fedlpp_ray.runtime.variants import values_of

ROOT = Path(__file__).parents[2]
OPTUNA = (
    "from ray.tune.search.optuna import OptunaSearch\n"
    "search = OptunaSearch(metric='protection', mode='max')\n"
)
HEADER = "from ray import tune\nbase = 'base.yaml'\nobjectives = {'protection': 'max'}\n"


@pytest.fixture
def write(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(dump_experiment(Experiment(), "base", "x"))

    def write(body: str, header: str = HEADER) -> Path:
        path = tmp_path / "space.py"
        path.write_text(header + body)
        return path

    return write


@pytest.mark.parametrize(
    "path", sorted((ROOT / "search_spaces").glob("*.py")), ids=lambda path: path.name
)
def test_every_shipped_search_space_gives_valid_trials(path: Path) -> None:
    space = load_space(path)
    assert len(space.drawn) == space.total >= 8
    assert {"downlink.bits", "lora.rank", "federation.client_fraction"} <= set(space.keys)
    assert f"python -m fedlpp_ray.tune search_spaces/{path.name}" in path.read_text()


def pairs(space: SearchSpace) -> Iterator[dict[str, Any]]:
    """Constants, and every pair of values of two searched keys."""
    constant = {k: v for k, v in space.param_space.items() if k not in space.keys}
    for one, other in combinations(space.keys, 2):
        domains = (space.param_space[one].categories, space.param_space[other].categories)
        for values in product(*domains):
            yield constant | dict(zip((one, other), values, strict=True))


def test_what_optuna_may_choose_is_valid_and_goes_together() -> None:
    """What is refused is refused of one key or of two; all of it, so that no trial is lost."""
    space = load_space(ROOT / "search_spaces" / "privacy_pareto.py")
    known = {len(space.param_space[key].categories) for key in space.keys}
    assert min(known) >= 2
    for config in pairs(space):
        check_combinations(space.variants.experiment(config))


def test_the_shipped_search_follows_seed_and_rounds() -> None:
    path = ROOT / "search_spaces" / "privacy_pareto.py"
    space = load_space(path, ["federation.rounds=3", "seed=5"])
    search, stop = space.tune_config.search_alg, space.tune_config.scheduler
    assert (search._seed, stop._max_t) == (5, 3)
    assert search.metric == list(space.objectives)


BUNDLES = (
    "bundles = {'lora.rank': {2: {'lora.rank': 2, 'lora.alpha': 4}, 4: {'lora.rank': 4, "
    "'lora.alpha': 8}}, 'defence': {'none': {}, 'turn': {'downlink.rotate': 'round'}}}\n"
    "param_space = {'lora.rank': tune.grid_search([2, 4]), "
    "'defence': tune.grid_search(['none', 'turn']), 'evaluation.every': 2}\n"
)


def test_a_bundle_is_searched_by_name_and_sets_its_keys(write) -> None:
    space = load_space(write(BUNDLES))
    assert space.keys == ["lora.rank", "defence"]
    assert {(t["lora.rank"], t["defence"]) for t in space.trials or []} == set(
        product((2, 4), ("none", "turn"))
    )
    found = {(e.lora.rank, e.lora.alpha, e.downlink.rotate) for e in space.drawn}
    assert found == {(r, 2 * r, turn) for r in (2, 4) for turn in ("none", "round")}
    copied = pickle.loads(pickle.dumps(space.variants))  # as trials and a restored sweep get it
    trial = {"trial": 3, "lora.rank": 4, "defence": "turn"}
    assert copied.experiment(trial) == space.variants.experiment(trial)


@pytest.mark.parametrize(
    ("overrides", "keys", "found"),
    [
        (["lora.rank=4"], ["defence"], {(4, 8, "none"), (4, 8, "round")}),  # the bundle's choice
        (["lora.rank=3"], ["defence"], {(3, 16, "none"), (3, 16, "round")}),  # the key
        (["defence=turn"], ["lora.rank"], {(2, 4, "round"), (4, 8, "round")}),
        (["downlink.rotate=client"], ["lora.rank"], {(2, 4, "client"), (4, 8, "client")}),
        (["lora.alpha=1"], ["lora.rank", "defence"], {(2, 1, "none"), (4, 1, "round")}),
    ],
)
def test_an_override_goes_before_a_bundle(
    write, overrides: list[str], keys: list[str], found: set[tuple[object, ...]]
) -> None:
    space = load_space(write(BUNDLES), overrides)
    assert space.keys == keys
    assert found <= {(e.lora.rank, e.lora.alpha, e.downlink.rotate) for e in space.drawn}


def test_settings_of_a_search_may_follow_the_base(write) -> None:
    path = write(
        "param_space = {'client.lr': tune.loguniform(1e-5, 1e-1)}\n"
        "def tune_config(base):\n    return tune.TuneConfig(num_samples=base.federation.rounds)"
    )
    assert load_space(path, ["federation.rounds=7"]).total == 7


def test_a_search_without_optuna_names_the_extra(write, monkeypatch: pytest.MonkeyPatch) -> None:
    search = "from ray.tune.search.optuna import OptunaSearch\n"
    paths = ("import optuna", search + "OptunaSearch(metric='floor', mode='max')")
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr("ray.tune.search.optuna.optuna_search.ot", None)
    monkeypatch.setattr("fedlpp_ray.runtime.space.find_spec", lambda name: None)
    for body in paths:
        with pytest.raises(
            ConfigError, match=r"space.py needs: pip install 'fedlpp_ray\[search\]'$"
        ):
            load_space(write(body))


def test_a_grid_gives_its_product_and_constants_do_not_vary(write) -> None:
    space = load_space(
        write(
            "param_space = {'lora.rank': tune.grid_search([2, 4]), 'downlink.bits': "
            "tune.grid_search(['ternary', 8]), 'evaluation.every': 3}"
        )
    )
    assert space.keys == ["lora.rank", "downlink.bits"]
    trials = {(e.lora.rank, e.downlink.bits, e.evaluation.every) for e in space.drawn}
    assert trials == {(r, b, 3) for r in (2, 4) for b in ("ternary", 8)}


def test_tune_gets_the_same_trials_lists_and_all(write) -> None:
    """Tune takes a list among `points_to_evaluate` apart; a grid over numbers it leaves alone."""
    space = load_space(
        write(
            "param_space = {'lora.targets': tune.grid_search([['query'], ['query', 'value']]), "
            "'evaluation.utility': tune.choice([None, 'accuracy']), 'client.lr': 1e-3}\n"
            "tune_config = tune.TuneConfig(num_samples=2)"
        )
    )
    configs = [spec["config"] for _, spec in generate_variants({"config": space.tuner_space})]
    assert [values_of(config) for config in configs] == space.trials
    assert [config["trial"] for config in configs] == [0, 1, 2, 3]


def test_samplers_are_drawn_from_the_seed(write) -> None:
    path = write(
        "param_space = {'client.lr': tune.loguniform(1e-5, 1e-1)}\n"
        "tune_config = tune.TuneConfig(num_samples=5)"
    )
    one, same, other = (load_space(path, o).trials for o in ([], [], ["seed=1"]))
    assert one == same != other
    assert len({trial["client.lr"] for trial in one or []}) == 5


def test_an_override_fixes_a_searched_key_and_max_trials_limits(write) -> None:
    path = write(
        "param_space = {'lora.rank': tune.grid_search([2, 4]), "
        "'downlink.bits': tune.grid_search([2, 3, 4])}"
    )
    space = load_space(path, ["lora.rank=16"], max_trials=2)
    assert space.keys == ["downlink.bits"]
    assert [e.lora.rank for e in space.drawn] == [16, 16]
    names = {load_space(path, ["lora.rank=16"], n).name for n in (2, 2, 3)}
    assert len(names) == 2  # another sweep, another name


def test_a_searcher_is_left_to_choose(write) -> None:
    path = write(
        OPTUNA + "param_space = {'client.lr': tune.loguniform(1e-5, 1e-1)}\n"
        "tune_config = tune.TuneConfig(num_samples=9, search_alg=search)"
    )
    space = load_space(path, max_trials=4)
    assert space.trials is None
    assert (space.total, len(space.drawn)) == (4, 4)
    assert {e.client.lr for e in space.drawn}.isdisjoint({space.base.client.lr})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "must define 'param_space', a dict"),
        ("param_space = {'lora.rnk': tune.grid_search([2])}", "lora.rnk: unknown key.*'rank'"),
        ("param_space = {'lora.rank': tune.grid_search([2, 0])}", "lora.rank: must be greater"),
        ("param_space = {'lora.rank': 4}", "varies nothing"),
        (
            "param_space = {'client.base_bits': tune.grid_search([4, 3]), "
            "'client.base_format': 'bitsandbytes'}",
            r"client.base_bits = 3 does not exist",
        ),
        (
            "param_space = {'lora.rank': tune.grid_search([2])}\nobjectives = {'x': 'up'}",
            "no trial reports 'x'; allowed: server/utility",
        ),
        (
            "param_space = {'lora.rank': tune.grid_search([2])}\nobjectives = {'floor': 'up'}",
            "objectives: floor: allowed: 'max', 'min'",
        ),
        (
            "param_space = {'lora.rank': tune.grid_search([2])}\nobjectives = {}",
            "objectives: name at least one; allowed: server/utility",
        ),
        (
            "param_space = {'lora.rank': tune.grid_search([2])}\ntune_config = 3",
            "tune_config must be",
        ),
        ("param_space = {'lora.rank': tune.grid_search([2])}\nbase = 'gone.yaml'", "no such file"),
        ("param_space = {'lora': {'rank': tune.grid_search([2, 4])}}", "lora: is a section"),
        (
            "param_space = {'client.lr': tune.uniform(0.1, 1)}\n"
            "tune_config = tune.TuneConfig(num_samples=-1)",
            "num_samples = -1: must be at least 1",
        ),
        ("param_space = (", "space.py: SyntaxError"),
        (
            BUNDLES.replace("{'none': {}", "{'none': 1"),
            "bundles must be dicts of keys by choice by name",
        ),
        (BUNDLES + "del param_space['defence']", "param_space does not search 'defence'"),
        (
            BUNDLES + "bundles['defence']['none'] = {'lora.alpha': 3}",
            "bundles: lora.alpha is set by 'defence' and by 'lora.rank'",
        ),
        (
            BUNDLES + "param_space['downlink.rotate'] = 'client'",
            "downlink.rotate is set by 'defence' and by 'downlink.rotate'",
        ),
        (
            BUNDLES + "param_space['defence'] = tune.grid_search(['none', 'turned'])",
            "defence: turned is not in its bundle; allowed: none, turn",
        ),
        (
            BUNDLES + "bundles['defence']['turn'] = {'downlink.rotat': 'round'}",
            "downlink.rotat: unknown key",
        ),
        (
            "param_space = {'lora.rank': tune.grid_search([2])}\n"
            "def tune_config(base):\n    return base.no_such_key",
            "space.py: AttributeError: .*no_such_key",
        ),
        (
            "from ray.tune.schedulers import ASHAScheduler\n"
            "param_space = {'lora.rank': tune.grid_search([2])}\n"
            "tune_config = tune.TuneConfig(scheduler=ASHAScheduler(metric='server/acc', "
            "mode='max'))",
            "tune_config.scheduler: no trial reports 'server/acc'; allowed: server/utility",
        ),
        (
            "from ray.tune.search.optuna import OptunaSearch\n"
            "param_space = {'lora.rank': tune.randint(1, 3)}\n"
            "tune_config = tune.TuneConfig(search_alg=OptunaSearch(metric=['floor', 'x'], "
            "mode=['max', 'max']))",
            "tune_config.search_alg: no trial reports 'x'",
        ),
        ("import no_such_module", "space.py: ModuleNotFoundError: .*no_such_module"),
        (
            OPTUNA + "param_space = {'lora.rnk': tune.randint(1, 3)}\n"
            "tune_config = tune.TuneConfig(search_alg=search)",
            "lora.rnk: unknown key",
        ),
        (
            OPTUNA + "param_space = {'lora.rank': tune.randint(1, 3)}\n"
            "tune_config = tune.TuneConfig(num_samples=-1, search_alg=search)",
            "num_samples = -1: must be at least 1",
        ),
        (
            OPTUNA + "param_space = {'lora.rank': tune.grid_search([1, 3])}\n"
            "tune_config = tune.TuneConfig(search_alg=search)",
            "lora.rank: a searcher chooses and has no grid; allowed: tune.choice",
        ),
        (
            OPTUNA + "param_space = {'lora.rank': tune.qlograndint(1, 20, 2)}\n"
            "tune_config = tune.TuneConfig(search_alg=search)",
            "space.py: ValueError: .*only accept step is 1",
        ),
        (
            OPTUNA + "param_space = {'lora.rank': tune.randint(1, 3)}\n"
            "tune_config = tune.TuneConfig(search_alg=OptunaSearch())",
            "tune_config.search_alg: needs a metric and a mode",
        ),
        (
            "from ray.tune.search.basic_variant import BasicVariantGenerator\n"
            "param_space = {'lora.rank': tune.grid_search([1, 3])}\n"
            "tune_config = tune.TuneConfig(search_alg=BasicVariantGenerator(max_concurrent=2))",
            "tune_config.search_alg: must be a ray.tune.search.Searcher",
        ),
        (
            "from ray.tune.schedulers import ASHAScheduler\n"
            "param_space = {'lora.rank': tune.grid_search([1, 3])}\n"
            "tune_config = tune.TuneConfig(scheduler=ASHAScheduler(max_t=10))",
            "tune_config.scheduler: needs a metric and a mode",
        ),
        *(
            (BUNDLES.replace("'defence'", repr(name)), f"bundles: '{name}' is a column of a sweep")
            for name in ("trial", "status", "protection", "floor", "round", "error")
        ),
    ],
)
def test_a_wrong_space_is_refused(write, body: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_space(write(body))


SEARCH = "param_space = {'lora.rank': tune.grid_search([2])}\n"


@pytest.mark.parametrize(
    ("values", "objective"),
    [
        ({"task.name": "dart", "generation.examples": 0}, "server/bleu"),
        ({"method": "local-only"}, "server/utility"),
        ({"method": "centralised"}, "client_before/utility"),
        ({"evaluation.server": False}, "server/utility"),
    ],
)
def test_an_objective_that_no_trial_reports_is_refused(
    write, values: dict[str, object], objective: str
) -> None:
    body = SEARCH + f"objectives = {{{objective!r}: 'max'}}"
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    with pytest.raises(ConfigError, match=f"no trial reports '{objective}'; allowed: "):
        load_space(write(body), overrides)


def test_an_objective_may_be_that_of_some_trials_alone(write) -> None:
    both = "param_space = {'method': tune.grid_search(['federated', 'local-only'])}\n"
    path = write(both + "objectives = {'server/utility': 'max'}")
    assert load_space(path).objectives == {"server/utility": "max"}


def test_other_refusals(write, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_space(tmp_path / "gone.py")
    with pytest.raises(ConfigError, match="--max-trials 0"):
        load_space(write("param_space = {'lora.rank': tune.grid_search([2])}"), max_trials=0)
    assert tune  # the file's own import is what a user writes
