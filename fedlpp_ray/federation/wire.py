"""The codecs of both links of an experiment."""

from __future__ import annotations

from fedlpp_ray.config import FULL_PRECISION, DownlinkConfig
from fedlpp_ray.messages import Codec
from fedlpp_ray.quantization import Quantizer
from fedlpp_ray.state import Schema, is_head

UPLINK = Codec(None)
"""Updates travel in fp32."""


def downlink_codec(config: DownlinkConfig, schema: Schema) -> Codec:
    """The broadcast's codec: one quantizer for adapters and head alike.

    Only `full_precision_head` exempts the head.
    """
    if config.bits == FULL_PRECISION:
        return Codec(None)
    quantizer = Quantizer(config.bits, config.kind, config.block, config.scale, config.rounding)
    exempt = frozenset(filter(is_head, schema)) if config.full_precision_head else frozenset()
    return Codec(quantizer, exempt)
