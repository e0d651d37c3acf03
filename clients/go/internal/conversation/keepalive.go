package conversation

import (
	"math"
	"time"
)

const (
	// pongTimeout is the time without a frame after a PING after which the server counts as unreachable.
	pongTimeout = 10 * time.Second
	// minKeepaliveInterval limits the PINGs to a server with a tiny idle timeout.
	minKeepaliveInterval = 250 * time.Millisecond

	never = time.Duration(math.MaxInt64)
)

type keepaliveVerdict byte

const (
	allGood keepaliveVerdict = iota
	pingDue
	unreachable
)

// keepalive decides when a PING is sent, and when the server counts as unreachable. It checks the connection at intervals of a
// third of the server's idle timeout. A PING is due if nothing was sent or nothing was received since the last check, so that no
// silence lasts two thirds of it.
type keepalive struct {
	hasSent      bool // since the last check, apart from its PING
	lastReceived time.Duration
	interval     time.Duration
	checkAt      time.Duration
	pongDeadline time.Duration
}

func newKeepalive() keepalive {
	return keepalive{interval: never, checkAt: never, pongDeadline: never}
}

// start begins with WELCOME; an idle timeout of 0 needs no checks.
func (k *keepalive) start(idleTimeout, now time.Duration) {
	k.lastReceived = now
	if idleTimeout > 0 {
		k.interval = min(max(idleTimeout/3, minKeepaliveInterval), never/4)
		k.checkAt = now + k.interval
	}
}

func (k *keepalive) received(now time.Duration) { k.lastReceived = now }

func (k *keepalive) pongReceived() { k.pongDeadline = never }

func (k *keepalive) deadline() time.Duration { return min(k.checkAt, k.pongDeadline) }

func (k *keepalive) check(now time.Duration) keepaliveVerdict {
	if k.pongDeadline <= now {
		if k.lastReceived <= k.pongDeadline-pongTimeout {
			return unreachable
		}
		k.pongDeadline = never // other bytes were received since
	}
	if k.checkAt > now {
		return allGood
	}
	isActive := k.hasSent && k.lastReceived > k.checkAt-k.interval
	k.hasSent = false
	k.checkAt = now + k.interval
	if isActive {
		return allGood
	}
	k.pongDeadline = min(k.pongDeadline, now+pongTimeout)
	return pingDue
}
