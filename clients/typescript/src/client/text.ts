/** Untrusted text in messages. */

// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is replaced
const UNSAFE = /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;

/** Replace control characters and truncate a text, so that it stays on one line. */
export function escapeText(text: string, maxLength = 200): string {
  const cut = text.length > maxLength ? `${text.slice(0, maxLength).toWellFormed()}...` : text;
  return cut.replaceAll(UNSAFE, "\ufffd");
}
