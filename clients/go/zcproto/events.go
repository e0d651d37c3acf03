package zcproto

import (
	"bytes"
	"context"
	"sync"
)

const (
	maxEvents     = 1_000
	maxEventBytes = 4 << 20
)

// Event is an event of the server, such as "session.expiring" or "pins.next" (zcp1.md, section 9.7), or one of its application.
type Event struct {
	// Name names the event.
	Name string
	data Raw
}

// Decode stores the data of the event in what target points to, like the result of Session.Call.
func (e Event) Decode(target any) error { return decode(e.data, target) }

// eventQueue holds events in order until the application takes them: at most 1,000 of together 4 MiB, or one larger event.
// Beyond that the oldest are dropped and counted. They are decoded when they are read: decoded data can take many times the
// memory.
type eventQueue struct {
	mu       sync.Mutex
	events   []Event
	size     int
	dropped  int
	isClosed bool
	changed  chan struct{} // closed and replaced when an event comes, or at the end
}

func newEventQueue() *eventQueue { return &eventQueue{changed: make(chan struct{})} }

// put adds an event with a copy of its data, which is part of a larger read.
func (q *eventQueue) put(name string, data []byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.isClosed {
		return
	}
	q.size += len(data)
	for len(q.events) >= maxEvents || q.size > maxEventBytes && len(q.events) > 0 {
		q.take()
		q.dropped++
	}
	q.events = append(q.events, Event{Name: name, data: bytes.Clone(data)})
	q.wake()
}

func (q *eventQueue) take() Event {
	first := q.events[0]
	q.events[0] = Event{}
	q.events = q.events[1:]
	q.size -= len(first.data)
	return first
}

func (q *eventQueue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// next waits for an event. After the end, queued events can still be read; then it returns a *ClosedError.
func (q *eventQueue) next(ctx context.Context) (Event, error) {
	for {
		q.mu.Lock()
		if len(q.events) > 0 {
			defer q.mu.Unlock()
			return q.take(), nil
		}
		isClosed, changed := q.isClosed, q.changed
		q.mu.Unlock()
		if isClosed {
			return Event{}, errClientClosed()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Event{}, contextError(ctx)
		}
	}
}

// deliver calls a function with each event, one at a time, until the end.
func (q *eventQueue) deliver(then func(Event)) {
	for {
		event, err := q.next(context.Background())
		if err != nil {
			return
		}
		then(event)
	}
}

func (q *eventQueue) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.isClosed {
		q.isClosed = true
		q.wake()
	}
}
