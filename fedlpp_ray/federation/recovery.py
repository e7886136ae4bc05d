"""A run whose server may be lost: it goes on from the last finished round."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from fedlpp_ray.federation.backend import ServerLost
from fedlpp_ray.federation.loop import Federation
from fedlpp_ray.federation.records import RoundRecord

logger = logging.getLogger(__name__)

LOSSES = 3
"""Losses in a row, without a round between them, that are made good."""


def finished_rounds(federation: Federation) -> Iterator[RoundRecord]:
    """The rounds that remain, each yielded when a snapshot of it has been taken.

    Raises:
        ServerLost: time and again.
    """
    snapshot, losses = federation.snapshot(), 0
    while True:
        try:
            if losses:
                federation.backend.renew_server()
                federation.restore(snapshot)
            for record in federation.run():
                snapshot, losses = federation.snapshot(), 0
                yield record
            return
        except ServerLost as error:
            losses += 1
            if losses > LOSSES:
                raise
            reason = str(error).partition("\n")[0]
            logger.warning("the server is made anew as it was after the last round: %s", reason)
