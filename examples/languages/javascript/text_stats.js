// A Sandbar task in JavaScript: the functions of the world are imports and exports of an ES module.
import { get, progress } from 'sandbar:task/context@0.1.0';
import { emit } from 'sandbar:task/log@0.1.0';

// A rejected input will be rejected another time too: fatal, so that nobody tries again.
function fatal(message) {
  return { kind: 'fatal', message, retryAfterMs: undefined };
}

export function run(input) {
  let text;
  try {
    ({ text } = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(input)));
  } catch (error) {
    throw fatal(`input: ${error.message}`);
  }
  if (typeof text !== 'string') throw fatal('input: `text` must be a string');

  const words = text.split(/[ \t\r\n]+/).filter((word) => word !== '');
  const stats = { lines: lines(text), words: words.length, longest: longest(words) };
  progress(1n, 1n, 'counted');
  emit('info', 'text-stats', 'counted the words', [
    ['words', String(stats.words)],
    ['attempt', String(get().attempt)],
  ]);
  return { contentType: 'application/json', bytes: new TextEncoder().encode(JSON.stringify(stats)) };
}

// The last line counts whether or not it ends with a line feed.
function lines(text) {
  const parts = text.split('\n');
  return parts.length - (parts.at(-1) === '' ? 1 : 0);
}

// By bytes, like the other languages; the first of equals.
function longest(words) {
  const bytes = (word) => new TextEncoder().encode(word).length;
  return words.reduce((best, word) => (bytes(word) > bytes(best) ? word : best), '');
}
