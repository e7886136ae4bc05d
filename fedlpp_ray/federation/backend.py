"""What the round loop needs of its parties, wherever they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from fedlpp_ray.federation.private import Clipping
from fedlpp_ray.federation.records import (
    Assignment,
    ClientReport,
    Final,
    Floor,
    Memory,
    Pending,
    RoundRecord,
)
from fedlpp_ray.federation.secure import Masking
from fedlpp_ray.federation.wire import Broadcast
from fedlpp_ray.privacy.secure import Session

if TYPE_CHECKING:
    from fedlpp_ray.federation.attacked import Attacked


class ServerLost(RuntimeError):
    """The server is gone, and with it all since the last snapshot."""


class Backend(Protocol):
    """The server and its clients, wherever they run: in this process, or in Ray actors.

    Where the server can be lost, every method may raise `ServerLost`.
    """

    def examples(self) -> Sequence[int]:
        """Number of training examples of each client."""

    def download(self) -> int:
        """Bytes that a client downloads once, before its first round: an emulator of the model."""

    def encode_broadcast(
        self, round: int, clients: Sequence[int], beside: Sequence[int] = ()
    ) -> Broadcast:
        """The server's quantized state, made in a round, in the editions that clients read.

        Args:
            round: From 1.
            clients: Who trains from it.
            beside: Who only reads it, to be measured.
        """

    def open_session(self, round: int, clients: Sequence[int]) -> Session | None:
        """Begin secure aggregation with all who are sampled for a round; None without it."""

    def exchange(self, round: int, sent: Mapping[int, bytes]) -> Mapping[int, bytes]:
        """Take to the server what clients send in a step of secure aggregation, which that ends.

        Args:
            round: From 1.
            sent: By client; none in the step in which `train` has taken the masked updates.

        Returns:
            What the server sends to each client that is left.

        Raises:
            MessageError, TooFewClientsError: there is no sum (`SecureSum.exchange`).
        """

    def train(
        self,
        round: int,
        cohort: Mapping[Assignment, Memory],
        broadcasts: Mapping[int, Broadcast],
        maskings: Mapping[int, Masking] | None = None,
    ) -> Iterator[ClientReport]:
        """Have each client of the cohort train, and the server fold what it returns.

        Args:
            round: From 1.
            cohort: Each client's part, and what it has kept.
            broadcasts: By the round in which they were made.
            maskings: With secure aggregation, by client, what it masks its update with.

        Returns:
            A report a client, in any order.
        """

    def aggregate(self, round: int) -> str:
        """Make what was folded the server's next state; returns its digest."""

    def discard(self, round: int) -> str:
        """Forget what was folded; returns the digest of the state, which is as it was."""

    def clipping(self) -> Clipping:
        """C in the round last closed, and the noised fraction of its clients within C, if any.

        Without differential privacy C is infinite.
        """

    def evaluate(
        self,
        round: int,
        broadcast: Broadcast,
        memory: Memory,
        newest: Mapping[int, Broadcast],
    ) -> Pending:
        """Begin to measure the server's state and what the strongest client has of it.

        Given the broadcast in force in the round that follows, what the client has kept, and the
        broadcasts to attack, by the round in which each was made; none: no attack.
        """

    def finish(self) -> Final | None:
        """Make the server's final model from its states; None where the experiment has none.

        After the last round was closed. The server's state stays as it is.
        """

    def measure_floor(self) -> Floor:
        """What a client has without taking part."""

    def attack(
        self, broadcasts: Mapping[int, Broadcast], history: Sequence[RoundRecord]
    ) -> Attacked | None:
        """The ladder on a finished run, given all broadcasts, by the round each was made in.

        None where nothing travels.
        """

    def adapter(self) -> dict[str, bytes]:
        """The server's state as the files of a PEFT adapter."""

    def restore(self, adapter: dict[str, bytes]) -> str:
        """Take back the state of an `adapter`; returns its digest."""

    def renew_server(self) -> None:
        """Put a new server, as it is made from the seed, in the place of one that was lost."""
