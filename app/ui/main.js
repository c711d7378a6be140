// The page: follows the pool's events, keeps the state, and draws it, at most ten times a second.

import { devices, key } from "./api.js";
import { Chat } from "./chat.js";
import { Charts } from "./charts.js";
import { follow } from "./events.js";
import { Component, createRef, html, render } from "./html.js";
import { Lanes } from "./lanes.js";
import { Log } from "./log.js";
import { Models, Waiting } from "./models.js";
import { Requests } from "./requests.js";
import { begin, poolNow, sample, take, tokenRate } from "./state.js";

const DRAW_MS = 100;
const TICK_MS = 1000;
const DEVICES_PAUSE_MS = 3000;

const WORDS = { connecting: "connecting …", live: "live", lost: "reconnecting …", refused: "a key is needed" };

class Page extends Component {
  state = { tried: "", tries: 0, wantsKey: false };
  pool = begin();
  entered = () => {};

  componentDidMount() {
    follow({
      told: (kind, data) => this.told(kind, data),
      changed: (connection, refusal = null) => this.changed(connection, refusal),
      retry: () => new Promise((resolve) => (this.entered = resolve)),
    });
    setInterval(() => {
      if (this.pool.connection === "live" && this.pool.epoch) sample(this.pool);
      this.drawSoon();
    }, TICK_MS);
  }

  told(kind, data) {
    if (take(this.pool, kind, data)) this.askDevicesSoon();
    this.drawSoon();
  }

  changed(connection, refusal) {
    Object.assign(this.pool, { connection, refusal });
    this.drawSoon();
  }

  drawSoon() {
    this.drawing ??= setTimeout(() => {
      this.drawing = undefined;
      this.setState({});
    }, DRAW_MS);
  }

  // What the drivers say of the devices' memory changes with what is loaded; where there is none it is asked once.
  askDevicesSoon() {
    if (this.hasNoDevices) return;
    this.asking ??= setTimeout(async () => {
      this.asking = undefined;
      try {
        this.pool.gpus = (await devices()).gpus;
        this.hasNoDevices = !this.pool.gpus.length;
      } catch {
        // The scheduler is away: it is asked again after the next change.
      }
      this.drawSoon();
    }, DEVICES_PAUSE_MS);
  }

  enter(value) {
    key.set(value);
    this.setState({ wantsKey: false });
    this.entered();
  }

  render(_, { tried, tries, wantsKey }) {
    const { pool } = this;
    const now = poolNow(pool);
    const names = Object.keys(pool.models);
    const tryModel = (name) => this.setState({ tried: name, tries: tries + 1 });
    const asks = wantsKey || pool.connection === "refused";
    return html`
      <a class="skip" href="#main">Skip to the page</a>
      <${Head} pool=${pool} now=${now} askKey=${() => this.setState({ wantsKey: !wantsKey })} />
      <main id="main" tabindex="-1">
        ${asks && html`<${Key} refusal=${pool.refusal} enter=${(value) => this.enter(value)} />`}
        <div class="columns">
          <div>
            <${Lanes} state=${pool} now=${now} />
            <${Waiting} state=${pool} now=${now} />
            <${Models} state=${pool} now=${now} tryModel=${tryModel} />
            <${Charts} state=${pool} now=${now} />
            <${Requests} state=${pool} />
          </div>
          <div>
            <${Chat} models=${names} model=${tried || names[0] || ""} tries=${tries}
              choose=${(name) => this.setState({ tried: name })} />
            <${Log} state=${pool} />
          </div>
        </div>
      </main>`;
  }
}

function Head({ pool, now, askKey }) {
  const models = Object.values(pool.models);
  const sum = (name) => models.reduce((total, row) => total + row[name], 0);
  const rate = tokenRate(pool, now);
  const slots = Object.values(pool.replicas).filter((row) => ["READY", "DRAINING"].includes(row.state));
  const [used, all] = ["used", "slots"].map((name) => slots.reduce((total, row) => total + row[name], 0));
  const overdue = models.some((row) => row.bound_at !== null && row.bound_at < now);
  return html`
    <header>
      <h1><img src="icon.svg" alt="" width="22" height="22" /> Slotpool</h1>
      <p class="connection ${pool.connection}" role="status">${WORDS[pool.connection]}</p>
      <dl class="totals">
        <div><dt>slots in use</dt><dd data-total="slots">${used} of ${all}</dd></div>
        <div><dt>waiting</dt><dd data-total="waiting">${sum("queued")}</dd></div>
        <div><dt>tokens/s</dt><dd data-total="tokens">${rate.toFixed(rate < 10 ? 1 : 0)}</dd></div>
      </dl>
      ${overdue && html`<p class="badge warn" title="somebody waits longer than the bound of his class">overloaded</p>`}
      <button onClick=${askKey}>Key</button>
    </header>`;
}

class Key extends Component {
  input = createRef();

  componentDidMount() {
    this.input.current.focus();
  }

  render({ refusal, enter }) {
    const sent = (event) => {
      event.preventDefault();
      enter(this.input.current.value.trim());
    };
    return html`
      <form class="ask-key" onSubmit=${sent}>
        <label for="key">The pool's admin key (or an API key, where there are no admin keys)</label>
        <input id="key" type="password" autocomplete="off" ref=${this.input} />
        <button class="primary">Use it</button>
        <p class="dim">${refusal?.message ?? "It is kept until this tab is closed. An empty one is forgotten."}</p>
      </form>`;
  }
}

render(html`<${Page} />`, document.getElementById("app"));
