// The last minutes as curves: tokens per second, time to the first token, waits, and how many run and wait.

import { Component, createRef, html } from "./html.js";
import { poolNow, tokenRate, tokenRates } from "./state.js";
import { span } from "./words.js";
import uPlot from "./vendor/uPlot.esm.js";

const SHOWN_S = 300;
const STEP_S = 2;
const STEPS = SHOWN_S / STEP_S;

const dark = matchMedia("(prefers-color-scheme: dark)");

// `least` is what the axis shows at least.
const CHARTS = [
  {
    id: "tokens",
    least: 1,
    title: "Output tokens per second",
    series: [{ name: "tokens/s", ink: "--ink-1", fill: true }],
    data: tokens,
    said: (value) => String(value < 10 ? Math.round(value * 10) / 10 : Math.round(value)),
  },
  {
    id: "running",
    least: 4,
    title: "Requests",
    series: [
      { name: "running", ink: "--ink-1" },
      { name: "waiting", ink: "--ink-2" },
    ],
    data: running,
    said: String,
  },
  {
    id: "ttft",
    least: 0.1,
    title: "Time to the first token",
    series: [{ name: "TTFT", ink: "--ink-3", dots: true }],
    data: (state, now) => dots(state, now, ["ttft_s"]),
    said: span,
  },
  {
    id: "waits",
    least: 0.1,
    title: "Waits",
    series: [
      { name: "queue", ink: "--ink-2", dots: true },
      { name: "load", ink: "--ink-4", dots: true },
    ],
    data: (state, now) => dots(state, now, ["queue_wait_s", "load_wait_s"]),
    said: span,
  },
];

function tokens(state, now) {
  const end = Math.floor(now / STEP_S) * STEP_S;
  const times = Array.from({ length: STEPS }, (_, index) => end - SHOWN_S + (index + 0.5) * STEP_S);
  return [times, tokenRates(state, end, STEP_S, STEPS)];
}

function running(state, now) {
  const shown = state.samples.filter((row) => row.time >= now - SHOWN_S);
  return [shown.map((row) => row.time), shown.map((row) => row.running), shown.map((row) => row.waiting)];
}

// A dot per request, at its end.
function dots(state, now, names) {
  const shown = state.points.filter((row) => row.time >= now - SHOWN_S && names.some((name) => row[name] !== null));
  return [shown.map((row) => row.time), ...names.map((name) => shown.map((row) => row[name]))];
}

export function Charts({ state, now }) {
  return html`
    <section aria-labelledby="h-charts" class="charts">
      <h2 id="h-charts">Last five minutes</h2>
      <div class="grid">
        ${CHARTS.map((chart) => html`<${Chart} key=${chart.id} chart=${chart} state=${state} now=${now} />`)}
      </div>
      <p class="dim">A request's tokens are counted when it has ended, over the time in which they came.</p>
    </section>`;
}

class Chart extends Component {
  plotted = createRef();

  componentDidMount() {
    this.box = this.plotted.current;
    this.draw();
    this.sized = new ResizeObserver(() => {
      const { width, height } = this.size();
      if (width !== this.plot.width) this.plot.setSize({ width, height });
    });
    this.sized.observe(this.box);
    this.painted = () => {
      this.plot.destroy();
      this.draw();
    };
    dark.addEventListener("change", this.painted);
  }

  componentDidUpdate() {
    this.plot.setData(this.data(), false);
    this.scale();
  }

  componentWillUnmount() {
    dark.removeEventListener("change", this.painted);
    this.sized.disconnect();
    this.plot.destroy();
  }

  data() {
    return this.props.chart.data(this.props.state, this.props.now);
  }

  size() {
    return { width: Math.max(120, Math.floor(this.box.clientWidth)), height: 130 };
  }

  scale() {
    const { state } = this.props;
    const now = poolNow(state);
    this.plot.batch(() => {
      this.plot.setScale("x", { min: now - SHOWN_S, max: now });
      const tops = this.plot.data.slice(1).map((values) => values.reduce((top, value) => Math.max(top, value ?? 0), 0));
      this.plot.setScale("y", { min: 0, max: Math.max(...tops, this.props.chart.least) * 1.15 });
    });
  }

  draw() {
    const style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(name).trim();
    const { chart } = this.props;
    const axis = {
      stroke: ink("--dim"),
      grid: { stroke: ink("--line"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui",
    };
    const series = chart.series.map((each) => ({
      label: each.name,
      stroke: ink(each.ink),
      fill: each.fill ? `${ink(each.ink)}33` : undefined,
      width: 1.5,
      paths: each.dots ? () => null : undefined,
      points: { show: Boolean(each.dots), size: 5, fill: ink(each.ink) },
    }));
    this.plot = new uPlot(
      {
        ...this.size(),
        legend: { show: false },
        cursor: { show: false },
        scales: { x: { time: true, auto: false }, y: { auto: false } },
        series: [{}, ...series],
        axes: [
          {
            ...axis,
            space: 70,
            size: 24,
            values: (_, ticks) => ticks.map((tick) => uPlot.fmtDate("{HH}:{mm}")(new Date(tick * 1000))),
            incrs: [60, 120],
          },
          {
            ...axis,
            space: 30,
            size: 52,
            values: (_, ticks) => ticks.map((tick) => (chart.said === span ? span(tick) : chart.said(tick))),
          },
        ],
      },
      this.data(),
      this.box,
    );
    this.scale();
  }

  render({ chart, state, now }) {
    const [, ...lines] = chart.data(state, now);
    const last = (values) => values.findLast((value) => value !== null && value !== undefined);
    const said = lines.map((values, index) => {
      const value = chart.id === "tokens" ? tokenRate(state, now) : last(values);
      return { ...chart.series[index], value: value === undefined ? "–" : chart.said(value) };
    });
    const words = said.map(({ name, value }) => `${name} ${value}`).join(", ");
    return html`
      <figure class="chart" data-chart=${chart.id}>
        <figcaption>${chart.title}<span>${said.map(
          ({ name, value, ink }) => html`
          <span class="key ${ink.slice(2)}">${name} <b>${value}</b></span>`,
        )}</span></figcaption>
        <div class="plot" ref=${this.plotted} role="img" aria-label=${`${chart.title}: ${words}`}></div>
      </figure>`;
  }
}
