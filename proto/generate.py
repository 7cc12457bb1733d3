"""Generates pinnace/proto/generated from the .proto files, for `make proto`. The server never imports this tool."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet

HERE = Path(__file__).parent
FILES = sorted(path.name for path in HERE.glob("*.proto"))


def generate(output: Path) -> None:
    """Write the message classes, and the module of descriptors that gRPC reflection returns."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        metadata = Path(scratch) / "descriptors"
        options = ["client_generation=none", "server_generation=none"]
        subprocess.run(
            [
                *(sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}"),
                f"--python_betterproto2_out={output}",
                *(f"--python_betterproto2_opt={option}" for option in options),
                f"--descriptor_set_out={metadata}",
                *FILES,
            ],
            check=True,
            # protoc finds its plugin, and the plugin finds ruff, in the directory of this interpreter.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
        files = FileDescriptorSet.FromString(metadata.read_bytes()).file
    module = output / "descriptors.py"
    module.write_text(
        '"""Serialized FileDescriptorProtos by file, and the file of each service, method and message."""\n'
        + f"\nFILES = { ({file.name: file.SerializeToString() for file in files})!r}\n"
        + f"\nSYMBOLS = { ({symbol: file.name for file in files for symbol in _symbols(file)})!r}\n"
        + f"\nSERVICES = {[f'{file.package}.{service.name}' for file in files for service in file.service]!r}\n"
    )


def _symbols(file: FileDescriptorProto) -> Iterator[str]:
    for service in file.service:
        yield f"{file.package}.{service.name}"
        yield from (f"{file.package}.{service.name}.{method.name}" for method in service.method)
    yield from _nested(file.package, file.message_type)


def _nested(scope: str, messages: Iterable[DescriptorProto]) -> Iterator[str]:
    for message in messages:
        name = f"{scope}.{message.name}"
        yield name
        yield from (f"{name}.{enum.name}" for enum in message.enum_type)
        yield from _nested(name, message.nested_type)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "pinnace/proto/generated")
