// Calls to the pool with the key that was given, which lives as long as this tab and stands in no address.

const NAME = "slotpool-key";
// The page stands at PREFIX/ui/, the pool's routes at PREFIX/.
const BASE = new URL("..", location.href);

export const key = {
  get: () => sessionStorage.getItem(NAME) ?? "",
  set: (value) => (value ? sessionStorage.setItem(NAME, value) : sessionStorage.removeItem(NAME)),
};

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The answer to a call, whatever its status.
export function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (key.get()) sent.Authorization = `Bearer ${key.get()}`;
  if (body !== undefined) sent["Content-Type"] = "application/json";
  const content = body === undefined ? undefined : JSON.stringify(body);
  return fetch(new URL(path, BASE), { method, headers: sent, body: content, signal, cache: "no-store" });
}

// Throws `Refused` with the pool's own words for an answer that is none.
export async function checked(answer) {
  if (answer.ok) return answer;
  let message = `HTTP ${answer.status}`;
  try {
    const error = (await answer.json()).error;
    message = error?.message ?? error ?? message;
  } catch {
    // No JSON: the status says what there is to say.
  }
  throw new Refused(answer.status, String(message));
}

const path = (model) => `v1/admin/models/${model.split("/").map(encodeURIComponent).join("/")}`;

export const load = async (model) => checked(await call(`${path(model)}/load`, { method: "POST", body: {} }));
export const unload = async (model) => checked(await call(`${path(model)}/unload`, { method: "POST" }));
export const pin = async (model, pinned) => checked(await call(path(model), { method: "PATCH", body: { pinned } }));
export const devices = async () => (await checked(await call("v1/admin/gpu-memory"))).json();
