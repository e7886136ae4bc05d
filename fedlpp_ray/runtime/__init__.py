"""Ray, and only here: the same parties in actors, placed, scheduled and searched."""

from fedlpp_ray.runtime.actors import ray_backend
from fedlpp_ray.runtime.backend import RayBackend
from fedlpp_ray.runtime.cluster import connect
from fedlpp_ray.runtime.placement import PlacementError, bundles, check_fits, reserve

__all__ = [
    "PlacementError",
    "RayBackend",
    "bundles",
    "check_fits",
    "connect",
    "ray_backend",
    "reserve",
]
