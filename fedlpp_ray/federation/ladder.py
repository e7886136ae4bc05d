"""The attack ladder on a run: what its broadcasts let the adversary of the experiment have."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedlpp_ray.aggregation import find_method
from fedlpp_ray.config import ConfigError, Experiment
from fedlpp_ray.errors import UserError
from fedlpp_ray.federation.bench import Bench
from fedlpp_ray.federation.colluders import Colluders, own_text
from fedlpp_ray.federation.compared import score_server
from fedlpp_ray.federation.data import FederatedText, load_base
from fedlpp_ray.federation.emulation import emulate
from fedlpp_ray.federation.held import held_of
from fedlpp_ray.federation.means import means_of
from fedlpp_ray.federation.received import Reader
from fedlpp_ray.federation.records import RoundRecord
from fedlpp_ray.federation.sampling import colluders
from fedlpp_ray.federation.threat import threat_of
from fedlpp_ray.federation.wire import Broadcast, Wire
from fedlpp_ray.privacy import Scores
from fedlpp_ray.privacy.attacks import Known
from fedlpp_ray.privacy.sealed import Sealed
from fedlpp_ray.privacy.view import Base, Returns, Tools, View
from fedlpp_ray.state import State, schema_of
from fedlpp_ray.tasks import UTILITY, Metrics
from fedlpp_ray.training import Scored, configure_torch

ON: dict[Base, str] = {"client": "", "public": " on W0", "corrected": " on W0 + R"}
"""What a name says of the base that a state is put into."""


@dataclass(frozen=True)
class Outcome:
    """What one attack came to.

    Attributes:
        attack: Its name.
        base: The frozen model that its state was put into.
        level: What it costs.
        broadcasts: Number of broadcasts that it was given.
        round: After which the server had the state of the newest of them.
        metrics: On the held-out examples.
        scores: Of each of them; None where no sums over them decide the utility.
    """

    attack: str
    base: Base
    level: str
    broadcasts: int
    round: int
    metrics: Metrics
    scores: Scores | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Of the attack, with the base if that is not the client's."""
        return f"{self.attack}{ON[self.base]}"

    @property
    def utility(self) -> float:
        """U of the model."""
        return float(self.metrics[UTILITY])


def check_adversary(experiment: Experiment) -> None:
    """Refuse what the ladder cannot attack.

    Raises:
        ConfigError: naming the keys.
    """
    adversary = experiment.adversary
    if adversary.colluders > experiment.federation.clients:
        raise ConfigError(
            f"adversary.colluders = {adversary.colluders} is more than federation.clients = "
            f"{experiment.federation.clients}"
        )
    if adversary.base == "public" and experiment.emulator.kind != "none":
        raise ConfigError(
            f"adversary.base 'public' with emulator.kind '{experiment.emulator.kind}': clients "
            "have an emulator because W0 is not public; allowed: proprietary"
        )
    if adversary.base == "public" and adversary.architecture == "unknown":
        raise ConfigError(
            "adversary.base 'public' with adversary.architecture 'unknown': tensors of W0 are of "
            "no use to who cannot tell them in the client; allowed: proprietary"
        )


class Ladder:
    """The adversary of an experiment, with what a run sent.

    Args:
        experiment: What was run.
        broadcasts: All that were sent, by the round in which they were made.
        history: The finished rounds: who was sampled.

    Attributes:
        view: What the adversary has, in a client's base.
        bases: The models that it has.

    Raises:
        AssetError, TaskError, ValueError: the model or the data cannot be used.
        UserError: the adversary has received nothing, or the method leaves the server no model.
    """

    def __init__(
        self,
        experiment: Experiment,
        broadcasts: Mapping[int, Broadcast],
        history: Iterable[RoundRecord],
    ) -> None:
        check_adversary(experiment)
        if experiment.method != "federated":
            raise UserError(f"method '{experiment.method}' sends nothing that could be attacked")
        if find_method(experiment.server.aggregation).personal:
            raise UserError(
                f"server.aggregation '{experiment.server.aggregation}' leaves a part of the model "
                "at each client: the server has none to protect"
            )
        runtime = experiment.runtime
        device = configure_torch(runtime.threads, runtime.client_gpus)
        text = FederatedText(experiment)
        self._text, self._device = text, device
        emulator = None
        if experiment.emulator.kind != "none":
            emulator = emulate(experiment, text, load_base(experiment, text), device)
        held = held_of(experiment, text, device, emulator)
        clients = colluders(experiment, text.examples)
        self._bench = Bench(experiment, text, held, device)
        own, means = own_text(experiment, text, clients), means_of(experiment)
        self._auxiliary, self.bases = len(own.auxiliary), tuple(held)
        tools: Tools = Colluders(experiment, own, held, means, device)
        self._experiment = experiment
        history = list(history)
        readable = self._readable(clients, broadcasts, history)
        wire = Wire(experiment, schema_of(self._bench.initial))
        reader = Reader(experiment, wire, self._bench.initial)
        received = tuple(reader.read(broadcasts, readable))
        returns = self._returns(clients, history) if "returns" in means else None
        self._open: Callable[[State], State] = dict
        if "architecture" not in means:
            sealed = Sealed(tools, self._bench.initial)
            received, tools = tuple(map(sealed.seal, received)), sealed
            self._open, returns = sealed.open, None
        if not received:
            raise UserError(
                f"adversary.rounds '{experiment.adversary.rounds}': client "
                f"{' and '.join(map(str, sorted(clients)))} received no broadcast in "
                f"{len(broadcasts)} that were sent; more adversary.colluders or "
                "adversary.rounds 'all' have some"
            )
        self.view = View(
            received,
            experiment.lora.rank,
            tools,
            readable,
            averaged=_last(experiment.server.final_average, len(history) + 1),
            returns=returns,
        )

    def run(self, attacks: Mapping[str, Known], broadcasts: int | None = None) -> Iterator[Outcome]:
        """Each attack in each base that the adversary has, and what it came to.

        Args:
            attacks: By name; all of them feasible with the adversary's means.
            broadcasts: Only the first so many, at least one. None: all.

        Raises:
            ViewError: one is not.
        """
        received = self.view.received[:broadcasts]
        round, averaged = received[-1].made - 1, self.view.averaged
        if len(received) < len(self.view.received):  # as if the run had ended there
            averaged = _last(len(averaged), round + 1)
        for base in self.bases:
            view = replace(self.view, received=received, averaged=averaged, base=base)
            for name, known in attacks.items():
                metrics, scores = self._bench.score(self._open(known.attack(view)), base)
                yield Outcome(name, base, known.level, len(received), round, metrics, scores)

    def curve(self, attacks: Mapping[str, Known], every: int) -> Iterator[Outcome]:
        """The strongest of the attacks that only read broadcasts, after every so many of these.

        Args:
            attacks: By name; at least one only reads broadcasts.
            every: Number of rounds whose broadcasts were read.
        """
        cheap = {name: known for name, known in attacks.items() if known.level == "broadcast"}
        made = [each.made for each in self.view.received]
        rounds = sorted(set(made))
        for last in sorted({*rounds[every - 1 :: every], rounds[-1]}):
            yield strongest(self.run(cheap, bisect_right(made, last)))

    def floor(self) -> dict[str, float]:
        """Utility of what the adversary has without the broadcasts: its examples, in each base.

        Who does not know the architecture has what the run's own floor names, and no more.
        """
        return {name: float(metrics[UTILITY]) for name, (metrics, _) in self.scored_floor().items()}

    def scored_floor(self) -> dict[str, Scored]:
        """As `floor`, with each held-out example."""
        if "architecture" not in self.view.tools.means:
            return {}
        return {
            f"tuned alone{ON[base]}": self._bench.score(
                self.view.tools.tune(self._bench.initial, base), base
            )
            for base in self.bases
        }

    @property
    def threat(self) -> str:
        """The threat model in words."""
        return threat_of(
            self._experiment,
            clients=sorted(self.view.tools.clients),
            bases=self.bases,
            texts=self._auxiliary,
            broadcasts=len(self.view.received),
        )

    def compared(self, adapter: Mapping[str, bytes]) -> tuple[Scored, dict[str, Scored]]:
        """The server's final model, and the run's own floor, measured again for their examples.

        Args:
            adapter: The server's, as `checkpoint.trained` reads it.
        """
        server = score_server(self._experiment, self._text, self._device, adapter)
        return server, self._bench.alone()

    def _readable(
        self,
        clients: Sequence[int],
        broadcasts: Mapping[int, Broadcast],
        history: Iterable[RoundRecord],
    ) -> dict[int, frozenset[int]]:
        """By colluder, the broadcasts that it reads under the threat model."""
        made_in = self._experiment.downlink.made_in
        if self._experiment.adversary.rounds == "all":
            return {each: frozenset(broadcasts) for each in clients}
        found: dict[int, set[int]] = {each: set() for each in clients}
        for record in history:
            for client in record.clients:
                if client.client in found:
                    found[client.client].add(made_in(record.round - client.staleness))
        return {each: frozenset(made) for each, made in found.items()}

    def _returns(self, clients: Sequence[int], history: Iterable[RoundRecord]) -> Returns:
        """What the colluders have returned in the rounds that were folded."""
        config, examples = self._experiment.server, self._text.examples
        weights = {
            record.round: {
                each.client: examples[each.client] if config.weighting == "examples" else 1.0
                for each in record.clients
                if each.client in clients and each.fault is None
            }
            for record in history
        }
        known = {round: found for round, found in weights.items() if found}
        return Returns(known, config.lr, self._bench.initial)


def _last(count: int, round: int) -> range:
    """So many rounds, up to this one."""
    return range(round - count + 1, round + 1)


def strongest(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome of the highest utility; one that has diverged only if all have."""
    return max(outcomes, key=lambda x: -math.inf if math.isnan(x.utility) else x.utility)
