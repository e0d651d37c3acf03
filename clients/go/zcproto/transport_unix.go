//go:build unix

package zcproto

import (
	"net"
	"syscall"
)

// writerOf returns a function that writes as many bytes as the system takes without waiting.
func writerOf(conn net.Conn) func(data []byte) int {
	tcp, ok := conn.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return nil
	}
	var data []byte
	var written int
	write := func(fd uintptr) bool {
		written, err = syscall.Write(int(fd), data)
		return true // whatever happened: do not wait
	}
	return func(next []byte) int {
		data, written, err = next, 0, nil
		if raw.Write(write) != nil || err != nil || written < 0 {
			written = 0 // the goroutine that sends gets the error again
		}
		data = nil
		return written
	}
}
