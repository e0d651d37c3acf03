/** Text of others, as it may be put into messages: on one line, of a bounded length. */

// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
const UNPRINTABLE = /[\u0000-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;

export function printable(text: string, most = 200): string {
  const cut = text.length > most ? `${text.slice(0, most).toWellFormed()}...` : text;
  return cut.replaceAll(UNPRINTABLE, "\ufffd");
}
