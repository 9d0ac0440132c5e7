"""`python -m bench`: starts every peer alone, drives all with the same client, and prints medians and paired ratios.

    python -m bench                 the comparison: every peer, every load, and the machine's limits
    python -m bench limits          the machine's limits alone
    python -m bench growth          our throughput and memory by concurrency, prompt length and batch size
    python -m bench soak            a mixed load for --minutes, and what it leaves behind
    python -m bench overload        our goodput and latency when more is asked for than can be done
    python -m bench scaling         our throughput by number of replicas, and what affinity gives their caches

A round starts each peer once, so that a ratio compares runs that are minutes apart on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from bench import cancel, genai, growth, limits, llama_cpp, loads, overload, peers, report, scaling, soak
from bench.client import PeerError
from bench.loads import Plan
from bench.peers import Served, Setup, Start
from bench.processes import memory
from deploy import local
from service import manifest
from service.errors import StartupError

MEMORY = "memory, most resident, all processes"

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Peer:
    """One thing to measure: its name in tables, how to start it, and the loads that it can take."""

    title: str
    start: Start
    loads: tuple[str, ...] = tuple(loads.LOADS)


PEERS = {
    "rest": Peer(report.PRODUCT, peers.rest_through_envoy),
    "grpc": Peer(report.GRPC, peers.grpc_direct),
    "engine": Peer(report.ENGINE, peers.bare_engine, (*loads.LOADS, "cancel")),
    "llama-q4_1": Peer("llama.cpp, same GGUF", llama_cpp.same_file),
    "llama-q8_0": Peer("llama.cpp, Q8_0", llama_cpp.q8_0),
    "genai": Peer("onnxruntime-genai", genai.static_batches, ("closed", "ttft")),
    "rest-cuda": Peer(f"{report.PRODUCT}, CUDA", peers.on_cuda(peers.rest_through_envoy)),
    "engine-cuda": Peer(f"{report.ENGINE}, CUDA", peers.on_cuda(peers.bare_engine)),
}
# Those that any machine can run.
USUAL_PEERS = [name for name in PEERS if not name.endswith("-cuda")]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    options = _parser().parse_args()
    try:
        options.run(options)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except (PeerError, StartupError, local.LaunchError) as error:
        sys.exit(f"python -m bench: {error}")


def _compare(options: argparse.Namespace) -> None:
    setup, plan = _setup(options), _plan(options)
    results = report.Results(options.out, vars(options))
    for number in range(1, options.rounds + 1):
        if "limits" in options.loads:
            _say(options, number, "the machine's limits")
            results.add(number, report.MACHINE, "limits", limits.measure(setup.threads))
        for name in options.peers:
            peer = PEERS[name]
            chosen = [load for load in options.loads if load in peer.loads]
            if chosen:
                _say(options, number, f"{peer.title}: {', '.join(chosen)}")
                for load, outcome in _measure(peer, chosen, setup, plan):
                    results.add(number, peer.title, load, outcome)
                results.save()
    limits.relate(results, setup.model_dir, setup.weights, plan)
    results.finish()


def _measure(peer: Peer, chosen: list[str], setup: Setup, plan: Plan) -> list[tuple[str, loads.Outcome]]:
    """Starts a peer, drives it by the chosen loads, and stops it: what each load gave, and the memory it took."""
    with peer.start(setup) as served:
        outcomes = asyncio.run(_drive(served, chosen, plan))
        used = sum(memory(pid) for pid in served.processes.values()) / 2**20
    if used:
        outcomes.append(("memory", loads.Outcome([loads.Figure(MEMORY, used, "MiB", "less")])))
    return outcomes


async def _drive(served: Served, chosen: list[str], plan: Plan) -> list[tuple[str, loads.Outcome]]:
    await loads.warm_up(served.stream, plan)
    outcomes = []
    for load in chosen:
        try:
            outcomes.append((load, await _run(load, served, plan)))
        except TimeoutError:
            raise PeerError(f"the load {load} did not end within {plan.limit} s") from None
    if served.engine is not None:
        await cancel.held(served.engine, 0)  # what a load has left running must not outlive the event loop
    return outcomes


async def _run(load: str, served: Served, plan: Plan) -> loads.Outcome:
    if load == "cancel":
        assert served.engine is not None
        return await cancel.cancel(served.engine, served.stream, plan)
    return await loads.LOADS[load](served.stream, plan)


def _limits(options: argparse.Namespace) -> None:
    results = report.Results(options.out, vars(options))
    for number in range(1, options.rounds + 1):
        results.add(number, report.MACHINE, "limits", limits.measure(options.threads))
    results.finish()


def _growth(options: argparse.Namespace) -> None:
    growth.run(_setup(options), _plan(options), options.rounds, options.curves, options.out)


def _soak(options: argparse.Namespace) -> None:
    if not soak.run(options.minutes, options.seed, soak.Bounds()):
        raise PeerError("the soak broke its bounds")


def _overload(options: argparse.Namespace) -> None:
    overload.run(_setup(options), _plan(options), options.out)


def _scaling(options: argparse.Namespace) -> None:
    scaling.run(_setup(options), _plan(options), options.rounds, options.replicas, options.out)


def _setup(options: argparse.Namespace) -> Setup:
    return Setup(
        model_dir=local.model_dir(),
        weights=options.weights or local.default_weights(),
        threads=options.threads,
        slots=max(*options.concurrency, loads.CHATS, loads.STALL_STREAMS + 1),
        context=loads.longest_sequence(_plan(options)),
        cache=ROOT / ".cache" / "bench",
        flash_attention=options.flash_attention,
    )


def _plan(options: argparse.Namespace) -> Plan:
    tokenizer = Tokenizer.from_file(str(local.model_dir() / manifest.TOKENIZER_FILE))
    return Plan(
        tokenizer,
        concurrency=tuple(options.concurrency),
        requests_each=options.requests_each,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rate=options.rate,
        arrivals=options.arrivals,
        ttft_objective=options.ttft_objective,
        itl_objective=options.itl_objective,
        seed=options.seed,
        limit=options.limit,
    )


def _say(options: argparse.Namespace, number: int, what: str) -> None:
    print(f"round {number} of {options.rounds}: {what}", file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it has to be 1 or more")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    runs = {
        "compare": _compare,
        "limits": _limits,
        "growth": _growth,
        "overload": _overload,
        "scaling": _scaling,
        "soak": _soak,
    }
    parser.add_argument("what", nargs="?", choices=runs, default="compare", help="what to run (%(default)s)")
    add = parser.add_argument
    add("--peers", nargs="+", choices=PEERS, default=USUAL_PEERS, help="whom to measure (all but CUDA's)")
    every_load = ["limits", *loads.LOADS, "cancel"]
    add("--loads", nargs="+", choices=every_load, default=every_load, help="by what (all)")
    add("--rounds", type=_positive, default=3, help="how often every peer is started (%(default)s)")
    add("--threads", type=_positive, default=len(os.sched_getaffinity(0)), help="of every peer (the cores)")
    add("--concurrency", type=_positive, nargs="+", default=[1, 8, 16, 32], help="closed loop: requests at once")
    add("--requests-each", type=_positive, default=1, help="closed loop: requests one after the other (%(default)s)")
    add("--prompt-tokens", type=_positive, default=128, help="closed and open loop (%(default)s)")
    add("--new-tokens", type=_positive, default=128, help="closed loop; half of it in the open loop (%(default)s)")
    add("--rate", type=float, default=0.8, help="open loop: mean arrivals per second (%(default)s)")
    add("--arrivals", type=_positive, default=32, help="open loop: requests (%(default)s)")
    add("--ttft-objective", type=float, default=2.0, help="open loop: seconds to the first token (%(default)s)")
    add("--itl-objective", type=float, default=0.1, help="open loop: mean seconds between tokens (%(default)s)")
    add("--flash-attention", choices=["on", "off"], default="on", help="of llama.cpp (%(default)s)")
    add("--curves", nargs="+", choices=growth.CURVES, default=list(growth.CURVES), help="growth: which (all)")
    add("--minutes", type=float, default=2.0, help="soak: how long (%(default)s)")
    add("--replicas", type=_positive, nargs="+", default=[1, 2], help="scaling: services behind Envoy (%(default)s)")
    add("--weights", type=Path, help="the GGUF file that MODEL_DIR was exported from (the default model's)")
    add("--seed", type=int, default=1, help="of prompts and arrivals (%(default)s)")
    add("--limit", type=float, default=900.0, help="most seconds that one load may take (%(default)s)")
    add("--out", type=Path, default=ROOT / "bench-results", help="folder for the raw JSON and the plots (%(default)s)")
    parser.set_defaults(run=lambda options: runs[options.what](options))
    return parser


if __name__ == "__main__":
    main()
