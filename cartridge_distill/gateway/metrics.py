"""What the gateway counts, for Prometheus (``GET /metrics``)."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One registry per gateway, so that two in a process do not add up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names, registry = "cartridge_gateway", self.registry
        counter = partial(Counter, namespace=names, registry=registry)
        gauge = partial(Gauge, namespace=names, registry=registry)
        histogram = partial(Histogram, namespace=names, registry=registry, buckets=_SECONDS)
        self.requests = counter(
            "requests_total",
            "Requests answered, by route and HTTP status",
            ["route", "status"],
        )
        self.tokens = counter(
            "tokens_total",
            "Tokens of completions, as the server counts them",
            ["kind"],
        )
        self.latency = histogram(
            "completion_seconds",
            "From a completion request's arrival to its last byte",
        )
        self.inflight = gauge("completions_in_flight", "Completions being answered")
        self.uploads = counter(
            "uploads_total",
            "Cartridge uploads, by outcome: created, repeated, refused, failed",
            ["outcome"],
        )
        self.uploads_inflight = gauge("uploads_in_flight", "Uploads that have a place")
        self.upload_bytes = counter("upload_bytes_total", "Bytes of accepted uploads")
        self.upload_seconds = histogram(
            "upload_seconds",
            "From an upload's arrival until a request with its id works",
        )
        self.upload_stage_seconds = histogram(
            "upload_stage_seconds",
            "Of these seconds: received (hashed, checked and written as it came), placed (flushed "
            "to the disk and renamed), activated (loaded by the server, one token generated)",
            ["stage"],
        )
        self.versions = gauge("versions", "Versions on disk")
        self.refused = gauge(
            "versions_refused", "Versions on disk that are not as they were uploaded; not served"
        )
        self.disk_bytes = gauge("disk_bytes", "Bytes of versions on disk")
        self.deleted = counter(
            "versions_deleted_total",
            "Versions deleted, by reason: asked, kept_enough, disk",
            ["reason"],
        )
        self.restarts = counter(
            "server_restarts_total",
            "Times the server process was started again, by reason: died, stalled, pages",
            ["reason"],
        )
        self.server_up = gauge("server_up", "1 while the server process answers")
