"""The round loop and its parties. No Ray: `fedlpp_ray.runtime` puts the same parties in actors.

Start reading at `loop.py`. The parties (`server.py`, `client.py`) import the model libraries, which
takes seconds, so they are imported only where they run.
"""

from fedlpp_ray.federation.backend import Backend
from fedlpp_ray.federation.loop import Federation
from fedlpp_ray.federation.records import (
    Assignment,
    ClientReport,
    ClientUpdate,
    Evaluation,
    Floor,
    RoundRecord,
)
from fedlpp_ray.federation.snapshot import Snapshot

__all__ = [
    "Assignment",
    "Backend",
    "ClientReport",
    "ClientUpdate",
    "Evaluation",
    "Federation",
    "Floor",
    "RoundRecord",
    "Snapshot",
]
