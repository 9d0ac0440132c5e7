"""Derives envoy/completion.binpb: the contract as Envoy's JSON transcoder sees it.

The derived view is byte-for-byte compatible with `proto/completion/v1/completion.proto` on the wire and differs only
in how it reads and prints as JSON, where OpenAI's API asks for what protobuf's JSON mapping does not offer. It is only
for Envoy: it repeats JSON names within a message, which protobuf's Python runtime refuses to load.

    python envoy/descriptor.py            writes the file
    python envoy/descriptor.py --check    fails when the committed file is stale
"""

import argparse
import sys
import tempfile
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "envoy" / "completion.binpb"
CONTRACT = "completion/v1/completion.proto"
# The service enforces the rules, not the transcoder.
RULES = "buf/validate/validate.proto"

# A NullValue printed under its sibling's name, so that an unset member of the oneof is `null` rather than absent.
NULLS = {
    ("Choice", "no_logprobs"): "logprobs",
    ("Error", "no_param"): "param",
    ("Error", "no_code"): "code",
}

# Laid out on the wire like google.protobuf.Value, which prints as a bare number, object or null.
VALUES = {("Logprobs", "token_logprobs"), ("Logprobs", "top_logprobs")}

ENUM_NAMES = {
    "FINISH_REASON_STOP": "stop",
    "FINISH_REASON_LENGTH": "length",
    "ON_DEADLINE_FAIL": "FAIL",
    "ON_DEADLINE_PARTIAL": "PARTIAL",
    "RESPONSE_FORMAT_TYPE_TEXT": "text",
    "RESPONSE_FORMAT_TYPE_JSON_OBJECT": "json_object",
    "RESPONSE_FORMAT_TYPE_JSON_SCHEMA": "json_schema",
}


def request_messages(file: FileDescriptorProto) -> set[str]:
    """The names of the messages that requests consist of."""
    messages = {message.name: message for message in file.message_type}
    found: set[str] = set()
    waiting = [method.input_type for service in file.service for method in service.method]
    while waiting:
        name = waiting.pop().rsplit(".", 1)[-1]
        if name in messages and name not in found:
            found.add(name)
            waiting += [field.type_name for field in messages[name].field]
    return found


def compile_contract() -> FileDescriptorSet:
    """The contract and everything it imports, as protoc understands them."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "contract.binpb"
        includes = [
            ROOT / "proto",
            ROOT / "proto" / "third_party",
            Path(protoc.__file__).parent / "_proto",
        ]
        status = protoc.main(
            [
                "protoc",
                *(f"-I{path}" for path in includes),
                "--include_imports",
                f"--descriptor_set_out={compiled}",
                CONTRACT,
            ]
        )
        if status != 0:
            sys.exit("envoy/descriptor.py: protoc could not compile the contract")
        return FileDescriptorSet.FromString(compiled.read_bytes())


def json_view(file: FileDescriptorProto) -> None:
    """Rewrites the contract's file into the JSON view."""
    file.dependency.remove(RULES)
    requests = request_messages(file)
    for message in file.message_type:
        message.ClearField("options")
        for field in message.field:
            field.ClearField("options")
            field.json_name = field.name
        for oneof in message.oneof_decl:
            oneof.ClearField("options")
        if message.name == "CreateCompletionRequest":
            replace_typed_prompt(message)
            replace_typed_stop(message)
        if message.name in requests:
            ungroup(message)
        if any(message.name == owner for owner, _ in NULLS):
            message.options.deprecated_legacy_json_field_conflicts = True
        for field in message.field:
            if message.name not in requests:
                view_response_field(message.name, field)
    for enum in file.enum_type:
        for value in enum.value:
            value.name = ENUM_NAMES.get(value.name, value.name)


def replace_typed_prompt(request: DescriptorProto) -> None:
    """Drops the typed prompts and gives `json_prompt` its name in REST."""
    names = [oneof.name for oneof in request.oneof_decl]
    typed = names.index("prompt")
    kept = [field for field in request.field if not in_oneof(field, typed)]
    for field in kept:
        if field.name == "json_prompt":
            field.name = field.json_name = "prompt"
    fields = [FieldDescriptorProto.FromString(field.SerializeToString()) for field in kept]
    del request.field[:]
    request.field.extend(fields)
    del request.oneof_decl[typed]


def replace_typed_stop(request: DescriptorProto) -> None:
    """Drops the typed `stop` and gives its name to `json_stop`: the transcoder would flatten and convert."""
    kept = [
        FieldDescriptorProto.FromString(field.SerializeToString()) for field in request.field if field.name != "stop"
    ]
    for field in kept:
        if field.name == "json_stop":
            field.name = field.json_name = "stop"
    del request.field[:]
    request.field.extend(kept)


def ungroup(request: DescriptorProto) -> None:
    """Turns `optional` fields and those of a oneof into plain ones, which can be sent with the value that is the default.

    What a body says is sent, also zeros, so that the service sees what was said.
    """
    for field in request.field:
        field.ClearField("proto3_optional")
        field.ClearField("oneof_index")
    del request.oneof_decl[:]


def in_oneof(field: FieldDescriptorProto, index: int) -> bool:
    return field.HasField("oneof_index") and field.oneof_index == index


def view_response_field(message: str, field: FieldDescriptorProto) -> None:
    """Gives a field of an answer its OpenAI name and a type that prints as OpenAI prints it."""
    field.json_name = NULLS.get((message, field.name), field.name)
    if (message, field.name) in VALUES:
        field.type_name = ".google.protobuf.Value"
    if field.name == "created":
        # JSON prints 64-bit integers as strings. Seconds since 1970 fit 32 bits until 2106.
        field.type = FieldDescriptorProto.TYPE_UINT32


def derive() -> bytes:
    files = compile_contract()
    named = {file.name: file for file in files.file}
    json_view(named[CONTRACT])
    view = FileDescriptorSet(file=[file for name, file in named.items() if name != RULES])
    return view.SerializeToString(deterministic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Derives the JSON view that Envoy transcodes with.")
    parser.add_argument("--check", action="store_true", help="fail when the committed file is stale")
    check = parser.parse_args().check
    derived = derive()
    if not check:
        OUTPUT.write_bytes(derived)
    elif not OUTPUT.exists() or OUTPUT.read_bytes() != derived:
        sys.exit(f"{OUTPUT.relative_to(ROOT)} is stale: run `python envoy/descriptor.py` and commit the result")


if __name__ == "__main__":
    main()
