package msgpack

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"reflect"
	"slices"
	"unicode/utf8"
)

// Raw is one encoded value. It is written as it is, after a check, and takes any value when it is read into.
type Raw []byte

// Append encodes a value behind dst and returns the extended slice.
//
// Accepted are nil, bool, ints, floats, string, []byte, Raw, and slices, arrays, maps with string keys, structs and pointers of
// these. The fields of a struct are named by their tag, `msgpack:"name,omitempty"`, or as in Go; "-" leaves a field out. Maps are
// written in the order of their keys, so that the same value has the same bytes.
func Append(dst []byte, value any) ([]byte, error) {
	return appendAny(dst, value, MaxDepth)
}

// appendAny encodes without reflection the types that most bodies consist of.
func appendAny(dst []byte, value any, depth int) ([]byte, error) {
	switch value := value.(type) {
	case nil:
		return append(dst, 0xc0), nil
	case bool:
		return appendBool(dst, value), nil
	case int:
		return appendInt(dst, int64(value)), nil
	case int64:
		return appendInt(dst, value), nil
	case uint64:
		return AppendUint(dst, value), nil
	case float64:
		return appendFloat(dst, value), nil
	case string:
		return AppendString(dst, value)
	case []byte:
		return appendBytes(dst, value)
	case Raw:
		return appendRaw(dst, value, depth)
	case []any:
		if value == nil {
			return append(dst, 0xc0), nil
		}
		dst, err := appendArrayHead(dst, len(value), depth)
		for _, item := range value {
			if err != nil {
				break
			}
			dst, err = appendAny(dst, item, depth-1)
		}
		return dst, err
	case map[string]any:
		return appendStringMap(dst, value, depth)
	default:
		return appendValue(dst, reflect.ValueOf(value), depth)
	}
}

func appendStringMap(dst []byte, value map[string]any, depth int) ([]byte, error) {
	if value == nil {
		return append(dst, 0xc0), nil
	}
	var few [16]string
	keys := few[:0]
	for key := range value {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	dst, err := appendMapHead(dst, len(keys), depth)
	for _, key := range keys {
		if err == nil {
			dst, err = AppendString(dst, key)
		}
		if err == nil {
			dst, err = appendAny(dst, value[key], depth-1)
		}
	}
	return dst, err
}

func appendValue(dst []byte, value reflect.Value, depth int) ([]byte, error) {
	switch value.Kind() {
	case reflect.Invalid:
		return append(dst, 0xc0), nil
	case reflect.Bool:
		return appendBool(dst, value.Bool()), nil
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return appendInt(dst, value.Int()), nil
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		return AppendUint(dst, value.Uint()), nil
	case reflect.Float32:
		return binary.BigEndian.AppendUint32(append(dst, 0xca), math.Float32bits(float32(value.Float()))), nil
	case reflect.Float64:
		return appendFloat(dst, value.Float()), nil
	case reflect.String:
		return AppendString(dst, value.String())
	case reflect.Interface:
		return appendAny(dst, value.Interface(), depth)
	case reflect.Pointer:
		return appendPointer(dst, value, depth)
	case reflect.Slice, reflect.Array:
		return appendSequence(dst, value, depth)
	case reflect.Map:
		return appendMap(dst, value, depth)
	case reflect.Struct:
		return appendStruct(dst, value, depth)
	default:
		return dst, cannotSend(value.Type().String())
	}
}

// appendPointer encodes what a pointer points to. Each pointer counts as a level, so that a cycle of them ends.
func appendPointer(dst []byte, value reflect.Value, depth int) ([]byte, error) {
	for range MaxDepth {
		if value.IsNil() {
			return append(dst, 0xc0), nil
		}
		if value = value.Elem(); value.Kind() != reflect.Pointer {
			return appendValue(dst, value, depth)
		}
	}
	return dst, cannotSend("nested too deep")
}

var rawType = reflect.TypeFor[Raw]()

func appendSequence(dst []byte, value reflect.Value, depth int) ([]byte, error) {
	if value.Type() == rawType {
		return appendRaw(dst, value.Bytes(), depth)
	}
	if value.Kind() == reflect.Slice && value.IsNil() {
		return append(dst, 0xc0), nil
	}
	if value.Type().Elem().Kind() == reflect.Uint8 {
		return appendByteSequence(dst, value)
	}
	dst, err := appendArrayHead(dst, value.Len(), depth)
	for index := 0; err == nil && index < value.Len(); index++ {
		dst, err = appendValue(dst, value.Index(index), depth-1)
	}
	return dst, err
}

func appendByteSequence(dst []byte, value reflect.Value) ([]byte, error) {
	if value.Kind() == reflect.Slice {
		return appendBytes(dst, value.Bytes())
	}
	dst, err := appendBinHead(dst, value.Len())
	for index := range value.Len() {
		dst = append(dst, byte(value.Index(index).Uint()))
	}
	return dst, err
}

func appendMap(dst []byte, value reflect.Value, depth int) ([]byte, error) {
	if value.Type().Key().Kind() != reflect.String {
		return dst, cannotSend("a map with keys of type " + value.Type().Key().String() + "; use string")
	}
	if value.IsNil() {
		return append(dst, 0xc0), nil
	}
	keys := value.MapKeys()
	slices.SortFunc(keys, func(a, b reflect.Value) int { return cmp.Compare(a.String(), b.String()) })
	dst, err := appendMapHead(dst, len(keys), depth)
	for _, key := range keys {
		if err == nil {
			dst, err = AppendString(dst, key.String())
		}
		if err == nil {
			dst, err = appendValue(dst, value.MapIndex(key), depth-1)
		}
	}
	return dst, err
}

func appendStruct(dst []byte, value reflect.Value, depth int) ([]byte, error) {
	fields := fieldsOf(value.Type())
	if fields.fault != "" {
		return dst, cannotSend(fields.fault)
	}
	size := 0
	for index := range fields.list {
		if !fields.list[index].isOmitted(value) {
			size++
		}
	}
	dst, err := appendMapHead(dst, size, depth)
	for index := range fields.list {
		field := &fields.list[index]
		if err != nil || field.isOmitted(value) {
			continue
		}
		dst = append(dst, field.key...)
		dst, err = appendValue(dst, value.FieldByIndex(field.index), depth-1)
	}
	return dst, err
}

func appendBool(dst []byte, value bool) []byte {
	if value {
		return append(dst, 0xc3)
	}
	return append(dst, 0xc2)
}

func appendInt(dst []byte, value int64) []byte {
	switch {
	case value >= 0:
		return AppendUint(dst, uint64(value))
	case value >= -32:
		return append(dst, byte(value))
	case value >= math.MinInt8:
		return append(dst, 0xd0, byte(value))
	case value >= math.MinInt16:
		return binary.BigEndian.AppendUint16(append(dst, 0xd1), uint16(value))
	case value >= math.MinInt32:
		return binary.BigEndian.AppendUint32(append(dst, 0xd2), uint32(value))
	default:
		return binary.BigEndian.AppendUint64(append(dst, 0xd3), uint64(value))
	}
}

// AppendUint encodes an int behind dst.
func AppendUint(dst []byte, value uint64) []byte {
	switch {
	case value <= 0x7f:
		return append(dst, byte(value))
	case value <= math.MaxUint8:
		return append(dst, 0xcc, byte(value))
	case value <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(dst, 0xcd), uint16(value))
	case value <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(dst, 0xce), uint32(value))
	default:
		return binary.BigEndian.AppendUint64(append(dst, 0xcf), value)
	}
}

func appendFloat(dst []byte, value float64) []byte {
	return binary.BigEndian.AppendUint64(append(dst, 0xcb), math.Float64bits(value))
}

// AppendString encodes a str behind dst.
func AppendString(dst []byte, text string) ([]byte, error) {
	if !utf8.ValidString(text) {
		return dst, cannotSend("a string is not UTF-8; use []byte for bytes")
	}
	dst, err := appendLength(dst, len(text), 32, 0xa0, [3]byte{0xd9, 0xda, 0xdb})
	return append(dst, text...), err
}

func appendBytes(dst, data []byte) ([]byte, error) {
	if data == nil {
		return append(dst, 0xc0), nil
	}
	dst, err := appendBinHead(dst, len(data))
	return append(dst, data...), err
}

func appendBinHead(dst []byte, size int) ([]byte, error) {
	return appendLength(dst, size, 0, 0, [3]byte{0xc4, 0xc5, 0xc6})
}

func appendArrayHead(dst []byte, size, depth int) ([]byte, error) {
	if depth <= 0 {
		return dst, cannotSend("nested too deep")
	}
	return appendLength(dst, size, 16, 0x90, [3]byte{0, 0xdc, 0xdd})
}

func appendMapHead(dst []byte, size, depth int) ([]byte, error) {
	if depth <= 0 {
		return dst, cannotSend("nested too deep")
	}
	return appendLength(dst, size, 16, 0x80, [3]byte{0, 0xde, 0xdf})
}

// appendLength writes the head of a str, bin, array or map: short if size is below few, else with one of three codes for lengths
// of 1, 2 and 4 bytes; code 0 does not exist.
func appendLength(dst []byte, size, few int, short byte, codes [3]byte) ([]byte, error) {
	switch {
	case size < few:
		return append(dst, short|byte(size)), nil
	case size <= math.MaxUint8 && codes[0] != 0:
		return append(dst, codes[0], byte(size)), nil
	case size <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(dst, codes[1]), uint16(size)), nil
	case uint64(size) <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(dst, codes[2]), uint32(size)), nil
	default:
		return dst, cannotSend(fmt.Sprintf("%d bytes or values", size))
	}
}

func appendRaw(dst []byte, body Raw, depth int) ([]byte, error) {
	if body == nil {
		return append(dst, 0xc0), nil
	}
	if err := Scan(body, depth); err != nil {
		return dst, cannotSend("a Raw is invalid: " + err.Error())
	}
	return append(dst, body...), nil
}

func cannotSend(what string) error {
	return Error("value cannot be sent: " + what)
}
