// Package msgpack encodes and decodes bodies: one msgpack value each (zcp1.md, section 12).
//
// A body from a peer is scanned before anything else reads it. Scan accepts exactly one value with str keys, valid UTF-8, no ext
// types and at most a given number of nested containers, and it allocates nothing. What follows the scan relies on it: counts
// are bounded by the bytes that are present, so memory is proportional to the body.
//
// Encoding and decoding work with the types of the application by reflection, as in encoding/json.
package msgpack

import (
	"encoding/binary"
	"unicode/utf8"
)

// MaxDepth is how deep arrays and maps may be nested. The outermost counts as 1.
const MaxDepth = 32

// An Error says why a body is invalid, or why a value cannot be encoded. From a peer's body it contains nothing.
type Error string

func (e Error) Error() string { return string(e) }

const (
	errEmpty    = Error("body is empty")
	errEnds     = Error("body ends before its value does")
	errBehind   = Error("bytes after the value")
	errDeep     = Error("nested too deep")
	errKey      = Error("map keys must be str")
	errUTF8     = Error("str is not UTF-8")
	errNotValue = Error("body is not one msgpack value of the allowed types")
)

// A class is what the first byte of a value announces.
type class uint8

const (
	classNil class = iota
	classBool
	classInt   // signed
	classUint  // unsigned
	classFloat // 4 or 8 bytes
	classStr
	classBin
	classArray
	classMap
	classInvalid // 0xc1, which msgpack never uses, and the ext types
)

// A head is the beginning of a value: its class, its length, and where its content begins.
type head struct {
	class class
	size  uint64 // of str and bin: bytes; of array: values; of map: entries; of numbers: bytes of the content
	at    int    // offset of the content
}

// readHead reads the first bytes of the value at an offset. A fixint has size 0: its content is the first byte.
func readHead(body []byte, at int) (head, error) {
	if at >= len(body) {
		return head{}, errEnds
	}
	first := body[at]
	at++
	switch {
	case first <= 0x7f || first >= 0xe0:
		return head{classInt, 0, at - 1}, nil
	case first <= 0x8f:
		return head{classMap, uint64(first & 0x0f), at}, nil
	case first <= 0x9f:
		return head{classArray, uint64(first & 0x0f), at}, nil
	case first <= 0xbf:
		return head{classStr, uint64(first & 0x1f), at}, nil
	}
	width := 0
	var found class
	switch first {
	case 0xc0:
		return head{classNil, 0, at}, nil
	case 0xc2, 0xc3:
		return head{classBool, uint64(first & 1), at}, nil
	case 0xca, 0xcb:
		return head{classFloat, 4 << (first - 0xca), at}, nil
	case 0xcc, 0xcd, 0xce, 0xcf:
		return head{classUint, 1 << (first - 0xcc), at}, nil
	case 0xd0, 0xd1, 0xd2, 0xd3:
		return head{classInt, 1 << (first - 0xd0), at}, nil
	case 0xc4, 0xc5, 0xc6:
		found, width = classBin, 1<<(first-0xc4)
	case 0xd9, 0xda, 0xdb:
		found, width = classStr, 1<<(first-0xd9)
	case 0xdc, 0xdd:
		found, width = classArray, 2<<(first-0xdc)
	case 0xde, 0xdf:
		found, width = classMap, 2<<(first-0xde)
	default:
		return head{}, errNotValue
	}
	if len(body)-at < width {
		return head{}, errEnds
	}
	return head{found, readUint(body[at : at+width]), at + width}, nil
}

// readUint reads an unsigned integer of 1, 2, 4 or 8 bytes.
func readUint(data []byte) uint64 {
	switch len(data) {
	case 1:
		return uint64(data[0])
	case 2:
		return uint64(binary.BigEndian.Uint16(data))
	case 4:
		return uint64(binary.BigEndian.Uint32(data))
	default:
		return binary.BigEndian.Uint64(data)
	}
}

// Scan checks that a body is one valid value, nested at most maxDepth deep. It allocates nothing; maxDepth is at most MaxDepth.
func Scan(body []byte, maxDepth int) error {
	if len(body) == 0 {
		return errEmpty
	}
	end, err := scanValue(body, 0, min(maxDepth, MaxDepth))
	if err == nil && end != len(body) {
		return errBehind
	}
	return err
}

// scanValue checks the value at an offset and returns the offset of its end.
func scanValue(body []byte, at, maxDepth int) (int, error) {
	var open [MaxDepth + 1]struct {
		left  uint64 // values without an end
		isMap bool
	}
	open[0].left = 1
	depth := 0
	for {
		top := &open[depth]
		if top.left == 0 {
			if depth == 0 {
				return at, nil
			}
			depth--
			continue
		}
		isKey := top.isMap && top.left%2 == 0
		top.left--
		head, err := readHead(body, at)
		if err != nil {
			return 0, err
		}
		if isKey && head.class != classStr {
			return 0, errKey
		}
		at = head.at
		rest := uint64(len(body) - at)
		switch head.class {
		case classInt:
			if head.size == 0 {
				at++ // a fixint
				continue
			}
			fallthrough
		case classUint, classFloat, classBin, classStr:
			if head.size > rest {
				return 0, errEnds
			}
			end := at + int(head.size)
			if head.class == classStr && !utf8.Valid(body[at:end]) {
				return 0, errUTF8
			}
			at = end
		case classArray, classMap:
			values := head.size
			if head.class == classMap {
				values *= 2
			}
			if depth >= maxDepth {
				return 0, errDeep
			}
			if values > rest { // each value has at least one byte
				return 0, errEnds
			}
			depth++
			open[depth].left, open[depth].isMap = values, head.class == classMap
		}
	}
}
