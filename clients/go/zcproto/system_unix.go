//go:build unix

package zcproto

import (
	"fmt"
	"io/fs"
	"net"
	"os"
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

// openPrivate does not wait for the writer of a FIFO.
func openPrivate(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
}

// accessFault returns why a key file is not private, if it is not.
func accessFault(status fs.FileInfo) string {
	me := os.Geteuid()
	if system, ok := status.Sys().(*syscall.Stat_t); ok && system.Uid != 0 && int(system.Uid) != me {
		return fmt.Sprintf("is owned by another user (uid %d); change its owner to uid %d", system.Uid, me)
	}
	return modeFault(status.Mode())
}
