// Server-sent events over fetch, since EventSource can send no key: resumed behind the last one whenever they are cut
// off.

import { call, checked } from "./api.js";

// The pool says something at least every 15 s; a connection that is silent for longer is dead.
const SILENT_S = 40;
const PAUSES_S = [0.3, 0.5, 1, 2, 3];

const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

// The events of a text stream: `{kind, data, id}` each, `kind` "comment" for comments. `alive` is called at every sign.
export async function* parsed(body, alive = () => {}) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      alive();
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) yield parsedEvent(part);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsedEvent(part) {
  const found = { kind: "message", data: "", id: null };
  const names = { event: "kind", data: "data", id: "id" };
  if (part.startsWith(":")) return { ...found, kind: "comment", data: part.slice(1).trim() };
  for (const line of part.split("\n")) {
    const at = line.indexOf(":");
    const name = names[line.slice(0, at)];
    if (name) found[name] = line.slice(at + 1).replace(/^ /, "");
  }
  return found;
}

// Follows the pool for ever. `told` gets every event, `changed` the connection's state: "live", "lost" or "refused"
// with the refusal. After a refusal it waits for `retry` before it tries again.
export async function follow({ told, changed, retry }) {
  let last = "";
  let lost = 0;
  while (true) {
    const control = new AbortController();
    let timer = 0;
    const alive = () => {
      clearTimeout(timer);
      timer = setTimeout(() => control.abort(), SILENT_S * 1000);
    };
    try {
      alive();
      const headers = last ? { "Last-Event-ID": last } : {};
      const answer = await checked(await call("v1/admin/events", { headers, signal: control.signal }));
      changed("live");
      for await (const event of parsed(answer.body, alive)) {
        lost = 0;
        if (event.kind === "comment") continue;
        told(event.kind, JSON.parse(event.data));
        last = event.id ?? last;
      }
    } catch (error) {
      if (error.status === 401 || error.status === 403) {
        changed("refused", error);
        await retry();
        continue;
      }
    } finally {
      clearTimeout(timer);
      control.abort();
    }
    changed("lost");
    await sleep(PAUSES_S[Math.min(lost++, PAUSES_S.length - 1)]);
  }
}
