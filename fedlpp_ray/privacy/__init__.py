"""What is protected and what leaks."""

from fedlpp_ray.privacy.protection import Protection, measure_protection

__all__ = ["Protection", "measure_protection"]
