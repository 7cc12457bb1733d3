"""What both clients have in common: their flags, several pictures at a time, and an end in one line."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from clients.pictures import Read, find
from clients.report import Report, Result

Classes = list[tuple[str, float]]
Ask = Callable[[bytes], Classes]
"""Of one picture; raises Refused and OSError."""
SHOW_SECONDS = 1.0
INTERRUPTED = 130  # as a shell counts SIGINT


class ServerError(Exception):
    """The server, or the way to it, says no: `str(error)` is what it says."""


def run(name: str, default_port: int, connect: Callable[[argparse.Namespace], AbstractContextManager[Ask]]) -> int:
    """The whole of a client; the exit code. 1 where a picture had no answer, 2 where the flags make no sense."""
    arguments = _arguments(name, default_port)
    started_at = time.monotonic()
    try:
        pictures = find(arguments.pictures)
        with ExitStack() as stack:
            ask = stack.enter_context(connect(arguments))
            output = stack.enter_context(arguments.output.open("w")) if arguments.output else sys.stdout
            report = Report(arguments.format, output)
            stack.callback(report.close)
            pool = stack.enter_context(ThreadPoolExecutor(arguments.connections))
            stack.callback(pool.shutdown, cancel_futures=True)  # where the rest is not wanted any more
            try:
                answers = [(picture, pool.submit(_ask, ask, picture, read)) for picture, read in pictures]
                failed = _write(name, report, answers)
            except KeyboardInterrupt:
                report.close()
                output.flush()
                os._exit(INTERRUPTED)  # without waiting for the answers to what is under way
    except BrokenPipeError:  # whoever reads has enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        sys.stderr.write(f"{name}: {reason}\n")
        return 1
    if len(pictures) > 1:
        seconds = time.monotonic() - started_at
        rate = len(pictures) / seconds
        sys.stderr.write(f"{len(pictures)} pictures in {seconds:.1f} s, {rate:.1f} a second, {failed} failed\n")
    return 1 if failed else 0


def _write(name: str, report: Report, answers: Sequence[tuple[str, Future[Result]]]) -> int:
    """In the order of asking, and on a terminal how far it is; how many failed."""
    failed, shown_at = 0, time.monotonic()
    for done, (picture, answer) in enumerate(answers, 1):
        try:
            found = answer.result()
        except (OSError, ServerError) as error:
            failed += 1
            sys.stderr.write(f"{name}: {picture}: {getattr(error, 'strerror', None) or error}\n")
        else:
            report.write(found)
        if sys.stderr.isatty() and time.monotonic() - shown_at > SHOW_SECONDS:
            shown_at = time.monotonic()
            sys.stderr.write(f"{done} of {len(answers)} pictures\n")
    return failed


def _ask(ask: Ask, picture: str, read: Read) -> Result:
    data = read()
    started_at = time.monotonic()
    classes = ask(data)
    return Result(picture, (time.monotonic() - started_at) * 1000, classes)


def _arguments(name: str, default_port: int) -> argparse.Namespace:
    environment = os.environ
    address = f"{environment.get('INGRESS_HOST', 'localhost')}:{environment.get('INGRESS_PORT', default_port)}"
    parser = argparse.ArgumentParser(
        prog=f"python -m clients.{name}",
        description="Asks a model server what is in pictures.",
        epilog="INGRESS_HOST, INGRESS_PORT, SERVICE_HOSTNAME and MODEL_NAME are read, as KServe's tutorial sets them.",
    )
    parser.add_argument("pictures", nargs="+", help="files, 'patterns/**/*.jpg', URLs, or requests in JSON")
    parser.add_argument("--address", default=address, help="host and port (default %(default)s)")
    parser.add_argument("--authority", default=environment.get("SERVICE_HOSTNAME", ""), help="host a gateway routes by")
    parser.add_argument("--model_name", default=environment.get("MODEL_NAME", "custom-model"))
    parser.add_argument("--format", choices=("text", "csv", "json"), default="text")
    parser.add_argument("--output", type=Path, help="file to write to, instead of standard output")
    parser.add_argument("--connections", type=int, default=4, help="pictures under way at once (default 4)")
    parser.add_argument("--timeout_seconds", type=float, default=60.0, help="for each picture (default 60)")
    parser.add_argument("--ssl_ca_certs", type=Path, help="CAs of the server's certificate, PEM; turns TLS on")
    parser.add_argument("--ssl_certfile", type=Path, help="certificate to show to the server, PEM")
    parser.add_argument("--ssl_keyfile", type=Path, help="its private key, PEM")
    parser.add_argument("--api_key_file", type=Path, help="file with the key to send; else API_KEY in the environment")
    arguments = parser.parse_args()
    if arguments.connections < 1:
        parser.exit(2, f"{name}: --connections must be at least 1\n")
    if arguments.timeout_seconds <= 0:
        parser.exit(2, f"{name}: --timeout_seconds must be more than 0\n")
    for flag in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "api_key_file"):
        if (file := getattr(arguments, flag)) and not file.is_file():
            parser.exit(2, f"{name}: --{flag}={file} is no file\n")
    return arguments


def authorization(arguments: argparse.Namespace) -> str:
    """The header's value; empty where no key is given. Raises OSError."""
    file = arguments.api_key_file
    key = file.read_text().strip() if file else os.environ.get("API_KEY", "")
    return f"Bearer {key}" if key else ""
