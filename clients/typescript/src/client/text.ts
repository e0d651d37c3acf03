/** Untrusted text in messages. */

/** Control, format, private and unassigned characters, lone surrogates, and separators other than a space. */
const UNSAFE = /(?! )[\p{C}\p{Z}]/gu;
const SHORT: Readonly<Record<string, string>> = { "\t": "\\t", "\n": "\\n", "\r": "\\r" };

/** Escape unprintable characters as `\xNN` or `\uNNNN`, and truncate the text, so that it stays on one line. */
export function escapeText(text: string, maxLength = 200): string {
  const cut = text.length > maxLength ? `${text.slice(0, maxLength)}...` : text;
  return cut.replaceAll(UNSAFE, (character) => SHORT[character] ?? escapeCharacter(character.codePointAt(0) as number));
}

function escapeCharacter(code: number): string {
  const digits = code.toString(16);
  return code <= 0xff
    ? `\\x${digits.padStart(2, "0")}`
    : code <= 0xffff
      ? `\\u${digits.padStart(4, "0")}`
      : `\\U${digits.padStart(8, "0")}`;
}
