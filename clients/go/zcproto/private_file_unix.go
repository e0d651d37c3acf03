//go:build unix

package zcproto

import (
	"fmt"
	"io/fs"
	"os"
	"syscall"
)

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
