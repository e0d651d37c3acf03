package wire

import (
	"fmt"
	"strings"
	"unicode"
)

// Escape makes text of a peer safe to show: characters that cannot be printed become \xNN, \uNNNN or \UNNNNNNNN, so that the text
// stays on one line, and what follows the given number of characters is cut off.
func Escape(text string, most int) string {
	var out strings.Builder
	count := 0
	for _, character := range text {
		if count++; count > most {
			return out.String() + "..."
		}
		switch {
		case unicode.IsPrint(character):
			out.WriteRune(character)
		case character == '\t':
			out.WriteString(`\t`)
		case character == '\n':
			out.WriteString(`\n`)
		case character == '\r':
			out.WriteString(`\r`)
		case character <= 0xff:
			fmt.Fprintf(&out, `\x%02x`, character)
		case character <= 0xffff:
			fmt.Fprintf(&out, `\u%04x`, character)
		default:
			fmt.Fprintf(&out, `\U%08x`, character)
		}
	}
	return out.String()
}
