"""Table of all settings. Flags, environment variables, --help and the README's table are derived from it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MIB = 1024 * 1024

DEFAULT_PREDICTOR = "pinnace.models.classifier:Classifier"

Check = Callable[[Any], str | None]
"""Returns what is wrong with a value, or None. A flag that takes several values has each of them checked."""


def _between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must lie between {low} and {high}"


def _one_of(*choices: str) -> Check:
    return lambda value: None if value in choices else f"must be one of {', '.join(choices)}"


def _matches(pattern: str, what: str) -> Check:
    return lambda value: None if re.fullmatch(pattern, value) else f"must be {what}"


def _is_format(text: str) -> str | None:
    try:
        text % defaultdict(int)
    except (ValueError, TypeError) as error:
        return f"must be a %-format ({error})"
    return None


def _is_object(text: str) -> str | None:
    try:
        return None if isinstance(json.loads(text), dict) else "must be a JSON object"
    except ValueError:
        return "must be a JSON object"


def _setting(default: Any, help_text: str, check: Check | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "check": check})


# Headings in --help and the README, by the first setting below each.
GROUPS = {
    "model_name": "Model",
    "host": "Ports",
    "ssl_certfile": "Authentication and TLS",
    "enable_ui": "Interfaces",
    "engine": "Runtime",
    "workers": "Workers, threads and batching",
    "enable_latency_logging": "Logging",
    "max_connections": "Limits",
    "grace_period_seconds": "Graceful shutdown",
}

_port = _between(0, 65535)
_positive = _between(1, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Settings:
    """Configuration of the server. Names contain the unit; --help says what a setting does.

    The metadata of a field holds its help text and the check of its values.
    """

    model_name: str = _setting(
        "custom-model",
        "Name of the model in URLs and gRPC messages. On Knative it defaults to the name of the service.",
        _matches(r"[^/:\s]+", "a name without slash, colon or blank"),
    )
    model_dir: Path | None = _setting(
        None,
        "Directory of an exported model, or its .onnx file. A directory of such directories serves each as a model, "
        "named after its directory. If empty: /mnt/models, model/ in the working directory, or model/ next to app.py, "
        "whichever exists first.",
    )
    model: tuple[str, ...] = _setting(
        (),
        "One of several models, as NAME=DIR; DIR may be empty if the predictor needs no files. Repeat the flag, or "
        "separate models with commas. Replaces --model_name and --model_dir.",
        _matches(r"[^/:\s=]+=.*", "NAME=DIR, the name without slash, colon or blank"),
    )
    storage_uri: str = _setting(
        "",
        "Location of the model if --model_dir is not set. s3://, gs://, hf://, https:// and others are downloaded at "
        "startup; a path, file:// or pvc:// is used in place. The variable STORAGE_URI works as well.",
    )
    storage_cache_dir: Path | None = _setting(
        None,
        "Directory that keeps downloaded models for the next start. If empty: pinnace in the user's cache directory.",
    )
    predictor: tuple[str, ...] = _setting(
        (DEFAULT_PREDICTOR,),
        "Predictor class as module:Class, or as NAME=module:Class for one of several models. Repeat the flag, or "
        "separate classes with commas.",
        _matches(r"([^=]+=)?[\w.]+:\w+", "module:Class, or NAME=module:Class"),
    )
    host: str = _setting("", "Address to listen on. If empty: all interfaces, IPv4 and IPv6.")
    http_port: int = _setting(
        8080, "Port for REST, and for gRPC without TLS. 0 picks a free port. The variable PORT works as well.", _port
    )
    grpc_port: int = _setting(8081, "Port for gRPC. 0 picks a free port.", _port)
    enable_grpc: bool = _setting(True, "Serve gRPC, on its own port and on the HTTP port.")
    protocol: str = _setting(
        "",
        "Protocol that KServe expects: v1, v2 or grpc-v2. It is only checked and logged, since all protocols are "
        "served. The variable PROTOCOL works as well.",
        _one_of("v1", "v2", "grpc-v2"),
    )
    ssl_certfile: Path | None = _setting(
        None, "PEM file with the server's certificate chain. Both ports then accept TLS only. Needs --ssl_keyfile."
    )
    ssl_keyfile: Path | None = _setting(None, "PEM file with the private key of --ssl_certfile, without a password.")
    ssl_ca_certs: Path | None = _setting(
        None,
        "PEM file with the CAs of client certificates. A client without a certificate signed by one of them gets 401 "
        "for all but the probes of the HTTP port, and no connection to the gRPC port.",
    )
    api_key_file: Path | None = _setting(
        None,
        "File with API keys, one per line; lines that begin with # are comments. A client that does not send one of "
        "them as Authorization: Bearer KEY gets 401 or UNAUTHENTICATED for all but probes.",
    )
    cors_allow_origins: str = _setting(
        "", "Origins of web pages that may call the server (CORS), separated by commas. * allows all. If empty: none."
    )
    enable_ui: bool = _setting(
        True, "Serve browsers a page at / to try the model. Other clients get KServe's JSON there."
    )
    enable_docs_url: bool = _setting(False, "Serve interactive API documentation (Swagger UI) at /docs.")
    ce_type: str = _setting(
        "io.kserve.inference.response",
        "The type attribute of response CloudEvents. The variable CE_TYPE works as well.",
    )
    ce_source: str = _setting(
        "",
        "The source attribute of response CloudEvents. If empty: io.kserve.inference.MODEL_NAME. The "
        "variable CE_SOURCE works as well.",
    )
    ce_merge: bool = _setting(
        False,
        "Copy the request's CloudEvent attributes, such as subject and extensions, to the response. The "
        "variable CE_MERGE works as well.",
    )
    enable_grpc_reflection: bool = _setting(
        False, "Serve gRPC reflection: grpcurl and similar tools can list all methods and need no .proto files."
    )
    enable_model_repository: bool = _setting(
        False,
        "Allow clients to load and unload models. If false, such requests get 501 or UNIMPLEMENTED. Needs --workers=1.",
    )
    engine: str = _setting(
        "local",
        "Where models run: local (inside the server) or ray (in replicas of Ray Serve; needs the extra ray).",
        _one_of("local", "ray"),
    )
    num_replicas: int = _setting(1, "Replicas per model with --engine=ray.", _between(1, 10_000))
    ray_actor_options: str = _setting(
        '{"num_cpus": 1}',
        "Resources per replica with --engine=ray, as a JSON object. A fraction is a share of a CPU or GPU.",
        _is_object,
    )
    max_ongoing_requests: int = _setting(
        128,
        "Maximum requests in flight per replica with --engine=ray. Further requests wait in the server, which takes "
        "longer.",
        _positive,
    )
    autoscaling_config: str = _setting(
        "{}", "Autoscaling of Ray Serve with --engine=ray, as a JSON object. Replaces --num_replicas.", _is_object
    )
    device: str = _setting(
        "auto",
        "Device that runs the model: auto, cpu or cuda. auto uses CUDA if it works; with cuda the server exits with "
        "code 6 if CUDA does not work.",
        _one_of("auto", "cpu", "cuda"),
    )
    gpu_memory_percent: int = _setting(
        100,
        "Maximum percentage of the GPU's memory per model. With --engine=ray a fraction as num_gpus limits it too.",
        _between(1, 100),
    )
    fast_decode: bool = _setting(
        False,
        "Decode large JPEGs at reduced size. It is faster, but pixels differ from torchvision's by up to 3 grey levels "
        "on average.",
    )
    workers: int = _setting(
        1,
        "Server processes. They share the ports and the CPUs; limits on requests hold for each process.",
        _between(1, 256),
    )
    worker_timeout_seconds: int = _setting(
        30,
        "Seconds after which a worker that does not respond is killed and replaced, with --workers=2 or more. The time "
        "to load a model does not count.",
        _positive,
    )
    threads: int = _setting(
        0, "Threads that run the model. 0 means one per CPU of the quota, divided among the workers.", _between(0, 1024)
    )
    max_batch_size: int = _setting(
        16, "Maximum rows per run of the model. A larger request takes several runs.", _positive
    )
    max_batch_delay_ms: int = _setting(
        0,
        "Milliseconds that a batch may wait for more rows. 0 means no waiting: a run takes what is queued.",
        _between(0, 60_000),
    )
    max_asyncio_workers: int = _setting(
        0,
        "Threads that decode requests and encode responses. 0 means as many as --threads, but at least 2.",
        _between(0, 1024),
    )
    max_threads: int = _setting(
        4, "No effect: gRPC needs no threads here. Accepted for compatibility with KServe.", _between(1, 1024)
    )
    event_loop: str = _setting(
        "auto",
        "Event loop: auto, asyncio or uvloop. auto is asyncio; uvloop must be installed separately.",
        _one_of("auto", "asyncio", "uvloop"),
    )
    enable_latency_logging: bool = _setting(
        True,
        "Log a line per inference request with the milliseconds of each predictor method, to the logger kserve.trace.",
    )
    configure_logging: bool = _setting(
        True, "Configure logging at startup. If false, logging is left to the predictor."
    )
    log_config_file: Path | None = _setting(
        None, "Configuration of Python's logging: .json, .yaml or .ini. Files written for KServe work unchanged."
    )
    log_format: str = _setting("text", "Format of log lines: text or json.", _one_of("text", "json"))
    access_log_format: str = _setting(
        "",
        "Format of access log lines, with the atoms of asgi-logger, such as '%(h)s %(request_line)s %(s)s %(M)s'. If "
        "empty: uvicorn's format.",
        _is_format,
    )
    max_connections: int = _setting(
        1000,
        "Maximum connections per port, TLS handshakes included. At the limit the HTTP port closes a connection that "
        "waits for its client to read, or else the one that has been idle longest; if all are busy, a new connection "
        "gets 503, or with TLS is closed. The gRPC port refuses a new connection. A low limit on open files lowers it.",
        _between(1, 1_000_000),
    )
    max_body_bytes: int = _setting(
        17 * MIB,
        "Maximum size of a REST request body in bytes. A larger one gets 413. The default admits a file of 12 MiB as "
        "base64.",
        _positive,
    )
    grpc_max_receive_message_length: int = _setting(
        8 * MIB, "Maximum size of a gRPC request in bytes. A larger one gets RESOURCE_EXHAUSTED.", _positive
    )
    grpc_max_send_message_length: int = _setting(
        8 * MIB,
        "Maximum size of a gRPC response in bytes. Instead of a larger one the client gets RESOURCE_EXHAUSTED.",
        _positive,
    )
    max_image_pixels: int = _setting(
        50_400_000,
        "Maximum size of an image, width times height. A larger one is not decoded and gets 413 or RESOURCE_EXHAUSTED.",
        _positive,
    )
    max_request_pixels: int = _setting(
        200_000_000,
        "Maximum size of all images of a request together. A JPEG of more than 10 scans counts its pixels once for "
        "every 10 scans. A larger request gets 413 or RESOURCE_EXHAUSTED.",
        _positive,
    )
    max_decode_bytes: int = _setting(
        0,
        "Maximum bytes of memory for decoding, divided among the workers. A request waits until enough is free, and "
        "gets 413 or RESOURCE_EXHAUSTED if it needs more than seven eighths of a worker's part. 0 means two fifths of "
        "the container's memory limit, or else of the machine's memory; with --engine=ray at most 512 MiB per replica.",
        _between(0, 2**63 - 1),
    )
    max_instances: int = _setting(
        128, "Maximum rows per request. A larger request gets 413 or RESOURCE_EXHAUSTED.", _positive
    )
    max_concurrent_requests: int = _setting(
        128,
        "Maximum inference requests in flight per model. Further requests get 503 or UNAVAILABLE immediately.",
        _positive,
    )
    max_queue_rows: int = _setting(
        1024,
        "Maximum rows in flight per model. A request counts as one row until it is decoded. Further requests get 503 "
        "or UNAVAILABLE.",
        _positive,
    )
    max_queue_bytes: int = _setting(
        256 * MIB,
        "Maximum bytes of all request bodies and gRPC messages in flight, and of responses that wait to be sent. The "
        "connection or call that has waited longest for its client to read is closed to make room; if there is none, "
        "further requests get 503 or UNAVAILABLE.",
        _positive,
    )
    read_timeout_seconds: int = _setting(
        30,
        "Seconds within which a client must send a request body or gRPC message. A slower client gets 408 or "
        "DEADLINE_EXCEEDED.",
        _positive,
    )
    send_timeout_seconds: int = _setting(
        30,
        "Seconds within which a client must read some of a response that waits to be sent. Otherwise the connection is "
        "closed, or the HTTP/2 stream reset. The gRPC port ends a call whose response is not sent completely within "
        "this time, and closes a connection that does not acknowledge a ping within it.",
        _positive,
    )
    request_timeout_seconds: int = _setting(
        60,
        "Seconds within which an inference request must be answered, from when it is read. Otherwise it is cancelled "
        "and the client gets 504 or DEADLINE_EXCEEDED.",
        _positive,
    )
    timeout_keep_alive: int = _setting(
        65,
        "Seconds after which an idle connection is closed. Set it above the idle timeout of a proxy in front of the "
        "server.",
        _between(1, 1_000_000),
    )
    grace_period_seconds: int = _setting(
        25,
        "Seconds after the stop signal within which accepted requests are answered. Then the rest is cut and the exit "
        "code is 8. Keep it below terminationGracePeriodSeconds of Kubernetes (30).",
        _positive,
    )
    drain_delay_seconds: int = _setting(
        0,
        "Seconds after the stop signal in which the server reports not ready but still accepts requests, so that load "
        "balancers can stop sending traffic. Part of --grace_period_seconds.",
        _between(0, 3600),
    )
