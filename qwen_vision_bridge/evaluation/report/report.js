const pick = id => document.getElementById(id), cards = [...document.querySelectorAll('#cases article')];
const shown = card => [...card.querySelectorAll('.arm')].find(part => part.dataset.arm === pick('arm').value);
function update() {
  const group = pick('group').value, outcome = pick('outcome').value, sign = pick('order').value === 'best' ? -1 : 1;
  let count = 0;
  for (const card of cards) {
    const part = shown(card);
    card.hidden = !part || (group && card.dataset.group !== group) || (outcome && part.dataset.outcome !== outcome);
    count += !card.hidden;
  }
  const gain = card => shown(card) ? Number(shown(card).dataset.gain) : 0;
  pick('cases').append(...[...cards].sort((a, b) => sign * (gain(a) - gain(b))));
  pick('count').textContent = count + ' shown';
}
if (cards.length) {
  for (const id of ['group', 'arm', 'outcome', 'order']) pick(id).addEventListener('change', update);
  update();
}
for (const compare of document.querySelectorAll('.compare')) {
  // The slider shows the card's own images once more, so the page holds each of them once.
  const images = compare.closest('article').querySelectorAll('.arm'), slider = compare.querySelector('.slider');
  for (const name of [compare.dataset.before, compare.dataset.after]) {
    const image = [...images].find(part => part.dataset.arm === name).querySelector('img').cloneNode();
    slider.append(image);
  }
  slider.lastChild.className = 'over';
  slider.append(Object.assign(document.createElement('div'), {className: 'divider'}));
  compare.querySelector('input').addEventListener('input', event => slider.style.setProperty('--at', event.target.value + '%'));
}
// What is folded is printed too, but for the extras of each case.
let folded = [];
addEventListener('beforeprint', () => {
  folded = [...document.querySelectorAll('details.section:not([open])')];
  for (const part of folded) part.open = true;
});
addEventListener('afterprint', () => { for (const part of folded) part.open = false; });
