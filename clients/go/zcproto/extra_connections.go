package zcproto

import (
	"context"
	"slices"
	"time"
)

// extraIdle is how long an extra connection is kept without requests.
const extraIdle = 30 * time.Second

// extraConnections are beside the main one, for requests that it has no room for (zcp1.md, section 11.3).
//
// They decide when one is made and closed, and which of those that wait gets the next room. They know sessions only as onOpened,
// which shows them. The mutex of the client guards them.
type extraConnections struct {
	owner *connections
	most  int
	// onOpened shows the sessions on a connection; the function that it returns waits for the answers.
	onOpened func(*connection) (await func() bool)

	all          []*connection // in the order in which they were opened
	waiters      []*waiter
	isConnecting bool
	backoff      *backoff
	notBefore    time.Duration
	idleTimer    timer
}

// waiter is a caller that waits for room on a connection; on any without one.
type waiter struct {
	on   *connection
	wake chan struct{}
}

func newExtraConnections(owner *connections, most int, random func() float64) *extraConnections {
	return &extraConnections{owner: owner, most: most, backoff: newBackoff(random), notBefore: never}
}

// waitReady waits until a request can be sent on a connection, or no more can be sent there. First come, first served. It releases
// the mutex meanwhile.
func (c *connections) waitReady(ctx context.Context, on *connection) error {
	_, err := c.waitRoom(ctx, on, on)
	return err
}

// waitAnyReady is waitReady for the main connection and the extra ones. It returns the one that is ready, or else the main one.
func (c *connections) waitAnyReady(ctx context.Context, main *connection) (*connection, error) {
	return c.waitRoom(ctx, main, nil)
}

func (c *connections) waitRoom(ctx context.Context, main, on *connection) (*connection, error) {
	extra := c.extra
	for isFirst := true; !main.ready() && main.isOpen(); isFirst = false {
		if on == nil {
			if ready := extra.ready(); ready != nil {
				return ready, nil
			}
			extra.grow()
		}
		waits := &waiter{on: on, wake: make(chan struct{})}
		if isFirst {
			extra.waiters = append(extra.waiters, waits)
		} else {
			extra.waiters = slices.Insert(extra.waiters, 0, waits) // another caller sent first: keep the place in the queue
		}
		c.mu.Unlock()
		select {
		case <-waits.wake:
			c.mu.Lock()
		case <-ctx.Done():
			c.mu.Lock()
			if index := slices.Index(extra.waiters, waits); index >= 0 {
				extra.waiters = slices.Delete(extra.waiters, index, index+1)
			} else { // it was woken and sends nothing: the next one is due
				c.hasRoom(main)
				for _, other := range extra.all {
					c.hasRoom(other)
				}
			}
			return main, contextError(ctx)
		}
	}
	return main, nil
}

// hasRoom wakes as many callers as can send on a connection.
func (c *connections) hasRoom(on *connection) {
	extra := c.extra
	if len(extra.waiters) == 0 || !on.ready() {
		return
	}
	free := on.conv.Welcome().MaxStreams - on.conv.InFlight()
	isForAll := on == c.current || slices.Contains(extra.all, on)
	extra.wake(func(waits *waiter) bool {
		if free <= 0 || waits.on != on && (waits.on != nil || !isForAll) {
			return false
		}
		free--
		return true
	})
}

// takesNoMore wakes those that wait for room on a connection, which has none any more.
func (c *connections) takesNoMore(on *connection) {
	c.extra.wake(func(waits *waiter) bool { return waits.on == on || waits.on == nil && on == c.current })
}

func (e *extraConnections) wake(isMeant func(*waiter) bool) {
	e.waiters = slices.DeleteFunc(e.waiters, func(waits *waiter) bool {
		if !isMeant(waits) {
			return false
		}
		close(waits.wake)
		return true
	})
}

// ready returns a connection that has room for a request; nil without one.
func (e *extraConnections) ready() *connection {
	index := slices.IndexFunc(e.all, (*connection).ready)
	if index < 0 {
		return nil
	}
	e.all[index].usedAt = e.owner.clock.now()
	return e.all[index]
}

// grow makes a connection in the background if there is room for no request, and one more is allowed.
func (e *extraConnections) grow() {
	main := e.owner.current
	if e.isConnecting || len(e.all) >= e.most || e.owner.clock.now() < e.notBefore || e.owner.isClosed || main == nil ||
		!main.isFull() || !allOf(e.all, (*connection).isFull) {
		return
	}
	e.isConnecting = true
	e.owner.late.Add(1)
	go e.connect(main.endpoint)
}

func allOf[T any](values []T, has func(T) bool) bool {
	return !slices.ContainsFunc(values, func(value T) bool { return !has(value) })
}

func (e *extraConnections) connect(endpoint Endpoint) {
	defer e.owner.late.Done()
	c, err := e.owner.dial(e.owner.closing, endpoint, func() {})
	e.owner.mu.Lock()
	defer e.owner.mu.Unlock()
	if err != nil {
		e.isConnecting = false
		e.delay(0)
		return
	}
	c.isExtra = true
	await := e.onOpened(c)
	c.flush()
	await()
	e.isConnecting = false
	if !c.isOpen() {
		e.delay(c.retryAfter)
		return
	}
	c.usedAt = e.owner.clock.now()
	e.all = append(e.all, c)
	if e.idleTimer == nil {
		e.idleTimer = e.owner.clock.afterFunc(extraIdle, e.closeIdle)
	}
	e.owner.hasRoom(c)
	if slices.ContainsFunc(e.waiters, func(waits *waiter) bool { return waits.on == nil }) {
		e.grow()
	}
}

func (e *extraConnections) delay(retryAfter time.Duration) {
	e.notBefore = addTime(e.owner.clock.now(), e.backoff.next(retryAfter))
}

// closeIdle closes the connections that were not used for a while.
func (e *extraConnections) closeIdle() {
	e.owner.mu.Lock()
	defer e.owner.mu.Unlock()
	e.idleTimer = nil
	var idle []*connection
	e.all = slices.DeleteFunc(e.all, func(c *connection) bool {
		isIdle := c.usedAt <= e.owner.clock.now()-extraIdle && c.isIdle()
		if isIdle {
			idle = append(idle, c)
		}
		return isIdle
	})
	for _, c := range idle {
		e.backoff.reset()
		c.close("no calls for an extra connection")
	}
	if len(e.all) > 0 {
		e.idleTimer = e.owner.clock.afterFunc(extraIdle, e.closeIdle)
	}
}

// discard uses a connection no more: it was lost, or the server goes away.
func (e *extraConnections) discard(c *connection) {
	if index := slices.Index(e.all, c); index >= 0 {
		e.all = slices.Delete(e.all, index, index+1)
		e.delay(c.retryAfter)
	}
}
