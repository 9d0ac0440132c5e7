"""The effects of a fault: the affected callers get an error, health reports it, others go on, and nothing leaks."""

from __future__ import annotations

import http.client as http_client
import itertools
import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2

from bench.processes import memory
from tests.support.patience import PATIENCE, ended_by_deadline, eventually
from tests.support.processes import METADATA, TINY, Service, service
from tests.support.stack import KEY, ROOT, Stack, envoy, free_ports

LONG = {"max_tokens": 3000}
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
MIB = 1 << 20
WATCHDOG = 3


def begun(running: Service, **fields: object):
    """A stream of which the first piece has come."""
    stream = running.stream(**{**LONG, **fields})
    next(stream)
    return stream


def failure(stream) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return caught.value


def test_an_engine_that_dies(tiny_model: Path, tmp_path: Path) -> None:
    """In-flight calls end with UNAVAILABLE, events with an error; health says so, and the process exits with 1."""
    with service(tiny_model, tmp_path, fault="die", step_seconds=0.02) as running:
        (http,) = free_ports(1)
        with envoy(http, running.port, tmp_path):
            Stack(http, 0).wait_until_ready()
            with Stack(http, 0).begin(model=TINY, **LONG) as events:
                typed, watch = begun(running), running.watch()
                next(watch)
                running.process.send_signal(signal.SIGUSR1)
                told = time.monotonic()
                assert next(watch).status == NOT_SERVING
                print(f"health says so after {time.monotonic() - told:.2f} s")
                assert failure(typed).code() == grpc.StatusCode.UNAVAILABLE
                last = json.loads(events.read().rpartition(b"data: ")[2])
            assert last["error"]["type"] == "server_error"
            assert running.exit_code() == 1
    assert "the engine has died" in running.errors
    assert running.logged("the engine has died")["level"] == "critical"
    # A stream that fails midway ends well for gRPC, but not in the log.
    codes = {line["code"] for line in running.log if line.get("method", "").endswith("StreamCompletionEvents")}
    assert codes == {"UNAVAILABLE"}


def test_an_engine_that_hangs(tiny_model: Path, tmp_path: Path) -> None:
    """The watchdog ends what never ends: callers hear, health says so, stacks on standard error, exit code 1."""
    flags = ("--watchdog-seconds", str(WATCHDOG))
    with service(tiny_model, tmp_path, *flags, fault="hang", step_seconds=0.02) as running:
        stream, watch = begun(running), running.watch()
        next(watch)
        longer = time.monotonic() + 1.5 * WATCHDOG
        while time.monotonic() < longer:  # no step takes long, and no harm is done
            next(stream)
        running.process.send_signal(signal.SIGUSR1)
        assert next(watch).status == NOT_SERVING
        error = failure(stream)  # it was in the step that hung, and might make the next process hang as well
        assert error.code() == grpc.StatusCode.INTERNAL
        assert ("x-should-retry", "false") in error.trailing_metadata()
        assert running.exit_code() == 1
    assert "in hang" in running.errors
    assert running.errors.count("most recent call first") > 1
    assert running.logged("the engine hangs")["seconds"] == WATCHDOG


def test_an_event_loop_that_hangs(tiny_model: Path, tmp_path: Path) -> None:
    """The process ends with 1 although nothing of it listens any more, and says of what, with every thread's stack."""
    with service(tiny_model, tmp_path, "--watchdog-seconds", str(WATCHDOG), fault="loop") as running:
        running.complete(max_tokens=1)
        running.arm()
        call = running.stub.CreateCompletion.future(
            pb.CreateCompletionRequest(model=TINY, text="the"), metadata=METADATA
        )
        assert running.exit_code() == 1
        assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert running.logged("the event loop hangs")["seconds"] == WATCHDOG
    assert "hang_the_loop" in running.errors


def test_a_model_that_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    """A model that fails on everything is not the requests' fault: after the third the process exits with code 1."""
    with service(tiny_model, tmp_path, fault="gone") as running:
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        watch = running.watch()
        next(watch)
        running.arm()
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                running.complete(max_tokens=3)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # another replica may answer
            assert "secret" not in caught.value.details()
        assert next(watch).status == NOT_SERVING
        assert running.exit_code() == 1
    assert running.logged("the engine has died")["level"] == "critical"


@pytest.mark.parametrize(("fault", "counter"), [("fail", "failed_steps"), ("nan", "not_finite")])
def test_a_step_that_fails_for_one(tiny_model: Path, tmp_path: Path, fault: str, counter: str) -> None:
    """Only the sequence that the model fails on ends, with an opaque INTERNAL; its neighbours get their whole text."""
    with service(tiny_model, tmp_path, fault=fault, step_seconds=0.01) as running:
        asked = {"max_tokens": 300, "text": "neighbour"}
        whole = running.complete(**asked).choices[0].text
        victim = begun(running)
        neighbours = [running.stream(**asked) for _ in range(3)]
        texts = [next(each).choices[0].text for each in neighbours]
        running.process.send_signal(signal.SIGUSR1)
        error = failure(victim)
        for text, rest in zip(texts, neighbours, strict=True):
            assert text + "".join(piece.choices[0].text for piece in rest) == whole
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        assert "Request id: " in error.details()
        running.stop()
    assert running.logged("draining")["running"] == 0
    counts = running.logged("stopped")
    assert counts[counter] == (2 if fault == "fail" else 1)  # the batch, then the row by itself
    assert counts["failed_steps"] + counts["not_finite"] == counts[counter]


def test_drain_delay(tiny_model: Path, tmp_path: Path) -> None:
    """After SIGTERM health changes at once, new calls are taken for the delay and no longer, and what runs finishes."""
    delay = 5
    with service(tiny_model, tmp_path, "--drain-delay-seconds", str(delay), step_seconds=0.02) as running:
        stream, watch = begun(running, max_tokens=600), running.watch()
        next(watch)
        told = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        print(f"health says so after {time.monotonic() - told:.2f} s")
        assert running.complete(max_tokens=2).usage.completion_tokens == 2
        watch.cancel()
        while (code := running.outcome(max_tokens=2)) is grpc.StatusCode.OK:
            pass
        assert time.monotonic() - told > delay
        assert code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert list(stream)[-1].choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert running.exit_code() == 0
    assert running.logged("draining")["running"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal(tiny_model: Path, tmp_path: Path, number: int, code: int) -> None:
    """It ends the process, whatever runs, with the signal's code: nothing is drained to its end."""
    with service(tiny_model, tmp_path, step_seconds=0.02) as running:
        stream = begun(running)
        running.process.send_signal(number)
        eventually(lambda: "draining" in running.output)
        next(stream)
        running.process.send_signal(number)
        assert running.exit_code() == code


def test_a_storm_of_cancels(tiny_model: Path, tmp_path: Path) -> None:
    """Calls cancelled in every state hold nothing afterwards: some 500 of them let the process grow by less than 10 MB.

    A leak would show in each storm. In one of them the memory may grow by another 10 MB, when more calls than ever
    before are in the process at once.
    """
    with service(tiny_model, tmp_path, step_seconds=0.002) as running:
        draw = random.Random(1)

        def storm(count: int) -> None:
            calls = []
            for number in range(count):
                fields = {"text": "the " * draw.choice((1, 200)), "n": draw.choice((1, 1, 3)), "max_tokens": 500}
                calls.append(running.stream(**fields))
                if len(calls) > 40 or draw.random() < 0.1:
                    calls.pop(draw.randrange(len(calls))).cancel()
                if not number % 100:  # else what is on its way, and the memory for it, would be a matter of speed
                    running.complete(max_tokens=1)
            for call in calls:
                call.cancel()

        storm(300)
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        sizes = [memory(running.process.pid, "VmRSS")]
        for _ in range(3):
            storm(500)
            assert running.complete(max_tokens=3).usage.completion_tokens == 3
            sizes.append(memory(running.process.pid, "VmRSS"))
        running.stop()
    grown = [after - before for before, after in itertools.pairwise(sizes)]
    assert min(grown) < 10_000_000, [f"{each / MIB:.1f} MiB" for each in grown]
    draining = running.logged("draining")
    assert (draining["running"], draining["waiting"]) == (0, 0)


def test_slow_readers(tiny_model: Path, tmp_path: Path) -> None:
    """50 streams without a reader use little memory and keep no slot for long; other callers are answered meanwhile.

    Envoy takes in the whole of those over REST; the others, which nobody does, are given up.
    """
    http, metrics = free_ports(2)
    stack = Stack(http, 0, None, metrics)
    flags = ("--send-timeout-seconds", "0.5", "--context-length", "2048", "--metrics-port", str(metrics))
    with service(tiny_model, tmp_path, *flags, step_seconds=0.002) as running, ExitStack() as cleanup:
        cleanup.enter_context(envoy(http, running.port, tmp_path))
        stack.wait_until_ready()
        running.complete(max_tokens=100)
        before = peak = memory(running.process.pid, "VmRSS")
        for _ in range(25):
            cleanup.enter_context(unread(http))
        narrow = [
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", 65536),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        channel = cleanup.enter_context(grpc.insecure_channel(f"127.0.0.1:{running.port}", options=narrow))
        request = pb.CreateCompletionRequest(model=TINY, text="the", ignore_eos=True, max_tokens=2000, logprobs=5)
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        calls = [stub.StreamCompletion(request, metadata=METADATA) for _ in range(25)]
        waits = []
        while running.output.count("its caller reads too slowly") < 25 or stack.sample("llm_running"):
            asked = time.monotonic()
            assert running.complete(max_tokens=20).usage.completion_tokens == 20
            waits.append(time.monotonic() - asked)
            peak = max(peak, memory(running.process.pid, "VmRSS"))
        print(f"{(peak - before) / MIB:.1f} MiB more; {len(waits)} neighbours waited {max(waits):.1f} s at most")
        assert failure(calls[-1]).code() == grpc.StatusCode.ABORTED
    assert peak - before < 32 * MIB


def unread(port: int) -> socket.socket:
    """A connection on which a long stream of events is asked for, and nothing is read."""
    fields = {"model": TINY, "prompt": "the", "stream": True, "ignore_eos": True, "max_tokens": 200, "logprobs": 5}
    body = json.dumps(fields)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", port))
    reader.sendall((head + body).encode())
    return reader


def test_deadlines(tiny_model: Path, tmp_path: Path) -> None:
    """A deadline shorter than the wait, or amid a text, ends the call with DEADLINE_EXCEEDED, and frees its slot."""
    with service(
        tiny_model, tmp_path, "--max-running", "1", "--max-queue-seconds", "3600", step_seconds=0.01
    ) as running:
        holder = begun(running)
        with pytest.raises(grpc.RpcError) as queued:
            running.complete(max_tokens=1, timeout=5)
        assert queued.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        holder.cancel()
        running.complete(max_tokens=1)  # then its slot is free, and there is no wait any more
        ended_by_deadline(lambda seconds: running.stream(timeout=seconds, **LONG))
        assert running.complete(max_tokens=2).usage.completion_tokens == 2
        running.stop()
    assert running.logged("draining") | {"running": 0, "waiting": 0} == running.logged("draining")
    assert max(line.get("completion_tokens", 0) for line in running.log) < LONG["max_tokens"]


def test_envoy_ends_what_the_service_does_not(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the service not keep to the longest request, Envoy cuts it off, here after 5 s, and all is freed."""
    monkeypatch.setenv("COMPLETION_LONGEST_REQUEST_SECONDS", "5")
    flags = ("--max-running", "2", "--longest-request-seconds", "600")
    with service(tiny_model, tmp_path, *flags, step_seconds=0.02) as running:
        (http,) = free_ports(1)
        with envoy(http, running.port, tmp_path):
            stack = Stack(http, 0)
            stack.wait_until_ready()
            began = time.monotonic()
            with stack.begin(model=TINY, **LONG) as streamed:
                whole = stack.complete(model=TINY, prompt="the", ignore_eos=True, **LONG)
                assert (whole.status, whole.json["error"]["type"]) == (504, "server_error")
                with pytest.raises(http_client.HTTPException):
                    streamed.read()
            assert time.monotonic() - began > 4
            assert running.complete(max_tokens=2).usage.completion_tokens == 2
            running.stop()
    assert running.logged("draining")["running"] == 0
    cut = [line["completion_tokens"] for line in running.log if line.get("completion_tokens", 2) != 2]
    assert len(cut) == 2
    assert max(cut) < LONG["max_tokens"]


def test_a_log_that_nobody_reads(tiny_model: Path, tmp_path: Path) -> None:
    """With standard output blocked calls are answered as before, and the process still ends well."""
    with service(tiny_model, tmp_path, stdout=subprocess.PIPE) as running:
        longest = 0.0
        for _ in range(700):  # about three times what the pipe holds
            began = time.monotonic()
            running.stub.ListModels(pb.ListModelsRequest(), metadata=METADATA, timeout=PATIENCE)
            longest = max(longest, time.monotonic() - began)
        print(f"the longest call took {longest:.2f} s")
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        running.stop()


def test_a_full_disk(tiny_model: Path, tmp_path: Path) -> None:
    """Where not a byte can be written to any file, its log included, the service serves and ends well."""

    def no_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    with (
        Path("/dev/full").open("wb") as full,
        service(tiny_model, tmp_path, stdout=full, preexec_fn=no_files) as running,
    ):
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        running.stop()


READ_ONLY = "mount --make-rprivate / && mount -o remount,bind,ro / && ! touch . 2> /dev/null"


def test_a_read_only_file_system(tiny_model: Path, tmp_path: Path) -> None:
    """Where nothing can be written at all, neither the model nor the working directory nor /tmp, the service serves."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    alone = ["unshare", "--mount", "sh", "-c"]
    tried = subprocess.run([*alone, READ_ONLY], cwd=ROOT, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no read-only view of the file system can be made here: {tried.stderr}")
    with service(tiny_model, tmp_path, around=[*alone, f'{READ_ONLY} && exec "$@"', "sh"]) as running:
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        mounts = Path(f"/proc/{running.process.pid}/mounts").read_text().splitlines()
        assert any(" / " in line and "ro" in line.split()[3].split(",") for line in mounts)
        running.stop()


def test_more_sequences_than_slots(tiny_model: Path, tmp_path: Path) -> None:
    """One request may have more sequences than there are slots: they wait. What never fits is refused at once."""
    with service(tiny_model, tmp_path, "--max-running", "2", "--context-length", "64") as running:
        batch = pb.TextBatch(texts=["the"] * 16)
        request = pb.CreateCompletionRequest(model=TINY, texts=batch, n=8, max_tokens=3, ignore_eos=True)
        answer = running.stub.CreateCompletion(request, metadata=METADATA, timeout=PATIENCE)
        assert (len(answer.choices), answer.usage.completion_tokens) == (128, 384)
        assert running.complete(max_tokens=62).usage.completion_tokens == 62
        with pytest.raises(grpc.RpcError, match="maximum context length is 64 tokens") as caught:
            running.complete(max_tokens=64)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        running.stop()
    assert running.logged("draining") | {"running": 0, "waiting": 0} == running.logged("draining")


def test_nothing_is_forked(tiny_model: Path, tmp_path: Path) -> None:
    """A process with gRPC's threads never makes children; the one that would ends at once with 99."""
    with service(tiny_model, tmp_path, fault="spawn") as running:
        assert running.complete(max_tokens=3, n=3).usage.completion_tokens == 9
        running.stop()


def test_the_model_directory_is_replaced(tiny_model: Path, tmp_path: Path) -> None:
    """A running service keeps the model that it loaded, whatever becomes of the directory's name."""
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        subprocess.run(["cp", "-r", tiny_model, directory], check=True)
    (second / "model.onnx.data").write_bytes(bytes((second / "model.onnx.data").stat().st_size))
    link = tmp_path / "model"
    link.symlink_to(first)
    with service(link, tmp_path) as running:
        before = running.complete(max_tokens=40).choices[0].text
        link.unlink()
        link.symlink_to(second)
        subprocess.run(["rm", "-r", first], check=True)
        assert running.complete(max_tokens=40).choices[0].text == before
        running.stop()
