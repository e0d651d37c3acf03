package main

import "errors"

// clients are the clients that the kit drives.
type clients struct{}

func newClients() *clients { return &clients{} }

// begin starts a step and returns what waits for its answer.
func (c *clients) begin(step string, line []byte) func() map[string]any {
	return func() map[string]any {
		if step == "hello" {
			return map[string]any{"ok": map[string]any{"kit": 1, "client": "zcproto-go/0.1.0"}}
		}
		result, err := runVectorStep(step, line)
		switch {
		case errors.Is(err, errUnknownStep):
			return map[string]any{"unsupported": "unknown step " + step}
		case err != nil:
			return map[string]any{"error": map[string]any{"kind": "argument", "message": err.Error()}}
		default:
			return map[string]any{"ok": result}
		}
	}
}

// close closes all clients.
func (c *clients) close() {}
