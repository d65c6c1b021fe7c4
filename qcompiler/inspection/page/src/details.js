'use strict';

const NUMBERS = new Set(['error', 'output_error', 'nearest_output_error', 'damping', 'transform_gain', 'bits_per_weight']);
const SECTIONS = [
  ['Why', ['because', 'candidates', 'verdict']],
  ['What', ['kind', 'class_name', 'structure', 'layer', 'partition', 'weight_shape', 'shape', 'parameters', 'op', 'arguments']],
  ['Scheme', ['scheme', 'format', 'algorithm', 'run', 'observes', 'observers']],
  ['Size', ['bytes', 'dense_bytes', 'bits_per_weight']],
  ['Error', ['error', 'output_error', 'nearest_output_error', 'transform_gain', 'damping', 'ratio', 'dead_columns', 'seconds']],
];
const HIDDEN = new Set(['name', 'path', 'short', 'column', 'alike', 'weighted', 'inputs', 'scheme_name', 'solver', 'transform', 'decided', 'module']);
const FIRST = 100;

/** What `explain` says of a node, or what the weights of one cell have in common. */
class Details {
  constructor(model, panel, {onOpen, onBlock}) {
    this.model = model;
    this.panel = panel;
    this.onOpen = onOpen;
    this.onBlock = onBlock;
  }

  showNode(node) {
    const model = this.model;
    const told = new Map(model.fields(node));
    const parts = [this.head(model.label(node), node)];
    const listed = new Set(HIDDEN);
    for (const [title, names] of SECTIONS) {
      const rows = names.filter((name) => told.has(name)).map((name) => [name, told.get(name)]);
      names.forEach((name) => listed.add(name));
      if (rows.length) parts.push(section(title, this.list(rows)));
    }
    parts.push(...this.groupsOf(node, listed));
    parts.push(this.links('Reads', model.get(node, 'inputs')), this.links('Read by', model.consumers[node]));
    const rest = [...told].filter(([name]) => !listed.has(name));
    if (rest.length) parts.push(section('Other annotations', this.list(rest)));
    this.panel.replaceChildren(...parts.filter(Boolean));
  }

  showCell(cell) {
    const model = this.model;
    const bytes = cell.nodes.reduce((sum, node) => sum + (model.get(node, 'bytes') ?? 0), 0);
    const counts = new Map();
    for (const node of cell.nodes) counts.set(model.scheme(node), (counts.get(model.scheme(node)) ?? 0) + 1);
    const rows = [['layer', cell.row], ['weights', cell.nodes.length], ['bytes', bytes]];
    for (const name of ['error', 'output_error']) {
      const values = cell.nodes.map((node) => model.get(node, name)).filter((value) => value !== null);
      if (values.length) rows.push([name, `mean ${brief(values.reduce((a, b) => a + b, 0) / values.length)}, most ${brief(Math.max(...values))}`]);
    }
    const schemes = [...counts].map(([name, count]) => h('li', {}, chip(model.schemes.get(name).style, name), ` ×${count}`));
    this.panel.replaceChildren(
      this.head(cell.column, null),
      section('Together', this.list(rows)),
      section('Schemes', h('ul', {class: 'plain-list'}, ...schemes)),
      this.links('Weights', cell.nodes),
    );
  }

  head(title, node) {
    const head = h('header', {}, h('h2', {id: 'details-title', tabindex: '-1'}, title));
    if (node === null) return head;
    const model = this.model;
    if (model.get(node, 'weighted')) {
      const by = model.get(node, 'algorithm');
      head.append(h('p', {}, chip(model.style(node), model.scheme(node)), by ? ` by ${by}` : ''));
    }
    if (model.get(node, 'partition') !== null) {
      const button = h('button', {type: 'button', class: 'quiet'}, 'Show in its block');
      button.addEventListener('click', () => this.onBlock(node));
      head.append(button);
    }
    return head;
  }

  list(rows) {
    const list = h('dl');
    const flat = rows.flatMap(([name, value]) => (name === 'scheme' ? Object.entries(value) : [[name, value]]));
    for (const [name, value] of flat) list.append(h('dt', {}, name.replaceAll('_', ' ')), h('dd', {}, said(name, value)));
    return list;
  }

  groupsOf(node, listed) {
    const parts = [];
    for (const group of this.model.data.groups) {
      if (!group.members.includes(node)) continue;
      const title = {input: 'Input group', fusion: 'Fusion group', rescale: 'Rescale pair'}[group.kind] ?? group.kind;
      parts.push(this.links(`${title} ${group.id}`, group.members.filter((member) => member !== node), group.words));
    }
    listed.add('input_group').add('fusion_group');
    return parts;
  }

  links(title, nodes, words = null) {
    if (!nodes.length) return null;
    const list = h('ul', {class: 'plain-list'});
    const add = (some) => list.append(...some.map((node) => h('li', {}, this.link(node))));
    add(nodes.slice(0, FIRST));
    const part = section(`${title}`, words ? h('p', {}, words) : null, list);
    if (nodes.length > FIRST) {
      const more = h('button', {type: 'button', class: 'quiet'}, `Show all ${grouped(nodes.length)}`);
      more.addEventListener('click', () => {
        add(nodes.slice(FIRST));
        more.remove();
      });
      part.append(more);
    }
    return part;
  }

  link(node) {
    const model = this.model;
    const button = h('button', {type: 'button', class: 'link'}, model.label(node));
    button.addEventListener('click', () => this.onOpen(node));
    if (!model.get(node, 'weighted')) return button;
    const line = document.createDocumentFragment();
    line.append(button, ' ', chip(model.style(node), model.scheme(node)));
    return line;
  }
}

function section(title, ...children) {
  return h('section', {}, h('h3', {}, title), ...children);
}

function chip(style, text) {
  return h('span', {class: `chip ${style}`}, text);
}

/** A value as people read it: bytes in units, numbers short, tables as lists. */
function said(name, value) {
  if (name.endsWith('bytes') && typeof value === 'number') return `${human(value)} (${grouped(value)} bytes)`;
  if (name.endsWith('shape') && Array.isArray(value)) return value.join(' × ');
  if (name === 'verdict') return value.legal ? `loads, with kernel ${value.kernel}` : said('', {problems: value.problems, mends: value.mends});
  if (name === 'candidates') return h('ol', {class: 'plain-list'}, ...value.map(candidate));
  if (typeof value === 'number') return NUMBERS.has(name) || !Number.isInteger(value) ? brief(value) : grouped(value);
  if (Array.isArray(value)) {
    if (value.every(isPlain)) return value.join(', ');
    return h('ol', {class: 'plain-list'}, ...value.map((part) => h('li', {}, said('', part))));
  }
  if (isPlain(value)) return String(value);
  const rows = Object.entries(value).filter(([, part]) => part !== null);
  if (rows.every(([, part]) => isPlain(part))) return rows.map(([key, part]) => `${key.replaceAll('_', ' ')} ${part}`).join(', ');
  const list = h('dl');
  for (const [key, part] of rows) list.append(h('dt', {}, key.replaceAll('_', ' ')), h('dd', {}, said(key, part)));
  return list;
}

/** A rule that was weighed: who, what came of it, and what it would have made. */
function candidate({who, selects, becomes, outcome, because = ''}) {
  return h('li', {class: outcome}, h('b', {}, `${outcome}: `), `${who}: ${selects} → ${becomes}`, because ? h('small', {}, ` (${because})`) : '');
}

function isPlain(value) {
  return typeof value !== 'object' || value === null;
}
