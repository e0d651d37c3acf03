package zcproto

import (
	"io"
	"runtime"
	"sync"
	"time"

	"github.com/zcproto/zcproto/clients/go/internal/conversation"
	"github.com/zcproto/zcproto/clients/go/internal/wire"
)

const (
	// Bytes of frames that are gathered, above which no further item is taken from the application.
	maxGathered = 64 << 10
	// The shortest pause of reading: a server that floods the connection is read in batches, not frame by frame.
	minReadingPause = 50 * time.Millisecond
)

// listener gets what concerns more than the calls of one connection. Its methods are called with the mutex, and must not release it.
type listener interface {
	eventReceived(c *connection, event *conversation.Event)
	callReceived(c *connection, event *conversation.Event)
	// hasRoom is called when a request can be sent after all, takesNoMore when none can be sent any more.
	hasRoom(c *connection)
	takesNoMore(c *connection)
	connectionDrains(c *connection, reason string)
	connectionEnded(c *connection, failure *ClosedError)
	released(c *connection) // its socket is closed
	// hasOther returns whether there is another server to go to, in place of one that hangs.
	hasOther() bool
	silent(c *connection) // called again while that lasts
	heard(c *connection)
}

// connection drives one connection: byteStream <-> conversation <-> pending calls.
//
// It decides which call gets which answer, when a call can be sent, how a call is abandoned without affecting others, and the
// error of calls that are pending at the end. It does not know retries and sessions.
//
// The mutex of the client guards it, and the conversation. A caller appends its frame under the mutex. The first one that
// finds frames to write writes them, without the mutex; those of other callers that come meanwhile are in its next record.
type connection struct {
	owner listener
	mu    *sync.Mutex // of the client
	clock clock
	conv  *conversation.Conversation
	link  byteStream
	leaf  [32]byte
	// endpoint is where it leads; stableAt is when it counts as a success, once it is used.
	endpoint Endpoint
	stableAt time.Duration
	isExtra  bool          // beside the main one, for calls alone
	usedAt   time.Duration // when an extra one got its last request

	pending    map[uint32]*pendingCall
	handled    map[uint32]*runningCall // calls of the server, by number
	isWriting  bool
	spare      []byte // written, for the next frames
	isPaused   bool   // the network takes no more bytes
	draining   bool
	retryAfter time.Duration // what the server has asked to wait before the next connection
	// Whether requests without an answer certainly did not run: the server sent GOAWAY and then closed cleanly.
	unansweredDidNotRun bool
	failure             *ClosedError // why it ended
	isShut              bool
	writable            chan struct{} // closed and replaced when isPaused ends
	welcomed            chan struct{} // closed by WELCOME, or by the end
	ended               chan struct{} // closed at the end
	released            chan struct{} // closed once the socket is closed
	timer               timer         // of the conversation
	timerAt             time.Duration
	deadlineTimer       timer // of the first deadline among pending
	deadlineAt          time.Duration
	silenceTimer        timer // while it runs, silenceAt is when to look whether the server hangs
	silenceAt           time.Duration
}

// pendingCall is a request in flight. done gets one value when it is answered.
type pendingCall struct {
	conn     *connection
	number   uint32
	deadline time.Duration
	done     chan struct{}
	isDone   bool
	body     []byte // of the RESPONSE
	err      error
	// onResponse processes the result before what the server has sent behind it, with the mutex, which it must not release.
	onResponse func(body []byte) error
	stream     *conversation.ItemStream // if it is a stream of items
	onChange   func()                   // of stream
}

func newConnection(
	owner listener, mu *sync.Mutex, clock clock, conv *conversation.Conversation, link byteStream, endpoint Endpoint,
) *connection {
	c := &connection{
		owner: owner, mu: mu, clock: clock, conv: conv, link: link, leaf: link.leafHash(), endpoint: endpoint, stableAt: forever,
		pending:  map[uint32]*pendingCall{},
		handled:  map[uint32]*runningCall{},
		writable: make(chan struct{}),
		welcomed: make(chan struct{}),
		ended:    make(chan struct{}),
		released: make(chan struct{}),
		timerAt:  forever, deadlineAt: forever, silenceAt: forever,
	}
	link.onSent(c.sent)
	return c
}

func (c *connection) instant() conversation.Instant {
	return conversation.Instant{Wall: c.clock.wall(), Mono: c.clock.now()}
}

func (c *connection) channel() channel { return channel{salt: c.conv.Salt(), leaf: c.leaf} }

// ready returns whether a request can be sent now.
func (c *connection) ready() bool {
	return c.isOpen() && !c.isPaused && !c.isFull()
}

// isFull returns whether as many requests are in flight as the server allows.
func (c *connection) isFull() bool { return c.conv.InFlight() >= c.conv.Welcome().MaxStreams }

// isIdle returns whether no request and no call of the server is in flight.
func (c *connection) isIdle() bool { return len(c.pending) == 0 && c.conv.CallsInFlight() == 0 }

// isOpen returns whether requests can be sent on this connection, now or later.
func (c *connection) isOpen() bool {
	return c.failure == nil && !c.draining && c.conv.State() == conversation.Open
}

// --- reading -----------------------------------------------------------------------------------------------------------

// read handles what the server sends until the end, and then closes the socket.
func (c *connection) read() {
	defer close(c.released)
	buffer := make([]byte, readSize)
	discarded := 0
	for {
		n, err := c.link.read(buffer)
		c.mu.Lock()
		switch {
		case c.isShut:
			if discarded += n; discarded > lingerBytes {
				err = errTruncated
			}
		case n > 0:
			c.received(buffer[:n])
		}
		if err != nil {
			c.endReceived(err)
			c.mu.Unlock()
			break
		}
		pause := c.conv.ReadingDelay(c.instant())
		c.mu.Unlock()
		if pause > 0 {
			c.pauseReading(max(pause, minReadingPause))
		}
	}
	c.link.release()
	c.mu.Lock()
	c.owner.released(c)
	c.mu.Unlock()
}

// pauseReading waits: the server floods this connection.
func (c *connection) pauseReading(pause time.Duration) {
	over := make(chan struct{})
	timer := c.clock.afterFunc(pause, func() { close(over) })
	defer timer.Stop()
	select {
	case <-over:
	case <-c.ended:
	}
}

func (c *connection) received(data []byte) {
	wasSilent := c.conv.IsSilent()
	for _, event := range c.conv.Receive(data, c.instant()) {
		c.handle(&event)
		if c.failure != nil {
			return
		}
	}
	if wasSilent {
		c.watch()
		c.owner.heard(c)
	}
	c.owner.hasRoom(c)
	c.settle()
}

func (c *connection) handle(event *conversation.Event) {
	switch event.Type {
	case conversation.Response:
		if call := c.remove(event.Stream); call != nil {
			call.body = append(call.body[:0], event.Body...)
			var err error
			if call.onResponse != nil {
				err = call.onResponse(event.Body)
			}
			call.finish(err)
		}
	case conversation.Failure:
		if call := c.remove(event.Stream); call != nil {
			call.finish(errorOf(event.Err))
		}
	case conversation.Item, conversation.CreditRaised:
		if call := c.pending[event.Stream]; call != nil {
			call.change()
		}
	case conversation.Call:
		c.owner.callReceived(c, event)
	case conversation.Withdrawn:
		if running := c.handled[event.Stream]; running != nil {
			running.withdraw()
		}
	case conversation.Notice:
		c.owner.eventReceived(c, event)
	case conversation.GoAway:
		c.goAway(event.Name, event.Delay)
	case conversation.Welcomed:
		c.setTimer()
		close(c.welcomed)
	case conversation.Ended:
		c.end(&ClosedError{Reason: wire.Escape(event.Err.Message, maxMessage), Code: Code(event.Err.Code)})
		c.shut()
	}
}

func (c *connection) goAway(reason string, retryAfter time.Duration) {
	if c.draining {
		return
	}
	c.draining = true
	c.retryAfter = min(retryAfter, maxRetryAfter)
	c.owner.takesNoMore(c)
	for _, call := range c.pending {
		call.change()
	}
	c.owner.connectionDrains(c, reason)
}

// closeIfDrained closes the connection after GOAWAY, once all requests and calls are answered.
func (c *connection) closeIfDrained() {
	if c.failure == nil && c.draining && c.isIdle() {
		c.close("the server is going away")
	}
}

// endReceived handles the end of the byteStream: after close_notify err is io.EOF.
func (c *connection) endReceived(err error) {
	if err != io.EOF {
		failure := tlsFailureOf(err, true)
		c.end(&ClosedError{Reason: string(failure.Failure), Cause: failure})
		c.isShut = true
		return
	}
	if c.failure == nil {
		c.unansweredDidNotRun = c.draining
		c.end(&ClosedError{Reason: "the server closed the connection", Clean: true})
	}
	c.shut()
}

// --- writing -----------------------------------------------------------------------------------------------------------

// canGather returns whether an item can be taken from the application.
func (c *connection) canGather() bool {
	return !c.isPaused && c.conv.QueuedBytes() < maxGathered && c.link.unsent() < maxGathered
}

// flush writes all frames, unless another caller writes: it takes them too. It releases the mutex meanwhile.
func (c *connection) flush() {
	if c.isWriting || c.isPaused || c.conv.QueuedBytes() == 0 {
		return
	}
	c.isWriting = true
	if len(c.pending) > 1 && c.conv.QueuedBytes() < maxGathered {
		// Let callers that were woken together put their frames into this record.
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	for !c.isPaused && !c.isShut {
		data := c.conv.Output(c.spare)
		c.spare = nil
		if len(data) == 0 {
			break
		}
		c.mu.Unlock()
		c.link.write(data)
		c.mu.Lock()
		if cap(data) <= maxGathered {
			c.spare = data[:0]
		}
		if c.link.unsent() > maxUnsent {
			c.isPaused = true
			c.conv.BlockOutput()
		}
	}
	c.isWriting = false
}

// sent continues after the network has taken all bytes.
func (c *connection) sent() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil {
		return
	}
	if c.isPaused {
		c.isPaused = false
		c.conv.UnblockOutput(c.instant())
		close(c.writable)
		c.writable = make(chan struct{})
		c.flush()
		c.owner.hasRoom(c)
	}
	for _, call := range c.pending {
		call.change()
	}
}

// waitWritable waits until the network takes bytes, or the connection has ended. It releases the mutex meanwhile.
func (c *connection) waitWritable() {
	for c.isPaused && c.failure == nil {
		writable := c.writable
		c.mu.Unlock()
		select {
		case <-writable:
		case <-c.ended:
		}
		c.mu.Lock()
	}
}

// --- time --------------------------------------------------------------------------------------------------------------

func (c *connection) setTimer() {
	at, found := c.conv.NextDeadline()
	if c.timer != nil {
		c.timer.Stop()
	}
	if found && c.failure == nil {
		c.timer = c.clock.afterFunc(at-c.clock.now(), c.timedOut)
	}
}

func (c *connection) timedOut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failure != nil {
		return
	}
	if event, ended := c.conv.HandleTimeout(c.instant()); ended {
		c.end(&ClosedError{Reason: event.Err.Message})
		c.isShut = true
		c.link.reset() // the server is unreachable: no close_notify
		return
	}
	c.flush()
	c.setTimer()
}

// setDeadlineTimer arms the one timer for the deadlines of all pending calls. It is armed for the first of them, and then
// looks again: most calls are answered long before.
func (c *connection) setDeadlineTimer(at time.Duration) {
	if c.deadlineTimer != nil {
		c.deadlineTimer.Stop()
	}
	c.deadlineAt = at
	if at != forever {
		c.deadlineTimer = c.clock.afterFunc(at-c.clock.now(), c.deadlinePassed)
	}
}

func (c *connection) deadlinePassed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.clock.now()
	next := forever
	for _, call := range c.pending {
		if call.deadline <= now {
			c.probe()
			c.abandon(call, errDeadline())
		} else {
			next = min(next, call.deadline)
		}
	}
	if c.failure == nil {
		c.setDeadlineTimer(next)
		c.flush()
	}
}

// probe finds out by a PING whether the server hangs, unless a byte came a moment ago.
func (c *connection) probe() {
	if c.owner.hasOther() && c.failure == nil {
		c.conv.DoubtServer(c.instant())
		c.silenceAt = forever // look again, maybe earlier
		c.watch()
	}
}

// watch looks from time to time whether the server hangs with requests in flight, if there is another one to go to.
func (c *connection) watch() {
	if c.silenceAt != forever || c.failure != nil || !c.owner.hasOther() {
		return
	}
	at, isWatched := c.conv.CheckSilence(c.link.unsent(), c.instant())
	if isWatched {
		c.silenceAt = at
		if c.silenceTimer != nil {
			c.silenceTimer.Stop()
		}
		c.silenceTimer = c.clock.afterFunc(at-c.clock.now(), func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.silenceAt == at {
				c.silenceAt = forever
				c.watch()
				c.flush()
			}
		})
	}
	if c.conv.IsSilent() {
		c.owner.silent(c)
	}
}

func errDeadline() *Error {
	return &Error{Code: DeadlineExceeded, Message: "no response within the call's timeout"}
}

// --- the end -----------------------------------------------------------------------------------------------------------

// close sends queued frames and close_notify. Pending calls get a ClosedError.
func (c *connection) close(reason string) {
	c.flush()
	c.end(&ClosedError{Reason: reason, Clean: true})
	c.shut()
}

// abort resets the connection, like a network failure.
func (c *connection) abort() {
	c.reset(&ClosedError{Reason: string(TLSConnectionReset), Cause: newTLSError(TLSConnectionReset, nil)})
}

func (c *connection) reset(failure *ClosedError) {
	if !c.isShut {
		c.end(failure)
	}
	c.isShut = true
	c.link.reset()
}

// shut sends close_notify once.
func (c *connection) shut() {
	if !c.isShut {
		c.isShut = true
		c.link.shut()
	}
}

// end fails everything that is pending. Only the first failure counts.
func (c *connection) end(failure *ClosedError) {
	if c.failure != nil {
		return
	}
	c.failure = failure
	c.conv.End()
	for _, timer := range []timer{c.timer, c.deadlineTimer, c.silenceTimer} {
		if timer != nil {
			timer.Stop()
		}
	}
	for number, call := range c.pending {
		delete(c.pending, number)
		call.finish(failure)
	}
	c.owner.takesNoMore(c)
	close(c.ended)
	for _, running := range c.handled {
		running.cancel(failure)
	}
	c.owner.connectionEnded(c, failure)
}
