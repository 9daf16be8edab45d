const pick = id => document.getElementById(id), cards = [...document.querySelectorAll('article')];
const shown = card => card.querySelector('section:not([hidden])');
function update() {
  const group = pick('group').value, arm = pick('arm').value, sign = pick('order').value === 'best' ? -1 : 1;
  let count = 0;
  for (const card of cards) {
    let has = false;
    for (const part of card.querySelectorAll('section')) {
      part.hidden = part.dataset.arm !== arm; has = has || !part.hidden;
    }
    card.hidden = !has || (group !== '' && card.dataset.group !== group); count += !card.hidden;
  }
  const gain = card => shown(card) ? Number(shown(card).dataset.gain) : 0;
  pick('cases').append(...[...cards].sort((a, b) => sign * (gain(a) - gain(b))));
  pick('count').textContent = count + ' shown';
}
for (const id of ['group', 'arm', 'order']) pick(id).addEventListener('change', update);
for (const range of document.querySelectorAll('input[type=range]')) range.addEventListener('input', () => {
  range.parentElement.querySelector('.over').style.clipPath = 'inset(0 0 0 ' + range.value + '%)';
});
update();
