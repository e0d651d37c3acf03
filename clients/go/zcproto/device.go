package zcproto

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"strings"
)

// Device is the Ed25519 key pair of a device, which opens sessions without a shared secret. Its private key is in no
// message and in no formatted output.
//
//	device, err := zcproto.CreateDevice("laptop.key")
//	user, err := zcproto.Enroll(ctx, "host:7443", "7D9K-X2MP", device, "laptop", zcproto.Options{CAFile: "ca.crt"})
type Device struct {
	sign   func(message []byte) ([]byte, error) // a function: fmt prints the fields of structs
	public ed25519.PublicKey
}

// CreateDevice makes a key pair and writes its private key to a new file of mode 0600: PKCS#8 in PEM without a
// passphrase. It returns a *CertificateError.
func CreateDevice(path string) (*Device, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, unusable(path, "cannot be created: "+err.Error()+"; try again", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, unusable(path, "cannot be created: "+err.Error()+"; try again", err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	err = writePrivate(path, text)
	clear(der)
	clear(text)
	if err != nil {
		return nil, err
	}
	return NewDevice(private)
}

// LoadDevice reads the key of a device from a file, which only its owner may be able to read. It returns a
// *CertificateError.
func LoadDevice(path string) (*Device, error) {
	text, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	block, _ := pem.Decode(text)
	if block == nil {
		return nil, unusable(path, "is not a private key in PEM; create one with CreateDevice", nil)
	}
	defer clear(block.Bytes)
	if strings.Contains(block.Type, "ENCRYPTED") {
		return nil, unusable(path, "is encrypted; the key of a device must not have a passphrase", nil)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, unusable(path, "is not a private key in PEM; create one with CreateDevice", err)
	}
	private, ok := key.(ed25519.PrivateKey)
	if !ok {
		return nil, unusable(path, "is not an Ed25519 key; create one with CreateDevice", nil)
	}
	return NewDevice(private)
}

// DeviceFromSeed returns the device of the 32 bytes of a private key (RFC 8032), for keys that are not in files.
func DeviceFromSeed(seed []byte) (*Device, error) {
	if len(seed) != ed25519.SeedSize {
		return nil, configError(fmt.Sprintf("device: the private key has %d bytes; give %d", len(seed), ed25519.SeedSize))
	}
	return NewDevice(ed25519.NewKeyFromSeed(seed))
}

// NewDevice returns the device of a signer whose public key is an ed25519.PublicKey, such as one in a security module.
func NewDevice(signer crypto.Signer) (*Device, error) {
	public, ok := signer.Public().(ed25519.PublicKey)
	if !ok {
		return nil, configError("device: the key is not Ed25519; give an Ed25519 key")
	}
	sign := func(message []byte) ([]byte, error) { return signer.Sign(rand.Reader, message, crypto.Hash(0)) }
	return &Device{sign: sign, public: public}, nil
}

// PublicKey returns the 32 bytes that identify the device.
func (d *Device) PublicKey() []byte { return append([]byte(nil), d.public...) }

// String returns the public key in hexadecimal.
func (d *Device) String() string { return "Device(" + hex.EncodeToString(d.public) + ")" }

// GoString is String, so that %#v does not print the private key.
func (d *Device) GoString() string { return d.String() }

// Format writes String for every verb, so that none prints the private key.
func (d *Device) Format(state fmt.State, _ rune) { fmt.Fprint(state, d.String()) }
