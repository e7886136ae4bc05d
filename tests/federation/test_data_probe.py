"""What the server reads off a client's update, on tiny federations."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlpp_ray.config import Experiment
from fedlpp_ray.federation.client import ClientHost
from fedlpp_ray.federation.data_probe import DataProbe, Seen
from fedlpp_ray.federation.inversion_probe import probe_inversion, step_examples
from fedlpp_ray.federation.server import Server
from fedlpp_ray.lora import at_rank
from fedlpp_ray.messages import MessageError
from fedlpp_ray.privacy import PrivacyError
from fedlpp_ray.privacy.dp import norm
from fedlpp_ray.state import State
from tests import tiny
from tests.federation.test_generation import experiment as generation_experiment

generation = generation_experiment  # under a name that no argument here has


def meaningless(count: int) -> list[dict[str, str]]:
    """Texts whose labels say nothing: what is learnt of them is learnt by heart."""
    rng = random.Random(0)
    words = [*tiny.COMMON, *(word for topic in tiny.TOPICS.values() for word in topic)]
    labels = list(tiny.TOPICS)
    return [
        {"text": " ".join(rng.choices(words, k=8)), "label": rng.choice(labels)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def classification(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("meaningless")
    tiny.make_model(folder / "model", dropout=0.0)
    tiny.write_csv(folder / "data.csv", meaningless(480))
    return Experiment().with_values(
        {
            "model.name": str(folder / "model"),
            "task.name": "classification",
            "task.data": str(folder / "data.csv"),
            "task.held_out": 400,
            "task.max_length": 16,
            "lora.rank": 16,
            "lora.alpha": 32,
            "client.batch_size": 10,
            "client.lr": 1e-2,
            "federation.clients": 4,
            "federation.client_fraction": 0.5,
            "federation.rounds": 2,
            "federation.local_steps": 80,
        }
    )


def seen(experiment: Experiment, probe: DataProbe, client: int = 0, spread: float = 0.0) -> Seen:
    """A client's first round; with `spread`, from a state whose B are not zero."""
    server, host = Server(experiment), ClientHost(experiment)
    if spread:
        torch.manual_seed(0)
        server._state = {
            name: tensor + spread * torch.randn_like(tensor) if "lora_B" in name else tensor
            for name, tensor in server._state.items()
        }
    broadcast = server.encode_broadcast(1)
    return probe.decode(1, client, broadcast, host.train(1, client, broadcast).payload)


def zeros(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def test_members_that_were_learnt_by_heart_are_told_from_others(
    classification: Experiment,
) -> None:
    probe = DataProbe(classification)
    found = probe.membership(0, seen(classification, probe))
    assert set(found) == {"loss", "reference", "reference_base"}
    for score in found.values():
        assert score.auc > 0.9
        assert score.tpr is not None
        assert score.tpr >= 0.1
        assert score.non_members > 100


def test_a_quantized_update_gives_members_away_too(classification: Experiment) -> None:
    experiment = classification.with_values({"uplink.bits": 8})
    probe = DataProbe(experiment)
    assert probe.membership(0, seen(experiment, probe))["reference"].auc > 0.9


def test_differential_privacy_with_a_clip_that_adapts_hides_members(
    classification: Experiment,
) -> None:
    keys = {"dp.clip": 1.0, "dp.adaptive": True, "server.weighting": "uniform"}
    noise = {"dp.noise": "clients", "dp.noise_multiplier": 2.0, "dp.count_noise": 3.0}
    experiment = classification.with_values(keys | noise)
    probe = DataProbe(experiment)
    assert probe.membership(0, seen(experiment, probe))["reference"].auc < 0.85


def test_an_update_of_zeros_tells_nothing(classification: Experiment) -> None:
    probe = DataProbe(classification)
    once = seen(classification, probe)
    found = probe.membership(0, Seen(once.broadcast, zeros(once.update)))
    assert found["reference"].auc == 0.5
    assert found["reference"].tpr == 0
    assert found["reference"].interval is None
    assert 0.25 < found["loss"].auc < 0.75
    # What was probed before leaves nothing behind.
    assert probe.membership(0, once)["loss"].auc > 0.9
    assert probe.membership(0, Seen(once.broadcast, zeros(once.update))) == found


def test_the_base_as_reference_counts_what_earlier_rounds_learnt(
    classification: Experiment,
) -> None:
    """D + u of nothing new, D that of a client's training: to D nothing is told, to W0 all is."""
    probe = DataProbe(classification)
    once = seen(classification, probe)
    learnt = {n: once.broadcast[n] + u for n, u in once.update.items()}
    found = probe.membership(0, Seen(once.broadcast | learnt, zeros(once.update)))
    assert found["reference"].auc == 0.5
    assert found["reference_base"].auc > 0.9


def test_generated_texts_have_all_three_scores(generation: Experiment) -> None:
    experiment = generation.with_values({"federation.local_steps": 60})
    probe = DataProbe(experiment)
    once = seen(experiment, probe)
    found = probe.membership(0, once)
    assert set(found) == {"loss", "reference", "reference_base", "min_k"}
    assert found["loss"].tpr is None  # too few are held out
    assert found["loss"].reason is not None
    none = probe.membership(0, Seen(once.broadcast, zeros(once.update)))
    assert none["reference"].auc == 0.5


def test_clients_of_a_smaller_rank_are_probed_at_theirs(classification: Experiment) -> None:
    experiment = classification.with_values({"lora.client_ranks": [16, 4]})
    probe = DataProbe(experiment)
    once = seen(experiment, probe, client=1)
    assert probe.membership(1, once)["reference"].auc > 0.8
    probe.load(1, once.broadcast | {n: once.broadcast[n] + u for n, u in once.update.items()})
    held = {n: at_rank(n, t, 4) for n, t in probe._state.read().items()}
    for name, tensor in once.update.items():
        assert torch.equal(held[name], once.broadcast[name] + tensor)


def test_labels_of_members_and_others_are_alike(classification: Experiment) -> None:
    values = {"federation.partition": "dirichlet", "federation.dirichlet_alpha": 0.3}
    probe = DataProbe(classification.with_values(values))
    for client in range(4):
        members, others, theirs = probe._compared(client, matched=True)
        ours = np.array([label for _, label in probe.text.client(client)])[members]
        assert theirs.tolist() == [probe.text.held_out()[1][i] for i in others]
        assert len(theirs) % len(ours) == 0
        each = len(theirs) // len(ours)
        assert all((theirs == x).sum() == each * (ours == x).sum() for x in range(3))
        everyone, all_others, _ = probe._compared(client, matched=False)
        assert len(everyone) == probe.text.examples[client]
        assert len(all_others) == 400


def test_what_a_client_has_too_is_no_non_member(classification: Experiment, tmp_path: Path) -> None:
    rows = meaningless(40)
    tiny.write_csv(tmp_path / "twice.csv", rows + rows)
    values = {"task.data": str(tmp_path / "twice.csv"), "task.held_out": 40}
    probe = DataProbe(classification.with_values(values | {"federation.clients": 1}))
    found = {(tuple(ids.tolist()), label) for ids, label in probe.text.client(0)}
    members, others, _ = probe._compared(0, matched=False)
    held_out = [probe.text.held_out()[0][i] for i in others]
    assert 0 < len(others) < 40
    assert not found & {(tuple(ids.tolist()), label) for ids, label in held_out}
    assert len(members) == 40


def test_messages_and_states_of_others_are_refused(classification: Experiment) -> None:
    probe = DataProbe(classification)
    server, host = Server(classification), ClientHost(classification)
    broadcast = server.encode_broadcast(1)
    payload = host.train(1, 0, broadcast).payload
    with pytest.raises(MessageError, match="client"):
        probe.decode(1, 1, broadcast, payload)
    with pytest.raises(MessageError, match="round"):
        probe.decode(2, 0, broadcast, payload)
    once = probe.decode(1, 0, broadcast, payload)
    with pytest.raises(ValueError, match=r"the model has no other\.weight"):
        probe.membership(0, Seen(once.broadcast | {"other.weight": torch.ones(1)}, {}))
    with pytest.raises(ValueError, match="which the broadcast has not"):
        probe.membership(0, Seen({}, once.update))


STEP = {
    "federation.local_steps": 1,
    "client.optimizer": "sgd",
    "client.lr": 1.0,
    "client.batch_size": 1,
    "downlink.bits": 8,
}


@pytest.mark.parametrize("client", [0, 1])
def test_the_first_step_from_b_of_zero_gives_all_tokens_away(
    classification: Experiment, client: int
) -> None:
    experiment = classification.with_values(STEP)
    probe = DataProbe(experiment)
    found = probe_inversion(probe, 1, client, seen(experiment, probe, client))
    ids = step_examples(probe, 1, client)[0][0]
    assert found["B"].tokens == len(set(ids.tolist()))
    assert (found["B"].precision, found["B"].recall) == (1, 1)
    assert (found["A"].rank, found["A"].accepted, found["A"].auc) == (0, 0, 0.5)


def test_later_a_gives_them_away(classification: Experiment) -> None:
    experiment = classification.with_values(STEP)
    probe = DataProbe(experiment)
    found = probe_inversion(probe, 1, 0, seen(experiment, probe, spread=0.05))
    assert (found["A"].informed, found["A"].auc) == (1, 1)
    assert (found["A"].accepted > 0, found["A"].precision) == (True, 1)


def test_of_llama_too_whose_last_token_is_never_read(generation: Experiment) -> None:
    values = {"lora.rank": 16, "lora.alpha": 32, "lora.targets": ["q_proj", "v_proj"]}
    experiment = generation.with_values(STEP | values)
    probe = DataProbe(experiment)
    found = probe_inversion(probe, 1, 0, seen(experiment, probe))
    ids = step_examples(probe, 1, 0)[0][0]
    assert found["B"].tokens == len(set(ids[:-1].tolist()))
    assert found["B"].informed == 1


def test_a_batch_of_more_tokens_than_the_rank_hides_them_in_b(classification: Experiment) -> None:
    experiment = classification.with_values(STEP | {"client.batch_size": 8})
    probe = DataProbe(experiment)
    found = probe_inversion(probe, 1, 0, seen(experiment, probe))["B"]
    assert found.rank == found.full_rank
    assert (found.accepted, found.auc) == (found.candidates, 0.5)


def test_adamw_and_two_bits_give_away_less(classification: Experiment) -> None:
    for values in ({"client.optimizer": "adamw", "client.lr": 1e-2}, {"uplink.bits": 2}):
        experiment = classification.with_values(STEP | values)
        probe = DataProbe(experiment)
        found = probe_inversion(probe, 1, 0, seen(experiment, probe))["B"]
        assert found.recall < 0.5
        assert found.informed < 1


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("values", [{}, {"client.optimizer": "adamw", "client.lr": 1e-2}])
def test_a_clip_hides_no_token(
    classification: Experiment, values: dict[str, object], adaptive: bool
) -> None:
    """Of a step with weight decay, from A and B that it moves; by tenths of its length."""
    plain = classification.with_values(STEP | values)
    probe = DataProbe(plain)
    once = seen(plain, probe, spread=0.05)
    free = probe_inversion(probe, 1, 0, once)
    clip = {"dp.clip": 0.1 * norm(once.update), "dp.noise_multiplier": 0.0}
    clip |= {"dp.adaptive": adaptive, "server.weighting": "uniform"}
    experiment = plain.with_values(clip)
    probe = DataProbe(experiment)
    short = seen(experiment, probe, spread=0.05)
    assert norm(short.update) == pytest.approx(0.1 * norm(once.update), rel=1e-5)
    assert short.clip == pytest.approx(norm(short.update), rel=1e-5)
    found = probe_inversion(probe, 1, 0, short)
    for factor in "AB":
        assert abs(found[factor].rank - free[factor].rank) <= 1  # of one value near the floor
        assert found[factor].auc == pytest.approx(free[factor].auc, abs=0.02)


def test_a_clients_noise_is_known_to_the_probe(classification: Experiment) -> None:
    """z C / sqrt(min_updates) on each entry; far above B's gradient it leaves no span."""
    keys = {"dp.clip": 1.0, "dp.noise": "clients", "server.weighting": "uniform"}
    experiment = classification.with_values(STEP | keys | {"federation.min_updates": 2})
    probe = DataProbe(experiment)
    short = seen(experiment, probe)
    assert short.noise == pytest.approx(1 / 2**0.5)
    found = probe_inversion(probe, 1, 0, short)
    assert (found["B"].rank, found["B"].accepted, found["B"].auc) == (0, 0, 0.5)
    assert 0.3 < found["A"].auc < 0.7


def test_the_uplink_error_is_that_of_the_codec(classification: Experiment) -> None:
    bits = {32: 0.0, 16: 0.0017, 8: 0.006, 2: 0.56}
    for value, error in bits.items():
        probe = DataProbe(classification.with_values({"uplink.bits": value}))
        assert probe.uplink_error() == pytest.approx(error, rel=0.3)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"federation.local_steps": 2}, "federation.local_steps"),
        ({"client.scaffold": True}, "client.scaffold"),
        ({"downlink.client_mask": 0.2}, "downlink.server_mask, client_mask"),
        ({"adapter.kind": "prompt"}, "adapter.kind"),
    ],
)
def test_updates_that_are_no_gradient_are_refused(
    classification: Experiment, values: dict[str, object], key: str
) -> None:
    probe = DataProbe(classification.with_values(STEP | values))
    with pytest.raises(PrivacyError, match=key):
        probe_inversion(probe, 1, 0, Seen({}, {}))
