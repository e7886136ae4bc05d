"""The round loop and its parties. No Ray: `fedlpp_ray.runtime` puts the same parties in actors."""

from fedlpp_ray.federation.client import ClientHost, ClientUpdate
from fedlpp_ray.federation.loop import Backend, Federation
from fedlpp_ray.federation.records import Evaluation, RoundRecord
from fedlpp_ray.federation.server import Server

__all__ = [
    "Backend",
    "ClientHost",
    "ClientUpdate",
    "Evaluation",
    "Federation",
    "RoundRecord",
    "Server",
]
