package conversation

import (
	"errors"
	"testing"

	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

// roundTrips returns a function that sends a request and receives its answer.
func roundTrips(p *peer) func() error {
	params := map[string]any{"word": "hello"}
	body := encoded(p.T, params)
	var in, out []byte
	return func() error {
		number, err := p.Request("echo", params, token, wire.Meta{HasDeadline: true, DeadlineMs: 30_000}, p.now)
		if err != nil {
			return err
		}
		out = p.Output(out)
		answer := wire.Frame{
			Kind: wire.Response, Stream: number, Token: token, Salt: 7, Counter: p.counter, Timestamp: serverTime, Body: body,
		}
		p.counter++
		in = answer.Append(in[:0])
		if events := p.Receive(in, p.now); len(events) != 1 || events[0].Type != Response {
			return errors.New("no answer")
		}
		return nil
	}
}

func TestCallsAllocateNothing(t *testing.T) {
	call := roundTrips(welcomed(t))
	allocations := testing.AllocsPerRun(1_000, func() {
		if err := call(); err != nil {
			t.Fatal(err)
		}
	})
	if allocations > 0 {
		t.Errorf("%v allocations in a call", allocations)
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	call := roundTrips(welcomed(&testing.T{}))
	b.ReportAllocs()
	for range b.N {
		if err := call(); err != nil {
			b.Fatal(err)
		}
	}
}
