"""The experiment: every section, and what concerns several of them.

The keys of a section, their types, defaults and meanings are in the file of its class. Symbols in
the comments are those of FedLPP (Zhu et al., 2024, arXiv 2406.10976).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fedlpp_ray.config.adversary import AdversaryConfig
from fedlpp_ray.config.errors import ConfigError, explain
from fedlpp_ray.config.links import DownlinkConfig, UplinkConfig
from fedlpp_ray.config.model import AdapterConfig, EmulatorConfig, LoraConfig, ModelConfig
from fedlpp_ray.config.parties import ClientConfig, FederationConfig, ServerConfig
from fedlpp_ray.config.privacy import PrivacyConfig, SecureConfig
from fedlpp_ray.config.running import EvaluationConfig, RuntimeConfig, SimulationConfig
from fedlpp_ray.config.section import Section
from fedlpp_ray.config.task import GenerationConfig, TaskConfig

Method = Literal["federated", "centralised", "local-only"]


class Experiment(Section):
    """One run, complete: the same experiment and seed give the same bits."""

    method: Method = "federated"
    """`centralised`: the ceiling, LoRA on all clients' examples together, as many steps as all
    cohorts. `local-only`: the floor, LoRA on the strongest client's alone. Of the sections on
    links and server they have no use."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    generation: GenerationConfig = GenerationConfig()
    adapter: AdapterConfig = AdapterConfig()
    lora: LoraConfig = LoraConfig()
    emulator: EmulatorConfig = EmulatorConfig()
    downlink: DownlinkConfig = DownlinkConfig()
    uplink: UplinkConfig = UplinkConfig()
    client: ClientConfig = ClientConfig()
    federation: FederationConfig = FederationConfig()
    server: ServerConfig = ServerConfig()
    dp: PrivacyConfig = PrivacyConfig()
    secure: SecureConfig = SecureConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    adversary: AdversaryConfig = AdversaryConfig()
    simulation: SimulationConfig = SimulationConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _utility_is_measured(self) -> Self:
        allowed = self._utilities()
        if self.evaluation.utility not in (None, *allowed):
            written = f" with generation.examples = {self.generation.examples}"
            raise ValueError(
                f"evaluation.utility = '{self.evaluation.utility}' is not measured on task.name "
                f"'{self.task.name}'{written if self.task.kind == 'generation' else ''}; "
                f"allowed: {', '.join(allowed)}"
            )
        return self

    @property
    def utility(self) -> str:
        """The main metric: `evaluation.utility`, or the first that the task has."""
        return self.evaluation.utility or self._utilities()[0]

    def _utilities(self) -> tuple[str, ...]:
        if self.task.kind == "classification":
            return ("accuracy", "macro_f1")
        written = ("bleu", "nist", "meteor", "rouge_l", "cider")
        return (
            ("log_likelihood",)
            if self.generation.examples == 0
            else (
                *written,
                "log_likelihood",
            )
        )

    @classmethod
    def from_dict(cls, values: Any, where: str = "experiment") -> Experiment:
        """Validate nested plain values.

        Raises:
            ConfigError: a key is unknown, or a value has a wrong type, is not allowed, or does not
                go with another; the message names `where`, the key and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(explain(error, cls, where)) from None

    def with_values(self, values: dict[str, Any], where: str = "override") -> Experiment:
        """A copy with dotted keys replaced, e.g. `{"lora.rank": 4}`, validated anew.

        Raises:
            ConfigError: as `from_dict`.
        """
        nested = self.model_dump()
        for key, value in values.items():
            *sections, leaf = key.split(".")
            node: Any = nested
            for section in sections:
                node = node.setdefault(section, {}) if isinstance(node, dict) else None
            if not isinstance(node, dict):
                raise ConfigError(f"{where}: {key}: '{'.'.join(sections)}' holds no keys")
            if isinstance(node.get(leaf), dict):
                raise ConfigError(f"{where}: {key}: is a section; give its keys, e.g. {key}.x=...")
            node[leaf] = value
        return self.from_dict(nested, where)
