// Read the metadata that export.py writes into an ONNX file; onnxruntime-web does not expose it.

/** Yield [number, bytes] of each length-delimited field of a protobuf message; throws if the bytes are not one. */
function* fields(bytes) {
  let at = 0;
  function number() {
    for (let value = 0, scale = 1; at < bytes.length; scale *= 128) { // not with shifts: a length may exceed 2**31
      value += (bytes[at] & 127) * scale;
      if (bytes[at++] < 128) return value;
    }
    throw new Error("no ONNX file, or a part of one");
  }
  while (at < bytes.length) {
    const tag = number(), kind = tag % 8;
    if (kind === 0) number();
    const length = kind === 2 ? number() : { 0: 0, 1: 8, 5: 4 }[kind];
    if (!(at + length <= bytes.length)) throw new Error("no ONNX file, or a part of one");
    if (kind === 2) yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
    at += length;
  }
}

const PREPROCESS = [null, "resize_and_crop", "crop", "scale_width", "scale_width_and_crop", "scale_shortside"]; // null: older files
PREPROCESS.push("scale_shortside_and_crop", "none");

/** Whether `size` is [height, width], or null, as for weights of other projects. */
function isSize(size) {
  return size === null || (size.length === 2 && size.every((side) => Number.isInteger(side) && side > 0 && side <= 4096));
}

/**
 * Read and check the metadata of a model: field 14 of the ONNX message holds keys and values.
 *
 * model:   the bytes of an .onnx file
 * returns: channels (1 or 3), smallest_side in px, size ([height, width] in px, or null), preprocess, resample, direction, run_name, range
 * throws:  an error that says what is wrong with the file
 */
export function readFacts(model) {
  const facts = { channels: null, smallest_side: 64, size: undefined, preprocess: null, resample: "bicubic" };
  Object.assign(facts, { direction: null, run_name: null, range: [-1, 1] });
  const text = (bytes) => new TextDecoder().decode(bytes);
  for (const [number, entry] of fields(model)) {
    const { 1: key, 2: value } = number === 14 ? Object.fromEntries(fields(entry)) : {};
    if (text(key) in facts) facts[text(key)] = JSON.parse(text(value)); // keys of other tools are ignored
  }
  const { channels, size, smallest_side, preprocess, range } = facts;
  if (channels === null) throw new Error("does not say its channels");
  if (channels !== 1 && channels !== 3) throw new Error(`has ${channels} channels, the page shows 1 or 3`);
  if (size === undefined) throw new Error("does not say its size");
  if (!PREPROCESS.includes(preprocess)) throw new Error(`says preprocess ${JSON.stringify(preprocess)}, which the page cannot do`);
  if (JSON.stringify(range) !== "[-1,1]") throw new Error(`takes values in ${JSON.stringify(range)}, the page has them in [-1,1]`);
  if (!isSize(size)) {
    throw new Error(`says it was trained at ${JSON.stringify(size)}; expected [height, width], each up to 4096 px`);
  }
  if (!isSize([smallest_side, smallest_side])) throw new Error(`says it needs ${JSON.stringify(smallest_side)} px a side`);
  return facts;
}
