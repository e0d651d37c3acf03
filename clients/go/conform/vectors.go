package main

import (
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strconv"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

var errUnknownStep = errors.New("unknown step")

// runVectorStep runs a step that needs no connection.
func runVectorStep(step string, line []byte) (any, error) {
	switch step {
	case "tables":
		kinds := map[string]int{}
		for name, kind := range wire.Kinds() {
			kinds[name] = int(kind)
		}
		return map[string]any{"kinds": kinds, "codes": wire.Codes}, nil
	case "decode":
		return decodeStep(line)
	case "encode":
		return encodeStep(line)
	case "encode_request":
		return encodeRequestStep(line)
	case "text":
		return textStep(line)
	case "sign":
		return signStep(line)
	default:
		return nil, errUnknownStep
	}
}

// hexBytes are bytes in hexadecimal.
type hexBytes []byte

func (h *hexBytes) UnmarshalText(text []byte) error {
	data, err := hex.DecodeString(string(text))
	*h = data
	return err
}

func (h hexBytes) MarshalText() ([]byte, error) {
	return []byte(hex.EncodeToString(h)), nil
}

func decodeStep(line []byte) (any, error) {
	var step struct {
		Receiver string        `json:"receiver"`
		Context  vectorContext `json:"context"`
		Pieces   []hexBytes    `json:"pieces"`
		Times    []string      `json:"times"`
	}
	if err := json.Unmarshal(line, &step); err != nil {
		return nil, err
	}
	pieces := make([][]byte, len(step.Pieces))
	for index, piece := range step.Pieces {
		pieces[index] = piece
	}
	return outcomesOf(step.Receiver, &step.Context, pieces, step.Times)
}

func encodeStep(line []byte) (any, error) {
	var step struct {
		Kind      string   `json:"kind"`
		Stream    uint32   `json:"stream"`
		Timestamp uint64   `json:"timestamp,string"`
		Salt      string   `json:"salt"`
		Counter   uint64   `json:"counter,string"`
		Token     hexBytes `json:"token"`
		Body      hexBytes `json:"body"`
	}
	if err := json.Unmarshal(line, &step); err != nil {
		return nil, err
	}
	salt, err := strconv.ParseUint(step.Salt, 16, 64)
	if err != nil {
		return nil, err
	}
	frame := wire.Frame{
		Kind:      wire.Kinds()[step.Kind],
		Stream:    step.Stream,
		Timestamp: step.Timestamp,
		Salt:      salt,
		Counter:   step.Counter,
		Token:     wire.Token(step.Token),
		Body:      step.Body,
	}
	return map[string]any{"bytes": hexBytes(frame.Append(nil))}, nil
}

func encodeRequestStep(line []byte) (any, error) {
	var step struct {
		Method string `json:"method"`
		Params value  `json:"params"`
		Meta   value  `json:"meta"`
	}
	if err := json.Unmarshal(line, &step); err != nil {
		return nil, err
	}
	fields, _ := step.Meta.of.(map[string]any)
	meta := wire.Meta{}
	meta.IdempotencyKey, _ = fields["idempotency_key"].(string)
	meta.Traceparent, _ = fields["traceparent"].(string)
	switch deadline := fields["deadline_ms"].(type) {
	case int64:
		meta.HasDeadline, meta.DeadlineMs = true, uint64(deadline)
	case uint64:
		meta.HasDeadline, meta.DeadlineMs = true, deadline
	}
	if credit, ok := fields["credit"].([]any); ok {
		items, _ := credit[0].(int64)
		size, _ := credit[1].(int64)
		meta.Credit = &wire.Grant{Items: uint64(items), Bytes: uint64(size)}
	}
	body, err := wire.AppendRequest(nil, step.Method, step.Params.of, &meta)
	return map[string]any{"body": hexBytes(body)}, err
}

func textStep(line []byte) (any, error) {
	var step struct {
		Type string `json:"type"`
		Text string `json:"text"`
	}
	if err := json.Unmarshal(line, &step); err != nil {
		return nil, err
	}
	if step.Type == "traceparent" {
		return map[string]any{"valid": wire.IsTraceparent(step.Text)}, nil
	}
	token, isValid := wire.ParseToken(step.Text)
	if !isValid {
		return map[string]any{"valid": false}, nil
	}
	return map[string]any{"valid": true, "bytes": hexBytes(token[:])}, nil
}

func signStep(line []byte) (any, error) {
	var step struct {
		PrivateKey hexBytes `json:"private_key"`
		Salt       string   `json:"salt"`
		Leaf       hexBytes `json:"leaf"`
		Scheme     string   `json:"scheme"`
		Device     string   `json:"device"`
		Token      hexBytes `json:"token"`
	}
	if err := json.Unmarshal(line, &step); err != nil {
		return nil, err
	}
	salt, err := strconv.ParseUint(step.Salt, 16, 64)
	if err != nil {
		return nil, err
	}
	leaf := [32]byte(step.Leaf)
	message := wire.OpenMessage(salt, leaf, step.Device)
	if step.Scheme == "attach" {
		message = wire.AttachMessage(salt, leaf, wire.Token(step.Token))
	}
	signature := ed25519.Sign(ed25519.NewKeyFromSeed(step.PrivateKey), message)
	return map[string]any{"message": hexBytes(message), "signature": hexBytes(signature)}, nil
}
