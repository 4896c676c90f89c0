// Translate the visitor's picture with a generator that export.py wrote; README.md says how to serve this page.
//
// A picture goes the way on which test.py sends it: turned as the camera was held, laid over white, resized to the size
// that the network was trained at, to [-1, 1], through the network, back to bytes, to its own size.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

const MOST_PIXELS = 32e6; // of a picture
const MOST_PIXELS_WHOLE = 2 ** 18; // of a picture that the network sees whole, since the file records no size
ort.env.wasm.numThreads = 1; // more need SharedArrayBuffer, and so a server that sends special headers
ort.env.wasm.proxy = true; // in a worker: the page does not freeze meanwhile

const element = (id) => document.getElementById(id);
let generator = null; // {name, session, facts}

// ---------------------------------------------------------------------------------------------
// The model file

/** Yield [number, bytes] of each field of a protobuf message that has a length; throws where the bytes are no message. */
function* fields(bytes) {
  let at = 0;
  function number() {
    for (let value = 0, scale = 1; at < bytes.length; scale *= 128) { // no shifts: a length may pass 2**31
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

/** What export.py noted in a model: field 14 of its message holds keys and values; onnxruntime-web does not show them. */
function readFacts(model) {
  const facts = { channels: null, size: null, direction: null, run_name: null };
  const text = (bytes) => new TextDecoder().decode(bytes);
  for (const [number, entry] of fields(model)) {
    const { 1: key, 2: value } = number === 14 ? Object.fromEntries(fields(entry)) : {};
    if (text(key) in facts) facts[text(key)] = JSON.parse(text(value)); // what other tools note is left alone
  }
  return facts;
}

/** Open a model in onnxruntime-web; throws a sentence for the visitor where it is none, or none for this page. */
async function openGenerator(name, buffer) {
  try {
    const facts = readFacts(new Uint8Array(buffer)), { channels, size } = facts;
    if (channels === null) throw new Error("does not say its channels");
    if (channels !== 1 && channels !== 3) throw new Error(`has ${channels} channels, the page shows 1 or 3`);
    const sides = size ?? [1, 1]; // null where the weights came from another project
    if (sides.length !== 2 || !sides.every((side) => Number.isInteger(side) && side > 0 && side <= 4096)) {
      throw new Error(`says it was trained at ${JSON.stringify(size)}; expected [height, width], each up to 4096 px`);
    }
    return { name, facts, session: await ort.InferenceSession.create(buffer) };
  } catch (error) {
    throw new Error(`${name}: not a model for this page: ${firstLine(error)}; choose a file that export.py wrote`);
  }
}

// ---------------------------------------------------------------------------------------------
// Pictures: {data: bytes R G B A, width, height}

/** Decode a file into the canvas on the left, as the network will see it: over white, and grey for one channel. */
async function readPicture(file, channels) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }); // as pillow: no colour profile applied
  } catch {
    throw new Error(`${file.name}: no picture that this browser can read; choose a PNG, JPEG or WebP file`);
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    throw new Error(`${file.name}: ${width}×${height} px are too large; choose one of ${MOST_PIXELS / 1e6} megapixels at most`);
  }
  const canvas = Object.assign(element("before"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const picture = context.getImageData(0, 0, width, height), { data } = picture;
  for (let i = 0; channels === 1 && i < data.length; i += 4) {
    data.fill((19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2] + 32768) >> 16, i, i + 3); // pillow's "L"
  }
  context.putImageData(picture, 0, 0);
  return picture;
}

/** Pillow's bicubic kernel, a = -0.5. */
function bicubic(x) {
  x = Math.abs(x);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

/** Resize the rows of a picture to `length` px and swap its axes: (width, height) → (height, length). */
function resizeRows({ data, width, height }, length) {
  const scale = width / length, stretch = Math.max(scale, 1); // shrinking averages over all pixels, as pillow does
  const out = new Uint8ClampedArray(4 * height * length); // rounds and clamps
  for (let i = 0; i < length; i++) {
    const centre = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const last = Math.min(width, Math.trunc(centre + 2 * stretch + 0.5));
    const weights = Array.from({ length: last - first }, (_, j) => bicubic((first + j + 0.5 - centre) / stretch));
    const total = weights.reduce((sum, weight) => sum + weight, 0);
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 4; c++) {
        let sum = 0;
        for (let j = 0, at = 4 * (y * width + first) + c; j < weights.length; j++, at += 4) sum += weights[j] * data[at];
        out[4 * (i * height + y) + c] = sum / total;
      }
    }
  }
  return { data: out, width: height, height: length };
}

/** Resize a picture as pillow does, which made the pictures of the training; what browsers do differs among them. */
function resize(picture, width, height) {
  return resizeRows(resizeRows(picture, width), height);
}

/** A picture → (1, channels, H, W) in [-1, 1]. */
function toTensor({ data, width, height }, channels) {
  const area = width * height, values = new Float32Array(channels * area);
  for (let i = 0; i < values.length; i++) values[i] = data[4 * (i % area) + Math.floor(i / area)] / 127.5 - 1;
  return new ort.Tensor("float32", values, [1, channels, height, width]);
}

/** (1, channels, H, W) in [-1, 1] → a picture. */
function toPicture({ data: values, dims: [, channels, height, width] }) {
  const area = width * height, data = new Uint8ClampedArray(4 * area).fill(255); // rounds and clamps
  for (let i = 0; i < 3 * area; i++) {
    data[4 * (i % area) + Math.floor(i / area)] = (values[i % (channels * area)] + 1) * 127.5;
  }
  return { data, width, height };
}

// ---------------------------------------------------------------------------------------------
// The page

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0];
}

/** Show a picture on the right and offer it for download. */
async function showAnswer({ data, width, height }, name) {
  const canvas = Object.assign(element("after"), { width, height });
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve));
  URL.revokeObjectURL(element("download").href);
  Object.assign(element("download"), { href: URL.createObjectURL(blob), download: name });
  element("pictures").hidden = false;
}

/** Translate the chosen picture; returns what to tell the visitor. */
async function translate() {
  if (!generator) throw new Error("no generator yet: choose one that export.py wrote");
  const { session, facts, name } = generator, [file] = element("picture").files;
  if (!file) return "choose a picture";
  const picture = await readPicture(file, facts.channels);
  const [height, width] = facts.size ?? [picture.height, picture.width];
  if (!facts.size && width * height > MOST_PIXELS_WHOLE) {
    throw new Error(`${file.name}: too large for ${name}, which records no size; choose one of ${MOST_PIXELS_WHOLE} px at most`);
  }
  const seen = toTensor(resize(picture, width, height), facts.channels), start = performance.now();
  let answer;
  try {
    answer = (await session.run({ [session.inputNames[0]]: seen }))[session.outputNames[0]];
  } catch (error) {
    throw new Error(`${name}: could not translate ${width}×${height} px (${firstLine(error)})`);
  }
  const milliseconds = Math.round(performance.now() - start);
  const stem = file.name.replace(/\.\w+$/, "");
  await showAnswer(resize(toPicture(answer), picture.width, picture.height), `${stem}_${facts.direction}.png`);
  return `translated in ${milliseconds} ms, at ${width}×${height} px`;
}

/** Put a generator in the place of the one before, and say what it is. */
async function load(name, buffer) {
  await generator?.session.release();
  generator = null;
  element("about").textContent = "";
  generator = await openGenerator(name, buffer);
  const { direction, run_name, size } = generator.facts;
  const words = [direction, run_name && `of ${run_name}`, size && `trained at ${size[1]}×${size[0]} px`];
  element("about").textContent = `${name}: ${words.filter(Boolean).join(", ")}`;
}

/** Carry out one thing at a time; its last words, or why it failed, go to the visitor. */
async function act(work) {
  element("inputs").disabled = true;
  element("message").className = "";
  element("message").textContent = "working …";
  try {
    element("message").textContent = await work();
  } catch (error) {
    element("pictures").hidden = true; // lest an older answer passes for this one
    element("message").className = "error";
    element("message").textContent = firstLine(error);
  }
  element("inputs").disabled = false;
}

element("picture").addEventListener("change", () => act(translate));
element("model").addEventListener("change", ({ target: { files: [file] } }) => {
  if (!file) return;
  act(async () => {
    await load(file.name, await file.arrayBuffer());
    return translate();
  });
});
act(async () => {
  const response = await fetch("model.onnx");
  if (!response.ok) throw new Error("there is no model.onnx beside this page: choose a generator that export.py wrote");
  await load("model.onnx", await response.arrayBuffer());
  return translate();
});
