// Translate the visitor's image or camera with a generator exported by export.py. README.md: how to serve this page.
//
// Images are processed as in test.py: rotated by their EXIF orientation, in sRGB, transparency over white, resized to the
// training size, scaled to [-1, 1], translated, converted back to bytes, and resized to their own size.

import { Camera } from "./camera.js";
import { draw, isOneColour, networkSize, readImage, resize, toPng } from "./images.js";

const MOST_PIXELS_WHOLE = 2 ** 18; // per image, if the model file records no training size
const SIDES = [128, 192, 256]; // px, sizes of camera frames besides the training size
const UPDATE_INTERVAL = 500; // ms between two updates of the frames per second

const element = (id) => document.getElementById(id);
const device = new URLSearchParams(location.search).get("device"); // "wasm", or "webgpu" even in software; null: chosen automatically
let generator = null; // {name, facts}
let updated = 0; // when the frames per second were last shown

// ---------------------------------------------------------------------------------------------
// The worker that runs the network

const worker = new Worker("worker.js", { type: "module" });
const waiting = new Map(); // resolve and reject of each request, by id
let asked = 0;
let workerError = null; // why the worker does not run; it then answers no requests

worker.onmessage = ({ data: { id, error, ...result } }) => {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(result);
};

worker.onerror = () => {
  workerError = new Error("onnxruntime-web could not be loaded: run npm ci and serve this folder as described in README.md");
  for (const { reject } of waiting.values()) reject(workerError);
};

/** Send a request to the worker; transfer: buffers that are moved, not copied. */
async function ask(task, what, transfer = []) {
  if (workerError) throw workerError;
  const id = asked++;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, task, ...what }, transfer);
  });
}

/** Translate an image at its size, consuming its data. Returns an image with device, threads and milliseconds. */
async function translate({ data, width, height }) {
  const { pixels, ...facts } = await ask("translate", { pixels: data, width, height }, [data.buffer]);
  return { data: pixels, width, height, ...facts };
}

// ---------------------------------------------------------------------------------------------
// One image

/** Translate the chosen image; returns a message for the visitor. */
async function translateImage() {
  if (!generator) throw new Error("no generator yet: choose one exported with export.py");
  const { facts, name } = generator, [file] = element("image").files;
  if (!file) return "choose an image, or start the camera";
  element("images").hidden = true; // so that an older result is not mistaken for this one
  const image = await readImage(file, facts.channels, element("before"));
  if (isOneColour(image)) {
    throw new Error(`${file.name}: one colour alone, of which normalisation would enlarge rounding errors; use another`);
  }
  const [height, width] = networkSize(image, facts);
  if ((!facts.size || ["crop", "none"].includes(facts.preprocess)) && width * height > MOST_PIXELS_WHOLE) {
    throw new Error(`${file.name}: too large for ${name}, which translates images at their own size; choose one of at most ${MOST_PIXELS_WHOLE} px`);
  }
  let answer;
  try {
    answer = await translate(resize(image, width, height, facts.resample));
  } catch (error) {
    throw new Error(`${name}: could not translate ${width}×${height} px (${firstLine(error)})`);
  }
  draw(element("after"), resize(answer, image.width, image.height));
  URL.revokeObjectURL(element("download").href);
  const download = `${file.name.replace(/\.\w+$/, "")}_${facts.direction}.png`;
  Object.assign(element("download"), { href: URL.createObjectURL(await toPng(element("after"))), download });
  element("one").hidden = false;
  element("images").hidden = false;
  return `translated in ${Math.round(answer.milliseconds)} ms, at ${width}×${height} px`;
}

// ---------------------------------------------------------------------------------------------
// The camera

const camera = new Camera({
  before: element("before"),
  after: element("after"),
  translate,
  size: () => JSON.parse(element("side").value),
  onFrame: showLive,
  onEnd: (error) => {
    showCamera();
    say(firstLine(error), true);
  },
});

/** Show the frames per second and the device. */
function showLive({ device: where, threads, width, height }, rate) {
  element("images").hidden = false;
  element("one").hidden = true;
  element("live").hidden = false;
  if (performance.now() - updated < UPDATE_INTERVAL) return;
  updated = performance.now();
  const words = [`${rate.toFixed(1)} frames a second`, `${width}×${height} px`, where];
  if (threads > 1) words.push(`${threads} threads`);
  if (threads === 1) words.push("one thread");
  if (threads === 1 && !crossOriginIsolated) words.push("since this page came without the headers that serve.py sends");
  element("speed").textContent = words.join(", ");
}

/** Update the button and the images when the camera is switched on or off. */
function showCamera() {
  element("camera").textContent = camera.on ? "Stop the camera" : "Start the camera";
  element("live").hidden = true;
  element("images").hidden = true;
}

async function switchCamera() {
  if (camera.on) {
    camera.stop();
    showCamera();
    return "the camera is off";
  }
  if (!generator) throw new Error("no generator yet: choose one exported with export.py");
  await camera.start();
  showCamera();
  return "the camera is on";
}

/** Offer sizes for camera frames: the training size, and others with the same aspect ratio. */
function offerSides({ size, smallest_side: least }) {
  const [height, width] = size ?? [1, 1];
  const options = size ? [new Option(`${width}×${height} px, as trained`, JSON.stringify({ width, height }))] : [];
  for (const side of SIDES) {
    const scaled = [width, height].map((length) => Math.max(least, Math.round((side * length) / Math.max(width, height))));
    const value = JSON.stringify({ width: scaled[0], height: scaled[1] });
    if (options[0]?.value !== value) options.push(new Option(`${scaled[0]}×${scaled[1]} px`, value));
  }
  const chosen = element("side").value;
  element("side").replaceChildren(...options);
  if (options.some(({ value }) => value === chosen)) element("side").value = chosen;
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000); // the browser may still be writing
  return `saved ${name}`;
}

async function saveStill() {
  return save(await toPng(camera.still()), "camera.png");
}

async function saveFilm() {
  const film = await camera.film();
  return save(film, `camera.${film.type.split("/")[1]}`);
}

// ---------------------------------------------------------------------------------------------
// The page

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0];
}

function say(words, isError = false) {
  element("message").className = isError ? "error" : "";
  element("message").textContent = words;
}

/** Run one action at a time and show its message, or its error, to the visitor. */
async function act(work) {
  for (const id of ["inputs", "still", "film"]) element(id).disabled = true;
  say("working …");
  try {
    say(await work());
  } catch (error) {
    say(firstLine(error), true);
  }
  for (const id of ["inputs", "still", "film"]) element(id).disabled = false;
}

/** Load a generator and describe it; if that fails, the one in use is kept. */
async function load(name, buffer) {
  const { facts } = await ask("load", { name, buffer, device }, [buffer]);
  generator = { name, facts };
  const { direction, run_name, size } = facts;
  const words = [direction, run_name && `of ${run_name}`, size && `trained at ${size[1]}×${size[0]} px`];
  element("about").textContent = `${name}: ${words.filter(Boolean).join(", ")}`;
  offerSides(facts);
}

/** Translate the chosen image with a new generator, unless the camera is on. */
function refresh() {
  return camera.on ? "the camera is on" : translateImage();
}

async function openModel(file) {
  try {
    await load(file.name, await file.arrayBuffer());
  } finally {
    element("model").value = ""; // so that the same file can be chosen again; the one in use is shown below
  }
  return refresh();
}

function openImage() {
  if (camera.on) camera.stop();
  showCamera();
  return translateImage();
}

/** Open a dropped file: a model if it is named .onnx, otherwise an image. */
function openDropped(file) {
  if (/\.onnx$/i.test(file.name)) return openModel(file);
  if (!file.type.startsWith("image/")) {
    throw new Error(`${file.name}: neither an image nor a generator; drop an image, or an .onnx file exported with export.py`);
  }
  const files = new DataTransfer();
  files.items.add(file);
  element("image").files = files.files;
  return openImage();
}

element("image").addEventListener("change", () => act(openImage));
element("model").addEventListener("change", ({ target: { files: [file] } }) => file && act(() => openModel(file)));
element("camera").addEventListener("click", () => act(switchCamera));
element("still").addEventListener("click", () => act(saveStill));
element("film").addEventListener("click", () => act(saveFilm));
for (const event of ["dragover", "dragleave", "drop"]) {
  addEventListener(event, (drag) => {
    drag.preventDefault();
    document.body.classList.toggle("over", event === "dragover");
    const [file] = event === "drop" ? drag.dataTransfer.files : [];
    if (file && !element("inputs").disabled) act(async () => openDropped(file));
  });
}
act(async () => {
  const response = await fetch("model.onnx");
  if (!response.ok) throw new Error("there is no model.onnx beside this page: choose a generator exported with export.py");
  await load("model.onnx", await response.arrayBuffer());
  return refresh();
});
