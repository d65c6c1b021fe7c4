'use strict';

/** The document: nodes are numbers, and their fields are read by name. */
class Model {
  constructor(data) {
    this.data = data;
    const {own, values, profiles, profile} = data.nodes;
    this.own = Object.fromEntries(Object.entries(own).map(([name, column]) => [name, unfold(column)]));
    this.shared = Object.entries(values);
    this.places = new Map(this.shared.map(([name], place) => [name, place]));
    this.profiles = profiles;
    this.profileOf = profile;
    this.count = this.profileOf.length;
    this.consumers = Array.from({length: this.count}, () => []);
    for (let node = 0; node < this.count; node++) {
      for (const input of this.get(node, 'inputs')) this.consumers[input].push(node);
    }
    this.groups = new Map(data.groups.map((group) => [`${group.kind} ${group.id}`, group]));
    this.weighted = this.where((node) => this.get(node, 'weighted'));
    this.others = this.where((node) => !this.get(node, 'weighted'));
    this.schemes = this.countSchemes();
    this.inOrder = [...this.weighted, ...this.others];
    this.haystacks = [];
  }

  get(node, field) {
    const own = this.own[field];
    if (own) return own[node];
    const place = this.places.get(field);
    return place === undefined ? null : this.shared[place][1][this.profiles[this.profileOf[node]][place]];
  }

  /** Every field of a node that has a value. */
  fields(node) {
    const names = [...Object.keys(this.own), ...this.places.keys()];
    return names.map((name) => [name, this.get(node, name)]).filter(([, value]) => value !== null);
  }

  where(test) {
    const found = [];
    for (let node = 0; node < this.count; node++) if (test(node)) found.push(node);
    return found;
  }

  /** A tensor, whatever passes inserted after it. */
  tensor(node) {
    return this.get(node, 'kind') === 'inserted' && this.get(node, 'inputs').length
      ? this.tensor(this.get(node, 'inputs')[0])
      : node;
  }

  label(node) {
    return this.get(node, 'path') ?? this.get(node, 'name');
  }

  /** The path below its layer, or the whole of it. */
  short(node) {
    return this.get(node, 'short') ?? this.label(node);
  }

  scheme(node) {
    return this.get(node, 'scheme_name') ?? 'dense';
  }

  /** Schemes by how many weights have them, each with its colour's class; dense has its own. */
  countSchemes() {
    const counts = new Map();
    for (const node of this.weighted) {
      const name = this.scheme(node);
      const entry = counts.get(name) ?? {name, nodes: 0, bytes: 0};
      entry.nodes += 1;
      entry.bytes += this.get(node, 'bytes') ?? 0;
      counts.set(name, entry);
    }
    const ordered = [...counts.values()].sort((a, b) => b.nodes - a.nodes || (a.name < b.name ? -1 : 1));
    let place = 0;
    for (const entry of ordered) entry.style = entry.name === 'dense' ? 'dense' : `scheme-${place++ % 8}`;
    return new Map(ordered.map((entry) => [entry.name, entry]));
  }

  style(node) {
    return this.schemes.get(this.scheme(node))?.style ?? 'plain';
  }

  /** Whether a node has every word of a query; null without words. `field:word` asks one, `field:"all of it"` no more. */
  matcher(query) {
    const words = [...query.toLowerCase().matchAll(WORDS)].map(({groups}) => groups);
    if (!words.length) return null;
    const tests = words.map(({field, whole, word}) => {
      const part = starred(whole ?? word);
      if (!field) return (node) => this.haystack(node).includes(whole ?? word) || this.holds(node, part);
      if (field === 'path' && whole === undefined && part)
        return (node) => SEARCHED.path(this, node).toLowerCase().includes(word) || this.holds(node, part);
      const read = (node) => SEARCHED[field](this, node).toLowerCase();
      if (whole !== undefined || field === 'layer') return (node) => read(node) === (whole ?? word);
      return (node) => read(node).includes(word);
    });
    return (node) => tests.every((test) => test(node));
  }

  /** Whether a node stands for weights of such a name. */
  holds(node, part) {
    const experts = part && this.get(node, 'experts');
    return Boolean(experts) && part.number < experts.count && experts.names.some((name) => name.includes(part.name));
  }

  /** What a word is looked for in, written down when it is first asked for. */
  haystack(node) {
    this.haystacks[node] ??= HAYSTACK.map((read) => read(this, node))
      .join(' ')
      .toLowerCase();
    return this.haystacks[node];
  }
}

/** A name with a star for the last number in it, as blocks of experts name what they stand for. */
function starred(word) {
  const found = word.match(/^(.*\.)(\d+)(\..*)?$/);
  return found && {name: `${found[1]}*${found[3] ?? ''}`, number: Number(found[2])};
}

/** A column's values: as they stand, or texts put together from what they share and their numbers. */
function unfold({plain, patterns, cells}) {
  if (plain) return plain;
  return cells.map(
    (cell) => cell && patterns[cell[0]].map((piece, place) => (place ? cell[place] + piece : piece)).join(''),
  );
}

const WORDS = /(?:(?<field>path|scheme|structure|layer|solver|group|op):)?(?:"(?<whole>[^"]*)"|(?<word>\S+))/g;

const SEARCHED = {
  layer: (model, node) => String(model.get(node, 'layer') ?? ''),
  path: (model, node) => `${model.get(node, 'path') ?? ''} ${model.get(node, 'name')}`,
  scheme: (model, node) => (model.get(node, 'weighted') ? model.scheme(node) : ''),
  structure: (model, node) => model.get(node, 'structure') ?? '',
  solver: (model, node) => model.get(node, 'algorithm') ?? '',
  group: (model, node) => `${model.get(node, 'input_group') ?? ''} ${model.get(node, 'fusion_group') ?? ''}`,
  op: (model, node) => `${model.get(node, 'op')} ${model.get(node, 'kind')}`,
};

const {layer: _, ...WITHOUT_LAYER} = SEARCHED;
const HAYSTACK = Object.values(WITHOUT_LAYER);

const SLICE = 8; // milliseconds: half a frame
const STRIDE = 100;

/** Calls `each` with 0 to `count`, in slices that let keys and paints through. Returns how to end it sooner. */
function inSlices(count, each, done = () => {}) {
  let place = 0;
  let timer = null;
  const run = (milliseconds) => {
    const end = performance.now() + milliseconds;
    do {
      for (const stop = Math.min(count, place + STRIDE); place < stop; place++) each(place);
    } while (place < count && performance.now() < end);
    if (place < count) timer = setTimeout(run, 0, SLICE);
    else done();
  };
  run(SLICE);
  return {
    stop: () => clearTimeout(timer),
    finish: () => {
      clearTimeout(timer);
      if (place < count) run(Infinity);
    },
  };
}

const UNITS = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];

function human(bytes) {
  let unit = 0;
  for (; bytes >= 1024 && unit < UNITS.length - 1; unit++) bytes /= 1024;
  return `${unit ? bytes.toFixed(2) : bytes} ${UNITS[unit]}`;
}

function grouped(number) {
  return number.toLocaleString('en-US');
}

function counted(number, what) {
  return `${grouped(number)} ${what}${number === 1 ? '' : 's'}`;
}

function brief(value) {
  if (value === 0) return '0';
  return Math.abs(value) < 0.01 || Math.abs(value) >= 1e6 ? value.toExponential(2) : String(+value.toPrecision(4));
}

/** An element with attributes and children; strings become text, never markup. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}
