package conversation

import (
	"math"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/msgpack"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// Welcome is what a server announces (zcp1.md, sections 6.2 and 18.3). Numbers beyond the type of a field are the largest it has.
type Welcome struct {
	Server      string
	MaxFrame    uint32
	MaxStreams  int
	IdleTimeout time.Duration // 0 for never
	Tolerance   time.Duration
	STS         STS
	// Streams and Calls are nil if the server has none.
	Streams *StreamLimits
	Calls   *CallLimits
}

// STS is the policy of RFC 6797 for native clients.
type STS struct {
	MaxAge            time.Duration
	IncludeSubdomains bool
}

// StreamLimits are the limits of streams of items.
type StreamLimits struct {
	MaxOpen int
	MaxItem uint32
}

// CallLimits are the limits of calls from the server.
type CallLimits struct {
	Max int
}

// fields are the keys of a map from the server, of which each has one type. The first fault is kept.
type fields struct {
	values map[string]any
	prefix string
	fault  *wire.Fault
}

func parseWelcome(body []byte, maxDepth int) (*Welcome, *wire.Fault) {
	keys, fault := mapOf("WELCOME", body, maxDepth)
	if fault != nil {
		return nil, fault
	}
	root := &fields{values: keys, prefix: "WELCOME: "}
	welcome := &Welcome{
		Server:      field[string](root, "server"),
		MaxFrame:    uint32(root.atLeast("max_frame", wire.MinLength, math.MaxUint32)),
		MaxStreams:  int(root.atLeast("max_streams", 1, math.MaxInt32)),
		IdleTimeout: root.milliseconds("idle_timeout_ms"),
		Tolerance:   root.milliseconds("tolerance_ms"),
	}
	versions := field[[]any](root, "versions")
	sts := root.inner("sts")
	welcome.STS.MaxAge = time.Duration(sts.atLeast("max_age", 0, math.MaxInt64/int64(time.Second))) * time.Second
	welcome.STS.IncludeSubdomains = field[bool](sts, "include_subdomains")
	faults := []*fields{root, sts}
	if _, has := keys["streams"]; has {
		streams := root.inner("streams")
		welcome.Streams = &StreamLimits{
			MaxOpen: int(streams.atLeast("max_open", 0, math.MaxInt32)),
			MaxItem: uint32(streams.atLeast("max_item", wire.MinLength, math.MaxUint32)),
		}
		faults = append(faults, streams)
	}
	if _, has := keys["calls"]; has {
		calls := root.inner("calls")
		welcome.Calls = &CallLimits{Max: int(calls.atLeast("max", 0, math.MaxInt32))}
		faults = append(faults, calls)
	}
	for _, of := range faults {
		if of.fault != nil {
			return nil, of.fault
		}
	}
	for _, version := range versions {
		if version == int64(wire.Version) {
			return welcome, nil
		}
	}
	return nil, broken("WELCOME: the server does not support version 1")
}

func parseGoAway(body []byte, maxDepth int) (reason string, delay time.Duration, fault *wire.Fault) {
	keys, fault := mapOf("GOAWAY", body, maxDepth)
	if fault != nil {
		return "", 0, fault
	}
	root := &fields{values: keys, prefix: "GOAWAY: "}
	reason = field[string](root, "reason")
	delay = root.milliseconds("retry_after_ms")
	return reason, delay, root.fault
}

func mapOf(kind string, body []byte, maxDepth int) (map[string]any, *wire.Fault) {
	value, err := msgpack.Decode(body, maxDepth)
	if err != nil {
		return nil, broken(kind + " is invalid: " + err.Error())
	}
	keys, isMap := value.(map[string]any)
	if !isMap {
		return nil, broken(kind + " is invalid: body must be a map")
	}
	return keys, nil
}

// field returns the value of a key, which must have the type.
func field[T any](of *fields, key string) T {
	value, ok := of.values[key].(T)
	of.require(key, ok)
	return value
}

// atLeast returns an int that must not be below least; one above most counts as most.
func (f *fields) atLeast(key string, least, most int64) int64 {
	if _, isHuge := f.values[key].(uint64); isHuge {
		return most
	}
	value := field[int64](f, key)
	f.require(key, value >= least)
	return min(value, most)
}

func (f *fields) milliseconds(key string) time.Duration {
	return wire.Milliseconds(uint64(max(f.atLeast(key, 0, math.MaxInt64), 0)))
}

// inner returns the fields of a map.
func (f *fields) inner(key string) *fields {
	return &fields{values: field[map[string]any](f, key), prefix: f.prefix + key + "."}
}

func (f *fields) require(key string, isValid bool) {
	if !isValid && f.fault == nil {
		f.fault = broken(f.prefix + key + " is missing, too small or of the wrong type")
	}
}
