"""What a URI says of user, password or key is neither printed nor logged."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from fedlpp_ray.command_line import run_command, without_secrets
from fedlpp_ray.errors import UserError
from fedlpp_ray.tracking.mlflow_runs import Tracker


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/sweeps", "s3://bucket/sweeps"),
        ("s3://KEY:SECRET@bucket/sweeps", "s3://***@bucket/sweeps"),
        ("http://me:pass@host:5000/api", "http://***@host:5000/api"),
        ("postgresql+psycopg2://me:pa:ss@db/mlflow", "postgresql+psycopg2://***@db/mlflow"),
        (
            "s3://b?access_key=K&region=r&secret_key=S",
            "s3://b?access_key=***&region=r&secret_key=***",
        ),
        ("at 'https://h/x?X-Amz-Signature=abc': no", "at 'https://h/x?X-Amz-Signature=***': no"),
        ("a@b.c, http://h/x@y, s3://b?scheme=http", "a@b.c, http://h/x@y, s3://b?scheme=http"),
    ],
)
def test_secrets_of_a_uri_are_hidden(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_an_error_does_not_print_them() -> None:
    console = Console(record=True, width=200)

    def command() -> int:
        raise UserError("--storage s3://KEY:SECRET@bucket: no such bucket")

    assert run_command(command, console) == 2
    assert console.export_text().strip() == "error: --storage s3://***@bucket: no such bucket"


def test_mlflow_is_given_none_and_links_show_none(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "x", tmp_path)
    run = tracker.open("run", {"task": {"data": "https://me:pass@host/rows.csv"}}, {})
    assert tracker.client.get_run(run).data.params == {"task.data": "https://***@host/rows.csv"}
    tracker.uri = "https://me:pass@host/"
    assert tracker.charts_link().startswith("https://***@host/#/experiments/")
    tracker.uri = "postgresql://me:pass@db/mlflow"
    assert "postgresql://***@db/mlflow" in (tracker.ui_command or "")
