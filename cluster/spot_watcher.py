"""Gives Ray notice when the cloud takes a spot node back: `ray drain-node`, run on each worker.

    python spot_watcher.py {aws,gcp} ray drain-node --address=HEAD:6379

Asks the node's own metadata service every few seconds. When that has a notice, it runs the given
command with the reason "preemption" and the seconds that are left; Ray then places nothing new on
the node, and a client that ends in time is kept. The node is the one that the command runs on.
Needs nothing but the standard library, because it is copied to the nodes as a single file.

Sources: EC2 User Guide, "Spot Instance interruption notices" (two minutes, IMDSv2); Compute Engine
documentation, "Preemption process" (30 seconds).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

POLL_SECONDS = 5.0
ANSWER_SECONDS = 2.0
GCP_NOTICE_SECONDS = 30.0
REASON = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot interruption notice")

logger = logging.getLogger("spot_watcher")
# A proxy that the environment names must not be asked for the node's own metadata.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def aws_seconds_left() -> float | None:
    """Seconds until EC2 stops this instance, or None without a notice.

    Raises:
        OSError, ValueError: IMDS does not answer, or not as documented.
    """
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
    token = _ask(f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    notice = f"{base}/latest/meta-data/spot/instance-action"
    try:
        text = _ask(notice, {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    end = datetime.fromisoformat(json.loads(text)["time"])
    return (end - datetime.now(UTC)).total_seconds()


def gcp_seconds_left() -> float | None:
    """Seconds until Compute Engine stops this instance, or None without a notice.

    Raises:
        OSError: the metadata server does not answer.
    """
    host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
    path = "computeMetadata/v1/instance/preempted"
    text = _ask(f"http://{host}/{path}", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_SECONDS if text.strip() == "TRUE" else None


SOURCES: dict[str, Callable[[], float | None]] = {
    "aws": aws_seconds_left,
    "gcp": gcp_seconds_left,
}


def watch(seconds_left: Callable[[], float | None], command: Sequence[str]) -> None:
    """Wait for a notice, then have the node drained; a drain that fails is tried again."""
    while True:
        left = _asked(seconds_left)
        if left is not None and _drained(command, left):
            return
        time.sleep(POLL_SECONDS)


def _asked(seconds_left: Callable[[], float | None]) -> float | None:
    try:
        return seconds_left()
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("no answer from the metadata service: %s", error)
        return None


def _drained(command: Sequence[str], left: float) -> bool:
    """Run the command; whether it succeeded."""
    deadline = f"--deadline-remaining-seconds={max(0, int(left))}"
    logger.warning("spot interruption in %d s: %s", left, " ".join(command))
    try:
        done = subprocess.run([*command, *REASON, deadline], check=False)
    except OSError as error:
        logger.error("%s", error)
        return False
    return done.returncode == 0


def _ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    with _opener.open(request, timeout=ANSWER_SECONDS) as answer:
        return str(answer.read().decode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns when the node is drained."""
    parser = argparse.ArgumentParser(description="Drain a spot node that the cloud takes back.")
    parser.add_argument("cloud", choices=SOURCES)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="ray drain-node --address=...")
    options = parser.parse_args(arguments)
    if not options.command:
        parser.error("the command that drains is missing")
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    watch(SOURCES[options.cloud], options.command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
