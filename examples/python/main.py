"""What every example does: a whole answer, a stream, scores, a typed error, a deadline, and a cancelled stream."""

import os

import grpc
from completion.v1 import completion_pb2, completion_pb2_grpc
from grpc_status import rpc_status

MODEL = "gpt-3.5-turbo-instruct"
STORY = completion_pb2.CreateCompletionRequest(
    model=MODEL, text="Once upon a time", max_tokens=24, temperature=0.8, seed=7
)
LONG = completion_pb2.CreateCompletionRequest(model=MODEL, text="Once upon a time", max_tokens=4000, ignore_eos=True)


def scores(stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """Prints each token with its log probability."""
    request = completion_pb2.CreateCompletionRequest(
        model=MODEL, text="The capital of France is", max_tokens=4, temperature=0, logprobs=1
    )
    logprobs = stub.CreateCompletion(request).choices[0].logprobs
    for token, score in zip(logprobs.tokens, logprobs.token_logprobs, strict=True):
        print(f"logprob:{token} {score.logprob:.3f}")


def refusal(stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """Prints the four fields' worth of a typed error."""
    try:
        stub.CreateCompletion(completion_pb2.CreateCompletionRequest(model=MODEL, max_tokens=-1))
    except grpc.RpcError as failure:
        if failure.code() != grpc.StatusCode.INVALID_ARGUMENT:
            raise
        detail = completion_pb2.ErrorResponse()
        rpc_status.from_call(failure).details[0].Unpack(detail)
        print(f"error: {detail.error.param} {detail.error.code} {detail.error.message}")


def deadline(stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """Gives up when the answer is not there after 0.3 s."""
    try:
        stub.CreateCompletion(LONG, timeout=0.3)
    except grpc.RpcError as failure:
        if failure.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
            raise
        print("deadline exceeded")


def cancel(stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """Cancels a stream after three pieces; the service stops generating at once."""
    call = stub.StreamCompletion(LONG)
    pieces = 0
    try:
        for _ in call:
            pieces += 1
            if pieces == 3:
                call.cancel()
    except grpc.RpcError as failure:
        if failure.code() != grpc.StatusCode.CANCELLED:
            raise
        print(f"cancelled after {pieces} pieces")


class WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the key with every call."""

    def __init__(self, key: str) -> None:
        self._metadata = [("authorization", f"Bearer {key}")]

    def intercept_unary_unary(self, continuation, details, request):
        return continuation(details._replace(metadata=self._metadata), request)

    def intercept_unary_stream(self, continuation, details, request):
        return continuation(details._replace(metadata=self._metadata), request)


def main() -> None:
    address = os.environ.get("COMPLETION_ADDRESS", "127.0.0.1:50051")
    key = os.environ.get("API_KEY", "YOUR_API_KEY")
    with grpc.insecure_channel(address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(grpc.intercept_channel(channel, WithKey(key)))
        print("unary:" + stub.CreateCompletion(STORY).choices[0].text)
        print("stream:" + "".join(piece.choices[0].text for piece in stub.StreamCompletion(STORY)))
        scores(stub)
        refusal(stub)
        deadline(stub)
        cancel(stub)


if __name__ == "__main__":
    main()
