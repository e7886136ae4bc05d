"""Ways to break a copy of a parsed file, to see that a check notices."""

from collections.abc import Callable
from typing import Any

Config = dict[str, Any]
Mutation = Callable[[Config], None]


def put(path: str, value: Any) -> Mutation:
    """Set the value at a path of keys and positions parted by spaces."""

    def mutate(config: Config) -> None:
        *parents, last = [int(k) if k.isdigit() else k for k in path.split()]
        node: Any = config
        for key in parents:
            node = node[key]
        node[last] = value

    return mutate


def drop(path: str) -> Mutation:
    """Take out the key at a path."""

    def mutate(config: Config) -> None:
        *parents, last = path.split()
        node: Any = config
        for key in parents:
            node = node[key]
        del node[last]

    return mutate


def edit(commands: str, old: str, new: str) -> Mutation:
    """Replace a text that must occur in a list of commands."""

    def mutate(config: Config) -> None:
        before = config[commands]
        config[commands] = [c.replace(old, new) for c in before]
        assert config[commands] != before, f"{old!r} is not in {commands}"

    return mutate
