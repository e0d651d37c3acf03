package wire

import (
	"encoding/base64"
	"encoding/binary"
	"fmt"
)

// TokenSize is the number of bytes of a token.
const TokenSize = 32

// A Token gives access to a session; the zero Token stands for none. Its bytes are never displayed.
type Token [TokenSize]byte

// String hides the token.
func (t Token) String() string { return "Token(...)" }

// Format hides the token, whatever the verb.
func (t Token) Format(state fmt.State, _ rune) { _, _ = state.Write([]byte(t.String())) }

var tokenText = base64.RawURLEncoding.Strict()

// Text returns the token as base64url without padding, 43 characters: the form for HTTP and for files.
func (t Token) Text() string { return tokenText.EncodeToString(t[:]) }

// ParseToken reads a token from its text, which has only one form.
func ParseToken(text string) (Token, bool) {
	var token Token
	if len(text) != tokenText.EncodedLen(TokenSize) {
		return Token{}, false
	}
	for _, character := range []byte(text) {
		if character == '\r' || character == '\n' { // which encoding/base64 ignores
			return Token{}, false
		}
	}
	count, err := tokenText.Decode(token[:], []byte(text))
	return token, err == nil && count == TokenSize
}

// OpenMessage returns what a device signs for session.open (zcp1.md, section 9.4). The salt and the SHA-256 of the server's
// certificate make the signature useless on another connection, or if it is relayed through another server.
func OpenMessage(salt uint64, leaf [32]byte, device string) []byte {
	return append(channelMessage("zcp/1 open\x00", salt, leaf), device...)
}

// AttachMessage returns what a device signs for session.attach (zcp1.md, section 9.5).
func AttachMessage(salt uint64, leaf [32]byte, token Token) []byte {
	return append(channelMessage("zcp/1 attach\x00", salt, leaf), token[:]...)
}

func channelMessage(prefix string, salt uint64, leaf [32]byte) []byte {
	return append(binary.BigEndian.AppendUint64([]byte(prefix), salt), leaf[:]...)
}
