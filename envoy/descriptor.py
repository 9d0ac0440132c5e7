"""Derives from the contract what Envoy has to know of it.

completion.binpb is the contract as Envoy's JSON transcoder sees it. This view is byte-for-byte compatible with
`proto/completion/v1/completion.proto` on the wire and differs only in how it reads and prints as JSON, where OpenAI's
API asks for what protobuf's JSON mapping does not offer. It is only for Envoy: it repeats JSON names within a message,
which protobuf's Python runtime refuses to load.

requests.lua has the names and types of the requests' fields, by which json.lua reads a body.

    python envoy/descriptor.py            writes the files; from another contract with --proto, elsewhere with --output
    python envoy/descriptor.py --check    fails when a committed file is stale
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from buf.validate import validate_pb2
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = "completion/v1/completion.proto"
# The service enforces the rules, not the transcoder.
RULES = "buf/validate/validate.proto"

# Text fields that hold JSON: over REST the JSON itself.
JSON_TEXTS = {("JsonSchema", "schema"), ("StructuredOutputs", "json")}

# A repeated field in a message of its own, as a oneof needs it: over REST an array.
WRAPPED = {"TextChoices"}

# What json.lua calls the types of values; an integer has its bits.
TYPES: dict[int, dict[str, Any]] = {
    FieldDescriptorProto.TYPE_STRING: {"type": "string"},
    FieldDescriptorProto.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptorProto.TYPE_INT32: {"type": "integer", "bits": 32},
    FieldDescriptorProto.TYPE_INT64: {"type": "integer", "bits": 64},
    FieldDescriptorProto.TYPE_FLOAT: {"type": "number"},
}

# Members of a oneof that are printed under one name: of a NullValue and its sibling, so that the unset one is `null`
# rather than absent, or of two types.
NAMES = {
    ("Choice", "no_logprobs"): "logprobs",
    ("Choice", "stop_text"): "stop_reason",
    ("Choice", "stop_token_id"): "stop_reason",
    ("Error", "no_param"): "param",
    ("Error", "no_code"): "code",
    ("TokenizeResponse", "no_token_strs"): "token_strs",
    ("GetTokenizerResponse", "no_bos_token"): "bos_token",
    ("GetTokenizerResponse", "no_eos_token"): "eos_token",
    ("GetTokenizerResponse", "no_chat_template"): "chat_template",
}

# What only typed callers and answers that the service renders have: the transcoder would print an array that is not
# there as `[]`, and the rest of the oneof under names that REST does not have.
TYPED_ONLY = {
    ("CreateCompletionResponse", "obfuscation"),
    ("Choice", "complete_grammar"),
    ("Choice", "end_token_id"),
    ("Choice", "prompt_token_ids"),
    ("Choice", "token_ids"),
    ("Logprobs", "token_id_logprobs"),
}

# Laid out on the wire like a type of google.protobuf, which prints as a bare number, object, array or null.
BARE = {
    ("Logprobs", "token_logprobs"): "Value",
    ("Logprobs", "top_logprobs"): "Value",
    ("TokenizeResponse", "token_strs"): "ListValue",
}

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


def compile_contract(proto: Path) -> FileDescriptorSet:
    """The contract in a folder and everything it imports, as protoc understands them."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "contract.binpb"
        includes = [
            proto,
            ROOT / "proto",
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
        if message.name in {"CreateCompletionRequest", "TokenizeRequest"}:
            replace_typed_prompt(message)
            replace_typed_stop(message)
        if message.name in requests:
            ungroup(message)
        if any(message.name == owner for owner, _ in NAMES):
            message.options.deprecated_legacy_json_field_conflicts = True
        if message.name not in requests:
            drop_typed_only(message)
            for field in message.field:
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
    """Turns `optional` fields and those of a oneof into plain ones.

    What a body says is sent, also zeros, so that the service sees what was said.
    """
    for field in request.field:
        field.ClearField("proto3_optional")
        field.ClearField("oneof_index")
    del request.oneof_decl[:]


def in_oneof(field: FieldDescriptorProto, index: int) -> bool:
    return field.HasField("oneof_index") and field.oneof_index == index


def drop_typed_only(message: DescriptorProto) -> None:
    """Drops the fields that the transcoder must not print, and what is then empty; it skips what it does not know."""
    kept = [
        FieldDescriptorProto.FromString(field.SerializeToString())
        for field in message.field
        if (message.name, field.name) not in TYPED_ONLY
    ]
    del message.field[:]
    message.field.extend(kept)
    for index in reversed(range(len(message.oneof_decl))):
        if not any(in_oneof(field, index) for field in message.field):
            del message.oneof_decl[index]
            for field in message.field:
                if field.HasField("oneof_index") and field.oneof_index > index:
                    field.oneof_index -= 1


def view_response_field(message: str, field: FieldDescriptorProto) -> None:
    """Gives a field of an answer its OpenAI name and a type that prints as OpenAI prints it."""
    field.json_name = NAMES.get((message, field.name), field.name)
    if bare := BARE.get((message, field.name)):
        field.type_name = f".google.protobuf.{bare}"
    if field.name == "created":
        # JSON prints 64-bit integers as strings. Seconds since 1970 fit 32 bits until 2106.
        field.type = FieldDescriptorProto.TYPE_UINT32


def request_fields(contract: FileDescriptorProto, view: FileDescriptorProto) -> dict[str, Any]:
    """The request message of each POST path, and the fields of each message by their names in JSON."""
    paths = {}
    for service in contract.service:
        for method in service.method:
            path = method.options.Extensions[annotations_pb2.http].post
            if path and ":" not in path:
                paths[path] = short(method.input_type)
    requests = request_messages(view) - WRAPPED
    sources = {message.name: message for message in contract.message_type}
    messages: dict[str, dict[str, Any]] = {}
    for message in view.message_type:
        if message.name in requests:
            numbered = {field.number: field for field in sources[message.name].field}
            messages[message.name] = {
                field.name: request_field(sources[message.name], numbered[field.number], contract)
                for field in message.field
            }
    return {"paths": paths, "messages": messages}


def request_field(owner: DescriptorProto, field: FieldDescriptorProto, contract: FileDescriptorProto) -> dict[str, Any]:
    """What json.lua has to know of a field of the contract."""
    rules = field.options.Extensions[validate_pb2.field]
    found: dict[str, Any] = {}
    if field.HasField("oneof_index") and not field.proto3_optional:
        found["one_of"] = owner.oneof_decl[field.oneof_index].name
    entries = {entry.name: entry for entry in owner.nested_type if entry.options.map_entry}
    if short(field.type_name) in entries:
        found |= {"map": True, "max_items": rules.map.max_pairs}
        field, rules = entries[short(field.type_name)].field[1], rules.map.values
    elif short(field.type_name) in WRAPPED:
        (field,) = next(message.field for message in contract.message_type if message.name == short(field.type_name))
        found["wrapped"] = field.name
        rules = field.options.Extensions[validate_pb2.field]
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        found["repeated"] = True
        found |= {name: value for name in ("min_items", "max_items") if (value := getattr(rules.repeated, name))}
        rules = rules.repeated.items
    if (owner.name, field.name) in JSON_TEXTS:
        return found | {"type": "json"}
    return found | value_type(field, rules, contract)


def value_type(
    field: FieldDescriptorProto, rules: validate_pb2.FieldRules, contract: FileDescriptorProto
) -> dict[str, Any]:
    """The type of one value, and the ends or values that the type has."""
    if field.type_name == ".google.protobuf.Value":
        return {"type": "any"}
    if field.type == FieldDescriptorProto.TYPE_ENUM:
        enum = next(enum for enum in contract.enum_type if enum.name == short(field.type_name))
        return {"type": "enum", "values": [ENUM_NAMES[value.name] for value in enum.value if value.number]}
    if field.type == FieldDescriptorProto.TYPE_MESSAGE:
        return {"type": "object", "message": short(field.type_name)}
    limits = getattr(rules, rules.WhichOneof("type") or "int64")
    ends = {"gte": "min", "gt": "above", "lte": "max"}
    known = {ends[bound.name]: f"{value:.15g}" for bound, value in limits.ListFields() if bound.name in ends}
    return TYPES[field.type] | known


def short(name: str) -> str:
    """A type's name without its package."""
    return name.rsplit(".", 1)[-1]


def lua(value: Any, indent: str = "") -> str:
    """A value as Lua writes it: a table of tables on many lines, any other on one."""
    if isinstance(value, dict):
        parts = [f'["{key}"] = {lua(each, indent + "  ")}' for key, each in sorted(value.items())]
        if any(isinstance(each, dict) for each in value.values()):
            return "{\n" + "".join(f"{indent}  {part},\n" for part in parts) + indent + "}"
        return "{ " + ", ".join(parts) + " }"
    if isinstance(value, list):
        return "{ " + ", ".join(map(lua, value)) + " }"
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)


def derive(proto: Path) -> dict[str, bytes]:
    """The files by their names, from the contract in a folder."""
    files = compile_contract(proto)
    named = {file.name: file for file in files.file}
    contract = FileDescriptorProto.FromString(named[CONTRACT].SerializeToString())
    json_view(named[CONTRACT])
    view = FileDescriptorSet(file=[file for name, file in named.items() if name != RULES])
    fields = lua(request_fields(contract, named[CONTRACT]))
    return {
        "completion.binpb": view.SerializeToString(deterministic=True),
        "requests.lua": f"-- Generated by envoy/descriptor.py from the contract.\nreturn {fields}\n".encode(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Derives what Envoy needs to know of the contract.")
    parser.add_argument("--check", action="store_true", help="fail when a committed file is stale")
    parser.add_argument("--proto", type=Path, default=ROOT / "proto", help="folder of the contract")
    parser.add_argument("--output", type=Path, default=ROOT / "envoy", help="folder of the derived files")
    arguments = parser.parse_args()
    for name, content in derive(arguments.proto).items():
        path = arguments.output / name
        if not arguments.check:
            path.write_bytes(content)
        elif not path.exists() or path.read_bytes() != content:
            sys.exit(f"{path} is stale: run `python envoy/descriptor.py` and commit the result")


if __name__ == "__main__":
    main()
