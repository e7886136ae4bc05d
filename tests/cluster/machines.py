"""Machines on this one, each with processes, network, host name, /home and /tmp of its own.

Linux namespaces with a real sshd, joined by a bridge that leads nowhere: every port is free,
nothing is reachable from outside, and no process there can see or end one of this machine. All of
it is gone with the processes that hold it. Needs root, whom the user of each is by another name.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("setpriv", "unshare", "nsenter", "ip", "hostname", "ps", "ssh", "ssh-keygen", "rsync")
SERVER = "/usr/sbin/sshd"  # which insists on its whole path
USER = "fedlpp"
HOME = Path("/home") / USER
COVERED = ("/tmp", "/home")
"""What each machine has of its own."""
BOOT = """set -eu
cd {folder}
for path in {shared}; do mkdir -p ".$path"; mount --bind "$path" ".$path"; done
for path in /tmp /home; do mount --rbind ".$path" "$path"; done
mount --bind passwd /etc/passwd
mount -t tmpfs none /run; mount -t tmpfs none /dev/shm; mkdir /run/sshd
cp host_key sshd_config /run
hostname {name}
ip link set lo up
until ip link set eth0 up 2>/dev/null; do sleep 0.05; done
ip address add {address}/24 dev eth0
ip route add default via 10.77.0.254  # nobody is there, but a host without a route has no address
touch ready
exec {server} -D -f /run/sshd_config
"""
SSHD = """ListenAddress {address}
HostKey /run/host_key
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
PidFile none
"""


def missing() -> list[str]:
    """What this machine lacks; empty where namespaces can be had."""
    lacking = [name for name in (*PROGRAMS, SERVER) if shutil.which(name) is None]
    if lacking:
        return lacking
    trial = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
    trial += ["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    done = subprocess.run(trial, capture_output=True, check=False)
    return ["the right to make namespaces"] if done.returncode else []


@dataclass(frozen=True)
class Machine:
    """One of them."""

    address: str
    folder: Path
    """Its files, as this machine sees them."""
    process: int

    @property
    def home(self) -> Path:
        """The user's home, as this machine sees it."""
        return self.folder / str(HOME).lstrip("/")

    def command(self, *words: str, where: Path, **environment: str) -> list[str]:
        """A command as one to be run there by the user, in a folder."""
        path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        known = {"HOME": str(HOME), "USER": USER, "LOGNAME": USER, "PATH": path} | environment
        enter = ["nsenter", f"--target={self.process}", "--mount", "--uts", "--net", "--pid"]
        return [*enter, "env", "-i", "-C", str(where), *_pairs(known), *words]

    def processes(self) -> list[str]:
        """The command lines of what runs there."""
        ps = self.command("ps", "-eo", "args=", where=Path("/"))
        done = subprocess.run(ps, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


@contextmanager
def network(
    names: Sequence[str], folder: Path, shared: Sequence[Path]
) -> Iterator[dict[str, Machine]]:
    """Start machines of the given names.

    Args:
        names: Host names.
        folder: Where their files go.
        shared: What all of them have at the same path as here, whatever of it is in `COVERED`.
    """
    with ExitStack() as stack:
        switch = stack.enter_context(
            _held(
                ["--net"],
                "ip link add br0 type bridge; ip link set br0 up; exec sleep infinity",
                folder,
            )
        )
        inside = [path for path in shared if str(path).startswith(tuple(f"{c}/" for c in COVERED))]
        yield {
            name: stack.enter_context(_machine(name, i + 1, folder / name, inside, switch))
            for i, name in enumerate(names)
        }


@contextmanager
def _machine(
    name: str, number: int, folder: Path, shared: Sequence[Path], switch: int
) -> Iterator[Machine]:
    address = f"10.77.0.{number}"
    (folder / "tmp").mkdir(parents=True)
    (folder / "tmp").chmod(0o1777)
    (folder / str(HOME).lstrip("/") / ".ssh").mkdir(parents=True, mode=0o700)
    users = Path("/etc/passwd").read_text()
    (folder / "passwd").write_text(f"{USER}:x:0:0::{HOME}:/bin/bash\n{users}")
    (folder / "sshd_config").write_text(SSHD.format(address=address))
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    kinds = ["--net", "--uts", "--mount", "--pid", "--mount-proc"]
    paths = " ".join(f"'{path}'" for path in shared)
    boot = BOOT.format(folder=folder, shared=paths, name=name, address=address, server=SERVER)
    with _held(kinds, boot, folder) as process:
        cable = ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0"]
        at = ["nsenter", f"--target={switch}", "--net"]
        _run(*at, *cable, "netns", str(process))
        _run(*at, "ip", "link", "set", name, "up", "master", "br0")
        _until_there(folder / "ready")
        yield Machine(address, folder, process)


@contextmanager
def _held(kinds: Sequence[str], script: str, folder: Path) -> Iterator[int]:
    """Namespaces of the given kinds with a shell as their first process; yields its id."""
    folder.mkdir(exist_ok=True)
    line = ["setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child", *kinds]
    with (folder / "log").open("w") as log:
        holder = subprocess.Popen([*line, "bash", "-c", script], stdout=log, stderr=log)
    try:
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        end = time.monotonic() + 30
        while not (found := children.read_text().split()):
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.02)
        yield int(found[0])
        os.kill(int(found[0]), signal.SIGKILL)  # the first process: all others go with it
        holder.wait(60)
    finally:
        holder.kill()


def _until_there(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, (path.parent / "log").read_text()
        time.sleep(0.05)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
