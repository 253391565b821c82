// Of a page in a browser (tests/e2e/test_screens.py): what is wrong on it, as its reader meets it, and how
// many parts of each kind are side by side.
({problems: (() => {
  const wrong = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth) wrong.push(`wider than the window: ${root.scrollWidth}`);
  const number = text => {
    const [r, g, b, a = 1] = text.match(/[\d.]+/g).map(Number);
    return {rgb: [r, g, b], a};
  };
  const light = ({rgb}) => rgb
    .map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = e => {
    for (; e; e = e.parentElement) {
      const found = number(getComputedStyle(e).backgroundColor);
      if (found.a === 1) return found;
    }
    return {rgb: [255, 255, 255], a: 1};
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !e.checkVisibility()) continue;
    if (e.closest("figure svg, script, style, noscript, .highlight")) continue;
    const style = getComputedStyle(e), px = parseFloat(style.fontSize);
    const ink = number(e.closest("svg") ? style.fill : style.color);
    const [a, b] = [light(ink), light(paper(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ink.a === 1 && ratio < 4.5)
      wrong.push(`contrast ${ratio.toFixed(1)}: ${e.className || e.tagName} ${e.textContent.slice(0, 30)}`);
    if (px < 8) wrong.push(`letters of ${px} px: ${e.textContent.slice(0, 30)}`);
  }
  for (const e of document.querySelectorAll("main *, article *")) {
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
    if (scrolls && e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0 && !e.querySelector("[tabindex]"))
      wrong.push(`scrolls, not by keys: ${e.tagName} ${e.className}`);
  }
  for (const a of document.querySelectorAll("a[href^='#']"))
    if (!document.getElementById(decodeURIComponent(a.hash.slice(1)))) wrong.push(`leads to no ${a.hash}`);
  for (const image of document.querySelectorAll("img"))
    if (!image.complete || !image.naturalWidth) wrong.push(`no picture: ${image.src.slice(0, 60)}`);
  return wrong;
})(),
  columns: (() => Object.fromEntries([".facts", ".charts", ".cards"].map(name => {
  const tops = [...document.querySelectorAll(`${name}`)].map(e => {
    const rows = [...e.children].map(child => child.getBoundingClientRect().top);
    return rows.filter(top => top === rows[0]).length;
  });
  return [name, Math.max(0, ...tops)];
})))()})
