"""Command line of both clients: flags, several pictures at once, and a failure in one line."""

from __future__ import annotations

import argparse
import os
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from clients.pictures import Read, find_pictures
from clients.report import Report, Result

Classes = list[tuple[str, float]]
"""Labels and probabilities, the highest first."""
Classify = Callable[[bytes], Classes]
"""A call of the server with one encoded picture. Raises ServerError and OSError."""
Connect = Callable[[argparse.Namespace], AbstractContextManager[Classify]]

PROGRESS_INTERVAL_SECONDS = 1.0
EXIT_INTERRUPTED = 130  # a shell's exit code for SIGINT


class ServerError(Exception):
    """The server answered with an error, or cannot be reached. `str(error)` is the line that the user sees."""


def run(name: str, default_port: int, connect: Connect) -> int:
    """Run a client and return its exit code: 0, 1 if a picture has no answer, or 130 after an interrupt.

    Exits with 2 if a flag makes no sense.
    """
    arguments = _parse_arguments(name, default_port)
    started_at = time.monotonic()
    try:
        pictures = find_pictures(arguments.pictures)
        with ExitStack() as stack:
            classify = stack.enter_context(connect(arguments))
            output = stack.enter_context(arguments.output.open("w")) if arguments.output else sys.stdout
            report = Report(arguments.format, output)
            stack.callback(report.close)
            pool = stack.enter_context(ThreadPoolExecutor(arguments.connections))
            stack.callback(pool.shutdown, cancel_futures=True)  # after an error, skip the other pictures
            try:
                results = [(picture, pool.submit(_classify, classify, picture, read)) for picture, read in pictures]
                failed = _write_results(name, report, results)
            except KeyboardInterrupt:
                report.close()
                output.flush()
                os._exit(EXIT_INTERRUPTED)  # a normal exit would wait for the requests in flight
    except BrokenPipeError:  # the reader of standard output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        sys.stderr.write(f"{name}: {reason}\n")
        return 1
    if len(pictures) > 1:
        seconds = time.monotonic() - started_at
        rate = len(pictures) / seconds
        sys.stderr.write(f"{len(pictures)} pictures in {seconds:.1f} s, {rate:.1f} per second, {failed} failed\n")
    return 1 if failed else 0


def _write_results(name: str, report: Report, results: Sequence[tuple[str, Future[Result]]]) -> int:
    """Write the results in the order of the pictures, show progress on a terminal, and return how many failed."""
    failed, shown_at = 0, time.monotonic()
    for done, (picture, future) in enumerate(results, 1):
        try:
            result = future.result()
        except (OSError, ServerError) as error:
            failed += 1
            sys.stderr.write(f"{name}: {picture}: {getattr(error, 'strerror', None) or error}\n")
        else:
            report.write(result)
        if sys.stderr.isatty() and time.monotonic() - shown_at > PROGRESS_INTERVAL_SECONDS:
            shown_at = time.monotonic()
            sys.stderr.write(f"{done} of {len(results)} pictures\n")
    return failed


def _classify(classify: Classify, picture: str, read: Read) -> Result:
    data = read()
    started_at = time.monotonic()
    classes = classify(data)
    return Result(picture, (time.monotonic() - started_at) * 1000, classes)


def _parse_arguments(name: str, default_port: int) -> argparse.Namespace:
    environment = os.environ
    address = f"{environment.get('INGRESS_HOST', 'localhost')}:{environment.get('INGRESS_PORT', default_port)}"
    parser = argparse.ArgumentParser(
        prog=f"python -m clients.{name}",
        description="Classify pictures with a model server.",
        epilog="The environment variables of KServe's tutorial set defaults: INGRESS_HOST and INGRESS_PORT that of "
        "--address, SERVICE_HOSTNAME that of --authority, MODEL_NAME that of --model_name.",
    )
    parser.add_argument(
        "pictures",
        nargs="+",
        help="files, quoted patterns such as 'photos/**/*.jpg', URLs, or JSON files with V1 or V2 requests",
    )
    parser.add_argument("--address", default=address, help="host and port of the server (default %(default)s)")
    parser.add_argument(
        "--authority",
        default=environment.get("SERVICE_HOSTNAME", ""),
        help="host name to send to a gateway that routes by it (HTTP's Host, gRPC's :authority)",
    )
    parser.add_argument(
        "--model_name",
        default=environment.get("MODEL_NAME", "custom-model"),
        help="name of the model to call (default %(default)s)",
    )
    parser.add_argument(
        "--format", choices=("text", "csv", "json"), default="text", help="format of the results (default text)"
    )
    parser.add_argument("--output", type=Path, help="file to write the results to (default: standard output)")
    parser.add_argument("--connections", type=int, default=4, help="maximum number of requests in flight (default 4)")
    parser.add_argument(
        "--timeout_seconds", type=float, default=60.0, help="timeout of a request, in seconds (default 60)"
    )
    parser.add_argument(
        "--ssl_ca_certs", type=Path, help="CA certificates to verify the server's with, PEM; turns TLS on"
    )
    parser.add_argument("--ssl_certfile", type=Path, help="client certificate, PEM; needs --ssl_ca_certs")
    parser.add_argument("--ssl_keyfile", type=Path, help="private key of --ssl_certfile, PEM")
    parser.add_argument(
        "--api_key_file",
        type=Path,
        help="file with the API key to send (default: the environment variable API_KEY, if it is set)",
    )
    arguments = parser.parse_args()
    if arguments.connections < 1:
        parser.exit(2, f"{name}: --connections must be at least 1\n")
    if arguments.timeout_seconds <= 0:
        parser.exit(2, f"{name}: --timeout_seconds must be more than 0\n")
    for flag in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "api_key_file"):
        if (file := getattr(arguments, flag)) and not file.is_file():
            parser.exit(2, f"{name}: --{flag}={file} is not a file\n")
    try:
        arguments.ssl_keyfile = arguments.ssl_keyfile or arguments.ssl_certfile  # one file may hold both
        arguments.ssl_context = _make_ssl_context(arguments)
    except ValueError as error:
        parser.exit(2, f"{name}: {error}\n")
    return arguments


def _make_ssl_context(arguments: argparse.Namespace) -> ssl.SSLContext | None:
    """Return the context for TLS, or None without --ssl_ca_certs.

    Raises ValueError if a flag is missing or a file is invalid. The gRPC client needs this check too, because grpc
    aborts the process for some invalid files, and logs several lines for others.
    """
    ca_certs, certfile, keyfile = arguments.ssl_ca_certs, arguments.ssl_certfile, arguments.ssl_keyfile
    if keyfile and not certfile:
        raise ValueError("--ssl_keyfile needs --ssl_certfile")
    if certfile and not ca_certs:
        raise ValueError("--ssl_certfile needs --ssl_ca_certs")
    if not ca_certs:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_certs)
    except ssl.SSLError:
        raise ValueError(f"--ssl_ca_certs={ca_certs} has no certificates in PEM format") from None
    if certfile:
        try:
            context.load_cert_chain(certfile, keyfile)
        except ssl.SSLError:
            raise ValueError(
                f"--ssl_certfile={certfile} and --ssl_keyfile={keyfile} are not a certificate and its key in PEM format"
            ) from None
    return context


def authorization(arguments: argparse.Namespace) -> str:
    """Return the value of the Authorization header, or an empty string without an API key.

    Raises OSError if the file cannot be read, and ValueError if a header cannot carry the key.
    """
    file = arguments.api_key_file
    key = file.read_text().strip() if file else os.environ.get("API_KEY", "")
    if not key.isascii() or not key.isprintable():
        raise ValueError("the API key must be printable ASCII on a single line: see --api_key_file")
    return f"Bearer {key}" if key else ""
