// The one place that knows the view library: preact's elements, written as htm's templates.

import htm from "./vendor/htm.mjs";
import { Component, createRef, h, render } from "./vendor/preact.mjs";

export const html = htm.bind(h);
export { Component, createRef, render };
