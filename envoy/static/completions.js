// Talks to the service: one request, and its answer piece by piece.

/** What the service or the network answered instead of a completion. `param` and `code` may be null. */
export class ApiError extends Error {
  constructor({ message, type, param, code }, status, requestId) {
    super(message);
    Object.assign(this, { type, param, code, status, requestId });
  }
}

async function send(path, key, options) {
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError({ message: "The service cannot be reached.", type: "network", param: null, code: null });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const text = await response.text();
  let error;
  try {
    error = JSON.parse(text).error;
  } catch {
    error = { message: text || response.statusText, type: "unreadable answer", param: null, code: null };
  }
  return new ApiError(error, response.status, response.headers.get("x-request-id"));
}

/** The ids and aliases of the served models. */
export async function listModels(key) {
  const response = await send("/v1/models", key, { method: "GET" });
  return (await response.json()).data.map((model) => model.id);
}

/** Yields the answer's JSON objects: the pieces of a stream as they arrive, or the whole answer at once. */
export async function* complete(body, key, signal) {
  const headers = { "content-type": "application/json" };
  const response = await send("/v1/completions", key, { method: "POST", headers, body, signal });
  if (!response.headers.get("content-type").startsWith("text/event-stream")) {
    yield await response.json();
    return;
  }
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece = JSON.parse(data);
    if (piece.error) throw new ApiError(piece.error, response.status, response.headers.get("x-request-id"));
    yield piece;
  }
  throw new ApiError({ message: "The stream ended before its end.", type: "network", param: null, code: null });
}

/** The data of server-sent events, each of which the service sends as one line and an empty one: `data: ...`, or a comment. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (block.startsWith("data: ")) yield block.slice("data: ".length);
    }
  }
}
