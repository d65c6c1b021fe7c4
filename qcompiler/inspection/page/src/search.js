'use strict';

const SHOWN = 50;

/** A combobox: hits below the box, marked in the grid, counted aloud. */
class Search {
  constructor(model, {box, list, count}, {onHits, onOpen}) {
    Object.assign(this, {model, box, list, count, onHits, onOpen, hits: [], active: -1, search: null});
    box.addEventListener('input', () => this.run());
    box.addEventListener('keydown', (event) => this.moved(event));
    box.addEventListener('focus', () => this.open(this.hits.length > 0));
    box.addEventListener('blur', () => this.open(false));
    list.addEventListener('mousedown', (event) => event.preventDefault()); // the box keeps the focus
    list.addEventListener('click', (event) => this.choose(event.target.closest('[role=option]')));
    document.addEventListener('keydown', (event) => this.called(event));
  }

  called(event) {
    const writing = event.target.closest('input:not([type=radio], [type=checkbox]), select, textarea');
    if (event.key !== '/' || writing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.box.focus();
    this.box.select();
  }

  ask(query) {
    this.box.value = query;
    this.run();
  }

  /** Search in slices: a key never waits for the search that the key before it began. */
  run() {
    this.search?.stop();
    const {model} = this;
    const query = this.box.value.trim();
    const has = model.matcher(query);
    const hits = [];
    this.list.setAttribute('aria-busy', 'true');
    this.search = inSlices(
      has ? model.count : 0,
      (place) => has(model.inOrder[place]) && hits.push(model.inOrder[place]),
      () => this.show(query, hits),
    );
  }

  show(query, hits) {
    this.hits = hits;
    this.active = -1;
    this.list.setAttribute('aria-busy', 'false');
    const more = hits.length > SHOWN ? `, the first ${SHOWN} listed` : '';
    this.count.textContent = query ? `${counted(hits.length, 'node')}${more}` : '';
    this.list.replaceChildren(...hits.slice(0, SHOWN).map((node, place) => this.option(node, place)));
    this.open(hits.length > 0 && document.activeElement === this.box);
    this.box.removeAttribute('aria-activedescendant');
    this.onHits(query ? new Set(hits) : null);
  }

  option(node, place) {
    const model = this.model;
    const option = h(
      'li',
      {role: 'option', id: `hit-${place}`, 'aria-selected': 'false'},
      h('span', {}, model.label(node)),
    );
    if (model.get(node, 'weighted')) option.append(chip(model.style(node), model.scheme(node)));
    else option.append(h('small', {}, model.get(node, 'kind')));
    return Object.assign(option, {node});
  }

  open(shown) {
    this.list.hidden = !shown;
    this.box.setAttribute('aria-expanded', String(shown));
  }

  moved(event) {
    if (['ArrowDown', 'ArrowUp', 'Enter'].includes(event.key)) this.search?.finish(); // they are about what was written
    const options = [...this.list.children];
    if (event.key === 'Escape') {
      if (this.box.value) this.ask('');
      else this.box.blur();
    } else if (event.key === 'ArrowDown' && options.length) {
      this.activate(Math.min(this.active + 1, options.length - 1));
    } else if (event.key === 'ArrowUp' && options.length) {
      this.activate(Math.max(this.active - 1, 0));
    } else if (event.key === 'Enter') {
      this.choose(options[Math.max(this.active, 0)]);
    } else {
      return;
    }
    event.preventDefault();
  }

  activate(place) {
    this.active = place;
    [...this.list.children].forEach((option, other) => option.setAttribute('aria-selected', String(other === place)));
    this.list.children[place].scrollIntoView({block: 'nearest'});
    this.box.setAttribute('aria-activedescendant', `hit-${place}`);
    this.open(true);
  }

  choose(option) {
    if (!option) return;
    this.open(false);
    this.onOpen(option.node);
  }
}
