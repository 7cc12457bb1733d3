"""Every setting once: flag, environment variable, --help and the README's table all come from this one."""

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

Check = Callable[[Any], str | None]  # of one value, of several each


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
        return f"must be a format for %: {error}"
    return None


def _is_object(text: str) -> str | None:
    try:
        return None if isinstance(json.loads(text), dict) else "must be a JSON object"
    except ValueError:
        return "must be a JSON object"


def _setting(default: Any, help_text: str, check: Check | None = None) -> Any:
    return field(default=default, metadata={"help": help_text, "check": check})


# In --help and the README, by the setting that each begins with.
GROUPS = {
    "model_name": "Model",
    "host": "Ports",
    "ssl_certfile": "Security",
    "enable_ui": "Interfaces",
    "engine": "Computing",
    "max_batch_size": "Batches and threads",
    "enable_latency_logging": "Logs",
    "max_connections": "Limits",
    "grace_period_seconds": "Stopping",
}

_port = _between(0, 65535)
_positive = _between(1, 2**31 - 1)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server was started with; units are in the names."""

    model_name: str = _setting(
        "custom-model",
        "name that clients call the model by; on Knative the service's name is the default",
        _matches(r"[^/:\s]+", "a name without slash, colon or blank"),
    )
    model_dir: Path | None = _setting(
        None,
        "directory of the exported model, or its .onnx file, or a directory of such directories, each a model by its "
        "name; else /mnt/models, else model/ in the working directory, else model/ beside app.py",
    )
    model: tuple[str, ...] = _setting(
        (),
        "NAME=DIR, one model of several; repeated, or separated by commas; in place of --model_name and --model_dir",
        _matches(r"[^/:\s=]+=.*", "NAME=DIR, the name without slash, colon or blank"),
    )
    storage_uri: str = _setting(
        "",
        "where the model is taken from without --model_dir: s3://, gs://, hf://, https:// and more are downloaded at "
        "the start; a path, file:// and pvc:// are taken where they lie; STORAGE_URI in the environment as well",
    )
    storage_cache_dir: Path | None = _setting(
        None, "directory that downloads are kept in for the next start; else pinnace in the user's cache"
    )
    predictor: tuple[str, ...] = _setting(
        (DEFAULT_PREDICTOR,),
        "class that turns requests into rows and predictions into answers, as module:Class; as NAME=module:Class that "
        "of one of several models; repeated, or separated by commas",
        _matches(r"([^=]+=)?[\w.]+:\w+", "module:Class, or NAME=module:Class"),
    )
    host: str = _setting("", "address to listen on; empty means every interface, IPv4 and IPv6")
    http_port: int = _setting(8080, "port of REST; 0 takes a free one; PORT in the environment is the default", _port)
    grpc_port: int = _setting(8081, "port of gRPC; 0 takes a free one", _port)
    enable_grpc: bool = _setting(True, "true or false; without it there is no gRPC port, and no gRPC on the HTTP port")
    protocol: str = _setting(
        "", "v1, v2 or grpc-v2, as KServe's PROTOCOL says it; checked and logged only, since all are served at once",
        _one_of("v1", "v2", "grpc-v2"),
    )  # fmt: skip
    ssl_certfile: Path | None = _setting(
        None, "certificate and its chain, PEM; with it both ports speak TLS only, and --ssl_keyfile is needed"
    )
    ssl_keyfile: Path | None = _setting(None, "its private key, PEM, without a password")
    ssl_ca_certs: Path | None = _setting(
        None,
        "CAs of clients' certificates, PEM; without one of theirs nothing but the HTTP port's probes is answered",
    )
    api_key_file: Path | None = _setting(
        None, "keys, one a line; nothing but probes is answered without Authorization: Bearer and one of them"
    )
    cors_allow_origins: str = _setting(
        "", "web pages that may call, as origins separated by commas; * is every one, as in the tutorial; else none"
    )
    enable_ui: bool = _setting(
        True, "true or false; with it browsers get a page at / to try pictures on; other clients what KServe answers"
    )
    enable_docs_url: bool = _setting(
        False, "true or false; with it /docs shows the API to people, who can try it out there"
    )
    ce_type: str = _setting(
        "io.kserve.inference.response", "type of the CloudEvents that answer such; CE_TYPE in the environment as well"
    )
    ce_source: str = _setting(
        "", "their source; else io.kserve.inference. and the model's name; CE_SOURCE in the environment as well"
    )
    ce_merge: bool = _setting(
        False, "true or false; with it they take over the request's attributes; CE_MERGE in the environment as well"
    )
    enable_grpc_reflection: bool = _setting(
        False, "true or false; with it grpcurl and its like need no .proto files, and anybody may list the methods"
    )
    enable_model_repository: bool = _setting(
        False, "true or false; with it clients may unload a model, to free its memory, and load it again"
    )
    engine: str = _setting(
        "local",
        "local or ray; with ray each model runs in processes of Ray Serve, which the extra ray brings",
        _one_of("local", "ray"),
    )
    num_replicas: int = _setting(1, "with --engine=ray, processes that run each model", _between(1, 10_000))
    ray_actor_options: str = _setting(
        '{"num_cpus": 1}', "with --engine=ray, what each of them gets, as JSON; fractions are shares", _is_object
    )
    max_ongoing_requests: int = _setting(
        128, "with --engine=ray, most requests in one of them; more wait in the server, and for longer", _positive
    )
    autoscaling_config: str = _setting(
        "{}", "with --engine=ray, in place of --num_replicas: Ray Serve's autoscaling, as JSON", _is_object
    )
    device: str = _setting(
        "auto", "auto, cpu or cuda; auto takes CUDA where it works, cuda stops the start where it does not",
        _one_of("auto", "cpu", "cuda"),
    )  # fmt: skip
    gpu_memory_percent: int = _setting(
        100, "most of the GPU's memory that each model takes; with --engine=ray a fraction as num_gpus limits it too",
        _between(1, 100),
    )  # fmt: skip
    workers: int = _setting(
        1, "processes that share the ports and the CPUs; each has the limits on requests for itself", _between(1, 256)
    )
    threads: int = _setting(
        0, "threads that run the model; 0 means one a CPU of the quota, which workers share", _between(0, 1024)
    )
    fast_decode: bool = _setting(
        False,
        "true or false; with it JPEGs are decoded no larger than needed: faster, and pixels differ from torchvision's "
        "by up to 3 grey levels on average",
    )
    max_batch_size: int = _setting(16, "most rows in one run of the model; a larger request takes several", _positive)
    max_batch_delay_ms: int = _setting(
        0, "milliseconds that a batch may wait to be filled; 0 never waits, and still takes what is queued",
        _between(0, 60_000),
    )  # fmt: skip
    max_asyncio_workers: int = _setting(
        0, "threads that decode requests and encode answers; 0 means as many as --threads", _between(0, 1024)
    )
    max_threads: int = _setting(
        4, "accepted for KServe's sake and without effect: gRPC takes no threads here", _between(1, 1024)
    )
    event_loop: str = _setting(
        "auto", "auto, asyncio or uvloop; auto is asyncio, uvloop must be installed beside the requirements",
        _one_of("auto", "asyncio", "uvloop"),
    )  # fmt: skip
    enable_latency_logging: bool = _setting(
        True, "true or false; a line an inference with the milliseconds of each handler, by the logger kserve.trace"
    )
    configure_logging: bool = _setting(
        True, "true or false; without it nothing is logged but by what a predictor configures"
    )
    log_config_file: Path | None = _setting(
        None, "configuration of Python's logging, .json, .yaml or .ini; those written for KServe work unchanged"
    )
    log_format: str = _setting("text", "text or json: lines for people or for machines", _one_of("text", "json"))
    access_log_format: str = _setting(
        "",
        "format of the line a request, as '%(h)s %(request_line)s %(s)s %(M)s', with asgi-logger's atoms",
        _is_format,
    )
    max_connections: int = _setting(
        1000, "most connections to each port; for one more on the HTTP port, that which is idle longest is closed",
        _between(1, 1_000_000),
    )  # fmt: skip
    max_body_bytes: int = _setting(8 * MIB, "largest REST body; a larger one is answered 413", _positive)
    grpc_max_receive_message_length: int = _setting(
        8 * MIB, "largest gRPC request in bytes; a larger one is answered RESOURCE_EXHAUSTED", _positive
    )
    grpc_max_send_message_length: int = _setting(
        8 * MIB, "largest gRPC response in bytes; a larger one is answered RESOURCE_EXHAUSTED", _positive
    )
    max_image_pixels: int = _setting(
        50_000_000, "largest image, width times height; a larger one is answered 413 without being decoded", _positive
    )
    max_instances: int = _setting(128, "most rows in one request; more are answered 413", _positive)
    max_concurrent_requests: int = _setting(
        128, "most inference requests of a model under way at once; one more is answered 503 at once", _positive
    )
    max_queue_rows: int = _setting(
        1024, "most rows in the requests of a model under way, one each until it is decoded; then 503", _positive
    )
    max_queue_bytes: int = _setting(
        256 * MIB, "most bytes of all bodies and gRPC messages under way; one more is answered 503", _positive
    )
    read_timeout_seconds: int = _setting(
        30, "seconds that a client may take to send a body or gRPC message; a slower one gets 408 or DEADLINE_EXCEEDED",
        _positive,
    )  # fmt: skip
    request_timeout_seconds: int = _setting(
        60, "seconds that an inference request may take once it is read; a later one is answered 504 and given up",
        _positive,
    )  # fmt: skip
    timeout_keep_alive: int = _setting(
        65, "seconds that an idle connection stays open; keep it above the idle timeout of the proxy in front",
        _between(1, 1_000_000),
    )  # fmt: skip
    grace_period_seconds: int = _setting(
        25, "seconds that a stopping server has to answer what it accepted; keep it below Kubernetes' 30", _positive
    )
    drain_delay_seconds: int = _setting(
        0, "seconds of those in which a stopping server is not ready and still accepts, until nobody sends it any more",
        _between(0, 3600),
    )  # fmt: skip
