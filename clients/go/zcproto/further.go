package zcproto

import "time"

// furtherIdle is how long a further connection is kept without calls.
const furtherIdle = 30 * time.Second

// further are connections to the server of the current one, for calls that it has no room for (gRPC proposal A105).
//
// They decide when one is made and closed: one at a time, while calls wait and each connection has as many requests in flight as
// the server allows. A failure fails no call, and delays the next attempt. A connection that is lost is not replaced until it is
// needed. They know sessions only as onOpened, which shows them. The mutex of the client guards them.
type further struct {
	owner *connections
	most  int // beside the current one
	// onOpened shows the sessions on a connection; the function that it returns waits for the answers.
	onOpened func(*connection) (await func() bool)

	usedAt       map[*connection]time.Duration
	isConnecting bool
	backoff      *backoff
	notBefore    time.Duration
	idleTimer    timer
}

func newFurther(owner *connections, most int, random func() float64) *further {
	return &further{
		owner: owner, most: most, usedAt: map[*connection]time.Duration{}, backoff: newBackoff(random), notBefore: never,
	}
}

// ready returns a connection that has room for a request; nil without one.
func (f *further) ready() *connection {
	for c := range f.usedAt {
		if c.ready() {
			f.usedAt[c] = f.owner.clock.now()
			return c
		}
	}
	return nil
}

// grow makes a connection in the background if there is room for no request, and one more is allowed.
func (f *further) grow() {
	main := f.owner.current
	if f.isConnecting || len(f.usedAt) >= f.most || f.owner.clock.now() < f.notBefore || f.owner.isClosed || main == nil || !main.isFull() {
		return
	}
	for c := range f.usedAt {
		if !c.isFull() {
			return
		}
	}
	f.isConnecting = true
	f.owner.late.Add(1)
	go f.connect(main.endpoint)
}

func (f *further) connect(endpoint Endpoint) {
	defer f.owner.late.Done()
	c, err := f.owner.dial(f.owner.closing, endpoint, func() {})
	f.owner.mu.Lock()
	defer f.owner.mu.Unlock()
	if err == nil {
		c.isFurther = true
		await := f.onOpened(c)
		c.flush()
		await()
	}
	f.isConnecting = false
	if err != nil || !c.isOpen() {
		f.delay()
		return
	}
	f.usedAt[c] = f.owner.clock.now()
	if f.idleTimer == nil {
		f.idleTimer = f.owner.clock.afterFunc(furtherIdle, f.closeIdle)
	}
	c.wakeWaiters()
	if main := f.owner.current; main != nil && len(main.waiters) > 0 {
		f.grow()
	}
}

func (f *further) delay() { f.notBefore = f.owner.clock.now() + f.backoff.next(0) }

// closeIdle closes the connections that were not used for a while.
func (f *further) closeIdle() {
	f.owner.mu.Lock()
	defer f.owner.mu.Unlock()
	f.idleTimer = nil
	for c, usedAt := range f.usedAt {
		if usedAt <= f.owner.clock.now()-furtherIdle && len(c.pending) == 0 {
			delete(f.usedAt, c)
			f.backoff.reset()
			c.close("no calls for a further connection")
		}
	}
	if len(f.usedAt) > 0 {
		f.idleTimer = f.owner.clock.afterFunc(furtherIdle, f.closeIdle)
	}
}

// discard uses a connection no more: it was lost, or the server goes away.
func (f *further) discard(c *connection) {
	if _, isUsed := f.usedAt[c]; isUsed {
		delete(f.usedAt, c)
		f.delay()
	}
}
