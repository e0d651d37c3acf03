package msgpack

import (
	"fmt"
	"math"
	"reflect"
)

// Decode scans a body and returns its value: nil, bool, int64 (uint64 above its range), float64, string, []byte, []any or
// map[string]any. Of repeated keys the last one counts.
func Decode(body []byte, maxDepth int) (any, error) {
	if err := Scan(body, maxDepth); err != nil {
		return nil, err
	}
	value, _ := decodeAny(body, 0)
	return value, nil
}

// Unmarshal scans a body and stores its value in what target points to, with the types of Append: nil sets the zero value, an int
// can become a float, keys without a field are ignored, and fields without a key keep their value. Bytes are copied.
//
// It returns an *UnmarshalError if the value does not suit the type; some fields may be set then.
func Unmarshal(body []byte, target any, maxDepth int) error {
	if err := Scan(body, maxDepth); err != nil {
		return err
	}
	return UnmarshalScanned(body, target)
}

// UnmarshalScanned is Unmarshal for a body that Scan has accepted; it panics for another one.
func UnmarshalScanned(body []byte, target any) error {
	pointer := reflect.ValueOf(target)
	if pointer.Kind() != reflect.Pointer || pointer.IsNil() {
		return &UnmarshalError{Problem: fmt.Sprintf("the target must be a pointer that is not nil, not %T", target)}
	}
	if into, ok := target.(*any); ok {
		*into, _ = decodeAny(body, 0)
		return nil
	}
	_, err := decodeInto(body, 0, pointer.Elem())
	return err
}

// An UnmarshalError says that a value does not suit the type that it is read into.
type UnmarshalError struct {
	// Path leads to the value, such as "order.items[3]"; empty for the whole body.
	Path    string
	Problem string
}

func (e *UnmarshalError) Error() string {
	if e.Path == "" {
		return "msgpack: " + e.Problem
	}
	return "msgpack: " + e.Path + ": " + e.Problem
}

// within adds the step that leads to the value.
func within(err error, step string) error {
	if fault, ok := err.(*UnmarshalError); ok {
		if fault.Path != "" && fault.Path[0] != '[' {
			step += "."
		}
		fault.Path = step + fault.Path
	}
	return err
}

func mismatch(name string, into reflect.Type) error {
	return &UnmarshalError{Problem: fmt.Sprintf("%s does not suit the type %v", name, into)}
}

// The functions below read bodies that were scanned: the values of all containers together are not more than the bytes.

// decodeAny returns the value at an offset, and the offset of its end.
func decodeAny(body []byte, at int) (any, int) {
	head := mustHead(body, at)
	end := head.end()
	switch head.class {
	case classBool:
		return head.size == 1, head.at
	case classInt, classUint:
		if value, ok := head.int(body); ok {
			return value, end
		}
		return readUint(body[head.at:end]), end
	case classFloat:
		return head.float(body), end
	case classStr:
		return string(body[head.at:end]), end
	case classBin:
		return append([]byte{}, body[head.at:end]...), end
	case classArray:
		array := make([]any, head.size) // the scan has found as many bytes
		at = head.at
		for index := range array {
			array[index], at = decodeAny(body, at)
		}
		return array, at
	case classMap:
		values := make(map[string]any, head.size)
		at = head.at
		for range head.size {
			key := mustHead(body, at)
			var value any
			value, at = decodeAny(body, key.end())
			values[string(body[key.at:key.end()])] = value
		}
		return values, at
	default:
		return nil, head.at
	}
}

func mustHead(body []byte, at int) head {
	found, err := readHead(body, at)
	if err != nil {
		panic("bug: a body was read that was not scanned")
	}
	return found
}

// end returns the offset behind a value other than a container, nil or bool.
func (h head) end() int {
	switch h.class {
	case classInt:
		return h.at + max(int(h.size), 1)
	case classUint, classFloat, classStr, classBin:
		return h.at + int(h.size)
	default:
		return h.at
	}
}

// int returns an int, or false if it is beyond int64.
func (h head) int(body []byte) (int64, bool) {
	content := body[h.at:h.end()]
	if h.class == classInt && h.size == 0 {
		return int64(int8(content[0])), true
	}
	value := readUint(content)
	if h.class == classUint {
		return int64(value), value <= math.MaxInt64
	}
	unused := 64 - 8*h.size
	return int64(value<<unused) >> unused, true
}

func (h head) float(body []byte) float64 {
	bits := readUint(body[h.at:h.end()])
	if h.size == 4 {
		return float64(math.Float32frombits(uint32(bits)))
	}
	return math.Float64frombits(bits)
}

// skip returns the offset of the end of the value at an offset.
func skip(body []byte, at int) int {
	end, err := scanValue(body, at, MaxDepth)
	if err != nil {
		panic("bug: a body was read that was not scanned")
	}
	return end
}

// decodeInto stores the value at an offset, and returns the offset of its end.
func decodeInto(body []byte, at int, into reflect.Value) (int, error) {
	if into.Type() == rawType {
		end := skip(body, at)
		into.SetBytes(append(Raw{}, body[at:end]...))
		return end, nil
	}
	head := mustHead(body, at)
	if head.class == classNil {
		into.SetZero()
		return head.at, nil
	}
	switch into.Kind() {
	case reflect.Pointer:
		if into.IsNil() {
			into.Set(reflect.New(into.Type().Elem()))
		}
		return decodeInto(body, at, into.Elem())
	case reflect.Interface:
		if into.NumMethod() > 0 {
			return 0, mismatch("a value", into.Type())
		}
		value, end := decodeAny(body, at)
		into.Set(reflect.ValueOf(value))
		return end, nil
	}
	switch head.class {
	case classBool:
		if into.Kind() != reflect.Bool {
			return 0, mismatch("bool", into.Type())
		}
		into.SetBool(head.size == 1)
		return head.at, nil
	case classInt, classUint:
		return head.end(), head.intInto(body, into)
	case classFloat:
		if kind := into.Kind(); kind != reflect.Float64 && kind != reflect.Float32 {
			return 0, mismatch("float", into.Type())
		}
		into.SetFloat(head.float(body))
		return head.end(), nil
	case classStr:
		if into.Kind() != reflect.String {
			return 0, mismatch("str", into.Type())
		}
		into.SetString(string(body[head.at:head.end()]))
		return head.end(), nil
	case classBin:
		return head.end(), bytesInto(body[head.at:head.end()], into)
	case classArray:
		return arrayInto(body, head, into)
	default:
		return mapInto(body, head, into)
	}
}

func (h head) intInto(body []byte, into reflect.Value) error {
	value, isInt64 := h.int(body)
	unsigned := uint64(value)
	if !isInt64 {
		unsigned = readUint(body[h.at:h.end()])
	}
	switch {
	case into.CanInt():
		if !isInt64 || into.OverflowInt(value) {
			return outOfRange(into)
		}
		into.SetInt(value)
	case into.CanUint():
		if isInt64 && value < 0 || into.OverflowUint(unsigned) {
			return outOfRange(into)
		}
		into.SetUint(unsigned)
	case into.CanFloat() && isInt64:
		into.SetFloat(float64(value))
	case into.CanFloat():
		into.SetFloat(float64(unsigned))
	default:
		return mismatch("int", into.Type())
	}
	return nil
}

func outOfRange(into reflect.Value) error {
	return &UnmarshalError{Problem: fmt.Sprintf("the int is out of range for the type %v", into.Type())}
}

func bytesInto(data []byte, into reflect.Value) error {
	isBytes := (into.Kind() == reflect.Slice || into.Kind() == reflect.Array) && into.Type().Elem().Kind() == reflect.Uint8
	switch {
	case !isBytes:
		return mismatch("bin", into.Type())
	case into.Kind() == reflect.Slice:
		into.SetBytes(append([]byte{}, data...))
	case into.Len() != len(data):
		return &UnmarshalError{Problem: fmt.Sprintf("bin of %d bytes does not suit the type %v", len(data), into.Type())}
	default:
		reflect.Copy(into, reflect.ValueOf(data))
	}
	return nil
}

func arrayInto(body []byte, head head, into reflect.Value) (int, error) {
	kind := into.Kind()
	if kind != reflect.Slice && kind != reflect.Array || into.Type().Elem().Kind() == reflect.Uint8 {
		return 0, mismatch("array", into.Type())
	}
	if kind == reflect.Array && uint64(into.Len()) != head.size {
		return 0, &UnmarshalError{Problem: fmt.Sprintf("an array of %d does not suit the type %v", head.size, into.Type())}
	}
	at := head.at
	if kind == reflect.Slice {
		into.Set(reflect.MakeSlice(into.Type(), int(head.size), int(head.size)))
	}
	for index := range into.Len() {
		end, err := decodeInto(body, at, into.Index(index))
		if err != nil {
			return 0, within(err, fmt.Sprintf("[%d]", index))
		}
		at = end
	}
	return at, nil
}

func mapInto(body []byte, head head, into reflect.Value) (int, error) {
	switch {
	case into.Kind() == reflect.Struct:
		return structInto(body, head, into)
	case into.Kind() != reflect.Map || into.Type().Key().Kind() != reflect.String:
		return 0, mismatch("map", into.Type())
	}
	of := into.Type()
	made := reflect.MakeMap(of)
	at := head.at
	for range head.size {
		key := mustHead(body, at)
		name := string(body[key.at:key.end()])
		value := reflect.New(of.Elem()).Elem()
		end, err := decodeInto(body, key.end(), value)
		if err != nil {
			return 0, within(err, name)
		}
		made.SetMapIndex(reflect.ValueOf(name).Convert(of.Key()), value)
		at = end
	}
	into.Set(made)
	return at, nil
}

func structInto(body []byte, head head, into reflect.Value) (int, error) {
	fields := fieldsOf(into.Type())
	if fields.fault != "" {
		return 0, &UnmarshalError{Problem: fields.fault}
	}
	at := head.at
	for range head.size {
		key := mustHead(body, at)
		at = key.end()
		field := fields.byName[string(body[key.at:at])]
		if field == nil {
			at = skip(body, at)
			continue
		}
		end, err := decodeInto(body, at, into.FieldByIndex(field.index))
		if err != nil {
			return 0, within(err, string(body[key.at:key.end()]))
		}
		at = end
	}
	return at, nil
}
