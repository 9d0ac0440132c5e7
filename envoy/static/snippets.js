// One request as programs. They read the key from the environment, so that a copied text holds no secret.

const KEY = "${API_KEY:-YOUR_API_KEY}";
const PYTHON_KEY = 'os.environ.get("API_KEY", "YOUR_API_KEY")';

const shellQuoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** The request as JSON. Integers beyond a double's come as BigInt, which JSON.stringify does not take. */
export function json(fields) {
  const text = (value) => (typeof value === "bigint" ? String(value) : JSON.stringify(value));
  return `{${Object.entries(fields).map(([name, value]) => `"${name}": ${text(value)}`).join(", ")}}`;
}

/** A JSON value as a Python expression. */
function pythonValue(value) {
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "number" || typeof value === "bigint") return String(value);
  // JSON's escapes mean the same in Python.
  if (typeof value === "string") return JSON.stringify(value);
  if (Array.isArray(value)) return `[${value.map(pythonValue).join(", ")}]`;
  return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonValue(item)}`).join(", ")}}`;
}

const pythonArguments = (fields) =>
  Object.entries(fields).map(([name, value]) => `    ${name}=${pythonValue(value)},\n`).join("");

/** The request of OpenAI's client, which takes a parameter that OpenAI does not have as `extra_body`. */
function clientFields({ parse_special, ...fields }) {
  return parse_special === undefined ? fields : { ...fields, extra_body: { parse_special } };
}

/** The request of typed callers: a prompt as `text`, and no `stream`, which the method implies. */
function typedFields({ prompt, stream, ...fields }) {
  return { ...fields, text: prompt };
}

export function curl(fields, origin) {
  return [
    `curl -sS${fields.stream ? "N" : ""} -X POST ${origin}/v1/completions \\`,
    `  -H "Authorization: Bearer ${KEY}" -H "Content-Type: application/json" \\`,
    `  -d ${shellQuoted(json(fields))}\n`,
  ].join("\n");
}

export function python(fields, origin) {
  const lines = fields.stream
    ? `for piece in answer:
    for choice in piece.choices:
        print(choice.text, end="", flush=True)
print()
`
    : `for choice in answer.choices:
    print(choice.text)
`;
  return `import os

from openai import OpenAI

client = OpenAI(base_url="${origin}/v1", api_key=${PYTHON_KEY})
answer = client.completions.create(
${pythonArguments(clientFields(fields))})
${lines}`;
}

export function buf(fields, origin) {
  const method = fields.stream ? "StreamCompletion" : "CreateCompletion";
  const plain = origin.startsWith("http:") ? " --http2-prior-knowledge" : "";
  return [
    `buf curl --protocol grpc${plain} --schema . \\`,
    `  -H "authorization: Bearer ${KEY}" \\`,
    `  -d ${shellQuoted(json(typedFields(fields)))} \\`,
    `  ${origin}/completion.v1.CompletionService/${method}\n`,
  ].join("\n");
}

export function grpc(fields, origin) {
  const { protocol, hostname, port } = new URL(origin);
  const secure = protocol === "https:";
  const address = `${hostname}:${port || (secure ? 443 : 80)}`;
  const channel = secure
    ? `grpc.secure_channel("${address}", grpc.ssl_channel_credentials())`
    : `grpc.insecure_channel("${address}")`;
  const { stream_options: options, ...typed } = typedFields(fields);
  const streaming = options ? `    stream_options=pb.StreamOptions(\n${indented(pythonArguments(options))}    ),\n` : "";
  const lines = fields.stream
    ? `for piece in stub.StreamCompletion(request, metadata=metadata):
    for choice in piece.choices:
        print(choice.text, end="", flush=True)
print()
`
    : `for choice in stub.CreateCompletion(request, metadata=metadata).choices:
    print(choice.text)
`;
  return `import os

import grpc
from completion.v1 import completion_pb2 as pb, completion_pb2_grpc

stub = completion_pb2_grpc.CompletionServiceStub(${channel})
metadata = [("authorization", "Bearer " + ${PYTHON_KEY})]
request = pb.CreateCompletionRequest(
${pythonArguments(typed)}${streaming})
${lines}`;
}

const indented = (text) => text.replaceAll(/^/gm, "    ").trimEnd() + "\n";
