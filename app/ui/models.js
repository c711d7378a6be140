// Who waits and why, and the models with what an operator can do to them.

import { load, pin, unload } from "./api.js";
import { Component, html } from "./html.js";
import { CLASSES } from "./state.js";
import { ago, said, size, span, whyLeft, whyWaits } from "./words.js";

export function Waiting({ state, now }) {
  const waiting = Object.values(state.models).filter((model) => model.queued);
  return html`
    <section aria-labelledby="h-waiting" class="waiting">
      <h2 id="h-waiting">Waiting</h2>
      ${
        !waiting.length
          ? html`<p class="empty">Nobody waits.</p>`
          : html`
        <div class="scroll" tabindex="0" role="group" aria-label="Requests that wait"><table>
          <thead><tr><th scope="col">Model</th><th scope="col">Class</th><th scope="col" class="num">Requests</th>
            <th scope="col" class="num">Longest</th><th scope="col">Why</th></tr></thead>
          <tbody>
            ${waiting.map((model) => html`<${Waiters} key=${model.name} state=${state} model=${model} now=${now} />`)}
          </tbody>
        </table></div>`
      }
    </section>`;
}

function Waiters({ state, model, now }) {
  const lines = CLASSES.map((name, index) => ({
    name,
    count: model.queued_by_class[index],
    since: model.since_by_class[index],
  }));
  const some = lines.filter((line) => line.count);
  return some.map(
    (line, index) => html`
    <tr data-waiting=${model.name}>
      ${index === 0 && html`<th scope="row" rowspan=${some.length}>${model.name}</th>`}
      <td><span class="class ${line.name}">${line.name}</span></td>
      <td class="num">${line.count}</td>
      <td class="num">${line.since === null ? "–" : span(Math.max(0, now - line.since))}</td>
      ${index === 0 && html`<td class="why" rowspan=${some.length}>${whyWaits(state, model, now)}</td>`}
    </tr>`,
  );
}

export class Models extends Component {
  state = { busy: {}, said: "", bad: false };

  // One call at a time for each model; what it ends with is said beneath the table.
  async act(model, words, call) {
    this.setState(({ busy }) => ({ busy: { ...busy, [model]: words }, said: `${model}: ${words} …`, bad: false }));
    let said = `${model}: ${words} done`;
    let bad = false;
    try {
      await call();
    } catch (error) {
      [said, bad] = [error.message, true];
    }
    this.setState(({ busy }) => ({ busy: { ...busy, [model]: undefined }, said, bad }));
  }

  render({ state: pool, now, tryModel }, { busy, said, bad }) {
    const models = Object.values(pool.models);
    return html`
      <section aria-labelledby="h-models" class="models">
        <h2 id="h-models">Models</h2>
        <div class="scroll" tabindex="0" role="group" aria-label="Models"><table>
          <thead><tr>
            <th scope="col">Model</th><th scope="col">State</th><th scope="col" class="num">Running</th>
            <th scope="col" class="num">Waiting</th><th scope="col" class="num">Memory</th>
            <th scope="col" class="num">Load</th>
            <th scope="col" class="num">Last use</th><th scope="col">Actions</th>
          </tr></thead>
          <tbody>${models.map(
            (model) => html`
            <${Model} key=${model.name} pool=${pool} model=${model} now=${now} busy=${busy[model.name]}
              act=${(words, call) => this.act(model.name, words, call)} tryModel=${tryModel} />`,
          )}</tbody>
        </table></div>
        <p role="status" class=${bad ? "said bad" : "said"}>${said}</p>
      </section>`;
  }
}

function stateOf(pool, model) {
  if (model.state !== "unloaded") return model.state;
  const sleeps = Object.values(pool.replicas).some((row) => row.model === model.name && row.state === "ASLEEP");
  return sleeps ? "asleep" : "unloaded";
}

function Model({ pool, model, now, busy, act, tryModel }) {
  const { name } = model;
  const word = stateOf(pool, model);
  const up = ["loaded", "unloading"].includes(word);
  return html`
    <tr data-model=${name}>
      <th scope="row">${name}${model.pinned && html` <span class="pin" title="never evicted">pinned</span>`}</th>
      <td class="standing">
        <span class="badge ${word}">${word}</span>
        ${model.last_error && word === "failed" && html`<p class="why bad">${model.last_error}</p>`}
        ${model.left && !up && html`<${Left} left=${model.left} now=${now} />`}
      </td>
      <td class="num" data-label="Running">${model.leases}</td>
      <td class="num" data-label="Waiting">${model.queued}</td>
      <td class="num" data-label="Memory">${memory(model)}</td>
      <td class="num" data-label="Load">${span(model.load_s)}</td>
      <td class="num" data-label="Last use">${model.last_arrival === null ? "–" : ago(now - model.last_arrival)}</td>
      <td class="actions">
        ${
          !model.remote &&
          html`
          ${
            up
              ? html`<button disabled=${busy} onClick=${() => act("unload", () => unload(name))}>Unload</button>`
              : html`<button disabled=${busy || word === "loading"}
                  onClick=${() => act("load", () => load(name))}>Load</button>`
          }
          <button disabled=${busy} aria-pressed=${String(Boolean(model.pinned))}
            onClick=${() => act(model.pinned ? "unpin" : "pin", () => pin(name, !model.pinned))}>Pin</button>`
        }
        <button onClick=${() => tryModel(name)}>Try</button>
        <span class="for-ear">${name}</span>
      </td>
    </tr>`;
}

function Left({ left, now }) {
  const how = `${left.by ? "evicted" : "unloaded"} ${ago(now - left.time)}`;
  return html`<p class="why" data-left title=${said(left.why)}>${how} ${whyLeft(left)}</p>`;
}

function memory(model) {
  if (model.memory_mib !== null) return html`${size(model.memory_mib)} <small class="dim">measured</small>`;
  if (model.memory_estimated_mib === null) return "–";
  return html`${size(model.memory_estimated_mib)} <small class="dim">estimated</small>`;
}
