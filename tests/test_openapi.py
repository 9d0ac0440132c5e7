"""docs/openapi.yaml says what the contract says: every method, field, type and range, and nothing besides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from completion.v1 import completion_pb2 as pb
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorSet
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from service.rpc.bounds import rules
from service.settings import Settings
from tests.support.stack import ROOT, Answer, Stack

DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
SCHEMAS: dict[str, dict[str, Any]] = DOCUMENT["components"]["schemas"]

# Envoy's view of the contract has the fields as JSON has them.
_FILES = FileDescriptorSet.FromString((ROOT / "envoy" / "completion.binpb").read_bytes())
VIEW: dict[str, DescriptorProto] = {
    message.name: message for file in _FILES.file if file.package == "completion.v1" for message in file.message_type
}

TYPES = {
    FieldDescriptorProto.TYPE_STRING: "string",
    FieldDescriptorProto.TYPE_INT32: "integer",
    FieldDescriptorProto.TYPE_INT64: "integer",
    FieldDescriptorProto.TYPE_UINT32: "integer",
    FieldDescriptorProto.TYPE_FLOAT: "number",
    FieldDescriptorProto.TYPE_DOUBLE: "number",
    FieldDescriptorProto.TYPE_BOOL: "boolean",
    FieldDescriptorProto.TYPE_ENUM: "string",
}

# JSON unions and bare values, which protobuf has no type for: what the document has to say, in full.
UNIONS = {
    ("CreateCompletionRequest", "prompt"): {"null", "string", "array"},
    ("CreateCompletionRequest", "stop"): {"null", "string", "array"},
    ("PromptPart", "tokens"): {"array"},
    ("JsonSchema", "schema"): {"null", "string", "object"},
    ("StructuredOutputs", "json"): {"null", "string", "object"},
    ("StructuredOutputs", "choice"): {"null", "array"},
    ("TokenizeRequest", "prompt"): {"string", "array"},
    ("TokenizeResponse", "token_strs"): {"array", "null"},
    ("Choice", "stop_reason"): {"null", "string", "integer"},
    ("Logprobs", "token_logprobs"): {"array"},
    ("Logprobs", "top_logprobs"): {"array"},
}

# What an answer has if the service renders it, and Envoy's view does not.
RENDERED = {"Choice": {"token_ids", "prompt_token_ids"}, "Logprobs": {"token_id_logprobs"}}


def validator(schema: str) -> Draft202012Validator:
    """Validates against a schema of the document."""
    return Draft202012Validator({"$ref": f"#/components/schemas/{schema}", "components": DOCUMENT["components"]})


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema, or the one that it refers to, with the reference's name as `title`."""
    if "$ref" not in schema:
        return schema
    name = schema["$ref"].rsplit("/", 1)[-1]
    return {**SCHEMAS[name], "title": name}


def types(schema: dict[str, Any]) -> set[str]:
    """The JSON types that a schema takes."""
    schema = resolve(schema)
    if "oneOf" in schema:
        return set().union(*map(types, schema["oneOf"]))
    found = schema["type"]
    return {found} if isinstance(found, str) else set(found)


def messages(schema: dict[str, Any]) -> set[str]:
    """The schemas that a schema refers to, itself, in a union or as items."""
    parts = [schema, schema.get("items", {}), *schema.get("oneOf", [])]
    return {part["$ref"].rsplit("/", 1)[-1] for part in parts if "$ref" in part}


def test_valid() -> None:
    """It is an OpenAPI 3.1 document, whose examples are what their schemas describe."""
    OpenAPIV31SpecValidator(DOCUMENT).validate()
    content = DOCUMENT["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]
    for example in content["examples"].values():
        validator("CreateCompletionRequest").validate(example["value"])


def test_no_key_is_there_twice() -> None:
    """Python's parser would take the last one, and the viewer behind /docs shows nothing at all."""

    def keys(node: yaml.Node) -> Iterator[list[str]]:
        if isinstance(node, yaml.MappingNode):
            yield [key.value for key, _ in node.value]
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        for child in children:
            for each in child if isinstance(child, tuple) else [child]:
                yield from keys(each)

    for names in keys(yaml.compose((ROOT / "docs" / "openapi.yaml").read_text())):
        assert len(set(names)) == len(names), names


def test_every_method_and_no_other() -> None:
    """The paths are the contract's HTTP mappings, but for the one that Envoy keeps to itself, and Envoy's own."""
    mapped = set()
    for method in pb.DESCRIPTOR.services_by_name["CompletionService"].methods:
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        verb = rule.WhichOneof("pattern")
        if verb is not None:
            mapped.add((verb, getattr(rule, verb).replace("{model=**}", "{model}")))
    mapped.remove(("post", "/v1/completions:stream"))
    mapped.add(("get", "/health"))
    assert {(verb, path) for path, verbs in DOCUMENT["paths"].items() for verb in verbs} == mapped


# A stream's events have the shape of the whole answer.
@pytest.mark.parametrize("name", [name for name in SCHEMAS if name != "CompletionChunk"])
def test_every_field_and_no_other(name: str) -> None:
    """A schema has the fields of its message, and each the type that JSON gives it."""
    fields = [(field.json_name, field) for field in VIEW[name].field]
    assert set(SCHEMAS[name]["properties"]) == {field_name for field_name, _ in fields} | RENDERED.get(name, set())
    for field_name, field in fields:
        check_type(name, field_name, field, SCHEMAS[name]["properties"][field_name])


def check_type(message: str, name: str, field: FieldDescriptorProto, schema: dict[str, Any]) -> None:
    if (message, name) in UNIONS:
        assert types(schema) == UNIONS[message, name]
        return
    if field.type_name == ".google.protobuf.NullValue":  # printed under its sibling's name
        assert "null" in types(schema)
        return
    repeated = field.label == FieldDescriptorProto.LABEL_REPEATED
    found = types(schema) - {"null"}
    referred = field.type_name.removeprefix(".completion.v1.")
    if referred.endswith(".LogitBiasEntry"):
        assert found == {"object"}
        assert types(schema["additionalProperties"]) == {"number"}
    elif referred in VIEW:
        assert found == ({"array"} if repeated else {"object"})
        assert messages(schema) == {referred}
    elif repeated:
        assert found == {"array"}
        assert types(schema["items"]) == {TYPES[field.type]}
    else:
        assert found == {TYPES[field.type]}


def test_chunks_are_the_answer_in_pieces() -> None:
    """A stream's event differs from the whole answer only in that usage is not always there, and in padding."""
    whole, chunk = SCHEMAS["CreateCompletionResponse"], SCHEMAS["CompletionChunk"]
    assert set(chunk["properties"]) == set(whole["properties"]) | {"obfuscation"}
    assert set(whole["required"]) - set(chunk["required"]) == {"usage"}


def test_null_is_unset() -> None:
    """Every parameter but the model may be null, and a name that the contract does not have is refused."""
    for name in REQUESTS:
        assert SCHEMAS[name]["additionalProperties"] is False
        for field, schema in SCHEMAS[name]["properties"].items():
            assert ("null" in types(schema)) == (field != "model"), field


# What the document calls the sizes of a JSON value of each kind.
SIZES = {
    "string": {"min_len": "minLength", "max_len": "maxLength"},
    "repeated": {"min_items": "minItems", "max_items": "maxItems"},
    "map": {"max_pairs": "maxProperties"},
}
NUMBERS = {"gte": "minimum", "gt": "exclusiveMinimum", "lte": "maximum"}
OF_ITS_TYPE = {("maximum", 2**31 - 1), ("minimum", -(2**63)), ("maximum", 2**63 - 1)}
# Rules that JSON Schema says otherwise, by an enumeration or not at all.
ELSEWHERE = {"items", "values", "finite", "not_in", "defined_only", "const", "max_bytes"}
KEYWORDS = {"exclusiveMinimum", *NUMBERS.values(), *(word for words in SIZES.values() for word in words.values())}


def bounds(rule: Any) -> dict[str, float]:
    """The JSON schema keywords that say what `buf.validate` rules say of one value, without its items."""
    kind = rule.WhichOneof("type")
    words = SIZES.get(kind, NUMBERS)
    given = {field.name: value for field, value in getattr(rule, kind).ListFields()} if kind else {}
    return {words[name]: value for name, value in given.items() if name not in ELSEWHERE}


def said(schema: dict[str, Any]) -> dict[str, float]:
    """The keywords of a schema, but for the ends of the integer types."""
    return {word: schema[word] for word in KEYWORDS & set(schema) if (word, schema[word]) not in OF_ITS_TYPE}


REQUEST = SCHEMAS["CreateCompletionRequest"]["properties"]
# Messages of requests, but for the parts of a prompt, which the service reads from a JSON union.
REQUESTS = (
    "CreateCompletionRequest",
    "StreamOptions",
    "ResponseFormat",
    "JsonSchema",
    "StructuredOutputs",
    "Prediction",
    "Resume",
)
PROMPT, STOP = REQUEST["prompt"]["oneOf"], REQUEST["stop"]["oneOf"]
STOP_RULES = rules(pb.CreateCompletionRequest, "stop").repeated.items
RANGES = {
    **{
        f"{message}.{name}": (schema, rules(getattr(pb, message), name))
        for message in REQUESTS
        for name, schema in SCHEMAS[message]["properties"].items()
        if "oneOf" not in schema and name != "choice"
    },
    **{
        f"items of {name}": (REQUEST[name]["items"], rules(pb.CreateCompletionRequest, name).repeated.items)
        for name in ("allowed_token_ids", "bad_words", "logprob_token_ids", "stop_token_ids")
    },
    "choices": (SCHEMAS["StructuredOutputs"]["properties"]["choice"], rules(pb.TextChoices, "texts")),
    "tokens of a part": (SCHEMAS["PromptPart"]["properties"]["tokens"], rules(pb.Tokens, "ids")),
    "values of logit_bias": (
        REQUEST["logit_bias"]["additionalProperties"],
        rules(pb.CreateCompletionRequest, "logit_bias").map.values,
    ),
    "texts": (PROMPT[2], rules(pb.TextBatch, "texts")),
    "tokens": (PROMPT[3], rules(pb.Tokens, "ids")),
    "token batch": (PROMPT[4], rules(pb.TokenBatch, "prompts")),
    "items of token batch": (PROMPT[4]["items"], rules(pb.Tokens, "ids")),
    "one stop": (STOP[1], STOP_RULES),
    "items of stop": (STOP[2]["items"], STOP_RULES),
}


@pytest.mark.parametrize("name", RANGES)
def test_ranges(name: str) -> None:
    """Each range is the one in the contract, and where the contract has none it is the type's."""
    schema, rule = RANGES[name]
    assert said(schema) == bounds(rule)


def test_number_of_stops() -> None:
    """The most entries of `stop` are a setting, of which the document says the default."""
    assert said(STOP[2]) == {"maxItems": Settings.model_fields["max_stops"].default}


def described(answer: Answer, path: str, verb: str) -> None:
    """Checks an answer against what the document says of its status."""
    response = DOCUMENT["paths"][path][verb]["responses"][str(answer.status)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rsplit("/", 1)[-1]]
    limits = {name for name in answer.headers if name.startswith(("x-ratelimit-", "retry-"))}
    assert limits <= set(response["headers"])
    for name, reference in response["headers"].items():
        header = DOCUMENT["components"]["headers"][reference["$ref"].rsplit("/", 1)[-1]]
        assert name in answer.headers or not header.get("required"), name
        if name in limits:
            value = answer.headers[name]
            Draft202012Validator(header["schema"]).validate(
                int(value) if header["schema"]["type"] == "integer" else value
            )
    if "content" not in response:
        assert answer.body == b""
        return
    schema = response["content"][answer.headers["content-type"]]["schema"]
    if "$ref" in schema:
        validator(schema["$ref"].rsplit("/", 1)[-1]).validate(answer.json)


def test_health_is_as_described(stack: Stack) -> None:
    """It needs no key."""
    described(stack.request("GET", "/health", headers={}), "/health", "get")


def test_real_answers_are_as_described(stack: Stack) -> None:
    """Answers of the running stack, whole, streamed and refused, have the described shape."""
    fields = {"prompt": ["Hello,", "a"], "max_tokens": 2, "logprobs": 1, "echo": True}
    for answer in (stack.complete(**fields), stack.complete(n=0), stack.complete(model="nothing")):
        described(answer, "/v1/completions", "post")
    described(stack.request("POST", "/v1/completions", "{}", {}), "/v1/completions", "post")
    described(stack.request("PUT", "/v1/completions"), "/v1/completions", "post")
    described(stack.request("GET", "/v1/models"), "/v1/models", "get")
    described(stack.request("GET", "/v1/models/nothing"), "/v1/models/{model}", "get")
    described(stack.request("GET", "/v1/models/gpt-3.5-turbo-instruct"), "/v1/models/{model}", "get")
    for path in ("/tokenize", "/detokenize"):
        content = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        schema = content["schema"]["$ref"].rsplit("/", 1)[-1]
        for example in content["examples"].values():
            validator(schema).validate(example["value"])
            described(stack.request("POST", path, json.dumps(example["value"])), path, "post")
        described(stack.request("POST", path, '{"model": "nothing"}'), path, "post")
        described(stack.request("POST", path, "{}", {}), path, "post")
        described(stack.request("GET", path), path, "post")
    described(stack.request("GET", "/tokenizer_info"), "/tokenizer_info", "get")
    described(stack.request("POST", "/tokenizer_info"), "/tokenizer_info", "get")
    streamed = stack.complete(**fields, stream=True, stream_options={"include_usage": True})
    described(streamed, "/v1/completions", "post")
    for event in streamed.events[:-1]:
        validator("CompletionChunk").validate(json.loads(event))
