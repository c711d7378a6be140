// The pool's facts in words: times, sizes, and why somebody waits. Its reasons it says itself.

import { IN_THE_WAY, victimsOf } from "./state.js";

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

// A span of time, as short as one can read it.
export function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0005) return "0";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export function ago(seconds) {
  if (seconds < 1) return "now";
  return seconds < 10 ? `${Math.floor(seconds)} s ago` : `${span(seconds)} ago`;
}

const whole = (seconds) => (seconds < 10 ? `${seconds} s` : span(seconds));

export function size(mib) {
  if (mib === null || mib === undefined) return "–";
  return mib < 1024 ? `${Math.round(mib)} MiB` : `${(mib / 1024).toFixed(mib < 10240 ? 1 : 0)} GiB`;
}

export const clock = (time) => new Date(time * 1000).toLocaleTimeString([], { hour12: false });

// What the pool says itself, with the long ids of requests cut short.
export const said = (text) => text.replaceAll(/\b([0-9a-f]{8})[0-9a-f-]{24,28}\b/g, "$1…");

// Why a model leaves its place, or has left it, with the model that got it; the log has the whole reason.
export const whyLeft = (left) =>
  `${left.by ? `for ${left.by}: ` : "because "}${said(left.why).split(/ \(|, which costs/)[0]}`;

export function bound(model, now) {
  if (model.bound_at === null) return "";
  const left = Math.round(model.bound_at - now);
  return left > 0 ? `; its bound is in ${whole(left)}` : `; its bound was ${whole(-left)} ago`;
}

// Why the waiters of a model wait: the ledger's reason, in one sentence.
export function whyWaits(state, model, now) {
  if (state.recovering) return "the scheduler collects what runs after its restart";
  const replicas = Object.values(state.replicas).filter((row) => row.model === model.name);
  const ready = replicas.filter((row) => row.state === "READY");
  if (ready.length) {
    const [used, slots] = ["used", "slots"].map((name) => ready.reduce((sum, row) => sum + row[name], 0));
    return `all slots are in use: ${used} of ${slots}`;
  }
  const loads = replicas.find((row) => row.state === "LOADING");
  if (loads)
    return `it loads${percent(loads.progress)}${model.load_s ? `; a load takes about ${span(model.load_s)}` : ""}`;
  const victims = victimsOf(state, model);
  if (victims.length) return `waits for ${goers(victims)}${bound(model, now)}`;
  if (replicas.some((row) => row.state === "STARTING")) return "its process starts";
  if (replicas.some((row) => IN_THE_WAY.has(row.state))) return `it is being unloaded itself${bound(model, now)}`;
  if (model.state === "failed") return `its last load failed, and is tried again after a pause: ${model.last_error}`;
  if (model.remote) return "no server that has it is free";
  return `no room: ${residents(state)}${bound(model, now)}`;
}

export const percent = (progress) => (typeof progress === "number" ? ` (${Math.round(progress * 100)} %)` : "");

function goers(victims) {
  const parts = victims.map((row) =>
    row.leases ? `${plural(row.leases, "stream")} of ${row.model}` : `${row.model} to be unloaded`,
  );
  return [...new Set(parts)].join(" and ");
}

function residents(state) {
  const loaded = Object.values(state.replicas).filter((row) => ["READY", "LOADING"].includes(row.state));
  const onDevices = loaded.filter((row) => row.devices.length);
  const placed = onDevices.length ? onDevices : loaded;
  const names = [...new Set(placed.map((row) => row.model))];
  if (!names.length) return "nothing that fits is free";
  const shown = names.slice(0, 3).join(", ");
  return `${shown}${names.length > 3 ? ` and ${names.length - 3} more` : ""} ${names.length === 1 ? "has" : "have"} it`;
}

const GRAVE = { loaded: "good", quiesced: "warn", failed: "bad", engine_died: "bad" };

// How grave what happened is: "", "good", "warn" or "bad".
export function gravity({ kind, data }) {
  if (kind === "replica") return GRAVE[data.cause] ?? "";
  if (kind === "model") return data.state === "failed" ? "bad" : "";
  if (kind === "server") return data.removed || data.is_up ? "" : "bad";
  if (kind === "request") return data.status < 400 ? "" : data.status < 500 ? "warn" : "bad";
  return kind === "swap" || kind === "reset" ? "warn" : "";
}
