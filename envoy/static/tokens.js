// Shows one choice's text: plain, or token by token with what the model thought of each.

const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(logprob > -4.6 ? 1 : 3)} %`;

/** A token as one sees it: line breaks and spaces at its ends would be invisible. */
const visible = (token) => token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "∅";

/** The bytes of a token that is not whole UTF-8, which the service writes as `bytes:\xf0\x9f`; else null. */
function bytesOf(token) {
  if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(token)) return null;
  return Uint8Array.from(token.matchAll(/\\x(..)/g), ([, hex]) => parseInt(hex, 16));
}

/** The card that tells a token's probability and the alternatives, beside the token that is pointed at or focused. */
export class Tip {
  #element;
  #owner = null;
  #timer;

  constructor(element) {
    this.#element = element;
    element.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    element.addEventListener("pointerleave", () => this.hideSoon());
  }

  get shown() {
    return !this.#element.hidden;
  }

  show(owner, content) {
    clearTimeout(this.#timer);
    this.#owner?.removeAttribute("aria-describedby");
    this.#owner = owner;
    this.#element.replaceChildren(...content);
    this.#element.hidden = false;
    owner.setAttribute("aria-describedby", this.#element.id);
    this.#place(owner.getClientRects()[0]);
  }

  /** Below the token, and within the window. */
  #place(rect) {
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(rect.left, width - this.#element.offsetWidth - 8));
    this.#element.style.left = `${left + scrollX}px`;
    this.#element.style.top = `${rect.bottom + 4 + scrollY}px`;
  }

  /** Leaves time to move the pointer onto the card. */
  hideSoon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.hide(), 200);
  }

  hide() {
    clearTimeout(this.#timer);
    this.#owner?.removeAttribute("aria-describedby");
    this.#owner = null;
    this.#element.hidden = true;
  }
}

/** The text of one choice. One token at a time can be reached by Tab; the arrow keys move among them. */
export class ChoiceView {
  #text = make("div", { className: "text" });
  #tip;
  #details = new Map();
  #decoder = new TextDecoder();

  constructor(parent, title, tip) {
    this.#tip = tip;
    if (title) parent.append(make("h3", { textContent: title }));
    parent.append(this.#text);
    this.#text.addEventListener("keydown", (event) => this.#move(event));
    for (const [type, act] of [["pointerover", this.#explain], ["focusin", this.#explain]]) {
      this.#text.addEventListener(type, (event) => act.call(this, event.target));
    }
    this.#text.addEventListener("pointerout", () => this.#tip.hideSoon());
    this.#text.addEventListener("focusout", () => this.#tip.hide());
  }

  /** Appends a piece: its tokens when it is scored, else its text. */
  append({ text, logprobs }) {
    if (!logprobs) {
      this.#text.append(text);
      return;
    }
    logprobs.tokens.forEach((token, i) => {
      this.#appendToken(token, logprobs.token_logprobs[i], logprobs.top_logprobs?.[i]);
    });
  }

  #appendToken(token, logprob, alternatives) {
    const span = make("span", { className: "token", textContent: this.#shown(token) });
    span.tabIndex = this.#text.querySelector(".token") ? -1 : 0;
    if (token.includes("\n")) span.classList.add("break");
    if (logprob !== null) span.style.setProperty("--surprise", `${(100 * (1 - Math.exp(logprob))).toFixed(1)}%`);
    this.#details.set(span, { token, logprob, alternatives });
    this.#text.append(span);
  }

  /** Tokens that are parts of one character show it at the last of them. */
  #shown(token) {
    const bytes = bytesOf(token);
    if (bytes) return this.#decoder.decode(bytes, { stream: true }) || "·";
    this.#decoder = new TextDecoder();
    return token;
  }

  #explain(span) {
    const details = this.#details.get(span);
    if (details) this.#tip.show(span, explanation(details));
  }

  #move(event) {
    const tokens = [...this.#text.querySelectorAll(".token")];
    const at = tokens.indexOf(document.activeElement);
    const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1 };
    const next = tokens[steps[event.key]];
    if (at < 0 || !next) return;
    event.preventDefault();
    tokens[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

function explanation({ token, logprob, alternatives }) {
  if (logprob === null) return [make("p", { textContent: "Nothing precedes this token: it has no score." })];
  const title = make("p", {}, make("strong", { textContent: visible(token) }), ` ${percent(logprob)}`);
  title.append(make("span", { className: "hint", textContent: `  log ${logprob.toFixed(3)}` }));
  const rows = Object.entries(alternatives ?? {}).sort(([, a], [, b]) => b - a);
  const list = make("ol", {}, ...rows.map(([text, score]) => alternative(text, score, text === token)));
  return [title, list];
}

function alternative(text, logprob, chosen) {
  const bar = make("span", { className: "bar" });
  bar.style.setProperty("--share", `${100 * Math.exp(logprob)}%`);
  const name = make("code", { textContent: visible(text) });
  const row = make("li", { className: chosen ? "chosen" : "" }, name, bar, make("span", { textContent: percent(logprob) }));
  if (chosen) row.setAttribute("aria-current", "true");
  return row;
}
