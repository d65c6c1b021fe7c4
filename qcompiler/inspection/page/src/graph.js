'use strict';

const MANY = 6; // as many of one projection in a block are drawn as one
const MOST = 400; // boxes that are laid out in well under a second

/** What one block computes, as boxes and edges: only what joins values, or every operation. */
class Block {
  constructor(model, partition, every) {
    this.model = model;
    this.partition = partition;
    this.every = every;
    this.nodes = model.where((node) => model.get(node, 'partition') === partition);
    this.inside = new Set(this.nodes);
    this.boxes = new Map();
    this.edges = new Map();
    this.sources = new Map();
    this.keys = new Map();
    this.stacks = this.findStacks();
    for (const node of this.nodes) this.take(node);
    for (const node of this.nodes) this.leave(node);
  }

  /** Alike projections of many experts: one box. */
  findStacks() {
    const counts = new Map();
    const columns = this.nodes.map((node) => this.model.get(node, 'column')).filter((column) => column !== null);
    for (const column of columns) counts.set(column, (counts.get(column) ?? 0) + 1);
    return new Set([...counts].filter(([, count]) => count > MANY).map(([column]) => column));
  }

  take(node) {
    const read = [...new Set(this.model.get(node, 'inputs').flatMap((input) => this.from(input)))];
    const joined = read.filter((key) => this.boxes.has(key) && !this.boxes.get(key).shared);
    const kept = this.every || this.model.get(node, 'path') !== null || this.isInserted(node) || joined.length > 1;
    if (!kept) {
      this.sources.set(
        node,
        read.filter((key) => !this.boxes.get(key)?.shared),
      );
      return;
    }
    const key = this.keyOf(node, read);
    const box = this.boxes.get(key) ?? {key, nodes: []};
    box.nodes.push(node);
    this.boxes.set(key, box);
    for (const source of read) {
      if (this.boxes.get(source)?.shared && !this.every) continue;
      if (source !== key) this.edges.set(`${source}>${key}`, {from: source, to: key});
    }
    this.sources.set(node, [key]);
  }

  from(input) {
    if (this.inside.has(input)) return this.sources.get(input) ?? [];
    const key = `in ${input}`;
    if (!this.boxes.has(key)) {
      const readers = new Set(this.model.consumers[input].map((reader) => this.model.get(reader, 'partition')));
      this.boxes.set(key, {key, nodes: [input], port: true, shared: readers.size > 1});
    }
    return [key];
  }

  /** The value that the next block reads leaves through a port. */
  leave(node) {
    const outside = this.model.consumers[node].filter((reader) => !this.inside.has(reader));
    if (!outside.length) return;
    const reader = outside[0];
    const key = `out ${reader}`;
    this.boxes.set(key, {key, nodes: [reader], port: true, out: true});
    for (const source of this.sources.get(node)) this.edges.set(`${source}>${key}`, {from: source, to: key});
  }

  /** An operation that reads nothing but alike projections is as often there as they are: one box, too. */
  keyOf(node, read = []) {
    if (this.keys.has(node)) return this.keys.get(node);
    const column = this.model.get(node, 'column');
    const follows = column === null && read.length && read.every((key) => this.isStack(key));
    const key = this.stacks.has(column)
      ? `stack ${column}`
      : follows
        ? `stack ${opName(this.model, node)} ${read}`
        : node;
    this.keys.set(node, key);
    return key;
  }

  isStack(key) {
    return typeof key === 'string' && key.startsWith('stack ');
  }

  isInserted(node) {
    return this.model.get(node, 'kind') === 'inserted';
  }

  /** Boxes to draw: a port of which nothing is drawn is left out. */
  drawn() {
    const edges = [...this.edges.values()];
    const joined = new Set(edges.flatMap((edge) => [edge.from, edge.to]));
    return {edges, boxes: [...this.boxes.values()].filter((box) => !box.port || joined.has(box.key))};
  }

  /** Groups with two members or more here, those that hold others first. */
  groups() {
    const kinds = {input: 'reads one tensor', fusion: 'fused'};
    const found = new Map();
    for (const group of this.model.data.groups) {
      if (!(group.kind in kinds)) continue;
      const members = [
        ...new Set(group.members.filter((node) => this.inside.has(node)).map((node) => this.keyOf(node))),
      ];
      const same = `${group.kind} ${members}`;
      if (members.length > 1 && found.has(same)) found.get(same).more += 1;
      else if (members.length > 1)
        found.set(same, {kind: group.kind, id: group.id, members, words: kinds[group.kind], more: 0});
    }
    return [...found.values()].sort((a, b) => b.members.length - a.members.length || (a.kind < b.kind ? 1 : -1));
  }

  label(box) {
    const node = box.nodes[0];
    const model = this.model;
    if (box.port) {
      const named = model.get(node, 'path') !== null && model.get(node, 'layer') === null;
      const where = (named ? null : model.get(node, 'partition')) ?? model.label(node);
      return [`${box.out ? 'to' : 'from'} ${where}`];
    }
    const name = box.key === node ? model.short(node) : model.get(node, 'column');
    const title = model.get(node, 'path') === null ? opName(model, node) : name;
    const experts = model.get(node, 'experts');
    const count = box.nodes.length > 1 ? ` ×${box.nodes.length}` : experts ? ` (${experts.count} in one)` : '';
    const lines = [title + count];
    if (model.get(node, 'weighted')) lines.push(this.schemes(box));
    else if (model.get(node, 'path') !== null) lines.push(model.get(node, 'kind'));
    return lines;
  }

  schemes(box) {
    const names = new Set(box.nodes.map((node) => this.model.scheme(node)));
    return names.size === 1 ? [...names][0] : `${names.size} schemes`;
  }

  style(box) {
    const node = box.nodes[0];
    if (box.port) return 'port';
    if (!this.model.get(node, 'weighted')) return this.isInserted(node) ? 'inserted' : 'plain';
    const styles = new Set(box.nodes.map((other) => this.model.style(other)));
    return styles.size === 1 ? [...styles][0] : 'mixed';
  }
}

function opName(model, node) {
  return model.get(node, 'op').replace(/^aten\.|^operator\.|\.default$/g, '');
}

/** Boxes that read and feed the same ones (q, k, v) can trade places: the first computed stands leftmost. */
function inOrder(layout, boxes, edges) {
  const ends = new Map(boxes.map((box) => [box.key, {in: [], out: []}]));
  for (const edge of edges) {
    ends.get(edge.from).out.push(edge.to);
    ends.get(edge.to).in.push(edge.from);
  }
  const alike = Map.groupBy(boxes, ({key}) => {
    const {width, height} = layout.node(String(key));
    return JSON.stringify([ends.get(key), layout.parent(String(key)) ?? null, width, height]);
  });
  for (const group of alike.values()) {
    const keys = group.map((box) => String(box.key));
    const places = keys.map((key) => {
      const {x, y} = layout.node(key);
      const lines = [...layout.inEdges(key), ...layout.outEdges(key)].map((edge) => layout.edge(edge).points);
      return {x, y, lines};
    });
    places.sort((a, b) => a.x - b.x);
    keys.forEach((key, place) => {
      Object.assign(layout.node(key), {x: places[place].x, y: places[place].y});
      const beside = [...layout.inEdges(key), ...layout.outEdges(key)];
      beside.forEach((edge, line) => Object.assign(layout.edge(edge), {points: places[place].lines[line]}));
    });
  }
}

/** Turns the drawing over where more of it would then run from left to right as it is computed. */
function leftToRight(layout, boxes) {
  const width = layout.graph().width;
  let turned = 0;
  for (const [place, box] of boxes.entries()) {
    for (const later of boxes.slice(place + 1)) {
      const [a, b] = [layout.node(String(box.key)), layout.node(String(later.key))];
      if (Math.abs(a.y - b.y) < a.height) turned += Math.sign(a.x - b.x);
    }
  }
  if (turned <= 0) return false;
  for (const key of layout.nodes()) layout.node(key).x = width - layout.node(key).x;
  for (const edge of layout.edges()) {
    const line = layout.edge(edge);
    line.points = line.points.map(({x, y}) => ({x: width - x, y}));
  }
  return true;
}

/** Draws a block into an SVG with layout by dagre, zoom by d3. */
class Drawing {
  constructor(model, svg, {onOpen}) {
    this.model = model;
    this.svg = d3.select(svg);
    this.onOpen = onOpen;
    this.canvas = this.svg.append('g');
    this.boxes = this.canvas.selectAll('g.box');
    this.zoom = d3
      .zoom()
      .scaleExtent([0.1, 4])
      .filter((event) => {
        if (event.type === 'wheel') return event.ctrlKey || event.metaKey;
        return event.touches ? event.touches.length > 1 : !event.button; // one finger scrolls
      })
      .on('zoom', (event) => this.canvas.attr('transform', event.transform));
    this.svg.call(this.zoom).on('dblclick.zoom', null);
    new ResizeObserver(() => this.frame()).observe(svg);
    window.addEventListener('beforeprint', () => {
      this.fit();
      this.frame({width: 0, height: 0});
    });
    window.addEventListener('afterprint', () => this.fit());
    svg.addEventListener('keydown', (event) => this.moved(event));
  }

  /** Draws it, or says false where it is too large to. */
  draw(block) {
    this.block = block;
    const {boxes, edges} = block.drawn();
    this.canvas.selectChildren().remove();
    this.boxes = this.canvas.selectAll('g.box');
    if (boxes.length > MOST) return false;
    const layout = this.lay(boxes, edges, block.groups());
    this.size = layout.graph();
    inOrder(layout, boxes, edges);
    if (leftToRight(layout, boxes)) inOrder(layout, boxes, edges);
    const clusters = layout
      .nodes()
      .filter((key) => layout.children(key).length)
      .map((key) => layout.node(key));
    this.drawClusters(clusters);
    const line = ({points}) =>
      points.map(({x, y}, place) => `${place ? 'L' : 'M'}${x.toFixed(1)},${y.toFixed(1)}`).join('');
    this.canvas
      .selectAll('path')
      .data(layout.edges().map((edge) => layout.edge(edge)))
      .join('path')
      .attr('class', 'edge')
      .attr('marker-end', 'url(#arrow)')
      .attr('d', line);
    this.drawBoxes(boxes.map((box) => ({...box, ...layout.node(String(box.key))})));
    this.fit();
    return true;
  }

  lay(boxes, edges, groups) {
    const graph = new dagre.graphlib.Graph({compound: true});
    graph.setGraph({rankdir: 'TB', nodesep: 28, ranksep: 34, edgesep: 14, marginx: 12, marginy: 12});
    graph.setDefaultEdgeLabel(() => ({}));
    for (const box of boxes) {
      const lines = this.block.label(box);
      const width = Math.max(64, ...lines.map((text, place) => text.length * (place ? 6.2 : 7.4) + 26));
      graph.setNode(String(box.key), {lines, width, height: lines.length > 1 ? 46 : 30});
    }
    for (const edge of edges) graph.setEdge(String(edge.from), String(edge.to));
    for (const group of groups) {
      const members = group.members.map(String);
      const parents = new Set(members.map((member) => graph.parent(member)));
      if (parents.size > 1) continue; // it cuts across a larger group: the list beside the drawing has it
      const key = `${group.kind} ${group.id}`;
      graph.setNode(key, {label: group.words, id: group.id, kind: group.kind});
      const [parent] = parents;
      if (parent !== undefined) graph.setParent(key, parent);
      for (const member of members) graph.setParent(member, key);
    }
    dagre.layout(graph);
    return graph;
  }

  drawClusters(clusters) {
    const drawn = this.canvas
      .selectAll('g.cluster')
      .data(clusters)
      .join('g')
      .attr('class', ({kind}) => `cluster ${kind}`)
      .attr('transform', ({x, y, width, height}) => `translate(${x - width / 2},${y - height / 2})`);
    drawn
      .append('rect')
      .attr('width', ({width}) => width)
      .attr('height', ({height}) => height)
      .attr('rx', 8);
    drawn
      .append('text')
      .attr('x', 8)
      .attr('y', ({kind, height}) => (kind === 'fusion' ? height - 5 : 12))
      .text(({label}) => label);
  }

  drawBoxes(boxes) {
    const order = boxes.sort((a, b) => a.y - b.y || a.x - b.x);
    const drawn = this.canvas
      .selectAll('g.box')
      .data(order)
      .join('g')
      .attr('class', (box) => `box ${this.block.style(box)}`)
      .attr('transform', ({x, y, width, height}) => `translate(${x - width / 2},${y - height / 2})`)
      .attr('role', 'button')
      .attr('tabindex', (_, place) => (place ? -1 : 0))
      .attr('aria-label', ({lines}) => lines.join(' '))
      .on('click', (event, box) => this.open(event.currentTarget, box));
    drawn
      .append('rect')
      .attr('width', ({width}) => width)
      .attr('height', ({height}) => height)
      .attr('rx', 6);
    drawn
      .append('rect')
      .attr('class', 'stripe')
      .attr('width', 5)
      .attr('height', ({height}) => height)
      .attr('rx', 2);
    drawn
      .append('text')
      .attr('class', 'name')
      .attr('x', 14)
      .attr('y', 19)
      .text(({lines}) => `${lines[0]} `);
    drawn
      .append('text')
      .attr('class', 'scheme')
      .attr('x', 14)
      .attr('y', 36)
      .text(({lines}) => lines[1] ?? '');
    drawn.append('title').text((box) =>
      box.nodes
        .slice(0, 3)
        .map((node) => this.model.label(node))
        .join('\n'),
    );
    this.boxes = drawn;
  }

  open(element, box) {
    this.focus(element);
    this.onOpen(box.nodes, box.port);
  }

  focus(element) {
    this.boxes.attr('tabindex', -1);
    element.setAttribute('tabindex', '0');
    element.focus({preventScroll: true});
  }

  select(node) {
    this.boxes.classed('selected', (box) => !box.port && box.nodes.includes(node));
  }

  /** Arrow keys go to the nearest box in their direction; plus, minus and 0 zoom. */
  moved(event) {
    const element = event.target.closest('g.box');
    const zooms = {
      '+': () => this.by(1.3),
      '=': () => this.by(1.3),
      '-': () => this.by(1 / 1.3),
      0: () => this.fit(),
    };
    const [dx, dy] = {ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0]}[event.key] ?? [
      0, 0,
    ];
    if (event.key in zooms && !event.ctrlKey && !event.metaKey) {
      zooms[event.key]();
    } else if (element && (event.key === 'Enter' || event.key === ' ')) {
      this.open(element, d3.select(element).datum());
    } else if (element && (dx || dy)) {
      const here = d3.select(element).datum();
      const far = (box) => {
        const [across, along] = dy
          ? [Math.abs(box.x - here.x), (box.y - here.y) * dy]
          : [Math.abs(box.y - here.y), (box.x - here.x) * dx];
        return along > 1 ? along + 2 * across : Infinity;
      };
      const nearest = this.boxes
        .nodes()
        .reduce((a, b) => (far(d3.select(b).datum()) < far(d3.select(a).datum()) ? b : a));
      if (far(d3.select(nearest).datum()) < Infinity) this.focus(nearest);
    } else {
      return;
    }
    event.preventDefault();
  }

  by(factor) {
    this.svg.call(this.zoom.scaleBy, factor);
  }

  /** All of it in view, its text no larger than the page's. */
  fit() {
    this.frame();
    this.svg.call(this.zoom.transform, d3.zoomIdentity);
  }

  /** The view's own size is that of the drawing, or larger; the browser scales it to the room there is. */
  frame({width, height} = this.svg.node().getBoundingClientRect()) {
    if (!this.size) return;
    const frame = this.svg.node().parentElement;
    frame.style.setProperty('--across', `${this.size.width}px`);
    frame.style.setProperty('--down', `${this.size.height}px`);
    const [across, down] = [Math.max(width, this.size.width), Math.max(height, this.size.height)];
    const [left, above] = [(this.size.width - across) / 2, (this.size.height - down) / 2];
    this.svg.attr('viewBox', [left, above, across, down].map(Math.round).join(' '));
  }
}
