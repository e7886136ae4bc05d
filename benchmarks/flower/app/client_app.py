"""A client: load its data and the model, take the global adapter, train, return the adapter."""

from __future__ import annotations

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from benchmarks.flower.app.task import get_model, load_data, train

app = ClientApp()


@app.train()
def train_client(message: Message, context: Context) -> Message:
    """One client's round, with what its parts took."""
    torch.set_num_threads(1)
    config = message.content["config"]
    start = time.perf_counter()
    loader = load_data(int(context.node_config["partition-id"]), config)
    loaded = time.perf_counter()
    model = get_model(config)
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    made = time.perf_counter()
    loss, steps = train(model, loader, config)
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = {
        "num-examples": len(loader.dataset),  # type: ignore[arg-type]
        "train-loss": loss,
        "data": loaded - start,
        "model": made - loaded,
        "arithmetic": steps,
        "client": time.perf_counter() - start,
    }
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
