// What every example does: a whole answer, a stream, scores, a typed error, a deadline, and a cancelled stream.
import completion.v1.CompletionServiceGrpc;
import completion.v1.CompletionServiceGrpc.CompletionServiceBlockingStub;
import completion.v1.CreateCompletionRequest;
import completion.v1.CreateCompletionResponse;
import completion.v1.ErrorResponse;
import completion.v1.Logprobs;
import io.grpc.Context;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.nio.charset.StandardCharsets;
import java.io.PrintStream;
import java.util.Iterator;
import java.util.Locale;
import java.util.concurrent.TimeUnit;

public final class Main {
  private static final String MODEL = "gpt-3.5-turbo-instruct";
  private static final CreateCompletionRequest STORY =
      CreateCompletionRequest.newBuilder()
          .setModel(MODEL)
          .setText("Once upon a time")
          .setMaxTokens(24)
          .setTemperature(0.8f)
          .setSeed(7)
          .build();
  private static final CreateCompletionRequest LONG =
      CreateCompletionRequest.newBuilder()
          .setModel(MODEL)
          .setText("Once upon a time")
          .setMaxTokens(4000)
          .setIgnoreEos(true)
          .build();

  private final PrintStream out = new PrintStream(System.out, true, StandardCharsets.UTF_8);
  private final CompletionServiceBlockingStub stub;

  private Main(CompletionServiceBlockingStub stub) {
    this.stub = stub;
  }

  /** Prints the whole answer, then the same text as it comes. */
  private void complete() {
    out.println("unary:" + stub.createCompletion(STORY).getChoices(0).getText());
    out.print("stream:");
    stub.streamCompletion(STORY).forEachRemaining(piece -> out.print(piece.getChoices(0).getText()));
    out.println();
  }

  /** Prints each token with its log probability. */
  private void scores() {
    CreateCompletionRequest request =
        CreateCompletionRequest.newBuilder()
            .setModel(MODEL)
            .setText("The capital of France is")
            .setMaxTokens(4)
            .setTemperature(0)
            .setLogprobs(1)
            .build();
    Logprobs logprobs = stub.createCompletion(request).getChoices(0).getLogprobs();
    for (int i = 0; i < logprobs.getTokensCount(); i++) {
      double score = logprobs.getTokenLogprobs(i).getLogprob();
      out.println(String.format(Locale.ROOT, "logprob:%s %.3f", logprobs.getTokens(i), score));
    }
  }

  /** Prints a typed error. */
  private void refusal() throws Exception {
    CreateCompletionRequest request = CreateCompletionRequest.newBuilder().setModel(MODEL).setMaxTokens(-1).build();
    StatusRuntimeException refused = failure(Status.Code.INVALID_ARGUMENT, () -> stub.createCompletion(request));
    ErrorResponse response = StatusProto.fromThrowable(refused).getDetails(0).unpack(ErrorResponse.class);
    completion.v1.Error error = response.getError();
    out.println("error: " + error.getParam() + " " + error.getCode() + " " + error.getMessage());
  }

  /** Gives up when the answer is not there after 0.3 s. */
  private void deadline() {
    failure(
        Status.Code.DEADLINE_EXCEEDED,
        () -> stub.withDeadlineAfter(300, TimeUnit.MILLISECONDS).createCompletion(LONG));
    out.println("deadline exceeded");
  }

  /** Cancels a stream after three pieces; the service stops generating at once. */
  private void cancel() {
    Context.CancellableContext context = Context.current().withCancellation();
    context.run(
        () -> {
          Iterator<CreateCompletionResponse> pieces = stub.streamCompletion(LONG);
          for (int i = 0; i < 3; i++) {
            pieces.next();
          }
          context.cancel(null);
          failure(Status.Code.CANCELLED, () -> pieces.forEachRemaining(piece -> {}));
        });
    out.println("cancelled after 3 pieces");
  }

  /** What the call fails with; an error when it succeeds or fails otherwise. */
  private static StatusRuntimeException failure(Status.Code expected, Runnable call) {
    try {
      call.run();
    } catch (StatusRuntimeException problem) {
      if (problem.getStatus().getCode() == expected) {
        return problem;
      }
      throw problem;
    }
    throw new IllegalStateException("the call should have ended with " + expected);
  }

  private static String environment(String name, String otherwise) {
    return System.getenv().getOrDefault(name, otherwise);
  }

  public static void main(String[] arguments) throws Exception {
    Metadata headers = new Metadata();
    headers.put(
        Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER),
        "Bearer " + environment("API_KEY", "YOUR_API_KEY"));
    ManagedChannel channel =
        ManagedChannelBuilder.forTarget(environment("COMPLETION_ADDRESS", "127.0.0.1:50051"))
            .usePlaintext()
            .intercept(MetadataUtils.newAttachHeadersInterceptor(headers))
            .build();
    try {
      Main example = new Main(CompletionServiceGrpc.newBlockingStub(channel));
      example.complete();
      example.scores();
      example.refusal();
      example.deadline();
      example.cancel();
    } finally {
      channel.shutdownNow();
    }
  }
}
