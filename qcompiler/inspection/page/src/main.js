'use strict';

const UNPAINTED = 1000; // milliseconds after which a page in the background starts without having been painted

afterFirstPaint(start);

/** What the page says without scripts is painted first: nothing is computed before it. */
function afterFirstPaint(then) {
  const once = () => {
    observer.disconnect();
    clearTimeout(timer);
    then();
  };
  const observer = new PerformanceObserver((list) => list.getEntriesByName('first-contentful-paint').length && once());
  const timer = setTimeout(once, UNPAINTED);
  observer.observe({type: 'paint', buffered: true});
}

function start() {
  performance.mark('start');
  const find = (id) => document.getElementById(id);
  const model = new Model(JSON.parse(find('document').textContent));
  const panel = find('details');

  const details = new Details(model, find('details-body'), {
    onOpen: (node) => open(node),
    onBlock: (node) => showBlock(node, true),
  });
  const grid = new Grid(model, find('grid'), {
    onOpen: (cell, {byKey = false} = {}) =>
      cell.nodes.length === 1 ? open(cell.nodes[0], byKey) : openCell(cell, byKey),
  });
  const drawing = new Drawing(model, find('drawing'), {
    onOpen: (nodes, port) =>
      port ? showBlock(nodes[0], false) : nodes.length === 1 ? open(nodes[0]) : openCell(stackCell(nodes)),
  });
  const search = new Search(
    model,
    {box: find('search'), list: find('hits'), count: find('count')},
    {
      onHits: (hits) => grid.mark(hits),
      onOpen: (node) => open(node, true),
    },
  );

  function open(node, byKey = false) {
    details.showNode(node);
    grid.select(node);
    if (model.get(node, 'partition') !== null) showBlock(node, false);
    drawing.select(node);
    reveal(byKey);
  }

  function openCell(cell, byKey = false) {
    details.showCell(cell);
    grid.select(cell.nodes[0]);
    reveal(byKey);
  }

  function stackCell(nodes) {
    return {nodes, row: String(model.get(nodes[0], 'layer')), column: model.get(nodes[0], 'column')};
  }

  /** Where a key opened the details, the focus goes there, and Escape brings it back. */
  function reveal(byKey) {
    const before = document.activeElement;
    panel.hidden = false;
    document.body.classList.add('with-details');
    if (!byKey) return;
    find('details-title').focus();
    panel.returnTo = before;
  }

  function close() {
    panel.hidden = true;
    document.body.classList.remove('with-details');
    (panel.returnTo?.isConnected ? panel.returnTo : find('search')).focus();
  }

  find('close').addEventListener('click', close);
  panel.addEventListener('keydown', (event) => event.key === 'Escape' && close());

  // The grid and its legend.
  function drawGrid() {
    grid.draw();
    const entries = grid.legend().map((entry) => {
      const children = [
        h('span', {class: `swatch ${entry.style}`, 'aria-hidden': 'true'}),
        entry.text,
        ' ',
        h('small', {}, entry.more ?? ''),
      ];
      if (!entry.query) return h('li', {}, ...children);
      const button = h('button', {type: 'button', class: 'quiet', title: `Search for ${entry.query}`}, ...children);
      button.addEventListener('click', () => search.ask(entry.query));
      return h('li', {}, button);
    });
    find('legend').replaceChildren(...entries);
    find('metric-words').textContent = METRICS[grid.metric].words ?? '';
  }

  const metrics = grid.metrics();
  find('metrics').append(
    ...metrics.map((name) => {
      const radio = h('input', {type: 'radio', name: 'metric', value: name, checked: name === grid.metric});
      radio.addEventListener('change', () => {
        grid.metric = name;
        drawGrid();
      });
      return h('label', {}, radio, METRICS[name].label);
    }),
  );
  find('fold').checked = grid.folded;
  find('fold').addEventListener('change', (event) => {
    grid.folded = event.target.checked;
    drawGrid();
  });
  drawGrid();

  // The weights with the largest errors lead to their details.
  for (const head of document.querySelectorAll('#worst tbody th')) {
    const path = head.textContent;
    const button = h('button', {type: 'button', class: 'link'}, path);
    button.addEventListener('click', () => open(model.weighted.find((node) => model.get(node, 'path') === path), true));
    head.replaceChildren(button);
  }

  // The drawing of one block.
  const partitions = [...new Set(model.where(() => true).map((node) => model.get(node, 'partition')))].filter(
    (name) => name !== null,
  );
  const chooser = find('block');
  chooser.append(...partitions.map((name) => h('option', {value: name}, name)));
  const first = model.weighted.find((node) => model.get(node, 'layer') !== null) ?? model.weighted[0];

  function drawBlock() {
    if (!partitions.length) return;
    const drawn = drawing.draw(new Block(model, chooser.value, find('every').checked));
    find('not-drawn').hidden = drawn;
    find('block-title').dataset.block = chooser.value;
    const order = [...drawing.block.boxes.keys()];
    const groups = drawing.block.groups().sort((a, b) => order.indexOf(a.members[0]) - order.indexOf(b.members[0]));
    const lists = groups.map((group) => {
      const words = group.members.map((key) =>
        model.get(drawing.block.boxes.get(key).nodes[0], drawing.block.isStack(key) ? 'column' : 'short'),
      );
      const kind = group.kind === 'input' ? 'Input group' : 'Fusion group';
      const more = group.more ? ` and ${counted(group.more, 'group')} like it` : '';
      return h(
        'li',
        {class: group.kind},
        h('b', {}, `${kind} `),
        h('code', {}, group.id),
        `${more} ${group.words}: ${words.join(', ')}`,
      );
    });
    find('groups').replaceChildren(...lists);
    find('block-table').replaceChildren(...blockRows(drawing.block));
  }

  /** The drawing as a table, for those who do not see it. */
  function blockRows(block) {
    const {boxes, edges} = block.drawn();
    const words = new Map(boxes.map((box) => [box.key, block.label(box).join(', ')]));
    return boxes.map((box) => {
      const inputs = edges.filter((edge) => edge.to === box.key).map((edge) => words.get(edge.from));
      return h('tr', {}, h('th', {scope: 'row'}, words.get(box.key)), h('td', {}, inputs.join('; ') || '–'));
    });
  }

  function showBlock(node, scroll) {
    const partition = model.get(node, 'partition');
    if (partition === null) return;
    if (chooser.value !== partition) {
      chooser.value = partition;
      drawBlock();
    }
    drawing.select(node);
    if (scroll) find('block-title').scrollIntoView();
  }

  function step(by) {
    const place = chooser.selectedIndex + by;
    if (place < 0 || place >= chooser.options.length) return;
    chooser.selectedIndex = place;
    drawBlock();
  }

  chooser.addEventListener('change', drawBlock);
  find('every').addEventListener('change', drawBlock);
  find('before').addEventListener('click', () => step(-1));
  find('after').addEventListener('click', () => step(1));
  find('zoom-in').addEventListener('click', () => drawing.by(1.3));
  find('zoom-out').addEventListener('click', () => drawing.by(1 / 1.3));
  find('fit').addEventListener('click', () => drawing.fit());
  if (partitions.length) chooser.value = model.get(first ?? 0, 'partition') ?? partitions[0];
  requestAnimationFrame(() =>
    setTimeout(() => {
      drawBlock();
      document.documentElement.dataset.ready = 'true';
      inSlices(model.count, (node) => model.haystack(node));
    }),
  );

  // Light and dark: the system's choice until one is made.
  const theme = find('theme');
  theme.addEventListener('change', () => {
    if (theme.value === 'system') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme.value;
  });
}
