// Building elements from plain values. Text is always text, never markup.

const SVG = "http://www.w3.org/2000/svg";

export function find(selector) {
  return document.querySelector(selector);
}

export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function shape(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// Sets a custom property of CSS, which a style attribute in markup may not.
export function withProperty(node, name, value) {
  if (value) node.style.setProperty(name, value);
  return node;
}
