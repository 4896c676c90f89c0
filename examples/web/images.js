// Images are {data: RGBA bytes, width, height}. They are resized as Pillow does, in every browser.

const MOST_PIXELS = 32e6; // per image

/** Decode a file into a canvas as the network's input: transparency over white, grey for one channel. */
export async function readImage(file, channels, canvas) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }); // as Pillow: ignore colour profiles
  } catch {
    throw new Error(`${file.name}: no image that this browser can read; choose a PNG, JPEG or WebP file`);
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS) {
    throw new Error(`${file.name}: ${width}×${height} px are too large; choose one of at most ${MOST_PIXELS / 1e6} megapixels`);
  }
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const image = context.getImageData(0, 0, width, height), { data } = image;
  for (let i = 0; channels === 1 && i < data.length; i += 4) {
    data.fill((19595 * data[i] + 38470 * data[i + 1] + 7471 * data[i + 2] + 32768) >> 16, i, i + 3); // Pillow's "L"
  }
  context.putImageData(image, 0, 0);
  return image;
}

/** Pillow's bicubic kernel, a = -0.5. */
function bicubic(x) {
  x = Math.abs(x);
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

/** Resize the rows of an image to `length` px and swap its axes: (width, height) → (height, length). */
function resizeRows({ data, width, height }, length, isNearest) {
  const scale = width / length, stretch = Math.max(scale, 1); // when shrinking, average over all pixels, as Pillow does
  const out = new Uint8ClampedArray(4 * height * length); // rounds and clamps
  for (let i = 0; i < length; i++) {
    const centre = (i + 0.5) * scale;
    const first = isNearest ? Math.floor(centre) : Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const last = isNearest ? first + 1 : Math.min(width, Math.trunc(centre + 2 * stretch + 0.5));
    const weight = (j) => (isNearest ? 1 : bicubic((first + j + 0.5 - centre) / stretch));
    const weights = Array.from({ length: last - first }, (_, j) => weight(j));
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

/** Resize an image as Pillow does in training; the browsers' own resizing differs between them. */
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

/** The size at which a network gets an image, as in test.py: [height, width]. */
export function networkSize({ width, height }, { size, preprocess }) {
  if (!size || preprocess === "crop") return [height, width];
  const factors = [size[0] / height, size[1] / width];
  const kind = String(preprocess).replace(/_and_crop$/, ""), isWhole = kind === preprocess; // in training, too
  let factor = { none: 1, scale_width: factors[1], scale_shortside: Math.max(...factors) }[kind];
  if (!factor) return size; // the image is stretched
  if (isWhole) factor = Math.max(factor, Math.min(64, ...size) / Math.min(height, width));
  const sides = [height, width].map((side) => Math.max(1, Math.round(factor * side)));
  return isWhole ? sides.map((side) => 4 * Math.floor((side + 2) / 4)) : sides;
}
