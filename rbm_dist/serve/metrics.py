"""What a server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_ROWS = tuple(4**power for power in range(8))


class Metrics:
    """The figures of one server. Models that are not served are counted under the empty name."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("rbm_dist_requests", "Requests answered.", ["model", "status"], registry=registry)
        self.rows = Counter("rbm_dist_rows", "Rows answered.", ["model"], registry=registry)
        self.seconds = Histogram(
            "rbm_dist_request_seconds", "From a request's head to its answer.", ["model"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch_rows = Histogram(
            "rbm_dist_batch_rows", "Rows computed at once.", ["model"], buckets=_ROWS, registry=registry
        )
        self.waiting = Gauge("rbm_dist_queue_length", "Requests waiting for the engine.", ["model"], registry=registry)
        self.under_way = Gauge("rbm_dist_requests_under_way", "Requests not answered yet.", registry=registry)
        self.reloads = Counter("rbm_dist_reloads", "Folders exported anew.", ["model", "outcome"], registry=registry)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)
