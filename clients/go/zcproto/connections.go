package zcproto

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
)

const (
	// How long a connection must last to count as a success.
	stableAfter = 5 * time.Second
	// The longest delay between two attempts to connect to a server that is starting.
	maxStartDelay = time.Second
)

// connections maintains the connection to one server: one for new calls, and older ones that drain.
//
// It decides when to connect and reconnect. The first attempt is repeated only while nothing listens or the server goes away,
// because the server may be starting, or be replaced. After a loss it reconnects with growing, jittered delays; after GOAWAY when
// the server asked for it; after a close for idleness with the next call; and not at all once the sessions were revoked or
// replaced. All callers that wait for a connection share one attempt. It does not know calls, retries and how sessions are opened.
type connections struct {
	mu           *sync.Mutex // of the client
	clock        clock
	backoff      *backoff
	startTimeout time.Duration
	// dial makes a connection that has received WELCOME, without the mutex.
	dial func(ctx context.Context) (*connection, error)
	// The others are called with the mutex, and must not release it.
	onStarting  func()
	onConnected func(*connection)
	onCall      func(*connection, *conversation.Event)
	onEvent     func(*connection, *conversation.Event)
	isWanted    func() bool // whether to reconnect before the next call

	current      *connection // for new calls
	lastError    error       // of the last attempt
	all          []*connection
	connecting   *task
	notBefore    time.Duration
	stableAt     time.Duration // when the current connection counts as a success
	hasConnected bool
	isClosed     bool
	closing      context.Context
	cancel       context.CancelCauseFunc
}

// task is work that several callers wait for.
type task struct {
	done chan struct{}
	err  error
}

// await waits for a task, or until ctx is done. It releases the mutex meanwhile.
func (t *task) await(ctx context.Context, mu *sync.Mutex) error {
	mu.Unlock()
	defer mu.Lock()
	select {
	case <-t.done:
		return t.err
	case <-ctx.Done():
		return contextError(ctx)
	}
}

func newConnections(mu *sync.Mutex, clock clock, random func() float64) *connections {
	c := &connections{mu: mu, clock: clock, backoff: newBackoff(random), stableAt: forever, notBefore: clock.now()}
	c.closing, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// get returns the connection for new calls. Without one it connects, and retries while that may succeed. It releases the
// mutex meanwhile.
func (c *connections) get(ctx context.Context) (*connection, error) {
	for c.current == nil {
		if c.isClosed {
			return nil, errClientClosed()
		}
		if err := c.start().await(ctx, c.mu); err != nil {
			return nil, err
		}
	}
	return c.current, nil
}

func errClientClosed() *ClosedError {
	return &ClosedError{Reason: "this client is closed", Clean: true}
}

func (c *connections) start() *task {
	if c.connecting == nil {
		attempt := &task{done: make(chan struct{})}
		c.connecting = attempt
		go func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			attempt.err = c.connect()
			c.connecting = nil
			close(attempt.done)
		}()
	}
	return c.connecting
}

func (c *connections) connect() error {
	startsUntil := c.clock.now() + c.startTimeout
	isStarting := false
	for {
		if err := c.pause(c.notBefore - c.clock.now()); err != nil {
			return err
		}
		c.mu.Unlock()
		connection, err := c.dial(c.closing)
		c.mu.Lock()
		isGoingAway := err == nil && connection.draining // GOAWAY in the same read as WELCOME
		switch {
		case c.isClosed:
			if err == nil {
				connection.close("closed by this client")
			}
			return errClientClosed()
		case isGoingAway:
			err = &ConnectError{Reason: "the server is going away; try again once it has been replaced"}
		case err == nil && connection.failure != nil:
			err = connection.failure
		}
		if err == nil {
			if !c.hasConnected {
				c.hasConnected = true
				c.backoff.reset()
			}
			c.current = connection
			c.stableAt = c.clock.now() + stableAfter
			c.onConnected(connection)
			return nil
		}
		var config *ConfigError
		var certificate *CertificateError
		if errors.As(err, &config) || errors.As(err, &certificate) {
			return err
		}
		c.lastError = err
		delay := c.backoff.next(0)
		if c.hasConnected {
			var failure *TLSError
			if errors.As(err, &failure) && !isClosed(err) && !isTransient(failure.Failure) {
				return err
			}
		} else {
			delay = min(delay, maxStartDelay)
			var failed *ConnectError
			isRefused := errors.As(err, &failed) && failed.Refused
			beginsAt := max(c.clock.now()+delay, c.notBefore)
			if !isRefused && !isGoingAway || beginsAt >= startsUntil {
				return err
			}
			if isRefused && !isStarting {
				isStarting = true
				c.onStarting()
			}
		}
		c.delayNextAttempt(delay)
	}
}

// pause waits without the mutex, unless the client is closed.
func (c *connections) pause(delay time.Duration) error {
	if delay > 0 {
		c.mu.Unlock()
		err := sleep(c.closing, c.clock, delay)
		c.mu.Lock()
		if err != nil {
			return errClientClosed()
		}
	}
	return nil
}

func (c *connections) delayNextAttempt(delay time.Duration) {
	c.notBefore = max(c.notBefore, c.clock.now()+delay)
}

// --- notifications of connections, with the mutex ------------------------------------------------------------------------

// opened registers a connection whose handshake has ended.
func (c *connections) opened(connection *connection) { c.all = append(c.all, connection) }

func (c *connections) eventReceived(connection *connection, event *conversation.Event) {
	c.onEvent(connection, event)
}

func (c *connections) callReceived(connection *connection, event *conversation.Event) {
	c.onCall(connection, event)
}

func (c *connections) connectionDrains(connection *connection, reason string, retryAfter time.Duration) {
	if connection == c.current {
		c.current = nil
	}
	if reason != "idle" && reason != "no_session" { // another unused connection would be closed for the same reason
		c.reconnect(min(retryAfter, maxRetryAfter))
	}
}

func (c *connections) connectionEnded(connection *connection, failure *ClosedError) {
	if connection == c.current {
		c.current = nil
		c.lastError = failure
		c.reconnect(0)
	}
}

// reconnect delays the next attempt to connect, and starts it now if it is wanted.
func (c *connections) reconnect(retryAfter time.Duration) {
	if c.clock.now() >= c.stableAt {
		c.backoff.reset()
	}
	c.stableAt = forever
	c.delayNextAttempt(c.backoff.next(retryAfter))
	if c.hasConnected && !c.isClosed && c.isWanted() {
		c.start()
	}
}

// released forgets a connection whose socket is closed.
func (c *connections) released(connection *connection) {
	if index := slices.Index(c.all, connection); index >= 0 {
		c.all = slices.Delete(c.all, index, index+1)
	}
}

// --- the end -----------------------------------------------------------------------------------------------------------

// close closes all connections with close_notify and waits until their sockets are closed. It releases the mutex meanwhile.
func (c *connections) close() {
	c.isClosed = true
	c.cancel(errClientClosed())
	if c.connecting != nil {
		_ = c.connecting.await(context.Background(), c.mu) // its waiters get the error
	}
	c.current = nil
	all := slices.Clone(c.all)
	for _, connection := range all {
		connection.close("closed by this client")
	}
	c.mu.Unlock()
	for _, connection := range all {
		<-connection.released
	}
	c.mu.Lock()
}

// abort resets all connections, like a network failure.
func (c *connections) abort() {
	for _, connection := range slices.Clone(c.all) {
		connection.abort()
	}
}
