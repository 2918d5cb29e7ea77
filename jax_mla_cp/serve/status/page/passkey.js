// A long text with a hidden number (arXiv:2305.16300, section 4): shows a long prefill, and tests whether the model finds it.

const SUBJECTS = ["The scheduler", "A worker", "The cache", "Each rank", "The router", "A request", "The kernel", "The mesh"];
const VERBS = ["writes", "reads", "moves", "checks", "counts", "keeps", "sends", "splits"];
const OBJECTS = ["the pages", "a block of keys", "the next batch", "its own tokens", "a list of rows", "the old values"];
const ENDS = ["before the step begins", "after the last one", "without a copy", "in the order of arrival", "when there is room"];

const pick = (list) => list[Math.floor(Math.random() * list.length)];

const CHARACTERS_PER_TOKEN = 3; // few enough for most tokenizers, so that the text fits

export function passkeyText(maxModelLen) {
  const key = String(10000 + Math.floor(Math.random() * 90000));
  const length = Math.min(maxModelLen * 0.6, 8000) * CHARACTERS_PER_TOKEN;
  const lines = [];
  for (let size = 0; size < length; size += lines.at(-1).length + 1) {
    lines.push(`${pick(SUBJECTS)} ${pick(VERBS)} ${pick(OBJECTS)} ${pick(ENDS)}.`);
  }
  lines[Math.floor(lines.length * (0.2 + 0.6 * Math.random()))] = `The pass key is ${key}. Remember it.`;
  lines.push("What is the pass key? The pass key is");
  const prompt = lines.join("\n");
  return { prompt, about: `A text of ${prompt.length.toLocaleString("en")} characters with the pass key ${key} hidden in it. What is the pass key?` };
}
