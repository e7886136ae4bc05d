"""Federated LoRA fine-tuning that keeps the clients' data and the server's model private."""

__version__ = "0.1.0"
