// The camera: mirrors its frames, translates them one at a time, and keeps the last two seconds of both.

import { draw } from "./images.js";

const KEPT = 2000; // ms of frames that can be saved
const FILM_HEIGHT = 256; // px, approximately; smaller films are tiny in players
const LAST = 100; // ms that a film shows its last frame
const FORMATS = ["video/webm;codecs=vp8", "video/webm", "video/mp4"]; // the fastest first; the last for Safari
const REASONS = {
  NotAllowedError: "the camera was refused; allow it in the address bar and start it again",
  NotFoundError: "no camera was found; connect one and start it again",
  NotReadableError: "the camera does not respond; close what else uses it and start it again",
};

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));

/** Show the camera in a video element; throws an error with a message for the visitor. */
async function openCamera(video) {
  if (!navigator.mediaDevices) {
    throw new Error("browsers allow the camera only on https pages and on 127.0.0.1; open this page there");
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: 640, facingMode: "user" }, audio: false });
    await video.play();
  } catch (error) {
    throw new Error(REASONS[error.name] ?? `the camera could not be started: ${error.message}`);
  }
}

export class Camera {
  /**
   * before, after: canvases for a frame and its translation
   * translate:     async (ImageData, which may be overwritten) → {data, width, height, ...}
   * size:          () → {width, height} in px: the network's input size for the next frame
   * onFrame:       called after each frame with the result of translate and the frames per second
   * onEnd:         called with an error when the camera or the network fails
   */
  constructor({ before, after, translate, size, onFrame, onEnd }) {
    Object.assign(this, { before, after, translate, size, onFrame, onEnd });
    this.small = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    this.frames = []; // {time, seen, made} of the last two seconds: each frame and its translation
    this.on = false;
    this.busy = false; // a frame is being translated
    this.filming = false; // a film is being made; no new frames are translated
    this.fresh = false; // the camera has a frame that was not translated yet
  }

  async start() {
    const video = Object.assign(document.createElement("video"), { muted: true, playsInline: true });
    await openCamera(video);
    Object.assign(this, { video, on: true, frames: [] });
    const [track] = video.srcObject.getVideoTracks();
    track.addEventListener("ended", () => this.end(new Error("the camera was switched off")));
    const tick = () => {
      if (!this.on || this.video !== video) return;
      this.fresh = true;
      this.next();
      wait();
    };
    const wait = () => video.requestVideoFrameCallback?.(tick) ?? requestAnimationFrame(tick); // the fallback is for older Firefox
    wait();
  }

  stop() {
    this.on = false;
    this.video.srcObject.getTracks().forEach((track) => track.stop());
  }

  end(error) {
    if (!this.on) return;
    this.stop();
    this.onEnd(error);
  }

  /** Return the centre of the camera's image, mirrored, at the network's input size. */
  grab() {
    const { width, height } = this.size(), { videoWidth, videoHeight } = this.video, { canvas } = this.small;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const scale = Math.min(videoWidth / width, videoHeight / height), w = scale * width, h = scale * height;
    this.small.setTransform(-1, 0, 0, 1, width, 0);
    this.small.imageSmoothingQuality = "high";
    this.small.drawImage(this.video, (videoWidth - w) / 2, (videoHeight - h) / 2, w, h, 0, 0, width, height);
    return this.small.getImageData(0, 0, width, height);
  }

  /** Translate the newest frame, then the next, unless one is in progress or a film is being made. */
  async next() {
    if (this.busy || this.filming || !this.fresh || !this.on) return;
    this.busy = true;
    this.fresh = false;
    try {
      const frame = this.grab(), seen = new ImageData(frame.data.slice(), frame.width, frame.height);
      const made = await this.translate(frame);
      if (!this.on) return;
      draw(this.before, seen);
      draw(this.after, made);
      this.keep(seen, made);
      this.onFrame(made, this.rate());
    } catch (error) {
      this.end(error);
    } finally {
      this.busy = false;
    }
    this.next();
  }

  keep(seen, made) {
    const time = performance.now();
    this.frames.push({ time, seen, made: new ImageData(made.data, made.width, made.height) });
    while (time - this.frames[0].time > KEPT) this.frames.shift();
  }

  /** Return the frames per second over the last two seconds. */
  rate() {
    const first = this.frames[0].time, last = this.frames.at(-1).time;
    return last > first ? (1000 * (this.frames.length - 1)) / (last - first) : 0;
  }

  /** Draw a frame and its translation side by side. */
  static compose(context, { seen, made }, scale = 1) {
    const { width, height } = seen, canvas = context.canvas, one = new OffscreenCanvas(width, height);
    if (canvas.width !== 2 * width * scale) Object.assign(canvas, { width: 2 * width * scale, height: height * scale });
    [seen, made].forEach((image, i) => {
      one.getContext("2d").putImageData(image, 0, 0);
      context.drawImage(one, i * width * scale, 0, width * scale, height * scale);
    });
  }

  /** Return the newest frame and its translation side by side, as a canvas. */
  still() {
    const context = document.createElement("canvas").getContext("2d");
    Camera.compose(context, this.frames.at(-1));
    return context.canvas;
  }

  /** Record the last two seconds as a film; takes two seconds, in which no new frames are translated. */
  async film() {
    const mimeType = FORMATS.find((format) => globalThis.MediaRecorder?.isTypeSupported(format));
    if (!mimeType) throw new Error("this browser cannot write films");
    const { width, height } = this.frames.at(-1).seen, scale = Math.max(1, Math.round(FILM_HEIGHT / height));
    const frames = this.frames.filter(({ seen }) => seen.width === width && seen.height === height);
    const context = document.createElement("canvas").getContext("2d");
    this.filming = true;
    try {
      Camera.compose(context, frames[0], scale);
      const stream = context.canvas.captureStream(0), [track] = stream.getVideoTracks();
      const recorder = new MediaRecorder(stream, { mimeType, videoBitsPerSecond: 4e6 });
      const parts = [];
      recorder.ondataavailable = ({ data }) => parts.push(data);
      const [started, stopped] = ["start", "stop"].map((name) => new Promise((then) => recorder.addEventListener(name, then)));
      recorder.start();
      track.requestFrame();
      await started; // frames drawn earlier are lost
      const start = performance.now();
      for (const frame of frames) {
        await sleep(frame.time - frames[0].time - (performance.now() - start));
        Camera.compose(context, frame, scale);
        track.requestFrame();
      }
      await sleep(LAST); // otherwise the last frame is lost
      recorder.stop();
      await stopped;
      return new Blob(parts, { type: mimeType.split(";")[0] });
    } finally {
      this.filming = false;
      this.next();
    }
  }
}
