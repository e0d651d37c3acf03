package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// vectorContext is the state of a receiver in the vectors.
type vectorContext struct {
	Limit       uint32   `json:"limit"`
	MaxDepth    int      `json:"max_depth"`
	Salt        *string  `json:"salt"`
	LastCounter uint64   `json:"last_counter,string"`
	Now         string   `json:"now"`
	ToleranceMs uint64   `json:"tolerance_ms"`
	Tokens      []string `json:"tokens"`
	InFlight    []uint32 `json:"in_flight"`
	// Streams and calls, in vectors of them.
	Announced struct {
		Streams *struct {
			MaxOpen int    `json:"max_open" msgpack:"max_open"`
			MaxItem uint32 `json:"max_item" msgpack:"max_item"`
		} `json:"streams" msgpack:"streams,omitempty"`
		Calls *struct {
			Max int `json:"max" msgpack:"max"`
		} `json:"calls" msgpack:"calls,omitempty"`
	} `json:"announced"`
	Open []struct {
		Stream   uint32    `json:"stream"`
		Granted  [2]uint64 `json:"granted"`
		Received [2]uint64 `json:"received"`
		Credit   [2]uint64 `json:"credit"`
	} `json:"open"`
	Calls []uint32 `json:"calls"`
	// Handles are the methods that are registered; null if there was no session.handle, empty if the vector does not say.
	Handles json.RawMessage `json:"handles"`
}

func (c *vectorContext) hasNoHandles() bool { return string(c.Handles) == "null" }

type outcome = map[string]any

// outcomesOf returns the outcomes of bytes that arrive in pieces, each at a time.
func outcomesOf(receiver string, context *vectorContext, pieces [][]byte, times []string) ([]outcome, error) {
	if receiver == "server" {
		return asServer(context, pieces), nil
	}
	clock := make([]int64, len(pieces))
	for index := range clock {
		at := context.Now
		if index < len(times) {
			at = times[index]
		}
		now, err := strconv.ParseInt(at, 10, 64)
		if err != nil {
			return nil, err
		}
		clock[index] = now
	}
	return asClient(context, pieces, clock)
}

// --- receiver "client": through a conversation -------------------------------------------------------

func asClient(context *vectorContext, pieces [][]byte, times []int64) ([]outcome, error) {
	inPieces, err := newReceiver(context)
	if err != nil {
		return nil, err
	}
	var events []string
	for index, piece := range pieces {
		for _, event := range inPieces.receive(piece, times[index]) {
			events = append(events, describe(event))
		}
	}
	// Once more frame by frame, for the outcome of each.
	byFrame, err := newReceiver(context)
	if err != nil {
		return nil, err
	}
	outcomes := []outcome{}
	var eventsByFrame []string
	decoder := decoderFor(wire.Client, context)
	frames, left, fault := framesOf(decoder, pieces)
	end := 0
	for _, frame := range frames {
		before := byFrame.dropped()
		now := timeOf(end+wire.HeaderSize, pieces, times)
		data := frame.Append(nil)
		end += len(data)
		found := byFrame.receive(data, now)
		for _, event := range found {
			eventsByFrame = append(eventsByFrame, describe(event))
		}
		outcomes = append(outcomes, outcomeOf(&frame, found, byFrame.dropped() > before, context.MaxDepth))
		if byFrame.conversation.State() == conversation.Closed {
			break
		}
	}
	if byFrame.conversation.State() != conversation.Closed {
		if fault != nil {
			ended := conversation.Event{
				Type: conversation.Ended,
				Err:  &conversation.Error{Code: fault.Code, Message: fault.Reason},
			}
			eventsByFrame = append(eventsByFrame, describe(ended))
			outcomes = append(outcomes, errorOutcome(fault.Code, true))
		} else if left > 0 {
			outcomes = append(outcomes, outcome{"result": "incomplete", "have": left})
		}
	}
	if !slices.Equal(events, eventsByFrame) {
		return nil, fmt.Errorf("the events depend on how the bytes are divided: %v and %v", events, eventsByFrame)
	}
	return outcomes, nil
}

// outcomeOf returns the outcome of a frame from the events that it caused.
func outcomeOf(frame *wire.Frame, events []conversation.Event, wasDropped bool, maxDepth int) outcome {
	if len(events) > 0 {
		code, isFailure := wire.Code(0), false
		if events[0].Err != nil {
			code, isFailure = events[0].Err.Code, true
		}
		own, _, _, err := wire.ParseError(frame.Body, maxDepth)
		isError := err == nil && (frame.Kind == wire.Error || frame.Kind == wire.Failure)
		switch {
		case events[0].Type == conversation.Ended && !(isError && frame.Stream == 0):
			return errorOutcome(code, true)
		case events[0].Type == conversation.Failure && isFailure && !(isError && own == code):
			return errorOutcome(code, false)
		}
	}
	if wasDropped {
		return outcome{"result": "dropped"}
	}
	return frameOutcome(frame, maxDepth)
}

// describe returns all that an event has, to compare it.
func describe(event conversation.Event) string {
	text := fmt.Sprint(event.Type, event.Stream, event.Name, event.Delay, event.Traceparent)
	text += hex.EncodeToString(event.Body) + event.Token.Text()
	if event.Err != nil {
		text += fmt.Sprint(event.Err, event.Err.Details)
	}
	return text
}

// A receiver is a conversation whose application takes each item at once. Calls that it refuses are failures, too.
type receiver struct {
	conversation *conversation.Conversation
	streams      map[uint32]*conversation.ItemStream
}

func (r *receiver) dropped() int { return r.conversation.DroppedStale + r.conversation.DroppedUnknown }

func (r *receiver) receive(data []byte, wall int64) []conversation.Event {
	now := conversation.Instant{Wall: wall}
	var events []conversation.Event
	wasWithdrawn := false
	for _, event := range r.conversation.Receive(data, now) {
		event.Body = bytes.Clone(event.Body)
		wasWithdrawn = wasWithdrawn || event.Type == conversation.Withdrawn
		if event.Type == conversation.Item {
			var fault *conversation.Error
			if _, err := r.streams[event.Stream].Take(now); errors.As(err, &fault) {
				r.conversation.Cancel(event.Stream, now)
				event = conversation.Event{Type: conversation.Failure, Err: fault}
			}
		}
		events = append(events, event)
	}
	sent := &wire.Decoder{Receiver: wire.Server, Limit: math.MaxUint32, Extensions: wire.Streams | wire.Calls}
	frames, _, _ := framesOf(sent, [][]byte{r.conversation.Output(nil)})
	for _, frame := range frames {
		if frame.Kind != wire.Failure || wasWithdrawn {
			continue
		}
		code, message, _, _ := wire.ParseError(frame.Body, msgpack.MaxDepth)
		fault := &conversation.Error{Code: code, Message: message}
		events = append(events, conversation.Event{Type: conversation.Failure, Stream: frame.Stream, Err: fault})
	}
	return events
}

// newReceiver returns a receiver in the state of a context.
func newReceiver(context *vectorContext) (*receiver, error) {
	made := &receiver{
		conversation: conversation.New(conversation.Settings{
			MaxFrame:  context.Limit,
			Tolerance: wire.Milliseconds(context.ToleranceMs),
			MaxDepth:  context.MaxDepth,
		}),
		streams: map[uint32]*conversation.ItemStream{},
	}
	if context.Salt == nil {
		return made, nil
	}
	wall, err := strconv.ParseInt(context.Now, 10, 64)
	if err != nil {
		return nil, err
	}
	salt, err := strconv.ParseUint(*context.Salt, 16, 64)
	if err != nil {
		return nil, err
	}
	now := conversation.Instant{Wall: wall}
	greeting := wire.Frame{Kind: wire.Welcome, Timestamp: uint64(wall), Salt: salt, Body: welcomeBody(context)}
	made.conversation.Receive(greeting.Append(nil), now)
	if context.LastCounter > 0 {
		ping := wire.Frame{Kind: wire.Ping, Timestamp: uint64(wall), Salt: salt, Counter: context.LastCounter}
		made.conversation.Receive(ping.Append(nil), now)
	}
	err = made.begin(context, now)
	if err == nil && made.conversation.State() != conversation.Open {
		err = errors.New("the conversation cannot reach the state of the context")
	}
	made.conversation.Output(nil)
	return made, err
}

// begin makes the requests and calls of a context.
func (r *receiver) begin(context *vectorContext, now conversation.Instant) error {
	token, err := contextToken(context)
	if err != nil {
		return err
	}
	for _, number := range context.InFlight {
		r.conversation.AssumeNumber(number)
		if _, err := r.conversation.Request("echo", nil, token, wire.Meta{}, now); err != nil {
			return err
		}
	}
	for _, open := range context.Open {
		r.conversation.AssumeNumber(open.Stream)
		stream, err := r.conversation.Open("m", nil, token, wire.Meta{}, grantOf(open.Granted), now)
		if err != nil {
			return err
		}
		stream.AssumeCredit(grantOf(open.Credit), grantOf(open.Received))
		r.streams[open.Stream] = stream
	}
	if len(context.Handles) > 0 && !context.hasNoHandles() {
		var methods []string
		if err := json.Unmarshal(context.Handles, &methods); err != nil {
			return err
		}
		r.conversation.AssumeNumber(math.MaxUint32)
		if _, err := r.conversation.Handle(token, methods, 1, now); err != nil {
			return err
		}
	}
	for _, number := range context.Calls {
		r.conversation.AssumeCall(number, token)
	}
	return nil
}

func grantOf(totals [2]uint64) wire.Grant { return wire.Grant{Items: totals[0], Bytes: totals[1]} }

// contextToken returns the token of the requests of a context.
func contextToken(context *vectorContext) (wire.Token, error) {
	var token wire.Token
	for index := range token {
		token[index] = byte(index + 1)
	}
	if len(context.Tokens) == 0 {
		return token, nil
	}
	data, err := hex.DecodeString(context.Tokens[0])
	copy(token[:], data)
	return token, err
}

func welcomeBody(context *vectorContext) []byte {
	keys := map[string]any{
		"server":          "vectors",
		"versions":        []int{wire.Version},
		"max_frame":       1 << 20,
		"max_streams":     128,
		"idle_timeout_ms": 0,
		"tolerance_ms":    30_000,
		"sts":             map[string]any{"max_age": 0, "include_subdomains": false},
	}
	if context.Announced.Streams != nil {
		keys["streams"] = context.Announced.Streams
	}
	if context.Announced.Calls != nil {
		keys["calls"] = context.Announced.Calls
	}
	body, err := msgpack.Append(nil, keys)
	if err != nil {
		panic(err)
	}
	return body
}

// timeOf returns the time at which a number of bytes have arrived.
func timeOf(count int, pieces [][]byte, times []int64) int64 {
	arrived := 0
	for index, piece := range pieces {
		if arrived += len(piece); arrived >= count {
			return times[index]
		}
	}
	return 0
}

// --- receiver "server": decoder and bodies only ------------------------------------------------------

func asServer(context *vectorContext, pieces [][]byte) []outcome {
	frames, left, fault := framesOf(decoderFor(wire.Server, context), pieces)
	outcomes := []outcome{}
	for _, frame := range frames {
		if !frame.Kind.HasBody() && len(frame.Body) > 0 {
			return append(outcomes, errorOutcome(wire.ProtocolError, true))
		}
		isValid := !frame.Kind.HasBody() || messageOf(&frame, context.MaxDepth) != nil
		switch {
		case isValid:
			outcomes = append(outcomes, frameOutcome(&frame, context.MaxDepth))
		case frame.Kind == wire.Credit:
			return append(outcomes, errorOutcome(wire.ProtocolError, true))
		default:
			outcomes = append(outcomes, errorOutcome(wire.InvalidArgument, false))
		}
	}
	if fault != nil {
		return append(outcomes, errorOutcome(fault.Code, true))
	}
	if left > 0 {
		return append(outcomes, outcome{"result": "incomplete", "have": left})
	}
	return outcomes
}

// --- frames ------------------------------------------------------------------------------------------

func decoderFor(side wire.Side, context *vectorContext) *wire.Decoder {
	decoder := &wire.Decoder{Receiver: side, Limit: context.Limit}
	if streams := context.Announced.Streams; streams != nil {
		decoder.Extensions |= wire.Streams
		decoder.MaxItem = streams.MaxItem
	}
	if context.Announced.Calls != nil && !context.hasNoHandles() {
		decoder.Extensions |= wire.Calls
	}
	return decoder
}

func framesOf(decoder *wire.Decoder, pieces [][]byte) (frames []wire.Frame, left int, fault *wire.Fault) {
	for _, piece := range pieces {
		decoder.Feed(piece)
		for {
			frame, isFrame, fault := decoder.Next()
			if fault != nil {
				return frames, 0, fault
			}
			if !isFrame {
				break
			}
			frames = append(frames, frame)
		}
	}
	return frames, decoder.Buffered(), nil
}

func errorOutcome(code wire.Code, isFatal bool) outcome {
	return outcome{"result": "error", "code": int(code), "fatal": isFatal}
}

func frameOutcome(frame *wire.Frame, maxDepth int) outcome {
	made := outcome{
		"result":    "frame",
		"length":    frame.Length(),
		"version":   wire.Version,
		"kind":      frame.Kind.String(),
		"flags":     0,
		"stream":    frame.Stream,
		"timestamp": strconv.FormatUint(frame.Timestamp, 10),
		"salt":      fmt.Sprintf("%016x", frame.Salt),
		"counter":   strconv.FormatUint(frame.Counter, 10),
		"token":     hex.EncodeToString(frame.Token[:]),
		"body":      hex.EncodeToString(frame.Body),
	}
	if message := messageOf(frame, maxDepth); message != nil && frame.Kind.HasBody() {
		made["message"] = message
	}
	return made
}

// messageOf returns the content of a body, nil if it is invalid for its kind.
func messageOf(frame *wire.Frame, maxDepth int) outcome {
	value, err := msgpack.Decode(frame.Body, maxDepth)
	if err != nil {
		return nil
	}
	array, _ := value.([]any)
	switch frame.Kind {
	case wire.Response, wire.Item, wire.Result:
		return outcome{"value": typed(value)}
	case wire.Credit:
		if _, err := wire.ParseCredit(frame.Body); err == nil {
			return outcome{"credit": typed(value)}
		}
	case wire.Welcome, wire.GoAway:
		if msgpack.IsMap(frame.Body) {
			return outcome{"map": typed(value)}
		}
	case wire.Request, wire.Open, wire.Call:
		if message, err := wire.ParseRequest(frame.Kind, frame.Body, maxDepth); err == nil {
			return requestOutcome(message, array)
		}
	case wire.Error, wire.Failure:
		if _, message, details, err := wire.ParseError(frame.Body, maxDepth); err == nil {
			return outcome{"code": typed(array[0]), "message": message, "details": typed(details)}
		}
	case wire.Event:
		if name, _, err := wire.ParseEvent(frame.Body, maxDepth); err == nil {
			return outcome{"name": name, "data": typed(array[1])}
		}
	}
	return nil
}

func requestOutcome(message wire.Message, array []any) outcome {
	made := outcome{"method": message.Method, "params": typed(array[1])}
	if !message.HasMeta {
		return made
	}
	sent, _ := array[2].(map[string]any)
	meta := outcome{}
	if message.Meta.HasDeadline {
		meta["deadline_ms"] = typed(sent["deadline_ms"])
	}
	if message.Meta.IdempotencyKey != "" {
		meta["idempotency_key"] = message.Meta.IdempotencyKey
	}
	if message.Meta.Traceparent != "" {
		meta["traceparent"] = message.Meta.Traceparent
	}
	if message.Meta.Credit != nil {
		meta["credit"] = typed(sent["credit"])
	}
	made["meta"] = meta
	return made
}
