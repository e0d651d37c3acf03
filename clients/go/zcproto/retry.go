package zcproto

import (
	"errors"
	"math/rand/v2"
	"time"
)

// What a client does after an error: the table of zcp1.md, section 11.1. This file only decides.

// then is the next step after an error.
type then int

const (
	report then = iota // to the application; never retry automatically
	later              // retry after retry_after_ms with jitter, until the deadline
	atOnce             // retry at once, one time
	renew              // refresh or open the session, then retry one time
	reopen             // open another session, then retry one time
	attach             // prove the session's key on this connection, then retry one time
)

// unknownToken is the reason of UNAUTHENTICATED for a token that the server does not know, as after its store has lost sessions.
const unknownToken = "unknown_token"

const (
	firstDelay    = 100 * time.Millisecond
	maxDelay      = 30 * time.Second
	maxRetryAfter = time.Hour
)

// whatNext returns the next step after a call failed with an error of the server.
func whatNext(err *Error) then {
	switch err.Code {
	case Unavailable:
		return later
	case ResourceExhausted:
		if _, limited := err.Details["limit"]; limited {
			return report // the user has the maximum of sessions: waiting does not change that
		}
		return later
	case StaleTimestamp:
		return atOnce
	case TokenExpired:
		return renew
	case Unauthenticated:
		if err.Details["attach"] == true {
			return attach
		}
		if err.Details["certificate"] == true {
			return reopen // the session is bound to the previous client certificate
		}
		if isUnknownToken(err) {
			return reopen
		}
	}
	return report
}

func isUnknownToken(err *Error) bool {
	return err.Code == Unauthenticated && err.Details["reason"] == unknownToken
}

// tokenAge is whose token a request had.
type tokenAge int

const (
	presentToken tokenAge = iota // that of the session
	earlierToken                 // that of a session that was replaced meanwhile
	noToken
)

// refusal is a request that the server has refused, as far as the next step depends on it.
type refusal struct {
	err           *Error
	token         tokenAge
	done          [attach + 1]bool // steps of this call that are taken once
	canReopen     bool             // there are credentials that open a session
	hasDevice     bool
	isCertificate bool // the credentials open a session in place of one of another certificate
}

// next returns the next step of the call. later is not limited here.
func (r refusal) next() then {
	step := whatNext(r.err)
	switch {
	case step == later:
		return later
	case r.token == noToken && step != atOnce:
		return report // nothing that concerns a session helps
	case r.token == earlierToken && (step == renew || step == reopen || endsSession(r.err.Code)):
		step = atOnce
	case isUnknownToken(r.err) && !r.canReopen, step == reopen && !isUnknownToken(r.err) && !r.isCertificate:
		return report
	case step == attach && !r.hasDevice:
		return report
	}
	if r.done[step] {
		return report
	}
	return step
}

// afterLoss returns the next step of a call whose connection has ended without its answer.
func afterLoss(didNotRun, isIdempotent bool) then {
	if didNotRun || isIdempotent {
		return later
	}
	return report
}

// sentDeadline returns the deadline_ms of an attempt: what is left, rounded up.
func sentDeadline(left time.Duration) uint64 {
	return uint64((left + time.Millisecond - 1) / time.Millisecond)
}

// endsSession returns whether a client neither opens a session nor reconnects on its own after this code: two clients of
// one user would replace each other's session endlessly.
func endsSession(code Code) bool { return code == TokenRevoked || code == SessionReplaced }

// refusesRenewal returns whether this answer to a renewal ends the session.
func refusesRenewal(code Code) bool {
	return endsSession(code) || code == Unauthenticated || code == TokenExpired
}

// mayHaveRun returns whether a request that got this code was perhaps run.
func mayHaveRun(code Code) bool {
	switch code {
	case DeadlineExceeded, Cancelled, Internal, Unknown:
		return true
	}
	return false
}

// retryAfter returns the delay that a server asks for, at most an hour; 0 if it is missing or invalid.
func retryAfter(details map[string]any) time.Duration {
	switch value := details["retry_after_ms"].(type) {
	case int64:
		if value > 0 {
			return min(time.Duration(min(value, int64(maxRetryAfter/time.Millisecond)))*time.Millisecond, maxRetryAfter)
		}
	case uint64:
		return maxRetryAfter
	}
	return 0
}

// isInterruption returns whether a stream ended because of its connection, and not because of its method or session.
// wasLost is whether the client itself found a frame of the stream stale: a method may answer with DATA_LOSS, too.
func isInterruption(err error, wasLost bool) bool {
	var call *Error
	if errors.As(err, &call) {
		reason := call.Details["reason"]
		return call.Code == DataLoss && wasLost ||
			call.Code == Cancelled && (reason == "draining" || reason == "stale")
	}
	return isClosed(err)
}

func isClosed(err error) bool {
	var closed *ClosedError
	return errors.As(err, &closed)
}

// isTransient returns whether a TLS failure may go away without a change: not for a wrong certificate, pin or peer.
func isTransient(failure TLSFailure) bool {
	switch failure {
	case TLSDisconnected, TLSConnectionReset, TLSTruncated, TLSBadRecord, TLSPeerAlert, TLSOther:
		return true
	}
	return false
}

// backoff yields random delays between 0 and a ceiling that doubles from 100 ms to 30 s. Full jitter spreads the clients of
// a restarted server evenly over time.
type backoff struct {
	random  func() float64 // from 0 up to, but not including, 1
	ceiling time.Duration
}

func newBackoff(random func() float64) *backoff { return &backoff{random: random, ceiling: firstDelay} }

// next returns the next delay, to which the server's wish is added in full.
func (b *backoff) next(retryAfter time.Duration) time.Duration {
	delay := retryAfter + time.Duration(b.random()*float64(b.ceiling))
	b.ceiling = min(b.ceiling*2, maxDelay)
	return delay
}

// reset starts at 100 ms again, after a success.
func (b *backoff) reset() { b.ceiling = firstDelay }

// attempts are the retries of one call so far. Calls make them at the first error, because most have none.
type attempts struct {
	*backoff
	done [attach + 1]bool
}

// systemRandom is the source of jitter.
func systemRandom() float64 { return rand.Float64() }
