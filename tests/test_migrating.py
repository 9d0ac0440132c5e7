"""docs/migrating.md names every field of the contract, and no setting or metric that does not exist."""

from __future__ import annotations

import re

from completion.v1 import completion_pb2 as pb
from google.protobuf.descriptor import Descriptor

from service.settings import Settings
from tests.support.stack import ROOT

PAGE = (ROOT / "docs" / "migrating.md").read_text()
NAMES = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]+)`", PAGE))))
# Messages that JSON prints without the names of their fields: bare numbers, maps and arrays.
UNNAMED = {
    "TokenScore",
    "TopLogprobs",
    "TokenIdScores",
    "TokenIdScore",
    "Tokens",
    "TextBatch",
    "TokenBatch",
    "TextChoices",
}
# Set so that JSON prints null, or the array within a message of its own.
NOT_NAMES = {"no_logprobs", "parts"}


def fields(message: Descriptor, seen: set[str]) -> set[str]:
    """The names of a message's fields and of the messages within it."""
    if message.name in UNNAMED or message.name in seen or not message.full_name.startswith("completion.v1."):
        return set()
    seen.add(message.name)
    found = {field.name for field in message.fields} if not message.GetOptions().map_entry else set()
    return found.union(*(fields(field.message_type, seen) for field in message.fields if field.message_type))


def test_every_field_of_the_contract_is_there() -> None:
    """Of requests, answers and errors."""
    seen: set[str] = set()
    wanted = set().union(
        *(
            fields(message.DESCRIPTOR, seen)
            for message in (pb.CreateCompletionRequest, pb.CreateCompletionResponse, pb.ErrorResponse)
        )
    )
    assert len(wanted) > 90
    assert sorted(wanted - NOT_NAMES - {"no_param", "no_code"} - NAMES) == []


def test_its_flags_are_settings() -> None:
    """Each flag in the column of ours exists."""
    table = PAGE.split("## Flags")[1].split("## ")[0]
    ours = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    flags = {flag.replace("-", "_") for cell in ours for flag in re.findall(r"`--([a-z-]+)", cell)}
    assert len(flags) > 10
    assert flags <= set(Settings.model_fields)


def test_its_metrics_are_ours() -> None:
    """Each is documented."""
    documented = (ROOT / "docs" / "metrics.md").read_text()
    names = set(re.findall(r"`(llm_[a-z_]+)`", PAGE))
    assert len(names) > 3
    assert all(f"`{name}`" in documented for name in names)
