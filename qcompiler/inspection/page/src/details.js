'use strict';

const NUMBERS = new Set([
  'error',
  'output_error',
  'nearest_output_error',
  'damping',
  'transform_gain',
  'bits_per_weight',
]);
const SECTIONS = [
  ['Why', ['because', 'rules', 'target', 'structure', 'nearest']],
  ['What', ['experts', 'class_name', 'weight_shape', 'shape', 'parameters', 'layer', 'partition', 'op', 'arguments']],
  ['Scheme', ['scheme', 'format', 'algorithm', 'run', 'observes', 'observers']],
  ['Size', ['bytes', 'bits_per_weight']],
  ['Error', ['error', 'output_error', 'transform_gain', 'damping', 'dead_columns', 'seconds']],
];
const HIDDEN = new Set([
  'name',
  'path',
  'short',
  'column',
  'alike',
  'weighted',
  'inputs',
  'scheme_name',
  'solver',
  'transform',
  'decided',
  'module',
  'kind',
  'where_because',
  'dense_bytes',
  'nearest_output_error',
  'ratio',
  'candidates',
  'verdict',
  'residual',
  'input_group',
  'fusion_group',
]);
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
    const told = this.told(node);
    const parts = [this.head(model.label(node), node)];
    const listed = new Set(HIDDEN);
    for (const [title, names] of SECTIONS) {
      const rows = names.filter((name) => told.has(name)).map((name) => [name, told.get(name)]);
      names.forEach((name) => listed.add(name));
      if (rows.length) parts.push(section(title, this.list(rows)));
    }
    parts.push(...this.groupsOf(node));
    parts.push(...this.dataflow(node));
    const rest = [...told].filter(([name]) => !listed.has(name));
    if (rest.length) parts.push(section('Other annotations', this.list(rest)));
    this.panel.replaceChildren(...parts.filter(Boolean));
  }

  /** A node's fields, those that only together say something put in words. */
  told(node) {
    const told = new Map(this.model.fields(node));
    const put = (name, parts) => told.set(name, parts.filter(Boolean).join(', '));
    const [bytes, dense] = [told.get('bytes'), told.get('dense_bytes')];
    if (bytes && dense)
      put('bytes', [
        `${said('bytes', bytes)} of ${human(dense)} dense`,
        bytes < dense && `${(dense / bytes).toFixed(2)} times smaller`,
      ]);
    const [error, nearest] = [told.get('output_error'), told.get('nearest_output_error')];
    if (error && nearest)
      put('output_error', [brief(error), `${((100 * error) / nearest).toFixed(0)}% of rounding to nearest`]);
    const gain = told.get('transform_gain');
    if (gain)
      put('transform_gain', [
        `output error ${(100 * gain).toFixed(0)}% of that without`,
        told.has('ratio') && `exponent ${brief(told.get('ratio'))}`,
      ]);
    if (told.has('structure')) put('structure', [`${told.get('structure')}: ${told.get('where_because') ?? ''}`]);
    const verdict = told.get('verdict');
    const target = this.model.data.target ?? 'the target';
    if (verdict?.legal) put('target', [`${target} loads it`, verdict.kernel && `by kernel ${verdict.kernel}`]);
    else if (verdict) told.set('target', [...verdict.problems, ...verdict.mends]);
    const experts = told.get('experts');
    if (experts) put('experts', [`${experts.count}, run as one node`, ...partsOf(experts)]);
    if (told.has('candidates')) told.set('rules', told.get('candidates'));
    return told;
  }

  /** What a module reads and what it feeds: tensors and the nearest weights; of an operation, its neighbours too. */
  dataflow(node) {
    const model = this.model;
    const inputs = (other) => model.get(other, 'inputs');
    const readers = (other) => model.consumers[other];
    const isModule = model.get(node, 'path') !== null;
    const read = isModule ? [...new Set(inputs(node).map((other) => model.tensor(other)))] : inputs(node);
    const made = this.ends(node, inputs).filter((other) => !read.includes(other));
    const fed = this.ends(node, readers);
    return [
      this.links('Reads', read),
      this.links('Made of', made),
      isModule ? null : this.links('Read by', readers(node)),
      this.links('Feeds', fed),
    ];
  }

  /** The nearest weights along `next`, and where the residual stream is met: beyond, every later layer reads it. */
  ends(node, next) {
    const model = this.model;
    const found = [];
    const seen = new Set();
    const left = [...next(node)];
    for (const other of left) {
      if (seen.has(other)) continue;
      seen.add(other);
      const ends = model.get(other, 'weighted') || model.get(other, 'kind') === 'embedding' || model.get(other, 'residual');
      if (ends) found.push(other);
      else left.push(...next(other));
    }
    return found.sort((a, b) => a - b);
  }

  showCell(cell) {
    const model = this.model;
    const bytes = cell.nodes.reduce((sum, node) => sum + (model.get(node, 'bytes') ?? 0), 0);
    const sizes = new Set(cell.nodes.map((node) => model.get(node, 'bytes')));
    const counts = new Map();
    for (const node of cell.nodes) counts.set(model.scheme(node), (counts.get(model.scheme(node)) ?? 0) + 1);
    const rows = [
      ['layer', cell.row],
      ['weights', cell.nodes.length],
      ['bytes each', sizes.size === 1 ? [...sizes][0] : null],
      ['bytes in all', bytes],
    ].filter(([, value]) => value !== null);
    for (const name of ['error', 'output_error']) {
      const values = cell.nodes.map((node) => model.get(node, name)).filter((value) => value !== null);
      if (values.length)
        rows.push([
          name,
          `mean ${brief(values.reduce((a, b) => a + b, 0) / values.length)}, most ${brief(Math.max(...values))}`,
        ]);
    }
    const schemes = [...counts].map(([name, count]) =>
      h('li', {}, chip(model.schemes.get(name).style, name), ` ×${count}`),
    );
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
    for (const [name, value] of flat)
      list.append(h('dt', {}, name.replaceAll('_', ' ')), h('dd', {}, said(name, value)));
    return list;
  }

  groupsOf(node) {
    const parts = [];
    for (const group of this.model.data.groups) {
      const mine = group.members.includes(node);
      if (!mine && !(group.kind === 'rescale' && group.producer === node)) continue;
      const others = group.members.filter((member) => member !== node);
      const producer = mine && group.producer !== null && group.producer !== node ? [group.producer] : [];
      const [title, words] = {
        input: ['Input group', others.length ? 'Reads one tensor with these.' : 'Reads its tensor alone.'],
        fusion: ['Fused with', 'Runtimes need one scheme for all.'],
        rescale: [
          mine ? 'Rescaled' : 'Rescales',
          `${group.words}: the producer is divided by the scale, its readers multiplied.`,
        ],
        observer: ['Observed', group.words],
      }[group.kind] ?? [group.kind, group.words];
      const shown = group.kind === 'rescale' ? [...producer, ...others] : others;
      parts.push(
        section(
          `${title} · ${group.id}`,
          words ? h('p', {}, words) : null,
          shown.length ? this.linkList(shown) : null,
        ),
      );
    }
    return parts;
  }

  links(title, nodes, words = null) {
    return nodes.length ? section(title, this.linkList(nodes), words ? h('p', {}, words) : null) : null;
  }

  linkList(nodes) {
    const list = h('ul', {class: 'plain-list'});
    const add = (some) => list.append(...some.map((node) => h('li', {}, this.link(node))));
    add(nodes.slice(0, FIRST));
    if (nodes.length <= FIRST) return list;
    const more = h('button', {type: 'button', class: 'quiet'}, `Show all ${grouped(nodes.length)}`);
    more.addEventListener('click', () => {
      more.parentElement.remove();
      add(nodes.slice(FIRST));
    });
    list.append(h('li', {}, more));
    return list;
  }

  link(node) {
    const model = this.model;
    const button = h('button', {type: 'button', class: 'link'}, model.label(node));
    button.addEventListener('click', () => this.onOpen(node));
    if (!model.get(node, 'weighted')) {
      if (!model.get(node, 'residual')) return button;
      return h('span', {}, button, h('small', {}, ' the residual stream'));
    }
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
  if (/(^|_)bytes\b/.test(name) && typeof value === 'number') return `${human(value)} (${grouped(value)} bytes)`;
  if (name.endsWith('shape') && Array.isArray(value)) return value.join(' × ');
  if (name === 'rules') return h('ol', {class: 'plain-list'}, ...value.map(candidate));
  if (typeof value === 'number') return NUMBERS.has(name) || !Number.isInteger(value) ? brief(value) : grouped(value);
  if (Array.isArray(value)) {
    if (value.every(isPlain)) return value.join(', ');
    return h('ol', {class: 'plain-list'}, ...value.map((part) => h('li', {}, said('', part))));
  }
  if (isPlain(value)) return String(value);
  const rows = Object.entries(value).filter(([, part]) => part !== null);
  if (rows.every(([, part]) => isPlain(part)))
    return rows.map(([key, part]) => `${key.replaceAll('_', ' ')} ${part}`).join(', ');
  const list = h('dl');
  for (const [key, part] of rows) list.append(h('dt', {}, key.replaceAll('_', ' ')), h('dd', {}, said(key, part)));
  return list;
}

/** A rule that was weighed: who, what came of it, and what it would have made. */
function candidate({who, selects, becomes, outcome, because = ''}) {
  return h(
    'li',
    {class: outcome},
    h('b', {}, `${outcome}: `),
    `${who}: ${selects} → ${becomes}`,
    because ? h('small', {}, ` (${because})`) : '',
  );
}

/** What a block of experts stands for, as names: `experts.{0–7}.up_proj`. */
function partsOf({count, names}) {
  return names.map((name) => name.replace('*', `{0–${count - 1}}`));
}

function isPlain(value) {
  return typeof value !== 'object' || value === null;
}
