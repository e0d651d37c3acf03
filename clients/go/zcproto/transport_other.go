//go:build !unix

package zcproto

import "net"

// writerOf returns nil: a goroutine sends everything.
func writerOf(net.Conn) func(data []byte) int { return nil }
