"""What tests of the pages share: a stack with a key, one request, and what the service answers to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from service.engine.engine import Engine
from tests.support.stack import ROOT, Stack

SCREENSHOTS = ROOT / "build" / "screenshots"
# As it is typed into the playground; `greedy` asks the service for the same.
GREEDY = {"prompt": "The capital of France is", "max_tokens": "24", "temperature": "0"}


@dataclass(frozen=True)
class Guarded:
    """A stack that knows exactly one key, and its engine to look into."""

    stack: Stack
    engine: Engine


def greedy(stack: Stack, **fields: Any) -> dict[str, Any]:
    """The only choice that the service answers to GREEDY and these fields."""
    answer = stack.complete(prompt=GREEDY["prompt"], max_tokens=24, temperature=0, **fields)
    choice: dict[str, Any] = answer.json["choices"][0]
    return choice


def expected_rows(alternatives: dict[str, float]) -> dict[str, str]:
    """How the page writes the alternatives of a token: visible white space, and percent."""

    def percent(logprob: float) -> str:
        return f"{100 * math.exp(logprob):.{1 if logprob > -4.6 else 3}f} %"

    shown = {token.replace("\n", "↵"): score for token, score in alternatives.items()}
    return {f"␣{token[1:]}" if token[0] == " " else token: percent(score) for token, score in shown.items()}
