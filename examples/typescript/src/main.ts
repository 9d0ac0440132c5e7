// What every example does: a whole answer, a stream, scores, a typed error, a deadline, and a cancelled stream.
import { create } from "@bufbuild/protobuf";
import { type Client, Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcTransport, Http2SessionManager } from "@connectrpc/connect-node";

import {
  CompletionService,
  CreateCompletionRequestSchema,
  ErrorResponseSchema,
} from "../stubs/completion/v1/completion_pb.js";

const address = process.env.COMPLETION_ADDRESS ?? "127.0.0.1:50051";
const key = process.env.API_KEY ?? "YOUR_API_KEY";

const model = "gpt-3.5-turbo-instruct";
const prompt = { case: "text", value: "Once upon a time" } as const;
const story = create(CreateCompletionRequestSchema, { model, prompt, maxTokens: 24, temperature: 0.8, seed: 7n });
const long = create(CreateCompletionRequestSchema, { model, prompt, maxTokens: 4000, ignoreEos: true });

const withKey: Interceptor = (next) => (request) => {
  request.header.set("authorization", `Bearer ${key}`);
  return next(request);
};

/** Prints the whole answer, then the same text as it comes. */
async function complete(client: Client<typeof CompletionService>): Promise<void> {
  const answer = await client.createCompletion(story);
  console.log(`unary:${answer.choices[0].text}`);
  process.stdout.write("stream:");
  for await (const piece of client.streamCompletion(story)) {
    process.stdout.write(piece.choices[0].text);
  }
  console.log();
}

/** Prints each token with its log probability. */
async function scores(client: Client<typeof CompletionService>): Promise<void> {
  const answer = await client.createCompletion({
    model,
    prompt: { case: "text", value: "The capital of France is" },
    maxTokens: 4,
    temperature: 0,
    logprobs: 1,
  });
  const scores = answer.choices[0].scores;
  if (scores.case !== "logprobs") throw new Error("no log probabilities");
  scores.value.tokens.forEach((token, i) => {
    console.log(`logprob:${token} ${Number(scores.value.tokenLogprobs[i].kind.value).toFixed(3)}`);
  });
}

/** The error that the call ends with; fails when it ends well or with another code. */
async function failure(code: Code, call: () => Promise<unknown>): Promise<ConnectError> {
  try {
    await call();
  } catch (reason) {
    const error = ConnectError.from(reason);
    if (error.code === code) return error;
    throw error;
  }
  throw new Error(`the call should have ended with ${Code[code]}`);
}

/** Prints a typed error. */
async function refusal(client: Client<typeof CompletionService>): Promise<void> {
  const refused = await failure(Code.InvalidArgument, () => client.createCompletion({ model, maxTokens: -1 }));
  const [{ error }] = refused.findDetails(ErrorResponseSchema);
  console.log(`error: ${error?.paramOrNull.value} ${error?.codeOrNull.value} ${error?.message}`);
}

/** Gives up when the answer is not there after 0.3 s. */
async function deadline(client: Client<typeof CompletionService>): Promise<void> {
  await failure(Code.DeadlineExceeded, () => client.createCompletion(long, { timeoutMs: 300 }));
  console.log("deadline exceeded");
}

/** Cancels a stream after three pieces; the service stops generating at once. */
async function cancel(client: Client<typeof CompletionService>): Promise<void> {
  const abort = new AbortController();
  let pieces = 0;
  await failure(Code.Canceled, async () => {
    for await (const _ of client.streamCompletion(long, { signal: abort.signal })) {
      // What had already come when the stream was cancelled is not counted.
      if (pieces < 3 && ++pieces === 3) abort.abort();
    }
  });
  console.log(`cancelled after ${pieces} pieces`);
}

const sessionManager = new Http2SessionManager(`http://${address}`);
const transport = createGrpcTransport({ baseUrl: `http://${address}`, interceptors: [withKey], sessionManager });
const client = createClient(CompletionService, transport);
await complete(client);
await scores(client);
await refusal(client);
await deadline(client);
await cancel(client);
sessionManager.abort();
