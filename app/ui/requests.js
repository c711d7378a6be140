// What has ended lately, with where its time went, and everything known of one request.

import { Component, createRef, html } from "./html.js";
import { CLASSES, phases } from "./state.js";
import { clock, plural, said, span } from "./words.js";

const PARTS = ["queue", "load", "prefill", "decode"];
const SHOWN = 50;

export class Requests extends Component {
  state = { open: null };

  render({ state: pool }, { open }) {
    const rows = pool.requests.slice(0, SHOWN);
    return html`
      <section aria-labelledby="h-requests" class="requests">
        <h2 id="h-requests">Recent requests</h2>
        <p class="legend">${PARTS.map((part) => html`<span class="key ${part}">${part}</span>`)}</p>
        ${
          !rows.length
            ? html`<p class="empty">No request has ended yet.</p>`
            : html`
          <div class="scroll tall" tabindex="0" role="group" aria-label="Recent requests"><table>
            <thead><tr><th scope="col">Ended</th><th scope="col">Model</th><th scope="col" class="wide">By</th>
              <th scope="col" class="wide">Class</th>
              <th scope="col" class="num">Status</th><th scope="col">Time</th>
              <th scope="col" class="num wide">Tokens</th></tr></thead>
            <tbody>
              ${rows.map((row) => html`<${Row} key=${row.id} row=${row} show=${() => this.setState({ open: row })} />`)}
            </tbody>
          </table></div>`
        }
        ${open && html`<${Detail} pool=${pool} row=${open} close=${() => this.setState({ open: null })} />`}
      </section>`;
  }
}

function Row({ row, show }) {
  const ended = clock(row.time);
  return html`
    <tr data-request=${row.id}>
      <td><button class="link" aria-label=${`details of the request that ended at ${ended}`}
        onClick=${show}>${ended}</button></td>
      <td>${row.model}</td>
      <td class="wide">${row.principal}</td>
      <td class="wide"><span class="class ${CLASSES[row.priority - 1]}">${CLASSES[row.priority - 1]}</span></td>
      <td class="num ${row.status < 400 ? "" : "bad"}">${row.status}</td>
      <td><${Timing} row=${row} /></td>
      <td class="num wide">${row.output_tokens ?? "–"}</td>
    </tr>`;
}

// The four parts as one bar: an SVG, since the page's policy allows no styles in markup.
function Timing({ row }) {
  const split = phases(row);
  const whole = PARTS.reduce((sum, part) => sum + (split[part] ?? 0), 0);
  let at = 0;
  const bars =
    whole === 0
      ? []
      : PARTS.map((part) => {
          const width = (100 * (split[part] ?? 0)) / whole;
          at += width;
          return html`<rect key=${part} class=${part} x=${at - width} y="0" width=${width} height="10" />`;
        });
  const told = PARTS.filter((part) => split[part])
    .map((part) => `${part} ${span(split[part])}`)
    .join(" · ");
  return html`<span class="timing" title=${told}>
    <svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">${bars}</svg>
    <span>${span(row.total_s)}</span><span class="for-ear">${told}</span></span>`;
}

class Detail extends Component {
  dialog = createRef();

  componentDidMount() {
    this.dialog.current.showModal();
  }

  render({ pool, row, close }) {
    const split = phases(row);
    const rate =
      row.output_tokens > 1 && split.decode ? `${((row.output_tokens - 1) / split.decode).toFixed(1)} tokens/s` : "–";
    const facts = [
      ["Ended", new Date(row.time * 1000).toLocaleString()],
      ["Model", row.model],
      ["Family", row.family],
      ["By", row.principal],
      ["Class", CLASSES[row.priority - 1]],
      ["Status", row.status === 499 ? "499, the client left" : row.status],
      ...PARTS.map((part) => [part, span(split[part])]),
      ["first token after", span(row.ttft_s)],
      ["whole", span(row.total_s)],
      [
        "prompt",
        row.prompt_tokens === null
          ? "–"
          : `${plural(row.prompt_tokens, "token")}, ${row.cached_tokens ?? 0} of them cached`,
      ],
      ["answer", row.output_tokens === null ? "–" : plural(row.output_tokens, "token")],
      ["decode rate", rate],
      ["X-Request-Id", row.trace || "–"],
      ["id", row.id],
    ];
    const about = pool.log.filter((change) => change.data.because?.waiter === row.id);
    return html`
      <dialog class="detail" ref=${this.dialog} aria-labelledby="h-detail" onClose=${close}>
        <h2 id="h-detail">Request</h2>
        <dl>${facts.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>
        ${
          about.length > 0 &&
          html`<h3>What was done for it</h3>
          <ul>${about.map((change) => html`<li>${clock(change.time)} ${said(change.text)}</li>`)}</ul>`
        }
        <p class="dim">Prompts and answers are not kept.</p>
        <button autofocus onClick=${() => this.dialog.current.close()}>Close</button>
      </dialog>`;
  }
}
