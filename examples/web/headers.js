// What the bytes of an image file say that browsers ignore, each in its own way.

const text = (bytes, at, length) => String.fromCharCode(...bytes.subarray(at, at + length));

/** Whether a file is a grey PNG of 16 bits, or a TIFF or JPEG 2000 file: test.py reads more than 8 bits by a value range. */
export function mayHaveMoreThan8Bits(bytes) {
  const start = text(bytes, 0, 12);
  if (start.startsWith("\x89PNG")) return bytes[24] === 16 && bytes[25] === 0; // bit depth, colour type
  return /^(II\*\0|MM\0\*|\xff\x4f\xff\x51|\0\0\0\x0cjP  )/.test(start);
}

/**
 * Return the EXIF orientation (1 to 8) of a WebP file, and set it to 1, so that no browser turns the image.
 *
 * Chromium turns JPEG, PNG and AVIF images by theirs, but not WebP. Of other and of damaged files 1 is returned.
 */
export function takeOrientation(bytes) {
  if (text(bytes, 0, 4) !== "RIFF" || text(bytes, 8, 4) !== "WEBP") return 1;
  const view = new DataView(bytes.buffer);
  try {
    for (let at = 12; at < bytes.length; ) {
      const length = view.getUint32(at + 4, true);
      if (text(bytes, at, 4) === "EXIF") return takeFromTiff(view, at + (text(bytes, at + 8, 4) === "Exif" ? 14 : 8));
      at += 8 + length + (length % 2);
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it ends too early
  }
  return 1;
}

/** The same in EXIF data, which is a TIFF file without an image; start: its first byte in `view`. */
function takeFromTiff(view, start) {
  const isLittle = view.getUint8(start) === 0x49; // "II"; else "MM"
  const directory = start + view.getUint32(start + 4, isLittle);
  for (let i = 0; i < view.getUint16(directory, isLittle); i++) {
    const entry = directory + 2 + 12 * i; // tag, type, count, value
    if (view.getUint16(entry, isLittle) !== 0x0112) continue;
    const orientation = view.getUint16(entry + 8, isLittle);
    view.setUint16(entry + 8, 1, isLittle);
    return orientation >= 1 && orientation <= 8 ? orientation : 1;
  }
  return 1;
}
