"""The experiment description: one frozen, validated object, written as YAML."""

from fedlpp_ray.config.adversary import AdversaryConfig
from fedlpp_ray.config.errors import ConfigError
from fedlpp_ray.config.files import dump_experiment, load_experiment, parse_overrides
from fedlpp_ray.config.identity import (
    check_same,
    check_same_adversary,
    fingerprint,
    flat_config,
)
from fedlpp_ray.config.links import DownlinkConfig, UplinkConfig
from fedlpp_ray.config.model import AdapterConfig, EmulatorConfig, LoraConfig, ModelConfig
from fedlpp_ray.config.parties import ClientConfig, FederationConfig, ServerConfig
from fedlpp_ray.config.privacy import PrivacyConfig, SecureConfig
from fedlpp_ray.config.running import EvaluationConfig, RuntimeConfig
from fedlpp_ray.config.schema import Experiment
from fedlpp_ray.config.section import FULL_PRECISION, Bits, Section
from fedlpp_ray.config.task import GenerationConfig, Kind, TaskConfig
from fedlpp_ray.config.zero import ZeroConfig

__all__ = [
    "FULL_PRECISION",
    "AdapterConfig",
    "AdversaryConfig",
    "Bits",
    "ClientConfig",
    "ConfigError",
    "DownlinkConfig",
    "EmulatorConfig",
    "EvaluationConfig",
    "Experiment",
    "FederationConfig",
    "GenerationConfig",
    "Kind",
    "LoraConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RuntimeConfig",
    "Section",
    "SecureConfig",
    "ServerConfig",
    "TaskConfig",
    "UplinkConfig",
    "ZeroConfig",
    "check_same",
    "check_same_adversary",
    "dump_experiment",
    "fingerprint",
    "flat_config",
    "load_experiment",
    "parse_overrides",
]
