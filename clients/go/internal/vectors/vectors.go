// Package vectors reads the test vectors of the specification, for tests.
package vectors

import (
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// A Vector is one vector of frames.
type Vector struct {
	Name    string            `json:"name"`
	Bytes   Hex               `json:"bytes"`
	Context json.RawMessage   `json:"context"`
	Expect  []json.RawMessage `json:"expect"`
}

// Hex are bytes in hexadecimal.
type Hex []byte

// UnmarshalText reads the bytes.
func (h *Hex) UnmarshalText(text []byte) error {
	data, err := hex.DecodeString(string(text))
	*h = data
	return err
}

// Load returns the vectors of a file of spec/vectors, without its suffix.
func Load[T any](t testing.TB, name string) []T {
	t.Helper()
	var document struct {
		Vectors []T `json:"vectors"`
	}
	read(t, name, &document)
	if len(document.Vectors) == 0 {
		t.Fatalf("%s has no vectors", name)
	}
	return document.Vectors
}

// Tables returns the numbers of the kinds and codes in a file of spec/vectors.
func Tables(t testing.TB, name string) (kinds, codes map[string]int) {
	t.Helper()
	var document struct {
		Kinds map[string]int `json:"kinds"`
		Codes map[string]int `json:"codes"`
	}
	read(t, name, &document)
	return document.Kinds, document.Codes
}

func read(t testing.TB, name string, into any) {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	path := filepath.Join(filepath.Dir(file), "../../../../spec/vectors", filepath.FromSlash(name)+".json")
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}
