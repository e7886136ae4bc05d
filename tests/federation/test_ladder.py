"""The attack ladder on real, tiny runs: it sees what the adversary saw, and nothing else."""

from __future__ import annotations

import csv
import gc
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation import Federation, RoundRecord
from fedlpp_ray.federation.combinations import check_combinations
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.ladder import Ladder, Outcome, check_adversary, strongest
from fedlpp_ray.federation.means import attacks_of, means_of
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy.attacks import ATTACKS, Known, feasible, find_attacks
from fedlpp_ray.privacy.view import View, ViewError
from fedlpp_ray.state import State
from fedlpp_ray.tasks import IGNORED, evaluation_batches
from fedlpp_ray.training import opinions
from tests import tiny

COARSE = {"downlink.bits": 2, "client.base_bits": 4}


class Run:
    """A finished run, and what it sent."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.sent: dict[int, Broadcast] = {}
        federation = Federation(experiment, InProcess(experiment), self.sent.__setitem__)
        self.history: list[RoundRecord] = list(federation.run())
        made = federation.final and safetensors.torch.load(
            federation.final.adapter["adapter_model.safetensors"]
        )
        self.final: State | None = made or None
        self.state: State = safetensors.torch.load(
            federation.backend.adapter()["adapter_model.safetensors"]
        )

    def ladder(self, **values: Any) -> Ladder:
        keys = {f"adversary.{key}": value for key, value in values.items()}
        return Ladder(self.experiment.with_values(keys), self.sent, self.history)


@pytest.fixture(scope="module")
def run(tiny_experiment: Experiment) -> Run:
    return Run(tiny_experiment.with_values(COARSE))


def by_name(found: list[Outcome]) -> dict[str, Outcome]:
    return {each.name: each for each in found}


def test_all_broadcasts_are_kept_the_first_and_that_of_the_final_state_too(run: Run) -> None:
    assert list(run.sent) == [1, 2, 3, 4]


def test_the_ladder_meets_what_the_run_itself_measured(run: Run) -> None:
    names = ["last-broadcast", "after-training", "pooled-updates"]
    found = by_name(list(run.ladder().run(find_attacks(names))))
    last = run.history[-1].evaluation
    assert last is not None
    assert found["last-broadcast"].metrics == last.client_before
    assert found["after-training"].metrics == last.client_after
    assert found["pooled-updates"].metrics == last.client_after  # one client's mean is itself
    assert {each.broadcasts for each in found.values()} == {4}


@pytest.mark.slow
def test_of_clients_that_compute_in_bf16_too(tiny_experiment: Experiment) -> None:
    values = {"client.compute": "bf16", "client.lr": 3e-2, "federation.rounds": 2}
    half = Run(tiny_experiment.with_values(values))
    found = by_name(list(half.ladder().run(find_attacks(["last-broadcast", "after-training"]))))
    last = half.history[-1].evaluation
    assert last is not None
    assert found["last-broadcast"].metrics == last.client_before
    assert found["after-training"].metrics == last.client_after
    assert found["last-broadcast on W0"].metrics != last.client_before


@pytest.mark.parametrize("ranks", [[2, 4], [4, 2]])
def test_colluders_of_several_ranks_read_the_messages_of_all_and_the_highest_last(
    tiny_experiment: Experiment, ranks: list[int]
) -> None:
    """A message of a lower rank says of the rest what was known before."""
    values = {"lora.client_ranks": ranks, "server.aggregation": "flexlora", "downlink.bits": 4}
    mixed = Run(tiny_experiment.with_values({"federation.rounds": 2, **values}))
    ladder = mixed.ladder(colluders=4)
    received = ladder.view.received
    assert [each.made for each in received] == [1, 1, 2, 2, 3, 3]
    assert [mixed.experiment.lora.rank_of(each.client) for each in received] == [2, 4] * 3
    curve = ladder.curve(feasible(ATTACKS, ladder.view.tools.means)[0], 2)
    assert [(each.round, each.broadcasts) for each in curve] == [(1, 4), (2, 6)]
    high, low = received[3], received[4]
    name = next(name for name in low.state if "lora_A" in name)
    assert torch.equal(low.state[name][2:], high.state[name][2:])
    assert not torch.equal(low.state[name][:2], high.state[name][:2])
    assert low.masked is not None
    assert not low.masked[name][2:].any()
    assert high.masked is None
    least, most = low.cells[name]
    assert ((least <= received[5].state[name]) | (received[5].cells[name][1] < least)).any()
    assert torch.isinf(least[2:]).all()
    assert torch.isfinite(most[:2]).all()


@pytest.mark.parametrize(("every", "most"), [(1, 1e-6), (3, 0.6)])
def test_who_knows_that_the_final_model_is_a_mean_has_it_as_often_as_there_are_broadcasts(
    tiny_experiment: Experiment, every: int, most: float
) -> None:
    """`most`: its distance to that model in that of the newest broadcast."""
    values = {"federation.rounds": 9, "federation.local_steps": 2, "downlink.bits": 32}
    values |= {"server.final_average": 4, "downlink.every": every, "adversary.watch": []}
    own = Run(tiny_experiment.with_values(values))
    view = own.ladder().view
    assert own.final is not None
    final = {name: own.final[name] for name in view.last.state}
    found = ATTACKS["mean-final"].attack(view)
    assert off(found, final) < most * off(view.last.state, final)


@pytest.mark.parametrize("key", ["downlink.server_mask", "downlink.client_mask"])
def test_a_client_with_a_mask_trains_the_columns_that_it_has(
    tiny_experiment: Experiment, key: str
) -> None:
    masked = Run(
        tiny_experiment.with_values({"federation.rounds": 2, "downlink.bits": 8, key: 0.25})
    )
    for hidden in ("known", "unknown"):
        ladder = masked.ladder(architecture=hidden)
        found = by_name(list(ladder.run(find_attacks(["after-training", "pooled-updates"]))))
        last = masked.history[-1].evaluation
        assert last is not None
        assert found["after-training"].metrics == last.client_after
        assert found["pooled-updates"].metrics == last.client_after


@pytest.mark.parametrize("key", ["downlink.server_mask", "downlink.client_mask"])
def test_who_knows_of_a_mask_takes_it_off(tiny_experiment: Experiment, key: str) -> None:
    """Nothing is trained, so S is what the seed made: off only in columns that came, by rounding.

    As it came it is off by the mask's factor, and by the columns that it lacks.
    """
    keys = {"client.lr": 1e-12, "client.weight_decay": 0.0, "downlink.bits": 8, "seed": 3}
    masked = Run(tiny_experiment.with_values(keys | {key: 0.25}))
    view = masked.ladder(colluders=8).view
    initial = masked.ladder()._bench.initial
    name = next(name for name in view.last.state if "lora_A" in name)
    secret = initial[name]
    assert float((view.last.start[name] - secret).norm() / secret.norm()) > 0.5
    for attack in ("unmasked-broadcast", "mean-factors", "trend", "interval", "intersection"):
        found = ATTACKS[attack].attack(view)[name]
        assert float((found - secret).norm() / secret.norm()) < 0.02
    low, high = view.last.cells[name]
    assert ((low <= secret) & (secret <= high)).all()
    assert float(torch.isinf(low).float().mean()) == pytest.approx(0.25, abs=0.02)
    assert torch.equal(ATTACKS["last-broadcast"].attack(view)[name], view.last.start[name])


def test_a_model_that_has_diverged_is_never_chosen(run: Run) -> None:
    ladder = run.ladder(max_looks=1)
    broken = {name: tensor * float("nan") for name, tensor in ladder.view.last.state.items()}
    assert ladder.view.loss(broken) == float("inf")
    last = replace(ladder.view.last, state=broken)
    view = replace(ladder.view, received=(*ladder.view.received[:-1], last))
    assert ATTACKS["best-broadcast"].attack(view) is not broken


def test_tuning_ends_where_validation_is_lowest(run: Run) -> None:
    """From what the seed made it comes far; it stops after ten looks that do not improve, and has
    the state before them."""
    ladder = run.ladder(patience=10, max_looks=200)
    first = replace(ladder.view.last, state=ladder._bench.initial)
    view = replace(ladder.view, received=(*ladder.view.received[:-1], first))
    losses: list[float] = []
    bench: Any = view.tools
    look = bench._loss
    bench._loss = lambda base: losses.append(look(base)) or losses[-1]
    found = ATTACKS["tuned"].attack(view)
    bench._loss = look
    assert view.loss(found) == min(losses) < 0.8 * losses[0]
    assert len(losses) < 200
    assert losses[-11] == min(losses)


@pytest.mark.parametrize(("optimizer", "least", "most"), [("adamw", 0.9, 4), ("sgd", 0, 0.5)])
def test_colluders_train_with_the_clients_optimizer(
    tiny_experiment: Experiment, tmp_path: Path, optimizer: str, least: float, most: float
) -> None:
    """A step of AdamW is the learning rate long, whatever the gradient; one of SGD is not."""
    values = {"client.optimizer": optimizer, "client.lr": 1e-3, "federation.rounds": 1}
    own = tiny.write_csv(tmp_path / "own.csv", tiny.make_rows(40, seed=9))
    ladder = Run(tiny_experiment.with_values(values)).ladder(max_looks=1, auxiliary=str(own))
    bench: Any = ladder.view.tools
    start = ladder.view.last.state
    for train in (
        lambda: bench.tune(start, "client"),
        lambda: bench.distil(start, [(1.0, ladder.view.received[0].state)], "client"),
    ):
        train()
        ended = bench._held["client"].state.read()
        moved = max(float((ended[n] - start[n]).abs().max()) for n in start)
        assert least * 1e-3 < moved < most * 1e-3


def test_however_few_examples_there_are_some_are_trained_on(run: Run) -> None:
    bench: Any = run.ladder(validation=0.999).view.tools
    assert len(bench._train) == 1


def test_the_floor_is_what_the_colluders_examples_give_them_alone(run: Run) -> None:
    floor = run.ladder(max_looks=1).floor()
    assert list(floor) == ["tuned alone", "tuned alone on W0"]


def test_every_attack_runs_in_both_bases_and_gives_the_same_numbers_again(
    run: Run, tiny_csv: Path
) -> None:
    ladder = run.ladder(colluders=2, max_looks=2, auxiliary=str(tiny_csv))
    able, left_out = feasible(ATTACKS, ladder.view.tools.means)
    assert left_out.keys() == {"unmasked-broadcast", "mean-final"}
    first, again = (list(ladder.run(able)) for _ in range(2))
    assert first == again
    assert [each.name for each in first] == [*able, *(f"{name} on W0" for name in able)]
    assert {each.base for each in first} == {"client", "public"}
    best = strongest(first)
    assert best.utility == max(each.utility for each in first)


def test_a_residual_is_there_for_its_measure_alone(run: Run) -> None:
    """The whole mean of one broadcast's products is that broadcast."""
    ladder = run.ladder()
    names = ["last-broadcast", "mean-products-full", "last-broadcast"]
    one = [next(iter(ladder.run(find_attacks([name]), 1))) for name in names]
    assert one[0].metrics == one[2].metrics
    assert one[1].metrics["loss"] == pytest.approx(one[0].metrics["loss"], rel=1e-5)


def test_where_w0_is_proprietary_or_clients_have_it_there_is_one_base(
    run: Run, tiny_experiment: Experiment
) -> None:
    assert run.ladder(base="proprietary").bases == ("client",)
    full = Run(tiny_experiment.with_values({"federation.rounds": 1}))
    assert full.ladder(base="public").bases == ("client",)


def test_an_adversary_has_the_broadcasts_of_the_rounds_in_which_it_was_sampled(run: Run) -> None:
    ladder = run.ladder(rounds="sampled", colluders=2)
    clients = ladder.view.tools.clients
    took_part = [
        record.round
        for record in run.history
        if any(client.client in clients for client in record.clients)
    ]
    assert [each.made for each in ladder.view.received] == took_part
    assert len(took_part) > 0


def test_an_adversary_that_was_never_sampled_has_nothing(run: Run) -> None:
    ladder = run.ladder()
    (strongest_client,) = ladder.view.tools.clients
    strangers = [
        record
        for record in run.history
        if all(client.client != strongest_client for client in record.clients)
    ]
    sampled = run.experiment.with_values({"adversary.rounds": "sampled"})
    with pytest.raises(UserError, match="received no broadcast in 4 that were sent"):
        Ladder(sampled, run.sent, strangers)


def test_an_attack_is_not_given_the_servers_state(run: Run) -> None:
    """What is received is on the quantizer's grid, so it is none of the full-precision values."""
    view = run.ladder().view
    for each in view.received[1:]:
        assert each.cells
        for name, (low, high) in each.cells.items():
            values = each.state[name]
            assert ((low <= values) & (values <= high)).all()
            block = values.flatten()[:64]
            assert len(block.unique()) <= 4


def test_an_attack_cannot_reach_what_measures_it(run: Run) -> None:
    """Over whatever path, but for code. Examples of all clients lie in one file that is mapped, of
    which it has the rows of its own."""
    ladder = run.ladder(colluders=2)
    for name in ("score", "measure", "alone", "evaluate"):
        assert not hasattr(ladder.view.tools, name)
    secrets = {id(ladder._bench), id(ladder._text), id(ladder._text._held_out)}
    assert not secrets & {id(each) for each in reachable(ladder.view)}
    assert secrets <= {id(each) for each in reachable(ladder)}

    def peeking(view: View) -> State:
        view.tools.score(view.last.state, view.base)  # type: ignore[attr-defined]
        return view.last.state

    with pytest.raises(AttributeError, match="score"):
        list(ladder.run({"peeking": Known("broadcast", peeking)}))


def reachable(start: Any) -> list[Any]:
    """Every object that another one leads to, without modules, classes and functions' globals."""
    code = (type, types.ModuleType, types.BuiltinFunctionType, types.CodeType)
    found, ahead = {id(start): start}, [start]
    while ahead:
        each = ahead.pop()
        if isinstance(each, types.FunctionType):
            inside = [*(each.__closure__ or ()), *(each.__defaults__ or ())]
        else:
            inside = gc.get_referents(each)
        new = [x for x in inside if not isinstance(x, code) and id(x) not in found]
        found |= {id(x): x for x in new}
        ahead += new
    return list(found.values())


def test_a_cohort_that_colludes_whole_has_the_servers_state(
    tiny_experiment: Experiment,
) -> None:
    """Followed from the seed by their own returns, at 2 bits; to fp32's rounding of sums."""
    values = COARSE | {"server.weighting": "examples", "server.lr": 0.7}
    own = Run(tiny_experiment.with_values(values))
    view = own.ladder(colluders=8).view
    last = {name: own.state[name] for name in view.last.state}
    found, newest = ATTACKS["followed"].attack(view), view.last.state
    assert off(newest, last) > 0.1
    assert off(found, last) < 1e-5
    few = own.ladder(colluders=1)
    assert off(ATTACKS["followed"].attack(few.view), last) > 0.01


def off(state: State, secret: State) -> float:
    apart = sum(float((state[n] - t).square().sum()) for n, t in secret.items())
    return (apart / sum(float(t.square().sum()) for t in secret.values())) ** 0.5


def test_what_a_return_does_not_lead_to_is_not_followed(tiny_experiment: Experiment) -> None:
    assert "returns" in means_of(tiny_experiment)
    for values in (
        {"uplink.bits": 8},
        {"server.optimizer": "fedadam"},
        {"server.rule": "replace"},
        {"server.aggregation": "flexlora"},
        {"downlink.perturbation": 0.5},
        {"downlink.server_mask": 0.25},
    ):
        other = tiny_experiment.with_values(values)
        assert "returns" not in means_of(other)
        with pytest.raises(UserError, match="'followed' needs a server that adds the mean"):
            attacks_of(other, ["followed"])


def test_the_strongest_reads_what_all_colluders_read(run: Run) -> None:
    ladder = run.ladder(colluders=4)
    assert {each.client for each in ladder.view.received} == {ladder._text.strongest}


def test_colluders_validate_on_examples_of_their_own_that_they_do_not_train_on(run: Run) -> None:
    ladder = run.ladder(colluders=3)
    bench: Any = ladder.view.tools
    text = ladder._text
    own = {int(i) for client in bench.clients for i in text.partition.indices(client)}
    count = sum(len(batch["labels"]) for batch in bench._validation)
    assert len(bench._train) + count == len(own)
    assert count == round(0.2 * len(own))
    other = next(c for c in range(8) if c not in bench.clients)
    with pytest.raises(ValueError, match=f"client {other} is none of the adversary's"):
        bench.take_part(ladder.view.last, other, "client")


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"downlink.rotate": "round"},
        {"downlink.rotate": "client", "downlink.perturbation": 0.5},
        {"downlink.rounding": "stochastic"},
        {"downlink.bits": 32, "client.base_bits": 32},
        {"lora.client_ranks": [2, 4], "server.aggregation": "hetlora"},
        {"downlink.server_mask": 0.25, "downlink.client_mask": 0.25},
        {"server.aggregation": "ffa-lora"},
        {"server.aggregation": "flora"},
        {"adapter.kind": "prompt"},
    ],
    ids="-".join,
)
def test_other_broadcasts_are_attacked_too(
    tiny_experiment: Experiment, values: dict[str, Any]
) -> None:
    other = Run(tiny_experiment.with_values({"federation.rounds": 2, **values}))
    ladder = other.ladder(colluders=2, max_looks=1)
    found = by_name(list(ladder.run(feasible(ATTACKS, ladder.view.tools.means)[0])))
    last = other.history[-1].evaluation
    assert last is not None
    assert found["last-broadcast"].metrics == last.client_before


def test_a_writer_is_attacked_too(tmp_path: Path, tiny_experiment: Experiment) -> None:
    values = tiny.make_writing(tmp_path, "llama") | {"federation.rounds": 2, "downlink.bits": 2}
    other = Run(Experiment().with_values(values))
    found = by_name(list(other.ladder(max_looks=2).run(find_attacks(["last-broadcast", "tuned"]))))
    last = other.history[-1].evaluation
    assert last is not None
    assert found["last-broadcast"].metrics == last.client_before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"adversary.colluders": 9}, "colluders = 9 is more than federation.clients = 8"),
        (
            {
                "adversary.base": "public",
                "emulator.kind": "layer-drop",
                "adapter.kind": "layers",
            },
            "because W0 is not public",
        ),
        (
            {"adversary.base": "public", "adversary.architecture": "unknown"},
            "no use to who cannot tell them",
        ),
    ],
)
def test_threat_models_that_cannot_be_are_refused(
    tiny_experiment: Experiment, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_adversary(tiny_experiment.with_values(values))


def test_runs_without_a_servers_model_are_refused(tiny_experiment: Experiment) -> None:
    with pytest.raises(UserError, match="method 'local-only' sends nothing"):
        Ladder(tiny_experiment.with_values({"method": "local-only"}), {}, [])
    personal = {"server.aggregation": "fedsa-lora", "evaluation.server": False}
    with pytest.raises(UserError, match="leaves a part of the model"):
        Ladder(tiny_experiment.with_values(personal), {}, [])


def test_auxiliary_text_has_no_labels_and_nothing_that_is_held_out(
    run: Run, tmp_path: Path, tiny_csv: Path
) -> None:
    """The task's own file, without labels: what is left are the clients' texts, each once."""
    with tiny_csv.open() as file:
        rows = [{"text": row["text"]} for row in csv.DictReader(file)]
    path = tiny.write_json_lines(tmp_path / "own.jsonl", rows)
    ladder = run.ladder(auxiliary=str(path))
    text, auxiliary = ladder._text, ladder.view.tools._text.auxiliary  # type: ignore[attr-defined]
    measured = {tuple(ids.tolist()) for ids, _ in text.held_out()[0]}
    clients = {tuple(ids.tolist()) for ids, _ in text.pooled()}
    assert {tuple(ids.tolist()) for ids, _ in auxiliary} == clients - measured
    assert {label for _, label in auxiliary} == {0}


def test_without_auxiliary_text_there_is_no_distillation(run: Run) -> None:
    ladder = run.ladder()
    with pytest.raises(ViewError, match="has no auxiliary text"):
        list(ladder.run(find_attacks(["distilled"])))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"texts": "a cat"}], r"adversary\.auxiliary: task\.text_column = 'text' is not in"),
        ([{"text": ""}], r"adversary\.auxiliary: .* a text is missing in 1 examples"),
    ],
)
def test_auxiliary_text_that_cannot_be_used_is_refused(
    run: Run, tmp_path: Path, rows: list[dict[str, str]], message: str
) -> None:
    path = tiny.write_csv(tmp_path / "own.csv", rows)
    with pytest.raises(UserError, match=message):
        run.ladder(auxiliary=str(path))


def test_an_ensemble_is_taught_to_one_model_that_is_nearer_to_what_all_of_them_are_near_to(
    run: Run, tmp_path: Path
) -> None:
    """One function, each time with other noise of its weights: the student is nearer to it than
    any of its teachers, on text that none of them saw."""
    own = tiny.write_csv(tmp_path / "own.csv", tiny.make_rows(400, seed=9))
    ladder = run.ladder(auxiliary=str(own), max_looks=20, patience=20)
    bench: Any = ladder.view.tools
    clean = bench.tune(ladder.view.last.state, "client")
    random = torch.Generator().manual_seed(0)

    def noisy() -> State:
        return {
            n: t + 0.6 * t.std() * torch.randn(t.shape, generator=random) for n, t in clean.items()
        }

    received = tuple(replace(each, state=noisy()) for each in ladder.view.received)
    view = replace(ladder.view, received=received)
    batches = evaluation_batches(ladder._text.held_out()[0], bench._text.pad, 32)

    def said(state: State) -> torch.Tensor:
        return torch.cat(opinions(bench._held["client"].put(state), batches, torch.device("cpu")))

    wanted = said(clean)
    distances = [float((said(each.state) - wanted).norm()) for each in received]
    student = ATTACKS["distilled"].attack(view)
    found = float((said(student) - wanted).norm())
    assert found < min(distances)
    # Of the mean of four with weights that halve in three rounds it would be 0.52, were it linear.
    assert found < 0.7 * sum(distances) / len(distances)


def test_a_writers_answers_are_written_by_the_newest_broadcast(tmp_path: Path) -> None:
    values = tiny.make_writing(tmp_path, "llama") | {"federation.rounds": 2, "downlink.bits": 2}
    values |= {"generation.examples": 0}
    other = Run(Experiment().with_values(values))
    rows = [{"thing": thing} for thing in ("a cat", "the river", "one seven")]
    own = tiny.write_csv(tmp_path / "own.csv", rows)
    ladder = other.ladder(max_looks=1, auxiliary=str(own))
    (found,) = ladder.run(find_attacks(["distilled"]))
    assert found.level == "trained"
    bench: Any = ladder.view.tools
    asked = bench._text.auxiliary
    model = bench._held["client"].put(ladder.view.last.state)
    answered = bench._text.answering(asked, model, torch.device("cpu"))
    for (ids, nothing), (whole, labels) in zip(asked, answered, strict=True):
        assert (nothing == IGNORED).all()
        assert whole[: len(ids)].equal(ids)
        assert labels[len(ids) :].equal(whole[len(ids) :])
        with torch.no_grad():
            logits = model(input_ids=whole[None, :-1]).logits[0]
        written = whole[len(ids) : -1]
        assert logits[len(ids) - 1 :].argmax(-1)[: len(written)].equal(written)


def test_a_black_box_makes_the_same_of_what_needs_no_architecture(run: Run) -> None:
    hidden, open_ = run.ladder(architecture="unknown", colluders=2), run.ladder(colluders=2)
    able, _ = feasible(ATTACKS, hidden.view.tools.means)
    assert hidden.bases == ("client",)
    assert hidden.floor() == {}
    expected = {x.name: x.metrics for x in open_.run(able) if x.base == "client"}
    assert {x.name: x.metrics for x in hidden.run(able)} == expected
    assert "architecture unknown; has their base, no auxiliary text; 4 broad" in hidden.threat
    for each in hidden.view.received:
        assert not {*each.state, *each.cells} & set(open_.view.last.state)
    lacking = [name for name, known in ATTACKS.items() if "architecture" in known.needs]
    for name in {*lacking} - {"distilled", "distilled-mean"}:
        with pytest.raises(ViewError):
            list(hidden.run(find_attacks([name])))


def test_a_black_box_does_not_say_what_the_seed_made(tiny_experiment: Experiment) -> None:
    """Columns that the server's mask never lets through are zero, and not as at the start."""
    values = {"downlink.server_mask": 0.25, "federation.rounds": 1}
    masked = Run(tiny_experiment.with_values(values))
    open_, hidden = (masked.ladder(architecture=a).view.last for a in ("known", "unknown"))
    (name, flags), *_ = sorted(open_.columns.items())
    (number, same), *_ = sorted(hidden.columns.items())
    assert number.startswith("tensor")
    assert torch.equal(flags, same)
    assert open_.state[name][:, ~flags.bool()].any()
    assert not hidden.state[number][:, ~flags.bool()].any()


def test_what_a_black_box_hides_is_not_watched(tiny_experiment: Experiment) -> None:
    blind = {"adversary.architecture": "unknown"}
    check_combinations(tiny_experiment.with_values(blind))
    values = blind | {"adversary.watch": ["trend", "aligned-trend"]}
    message = "'aligned-trend' needs adversary.architecture 'known'"
    with pytest.raises(ConfigError, match=message):
        check_combinations(tiny_experiment.with_values(values))
