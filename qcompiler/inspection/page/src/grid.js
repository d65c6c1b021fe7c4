'use strict';

const METRICS = {
  scheme: {label: 'Scheme'},
  error: {label: 'Weight error', words: 'how far weights are from what they were: ‖W − Q‖² / ‖W‖²; smaller is better'},
  output_error: {label: 'Output error', words: 'how far outputs are from what they were, on the calibration data: ‖(W − Q) X‖² / ‖W X‖²; smaller is better'},
  bits_per_weight: {label: 'Bits per weight', words: 'bits per weight, scales and zero points included'},
};
const STEPS = 5;

/** Layers down, projections across. One cell is all the weights of that projection in that row's layers. */
class Grid {
  constructor(model, table, {onOpen}) {
    this.model = model;
    this.table = table;
    this.onOpen = onOpen;
    this.metric = 'scheme';
    this.hits = null;
    this.layers = this.byLayer();
    this.columns = [...new Set(this.layers.flatMap((layer) => [...layer.cells.keys()]))];
    this.outside = model.weighted.filter((node) => model.get(node, 'layer') === null);
    this.folded = this.layers.length > 64;
    table.addEventListener('click', (event) => this.clicked(event));
    table.addEventListener('keydown', (event) => this.moved(event));
  }

  byLayer() {
    const layers = new Map();
    for (const node of this.model.weighted) {
      const number = this.model.get(node, 'layer');
      if (number === null) continue;
      const layer = layers.get(number) ?? {number, cells: new Map()};
      layers.set(number, layer);
      const column = this.model.get(node, 'column');
      if (!layer.cells.has(column)) layer.cells.set(column, []);
      layer.cells.get(column).push(node);
    }
    return [...layers.values()].sort((a, b) => a.number - b.number);
  }

  /** The metrics that some weight has a value of. */
  metrics() {
    return Object.keys(METRICS).filter(
      (name) => name === 'scheme' || this.model.weighted.some((node) => this.model.get(node, name) !== null),
    );
  }

  /** Rows: a layer each or, folded, all layers whose weights are decided alike. */
  rows() {
    const rows = new Map();
    for (const layer of this.layers) {
      const kind = this.folded ? this.kindOf(layer) : layer.number;
      const row = rows.get(kind) ?? {layers: [], cells: new Map()};
      rows.set(kind, row);
      row.layers.push(layer.number);
      for (const [column, nodes] of layer.cells) row.cells.set(column, [...(row.cells.get(column) ?? []), ...nodes]);
    }
    return [...rows.values()].map((row) => ({...row, label: spans(row.layers)}));
  }

  kindOf(layer) {
    return this.columns
      .map((column) => (layer.cells.get(column) ?? []).map((node) => this.model.get(node, 'alike')))
      .join('|');
  }

  draw() {
    this.scale = this.metric === 'scheme' ? null : new Scale(this.model, this.metric);
    const rows = this.rows();
    const head = h('tr', {}, h('th', {scope: 'col', class: 'corner'}, 'layer'), ...this.columns.map(heading));
    const body = h('tbody');
    for (const row of rows) {
      const cells = this.columns.map((column) => this.cell(row.label, column, row.cells.get(column) ?? []));
      body.append(h('tr', {}, h('th', {scope: 'row', title: row.label}, row.label), ...cells));
    }
    for (const node of this.outside) {
      const cell = this.cell('outside the layers', this.model.label(node), [node]);
      body.append(
        h(
          'tr',
          {class: 'outside'},
          h('th', {scope: 'row', title: this.model.label(node)}, this.model.label(node)),
          cell,
        ),
      );
    }
    this.table.style.setProperty('--columns', this.columns.length);
    this.table.replaceChildren(h('thead', {}, head), body);
    this.table.setAttribute('aria-rowcount', rows.length + this.outside.length + 1);
    this.cells = [...body.querySelectorAll('td')];
    this.cells.find((cell) => cell.nodes.length)?.setAttribute('tabindex', '0');
    this.mark(this.hits);
  }

  cell(row, column, nodes) {
    if (!nodes.length) return Object.assign(h('td', {class: 'empty', tabindex: '-1', 'aria-label': 'none'}), {nodes});
    const shown = this.scale ? this.scale.show(nodes) : this.schemeOf(nodes);
    const experts = this.model.get(nodes[0], 'experts');
    const several = nodes.length > 1 ? `, ${counted(nodes.length, experts ? 'block' : 'weight')}` : '';
    const count = several + (experts ? `, ${counted(experts.count, 'expert')}${several && ' each'}` : '');
    const label = `${row === 'outside the layers' ? '' : `layer ${row}, `}${column}: ${shown.long ?? shown.text}${count}`;
    const cell = h(
      'td',
      {class: shown.style, tabindex: '-1', 'aria-label': label, title: label},
      h('span', {}, shown.text),
    );
    return Object.assign(cell, {nodes, row, column});
  }

  schemeOf(nodes) {
    const counts = new Map();
    for (const node of nodes) counts.set(this.model.scheme(node), (counts.get(this.model.scheme(node)) ?? 0) + 1);
    if (counts.size === 1) {
      const [name] = counts.keys();
      return {text: name, style: this.model.schemes.get(name).style};
    }
    const parts = [...counts].sort((a, b) => b[1] - a[1]);
    const long = parts.map(([name, count]) => `${name} ×${count}`).join(', ');
    return {text: `${parts.length} schemes`, long, style: 'mixed'};
  }

  legend() {
    if (this.scale) return this.scale.legend();
    return [...this.model.schemes.values()].map((entry) => ({
      style: entry.style,
      text: entry.name,
      more: `${counted(entry.nodes, 'weight')}, ${human(entry.bytes)}`,
      query: `scheme:"${entry.name}"`,
    }));
  }

  /** Show which cells hold a hit; null: nothing is searched for. */
  mark(hits) {
    this.hits = hits;
    this.table.classList.toggle('searching', hits !== null);
    for (const cell of this.cells)
      cell.classList.toggle('hit', hits !== null && cell.nodes.some((node) => hits.has(node)));
  }

  select(node) {
    for (const cell of this.cells) {
      const chosen = node !== null && cell.nodes.includes(node);
      cell.toggleAttribute('aria-selected', false);
      if (chosen) cell.setAttribute('aria-selected', 'true');
    }
  }

  clicked(event) {
    const cell = event.target.closest('td');
    if (!cell?.nodes.length) return;
    this.focus(cell);
    this.onOpen(cell);
  }

  moved(event) {
    const cell = event.target.closest('td');
    if (!cell || event.altKey || event.metaKey) return;
    const row = cell.parentElement;
    const rows = [...row.parentElement.children];
    const [down, across] = [rows.indexOf(row), cell.cellIndex - 1];
    const last = rows.length - 1;
    const page = 10;
    const to = {
      ArrowUp: [down - 1, across],
      ArrowDown: [down + 1, across],
      ArrowLeft: [down, across - 1],
      ArrowRight: [down, across + 1],
      PageUp: [Math.max(0, down - page), across],
      PageDown: [Math.min(last, down + page), across],
      Home: [event.ctrlKey ? 0 : down, 0],
      End: [event.ctrlKey ? last : down, Infinity],
    }[event.key];
    if (to) {
      const target = rows[to[0]]?.querySelectorAll('td');
      if (target && to[1] >= 0) this.focus(target[Math.min(to[1], target.length - 1)]);
    } else if ((event.key === 'Enter' || event.key === ' ') && cell.nodes.length) {
      this.onOpen(cell, {byKey: true});
    } else {
      return;
    }
    event.preventDefault();
  }

  focus(cell) {
    for (const other of this.cells) other.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus({preventScroll: false});
  }
}

/** Values in equal steps of their logarithm, or of themselves where they are bits. */
class Scale {
  constructor(model, metric) {
    this.model = model;
    this.metric = metric;
    const values = model.weighted.map((node) => model.get(node, metric)).filter((value) => value > 0);
    this.curve = metric === 'bits_per_weight' ? (value) => value : Math.log10;
    this.inverse = metric === 'bits_per_weight' ? (value) => value : (value) => 10 ** value;
    this.low = this.curve(values.reduce((a, b) => Math.min(a, b), Infinity));
    this.high = this.curve(values.reduce((a, b) => Math.max(a, b), 0));
  }

  step(value) {
    if (!(value > 0) || this.high === this.low) return 0;
    return Math.min(STEPS - 1, Math.floor(((this.curve(value) - this.low) / (this.high - this.low)) * STEPS));
  }

  show(nodes) {
    const values = nodes.map((node) => this.model.get(node, this.metric)).filter((value) => value !== null);
    if (!values.length) return {text: '–', long: 'not known', style: 'plain'};
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    const most = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const long = values.length > 1 ? `mean ${this.write(mean)}, most ${this.write(most)}` : this.write(mean);
    return {text: this.write(mean), long, style: `step-${this.step(mean)}`};
  }

  write(value) {
    return this.metric === 'bits_per_weight' ? value.toFixed(2) : value.toExponential(2);
  }

  legend() {
    const steps = this.high === this.low ? 1 : STEPS;
    const bound = (step) => this.write(this.inverse(this.low + ((this.high - this.low) * step) / STEPS));
    return Array.from({length: steps}, (_, step) => ({
      style: `step-${step}`,
      text: steps === 1 ? bound(0) : `${bound(step)} to ${bound(step + 1)}`,
    }));
  }
}

function heading(column) {
  return h(
    'th',
    {scope: 'col', title: column},
    h('span', {}, column.replace(/^.*\.(?=[^.*]+(\.\*)*$)/, '')),
    h('small', {}, column.replace(/\.?[^.]+$/, '')),
  );
}

/** `0–3, 5` of ascending numbers. */
function spans(numbers) {
  const runs = [];
  for (const number of numbers) {
    if (runs.at(-1)?.[1] === number - 1) runs.at(-1)[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([first, last]) => (first === last ? String(first) : `${first}–${last}`)).join(', ');
}
