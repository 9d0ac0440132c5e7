// The page: reads the form, shows the answer, and copies the request as code.
import { ApiError, complete, listModels } from "/playground/completions.js";
import * as snippets from "/playground/snippets.js";
import { ChoiceView, Tip } from "/playground/tokens.js";

const $ = (id) => document.getElementById(id);
const form = $("request");
const tip = new Tip($("tip"));
let running = null;

// The key: asked for once the service wants one, kept for this tab alone, and gone with it.
const KEY = "completion-service-key";
$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key-field").hidden = !$("key").value;

/** What was typed as a number; whatever is none goes out as it is, for the service to refuse in its own words. */
function number(text) {
  if (/^-?\d+$/.test(text)) return Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);
  return Number.isFinite(Number(text)) ? Number(text) : text;
}

const ESCAPES = { "\\n": "\n", "\\t": "\t", "\\\\": "\\" };
const unescaped = (line) => line.replaceAll(/\\[nt\\]/g, (escape) => ESCAPES[escape]);

/** The request's fields. What is blank is left out, so that the service's own defaults hold. */
function fields() {
  const request = { model: $("model").value, prompt: $("prompt").value };
  for (const { name, value } of form.querySelectorAll("input[inputmode], #logprobs")) {
    if (value.trim()) request[name] = number(value.trim());
  }
  const stops = $("stop_texts").value.split("\n").filter(Boolean).map(unescaped);
  if (stops.length) request.stop = stops;
  if ($("echo").checked) request.echo = true;
  if (!$("parse_special").checked) request.parse_special = false;
  if ($("stream").checked) {
    Object.assign(request, { stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } });
  }
  return request;
}

// Errors, in the service's words.

function clearError() {
  $("error").hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-errormessage");
  }
}

/** Shows the error, marks the field at fault, if this page has it, and gives that field. */
function showError(error) {
  if (!(error instanceof ApiError)) throw error;
  const facts = [error.status && `HTTP ${error.status}`, error.type, error.code, error.param, error.requestId];
  const detail = document.createElement("small");
  detail.textContent = facts.filter(Boolean).join(" · ");
  $("error").replaceChildren(error.message, detail);
  $("error").hidden = false;
  if (error.status === 401) $("key-field").hidden = false;
  const field = error.status === 401 ? $("key") : form.querySelector(`[name="${CSS.escape(error.param ?? "")}"]`);
  field?.setAttribute("aria-invalid", "true");
  field?.setAttribute("aria-errormessage", "error");
  return field;
}

async function loadModels() {
  const key = $("key").value;
  clearError();
  try {
    const models = await listModels(key);
    if (key !== $("key").value) return;
    const chosen = $("model").value;
    $("model").replaceChildren(...models.map((id) => new Option(id)));
    $("model").value = models.includes(chosen) ? chosen : models[0];
    $("model-hint").textContent = `${models.length} ids and aliases are served.`;
  } catch (error) {
    if (error.status === 401 && !key) {
      $("key-field").hidden = false;
      $("model-hint").textContent = "The models are listed once there is a key.";
      return;
    }
    // Whoever types elsewhere by now goes on typing.
    showError(error);
  }
}

// A run.

/** Times in milliseconds, and tokens as the service counts them. */
class Figures {
  #start = performance.now();
  #first = null;
  #last = this.#start;
  #usage = null;

  add({ choices, usage }) {
    this.#last = performance.now();
    if (choices.length) this.#first ??= { at: this.#last, tokens: usage?.completion_tokens ?? 0 };
    this.#usage = usage ?? this.#usage;
  }

  show() {
    const seconds = (this.#last - this.#start) / 1000;
    const tokens = this.#usage?.completion_tokens;
    const since = (this.#last - (this.#first?.at ?? this.#last)) / 1000;
    const speed = since > 0 ? (tokens - this.#first.tokens) / since : tokens / seconds;
    $("prompt-tokens").textContent = this.#usage ? `${this.#usage.prompt_tokens} tokens` : "–";
    $("completion-tokens").textContent = this.#usage ? `${tokens} tokens` : "–";
    $("first-token").textContent = since > 0 ? `${(this.#first.at - this.#start).toFixed(0)} ms` : "–";
    $("speed").textContent = Number.isFinite(speed) ? `${speed.toFixed(1)} tokens/s` : "–";
    $("total").textContent = `${seconds.toFixed(2)} s`;
    $("figures").hidden = false;
  }
}

function showRunning(on) {
  const focused = document.activeElement;
  $("complete").disabled = on;
  $("stop").disabled = !on;
  $("answer").setAttribute("aria-busy", String(on));
  // A disabled button would lose the focus.
  if (on && focused === $("complete")) $("stop").focus();
  if (!on && focused === $("stop")) $("complete").focus();
}

/** Why a choice ended, with the stop text that matched. */
const why = ({ finish_reason: reason, stop_reason: stop }) => (stop ? `${reason} at ${JSON.stringify(stop)}` : reason);

async function run(request, signal) {
  const figures = new Figures();
  const choices = new Map();
  const reasons = new Set();
  const several = request.n > 1;
  $("status").textContent = "Waiting for the first token …";
  try {
    for await (const piece of complete(snippets.json(request), $("key").value, signal)) {
      figures.add(piece);
      for (const choice of piece.choices) {
        if (!choices.has(choice.index)) {
          const title = several ? `Choice ${choice.index + 1}` : "";
          choices.set(choice.index, new ChoiceView($("answer"), title, tip));
          $("status").textContent = "Receiving …";
        }
        choices.get(choice.index).append(choice);
        if (choice.logprobs) $("legend").hidden = false;
        if (choice.finish_reason) reasons.add(why(choice));
      }
    }
    $("status").textContent = `Finished: ${[...reasons].join(", ")}.`;
  } finally {
    if (choices.size) figures.show();
  }
}

async function start() {
  if (running) return;
  clearError();
  tip.hide();
  running = new AbortController();
  const request = fields();
  $("answer").replaceChildren();
  $("figures").hidden = true;
  $("legend").hidden = true;
  showRunning(true);
  try {
    await run(request, running.signal);
  } catch (error) {
    $("status").textContent = error.name === "AbortError" ? "Stopped." : "Failed.";
    if (error.name !== "AbortError") showError(error)?.focus();
  } finally {
    running = null;
    showRunning(false);
  }
}

// Copying.

async function copy(kind) {
  const text = snippets[kind](fields(), location.origin);
  $("snippet").textContent = text;
  $("snippet").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "Copied. The key is read from the variable API_KEY.";
  } catch {
    getSelection().selectAllChildren($("snippet"));
    $("copied").textContent = "The browser does not let this page copy: the text is selected below.";
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
$("stop").addEventListener("click", () => running?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (tip.shown) tip.hide();
  else running?.abort();
});
$("key").addEventListener("input", () => sessionStorage.setItem(KEY, $("key").value));
$("key").addEventListener("change", loadModels);
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => copy(button.dataset.copy));
}
loadModels();
