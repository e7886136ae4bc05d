"""What any file for `ray up` must hold beyond Ray's own schema, one small function per rule.

Each check returns the problems it finds as sentences, so an empty list means the rule is kept.
"""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.autoscaler
import yaml
from click import ClickException
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

Config = dict[str, Any]
PLACEHOLDER = re.compile(r"(?:[a-z]+-)?REPLACE_[A-Z_]+")
COMMAND_LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
NIGHTLY_MARKS = ("nightly", "cp310", "ray-wheels", "3.0.0.dev")


@dataclass(frozen=True)
class ClusterFile:
    """A parsed cluster file with what it refers to."""

    config: Config
    constraints: str
    root: Path

    @property
    def node_types(self) -> dict[str, Config]:
        """Every node type, by name."""
        types: dict[str, Config] = self.config["available_node_types"]
        return types

    @property
    def head(self) -> Config:
        """The head's node type."""
        return self.node_types[self.config["head_node_type"]]

    @property
    def workers(self) -> dict[str, Config]:
        """Every node type but the head's."""
        return {k: v for k, v in self.node_types.items() if k != self.config["head_node_type"]}

    def commands(self, *lists: str) -> list[str]:
        """Every command of the given lists (of all lists, when none is given)."""
        return [c for name in lists or COMMAND_LISTS for c in self.config.get(name) or []]


def load(path: Path) -> ClusterFile:
    """Parse a cluster file; the JSON round trip undoes the sharing between YAML aliases."""
    root = path.resolve().parent.parent
    constraints = root / "constraints.txt"
    return ClusterFile(
        config=json.loads(json.dumps(yaml.safe_load(path.read_text()))),
        constraints=constraints.read_text() if constraints.exists() else "",
        root=root,
    )


def strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a nested value (keys included) with the path that leads to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{where}.{key}".lstrip("."), str(key)
            yield from strings(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from strings(item, f"{where}[{i}]")
    elif isinstance(value, str):
        yield where, value


def placeholders(config: Config) -> dict[str, list[str]]:
    """Each placeholder in the file, with the places that hold it."""
    found: dict[str, list[str]] = {}
    for where, text in strings(config):
        for name in PLACEHOLDER.findall(text):
            found.setdefault(name, []).append(where)
    return found


def ray_start(file: ClusterFile, commands: str) -> str:
    """The `ray start` command of a list ('' when there is none)."""
    return next((c for c in file.commands(commands) if "ray start" in c), "")


def check_schema(file: ClusterFile) -> list[str]:
    """Ray itself accepts the file."""
    try:
        validate_config(prepare_config(json.loads(json.dumps(file.config))))
    except (ValidationError, ValueError, KeyError, RuntimeError, ClickException) as error:
        return [f"Ray rejects the file: {str(error).splitlines()[0]}"]
    return []


def check_no_defaults(file: ClusterFile) -> list[str]:
    """Nothing is left to the provider's defaults.yaml; none of its nightly build comes through."""
    provider = file.config["provider"]["type"]
    path = Path(ray.autoscaler.__file__).parent / provider / "defaults.yaml"
    defaults: Config = yaml.safe_load(path.read_text())
    problems = [f"{key} is left to Ray's defaults" for key in defaults.keys() - file.config.keys()]
    for name in COMMAND_LISTS:
        if not isinstance(file.config.get(name), list):
            problems.append(f"{name} is not a list")
    merged = json.dumps(prepare_config(json.loads(json.dumps(file.config))))
    return problems + [f"'{mark}' after the merge" for mark in NIGHTLY_MARKS if mark in merged]


def check_reports(file: ClusterFile) -> list[str]:
    """Ray does not report to its makers what runs here."""
    start = ray_start(file, "head_start_ray_commands")
    return [] if "--disable-usage-stats" in start else ["Ray's usage reports are on"]


def check_worker_limits(file: ClusterFile) -> list[str]:
    """Limits are written out, agree with each other and let the cluster fall to nothing."""
    problems = []
    total = file.config["max_workers"]
    for name, kind in file.node_types.items():
        low, high = kind.get("min_workers"), kind.get("max_workers")
        if low is None or high is None:
            problems.append(f"{name} lacks min_workers or max_workers")
        elif not 0 <= low <= high <= total:
            problems.append(f"{name}: not 0 <= {low} <= {high} <= {total}")
        elif low:
            problems.append(f"{name}: {low} nodes cost money while nothing runs")
    if sum(kind.get("max_workers") or 0 for kind in file.workers.values()) < total:
        problems.append(f"the types together never reach max_workers {total}")
    return problems


def check_head(file: ClusterFile) -> list[str]:
    """The head runs no work."""
    if file.head["resources"].get("CPU") != 0 or file.head["resources"].get("GPU"):
        return ["trials may be placed on the head"]
    return []


def check_token(file: ClusterFile) -> list[str]:
    """Every node has the token and asks for it."""
    problems = []
    if "~/.ray/auth_token" not in file.config.get("file_mounts", {}):
        problems.append("the token is not copied to the nodes")
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        if not re.search(r"RAY_AUTH_MODE=token(;| &&)? ray start", ray_start(file, name)):
            problems.append(f"{name}: Ray starts without token authentication")
    return problems


def check_versions(file: ClusterFile) -> list[str]:
    """Versions come from constraints.txt, which must suit a machine other than its author's."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;#]+)", file.constraints, re.MULTILINE))
    problems = [] if "ray" in pins else ["constraints.txt does not pin ray"]
    problems += [f"{k}=={v} exists only for one build" for k, v in pins.items() if "+" in v]
    for command in file.commands():
        if "pip install" in command and not re.search(r"-c \S*constraints\.txt", command):
            problems.append(f"installs without constraints: {command}")
        for name, version in re.findall(r"([\w.-]+)(?:\[[\w,]*\])?==([^\s'\"]+)", command):
            if pins.get(name) != version:
                problems.append(f"{name}=={version} is not what constraints.txt says")
        if re.search(r"https?://|index-url|git\+", command):
            problems.append(f"installs from a place of its own: {command}")
    return problems


def check_mounts(file: ClusterFile) -> list[str]:
    """Mounts are single files that exist: Ray hashes all below a folder and restarts on change."""
    problems = []
    for remote, local in file.config.get("file_mounts", {}).items():
        if local.startswith("~/"):
            continue
        if not remote.startswith("~/") or Path(local).is_absolute():
            problems.append(f"{remote}: {local} ties the file to one machine")
        elif not (file.root / local).is_file():
            problems.append(f"{local} is not a file of the repository")
    if any("mlflow.db" in pattern for pattern in file.config.get("rsync_exclude", [])):
        problems.append("`ray rsync-down` would leave mlflow.db behind")
    return problems


def check_mlflow(file: ClusterFile) -> list[str]:
    """MLflow runs on the head's loopback as a unit, with its store outside of every mount."""
    commands = file.commands("head_start_ray_commands")
    server = next((c for c in commands if "mlflow server" in c), "")
    if not server:
        return ["MLflow is not started on the head"]
    wanted = ("systemd-run", "--collect", "Restart=always", "--host 127.0.0.1", "--port 5000")
    problems = [f"mlflow server: no {part}" for part in wanted if part not in server]
    if not re.search(r"--artifacts-destination (s3|gs)://\S+", server):
        problems.append("artifacts are kept on the head's disk")
    store = re.search(r"--backend-store-uri sqlite:///(/\S+)", server)
    mounts = [m.replace("~", "/home/ubuntu") for m in file.config.get("file_mounts", {})]
    if not store or any(store[1].startswith(m.rstrip("/") + "/") for m in mounts):
        problems.append("the store is not an absolute sqlite path outside of the mounts")
    if not any("systemctl stop fedlpp-mlflow" in c for c in commands[: commands.index(server)]):
        problems.append("a second `ray up` finds the unit's name taken")
    return problems


def check_watcher(file: ClusterFile) -> list[str]:
    """Every worker passes a spot notice of its own cloud on to Ray, after Ray has started."""
    commands = file.commands("worker_start_ray_commands")
    cloud = file.config["provider"]["type"]
    unit = next((c for c in commands if "spot_watcher.py" in c), "")
    if not unit:
        return ["nobody hears of a spot interruption"]
    problems = []
    if f"spot_watcher.py {cloud} ray drain-node --address=$RAY_HEAD_IP:6379" not in unit:
        problems.append("the watcher asks another cloud, or drains nothing")
    wanted = ("systemd-run", "--collect", "Restart=on-failure", "RAY_AUTH_MODE=token")
    problems += [f"watcher: no {part}" for part in wanted if part not in unit]
    before = commands[: commands.index(unit)]
    if not any("ray start" in command for command in before):
        problems.append("the watcher starts before Ray")
    if not any("systemctl stop fedlpp-spot-watcher" in command for command in before):
        problems.append("a second `ray up` finds the unit's name taken")
    script = file.config.get("file_mounts", {}).get("~/fedlpp/spot_watcher.py")
    return problems if script == "cluster/spot_watcher.py" else [*problems, "it is not mounted"]


def check_spot_first(file: ClusterFile, is_spot: Callable[[Config], bool]) -> list[str]:
    """The head is no spot node; workers are spot first, and on-demand where there is none."""
    if is_spot(file.head):
        return ["the head is a spot instance: its loss ends the sweep"]
    spot = {k: v for k, v in file.workers.items() if is_spot(v)}
    rest = {k: v for k, v in file.workers.items() if not is_spot(v)}
    if not spot or not rest:
        return ["there is no spot type, or no on-demand fallback"]
    if min(v.get("priority", 0) for v in spot.values()) <= max(
        v.get("priority", 0) for v in rest.values()
    ):
        return ["an on-demand type has the priority of a spot type, or more"]
    return []


def check_shell(file: ClusterFile) -> list[str]:
    """Bash can parse every command."""
    problems = []
    for command in file.commands():
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False)
        if done.returncode:
            problems.append(f"not a shell command: {command}")
    return problems
