package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
)

// maxExact is the largest int that JSON numbers of all languages have.
const maxExact = 1<<53 - 1

// typed converts a decoded value to the typed JSON of the vectors.
func typed(value any) any {
	switch value := value.(type) {
	case int64:
		if -maxExact <= value && value <= maxExact {
			return value
		}
		return map[string]any{"int": strconv.FormatInt(value, 10)}
	case uint64:
		return map[string]any{"int": strconv.FormatUint(value, 10)}
	case float64:
		bits := binary.BigEndian.AppendUint64(nil, math.Float64bits(value))
		return map[string]any{"float64": hex.EncodeToString(bits)}
	case []byte:
		return map[string]any{"bin": hex.EncodeToString(value)}
	case []any:
		items := make([]any, len(value))
		for index, item := range value {
			items[index] = typed(item)
		}
		return items
	case map[string]any:
		entries := make(map[string]any, len(value))
		for key, item := range value {
			entries[key] = typed(item)
		}
		return map[string]any{"map": entries}
	default: // nil, bool, string
		return value
	}
}

// A value is read from typed JSON.
type value struct{ of any }

func (v *value) UnmarshalJSON(data []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var found any
	if err := decoder.Decode(&found); err != nil {
		return err
	}
	var err error
	v.of, err = untyped(found)
	return err
}

// untyped converts typed JSON, decoded with json.Number, to a value.
func untyped(value any) (any, error) {
	switch value := value.(type) {
	case json.Number:
		return integer(value.String())
	case []any:
		items := make([]any, len(value))
		for index, item := range value {
			var err error
			if items[index], err = untyped(item); err != nil {
				return nil, err
			}
		}
		return items, nil
	case map[string]any:
		return untypedObject(value)
	default:
		return value, nil
	}
}

func untypedObject(value map[string]any) (any, error) {
	if text, ok := value["int"].(string); ok {
		return integer(text)
	}
	if text, ok := value["float64"].(string); ok {
		bits, err := strconv.ParseUint(text, 16, 64)
		return math.Float64frombits(bits), err
	}
	if text, ok := value["bin"].(string); ok {
		return hex.DecodeString(text)
	}
	entries, ok := value["map"].(map[string]any)
	if !ok {
		return nil, fmt.Errorf("not typed JSON: %v", value)
	}
	values := make(map[string]any, len(entries))
	for key, item := range entries {
		var err error
		if values[key], err = untyped(item); err != nil {
			return nil, err
		}
	}
	return values, nil
}

func integer(text string) (any, error) {
	if value, err := strconv.ParseInt(text, 10, 64); err == nil {
		return value, nil
	}
	return strconv.ParseUint(text, 10, 64)
}
