package msgpack

import (
	"bytes"
	"errors"
	"math"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/vectors"
)

const headerSize = 68

// bodiesOf returns the bodies of a file by the names of their vectors.
func bodiesOf(t testing.TB, name string) map[string][]byte {
	bodies := map[string][]byte{}
	for _, vector := range vectors.Load[vectors.Vector](t, name) {
		bodies[vector.Name] = vector.Bytes[headerSize:]
	}
	return bodies
}

// invalidBodies returns those that no codec may accept; the others have a form that their kind does not allow.
func invalidBodies(t testing.TB) map[string][]byte {
	invalid := map[string][]byte{}
	for name, body := range bodiesOf(t, "bodies-invalid") {
		switch group, _, _ := strings.Cut(name, "-"); group {
		case "body", "ext", "depth", "bomb", "key", "utf8":
			invalid[name] = body
		}
	}
	return invalid
}

func TestScanRefusesAllInvalidBodies(t *testing.T) {
	invalid := invalidBodies(t)
	if len(invalid) != 82 {
		t.Fatalf("%d invalid bodies instead of 82", len(invalid))
	}
	for name, body := range invalid {
		var into any
		for _, err := range []error{Scan(body, MaxDepth), Unmarshal(body, &into, MaxDepth)} {
			var fault Error
			if !errors.As(err, &fault) {
				t.Errorf("%s was accepted: %v", name, err)
			}
		}
	}
}

func TestValidBodiesAreAcceptedAndEncodedAgain(t *testing.T) {
	valid := bodiesOf(t, "bodies")
	if len(valid) != 88 {
		t.Fatalf("%d valid bodies instead of 88", len(valid))
	}
	for name, body := range valid {
		value, err := Decode(body, MaxDepth)
		if err != nil {
			t.Errorf("%s was refused: %v", name, err)
			continue
		}
		again, err := Append(nil, value)
		if err != nil {
			t.Errorf("%s cannot be encoded: %v", name, err)
		}
		second, err := Decode(again, MaxDepth)
		if err != nil || !isSame(value, second) {
			t.Errorf("%s became %v: %v", name, second, err)
		}
	}
}

// isSame compares values, NaN included.
func isSame(a, b any) bool {
	first, _ := Append(nil, a)
	second, _ := Append(nil, b)
	return bytes.Equal(first, second)
}

func TestInvalidBodiesAllocateNothing(t *testing.T) {
	for name, body := range invalidBodies(t) {
		var into any
		allocations := testing.AllocsPerRun(10, func() { _ = Unmarshal(body, &into, MaxDepth) })
		if allocations > 0 {
			t.Errorf("%s: %v allocations", name, allocations)
		}
	}
}

func TestMemoryOfAValueIsProportionalToItsBody(t *testing.T) {
	bodies := bodiesOf(t, "bodies")
	bodies["65,535 nil"] = append([]byte{0xdc, 0xff, 0xff}, bytes.Repeat([]byte{0xc0}, 65_535)...)
	bodies["10,000 empty maps"] = append([]byte{0xdc, 0x27, 0x10}, bytes.Repeat([]byte{0x80}, 10_000)...)
	for name, body := range bodies {
		most := uint64(100*len(body) + 4096)
		taken := most + 1
		for attempt := 0; attempt < 10 && taken > most; attempt++ { // other goroutines may allocate memory meanwhile
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, _ = Decode(body, MaxDepth)
			runtime.ReadMemStats(&after)
			taken = after.TotalAlloc - before.TotalAlloc
		}
		if taken > most {
			t.Errorf("%s: %d bytes took %d", name, len(body), taken)
		}
	}
}

func TestDepthIsLimited(t *testing.T) {
	for depth, isValid := range map[int]bool{1: true, 31: true, 32: true, 33: false, 2_000: false} {
		body := append(bytes.Repeat([]byte{0x91}, depth-1), 0x90)
		if err := Scan(body, MaxDepth); (err == nil) != isValid {
			t.Errorf("%d levels: %v", depth, err)
		}
		var value any = []any{}
		for range depth - 1 {
			value = []any{value}
		}
		if _, err := Append(nil, value); (err == nil) != isValid {
			t.Errorf("%d levels encoded: %v", depth, err)
		}
	}
	if err := Scan([]byte{0x91, 0x90}, 1); err == nil {
		t.Error("a smaller limit was ignored")
	}
}

type base struct {
	ID string `msgpack:"id"`
}

type order struct {
	base
	Count    int            `msgpack:"count"`
	Price    float64        `msgpack:"price,omitempty"`
	Data     []byte         `msgpack:"data,omitempty"`
	Token    [4]byte        `msgpack:"token"`
	Items    []item         `msgpack:"items,omitempty"`
	Labels   map[string]int `msgpack:"labels,omitempty"`
	Next     *order         `msgpack:"next,omitempty"`
	Any      any            `msgpack:"any,omitempty"`
	Raw      Raw            `msgpack:"raw,omitempty"`
	Done     bool
	Hidden   string `msgpack:"-"`
	internal int
}

type item struct {
	Name string `msgpack:"name"`
}

func TestStructsRoundTrip(t *testing.T) {
	sent := order{
		base: base{"o-1"}, Count: -3, Price: 1.5, Data: []byte("bytes"), Token: [4]byte{1, 2, 3, 4},
		Items: []item{{"a"}, {"b"}}, Labels: map[string]int{"x": 1}, Next: &order{base: base{"o-2"}},
		Any: []any{int64(1), "two", nil}, Raw: Raw{0xc3}, Done: true, Hidden: "hidden", internal: 1,
	}
	body, err := Append(nil, sent)
	if err != nil {
		t.Fatal(err)
	}
	var received order
	if err := Unmarshal(body, &received, MaxDepth); err != nil {
		t.Fatal(err)
	}
	sent.Hidden, sent.internal = "", 0
	if !reflect.DeepEqual(sent, received) {
		t.Errorf("%+v became %+v", sent, received)
	}
	again, _ := Append(nil, &received)
	if !bytes.Equal(body, again) {
		t.Error("the same value has other bytes")
	}
}

func TestMapsAreWrittenInTheOrderOfTheirKeys(t *testing.T) {
	type name string
	expected := []byte{0x83, 0xa1, 'a', 1, 0xa1, 'b', 2, 0xa1, 'c', 3}
	for _, value := range []any{
		map[string]any{"c": 3, "a": 1, "b": 2},
		map[name]int8{"c": 3, "a": 1, "b": 2},
	} {
		if body, err := Append(nil, value); err != nil || !bytes.Equal(body, expected) {
			t.Errorf("%v became %x: %v", value, body, err)
		}
	}
}

func TestIntegersHaveTheShortestForm(t *testing.T) {
	for value, body := range map[any][]byte{
		0: {0}, 127: {0x7f}, 128: {0xcc, 0x80}, 256: {0xcd, 1, 0}, 65_536: {0xce, 0, 1, 0, 0}, -1: {0xff}, -32: {0xe0},
		-33: {0xd0, 0xdf}, -129: {0xd1, 0xff, 0x7f}, -32_769: {0xd2, 0xff, 0xff, 0x7f, 0xff},
		int64(math.MinInt64):   {0xd3, 0x80, 0, 0, 0, 0, 0, 0, 0},
		uint64(math.MaxUint64): {0xcf, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		uint8(200):             {0xcc, 200}, int16(-5): {0xfb}, float32(1): {0xca, 0x3f, 0x80, 0, 0},
	} {
		if found, err := Append(nil, value); err != nil || !bytes.Equal(found, body) {
			t.Errorf("%v became %x: %v", value, found, err)
		}
	}
}

func TestValuesThatCannotBeSentAreRefused(t *testing.T) {
	cycle := &order{}
	cycle.Next = cycle
	for name, value := range map[string]any{
		"function": func() {}, "channel": make(chan int), "complex": 1i, "time": time.Now(), "int keys": map[int]string{1: "a"},
		"text": "\xff", "key": map[string]any{"\xff": 1}, "raw": Raw{0xc1}, "empty raw": Raw{}, "cycle": cycle,
		"two fields with a name": struct {
			A int `msgpack:"x"`
			B int `msgpack:"x"`
		}{},
	} {
		if body, err := Append(nil, value); err == nil {
			t.Errorf("%s was encoded as %x", name, body)
		}
	}
}

func TestMismatchesNameTheirPlace(t *testing.T) {
	body := func(value any) []byte {
		encoded, err := Append(nil, value)
		if err != nil {
			t.Fatal(err)
		}
		return encoded
	}
	for _, example := range []struct {
		value any
		into  any
		fault string
	}{
		{map[string]any{"items": []any{map[string]any{"name": 5}}}, &order{}, "items[0].name: int does not suit the type string"},
		{map[string]any{"labels": map[string]any{"x": "y"}}, &order{}, "labels.x: str does not suit the type int"},
		{300, new(uint8), "the int is out of range for the type uint8"},
		{-1, new(uint), "out of range"},
		{uint64(math.MaxUint64), new(int64), "out of range"},
		{1.5, new(int), "float does not suit the type int"},
		{true, new(int), "bool does not suit"},
		{[]byte("abc"), new([4]byte), "bin of 3 bytes"},
		{[]byte("abc"), new(string), "bin does not suit the type string"},
		{[]any{1, 2}, new([3]int), "an array of 2"},
		{[]any{1}, new([]byte), "array does not suit"},
		{[]any{}, new(int), "array does not suit"},
		{map[string]any{}, new(map[int]int), "map does not suit"},
		{map[string]any{}, new(error), "a value does not suit"},
		{1, order{}, "must be a pointer"},
	} {
		err := Unmarshal(body(example.value), example.into, MaxDepth)
		var fault *UnmarshalError
		if !errors.As(err, &fault) || !strings.Contains(err.Error(), example.fault) {
			t.Errorf("%v into %T: %v", example.value, example.into, err)
		}
	}
}

func TestConversionsThatLoseNothing(t *testing.T) {
	var number float64
	var pointer *int
	var text = "before"
	var anything any = 1
	for _, example := range []struct {
		body []byte
		into any
		want any
	}{
		{[]byte{5}, &number, 5.0},
		{[]byte{0xcf, 0xff, 0, 0, 0, 0, 0, 0, 0}, &number, float64(0xff00000000000000)},
		{[]byte{5}, &pointer, ptr(5)},
		{[]byte{0xc0}, &text, ""},
		{[]byte{0xc0}, &anything, nil},
		{[]byte{0xca, 0x3f, 0x80, 0, 0}, &number, 1.0},
	} {
		err := Unmarshal(example.body, example.into, MaxDepth)
		if got := reflect.ValueOf(example.into).Elem().Interface(); err != nil || !reflect.DeepEqual(got, example.want) {
			t.Errorf("%x became %v: %v", example.body, got, err)
		}
	}
}

func ptr[T any](value T) *T { return &value }

func TestDecodedBytesDoNotShareTheBody(t *testing.T) {
	body, _ := Append(nil, []any{[]byte("abc"), "def"})
	value, _ := Decode(body, MaxDepth)
	clear(body)
	if !reflect.DeepEqual(value, []any{[]byte("abc"), "def"}) {
		t.Errorf("the value has changed to %v", value)
	}
}

func FuzzScan(f *testing.F) {
	for _, name := range []string{"bodies", "bodies-invalid"} {
		for _, body := range bodiesOf(f, name) {
			f.Add(body)
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		err := Scan(body, MaxDepth)
		value, decodeErr := Decode(body, MaxDepth)
		if (err == nil) != (decodeErr == nil) {
			t.Fatalf("Scan: %v, Decode: %v", err, decodeErr)
		}
		var into order
		unmarshalErr := Unmarshal(body, &into, MaxDepth)
		if err != nil {
			if unmarshalErr == nil {
				t.Fatal("an invalid body was read")
			}
			return
		}
		again, err := Append(nil, value)
		if err != nil {
			t.Fatal(err)
		}
		second, err := Decode(again, MaxDepth)
		if err != nil || !isSame(value, second) {
			t.Fatalf("%x became %x: %v", body, again, err)
		}
	})
}

func BenchmarkAppendStruct(b *testing.B) {
	value := order{base: base{"o-1"}, Count: 3, Items: []item{{"a"}, {"b"}}}
	var dst []byte
	b.ReportAllocs()
	for range b.N {
		dst, _ = Append(dst[:0], &value)
	}
}

func BenchmarkUnmarshalStruct(b *testing.B) {
	body, _ := Append(nil, order{base: base{"o-1"}, Count: 3, Items: []item{{"a"}, {"b"}}})
	b.ReportAllocs()
	for range b.N {
		var value order
		_ = Unmarshal(body, &value, MaxDepth)
	}
}

func TestLengthsOfEachForm(t *testing.T) {
	for _, size := range []int{0, 15, 16, 31, 32, 255, 256, 65_535, 65_536} {
		entries := map[string]int{}
		for number := range size {
			entries[strings.Repeat("k", number%3)+string(rune('a'+number%26))+strconv.Itoa(number)] = number
		}
		for _, value := range []any{strings.Repeat("x", size), make([]byte, size), make([]int8, size), entries} {
			body, err := Append(nil, value)
			if err != nil {
				t.Fatal(err)
			}
			back := reflect.New(reflect.TypeOf(value))
			if err := Unmarshal(body, back.Interface(), MaxDepth); err != nil || !reflect.DeepEqual(back.Elem().Interface(), value) {
				t.Errorf("%T of %d does not round-trip: %v", value, size, err)
			}
		}
	}
}

func TestNilOfEachTypeIsNil(t *testing.T) {
	for _, value := range []any{
		nil, []byte(nil), []any(nil), []int(nil), map[string]any(nil), map[string]int(nil), (*order)(nil), Raw(nil), error(nil),
	} {
		if body, err := Append(nil, value); err != nil || !bytes.Equal(body, []byte{0xc0}) {
			t.Errorf("%T became %x: %v", value, body, err)
		}
	}
	type holder struct {
		Pointer **int          `msgpack:"p"`
		Any     any            `msgpack:"a"`
		Map     map[string]int `msgpack:"m"`
	}
	body, _ := Append(nil, holder{})
	number := 1
	pointer := &number
	full := holder{&pointer, 5, map[string]int{"x": 1}}
	if err := Unmarshal(body, &full, MaxDepth); err != nil || full.Pointer != nil || full.Any != nil || full.Map != nil {
		t.Errorf("nil left %+v: %v", full, err)
	}
}

func TestFaultsInsideContainersAreFound(t *testing.T) {
	bad := func() {}
	type outer struct {
		Inner any            `msgpack:"inner"`
		Map   map[string]any `msgpack:"map,omitempty"`
	}
	for _, value := range []any{
		[]any{bad}, map[string]any{"a": bad}, outer{Inner: bad}, outer{Map: map[string]any{"a": bad}}, []outer{{Inner: bad}},
		map[string]outer{"a": {Inner: bad}}, map[string]int{"\xff": 1}, [1]any{bad},
	} {
		if body, err := Append(nil, value); err == nil {
			t.Errorf("%T was encoded as %x", value, body)
		}
	}
	type unreadable struct{ hidden int }
	if err := Unmarshal([]byte{0x80}, &unreadable{1}, MaxDepth); err == nil {
		t.Error("a struct without exported fields was read")
	}
}
