// A package in ONNX Runtime Web: token ids in, logits out, states carried from call to call.
//
// On WebGPU the states never leave the device: what one call writes is what the next one reads.
// One buffer for both, as a native program would bind it, is not to be had there, because WebGPU
// lets no kernel read and write the same buffer.

const PAST = "past_key_values.";
const CHUNK = 64; // most tokens of one call: what the recipes without a loop can take
const ARRAYS = { float32: Float32Array, float16: globalThis.Float16Array ?? Uint16Array };

/** Open a package. `folder` is its address; `provider` is "webgpu" or "wasm". */
export async function openModel(folder, provider) {
  const ort = await import(`onnxruntime-web/${provider}`);
  const genai = await fetchJson(`${folder}/genai_config.json`);
  const gpu = provider === "webgpu";
  const options = {
    executionProviders: [provider],
    externalData: [{ path: "model.onnx.data", data: `${folder}/model.onnx.data` }],
  };
  if (gpu) options.preferredOutputLocation = "gpu-buffer";
  const session = await ort.InferenceSession.create(`${folder}/model.onnx`, options);
  return { ort, session, genai, provider };
}

/** The provider to take: the graphics processor where the browser has one that knows float16. */
export async function bestProvider() {
  const adapter = await navigator.gpu?.requestAdapter();
  return adapter?.features.has("shader-f16") ? "webgpu" : "wasm";
}

export async function fetchJson(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address}: ${answer.status} ${answer.statusText}`);
  return answer.json();
}

/** A sequence of calls on a model, batch 1. */
export class Sequence {
  constructor(model) {
    this.model = model;
    this.length = 0; // tokens fed
    this.capacity = 512;
    this.states = new Map();
    for (const input of model.session.inputMetadata) {
      if (!input.name.startsWith(PAST)) continue;
      const dims = this.#dims(input);
      const data = new ARRAYS[input.type](dims.reduce((a, b) => a * b));
      this.states.set(input.name, new model.ort.Tensor(input.type, data, dims));
    }
  }

  /** Feed token ids; logits of the last one, Float32Array [vocab]. */
  async step(ids) {
    let logits;
    for (let begin = 0; begin < ids.length; begin += CHUNK) {
      logits = await this.#run(ids.slice(begin, begin + CHUNK));
    }
    return logits;
  }

  dispose() {
    for (const tensor of this.states.values()) tensor.dispose();
    this.states.clear();
  }

  async #run(ids) {
    const total = this.length + ids.length;
    if (total > this.capacity) await this.#grow(Math.max(total, 2 * this.capacity));
    const { Tensor } = this.model.ort;
    const feeds = {
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      ...Object.fromEntries(this.states),
    };
    const results = await this.model.session.run(feeds);
    for (const [past, tensor] of this.states) {
      tensor.dispose();
      this.states.set(past, results[past.replace(PAST, "present.")]);
    }
    this.length = total;
    return results.logits.getData(true); // fetched from the device and freed there
  }

  /** Move the only caches that grow into longer ones: position p stays in slot p. */
  async #grow(capacity) {
    const old = this.capacity;
    this.capacity = capacity;
    for (const input of this.model.session.inputMetadata) {
      if (!input.name.startsWith(PAST) || !input.shape.includes("capacity")) continue;
      const dims = this.#dims(input);
      const heads = dims[0] * dims[1], size = dims[3];
      const tensor = this.states.get(input.name);
      const from = await tensor.getData();
      const to = new ARRAYS[input.type](heads * capacity * size);
      for (let head = 0; head < heads; head++) {
        const used = from.subarray(head * old * size, (head + 1) * old * size);
        to.set(used, head * capacity * size);
      }
      tensor.dispose();
      this.states.set(input.name, new this.model.ort.Tensor(input.type, to, dims));
    }
  }

  #dims(input) {
    const window = this.model.genai.model.decoder.sliding_window.window_size;
    const sizes = { batch: 1, window, capacity: this.capacity };
    return input.shape.map((axis) => sizes[axis] ?? axis);
  }
}
