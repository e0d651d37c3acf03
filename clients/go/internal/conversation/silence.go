package conversation

import "time"

const (
	// silenceBeforePing is how long requests wait without a byte of the server before a PING asks whether it hangs.
	silenceBeforePing = 5 * time.Second
	// silenceAfterPing is how long a server may take for the first byte after that PING.
	silenceAfterPing = 2 * time.Second
	// Every so many bytes under way add a second, because a slow link takes its time.
	bytesPerSecond = 65_536
	// recentByte is how recent a byte makes a PING unnecessary when a call has timed out.
	recentByte = time.Second
)

// silence decides whether the server hangs with requests in flight (zcp1.md, section 6.6). It does not end the connection.
type silence struct {
	lastByte time.Duration // of the server
	heardAt  time.Duration // the last byte, or when the first of the requests in flight was sent
	pingAt   time.Duration // of the PING that has no answer yet; never without
	sent     int           // bytes since the last byte of the server
	unsent   int           // of the transport at the last check
	isSilent bool
}

func (s *silence) heard(now time.Duration) {
	s.lastByte, s.heardAt, s.pingAt, s.sent, s.isSilent = now, now, never, 0, false
}

// IsSilent reports whether the server hangs, as far as CheckSilence has found out.
func (c *Conversation) IsSilent() bool { return c.silence.isSilent }

// HasAnsweredSince reports whether a byte has come here since the last PING to another server, which is silent.
func (c *Conversation) HasAnsweredSince(other *Conversation) bool {
	return c.silence.lastByte > other.silence.pingAt
}

// CheckSilence sends a PING if requests wait and nothing has come from the server for a while, and notes that the connection is
// silent if that had no effect. unsent are the bytes that wait in the transport. It returns when to check again, a silent connection
// too; false if there is nothing to wait for before the next request.
func (c *Conversation) CheckSilence(unsent int, now Instant) (time.Duration, bool) {
	s := &c.silence
	if c.state == Closed || len(c.requests.inFlight) == 0 && s.pingAt == never {
		return never, false
	}
	if unsent < s.unsent && s.pingAt != never {
		s.pingAt = now.Mono // bytes before the PING are still being sent: the server reads
	}
	s.unsent = unsent
	if s.pingAt == never {
		if at := s.heardAt + silenceBeforePing; now.Mono < at {
			return at, true
		}
		c.pingForSilence(now)
	}
	at := s.pingAt + silenceAfterPing + time.Duration(s.sent/bytesPerSecond)*time.Second
	if now.Mono >= at {
		s.isSilent = true
		at = now.Mono + silenceAfterPing
	}
	return at, true
}

// DoubtServer sends a PING because a call has timed out, unless a byte came a moment ago; then call CheckSilence.
func (c *Conversation) DoubtServer(now Instant) {
	if c.silence.pingAt == never && now.Mono >= c.silence.heardAt+recentByte {
		c.pingForSilence(now)
	}
}

func (c *Conversation) pingForSilence(now Instant) {
	c.silence.pingAt = now.Mono
	if !c.isBlocked { // otherwise the requests that wait have to do
		c.Ping(now)
	}
}
