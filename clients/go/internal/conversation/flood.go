package conversation

import "time"

const (
	// unrequestedPerSecond is the rate in the long run at which frames that answer no request are read. Each 2 KiB of body
	// count as one more frame.
	unrequestedPerSecond = 4_000
	// unrequestedBurst is how many of them are read without a pause.
	unrequestedBurst = 8_000
	bytesPerFrame    = 2_048
)

// A floodLimit is a leaky bucket: frames fill it, and time drains it.
type floodLimit struct {
	level float64
	at    time.Duration
}

func (f *floodLimit) count(bodySize int, now time.Duration) {
	left := f.level - (now-f.at).Seconds()*unrequestedPerSecond
	f.level = max(left, 0) + 1 + float64(bodySize)/bytesPerFrame
	f.at = now
}

// delay returns for how long to stop reading; 0 below the limit.
func (f *floodLimit) delay(now time.Duration) time.Duration {
	excess := f.level - unrequestedBurst
	if excess <= 0 {
		return 0
	}
	return max(time.Duration(excess*float64(time.Second)/unrequestedPerSecond)-(now-f.at), 0)
}
