// Editing and exporting masks as the server sends them: { bbox, segmentation, score }, polygons as x, y, x, y, ...
// No function changes its arguments. An edited mask has no score, because the model did not see it.

const MIN_POINTS = 3;

// Returns the polygons of a mask as lists of [x, y]; its box, if it has none.
export function ringsOf({ bbox: [x, y, width, height], segmentation }) {
  if (!segmentation.length) return [[[x, y], [x + width, y], [x + width, y + height], [x, y + height]]];
  return segmentation.map((ring) => Array.from({ length: ring.length / 2 }, (_, i) => [ring[2 * i], ring[2 * i + 1]]));
}

export function movePoint(mask, { ring, index }, point) {
  return edited(ringsOf(mask).map((points, i) => (i === ring ? points.with(index, point) : points)));
}

// Adds a point between the points `index` and `index + 1`.
export function insertPoint(mask, { ring, index }, point) {
  return edited(ringsOf(mask).map((points, i) => (i === ring ? points.toSpliced(index + 1, 0, point) : points)));
}

// Deletes a point; a polygon of three goes with it. Returns null if nothing is left.
export function deletePoint(mask, { ring, index }) {
  const rings = ringsOf(mask).map((points, i) => (i === ring ? points.toSpliced(index, 1) : points));
  const left = rings.filter((points) => points.length >= MIN_POINTS);
  return left.length ? edited(left) : null;
}

function edited(rings) {
  const points = rings.flat();
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const [x, y] = [Math.min(...xs), Math.min(...ys)];
  const bbox = [x, y, Math.max(...xs) - x, Math.max(...ys) - y].map(rounded);
  return { bbox, segmentation: rings.map((ring) => ring.flat().map(rounded)) };
}

export function rounded(value) {
  return Math.round(value * 100) / 100;
}

// Returns a COCO file of one image; all objects are of one class.
export function toCoco(masks, { name, width, height }) {
  const annotations = masks.map(({ bbox, segmentation }, i) => {
    const area = rounded(ringsOf({ bbox, segmentation }).map(areaOf).reduce((sum, each) => sum + each, 0));
    return { id: i + 1, image_id: 1, category_id: 1, bbox, segmentation, area, iscrowd: 0 };
  });
  return { images: [{ id: 1, file_name: name, width, height }], annotations, categories: [{ id: 1, name: "object" }] };
}

function areaOf(ring) {
  const crosses = ring.map(([x, y], i) => {
    const [nextX, nextY] = ring[(i + 1) % ring.length];
    return x * nextY - nextX * y;
  });
  return Math.abs(crosses.reduce((sum, each) => sum + each, 0)) / 2;
}
