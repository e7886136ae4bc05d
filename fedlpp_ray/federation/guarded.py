"""Which defences of the broadcast's codes go with what."""

from __future__ import annotations

from fedlpp_ray.config import FULL_PRECISION, DownlinkConfig


def refusals(config: DownlinkConfig) -> dict[str, dict[str, bool]]:
    """By defence that is on, why it cannot be, and whether that holds."""
    uniform = config.kind == "int" or config.bits == "ternary"
    subtracted = {
        f"downlink.dither '{config.dither}' leaves an error that does not depend on the weights, "
        "and so it would; allowed: none, run, round": config.subtracts
    }
    drawn = config.rounding == "stochastic" or config.dither != "none"
    whole = {"downlink.bits 32 has no codes": config.bits == FULL_PRECISION}
    turned = {
        "downlink.rotate turns every round another way, so that codes and scales of two rounds are "
        "of different values": config.rotate != "none",
        "downlink.perturbation adds other noise to each client's message in each round, so that "
        "codes and scales of two rounds are of different values": bool(config.perturbation),
        "downlink.client_mask sends other columns to each client in each round, so that codes and "
        "scales of two rounds are of different values": bool(config.client_mask),
    }
    return {
        key: whole | reasons
        for key, on, reasons in (
            (
                f"downlink.hysteresis = {config.hysteresis:g}",
                config.hysteresis > 0,
                turned
                | subtracted
                | {
                    "downlink.rounding 'stochastic' moves the end of a cell in every round, and "
                    "only one that stays can have a margin; allowed: nearest": (
                        config.rounding == "stochastic"
                    ),
                    "downlink.dither 'round' moves the end of a cell in every round, and only one "
                    "that stays can have a margin; allowed: none, run": config.dither == "round",
                },
            ),
            (
                "downlink.hold_scales",
                config.hold_scales,
                turned
                | subtracted
                | {
                    "downlink.scale 'double' stores a scale relative to those of 255 other blocks, "
                    "so that none stays when one changes; allowed: fp32, fp16": (
                        config.scale == "double"
                    ),
                    "downlink.magnitude 'norm' sends another scale in every round; allowed: "
                    "absmax": config.magnitude == "norm",
                },
            ),
            (
                f"downlink.dither '{config.dither}'",
                config.dither != "none",
                {
                    "downlink.rounding 'stochastic' is a dither of its own, drawn in every round; "
                    "allowed: nearest": config.rounding == "stochastic",
                    f"downlink.kind '{config.kind}' has levels at unequal distances, and what is "
                    "subtracted is uniform over one; allowed: int, or downlink.bits ternary": (
                        config.subtracts and not uniform
                    ),
                }
                | (turned if config.lasting_dither else {}),
            ),
            (
                "downlink.magnitude 'norm'",
                config.magnitude == "norm",
                {
                    "downlink.rounding 'stochastic' and downlink.dither keep a value on average, "
                    "and the scale of another norm would undo that; allowed: nearest, none": drawn,
                },
            ),
        )
        if on
    }
