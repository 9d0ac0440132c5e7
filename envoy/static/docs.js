// Where the service needs no key, its description does not ask for one.
const { status } = await fetch("/v1/models", { credentials: "omit", cache: "no-store" });
if (status !== 401) {
  await customElements.whenDefined("openapi-explorer");
  const root = document.querySelector("openapi-explorer").shadowRoot;
  const hidden = new CSSStyleSheet();
  hidden.replaceSync(".security-info-button { display: none }");
  root.adoptedStyleSheets = [...root.adoptedStyleSheets, hidden];
}
