package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"testing"

	"github.com/zcproto/zcproto/clients/go/internal/vectors"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

var frameFiles = []string{
	"frames", "headers", "freshness", "streams", "bodies", "bodies-invalid", "segments", "streaming/items", "streaming/calls",
}

// TestVectorsOfFrames runs each vector whole, byte by byte, cut in two everywhere, and followed by bytes that must be ignored.
func TestVectorsOfFrames(t *testing.T) {
	for _, file := range frameFiles {
		for _, vector := range vectors.Load[vectors.Vector](t, file) {
			t.Run(file+"/"+vector.Name, func(t *testing.T) {
				expected := expectationsOf(t, &vector)
				whole := outcomesOfVector(t, &vector, [][]byte{vector.Bytes}, nil)
				if err := judge(&vector, expected, whole); err != nil {
					t.Fatal(err)
				}
				stopsReading := len(expected) > 0 && expected[len(expected)-1].stopsReading(vector.Receiver)
				for _, pieces := range cutsOf(vector.Bytes, stopsReading) {
					if outcomes := outcomesOfVector(t, &vector, pieces, nil); !reflect.DeepEqual(outcomes, whole) {
						t.Fatalf("%d pieces, the first of %d bytes: %v", len(pieces), len(pieces[0]), outcomes)
					}
				}
			})
		}
	}
}

// TestVectorsOfSlowFrames runs the vectors whose pieces arrive at different times.
func TestVectorsOfSlowFrames(t *testing.T) {
	for _, vector := range vectors.Load[vectors.Vector](t, "arrival") {
		t.Run(vector.Name, func(t *testing.T) {
			var pieces [][]byte
			var times []string
			for _, piece := range vector.Pieces {
				pieces = append(pieces, piece.Bytes)
				times = append(times, piece.Now)
			}
			outcomes := outcomesOfVector(t, &vector, pieces, times)
			if err := judge(&vector, expectationsOf(t, &vector), outcomes); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// cutsOf returns the ways to divide bytes: all, for short ones.
func cutsOf(data []byte, stopsReading bool) [][][]byte {
	junk := bytes.Repeat([]byte{0xff}, 100)
	var cuts [][][]byte
	if stopsReading {
		cuts = append(cuts, [][]byte{append(bytes.Clone(data), junk...)}, [][]byte{data, junk})
	}
	if len(data) > 2_000 {
		return append(cuts, [][]byte{data[:68], data[68:]}, [][]byte{data[:len(data)-1], data[len(data)-1:]})
	}
	var single [][]byte
	for at := range data {
		single = append(single, data[at:at+1])
		if at > 0 {
			cuts = append(cuts, [][]byte{data[:at], data[at:]})
		}
	}
	return append(cuts, single)
}

// An expectation is an outcome of a vector.
type expectation struct {
	Result string `json:"result"`
	Code   int    `json:"code"`
	Fatal  bool   `json:"fatal"`
	Stage  string `json:"stage"`
	fields map[string]any
}

func expectationsOf(t *testing.T, vector *vectors.Vector) []expectation {
	found := make([]expectation, len(vector.Expect))
	for index, text := range vector.Expect {
		if err := json.Unmarshal(text, &found[index]); err != nil {
			t.Fatal(err)
		}
		found[index].fields = parsed(text)
	}
	return found
}

// stopsReading reports whether the receiver must ignore all bytes behind the last outcome.
func (e *expectation) stopsReading(receiver string) bool {
	return e.Fatal && (receiver == "client" || e.Stage == "header")
}

func outcomesOfVector(t *testing.T, vector *vectors.Vector, pieces [][]byte, times []string) []outcome {
	t.Helper()
	var context vectorContext
	if err := json.Unmarshal(vector.Context, &context); err != nil {
		t.Fatal(err)
	}
	if times != nil {
		context.Now = times[0]
	}
	outcomes, err := outcomesOf(vector.Receiver, &context, pieces, times)
	if err != nil {
		t.Fatal(err)
	}
	return outcomes
}

// judge compares the outcomes with those that the receiver can find out.
func judge(vector *vectors.Vector, expected []expectation, outcomes []outcome) error {
	isComplete := true
	for index, one := range expected {
		if index >= len(outcomes) {
			return fmt.Errorf("%d outcomes instead of %d: %v", len(outcomes), len(expected), outcomes)
		}
		if err := judgeOutcome(vector.Receiver, outcomes[index], &one); err != nil {
			return err
		}
		isComplete = isComplete && (!one.Fatal || one.stopsReading(vector.Receiver))
	}
	if isComplete && len(outcomes) != len(expected) {
		return fmt.Errorf("%d outcomes instead of %d: %v", len(outcomes), len(expected), outcomes)
	}
	return nil
}

func judgeOutcome(receiver string, actual outcome, expected *expectation) error {
	text, err := json.Marshal(actual)
	if err != nil {
		return err
	}
	found := parsed(text)
	wanted := expected.fields
	switch {
	case expected.Result == "frame":
		found["message"], wanted["message"] = normalized(found["message"]), normalized(wanted["message"])
	case expected.Result == "error" && receiver == "server" && expected.Stage == "deadline":
		wanted = map[string]any{"result": "frame"}
	case expected.Result == "dropped" && receiver == "server":
		return nil // only a server finds it
	case expected.Result == "error" && receiver == "server" && expected.Stage != "header" && expected.Stage != "body":
		return nil // the same
	case expected.Result == "error":
		wanted = map[string]any{"result": "error", "code": wanted["code"], "fatal": wanted["fatal"]}
	case expected.Result == "dropped":
		wanted = map[string]any{"result": "dropped"}
	}
	for key, value := range wanted {
		if !reflect.DeepEqual(found[key], value) {
			return fmt.Errorf("%s is %v instead of %v: %s", key, found[key], value, text)
		}
	}
	return nil
}

func parsed(text []byte) map[string]any {
	var fields map[string]any
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	if err := decoder.Decode(&fields); err != nil {
		panic(err)
	}
	return fields
}

// normalized returns a message in which nil params are an empty map, and absent meta is empty.
func normalized(message any) any {
	fields, _ := message.(map[string]any)
	if fields == nil || fields["method"] == nil {
		return message
	}
	if fields["params"] == nil {
		fields["params"] = map[string]any{"map": map[string]any{}}
	}
	if fields["meta"] == nil {
		fields["meta"] = map[string]any{}
	}
	return fields
}

// TestFramesAreEncodedAsTheyWere encodes each accepted frame again.
func TestFramesAreEncodedAsTheyWere(t *testing.T) {
	for _, file := range frameFiles {
		for _, vector := range vectors.Load[vectors.Vector](t, file) {
			for _, side := range []wire.Side{wire.Client, wire.Server} {
				decoder := &wire.Decoder{Receiver: side, Limit: 1 << 20, Extensions: wire.Streams | wire.Calls}
				frames, _, _ := framesOf(decoder, [][]byte{vector.Bytes})
				var again []byte
				for _, frame := range frames {
					again = frame.Append(again)
				}
				if !bytes.HasPrefix(vector.Bytes, again) {
					t.Errorf("%s/%s: other bytes", file, vector.Name)
				}
			}
		}
	}
}

func TestVectorsOfText(t *testing.T) {
	for _, vector := range vectors.Load[map[string]any](t, "text") {
		runStep(t, "text", vector, vector["expect"].(map[string]any))
	}
}

func TestVectorsOfSignatures(t *testing.T) {
	for _, vector := range vectors.Load[map[string]any](t, "signatures") {
		if vector["expect"].(map[string]any)["valid"] == true {
			runStep(t, "sign", vector, map[string]any{"message": vector["message"], "signature": vector["signature"]})
		}
	}
}

func runStep(t *testing.T, step string, fields, expected map[string]any) {
	t.Helper()
	line, err := json.Marshal(fields)
	if err != nil {
		t.Fatal(err)
	}
	result, err := runVectorStep(step, line)
	if err != nil {
		t.Fatalf("%v: %v", fields["name"], err)
	}
	text, _ := json.Marshal(result)
	wanted, _ := json.Marshal(expected)
	if !reflect.DeepEqual(parsed(text), parsed(wanted)) {
		t.Errorf("%v: %s instead of %s", fields["name"], text, wanted)
	}
}

func TestTables(t *testing.T) {
	own := wire.Kinds()
	for _, file := range []string{"tables", "streaming/tables"} {
		kinds, codes := vectors.Tables(t, file)
		for name, number := range kinds {
			if name != "ACCEPTED" && int(own[name]) != number { // reserved
				t.Errorf("%s is %d instead of %d", name, own[name], number)
			}
		}
		for name, number := range codes {
			if int(wire.Codes[name]) != number {
				t.Errorf("%s is %d instead of %d", name, wire.Codes[name], number)
			}
		}
	}
}
