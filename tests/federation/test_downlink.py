"""The downlink beyond one broadcast a round: broadcasts that last, and FedQSN's masks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.federation import Federation, checkpoint, preflight
from fedlpp_ray.federation.adapter import ADAPTER_STATE
from fedlpp_ray.federation.in_process import InProcess
from fedlpp_ray.federation.masks import Masks, cut, fill
from fedlpp_ray.federation.sampling import sample_cohort
from fedlpp_ray.messages import Codec, Envelope, MessageError, decode, encode
from fedlpp_ray.state import COLUMNS, part, schema_of
from tests.federation.test_links import SCAFFOLD
from tests.federation.test_loop import Recording, cohort, interrupted, numbers, run, tensor_bytes

MASKS = {"downlink.server_mask": 0.25, "downlink.client_mask": 0.5}
FEDBUFF = {"federation.mode": "fedbuff"}
ONE = {"federation.cohort": 1, "federation.client_fraction": None}
"""Of 64 columns, 48 are left by the server and 24 of them by a client."""


def cohorts(experiment: Experiment) -> dict[int, tuple[int, ...]]:
    config = experiment.federation
    return {r: sample_cohort(config, experiment.seed, r) for r in range(1, config.rounds + 1)}


def flags(payload: bytes) -> dict[str, torch.Tensor]:
    """Which of 64 columns a message has, by name, read from its bits."""
    found = {}
    for name, packed in safetensors.torch.load(payload).items():
        if name.startswith(COLUMNS):
            assert packed.dtype == torch.uint8
            assert len(packed) == 64 // 8
            lanes = [(packed >> bit) & 1 for bit in range(8)]  # byte i has columns i, i + 8, ..
            found[name.removeprefix(COLUMNS)] = torch.cat(lanes).bool()
    return found


def test_a_broadcast_lasts_and_is_downloaded_once(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"downlink.every": 3, "federation.rounds": 5})
    backend = Recording(experiment)
    history = list(Federation(experiment, backend).run())
    sampled = cohorts(experiment)
    assert len(set(sampled.values())) == 5
    for period in ((1, 2, 3), (4, 5)):
        payloads = {backend.sent[r][4] for r in period}
        assert len(payloads) == 1
        size, seen = len(payloads.pop()), set()
        for r in period:
            ledger = history[r - 1].ledger
            assert [t.client for t in ledger] == list(sampled[r])
            assert [t.down for t in ledger] == [0 if c in seen else size for c in sampled[r]]
            assert all(t.up > 0 for t in ledger)
            seen |= set(sampled[r])
        down = sum(t.down for r in period for t in history[r - 1].ledger)
        assert down == size * len(seen)
    assert any(t.down == 0 for record in history for t in record.ledger)
    assert backend.sent[1] != backend.sent[4]


def test_a_message_says_when_it_was_made_and_an_older_one_is_refused(
    tiny_experiment: Experiment,
) -> None:
    experiment = tiny_experiment.with_values({"downlink.every": 2, "federation.rounds": 4})
    backend = InProcess(experiment)
    one, three = backend.encode_broadcast(1), backend.encode_broadcast(3)
    for round, broadcast in ((1, one), (2, one), (3, three), (4, three)):
        made = experiment.downlink.made_in(round)
        (report,) = backend.train(round, cohort(round, 0), {made: broadcast})
        assert report.fault is None
    with pytest.raises(MessageError, match="round is 1, expected 3"):
        backend._host.train(4, 0, one)
    with pytest.raises(MessageError, match="round is 1, expected 3"):
        list(backend.train(4, cohort(4, 0), {3: one}))


def test_what_is_measured_is_what_clients_have_next(tiny_experiment: Experiment) -> None:
    history = run(tiny_experiment.with_values({"downlink.every": 3, "federation.rounds": 4}))
    evaluations = [record.evaluation for record in history]
    before = [e.client_before for e in evaluations if e is not None]
    servers = [e.server for e in evaluations if e is not None]
    assert before[0] == before[1] != before[2] == before[3]
    assert servers[0] != servers[1]


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_interrupted_while_a_broadcast_lasts_goes_on_with_the_same_bits(
    tiny_experiment: Experiment, tmp_path: Path, after: int
) -> None:
    """Also with several ranks, each with a message, and stochastic rounding."""
    values = {"lora.client_ranks": [2, 4], "server.aggregation": "flexlora", "downlink.every": 3}
    experiment = tiny_experiment.with_values(
        values | {"downlink.rounding": "stochastic", "federation.rounds": 5}
    )
    preflight.check([experiment])
    whole, restored = interrupted(experiment, tmp_path, after=after)
    assert numbers(restored.history) == numbers(whole.history)
    assert any(t.down == 0 for t in restored.history[1].ledger)
    folder = tmp_path / checkpoint.BROADCASTS
    kept = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    expected = ["1/2.safetensors", "1/4.safetensors"]
    # In round 4 another one is made; what the strongest client, of rank 4, has read is attacked.
    assert kept == (expected if after < 3 else expected[1:])


def test_a_lasting_broadcast_keeps_its_gauge(tiny_experiment: Experiment) -> None:
    """SGD is indifferent to it; the tolerance is fp32's through three rounds."""
    values = {"client.optimizer": "sgd", "client.lr": 0.3, "downlink.bits": 32}
    plain = tiny_experiment.with_values(values | {"client.weight_decay": 0.0, "downlink.every": 2})
    for one, other in zip(
        run(plain), run(plain.with_values({"downlink.rotate": "round"})), strict=True
    ):
        assert one.loss == pytest.approx(other.loss, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (SCAFFOLD | {"downlink.every": 2}, r"scaffold: downlink.every above 1 leaves"),
        ({"downlink.every": 2, "server.rule": "pull"}, r"every = 2: server.rule 'pull'.*residual"),
        ({"downlink.every": 2, "server.rule": "replace"}, r"'replace' goes back.*residual"),
        ({"downlink.every": 2, "server.aggregation": "hetlora"}, r"every = 2: .*'hetlora' does"),
        ({"downlink.every": 2, "server.aggregation": "rolora"}, r"'rolora' trains other parts"),
        (SCAFFOLD | {"downlink.server_mask": 0.1}, r"scaffold: downlink.server_mask and"),
        (
            {"downlink.rotate": "client", "server.rule": "pull"},
            r"'client': server.rule 'pull'.*resid",
        ),
        ({"downlink.perturbation": 1, "server.rule": "replace"}, r"= 1: server.rule 'replace'"),
        ({"downlink.rotate": "client", "server.aggregation": "flora"}, r"'client': .*'flora' does"),
        ({"downlink.perturbation": 1, "server.aggregation": "hetlora"}, r"= 1: .*'hetlora' does"),
        (MASKS | {"downlink.perturbation": 1}, r"= 1: downlink.client_mask leaves each client oth"),
        ({"downlink.perturbation": 1} | ONE, r"= 1: federation.sample_size = 1.*allowed: 2 and"),
        (SCAFFOLD | {"downlink.perturbation": 1}, r"scaffold: downlink.perturbation has"),
        (FEDBUFF | {"downlink.rotate": "client"}, r"fedbuff': downlink.rotate 'client' gives"),
        (FEDBUFF | {"downlink.perturbation": 1}, r"fedbuff': downlink.perturbation = 1 gives"),
        (MASKS | {"server.rule": "pull"}, r"client_mask: server.rule 'pull'.*allowed: residual"),
        (MASKS | {"server.rule": "replace"}, r"client_mask: server.rule 'replace'"),
        (MASKS | {"server.aggregation": "flexlora"}, r"'flexlora' does not average the updates"),
        (MASKS | {"server.aggregation": "hetlora"}, r"'hetlora' does not average the updates"),
        (MASKS | {"server.aggregation": "ffa-lora"}, r"'ffa-lora' does not send A"),
        (MASKS | {"uplink.bits": 4, "uplink.error_feedback": True}, r"client_mask leaves a client"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_reason(
    tiny_experiment: Experiment, values: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight.check([tiny_experiment.with_values(values)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "fedex-lora", "flexlora", "lora-fair", "fedsa-lora"])
def test_a_broadcast_may_last_with_methods_that_take_the_mean(
    tiny_experiment: Experiment, name: str
) -> None:
    values = {"server.aggregation": name, "evaluation.server": name != "fedsa-lora"}
    experiment = tiny_experiment.with_values(
        values | {"downlink.every": 2, "federation.rounds": 4, "federation.local_steps": 12}
    )
    preflight.check([experiment])
    losses = [sum(record.loss) / len(record.loss) for record in run(experiment)]
    if name != "flora":  # without the residual a client starts anew each round
        assert losses[-1] < losses[0] - 0.01


def test_masked_columns_do_not_travel_and_the_bytes_are_those_counted_by_hand(
    tiny_experiment: Experiment,
) -> None:
    """Tiny BERT at rank 4: A (4, 64) and B (64, 4) on 4 layers, head (3, 64) and (3)."""
    experiment = tiny_experiment.with_values(MASKS | {"downlink.bits": 4, "downlink.block": 8})
    backend = Recording(experiment)
    (first, *_) = Federation(experiment, backend).run()
    quantized = [4 * 24] * 4 + [64 * 4] * 4 + [3 * 24]
    down = sum(n // 2 + n // 8 * 4 for n in quantized) + 2 + 4 + 5 * 64 // 8
    up = 4 * (sum(quantized) + 3)
    assert set(backend.sent[1]) == {t.client for t in first.ledger}
    for transfer, update in zip(first.ledger, backend.received[1], strict=True):
        payload = backend.sent[1][transfer.client]
        assert transfer.down == len(payload)
        assert tensor_bytes(payload) == down
        assert tensor_bytes(update) == up


def test_the_servers_mask_stays_and_the_clients_is_fresh(tiny_experiment: Experiment) -> None:
    """48 columns are all that any client ever has; a client has 24 of them, others each time."""
    experiment = tiny_experiment.with_values(MASKS)
    backend = InProcess(experiment)
    seen: dict[str, list[torch.Tensor]] = {}
    for r in range(1, 21):
        broadcast = backend.encode_broadcast(r, [0, 1])
        for client in (0, 1):
            for name, kept in flags(broadcast[client]).items():
                seen.setdefault(name, []).append(kept)
    assert {part(name) for name in seen} == {"A", "head"}
    assert len(seen) == 5
    for masks in seen.values():
        assert all(int(kept.sum()) == 24 for kept in masks)
        assert len({tuple(kept.tolist()) for kept in masks}) == 40
        assert int(torch.stack(masks).any(0).sum()) == 48
    everywhere = {tuple(torch.stack(masks).any(0).tolist()) for masks in seen.values()}
    assert len(everywhere) == 5  # each tensor has its own


def test_a_server_mask_alone_is_the_same_message_for_all(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"downlink.server_mask": 0.25})
    backend = Recording(experiment)
    list(Federation(experiment, backend).run())
    assert [list(broadcast) for broadcast in backend.sent.values()] == [[4]] * 3
    one, two, three = (flags(broadcast[4]) for broadcast in backend.sent.values())
    for name, kept in one.items():
        assert int(kept.sum()) == 48
        assert torch.equal(kept, two[name])
        assert torch.equal(kept, three[name])


def test_columns_that_no_client_has_stay_as_they_were(tiny_experiment: Experiment) -> None:
    experiment = tiny_experiment.with_values({"downlink.server_mask": 0.25})
    backend = Recording(experiment)
    before = safetensors.torch.load(backend.adapter()[ADAPTER_STATE])
    list(Federation(experiment, backend).run())
    after = safetensors.torch.load(backend.adapter()[ADAPTER_STATE])
    for name, kept in flags(backend.sent[1][4]).items():
        assert torch.equal(after[name][:, ~kept], before[name][:, ~kept])
        assert (after[name][:, kept] != before[name][:, kept]).all()


def test_a_mask_changes_nothing_in_expectation(tiny_experiment: Experiment) -> None:
    """Over 4000 draws. A column is 0 or 2 with equal chance (or near it, without replacement), so
    the mean's standard error is |w| / sqrt(4000) = .016 |w|; the tolerance is five of them."""
    experiment = tiny_experiment.with_values({"downlink.client_mask": 0.5})
    state = {n: t for n, t in InProcess(experiment)._server._state.items() if part(n) == "A"}
    masks = Masks(experiment, schema_of(state))
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for r in range(4000):
        drawn = masks.draw(r, 0)
        sent = masks.apply(state, drawn)
        total = {name: total[name] + fill(sent, drawn)[name] for name in state}
    for name, tensor in state.items():
        assert ((total[name] / 4000 - tensor).abs() <= 0.08 * tensor.abs()).all()


def test_clients_that_go_to_one_target_take_the_server_there(tiny_experiment: Experiment) -> None:
    """Each from its view S * M * M_i to T * M * M_i: the mean is T - S where the server's mask M
    leaves a column. Its relative error is 1 / sqrt(4000) = .016 in expectation; twice that is
    tolerated."""
    experiment = tiny_experiment.with_values(MASKS)
    states = [InProcess(experiment.with_values({"seed": s}))._server._state for s in (0, 1)]
    name = next(n for n in states[0] if part(n) == "A")
    start, target = ({name: state[name]} for state in states)
    masks = Masks(experiment, schema_of(start))
    total, had = torch.zeros_like(start[name]), torch.zeros(64, dtype=torch.bool)
    for r in range(4000):
        drawn = masks.draw(r, 0)
        seen, reached = masks.apply(start, drawn), masks.apply(target, drawn)
        total += masks.settle({name: reached[name] - seen[name]}, drawn)[name]
        had |= drawn[f"{COLUMNS}{name}"].bool()
    way = target[name] - start[name]
    assert int(had.sum()) == 48
    assert not total[:, ~had].any()
    assert (total / 4000 - way)[:, had].norm() < 0.032 * way[:, had].norm()


def test_masks_that_would_hide_everything_leave_a_column(tiny_experiment: Experiment) -> None:
    """1% of 64 is one by rounding; half of that one would be none."""
    hidden = {"downlink.server_mask": 0.99, "downlink.client_mask": 0.9}
    experiment = tiny_experiment.with_values(hidden | {"federation.rounds": 1})
    backend = Recording(experiment)
    (record,) = Federation(experiment, backend).run()
    kept = [flags(message) for message in backend.sent[1].values()]
    assert {int(columns.sum()) for each in kept for columns in each.values()} == {1}
    assert all(map(math.isfinite, record.loss))


def test_one_client_gets_back_what_it_trained(tiny_experiment: Experiment) -> None:
    """The factor of the server's mask is undone: unquantized, S + mean (a - D) gives D = a. The
    tolerance is fp32's."""
    experiment = tiny_experiment.with_values(
        {"downlink.server_mask": 0.25, "downlink.bits": 32, "federation.cohort": 1,
         "federation.client_fraction": None, "federation.rounds": 2}
    )  # fmt: skip
    backend = Recording(experiment)
    list(Federation(experiment, backend).run())
    first, second = (safetensors.torch.load(backend.sent[r][4]) for r in (1, 2))
    update = safetensors.torch.load(backend.received[1][0])
    for name, tensor in update.items():
        torch.testing.assert_close(second[name], first[name] + tensor, rtol=0, atol=1e-6)


def test_a_client_trains_and_returns_only_what_it_has(tiny_experiment: Experiment) -> None:
    """Weight decay and FedProx move no masked column either."""
    experiment = tiny_experiment.with_values(
        MASKS | {"client.weight_decay": 0.5, "client.proximal": 1.0, "downlink.bits": 32}
    )
    backend = InProcess(experiment)
    broadcast = backend.encode_broadcast(1, [3])
    backend._host.train(1, 3, broadcast)
    from fedlpp_ray.lora import read_state

    trained = read_state(backend._host._model)
    for name, kept in flags(broadcast[3]).items():
        assert not trained[name][:, ~kept].any()
        assert trained[name][:, kept].all()


def test_a_client_refuses_the_edition_of_another(tiny_experiment: Experiment) -> None:
    backend = InProcess(tiny_experiment.with_values(MASKS))
    (message,) = backend.encode_broadcast(1, [0]).values()
    with pytest.raises(MessageError, match="client is 0, expected 1"):
        backend._host.train(1, 1, {1: message})


@pytest.mark.slow
def test_masks_go_with_rotation_other_methods_and_an_interruption(
    tiny_experiment: Experiment, tmp_path: Path
) -> None:
    for name, values in {
        "fedit": {"downlink.rotate": "round", "downlink.rounding": "stochastic"},
        "rolora": {"server.optimizer": "fedavgm", "uplink.bits": 4},
        "fedsa-lora": {"evaluation.server": False},
    }.items():
        experiment = tiny_experiment.with_values(
            MASKS | values | {"server.aggregation": name, "downlink.kind": "nf-symmetric"}
        )
        preflight.check([experiment])
        folder = tmp_path / name
        folder.mkdir()
        whole, restored = interrupted(experiment, folder, after=1)
        assert numbers(restored.history) == numbers(whole.history)
        assert not (folder / checkpoint.BROADCASTS).exists()


def test_error_feedback_goes_with_a_mask_that_stays(tiny_experiment: Experiment) -> None:
    values = {"uplink.bits": 2, "uplink.error_feedback": True, "downlink.server_mask": 0.25}
    experiment = tiny_experiment.with_values(
        values | {"federation.rounds": 4, "federation.local_steps": 12}
    )
    preflight.check([experiment])
    losses = [sum(record.loss) for record in run(experiment)]
    assert losses[-1] < losses[0]


def test_flags_travel_as_one_bit_each_and_must_fit_their_tensor() -> None:
    state = {f"{COLUMNS}x": torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0, 1]), "x": torch.ones(2, 4)}
    codec = Codec(None, flags=frozenset({f"{COLUMNS}x"}))
    envelope = Envelope("broadcast", 1)
    payload = encode(envelope, state, codec)
    assert safetensors.torch.load(payload)[f"{COLUMNS}x"].shape == (2,)
    found = decode(payload, envelope, schema_of(state), codec, max_norm=8**0.5)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    whole = fill(found, found)
    assert whole["x"].shape == (2, 9)
    assert torch.equal(cut(whole, found)["x"], state["x"])
    with pytest.raises(MessageError, match="x: 3 columns are flagged, 4 travel"):
        fill(state, {f"{COLUMNS}x": torch.tensor([1.0, 1, 1, 0, 0])})
