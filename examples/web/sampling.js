// How a token is chosen from logits.

/** Greedy at temperature 0; else one of the likeliest tokens that hold `topP` of the probability. */
export function choose(logits, temperature, topP) {
  let best = 0;
  for (let id = 1; id < logits.length; id++) if (logits[id] > logits[best]) best = id;
  if (temperature <= 0) return best;

  const weights = Float64Array.from(logits, (x) => Math.exp((x - logits[best]) / temperature));
  const order = Uint32Array.from(weights.keys()).sort((a, b) => weights[b] - weights[a]);
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  let kept = 0, held = 0;
  while (kept < order.length && held < topP * total) held += weights[order[kept++]];

  let point = Math.random() * held;
  for (let i = 0; i < kept; i++) if ((point -= weights[order[i]]) < 0) return order[i];
  return best;
}
