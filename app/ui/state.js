// What the page knows, made from a snapshot and the changes behind it. No DOM here, and nothing is asked for.
//
// All times are seconds since 1970 by the pool's clock. A change that tells of nothing known is kept in the log only.

const REQUESTS_KEPT = 200;
const POINTS_KEPT = 3000;
const LOG_KEPT = 500;
const SAMPLES_KEPT = 600;
const SERVING = new Set(["READY", "DRAINING"]);

export const CLASSES = ["high", "medium", "low"];
export const IN_THE_WAY = new Set(["DRAINING", "UNLOADING", "STOPPING"]);

export function begin() {
  return {
    connection: "connecting",
    refusal: null,
    epoch: "",
    version: 0,
    offset: 0, // from the ledger's clock to the time of day
    skew: 0, // of this machine's clock to the pool's
    recovering: false,
    nodes: [],
    gpuCount: 0,
    gpus: [], // what the drivers say, by `gpu-memory`
    models: {},
    replicas: {}, // by record
    servers: {},
    requests: [], // newest first
    points: [], // requests for the charts, oldest first
    sums: [], // of those that were not told one by one
    samples: [], // {time, running, waiting}, oldest first
    log: [], // changes, newest first
    evictors: {}, // replica -> the model that gets its room
  };
}

export const poolNow = (state) => Date.now() / 1000 - state.skew;

// Takes one event in. Returns whether the models in memory have changed.
export function take(state, kind, data) {
  if (kind === "snapshot") return takeSnapshot(state, data);
  if (kind === "reset") {
    const text = "The page was away for too long, or the scheduler began anew.";
    note(state, { kind, time: poolNow(state), model: null, replica: null, data, text });
    return false;
  }
  state.version = data.version;
  if (kind === "replica") data.by = gainer(state, data);
  TAKERS[kind]?.(state, data, data.data);
  if (isTold(data)) note(state, data);
  return kind === "replica";
}

// Whether a change is an event for people, and not only a count that moved or what another change says already.
function isTold({ kind, data }) {
  if (kind === "model") return data.removed || data.state === "failed";
  return !["lease", "queue", "load"].includes(kind);
}

function takeSnapshot(state, seen) {
  const known = state.epoch === seen.epoch ? state.version : 0;
  state.skew = Date.now() / 1000 - seen.time;
  state.offset = seen.time - seen.now;
  state.epoch = seen.epoch;
  state.recovering = seen.recovering;
  state.nodes = seen.nodes;
  state.gpuCount = seen.gpus;
  state.models = {};
  for (const [name, row] of Object.entries(seen.models)) {
    state.models[name] = {
      name,
      ...row,
      last_arrival: wall(state, row.last_arrival),
      since_by_class: row.since_by_class.map((since) => wall(state, since)),
      bound_at: wall(state, row.bound_at),
      left: null,
    };
  }
  state.replicas = {};
  for (const row of seen.replicas) {
    state.replicas[row.record] = { ...row, since: wall(state, row.since) };
  }
  state.servers = Object.fromEntries(seen.servers.map((row) => [row.url, row]));
  for (const change of seen.recent) {
    if (change.kind === "replica") {
      change.by = gainer(state, change);
      remember(state, change, change.data);
    }
    if (change.kind === "swap") expect(state, change);
    if (change.version <= known) continue;
    if (change.kind === "request") ended(state, change, change.data);
    note(state, change);
  }
  state.version = Math.max(known, ...seen.recent.map((change) => change.version));
  return true;
}

const wall = (state, time) => (time === null ? null : time + state.offset);

const TAKERS = {
  replica(state, change, data) {
    remember(state, change, data);
    if (data.to === "COLD") {
      delete state.replicas[data.record];
      return;
    }
    const row = (state.replicas[data.record] ??= { record: data.record, slots: 0, leases: 0, used: 0 });
    Object.assign(row, {
      model: change.model,
      replica: change.replica,
      state: data.to,
      node: data.node,
      devices: data.to === "ASLEEP" ? [] : data.devices,
    });
    if (data.from !== data.to) Object.assign(row, { since: change.time, progress: null });
    if (!SERVING.has(data.to)) row.leases = row.used = 0;
  },
  model(state, change, data) {
    const { removed, ...row } = data;
    if (removed) delete state.models[change.model];
    else Object.assign(modelOf(state, change.model), row);
  },
  queue(state, change, data) {
    const model = modelOf(state, change.model);
    model.queued = data.queued;
    model.queued_by_class = data.by_class;
    model.since_by_class = data.since_by_class.map((since) => wall(state, since));
    model.bound_at = wall(state, data.bound_at);
  },
  lease(state, change, data) {
    const model = modelOf(state, change.model);
    if (data.leases > model.leases) model.last_arrival = change.time;
    model.leases = data.leases;
    model.drain_s = data.drain_s;
    for (const { record, ...use } of data.replicas) {
      if (state.replicas[record]) Object.assign(state.replicas[record], use);
    }
  },
  load(state, change, data) {
    const row = byProcess(state, change.replica);
    if (row) row.progress = data.progress;
  },
  swap(state, change, data) {
    expect(state, change);
    modelOf(state, change.model).swap = { victims: data.victims };
  },
  request: ended,
  requests(state, change, data) {
    state.sums.push({ time: change.time, ...data });
    if (state.sums.length > SAMPLES_KEPT) state.sums.shift();
  },
  server(state, change, data) {
    if (data.removed) delete state.servers[data.url];
    else state.servers[data.url] = data;
  },
};

function modelOf(state, name) {
  return (state.models[name] ??= {
    name,
    state: "unloaded",
    remote: false,
    queued: 0,
    queued_by_class: [0, 0, 0],
    since_by_class: [null, null, null],
    bound_at: null,
    leases: 0,
    ready: 0,
    last_arrival: null,
    last_error: null,
    load_s: null,
    drain_s: null,
    memory_mib: null,
    memory_estimated_mib: null,
    pinned: false,
    swap: null,
    left: null,
  });
}

export const byProcess = (state, uid) => Object.values(state.replicas).find((row) => uid && row.replica === uid);

// Why a model's replica had to go, and for whom.
function remember(state, change, data) {
  const model = state.models[change.model];
  if (!model) return;
  if (data.to === "READY") model.left = null;
  if (!data.reason || !IN_THE_WAY.has(data.to)) return;
  if (model.left && model.left.record === data.record && data.to !== "DRAINING") return;
  model.left = {
    record: data.record,
    time: change.time,
    why: change.why,
    by: change.by,
  };
}

// For whom replicas will have to go: a swap is told before the first of them drains.
function expect(state, change) {
  for (const victim of change.data.victims) state.evictors[victim] = change.model;
  const uids = Object.keys(state.evictors);
  if (uids.length > LOG_KEPT) delete state.evictors[uids[0]];
}

// The model that gets the room of a replica that moves, if that is why it moves.
const gainer = (state, { replica, data }) => (data.because?.victims.length ? (state.evictors[replica] ?? null) : null);

function ended(state, change, data) {
  const row = { ...data, model: change.model, time: change.time };
  state.requests.unshift(row);
  state.points.push(row);
  if (state.requests.length > REQUESTS_KEPT) state.requests.pop();
  if (state.points.length > POINTS_KEPT) state.points.shift();
}

function note(state, change) {
  state.log.unshift({ ...change, id: `${state.epoch}-${change.version ?? change.time}` });
  if (state.log.length > LOG_KEPT) state.log.pop();
}

// The replicas that a model still waits for: victims that have not gone yet.
export function victimsOf(state, model) {
  const rows = (model.swap?.victims ?? []).map((uid) => byProcess(state, uid));
  return rows.filter((row) => row && IN_THE_WAY.has(row.state) && row.model !== model.name);
}

// Once a second: how many run and wait, for the chart.
export function sample(state) {
  const models = Object.values(state.models);
  const [running, waiting] = ["leases", "queued"].map((name) => models.reduce((sum, row) => sum + row[name], 0));
  state.samples.push({ time: poolNow(state), running, waiting });
  if (state.samples.length > SAMPLES_KEPT) state.samples.shift();
}

// A request's time in its four parts, in seconds; null where a part is not known.
export function phases(row) {
  const queue = row.queue_wait_s;
  const load = row.load_wait_s;
  if (row.total_s === null) return { queue, load, prefill: null, decode: null };
  const waited = (queue ?? 0) + (load ?? 0);
  if (row.ttft_s === null) return { queue, load, prefill: null, decode: Math.max(0, row.total_s - waited) };
  return {
    queue,
    load,
    prefill: Math.max(0, row.ttft_s - waited),
    decode: Math.max(0, row.total_s - Math.max(row.ttft_s, waited)),
  };
}

// Output tokens per second over the last ten seconds, as far as requests have ended.
export const tokenRate = (state, now) => tokenRates(state, now, 10, 1)[0];

// Output tokens per second in `count` steps of `step` seconds up to `end`. A request's tokens are known at its end, and
// are spread over the time in which they came.
export function tokenRates(state, end, step, count) {
  const rates = new Array(count).fill(0);
  const begin = end - step * count;
  const spread = (tokens, from, to) => {
    const lasted = Math.max(to - from, 0.001);
    for (let index = Math.max(0, Math.floor((from - begin) / step)); index < count; index++) {
      const left = begin + index * step;
      if (left >= to) break;
      const shared = Math.min(to, left + step) - Math.max(from, left);
      if (shared > 0) rates[index] += (tokens * shared) / lasted / step;
    }
  };
  for (const row of state.points) {
    if (row.output_tokens) spread(row.output_tokens, row.time - (phases(row).decode ?? 0), row.time);
  }
  for (const sum of state.sums) spread(sum.output_tokens, sum.time - 0.5, sum.time);
  return rates;
}
