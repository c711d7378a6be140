// Devices and servers as lanes, with what is resident, loading, draining or asleep there.

import { html } from "./html.js";
import { victimsOf } from "./state.js";
import { ago, plural, size, span, whyLeft } from "./words.js";

const WORDS = {
  READY: "loaded",
  STARTING: "starting",
  LOADING: "loading",
  DRAINING: "draining",
  UNLOADING: "unloading",
  STOPPING: "stopping",
  ASLEEP: "asleep",
};

// The lanes in order: every device of every machine, then what needs none, then the servers.
function lanesOf(state) {
  const lanes = new Map();
  const many = state.nodes.length > 1;
  const add = (node, index) => {
    const name = index === null ? "CPU" : `GPU ${index}`;
    const id = `${node} ${index ?? "cpu"}`;
    if (!lanes.has(id)) lanes.set(id, { id, name, where: many ? node.slice(0, 8) : "", node, index, rows: [] });
    return lanes.get(id);
  };
  for (const node of state.nodes) for (let index = 0; index < node.gpus; index++) add(node.name, index);
  for (const row of Object.values(state.replicas)) {
    for (const index of row.devices.length ? row.devices : [null]) add(row.node, index).rows.push(row);
  }
  return [...lanes.values()].sort((a, b) => (a.index ?? 1e9) - (b.index ?? 1e9) || a.node.localeCompare(b.node));
}

export function Lanes({ state, now }) {
  const lanes = lanesOf(state);
  const servers = Object.values(state.servers);
  return html`
    <section aria-labelledby="h-lanes" class="lanes">
      <h2 id="h-lanes">Devices and servers</h2>
      ${lanes.map((lane) => html`<${Lane} key=${lane.id} state=${state} lane=${lane} now=${now} />`)}
      ${servers.map((row) => html`<${Server} key=${row.url} row=${row} />`)}
      ${!lanes.length && !servers.length && html`<p class="empty">Nothing is loaded, and no device is known.</p>`}
    </section>`;
}

function Lane({ state, lane, now }) {
  const awake = lane.rows.filter((row) => row.state !== "ASLEEP");
  const asleep = lane.rows.filter((row) => row.state === "ASLEEP");
  const gpu = state.gpus.find((row) => row.node === lane.node && row.index === lane.index);
  const budget = state.nodes.find((row) => row.name === lane.node)?.device_memory_mib;
  const memory = gpu
    ? `${size(gpu.used_mib)} of ${size(gpu.total_mib)}`
    : lane.index !== null && budget
      ? size(budget)
      : "";
  return html`
    <div class="lane" data-lane=${lane.name}>
      <div class="lane-name">
        <b>${lane.name}</b>${lane.where && html` <span class="dim">${lane.where}</span>`}
        ${memory && html`<span class="dim">${memory}</span>`}
        ${gpu && html`<${Meter} value=${gpu.used_mib} of=${gpu.total_mib} label=${`memory of ${lane.name}`} />`}
      </div>
      <ul class="residents">
        ${awake.map((row) => html`<${Replica} key=${row.record} state=${state} row=${row} now=${now} />`)}
        ${!awake.length && html`<li class="empty">empty</li>`}
        ${asleep.length > 0 && html`<li class="sleepers dim">asleep: ${asleep.map((row) => row.model).join(", ")}</li>`}
      </ul>
    </div>`;
}

function Replica({ state, row, now }) {
  const model = state.models[row.model] ?? {};
  const word = WORDS[row.state] ?? row.state.toLowerCase();
  const serving = row.state === "READY" || row.state === "DRAINING";
  return html`
    <li class="replica" data-model=${row.model} data-state=${word}>
      <div class="replica-head">
        <b class="name">${row.model}</b>
        <span class="badge ${word}">${word}</span>
        <span class="dim since">${ago(now - row.since)}</span>
      </div>
      ${serving && html`<${Slots} row=${row} />`}
      ${row.state === "LOADING" && html`<${Loading} row=${row} model=${model} now=${now} />`}
      ${row.state === "DRAINING" && html`<p class="why">${draining(row, model)}${why(state, row)}</p>`}
      ${row.state === "UNLOADING" && html`<p class="why">its process ends${why(state, row)}</p>`}
    </li>`;
}

function draining(row, model) {
  const usual = model.drain_s ? `, which usually takes ${span(model.drain_s)} at most` : "";
  return row.leases ? `${plural(row.leases, "stream")} to end${usual}` : "no stream is left";
}

function why(state, row) {
  const { left } = state.models[row.model] ?? {};
  if (left && left.record === row.record) return `. ${capital(whyLeft(left))}`;
  const waiting = Object.values(state.models).find((model) => victimsOf(state, model).includes(row));
  return waiting ? `. Its room is for ${waiting.name}` : "";
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function Loading({ row, model, now }) {
  const told = typeof row.progress === "number";
  const guess = model.load_s ? Math.min(0.95, Math.max(0, now - row.since) / model.load_s) : null;
  const far = told ? `${Math.round(row.progress * 100)} %` : "loading";
  const usual = model.load_s ? `usually ${span(model.load_s)}` : "for the first time";
  return html`
    <progress max="1" value=${told ? row.progress : guess} aria-label=${`load of ${row.model}`}></progress>
    <p class="why">${far} · ${span(Math.max(0, now - row.since))}, ${usual}</p>`;
}

// Slots as boxes, as long as one can count them; else as a bar.
function Slots({ row }) {
  const few = row.slots <= 32;
  const boxes = Array.from({ length: few ? row.slots : 0 }, (_, index) => index < row.used);
  return html`
    <div class="slots">
      ${
        few
          ? html`<span class="boxes" aria-hidden="true">
              ${boxes.map((used) => html`<i class=${used ? "used" : ""}></i>`)}
            </span>`
          : html`<${Meter} value=${row.used} of=${row.slots} label=${`slots of ${row.model}`} />`
      }
      <span class="dim">${row.used} of ${plural(row.slots, "slot")}</span>
    </div>`;
}

function Meter({ value, of, label }) {
  return html`<meter min="0" max=${of} value=${value} aria-label=${label}></meter>`;
}

function Server({ row }) {
  const models = plural(row.available_models.length, "model");
  const word = row.is_up ? (row.active_requests ? "busy" : "idle") : "down";
  return html`
    <div class="lane" data-lane=${row.url}>
      <div class="lane-name"><b>Server</b> <span class="dim">${row.url.replace(/^https?:\/\//, "")}</span></div>
      <ul class="residents">
        <li class="replica" data-state=${word}>
          <div class="replica-head">
            <b class="name">${row.current_model ?? "no model"}</b> <span class="badge ${word}">${word}</span>
          </div>
          <div class="slots">
            <${Meter} value=${row.active_requests} of=${row.max_concurrent} label=${`requests of ${row.url}`} />
            <span class="dim">${row.active_requests} of ${plural(row.max_concurrent, "slot")}, ${models}</span>
          </div>
          ${row.last_refresh_error && html`<p class="why bad">${row.last_refresh_error}</p>`}
        </li>
      </ul>
    </div>`;
}
