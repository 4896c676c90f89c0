// Run a generator in a worker, so that the page never freezes: on WebGPU if its outputs equal those of WebAssembly.
//
// The page sends {task: "load", name, buffer, device} or {task: "translate", pixels, width, height}, each with an id,
// and gets {id, ...} back, or {id, error}. Pixels are RGBA bytes; their buffer is moved to here and back, not copied.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";
import { readFacts } from "./model.js";

const MOST_THREADS = 4;
const TOLERANCE = 2 / 127.5; // between the outputs of WebGPU and WebAssembly in [-1, 1]: two levels of 255
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;

let generator = null; // {facts, wasm: a session, gpu: a session or null, checked: sizes at which both agree}
let values = new Float32Array(0); // the input of the network, reused for all frames

/** Load the WebGPU build of the runtime; null without a graphics card, since in software WebAssembly is faster. */
async function loadGpuRuntime(device) {
  const adapter = device === "wasm" ? null : await navigator.gpu?.requestAdapter().catch(() => null);
  if (!adapter || (adapter.info?.isFallbackAdapter && device !== "webgpu")) return null;
  const runtime = await import("./node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs");
  runtime.env.wasm.numThreads = 1;
  return runtime;
}

/** Open a session on WebGPU; null if there is no WebGPU or it rejects the model. */
async function openOnGpu(buffer, device) {
  try {
    const runtime = await loadGpuRuntime(device);
    const options = { executionProviders: ["webgpu"], logSeverityLevel: 3 }; // no warnings about shapes that are computed on the CPU
    return await runtime?.InferenceSession.create(buffer, options) ?? null;
  } catch (error) {
    console.warn(`WebGPU is not used: ${error.message}`);
    return null;
  }
}

/** Load a model and check that it runs; if that fails, the one in use is kept. */
async function load({ name, buffer, device }) {
  let wasm = null;
  try {
    const facts = readFacts(new Uint8Array(buffer));
    wasm = await ort.InferenceSession.create(buffer);
    const side = facts.smallest_side, noise = Float32Array.from({ length: facts.channels * side ** 2 }, (_, i) => Math.sin(i));
    await run(wasm, noise, [1, facts.channels, side, side]);
    const gpu = await openOnGpu(buffer, device);
    const old = generator;
    generator = { facts, wasm, gpu, checked: new Set() };
    await old?.wasm.release();
    await old?.gpu?.release();
    return { facts };
  } catch (error) {
    if (wasm && wasm !== generator?.wasm) await wasm.release();
    throw new Error(`${name}: not a model for this page: ${error.message.split("\n")[0]}; choose a file exported with export.py`);
  }
}

/** Run a session on values (1, C, H, W) in [-1, 1]; returns values of the same shape. */
async function run(session, input, dims) {
  const tensor = new ort.Tensor("float32", input, dims);
  const output = (await session.run({ [session.inputNames[0]]: tensor }))[session.outputNames[0]];
  if (output.type !== "float32" || output.dims.join() !== dims.join()) {
    throw new Error(`outputs ${output.type} ${output.dims.join("×")} for float32 ${dims.join("×")}`);
  }
  return output.data;
}

/** Run on WebGPU; if that fails, or its output differs at a new size, use WebAssembly from then on. */
async function runWhereItWorks(input, dims) {
  const { gpu, wasm, checked } = generator;
  if (!gpu) return run(wasm, input, dims);
  try {
    const output = await run(gpu, input, dims);
    if (checked.has(dims.join())) return output;
    const expected = await run(wasm, input, dims);
    if (!output.every((value, i) => Math.abs(value - expected[i]) <= TOLERANCE)) {
      throw new Error("its outputs differ from those of WebAssembly");
    }
    checked.add(dims.join());
    return output;
  } catch (error) {
    console.warn(`WebGPU is not used: ${error.message}`);
    generator.gpu = null;
    return run(wasm, input, dims);
  }
}

/** Write RGBA bytes into `values`, as planes in [-1, 1]; one channel: Pillow's "L". */
function fillValues(pixels, channels) {
  const area = pixels.length / 4;
  if (values.length !== channels * area) values = new Float32Array(channels * area);
  for (let i = 0, at = 0; i < area; i++, at += 4) {
    if (channels === 1) {
      values[i] = ((19595 * pixels[at] + 38470 * pixels[at + 1] + 7471 * pixels[at + 2] + 32768) >> 16) / 127.5 - 1;
    } else {
      for (let c = 0; c < 3; c++) values[c * area + i] = pixels[at + c] / 127.5 - 1;
    }
  }
}

/** Write planes in [-1, 1] into `pixels`, as RGBA bytes; the array rounds and clamps. */
function fillPixels(pixels, output, channels) {
  const area = pixels.length / 4;
  for (let i = 0, at = 0; i < area; i++, at += 4) {
    for (let c = 0; c < 3; c++) pixels[at + c] = (output[channels === 1 ? i : c * area + i] + 1) * 127.5;
    pixels[at + 3] = 255;
  }
}

/** Translate an image in place; returns also the device, the threads and the milliseconds. */
async function translate({ pixels, width, height }) {
  const { channels } = generator.facts, start = performance.now();
  fillValues(pixels, channels);
  const output = await runWhereItWorks(values, [1, channels, height, width]);
  fillPixels(pixels, output, channels);
  const device = generator.gpu ? "WebGPU" : "WebAssembly";
  return { pixels, device, threads: generator.gpu ? 0 : ort.env.wasm.numThreads, milliseconds: performance.now() - start };
}

const tasks = { load, translate };
let queue = Promise.resolve(); // a session runs one task at a time

self.onmessage = ({ data: { id, task, ...what } }) => {
  queue = queue.then(async () => {
    try {
      const result = await tasks[task](what);
      self.postMessage({ id, ...result }, result.pixels ? [result.pixels.buffer] : []);
    } catch (error) {
      self.postMessage({ id, error: error?.message ?? String(error) });
    }
  });
};
