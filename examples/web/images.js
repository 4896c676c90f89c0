// Images are {data: RGBA bytes, width, height}. They are resized as Pillow does, in every browser.

import { mayHaveMoreThan8Bits, takeOrientation } from "./headers.js";

const MOST_PIXELS = 32e6; // per image

/** Where the axes of an image of a width and height go that is turned upright, by EXIF orientation: see setTransform. */
const TURNS = {
  2: (w) => [-1, 0, 0, 1, w, 0],
  3: (w, h) => [-1, 0, 0, -1, w, h],
  4: (w, h) => [1, 0, 0, -1, 0, h],
  5: () => [0, 1, 1, 0, 0, 0],
  6: (w, h) => [0, 1, -1, 0, h, 0],
  7: (w, h) => [0, -1, -1, 0, h, w],
  8: (w) => [0, -1, 1, 0, 0, w],
};

/** Decode a file upright in sRGB; returns the bitmap and the orientation that it still has. */
async function decode(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (mayHaveMoreThan8Bits(bytes)) {
    throw new Error(`${file.name}: may have more than 8 bits, which need a value range; convert it to a PNG of 8 bits, or use test.py`);
  }
  const orientation = takeOrientation(bytes);
  try {
    const blob = new Blob([bytes], { type: file.type });
    const bitmap = await createImageBitmap(blob, { premultiplyAlpha: "none" }); // premultiplied, it is rounded once more
    return [bitmap, orientation];
  } catch {
    throw new Error(`${file.name}: no image that this browser can read; choose a PNG, JPEG or WebP file`);
  }
}

/** Read a file into a canvas as the network's input: upright, transparency over white, grey for one channel. */
export async function readImage(file, channels, canvas) {
  const [bitmap, orientation] = await decode(file), { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    throw new Error(`${file.name}: ${width}×${height} px are too large; choose one of at most ${MOST_PIXELS / 1e6} megapixels`);
  }
  Object.assign(canvas, orientation < 5 ? { width, height } : { width: height, height: width });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  if (orientation > 1) context.setTransform(...TURNS[orientation](width, height));
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const image = context.getImageData(0, 0, canvas.width, canvas.height), { data } = image;
  for (let i = 0; channels === 1 && i < data.length; i += 4) {
    data.fill((19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2] + 32768) >> 16, i, i + 3); // Pillow's "L"
  }
  context.putImageData(image, 0, 0);
  return image;
}

/** Pillow's bicubic kernel, a = -0.5. */
function bicubic(x) {
  x = Math.abs(x);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

/** Resize the rows of an opaque image to `length` px and swap its axes: (width, height) → (height, length). */
function resizeRows({ data, width, height }, length, isNearest) {
  const scale = width / length, stretch = Math.max(scale, 1); // when shrinking, average over all pixels, as Pillow does
  const out = new Uint8ClampedArray(4 * height * length).fill(255);
  for (let i = 0; i < length; i++) {
    const centre = (i + 0.5) * scale;
    const first = isNearest ? Math.floor(centre) : Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const last = isNearest ? first + 1 : Math.min(width, Math.trunc(centre + 2 * stretch + 0.5));
    const weight = (j) => (isNearest ? 1 : bicubic((first + j - centre + 0.5) / stretch));
    const kernel = Array.from({ length: last - first }, (_, j) => weight(j));
    const total = kernel.reduce((sum, weight) => sum + weight, 0);
    // whole multiples of 2**-22, as Pillow's, so that halves are rounded alike
    const weights = Int32Array.from(kernel, (weight) => Math.trunc((weight / total) * 2 ** 22 + (weight < 0 ? -0.5 : 0.5)));
    for (let y = 0; y < height; y++) {
      for (let c = 0; c < 3; c++) {
        let sum = 2 ** 21;
        for (let j = 0, at = 4 * (y * width + first) + c; j < weights.length; j++, at += 4) sum += weights[j] * data[at];
        out[4 * (i * height + y) + c] = sum >> 22; // the array clamps
      }
    }
  }
  return { data: out, width: height, height: length };
}

/** Resize an opaque image as Pillow does in training; the browsers' own resizing differs between them. */
export function resize(image, width, height, resample = "bicubic") {
  const isNearest = resample === "nearest"; // of label images
  return resizeRows(resizeRows(image, width, isNearest), height, isNearest);
}

/** Show an image in a canvas. */
export function draw(canvas, { data, width, height }) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(new ImageData(data, width, height), 0, 0);
}

/** Convert a canvas to a PNG. */
export function toPng(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve));
}

/** Whether all pixels of an image are equal. */
export function isOneColour({ data }) {
  return new Uint32Array(data.buffer).every((pixel, i, pixels) => pixel === pixels[0]);
}

/** Round halves to even, as Python does. */
function roundToEven(x) {
  const rounded = Math.round(x);
  return rounded - x === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** The size at which a network gets an image, as in test.py: [height, width]. */
export function networkSize({ width, height }, { size, preprocess }) {
  if (!size || preprocess === "crop") return [height, width];
  const factors = [size[0] / height, size[1] / width];
  const kind = String(preprocess).replace(/_and_crop$/, ""), isWhole = kind === preprocess; // in training, too
  let factor = { none: 1, scale_width: factors[1], scale_shortside: Math.max(...factors) }[kind];
  if (!factor) return size; // the image is stretched
  if (isWhole) factor = Math.max(factor, Math.min(64, ...size) / Math.min(height, width));
  const sides = [height, width].map((side) => Math.max(1, roundToEven(factor * side)));
  return isWhole ? sides.map((side) => 4 * Math.floor((side + 2) / 4)) : sides;
}
