"""What /metrics tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from torch import nn

from zeroskip.nn import PackedLinear

__all__ = ["Metrics"]

SHORT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("zeroskip_requests", "Requests answered.", ["route", "status"], registry=own)
        self.prompt_tokens = Counter("zeroskip_prompt_tokens", "Tokens of prompts and texts.", registry=own)
        self.generated_tokens = Counter("zeroskip_generated_tokens", "Tokens generated.", registry=own)
        self.cancelled = Counter("zeroskip_cancelled_requests", "Requests whose client left.", registry=own)
        self.running = Gauge("zeroskip_requests_running", "Requests that generate.", registry=own)
        self.waiting = Gauge("zeroskip_requests_waiting", "Requests in the queue.", registry=own)
        self.first_token = Histogram(
            "zeroskip_time_to_first_token_seconds", "From the request to its first token.", buckets=LONG, registry=own
        )
        self.each_token = Histogram(
            "zeroskip_time_per_token_seconds", "From one token of a request to the next.", buckets=SHORT, registry=own
        )
        self.whole = Histogram("zeroskip_request_seconds", "Whole requests.", ["route"], buckets=LONG, registry=own)
        self.sparsity = Gauge("zeroskip_sparsity", "Fraction of zeros in the packed weights in use.", registry=own)
        self.packed_layers = Gauge("zeroskip_packed_layers", "Linear layers that are packed.", registry=own)
        self.weight_bytes = Gauge("zeroskip_weight_bytes", "Bytes of all weights in memory.", registry=own)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float]) -> None:
        """Take the lengths of the queue from these when asked."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)

    def describe(self, model: nn.Module) -> None:
        """State what is packed in the model."""
        zeros = weights = 0.0
        layers = 0
        for module in model.modules():
            if isinstance(module, PackedLinear):
                packed = module.packed
                count = packed.shape[0] * packed.shape[1]
                layers, weights, zeros = layers + 1, weights + count, zeros + count - packed.nnz
        self.sparsity.set(zeros / weights if weights else 0.0)
        self.packed_layers.set(layers)
        self.weight_bytes.set(sum(tensor.nbytes for tensor in model.parameters()))

    def text(self) -> bytes:
        """Return the page."""
        page: bytes = generate_latest(self.registry)
        return page
