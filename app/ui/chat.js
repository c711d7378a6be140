// A chat to try a model with. Nothing of it is kept when the page is left.

import { call, checked } from "./api.js";
import { parsed } from "./events.js";
import { Component, createRef, html } from "./html.js";
import { span } from "./words.js";

export class Chat extends Component {
  state = { turns: [], text: "", status: "", error: "", control: null };
  input = createRef();
  end = createRef();

  componentDidUpdate(before) {
    if (this.props.tries !== before.tries) this.input.current.focus();
    const turns = this.end.current;
    if (this.state.control && turns) turns.scrollTop = turns.scrollHeight;
  }

  async send() {
    const text = this.state.text.trim();
    const model = this.props.model;
    if (!text || !model || this.state.control) return;
    const control = new AbortController();
    const said = [...this.state.turns.filter((turn) => turn.text), { role: "user", text }];
    this.answer = { role: "assistant", model, text: "", thoughts: "", facts: "" };
    this.setState({ turns: [...said, this.answer], text: "", status: "asked", error: "", control });
    try {
      const messages = said.map((turn) => ({ role: turn.role, content: turn.text }));
      const body = { model, messages, stream: true, stream_options: { include_usage: true } };
      const asked = performance.now();
      const answer = await checked(await call("v1/chat/completions", { method: "POST", body, signal: control.signal }));
      for await (const event of parsed(answer.body)) this.take(event, asked);
      this.setState({ status: "" });
    } catch (error) {
      const stopped = control.signal.aborted;
      this.setState({ status: stopped ? "stopped" : "", error: stopped ? "" : error.message });
    }
    this.setState({ control: null });
    this.input.current?.focus();
  }

  take(event, asked) {
    if (event.kind === "comment") {
      this.setState({ status: event.data.replace("model=", "") });
      return;
    }
    if (event.data === "[DONE]") return;
    const chunk = JSON.parse(event.data);
    if (chunk.error) throw new Error(chunk.error.message);
    const delta = chunk.choices?.[0]?.delta ?? {};
    const { answer } = this;
    if (delta.content && !answer.text) answer.facts = `first token after ${span((performance.now() - asked) / 1000)}`;
    answer.text += delta.content ?? "";
    answer.thoughts += delta.reasoning_content ?? "";
    const tokens = chunk.usage?.completion_tokens;
    const rate = chunk.metrics?.engine_tokens_per_second;
    if (tokens) answer.facts += `, ${tokens} tokens${rate ? `, ${rate.toFixed(1)} tokens/s` : ""}`;
    this.setState({ status: delta.content || delta.reasoning_content ? "answering" : this.state.status });
  }

  keyed(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send();
    }
  }

  render({ models, model, choose }, { turns, text, status, error, control }) {
    return html`
      <section aria-labelledby="h-chat" class="chat" id="chat">
        <h2 id="h-chat">Try a model</h2>
        <div class="tools">
          <label>Model <select value=${model} onChange=${(event) => choose(event.target.value)}>
            ${models.map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
          </select></label>
          <button disabled=${!turns.length || control}
            onClick=${() => this.setState({ turns: [], status: "", error: "" })}>Clear</button>
        </div>
        <ol class="turns scroll" tabindex="0" aria-label="Conversation" ref=${this.end}>
          ${!turns.length && html`<li class="empty">What you ask here goes through the pool like any request.</li>`}
          ${turns.map(
            (turn, index) => html`
            <li key=${index} class=${turn.role}>
              <b>${turn.role === "user" ? "You" : turn.model}</b>
              ${turn.thoughts && html`<details><summary>Thoughts</summary>${turn.thoughts}</details>`}
              <p>${turn.text}</p>
              ${turn.facts && html`<small class="dim">${turn.facts}</small>`}
            </li>`,
          )}
        </ol>
        <p role="status" class=${error ? "said bad" : "said"}>${error || status}</p>
        <div class="ask">
          <textarea ref=${this.input} rows="2" aria-label="Message" placeholder="Message; Enter sends" value=${text}
            onInput=${(event) => this.setState({ text: event.target.value })}
            onKeyDown=${(event) => this.keyed(event)}></textarea>
          ${
            control
              ? html`<button onClick=${() => control.abort()}>Stop</button>`
              : html`<button class="primary" disabled=${!text.trim() || !model}
                  onClick=${() => this.send()}>Send</button>`
          }
        </div>
      </section>`;
  }
}
