package zcproto

import (
	"cmp"
	"slices"
	"sync"
	"testing"
	"time"
)

// manualClock advances only when a test says so.
type manualClock struct {
	mu     sync.Mutex
	at     time.Duration
	timers []*manualTimer
	added  chan struct{} // closed and replaced when a timer is set
}

type manualTimer struct {
	clock *manualClock
	at    time.Duration
	then  func()
}

func newManualClock() *manualClock {
	return &manualClock{at: time.Hour, added: make(chan struct{})}
}

func (c *manualClock) now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *manualClock) wall() int64 { return 1_767_225_600_000 + c.now().Milliseconds() }

func (c *manualClock) afterFunc(d time.Duration, then func()) timer {
	c.mu.Lock()
	defer c.mu.Unlock()
	timer := &manualTimer{clock: c, at: addTime(c.at, max(d, 0)), then: then}
	c.timers = append(c.timers, timer)
	close(c.added)
	c.added = make(chan struct{})
	return timer
}

func (t *manualTimer) Stop() bool {
	t.clock.mu.Lock()
	defer t.clock.mu.Unlock()
	index := slices.Index(t.clock.timers, t)
	if index >= 0 {
		t.clock.timers = slices.Delete(t.clock.timers, index, index+1)
	}
	return index >= 0
}

// advance moves the time on, and runs the timers that are due in their order.
func (c *manualClock) advance(d time.Duration) {
	c.mu.Lock()
	until := c.at + d
	for due := c.first(); due != nil && due.at <= until; due = c.first() {
		c.at = max(c.at, due.at)
		c.timers = slices.DeleteFunc(c.timers, func(timer *manualTimer) bool { return timer == due })
		c.mu.Unlock()
		due.then()
		c.mu.Lock()
	}
	c.at = until
	c.mu.Unlock()
}

// first returns the timer that is due first; nil without timers.
func (c *manualClock) first() *manualTimer {
	if len(c.timers) == 0 {
		return nil
	}
	return slices.MinFunc(c.timers, func(a, b *manualTimer) int { return cmp.Compare(a.at, b.at) })
}

// advanceToFirst runs the first timer if it is due within most. It returns whether it was, and otherwise a channel that is closed
// when a timer is set.
func (c *manualClock) advanceToFirst(most time.Duration) (advanced bool, added <-chan struct{}) {
	c.mu.Lock()
	first, added, now := c.first(), c.added, c.at
	c.mu.Unlock()
	if first == nil || first.at > now+most {
		return false, added
	}
	c.advance(first.at - now)
	return true, nil
}

// awaitTimer waits until a timer is set that runs in exactly d.
func (c *manualClock) awaitTimer(t *testing.T, d time.Duration) {
	t.Helper()
	limit := time.After(patience)
	for {
		c.mu.Lock()
		found := slices.ContainsFunc(c.timers, func(timer *manualTimer) bool { return timer.at == c.at+d })
		added := c.added
		c.mu.Unlock()
		if found {
			return
		}
		select {
		case <-added:
		case <-limit:
			t.Fatalf("no timer was set for %s", d)
		}
	}
}
