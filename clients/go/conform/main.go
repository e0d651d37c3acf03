// Command conform is the program through which the conformance kit drives this client (clients/conformance/README.md).
//
//	go build -o conform ./conform && zcproto-conformance ./conform
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"sync"
)

const maxLine = 8 << 20

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "conform:", err)
		os.Exit(1)
	}
}

// run answers steps until standard input ends. A step that waits does not delay the next.
func run() error {
	clients := newClients()
	defer clients.close()
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, maxLine)
	var output sync.Mutex
	for lines.Scan() {
		var head struct {
			ID   int64  `json:"id"`
			Step string `json:"step"`
		}
		line := append([]byte{}, lines.Bytes()...)
		if err := json.Unmarshal(line, &head); err != nil {
			return err
		}
		answer := func(result map[string]any) {
			result["id"] = head.ID
			text, err := json.Marshal(result)
			if err != nil {
				panic(err)
			}
			output.Lock()
			defer output.Unlock()
			_, _ = os.Stdout.Write(append(text, '\n'))
		}
		finish := clients.begin(head.Step, line)
		go func() { answer(finish()) }()
	}
	return lines.Err()
}
