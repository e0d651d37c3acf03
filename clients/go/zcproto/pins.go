package zcproto

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"slices"
	"strings"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const (
	keyPinPrefix         = "sha256/"
	certificatePinPrefix = "cert-sha256/"
	maxPins              = 64
	shownPins            = 8
)

// keyPin returns the pin of a certificate's public key (RFC 7469 section 2.4).
func keyPin(certificate *x509.Certificate) string {
	return pinOf(keyPinPrefix, certificate.RawSubjectPublicKeyInfo)
}

// certificatePin returns the pin of a whole certificate.
func certificatePin(certificate *x509.Certificate) string {
	return pinOf(certificatePinPrefix, certificate.Raw)
}

func pinOf(prefix string, content []byte) string {
	digest := sha256.Sum256(content)
	return prefix + base64.StdEncoding.EncodeToString(digest[:])
}

// parsePins validates pins, each of which may be several, separated by commas or white space. A malformed one is a
// TLSError: a pin is never ignored.
func parsePins(texts []string) ([]string, error) {
	var pins []string
	for _, text := range texts {
		listed := strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(", \t\r\n\v\f", r) })
		if len(listed) == 0 {
			listed = []string{text}
		}
		for _, pin := range listed {
			if !isPin(pin) {
				return nil, &TLSError{Failure: TLSPinMalformed, Detail: fmt.Sprintf(
					"%q is not sha256/BASE64 or cert-sha256/BASE64", wire.Escape(pin, 80))}
			}
			if !slices.Contains(pins, pin) {
				pins = append(pins, pin)
			}
			if len(pins) > maxPins {
				return nil, &TLSError{Failure: TLSPinMalformed, Detail: fmt.Sprintf(
					"more than %d pins; remove old ones", maxPins)}
			}
		}
	}
	slices.Sort(pins)
	return pins, nil
}

func isPin(pin string) bool {
	digest, found := strings.CutPrefix(pin, keyPinPrefix)
	if !found {
		if digest, found = strings.CutPrefix(pin, certificatePinPrefix); !found {
			return false
		}
	}
	// Pins are compared as text: another encoding of the same digest would never match.
	bytes, err := base64.StdEncoding.Strict().DecodeString(digest)
	return err == nil && len(bytes) == sha256.Size && base64.StdEncoding.EncodeToString(bytes) == digest
}

// checkPins returns an error if the server's certificate matches none of the pins.
func checkPins(pins []string, certificate *x509.Certificate) error {
	key, whole := keyPin(certificate), certificatePin(certificate)
	if len(pins) == 0 || slices.Contains(pins, key) || slices.Contains(pins, whole) {
		return nil
	}
	more := ""
	shown := pins
	if len(pins) > shownPins {
		more = fmt.Sprintf(" or %d more", len(pins)-shownPins)
		shown = pins[:shownPins]
	}
	return &TLSError{Failure: TLSPinMismatch, Detail: fmt.Sprintf(
		"the server does not match any pin. It has %s (key) and %s (certificate); expected: %s%s. If the operator confirms"+
			" that the key has changed, replace the pin; otherwise the connection may be intercepted",
		key, whole, strings.Join(shown, " or "), more)}
}
