"""What a fault of one process does: its callers hear of it, health says so, others go on, and nothing is left."""

from __future__ import annotations

import http.client as http_client
import json
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2

from bench.processes import memory
from deploy import local
from tests.processes import METADATA, TINY, Service, export_tiny, service
from tests.stack import KEY, ROOT, Answer, Stack, envoy, free_ports

LONG = {"max_tokens": 3000}
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
MIB = 1 << 20


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


def begun(running: Service, **fields: object):
    """A stream of which the first piece has come."""
    stream = running.stream(**{**LONG, **fields})
    next(stream)
    return stream


def failure(stream) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return caught.value


def events_of(port: int, **fields: object) -> Answer:
    """A stream over REST, read to its end."""
    body = json.dumps({"model": TINY, "prompt": "the", "stream": True, "ignore_eos": True, **LONG, **fields})
    return Stack(port, 0).request(
        "POST", "/v1/completions", body, {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    )


def test_an_engine_that_dies(tiny_model: Path, tmp_path: Path) -> None:
    """In-flight calls end with UNAVAILABLE, events with an error, health within a second; the process exits with 1."""
    with service(tiny_model, tmp_path, fault="die", step_seconds=0.02) as running:
        (http,) = free_ports(1)
        with envoy(http, running.port, tmp_path), ThreadPoolExecutor(1) as pool:
            Stack(http, 0).wait_until_ready()
            events = pool.submit(events_of, http)
            typed, watch = begun(running), running.watch()
            next(watch)
            time.sleep(0.3)
            running.process.send_signal(signal.SIGUSR1)
            told = time.monotonic()
            assert next(watch).status == NOT_SERVING
            assert time.monotonic() - told < 1
            assert failure(typed).code() == grpc.StatusCode.UNAVAILABLE
            last = json.loads(events.result(10).events[-1])
            assert last["error"]["type"] == "server_error"
            assert running.exit_code(10) == 1
    assert "the engine has died" in running.errors
    assert running.logged("the engine has died")["level"] == "critical"
    # A stream that fails midway ends well for gRPC, but not in the log.
    codes = {line["code"] for line in running.log if line.get("method", "").endswith("StreamCompletionEvents")}
    assert codes == {"UNAVAILABLE"}


def test_an_engine_that_hangs(tiny_model: Path, tmp_path: Path) -> None:
    """The watchdog ends what never ends: callers hear, health says so, stacks on standard error, exit code 1."""
    with service(tiny_model, tmp_path, "--watchdog-seconds", "1", fault="hang", step_seconds=0.02) as running:
        stream, watch = begun(running), running.watch()
        next(watch)
        time.sleep(1.5)  # longer than the watchdog waits, in which no step takes long
        assert running.process.poll() is None
        running.process.send_signal(signal.SIGUSR1)
        assert next(watch).status == NOT_SERVING
        assert failure(stream).code() == grpc.StatusCode.UNAVAILABLE
        assert running.exit_code(10) == 1
    assert "in hang" in running.errors
    assert running.errors.count("most recent call first") > 1
    assert running.logged("the engine hangs")["seconds"] == 1


def test_an_event_loop_that_hangs(tiny_model: Path, tmp_path: Path) -> None:
    """The process ends with 1 although nothing of it listens any more, and says of what, with every thread's stack."""
    with service(tiny_model, tmp_path, "--watchdog-seconds", "2", fault="loop") as running:
        running.complete(max_tokens=1)
        running.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        call = running.stub.CreateCompletion.future(
            pb.CreateCompletionRequest(model=TINY, text="the"), metadata=METADATA
        )
        assert running.exit_code(60) == 1
        assert call.code() is grpc.StatusCode.UNAVAILABLE
    assert running.logged("the event loop hangs")["seconds"] == 2
    assert "hang_the_loop" in running.errors


def test_a_model_that_is_gone(tiny_model: Path, tmp_path: Path) -> None:
    """A model that fails on everything blames no request, and is given up on the third: exit code 1."""
    with service(tiny_model, tmp_path, fault="gone") as running:
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        watch = running.watch()
        next(watch)
        running.process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as caught:
                running.complete(max_tokens=3)
            assert caught.value.code() == grpc.StatusCode.UNAVAILABLE  # another replica may answer
            assert "secret" not in caught.value.details()
        assert next(watch).status == NOT_SERVING
        assert running.exit_code(10) == 1
    assert running.logged("the engine has died")["level"] == "critical"


@pytest.mark.parametrize(("fault", "counter"), [("fail", "failed_steps"), ("nan", "not_finite")])
def test_a_step_that_fails_for_one(tiny_model: Path, tmp_path: Path, fault: str, counter: str) -> None:
    """Only the sequence that the model fails on ends, with an opaque INTERNAL; its neighbours get their whole text."""
    with service(tiny_model, tmp_path, fault=fault, step_seconds=0.01) as running:
        whole = running.complete(max_tokens=150, text="neighbour").choices[0].text
        victim = begun(running)
        with ThreadPoolExecutor(3) as pool:
            neighbours = [pool.submit(running.complete, max_tokens=150, text="neighbour") for _ in range(3)]
            time.sleep(0.3)
            running.process.send_signal(signal.SIGUSR1)
            error = failure(victim)
            assert [each.result().choices[0].text for each in neighbours] == [whole] * 3
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        assert "Request id: " in error.details()
        running.stop()
    assert running.logged("draining")["running"] == 0
    counts = running.logged("stopped")
    assert counts[counter] == (2 if fault == "fail" else 1)  # the batch, then the row alone
    assert counts["failed_steps"] + counts["not_finite"] == counts[counter]


def test_drain_delay(tiny_model: Path, tmp_path: Path) -> None:
    """After SIGTERM health changes at once, new calls are taken for the delay and no longer, and what runs finishes."""
    delay = 1.5
    with service(tiny_model, tmp_path, "--drain-delay-seconds", str(delay), step_seconds=0.02) as running:
        stream, watch = begun(running, max_tokens=150), running.watch()
        next(watch)
        running.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert next(watch).status == NOT_SERVING
        assert time.monotonic() - told < 0.5
        assert running.complete(max_tokens=2).usage.completion_tokens == 2
        watch.cancel()
        time.sleep(max(0, told + delay + 0.3 - time.monotonic()))
        with pytest.raises(grpc.RpcError) as caught:
            running.complete(max_tokens=2, timeout=5)
        assert caught.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert list(stream)[-1].choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert running.exit_code() == 0
    assert running.logged("draining")["running"] == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal(tiny_model: Path, tmp_path: Path, number: int, code: int) -> None:
    """It ends the process within two seconds, whatever runs."""
    with service(tiny_model, tmp_path, step_seconds=0.02) as running:
        stream = begun(running)
        running.process.send_signal(number)
        time.sleep(0.3)
        assert running.process.poll() is None
        next(stream)
        running.process.send_signal(number)
        assert running.exit_code(2) == code


def test_a_storm_of_cancels(tiny_model: Path, tmp_path: Path) -> None:
    """1,000 calls cancelled in every state hold nothing afterwards, and the process grows by less than 20 MB."""
    with service(tiny_model, tmp_path, step_seconds=0.002) as running:
        draw = random.Random(1)

        def storm(count: int) -> None:
            calls = []
            for _ in range(count):
                fields = {"text": "the " * draw.choice((1, 200)), "n": draw.choice((1, 1, 3)), "max_tokens": 500}
                calls.append(running.stream(**fields))
                if len(calls) > 40 or draw.random() < 0.1:
                    calls.pop(draw.randrange(len(calls))).cancel()
            for call in calls:
                call.cancel()

        storm(300)
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        before = memory(running.process.pid, "VmRSS")
        storm(1000)
        assert running.complete(max_tokens=3).usage.completion_tokens == 3
        grown = memory(running.process.pid, "VmRSS") - before
        running.stop()
    assert grown < 20_000_000, f"grew by {grown / MIB:.1f} MiB"
    draining = running.logged("draining")
    assert (draining["running"], draining["waiting"]) == (0, 0)


def test_slow_readers(tiny_model: Path, tmp_path: Path) -> None:
    """50 streams that nobody reads take little memory, and no slot for long; who reads is answered beside them."""
    flags = ("--send-timeout-seconds", "0.5", "--context-length", "512")
    with service(tiny_model, tmp_path, *flags, step_seconds=0.002) as running, ExitStack() as cleanup:
        (http,) = free_ports(1)
        cleanup.enter_context(envoy(http, running.port, tmp_path))
        Stack(http, 0).wait_until_ready()
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
        request = pb.CreateCompletionRequest(model=TINY, text="the", ignore_eos=True, max_tokens=500, logprobs=5)
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        calls = [stub.StreamCompletion(request, metadata=METADATA) for _ in range(25)]
        began, waits = time.monotonic(), []
        while time.monotonic() < began + 6:
            asked = time.monotonic()
            assert running.complete(max_tokens=20, timeout=60).usage.completion_tokens == 20
            waits.append(time.monotonic() - asked)
            peak = max(peak, memory(running.process.pid, "VmRSS"))
        print(f"{(peak - before) / MIB:.1f} MiB more; neighbours waited {max(waits):.1f} s at most")
        error = failure(calls[-1])
    given_up = sum(line["message"].startswith("a request is given up") for line in running.log)
    assert given_up >= 20
    assert error.code() == grpc.StatusCode.ABORTED
    assert peak - before < 32 * MIB


def unread(port: int) -> socket.socket:
    """A connection on which a long stream of events is asked for, and nothing is read."""
    fields = {"model": TINY, "prompt": "the", "stream": True, "ignore_eos": True, "max_tokens": 500, "logprobs": 5}
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
            running.complete(max_tokens=1, timeout=0.3)
        assert queued.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        holder.cancel()
        running.complete(max_tokens=1, timeout=60)  # then its slot is free, and there is no wait any more
        request = pb.CreateCompletionRequest(model=TINY, text="the", max_tokens=3000, ignore_eos=True)
        stream = running.stub.StreamCompletion(request, metadata=METADATA, timeout=0.5)
        next(stream)
        assert failure(stream).code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert running.complete(max_tokens=2, timeout=60).usage.completion_tokens == 2
        running.stop()
    assert running.logged("draining") | {"running": 0, "waiting": 0} == running.logged("draining")


@pytest.mark.parametrize("setting", ["value: 598S", "max_stream_duration: 600s"])
def test_the_longest_that_a_request_may_take(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """At ten minutes (here 2 s) a whole answer is 504 with our envelope, a stream ends with an error, all is freed.

    The deadline that Envoy gives the service comes first; should the service not keep it, Envoy cuts the request off.
    """
    written = local.envoy_config
    assert setting in written({"HTTP_PORT": 1, "GRPC_PORT": 2})
    short = setting.replace("598", "2").replace("600", "2")
    monkeypatch.setattr(local, "envoy_config", lambda *given: written(*given).replace(setting, short))
    with service(tiny_model, tmp_path, "--max-running", "2", step_seconds=0.02) as running:
        (http,) = free_ports(1)
        with envoy(http, running.port, tmp_path), ThreadPoolExecutor(1) as pool:
            Stack(http, 0).wait_until_ready()
            streamed = pool.submit(events_of, http)
            whole = events_of(http, stream=False)
            assert (whole.status, whole.json["error"]["type"]) == (504, "server_error")
            if "598" in setting:
                events = streamed.result().events
                assert json.loads(events[-1])["error"]["type"] == "server_error"
                assert len(events) > 20
            else:
                with pytest.raises(http_client.HTTPException):
                    streamed.result()
            assert running.complete(max_tokens=2, timeout=5).usage.completion_tokens == 2
            running.stop()
    assert running.logged("draining")["running"] == 0


def test_a_log_that_nobody_reads(tiny_model: Path, tmp_path: Path) -> None:
    """With standard output blocked calls are answered as before, and the process still ends well."""
    with service(tiny_model, tmp_path, stdout=subprocess.PIPE) as running:
        longest = 0.0
        for _ in range(700):  # about three times what the pipe holds
            began = time.monotonic()
            running.stub.ListModels(pb.ListModelsRequest(), metadata=METADATA, timeout=10)
            longest = max(longest, time.monotonic() - began)
        assert longest < 1
        assert running.complete(max_tokens=3, timeout=10).usage.completion_tokens == 3
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
        answer = running.stub.CreateCompletion(request, metadata=METADATA, timeout=60)
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
