// The pool's change log as lines, newest first.

import { Component, html } from "./html.js";
import { clock, gravity, said } from "./words.js";

const SHOWN = 200;

export class Log extends Component {
  state = { filter: "", requests: true };

  render({ state: pool }, { filter, requests }) {
    const wanted = filter.toLowerCase();
    const lines = pool.log
      .filter((change) => requests || !change.kind.startsWith("request"))
      .map((change) => ({ change, text: said(change.text), grave: gravity(change) }))
      .filter(({ text }) => text.toLowerCase().includes(wanted))
      .slice(0, SHOWN);
    return html`
      <section aria-labelledby="h-log" class="log">
        <h2 id="h-log">Log</h2>
        <div class="tools">
          <label>Only lines with <input type="search" value=${filter}
            onInput=${(event) => this.setState({ filter: event.target.value })} /></label>
          <label><input type="checkbox" checked=${requests}
            onChange=${(event) => this.setState({ requests: event.target.checked })} /> requests</label>
        </div>
        <ol class="scroll tall" tabindex="0" aria-label="What happened, newest first">
          ${lines.map(
            ({ change, text, grave }) => html`
            <li key=${change.id} class=${grave}><time>${clock(change.time)}</time> ${text}</li>`,
          )}
        </ol>
      </section>`;
  }
}
