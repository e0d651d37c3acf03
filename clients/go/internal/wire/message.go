package wire

import (
	"math"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
)

// Limits of the texts in requests (zcp1.md, section 6.3).
const (
	maxMethod         = 128
	maxIdempotencyKey = 64
)

// MaxCredit is the largest number in a Grant.
const MaxCredit = 1<<53 - 1

// A Grant is how many items, and how many bytes of them, a peer is allowed to send: totals since OPEN.
type Grant struct {
	Items uint64
	Bytes uint64
}

// Append encodes the body of a CREDIT behind dst.
func (g Grant) Append(dst []byte) []byte {
	return msgpack.AppendUint(msgpack.AppendUint(append(dst, 0x92), g.Items), g.Bytes)
}

// Meta is what a request says about itself.
type Meta struct {
	// Credit is the first credit of an OPEN; nil for a REQUEST.
	Credit *Grant
	// DeadlineMs is how long the caller waits, if HasDeadline.
	DeadlineMs     uint64
	HasDeadline    bool
	IdempotencyKey string
	Traceparent    string
}

// A message error says why a body does not have the form that its kind demands.
const (
	errRequest     = msgpack.Error("request must be [method, params] or [method, params, meta]")
	errMethod      = msgpack.Error("a method name must have 1 to 128 characters of a-z 0-9 _ .")
	errParams      = msgpack.Error("params must be a map, a struct or nil")
	errMeta        = msgpack.Error("meta must be a map")
	errDeadline    = msgpack.Error("deadline_ms must be an int")
	errKey         = msgpack.Error("an idempotency key must have 1 to 64 characters")
	errCredit      = msgpack.Error("credit must be [items, bytes]")
	errError       = msgpack.Error("error must be [code, message] or [code, message, details]")
	errErrorFields = msgpack.Error("error must carry an int code and a str message")
	errDetails     = msgpack.Error("error details must be a map")
	errEvent       = msgpack.Error("event must be [name, data]")
)

// isMethod reports whether a text is a valid name of a method.
func isMethod(name string) bool {
	for _, character := range []byte(name) {
		isLower := 'a' <= character && character <= 'z'
		isDigit := '0' <= character && character <= '9'
		if !isLower && !isDigit && character != '_' && character != '.' {
			return false
		}
	}
	return name != "" && len(name) <= maxMethod
}

// AppendRequest encodes the body of a REQUEST or OPEN behind dst. Params are a map, a struct, a msgpack.Raw or nil.
func AppendRequest(dst []byte, method string, params any, meta *Meta) ([]byte, error) {
	if !isMethod(method) {
		return dst, errMethod
	}
	if meta.IdempotencyKey != "" && utf8.RuneCountInString(meta.IdempotencyKey) > maxIdempotencyKey {
		return dst, errKey
	}
	count := meta.count()
	dst = append(dst, 0x92+byte(min(count, 1)))
	dst, err := msgpack.AppendString(dst, method)
	if err != nil {
		return dst, err
	}
	at := len(dst)
	if dst, err = msgpack.Append(dst, params); err != nil {
		return dst, err
	}
	if !msgpack.IsMapOrNil(dst[at:]) {
		return dst, errParams
	}
	if count > 0 {
		dst, err = meta.append(append(dst, 0x80|byte(count)))
	}
	return dst, err
}

// count returns the number of keys.
func (m *Meta) count() int {
	count := 0
	for _, isSet := range [...]bool{m.Credit != nil, m.HasDeadline, m.IdempotencyKey != "", m.Traceparent != ""} {
		if isSet {
			count++
		}
	}
	return count
}

// append encodes the keys and their values.
func (m *Meta) append(dst []byte) ([]byte, error) {
	if m.Credit != nil {
		dst = m.Credit.Append(append(dst, "\xa6credit"...))
	}
	if m.HasDeadline {
		dst = msgpack.AppendUint(append(dst, "\xabdeadline_ms"...), m.DeadlineMs)
	}
	var err error
	if m.IdempotencyKey != "" {
		dst, err = msgpack.AppendString(append(dst, "\xafidempotency_key"...), m.IdempotencyKey)
	}
	if m.Traceparent != "" && err == nil {
		dst, err = msgpack.AppendString(append(dst, "\xabtraceparent"...), m.Traceparent)
	}
	return dst, err
}

// A Message is the body of a REQUEST, OPEN or CALL.
type Message struct {
	Method string
	// Params is the encoded map, or nil.
	Params msgpack.Raw
	Meta   Meta
	// HasMeta is whether there was a meta, even an empty one.
	HasMeta bool
}

// ParseRequest reads the body of a CALL, or of a REQUEST or OPEN. A malformed traceparent is left out.
func ParseRequest(kind Kind, body []byte, maxDepth int) (Message, error) {
	parts, err := arrayOf(body, maxDepth, 2, 3, errRequest)
	if err != nil {
		return Message{}, err
	}
	method, isText := text(parts[0], maxDepth)
	if !isText || !isMethod(method) {
		return Message{}, errMethod
	}
	if !msgpack.IsMapOrNil(parts[1]) {
		return Message{}, errParams
	}
	message := Message{Method: method, Params: parts[1]}
	if msgpack.IsNil(parts[1]) {
		message.Params = nil
	}
	if len(parts) == 3 {
		message.HasMeta = true
		message.Meta, err = parseMeta(kind, parts[2], maxDepth)
	}
	return message, err
}

func parseMeta(kind Kind, body msgpack.Raw, maxDepth int) (Meta, error) {
	if !msgpack.IsMap(body) {
		return Meta{}, errMeta
	}
	var fields struct {
		Credit         msgpack.Raw `msgpack:"credit"`
		Deadline       any         `msgpack:"deadline_ms"`
		IdempotencyKey any         `msgpack:"idempotency_key"`
		Traceparent    any         `msgpack:"traceparent"`
	}
	if err := msgpack.Unmarshal(body, &fields, maxDepth); err != nil {
		return Meta{}, err
	}
	var meta Meta
	switch deadline := fields.Deadline.(type) {
	case nil:
	case int64:
		meta.HasDeadline, meta.DeadlineMs = true, uint64(max(deadline, 0)) // the past is the past
	case uint64:
		meta.HasDeadline, meta.DeadlineMs = true, deadline
	default:
		return Meta{}, errDeadline
	}
	if fields.IdempotencyKey != nil {
		key, isText := fields.IdempotencyKey.(string)
		count := utf8.RuneCountInString(key)
		if !isText || count == 0 || count > maxIdempotencyKey || kind == Open {
			return Meta{}, errKey
		}
		meta.IdempotencyKey = key
	}
	if kind == Open && fields.Credit != nil && !msgpack.IsNil(fields.Credit) {
		credit, err := ParseCredit(fields.Credit)
		if err != nil {
			return Meta{}, err
		}
		meta.Credit = &credit
	}
	if traceparent, _ := fields.Traceparent.(string); IsTraceparent(traceparent) {
		meta.Traceparent = traceparent
	}
	return meta, nil
}

// Milliseconds converts a number of the protocol to a Duration, the longest one if it is beyond its range.
func Milliseconds(count uint64) time.Duration {
	const most = math.MaxInt64 / uint64(time.Millisecond)
	return time.Duration(min(count, most)) * time.Millisecond
}

// ParseCredit reads `[items, bytes]`.
func ParseCredit(body []byte) (Grant, error) {
	value, err := msgpack.Decode(body, msgpack.MaxDepth)
	totals, _ := value.([]any)
	if err != nil || len(totals) != 2 {
		return Grant{}, errCredit
	}
	items, isItems := totals[0].(int64)
	size, isSize := totals[1].(int64)
	if !isItems || !isSize || min(items, size) < 0 || max(items, size) > MaxCredit {
		return Grant{}, errCredit
	}
	return Grant{Items: uint64(items), Bytes: uint64(size)}, nil
}

// AppendError encodes the body of a FAILURE behind dst.
func AppendError(dst []byte, code Code, message string, details map[string]any) ([]byte, error) {
	if len(details) == 0 {
		return msgpack.Append(dst, []any{int64(code), message})
	}
	return msgpack.Append(dst, []any{int64(code), message, details})
}

// ParseError reads `[code, message]` or `[code, message, details]`. Absent details are an empty map. A code that does not fit
// into an int32 is Unknown.
func ParseError(body []byte, maxDepth int) (code Code, message string, details map[string]any, err error) {
	parts, err := arrayOf(body, maxDepth, 2, 3, errError)
	if err != nil {
		return 0, "", nil, err
	}
	number, _ := msgpack.Decode(parts[0], maxDepth)
	switch number := number.(type) {
	case int64:
		code = Unknown
		if number == int64(int32(number)) {
			code = Code(number)
		}
	case uint64:
		code = Unknown
	default:
		return 0, "", nil, errErrorFields
	}
	message, isText := text(parts[1], maxDepth)
	if !isText {
		return 0, "", nil, errErrorFields
	}
	details = map[string]any{}
	if len(parts) == 3 && !msgpack.IsNil(parts[2]) {
		if !msgpack.IsMap(parts[2]) {
			return 0, "", nil, errDetails
		}
		err = msgpack.Unmarshal(parts[2], &details, maxDepth)
	}
	return code, message, details, err
}

// ParseEvent reads `[name, data]`. The data is a view of the body.
func ParseEvent(body []byte, maxDepth int) (name string, data msgpack.Raw, err error) {
	parts, err := arrayOf(body, maxDepth, 2, 2, errEvent)
	if err != nil {
		return "", nil, err
	}
	name, isText := text(parts[0], maxDepth)
	if !isText {
		return "", nil, errEvent
	}
	return name, parts[1], nil
}

// arrayOf scans a body and returns views of the values of its array, which must be from least to most.
func arrayOf(body []byte, maxDepth, least, most int, fault error) ([]msgpack.Raw, error) {
	if err := msgpack.Scan(body, maxDepth); err != nil {
		return nil, err
	}
	parts, isArray := msgpack.Split(body, most)
	if !isArray || len(parts) < least {
		return nil, fault
	}
	return parts, nil
}

func text(body []byte, maxDepth int) (string, bool) {
	value, _ := msgpack.Decode(body, maxDepth)
	text, isText := value.(string)
	return text, isText
}

// IsTraceparent reports whether a text is a traceparent of W3C Trace Context, version 00's form.
func IsTraceparent(text string) bool {
	parts := strings.Split(text, "-")
	return len(text) == 55 && len(parts) == 4 &&
		isHex(parts[0], 2) && parts[0] != "ff" &&
		isHex(parts[1], 32) && strings.Trim(parts[1], "0") != "" &&
		isHex(parts[2], 16) && strings.Trim(parts[2], "0") != "" &&
		isHex(parts[3], 2)
}

func isHex(text string, length int) bool {
	for _, character := range []byte(text) {
		if ('0' > character || character > '9') && ('a' > character || character > 'f') {
			return false
		}
	}
	return len(text) == length
}
