package zcproto

import (
	"context"
	"sync"
	"time"
)

// clock is the only source of time, so that tests advance it by hand.
type clock interface {
	// now returns monotonic time.
	now() time.Duration
	// wall returns milliseconds since the Unix epoch. It advances with monotonic time, so that setting the clock of the
	// machine does not change the timestamps of a running client; each WELCOME corrects the offset from the server's clock.
	wall() int64
	// afterFunc calls then once in a goroutine of its own, after at least d.
	afterFunc(d time.Duration, then func()) timer
}

type timer interface {
	Stop() bool
}

// systemClock is the clock of the machine.
type systemClock struct {
	start     time.Time
	startWall int64
}

func newSystemClock() *systemClock {
	start := time.Now()
	return &systemClock{start: start, startWall: start.UnixMilli()}
}

func (c *systemClock) now() time.Duration { return time.Since(c.start) }

func (c *systemClock) wall() int64 { return c.startWall + time.Since(c.start).Milliseconds() }

func (c *systemClock) afterFunc(d time.Duration, then func()) timer { return time.AfterFunc(d, then) }

// forever is a time that never comes.
const forever = time.Duration(1<<63 - 1)

// pause waits for d, or until ctx is done: then it returns its contextError. It releases the mutex meanwhile.
func pause(ctx context.Context, mu *sync.Mutex, clock clock, d time.Duration) error {
	if d > 0 {
		over := make(chan struct{})
		defer clock.afterFunc(d, func() { close(over) }).Stop()
		mu.Unlock()
		defer mu.Lock()
		select {
		case <-over:
		case <-ctx.Done():
		}
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	return nil
}

// inBackground runs a step in a goroutine, with the mutex.
func inBackground(mu *sync.Mutex, step func()) {
	go func() {
		mu.Lock()
		defer mu.Unlock()
		step()
	}()
}
